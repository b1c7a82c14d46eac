"""The vocabulary of the row operations: which numbers a row of logits yields, and in which order they are stored.

A backend implements two operations on rows (`row_stats`, `row_grad`); their results travel as one buffer whose
leading dimension enumerates *columns*. This file fixes the order of those columns for every backend, Python and C++
alike (`csrc/core/columns.h` repeats it; a test compares the two).
"""

from __future__ import annotations

import torch

# Order of the per-row results of `row_stats`. z = logits / temperature, m = max of the raw logits of the row.
COLUMNS: tuple[str, ...] = (
    "row_max",  # m, in units of the raw logits: exact in fp32
    "log_sum",  # log sum exp(z - m / temperature); row_max / temperature + log_sum = logsumexp, without its rounding
    "logps",  # z_label - logsumexp
    "reference_row_max",
    "reference_log_sum",
    "reference_logps",
    "logsumexp",
    "reference_logsumexp",
    "entropy",
    "kl_reference_policy",
    "kl_policy_reference",
    "log_sum_sq_probs",
    "mean_logits",
    "is_top1",
)
BIT: dict[str, int] = {name: 1 << i for i, name in enumerate(COLUMNS)}

# What a backward pass needs of the forward pass: the first three columns of either model.
STATE = BIT["row_max"] | BIT["log_sum"] | BIT["logps"]
REFERENCE_STATE = BIT["reference_row_max"] | BIT["reference_log_sum"] | BIT["reference_logps"]

# Columns that read the reference row, and columns that have a gradient with respect to the policy's logits.
NEEDS_REFERENCE = REFERENCE_STATE | BIT["reference_logsumexp"] | BIT["kl_reference_policy"] | BIT["kl_policy_reference"]
DIFFERENTIABLE: tuple[str, ...] = ("logps", "logsumexp", "entropy", "kl_reference_policy", "kl_policy_reference")


def bits(names: tuple[str, ...] | list[str]) -> int:
    """The bit mask that asks for the named columns."""
    mask = 0
    for name in names:
        mask |= BIT[name]
    return mask


def column_names(mask: int) -> list[str]:
    """The columns of a mask, in storage order."""
    return [name for i, name in enumerate(COLUMNS) if mask >> i & 1]


def column_index(mask: int, name: str) -> int:
    """Where a column lies in the buffer made for this mask."""
    return (mask & (BIT[name] - 1)).bit_count()


def stats_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Per-row results are fp32, or fp64 for fp64 logits."""
    return torch.float64 if logits_dtype == torch.float64 else torch.float32
