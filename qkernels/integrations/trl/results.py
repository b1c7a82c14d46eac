"""The per-token results of one step of `TokenDPOTrainer`, and TRL's metrics from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...functional.preference import Batch
from ...functional.results import TokenStats


class TokenResults(NamedTuple):
    """One step's per-token results, for `TokenDPOTrainer.on_token_results`. All without gradient.

    Token tensors are `[2B, T]` (chosen first), or `[N]` of a packed batch; entry t belongs to token t + 1; they are 0
    where nothing is scored.

    mode: "train" or "eval".
    loss: `[]`.
    labels: the token ids, -100 where nothing is scored.
    token_weights: factor of each token in its sequence's sums, LD-DPO's included.
    logps, reference_logps: log-probs; the reference's are None if they came as sums over sequences.
    token_rewards: beta * (logps - reference_logps), or None.
    logsumexp, entropy: of the policy.
    kl_reference_policy: KL(ref || policy), with the losses that use it; else None.
    chosen_rewards, rejected_rewards: `[B]`.
    cu_seqlens: int32 `[2B + 1]`, boundaries of a packed batch; None for a padded one.
    """

    mode: str
    loss: Tensor
    labels: Tensor
    token_weights: Tensor
    logps: Tensor
    reference_logps: Tensor | None
    token_rewards: Tensor | None
    logsumexp: Tensor
    entropy: Tensor
    kl_reference_policy: Tensor | None
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    cu_seqlens: Tensor | None


# Outputs of the head behind TRL's metrics.
METRIC_OUTPUTS = ("entropy", "mean_logits", "is_top1")

# What a metric's sum is divided by, the sum of these counts; the number of pairs for all others.
_DIVISORS = {
    "entropy": ("chosen_tokens", "rejected_tokens"),
    "logits/chosen": ("chosen_tokens",),
    "logits/rejected": ("rejected_tokens",),
    "mean_token_accuracy": ("chosen_tokens",),
    "kl/chosen": ("chosen_tokens",),
    "kl/rejected": ("rejected_tokens",),
    "aux_loss": ("processes",),
}
_COUNTS = ("chosen_tokens", "rejected_tokens", "pairs", "tokens", "processes")


def metric_sums(
    results: TokenResults, stats: TokenStats, batch: Batch, tokens: Tensor | int, aux_loss: Tensor | None
) -> dict[str, Tensor]:
    """Sums and counts of one process behind TRL's metrics, fp64 `[]` each, to be added up over processes.

    Args:
        results, stats: of the step; `stats` has `METRIC_OUTPUTS`.
        batch: its labels and weights. Averages over tokens are over its valid rows.
        tokens: how many tokens the batch has, with the prompts.
        aux_loss: of a mixture of experts.
    """

    def token_sums(values: Tensor) -> tuple[Tensor, Tensor]:
        """Over the valid rows of all chosen, and of all rejected answers."""
        rows = torch.where(batch.valid, values.reshape(batch.valid.shape).double(), 0.0)
        chosen, rejected = batch.sequences.sums(rows).chunk(2)
        return chosen.sum(), rejected.sum()

    assert stats.mean_logits is not None and stats.is_top1 is not None
    chosen_tokens, rejected_tokens = batch.sequences.sums(batch.valid.double()).chunk(2)
    entropy, logits, correct = token_sums(results.entropy), token_sums(stats.mean_logits), token_sums(stats.is_top1)
    logps = batch.sequences.sums(batch.weights * results.logps.reshape(batch.valid.shape)).double()
    chosen_logps, rejected_logps = logps.chunk(2)
    chosen, rejected = results.chosen_rewards.double(), results.rejected_rewards.double()
    sums: dict[str, Tensor | int] = {
        "chosen_tokens": chosen_tokens.sum(),
        "rejected_tokens": rejected_tokens.sum(),
        "pairs": chosen.shape[0],
        "tokens": tokens,
        "entropy": entropy[0] + entropy[1],
        "logits/chosen": logits[0],
        "logits/rejected": logits[1],
        "mean_token_accuracy": correct[0],
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": chosen_logps.sum(),
        "logps/rejected": rejected_logps.sum(),
    }
    if results.kl_reference_policy is not None:
        sums["kl/chosen"], sums["kl/rejected"] = token_sums(results.kl_reference_policy)
    if aux_loss is not None:
        sums["aux_loss"], sums["processes"] = aux_loss, 1
    device = results.logps.device
    return {name: torch.as_tensor(value, dtype=torch.float64, device=device) for name, value in sums.items()}


def metric_averages(sums: Mapping[str, float]) -> dict[str, float]:
    """TRL's metrics, from the sums and counts of all processes; 0 where nothing is counted."""
    averages = {}
    for name, value in sums.items():
        if name not in _COUNTS:
            divisor = sum(sums[count] for count in _DIVISORS.get(name, ("pairs",)))
            averages[name] = value / divisor if divisor else 0.0
    return averages
