"""What every layer of the engine stands on: names, layouts, sequences, argument checks, memory. It imports no other layer."""
