"""qkernels inside other libraries: one module for each, imported by name and only when it is used."""
