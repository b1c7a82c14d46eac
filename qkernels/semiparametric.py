"""Preference losses that learn their link, by the name of their paper: see `qkernels.objectives.learned_link`."""

from .objectives.learned_link import OSPO, PSPO, LearnedLink, isotonic_fit

__all__ = ["OSPO", "PSPO", "LearnedLink", "isotonic_fit"]
