"""Which way through the head: the plans of the hidden-states path, what each costs, and how one is chosen.

| plan | when | products, in units of 2 N V H |
|---|---|---|
| forward_only | nothing needs a gradient | 1: logits |
| frozen_head | the head needs no gradient, only `logps` has one | 2: logits, unscaled dX |
| pair_chunks | the loss is a sum over pairs, and each pair fits a chunk | 3: logits, dX, dW |
| recompute | everything else | 4: logits, logits again, dX, dW |

(one product less where hidden states or weight need no gradient; the reference costs one more, two under `recompute`
with a gradient of a divergence). N counts valid rows: ignored ones are dropped first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.memory import free_memory

PLANS = ("frozen_head", "pair_chunks", "recompute")

# A chunk of logits is at most this large unless asked for, by device type: enough rows that the products run at full
# speed (1400 rows of V = 128256 in bf16 on a GPU).
_DEFAULT_BYTES = {"cpu": 256 * 2**20}
_DEFAULT_BYTES_ELSEWHERE = 2**30
# ... and at most this share of the memory that is free; twice that for a pair that has to fit.
_SHARE_OF_FREE = 8


class LinearPlan(NamedTuple):
    """What a call on hidden states does, known before it runs.

    name: "forward_only", "frozen_head", "pair_chunks" or "recompute".
    reason: why this one.
    rows: valid rows, N; all rows where the labels' values cannot be read yet.
    chunk_rows: rows of logits that exist at a time, at most.
    chunks: number of chunks.
    products: matrix products of the policy's head, in units of 2 N V H; the backward's included.
    reference_products: the same of the reference's head.
    chunk_bytes: size of a chunk's buffers.
    peak_bytes: memory beyond inputs and their gradients, at most: the chunk, and what the plan keeps besides.
    logits: how the logits' products run.
    """

    name: str
    reason: str
    rows: int
    chunk_rows: int
    chunks: int
    products: int
    reference_products: int
    chunk_bytes: int
    peak_bytes: int
    logits: str

    def __str__(self) -> str:
        reference = f" + {self.reference_products} of the reference" if self.reference_products else ""
        return (
            f"{self.name}: {self.reason}\n"
            f"  {self.rows} rows in {self.chunks} chunks of at most {self.chunk_rows}\n"
            f"  {self.products} products of 2 N V H{reference}; logits: {self.logits}\n"
            f"  chunk {_mib(self.chunk_bytes)}, peak beyond inputs and gradients {_mib(self.peak_bytes)}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def default_chunk_bytes(device: torch.device) -> int:
    """The budget of a chunk unless asked for, with the memory that is free now."""
    return _budget(device, free_memory(device))


def _budget(device: torch.device, free: int) -> int:
    return min(_DEFAULT_BYTES.get(device.type, _DEFAULT_BYTES_ELSEWHERE), free // _SHARE_OF_FREE)


def chunk_rows(
    bytes_per_row: int,
    max_chunk_bytes: int | None,
    device: torch.device,
    total_rows: int,
    pair_rows: int,
    vocab: int,
    free: int | None = None,
) -> int:
    """Rows of a chunk that fit the budget.

    Args:
        bytes_per_row: of a chunk's buffers.
        max_chunk_bytes: the caller's budget; None for one from the free memory.
        total_rows: there is no use for more.
        pair_rows: rows of the largest pair, which a budget of our own makes room for if it can; 0 if it need not fit.
        vocab: for the message.
        free: bytes of memory to go by instead of what is free here (the least of several ranks').

    Raises:
        ValueError: a budget too small for one row.
    """
    if max_chunk_bytes is None:
        free = free_memory(device) if free is None else free
        share, budget = free // _SHARE_OF_FREE, _budget(device, free)
        of_pair = pair_rows * bytes_per_row
        budget = max(budget, of_pair if of_pair <= 2 * share else 0, bytes_per_row)
    else:
        budget = max_chunk_bytes
        if budget < bytes_per_row:
            raise ValueError(
                f"max_chunk_bytes={budget} holds not even one row: the smallest that works is {bytes_per_row}"
                f" (one row of {vocab} logits and what its gradient takes)"
            )
    return max(1, min(budget // bytes_per_row, total_rows))


def choose(
    wanted: str,
    *,
    trains_hidden: bool,
    trains_head: bool,
    only_logps: bool,
    pairwise: str | None,
    pair_rows: int,
    chunk_rows: int,
) -> tuple[str, str]:
    """Name of the plan and the reason for it.

    Args:
        wanted: "auto" or a plan's name.
        trains_hidden, trains_head: who needs a gradient.
        only_logps: whether `logps` is the only per-row result that carries gradient.
        pairwise: None if each pair's loss is known from that pair alone, else why not.
        pair_rows: valid rows of the largest pair.
        chunk_rows: rows that fit a chunk.

    Raises:
        ValueError: a plan asked for by name that cannot do the work.
    """
    if wanted not in ("auto", *PLANS):
        raise ValueError(f"plan must be one of {', '.join(map(repr, ('auto', *PLANS)))}, got {wanted!r}")
    if not (trains_hidden or trains_head):
        return "forward_only", "nothing needs a gradient"
    no_frozen = None
    if trains_head:
        no_frozen = "the head needs a gradient"
    elif not only_logps:
        no_frozen = "not only the log-probs carry gradient"
    no_pairs = pairwise
    if no_pairs is None and pair_rows > chunk_rows:
        no_pairs = f"the largest pair has {pair_rows} valid rows and a chunk holds {chunk_rows}"
    if wanted == "frozen_head" and no_frozen:
        raise ValueError(f"plan='frozen_head' is not possible: {no_frozen}")
    if wanted == "pair_chunks" and no_pairs:
        raise ValueError(f"plan='pair_chunks' is not possible: {no_pairs}")
    if wanted != "auto":
        return wanted, "asked for by name"
    if no_frozen is None:
        return "frozen_head", "the head needs no gradient, and only the log-probs carry one"
    if no_pairs is None:
        return "pair_chunks", "each pair's loss is known from that pair alone, and every pair fits a chunk"
    return "recompute", f"{no_frozen}, and {no_pairs}"
