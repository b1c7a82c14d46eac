"""Scoring pairs per token: log-probs, rewards, entropies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional.logits import token_logps, token_stats
from .encode import IGNORE, EncodedPair, pair_batch

T = TypeVar("T")


class PairLogps(NamedTuple):
    """log pi of each token of a pair's answers, nats; fp32, one number a token."""

    chosen: Tensor
    rejected: Tensor

    def rewards(self, reference: PairLogps, beta: float) -> tuple[float, float]:
        """beta * sum of log pi / pi_ref of the chosen and the rejected answer ("From r to Q*", eq. 11, summed)."""
        return (
            beta * (self.chosen - reference.chosen).sum().item(),
            beta * (self.rejected - reference.rejected).sum().item(),
        )


class TokenScores(NamedTuple):
    """One answer, a number per token.

    logps, reference_logps: nats.
    rewards: beta * (logps - reference_logps).
    entropies: of the policy before the token, nats.
    """

    logps: list[float]
    reference_logps: list[float]
    rewards: list[float]
    entropies: list[float]


@torch.no_grad()
def pair_logps(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    batch_size: int,
    on_batch: Callable[[], None] | None = None,
) -> list[PairLogps]:
    """log pi of each answer token, without gradients.

    Args:
        model: scored as it is.
        pairs: in any order; the result follows it.
        batch_size: pairs per forward pass.
        on_batch: called after each pass.
    """
    model.eval()
    result = []
    for start in range(0, len(pairs), batch_size):
        batch = pair_batch(pairs[start : start + batch_size], model.config.pad_token_id)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        rows = _split(token_logps(logits, batch.labels), batch.labels)
        result += [PairLogps(*sides) for sides in zip(*_halves(rows), strict=True)]
        if on_batch is not None:
            on_batch()
    return result


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    reference: Sequence[PairLogps],
    beta: float,
    batch_size: int,
) -> list[tuple[TokenScores, TokenScores]]:
    """Everything the report shows, per pair: scores of the chosen and of the rejected answer."""
    model.eval()
    result = []
    for start in range(0, len(pairs), batch_size):
        batch = pair_batch(pairs[start : start + batch_size], model.config.pad_token_id)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        stats = token_stats(logits, batch.labels, outputs=("logps", "entropy"))
        if stats.logps is None or stats.entropy is None:
            raise RuntimeError("token_stats left out an output it was asked for")
        logps, entropies = _split(stats.logps, batch.labels), _split(stats.entropy, batch.labels)
        known = reference[start : start + batch_size]
        known_rows = [pair.chosen for pair in known] + [pair.rejected for pair in known]
        scores = [
            TokenScores(logp.tolist(), ref.tolist(), (beta * (logp - ref)).tolist(), entropy.tolist())
            for logp, ref, entropy in zip(logps, known_rows, entropies, strict=True)
        ]
        result += list(zip(*_halves(scores), strict=True))
    return result


def _split(rows: Tensor, labels: Tensor) -> list[Tensor]:
    """The rows with a label, per sequence; copies, so that the padded batch can go."""
    return [row[label != IGNORE].clone() for row, label in zip(rows, labels, strict=True)]


def _halves(rows: list[T]) -> tuple[list[T], list[T]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]
