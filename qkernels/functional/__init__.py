"""The public functions: they check a request, plan it, run it, and assemble the outputs. `qkernels` exports them."""
