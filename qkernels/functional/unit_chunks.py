"""The plans that know a loss unit by unit: a sum over tokens, sequences or pairs, of which a chunk holds whole ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import devices
from ..core.fields import field_names
from ..core.sequences import Sequences
from ..head.call import HeadCall
from ..head.chunks import Selection
from . import valid_rows
from .preference import Batch
from .valid_rows import Counts

# How many sequences make a unit. Those of a pair lie half a batch apart.
SEQUENCES_OF = {"sequence": 1, "pair": 2}


class Part(NamedTuple):
    """Some units of a batch, and how to take what belongs to them off tensors of the whole batch.

    batch: their rows: the whole batch as it is, or one chunk as a packed batch. Chunks of tokens have no sequences: all
        of their rows look like one there.
    rows: from `[S, T]` of the whole batch to the rows of the part.
    sequences: the same for `[S]`.
    """

    batch: Batch
    rows: Callable[[Tensor], Tensor]
    sequences: Callable[[Tensor], Tensor]

    @staticmethod
    def whole(batch: Batch) -> Part:
        """All units."""
        shape = batch.labels.shape
        return Part(batch, lambda per_row: per_row.reshape(shape), lambda per_sequence: per_sequence)


class UnitChunks(ABC):
    """The loss of each chunk of units, differentiated as soon as the chunk's rows are known (`chunks.KnownLoss`).

    1. `groups`: consecutive units whose valid rows together fill a chunk. Units without a gradient come last.
    2. `selections`: the rows of each group; of pairs those of the chosen sequences first.
    3. `chunks.known_gradients` computes the logits of a group and reads the per-row fields off them.
    4. `gradient_of`: these rows are a batch of their own; its loss is differentiated with respect to fields.
    5. `chunks.known_gradients` forms dL/dlogits over the logits, and adds its GEMMs to dX and dW.
    6. The caller computes the value of the loss from the fields of all rows, and ties the gradients to it.

    Args:
        call: the pass: its chunk size, fields, backend and the indices of the valid rows.
        batch: all rows.
        unit: "token", "sequence" or "pair".
        counts: the numbers of valid rows, known to the host.
        active: bool `[S, T]`, rows that may have a gradient, where some are known to have none and the host may look;
            for sequences, those with such a row.
        drops: whether rows that turn out to have none are to leave the GEMMs too.
    """

    def __init__(
        self, call: HeadCall, batch: Batch, unit: str, *, counts: Counts,
        active: Tensor | None = None, drops: bool = False,
    ):  # fmt: skip
        assert counts.known is not None and call.valid is not None
        self.batch = batch
        self.names, self.drops, self.dropped = field_names(call.config.fields), drops, 0
        self.apart = batch.sequences.number // SEQUENCES_OF.get(unit, 1)
        self.selections: list[Selection]
        self.leading: list[int]
        self.order: Tensor | None = None  # of the sequences, where those with a gradient come first
        self.groups: list[tuple[int, int]] = []
        size = call.config.chunk_rows
        if unit == "token":
            index = call.valid
            leading = index.shape[0]
            if active is not None:
                wanted = active.reshape(-1)[index]
                leading = int(wanted.sum())
                index = torch.cat([index[wanted], index[~wanted]]) if leading < index.shape[0] else index
            self.selections, self.leading = _of_tokens(index, batch.labels.numel(), size, leading)
        else:
            assert SEQUENCES_OF[unit] == 1 or active is None
            self.starts = _starts(batch, counts)
            self._of_sequences(counts.known, call.valid, size, active)

    def _of_sequences(self, counts: Sequence[int], index: Tensor, size: int, active: Tensor | None) -> None:
        """Groups and selections of whole sequences or pairs."""
        batch, known = self.batch, list(counts)
        may = [True] * len(known)
        if active is not None:
            may = [bool(flag) for flag in (batch.sequences.sums((active & batch.valid).double()) > 0).tolist()]
            if not all(may):
                order = sorted(range(len(known)), key=lambda i: not may[i])
                pieces = index.split(known)
                index = torch.cat([pieces[i] for i in order])
                known, may = [known[i] for i in order], [may[i] for i in order]
                self.order = torch.tensor(order, device=index.device)
                self.starts = _starts_on_host(known).to(index.device)
        self.groups = groups_of(known, size, self.apart)
        ends = [0, *accumulate(known)]
        if len(self.groups) == 1 and sum(known) == batch.labels.numel() and self.order is None:
            self.selections = [slice(0, batch.labels.numel())]
        else:
            self.selections = [
                torch.cat([index[ends[first + at] : ends[last + at]] for at in range(0, len(known), self.apart)])
                for first, last in self.groups
            ]
        self.leading = [
            sum(n for n, flag in zip(known[first:last], may[first:last], strict=True) if flag)
            if active is not None
            else self.batch.labels.numel()
            for first, last in self.groups
        ]

    def gradient_of(self, chunk: int, stats: Tensor) -> Mapping[str, Tensor]:
        """dL/dfield `[1, n]` by name, from the fields `[K, 1, n]` of a chunk."""
        return self.gradient(dict(zip(self.names, stats, strict=True)), self.part(chunk))

    @abstractmethod
    def gradient(self, stats: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        """dL/dfield by name of field, from the fields of the part's rows, both shaped like its labels."""

    def part(self, chunk: int) -> Part:
        """The units of a chunk, as a packed batch."""
        batch, selection = self.batch, self.selections[chunk]
        whole = isinstance(selection, slice) and len(self.selections) == 1

        def rows(per_row: Tensor) -> Tensor:
            return per_row.reshape(1, -1) if whole else per_row.reshape(-1)[selection].unsqueeze(0)

        def sequences(per_sequence: Tensor) -> Tensor:
            if not self.groups:
                raise ValueError("a chunk of tokens has no sequences")
            per_sequence = per_sequence if self.order is None else per_sequence[self.order]
            first, last = self.groups[chunk]
            pieces = [per_sequence[first + at : last + at] for at in range(0, per_sequence.shape[0], self.apart)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        labels = rows(batch.labels)
        cu_seqlens = self._cu_seqlens(chunk) if self.groups else None
        return Part(
            batch=Batch(
                labels=labels,
                valid=rows(batch.valid),
                weights=rows(batch.weights),
                base_weights=rows(batch.base_weights),
                sequences=Sequences.of(labels, cu_seqlens),
                cu_seqlens=cu_seqlens,
                ignore_index=batch.ignore_index,
            ),
            rows=rows,
            sequences=sequences,
        )

    def _cu_seqlens(self, chunk: int) -> Tensor:
        """Where the sequences of a chunk begin and end among its rows, int32."""
        if len(self.groups) == 1:
            return self.starts
        first, last = self.groups[chunk]
        starts, ends, base = [], self.starts.shape[0] - 1, None
        for at in range(0, ends, self.apart):
            of_part = self.starts[first + at : last + at + 1] - self.starts[first + at]
            starts.append(of_part if base is None else base + of_part[1:])
            base = starts[-1][-1]
        return starts[0] if len(starts) == 1 else torch.cat(starts)


def _starts_on_host(lengths: Sequence[int]) -> Tensor:
    """Where sequences of these lengths begin, and the last one ends, int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _starts(batch: Batch, counts: Counts) -> Tensor:
    """Where the sequences of a batch begin among its valid rows, and the last one ends, int32."""
    if devices.on_cpu(batch.labels.device) and counts.unchecked is None and counts.known is not None:
        return _starts_on_host(counts.known)
    # On the device: numbers copied there would make the host synchronise. The numbers that the caller has given may be
    # wrong, but the chunks are cut accordingly.
    lengths = valid_rows.sums(batch) if counts.unchecked is None else counts.unchecked
    return pad(lengths.long(), (1, 0)).cumsum(0).int()  # of floats it has no deterministic algorithm on a GPU


def _of_tokens(index: Tensor, rows: int, size: int, leading: int) -> tuple[list[Selection], list[int]]:
    """Chunks of any rows, and how many of each may have a gradient."""
    n = index.shape[0]
    starts = range(0, n, size)
    lengths = [max(0, min(size, leading - start)) for start in starts]
    if n == rows and leading == n:
        return [slice(start, min(n, start + size)) for start in starts], lengths
    return [index[start : start + size] for start in starts], lengths


def groups_of(counts: Sequence[int], chunk_rows: int, units: int | None = None) -> list[tuple[int, int]]:
    """Consecutive units whose valid rows together fill a chunk, as ranges of their numbers.

    Args:
        counts: valid rows of each sequence.
        chunk_rows: rows that fit a chunk.
        units: how many there are; unit i has the sequences i, i + units and so on. Half of the sequences by default.
    """
    units = len(counts) // 2 if units is None else units
    groups, start, filled = [], 0, 0
    for unit in range(units):
        here = sum(counts[unit::units])
        if filled and filled + here > chunk_rows:
            groups.append((start, unit))
            start, filled = unit, 0
        filled += here
    groups.append((start, units))
    return groups
