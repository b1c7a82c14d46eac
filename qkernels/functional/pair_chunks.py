"""The plan `pair_chunks`: the loss is a sum over pairs, and each pair's rows fit into one chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.columns import column_names
from ..core.sequences import Sequences
from ..head.call import HeadCall
from ..head.chunks import Selection
from . import preference, valid_rows
from .preference import Batch, Loss, Reference
from .valid_rows import Counts


class PairChunks:
    """The loss of each chunk of pairs, differentiated as soon as the chunk's rows are known (`chunks.KnownLoss`).

    1. `groups`: consecutive pairs whose valid rows together fill a chunk.
    2. `selections`: the rows of each group, those of its chosen sequences first, then those of its rejected ones.
    3. `chunks.known_gradients` computes the logits of a group and reads the per-row columns off them.
    4. `gradient_of`: these rows are a packed batch of their own; its loss is differentiated with respect to columns.
    5. `chunks.known_gradients` forms dL/dlogits over the logits, and adds its GEMMs to dX and dW.
    6. `HiddenLoss` computes the value of the loss from the columns of all rows, and ties the gradients to it.

    A loss known token by token or sequence by sequence differs in steps 1, 2 and 4 only.

    Args:
        call: the pass: its chunk size, columns, backend and the indices of the valid rows.
        batch: all rows.
        reference: its cached log-probs.
        loss: what a pair loses.
        counts: the numbers of valid rows, known to the host.
    """

    def __init__(self, call: HeadCall, batch: Batch, reference: Reference, loss: Loss, *, counts: Counts):
        assert counts.known is not None and call.valid is not None
        self.batch, self.reference, self.loss = batch, reference, loss
        self.names, self.backend = column_names(call.config.columns), call.config.backend
        self.half = len(counts.known) // 2
        self.groups = groups_of(counts.known, call.config.chunk_rows)
        self.selections = self._selections(counts.known, call.valid)
        # Where sequences begin among the valid rows, on the device: numbers copied there would make the host
        # synchronise. The numbers that the caller has given may be wrong, but the chunks are cut accordingly.
        lengths = valid_rows.sums(batch) if counts.unchecked is None else counts.unchecked
        self.starts = pad(lengths, (1, 0)).cumsum(0).int()
        self.share = 1.0 / self.half if loss.reduction == "mean" else 1.0
        # LD-DPO with alpha 0 leaves rows out that a mean over the answer's tokens still counts.
        discounts = loss.spec.ld_alpha is not None
        self.counts = batch.sequences.sums(batch.base_weights, keep_double=True) if discounts else None

    def _selections(self, counts: Sequence[int], index: Tensor) -> list[Selection]:
        rows = self.batch.labels.numel()
        if len(self.groups) == 1 and sum(counts) == rows:
            return [slice(0, rows)]
        half, ends = self.half, [0, *accumulate(counts)]
        return [
            torch.cat([index[ends[first] : ends[last]], index[ends[half + first] : ends[half + last]]])
            for first, last in self.groups
        ]

    def gradient_of(self, chunk: int, stats: Tensor) -> Mapping[str, Tensor]:
        """dL/dcolumn `[1, n]` by name, from the columns `[K, 1, n]` of a chunk."""
        named = dict(zip(self.names, stats, strict=True))
        loss = self.loss
        upstream = preference.loss_gradient(named, self._batch(chunk), self._reference(chunk), loss, self.backend)
        return {name: g * self.share for name, g in upstream.items()}

    def _rows(self, chunk: int, per_row: Tensor) -> Tensor:
        """The chunk's rows of `[S, T]`, as `[1, n]`."""
        return per_row.reshape(-1)[self.selections[chunk]].unsqueeze(0)

    def _sequences(self, chunk: int, per_sequence: Tensor) -> Tensor:
        """The chunk's sequences of `[2B]`, chosen first."""
        first, last = self.groups[chunk]
        return torch.cat([per_sequence[first:last], per_sequence[self.half + first : self.half + last]])

    def _batch(self, chunk: int) -> Batch:
        """The chunk as a packed batch."""
        batch, half = self.batch, self.half
        first, last = self.groups[chunk]
        chosen = self.starts[first : last + 1] - self.starts[first]
        rejected = self.starts[half + first + 1 : half + last + 1] - self.starts[half + first]
        cu_seqlens = torch.cat([chosen, chosen[-1] + rejected])
        labels = self._rows(chunk, batch.labels)
        return Batch(
            labels=labels,
            used=self._rows(chunk, batch.used),
            weights=self._rows(chunk, batch.weights),
            base_weights=self._rows(chunk, batch.base_weights),
            sequences=Sequences.of(labels, cu_seqlens),
            cu_seqlens=cu_seqlens,
            ignore_index=batch.ignore_index,
            counts=None if self.counts is None else self._sequences(chunk, self.counts),
        )

    def _reference(self, chunk: int) -> Reference:
        tokens, sums = self.reference
        return Reference(
            None if tokens is None else self._rows(chunk, tokens),
            None if sums is None else self._sequences(chunk, sums),
        )


def groups_of(counts: Sequence[int], chunk_rows: int) -> list[tuple[int, int]]:
    """Consecutive pairs whose valid rows together fill a chunk, as ranges of pair numbers.

    Args:
        counts: valid rows of each of the 2B sequences.
        chunk_rows: rows that fit a chunk.
    """
    half = len(counts) // 2
    groups, start, filled = [], 0, 0
    for pair in range(half):
        here = counts[pair] + counts[half + pair]
        if filled and filled + here > chunk_rows:
            groups.append((start, pair))
            start, filled = pair, 0
        filled += here
    groups.append((start, half))
    return groups
