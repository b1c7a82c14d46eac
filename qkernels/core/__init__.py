"""What every layer stands on: names, layouts, sequences, argument checks, memory. It imports no other layer."""
