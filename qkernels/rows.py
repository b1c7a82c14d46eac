"""The vocabulary of the row operations: which numbers a row of logits yields, and in which order they are stored.

A backend implements two operations on rows (`row_stats`, `row_grad`); their results travel as one buffer whose
leading dimension enumerates *columns*. This file fixes the order of those columns for every backend, Python and C++
alike (`csrc/core/columns.h` repeats it; a test compares the two).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

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

# Order of the per-row coefficients of `row_grad`. A buffer with only the first one stands for the common case in
# which nothing but `logps` is differentiated. With p, q the softmaxes of policy and reference, entry j of a row is
#   temperature * dL/dlogits_j = label * (1[j = y] - p_j) + p_j (p + p_logp * log p_j - p_logq * log q_j) - q * q_j
COEFFICIENTS: tuple[str, ...] = ("label", "p", "p_logp", "p_logq", "q")


class RowConfig(NamedTuple):
    """What a row operation does besides reading its tensors."""

    columns: int
    temperature: float
    ignore_index: int
    backend: str


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


def pair_outputs(
    logps: torch.Tensor, reference_logps: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Empty tensors for the results of `pair_loss` (`qkernels.ops`)."""
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_sequence = reference_logps is not None and reference_logps.dim() == 1
    return (
        logps.new_empty(()),
        logps.new_empty(sequences),
        logps.new_empty(logps.shape),
        logps.new_empty((0 if per_sequence else 2, *logps.shape)),
    )


def label_error(labels: torch.Tensor, flat_index: int, vocab: int) -> IndexError:
    """The error for a label outside [0, vocab): its position in `labels` and its value."""
    position, rest = [], flat_index
    for size in reversed(labels.shape):
        position.append(rest % size)
        rest //= size
    value = labels.reshape(-1)[flat_index].item()
    if len(labels.shape) == 2 and labels.shape[0] == 1:  # a flat or packed batch: one number says where
        position = position[:1]
    where = ", ".join(str(i) for i in reversed(position))
    return IndexError(f"labels[{where}] = {value} is outside [0, {vocab}) and is not ignore_index")


def carried(ctx: Any, stats: torch.Tensor, columns: int, carrying: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """What an autograd function on rows returns: the stats, a constant, and the columns that carry gradient."""
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # a column that nothing depends on has no gradient, rather than a zero one
    return stats, *(stats[column_index(columns, name)] for name in carrying)


def saveable(ctx: Any, *constants: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Constants for `ctx.save_for_backward`, which refuses those made in inference mode: they wait on the context."""
    if torch.compiler.is_compiling():
        ctx.waiting = None
        return constants
    ctx.waiting = tuple(c if c is not None and c.is_inference() else None for c in constants)
    return tuple(c if kept is None else None for c, kept in zip(constants, ctx.waiting, strict=True))


def restored(ctx: Any, *saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The constants that were given to `saveable`, from what the backward finds of them in `ctx.saved_tensors`."""
    if ctx.waiting is None:
        return saved
    return tuple(s if kept is None else kept for s, kept in zip(saved, ctx.waiting, strict=True))


def by_name(columns: int, carrying: tuple[str, ...], results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The results of such a function by name of column: with gradient where it carries one."""
    stats, *differentiable = results
    return {
        **dict(zip(column_names(columns), stats.unbind(0), strict=True)),
        **dict(zip(carrying, differentiable, strict=True)),
    }


def check_labels(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError for a label outside [0, V), on the CPU and with QKERNELS_CHECK=1 (which makes the host wait)."""
    if labels.device.type == "cpu" or os.environ.get("QKERNELS_CHECK") == "1":
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if bool(bad.any()):
            raise label_error(labels, int(bad.reshape(-1).nonzero()[0]), vocab)


def coefficients(stats: torch.Tensor, grads: Mapping[str, torch.Tensor | None], columns: int) -> torch.Tensor:
    """Upstream gradients of the columns -> the coefficients of `row_grad` (chain rule; formulas of each column).

    With H the entropy, K = KL(policy || reference), and upstream gradients g of each output:
      d logps      = g (1[j=y] - p_j)
      d logsumexp  = g p_j
      d entropy    = -g p_j (log p_j + H)
      d KL(ref||pi) = g (p_j - q_j)
      d KL(pi||ref) = g p_j (log p_j - log q_j - K)

    Args:
        stats: `[K, ...]`, what `row_stats` returned for `columns`.
        grads: by name of column, dL/dcolumn `[...]`; columns without a gradient are None or missing.
        columns: the mask that `stats` was made with.

    Returns:
        `[1, ...]` (only `label`) when nothing but `logps` has a gradient, else `[5, ...]` in the order of
        `COEFFICIENTS`.
    """
    label = grads.get("logps")
    others = [grads.get(name) for name in DIFFERENTIABLE[1:]]
    if label is not None and all(g is None for g in others):
        return label.unsqueeze(0)
    zero = torch.zeros_like(stats[0])
    label = zero if label is None else label
    lse, entropy, kl_ref_policy, kl_policy_ref = (zero if g is None else g for g in others)

    def times_value(g: torch.Tensor, name: str) -> torch.Tensor:
        # A KL divergence may be infinite; where nothing depends on it, it must not turn 0 * inf into NaN.
        if grads.get(name) is None:
            return zero
        return torch.where(g == 0, zero, g * stats[column_index(columns, name)])

    p = lse + kl_ref_policy - times_value(entropy, "entropy") - times_value(kl_policy_ref, "kl_policy_reference")
    return torch.stack([label, p, kl_policy_ref - entropy, kl_policy_ref, kl_ref_policy])
