"""Fixtures of the applications' tests."""

from score_runs import folders, models  # noqa: F401
