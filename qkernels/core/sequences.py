"""How rows group into sequences: dense `[2B, T]` batches and packed `[1, N]` ones with `cu_seqlens`.

Everything that sums over, counts within, or broadcasts over a sequence goes through `Sequences`, so that the two
layouts cannot drift apart. Where the positions of the sequences are spread over ranks (`shard`), sums, counts and
positions are those of the whole sequences, on every rank.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Shard(Protocol):
    """Which part of every sequence the rows of this rank are; sums over the ranks (`qkernels.distributed.groups`)."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, differentiable."""

    def before(self, values: Tensor) -> Tensor:
        """Sum over the lower ranks; no gradient."""

    def gather(self, values: Tensor) -> Tensor:
        """Vectors of any lengths, those of all ranks one after the other; no gradient."""

    def largest(self, value: Tensor) -> Tensor:
        """The largest over the ranks; no gradient."""

    def for_rows(self) -> Shard:
        """The same for sums that enter the losses of single rows."""


def both_masked(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Where both log-probs are -inf."""
    return torch.maximum(logps, reference_logps).isneginf()


def log_ratios(logps: Tensor, reference_logps: Tensor, masked: Tensor | None = None) -> Tensor:
    """log pi - log pi_ref; 0 where both are -inf: a token that both models mask says nothing about the reward.

    masked: `both_masked` of the same, where it is known.
    """
    masked = both_masked(logps, reference_logps) if masked is None else masked
    return (logps - reference_logps).masked_fill_(masked, 0.0)


class Sequences(NamedTuple):
    """The rows of a batch, seen as sequences. The first half is chosen, the second half rejected.

    number: how many sequences, 2B.
    length: rows per sequence of a dense batch; all rows of a packed one.
    offsets: `[2B + 1]` int64, where each sequence of a packed batch starts and ends; None for a dense one.
    shard: which part of every sequence these rows are; None for all of it.
    """

    number: int
    length: int
    offsets: Tensor | None
    shard: Shard | None = None

    @staticmethod
    def of(rows: Tensor, cu_seqlens: Tensor | None, shard: Shard | None = None) -> Sequences:
        """The grouping of `rows`: `[2B, T]`, or `[1, N]` when `cu_seqlens` is given."""
        if cu_seqlens is None:
            return Sequences(rows.shape[0], rows.shape[1], None, shard)
        return Sequences(cu_seqlens.shape[0] - 1, rows.shape[1], cu_seqlens.long(), shard)

    def here(self) -> Sequences:
        """The same rows as sequences of their own: sums over this rank's rows only."""
        return self._replace(shard=None)

    def for_rows(self) -> Sequences:
        """The same for sums that enter the losses of single rows, of which each rank has its own."""
        return self if self.shard is None else self._replace(shard=self.shard.for_rows())

    def sums(self, rows: Tensor, keep_double: bool = False) -> Tensor:
        """Sum over each sequence, `[S, T] -> [2B]`, accumulated in float64 in a fixed order."""
        wide = rows.double()
        if self.offsets is None:
            total = wide.sum(1)
        else:
            total = torch.segment_reduce(wide.reshape(-1), "sum", offsets=self.offsets, initial=0.0, unsafe=True)
        if self.shard is not None:
            total = self.shard.sum(total)
        return total if keep_double else total.to(rows.dtype)

    def sums_of(self, several: list[Tensor]) -> Tensor:
        """`sums(rows, keep_double=True)` of each, `[K, 2B]`, in one collective."""
        if self.offsets is None:
            total = torch.stack(several).sum(2, dtype=torch.float64)
        else:
            here = self.here()
            total = torch.stack([here.sums(rows, keep_double=True) for rows in several])
        return total if self.shard is None else self.shard.sum(total)

    def to_tokens(self, per_sequence: Tensor) -> Tensor:
        """Give each row its sequence's value, `[2B] -> [S, T]`."""
        if self.offsets is None:
            return per_sequence.unsqueeze(1).expand(self.number, self.length)
        rows = torch.arange(self.length, device=per_sequence.device)
        # The sequence of row i is the number of sequences that end at or before i (empty ones included).
        return per_sequence[torch.searchsorted(self.offsets[1:], rows, right=True)].unsqueeze(0)

    def positions(self, valid: Tensor) -> Tensor:
        """1-based number of each row among the valid rows of its sequence, `[S, T]` int64."""
        running = valid.long().cumsum(1)
        if self.offsets is not None:
            before = torch.nn.functional.pad(running[0], (1, 0))[self.offsets[:-1]]
            running = running - self.to_tokens(before)
        if self.shard is not None:
            running = running + self.to_tokens(self.shard.before(self.here().sums(valid.double()))).long()
        return running

    def next_valid(self, values: Tensor, valid: Tensor) -> Tensor:
        """For each valid row, `values` at the next valid row of its sequence; 0 after the last one. `[S, T]`."""
        # Compact the valid rows, look one further, and put the result back: masked rows are stepped over.
        flat, n = valid.reshape(-1), valid.numel()
        slot = torch.where(flat, flat.long().cumsum(0) - 1, n)  # ignored rows all land in the slot n
        compact = values.new_zeros(n + 2).scatter(0, slot, torch.where(flat, values.reshape(-1), 0.0))
        position = slot.new_zeros(n + 2).scatter(0, slot, torch.where(flat, self.positions(valid).reshape(-1), 0))
        starts_a_sequence = position[slot + 1] <= 1
        return torch.where(flat & ~starts_a_sequence, compact[slot + 1], 0.0).view_as(values)
