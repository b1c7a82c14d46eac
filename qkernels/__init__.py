"""Exact, fused token-level preference losses and rewards for language models."""

import importlib
from types import ModuleType

from . import objectives, reference
from ._version import __version__
from .functional.hidden import fused_linear_token_dpo, linear_token_logps, linear_token_stats, plan_linear
from .functional.info import info
from .functional.logits import fused_token_dpo, shift_labels, token_logps, token_stats
from .functional.mdp import TokenMDP, token_mdp
from .functional.policy import fused_linear_policy_loss, fused_policy_loss, plan_linear_policy
from .functional.policy_loss import PolicyMetrics, PolicyOutput
from .functional.results import TokenDPOOutput, TokenStats
from .functional.sequence_loss import SequenceOutput
from .functional.unpaired import fused_linear_sequence_loss, fused_sequence_loss, plan_linear_sequences
from .head.plan import LinearPlan
from .objectives import PairScores, PolicyScores, SequenceScores

__all__ = [
    "LinearPlan",
    "PairScores",
    "PolicyMetrics",
    "PolicyOutput",
    "PolicyScores",
    "SequenceOutput",
    "SequenceScores",
    "TokenDPOOutput",
    "TokenMDP",
    "TokenStats",
    "__version__",
    "fused_linear_policy_loss",
    "fused_linear_sequence_loss",
    "fused_linear_token_dpo",
    "fused_policy_loss",
    "fused_sequence_loss",
    "fused_token_dpo",
    "info",
    "linear_token_logps",
    "linear_token_stats",
    "objectives",
    "plan_linear",
    "plan_linear_policy",
    "plan_linear_sequences",
    "reference",
    "shift_labels",
    "token_logps",
    "token_mdp",
    "token_stats",
]

# Public modules that are imported when they are asked for: most need transformers.
_MODULES = ("credit", "data", "decoding", "heatmap", "integrations", "intervals", "judge", "monitor",
            "preference_classifier", "report", "score", "search", "tabular")  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
