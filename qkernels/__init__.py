"""Exact, fused token-level preference losses and rewards for language models."""

from . import objectives, reference
from ._info import info
from ._version import __version__
from .functional import TokenStats, fused_token_dpo, shift_labels, token_logps, token_stats
from .linear import fused_linear_token_dpo, linear_token_logps, linear_token_stats, plan_linear
from .mdp import TokenMDP, token_mdp
from .objectives import PairScores
from .plans import LinearPlan
from .preference import TokenDPOOutput

__all__ = [
    "LinearPlan",
    "PairScores",
    "TokenDPOOutput",
    "TokenMDP",
    "TokenStats",
    "__version__",
    "fused_linear_token_dpo",
    "fused_token_dpo",
    "info",
    "linear_token_logps",
    "linear_token_stats",
    "objectives",
    "plan_linear",
    "reference",
    "shift_labels",
    "token_logps",
    "token_mdp",
    "token_stats",
]
