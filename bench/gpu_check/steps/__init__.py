"""The steps, by what they are for."""
