"""The vocabulary of the row operations: which numbers a row of logits yields, and in which order they are stored.

A backend implements two operations on rows (`row_stats`, `row_grad`); their results travel as one buffer whose
leading dimension enumerates *fields*, so called because most of them are fields of `TokenStats`. This file declares
each field: its place in that buffer, what it needs, how users get it, and how the numbers of vocabulary shards combine
(`csrc/core/fields.h` repeats the order; a test compares the two).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .printed import summarised

# The per-row results of `row_stats`, in their order. z = logits / temperature, m = max of the raw logits of the row.
FIELDS: tuple[str, ...] = (
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
BIT: dict[str, int] = {name: 1 << i for i, name in enumerate(FIELDS)}

# The softmax statistics of either model, its first three fields: what a backward pass needs of the forward pass.
SOFTMAX = BIT["row_max"] | BIT["log_sum"] | BIT["logps"]
REFERENCE_SOFTMAX = BIT["reference_row_max"] | BIT["reference_log_sum"] | BIT["reference_logps"]

# Fields that read both models' rows at once; fields that read the reference's row; fields that have a gradient with
# respect to the policy's logits.
DIVERGENCES = BIT["kl_reference_policy"] | BIT["kl_policy_reference"]
NEEDS_REFERENCE = REFERENCE_SOFTMAX | BIT["reference_logsumexp"] | DIVERGENCES
DIFFERENTIABLE: tuple[str, ...] = ("logps", "logsumexp", "entropy", "kl_reference_policy", "kl_policy_reference")


class TokenStats(NamedTuple):
    """Per-token results of `token_stats`, each shaped like `labels`; None where not asked for.

    logps: log pi(label), nats. Differentiable.
    logsumexp: log sum exp(logits / temperature), nats; V(s) = beta * logsumexp. Differentiable.
    entropy: of pi, nats. Differentiable.
    kl_reference_policy: KL(pi_ref || pi), nats. Differentiable in the policy.
    kl_policy_reference: KL(pi || pi_ref), nats. Differentiable in the policy.
    log_sum_sq_probs: log sum pi^2, as WPO uses it.
    mean_logits: mean over the vocabulary of logits / temperature.
    is_top1: bool, whether the label has the largest logit (the first of equals).
    reference_logps, reference_logsumexp: the same of the reference.
    """

    logps: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    kl_reference_policy: Tensor | None = None
    kl_policy_reference: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    reference_logps: Tensor | None = None
    reference_logsumexp: Tensor | None = None

    def __repr__(self) -> str:
        return summarised(self)

    @staticmethod
    def of(stats: Mapping[str, Tensor], outputs: Sequence[str], shape: torch.Size, detach: bool = False) -> TokenStats:
        """The named outputs out of per-row results by name, shaped like the caller's labels."""
        found = {name: stats[name].detach() if detach else stats[name] for name in outputs}
        return TokenStats(**{name: (x > 0 if name == "is_top1" else x).view(shape) for name, x in found.items()})


# --- shards of the vocabulary -----------------------------------------------------------------------------------------


class ModelShard(Protocol):
    """One model's rows as this rank's shard of the vocabulary sees them, and, once the sums over all shards are known,
    as the whole rows are. All `[S, T]` in float64.

    With m the maximum of the whole row and e_j = exp((z_j - m) / temperature):

    log_mass: log of the shard's sum of e_j.
    total, log_sum: the whole row's sum of e_j and its log.
    invalid: 0, and NaN in a row that has no softmax.
    width_share: the share of the vocabulary that this shard holds.
    """

    log_mass: Tensor
    total: Tensor
    log_sum: Tensor
    invalid: Tensor
    width_share: float

    def weighted(self, values: Tensor) -> Tensor:
        """The shard's sum of e_j, times a mean over the shard's own softmax; 0 where the sum is 0."""

    def label_is_first(self, in_shard: Tensor) -> Tensor:
        """Sums over all shards to 1 where the label is the first maximum of the whole row, to 0 or less elsewhere."""


class Combined(NamedTuple):
    """How a result of whole rows follows from those of vocabulary shards, by one sum over the shards.

    Both functions take the policy's shard and the reference's, or the policy's once more where there is no reference.

    share: from the backend's result for a shard's own softmax to what the shard adds to the sum.
    whole: from the sum to the result.
    of_nothing: what a backend would say of a shard whose entries are all -inf.
    """

    share: Callable[[Tensor, ModelShard, ModelShard], Tensor]
    whole: Callable[[Tensor, ModelShard, ModelShard], Tensor]
    of_nothing: float = 0.0


# By field; the softmax statistics and both logsumexp follow from the sums of e_j themselves.
COMBINED: dict[str, Combined] = {
    "entropy": Combined(
        share=lambda entropy, policy, _: policy.weighted(entropy - policy.log_mass),
        whole=lambda total, policy, _: (total / policy.total + policy.log_sum).clamp_min(0.0),
    ),
    "kl_reference_policy": Combined(
        share=lambda kl, policy, reference: reference.weighted(kl + (reference.log_mass - policy.log_mass)),
        whole=lambda total, policy, reference: (total / reference.total - reference.log_sum + policy.log_sum).clamp_min(
            0.0
        ),
    ),
    "kl_policy_reference": Combined(
        share=lambda kl, policy, reference: policy.weighted(kl + (policy.log_mass - reference.log_mass)),
        whole=lambda total, policy, reference: (total / policy.total - policy.log_sum + reference.log_sum).clamp_min(
            0.0
        ),
    ),
    "log_sum_sq_probs": Combined(
        share=lambda log_sum_sq, policy, _: torch.exp(log_sum_sq + 2 * policy.log_mass),
        whole=lambda total, policy, _: total.log() - 2 * policy.log_sum,
    ),
    "mean_logits": Combined(
        share=lambda mean, policy, _: mean * policy.width_share,
        whole=lambda total, policy, _: total + policy.invalid,
        of_nothing=-torch.inf,
    ),
    "is_top1": Combined(
        share=lambda in_shard, policy, _: policy.label_is_first(in_shard),
        whole=lambda total, policy, _: (total > 0) + policy.invalid,
    ),
}


# --- masks of fields --------------------------------------------------------------------------------------------------


def bits(names: tuple[str, ...] | list[str]) -> int:
    """The bit mask that asks for the named fields."""
    mask = 0
    for name in names:
        mask |= BIT[name]
    return mask


def of_policy(mask: int) -> int:
    """The fields of a policy that stand for these of a reference, in the same order: `logps` for `reference_logps`."""
    return bits([name.removeprefix("reference_") for name in field_names(mask)])


def field_names(mask: int) -> list[str]:
    """The fields of a mask, in storage order."""
    return [name for i, name in enumerate(FIELDS) if mask >> i & 1]


def field_index(mask: int, name: str) -> int:
    """Where a field lies in the buffer made for this mask."""
    return (mask & (BIT[name] - 1)).bit_count()


def stats_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Per-row results are fp32, or fp64 for fp64 logits."""
    return torch.float64 if logits_dtype == torch.float64 else torch.float32
