"""Fixtures of the applications' tests."""

import importlib.util

if importlib.util.find_spec("transformers") and importlib.util.find_spec("tokenizers"):
    from score_runs import folders, models  # noqa: F401
