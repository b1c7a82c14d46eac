"""Text of data sets on its way to terminals and reports, and token sequences on their way into models."""
