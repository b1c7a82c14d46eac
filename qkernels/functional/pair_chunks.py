"""The plan `pair_chunks`: a preference loss is a sum over pairs, and each pair's rows fit into one chunk."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..head.call import HeadCall
from . import preference
from .preference import Batch, Loss, Reference
from .unit_chunks import Part, UnitChunks
from .valid_rows import Counts


class PairChunks(UnitChunks):
    """A preference loss by chunks of pairs.

    Args:
        call: the pass: its chunk size, fields, backend and the indices of the valid rows.
        batch: all rows.
        reference: its cached log-probs.
        loss: what a pair loses.
        counts: the numbers of valid rows, known to the host.
    """

    def __init__(self, call: HeadCall, batch: Batch, reference: Reference, loss: Loss, *, counts: Counts):
        super().__init__(call, batch, "pair", counts=counts)
        self.reference, self.of_pair, self.backend = reference, loss, call.config.backend
        pairs = batch.sequences.number // 2
        self.share = 1.0 / pairs if loss.reduction == "mean" else 1.0
        # LD-DPO with alpha 0 leaves rows out that a mean over the answer's tokens still counts.
        discounts = loss.spec.ld_alpha is not None
        self.token_counts = batch.sequences.sums(batch.base_weights, keep_double=True) if discounts else None
        self.mean_count: Tensor | None = None  # which the likelihood of the chosen answers is averaged over
        if not loss.spec.is_default:
            totals = batch.sequences.sums(batch.base_weights, keep_double=True)
            self.mean_count = totals[:pairs].mean()

    def gradient(self, stats: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        """d loss / d field of a chunk's rows, by name."""
        batch = part.batch._replace(
            counts=None if self.token_counts is None else part.sequences(self.token_counts),
            mean_count=self.mean_count,
        )
        tokens, sums = self.reference
        reference = Reference(
            None if tokens is None else part.rows(tokens), None if sums is None else part.sequences(sums)
        )
        upstream = preference.loss_gradient(dict(stats), batch, reference, self.of_pair, self.backend)
        return {name: g * self.share for name, g in upstream.items()}
