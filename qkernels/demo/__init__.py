"""`qkernels demo`: train a small model with token-level DPO, end to end, and show where its rewards fall.

Importing this package imports neither transformers nor tokenizers; `run_demo` does, when it is called.
"""

from .options import DemoError, DemoOptions
from .run import run_demo

__all__ = ["DemoError", "DemoOptions", "run_demo"]
