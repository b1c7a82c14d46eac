"""Exact, fused token-level preference losses and rewards for language models."""

from . import objectives, reference
from ._info import info
from ._version import __version__
from .functional import TokenStats, fused_token_dpo, shift_labels, token_logps, token_stats
from .mdp import TokenMDP, token_mdp
from .objectives import PairScores
from .preference import TokenDPOOutput

__all__ = [
    "PairScores",
    "TokenDPOOutput",
    "TokenMDP",
    "TokenStats",
    "__version__",
    "fused_token_dpo",
    "info",
    "objectives",
    "reference",
    "shift_labels",
    "token_logps",
    "token_mdp",
    "token_stats",
]
