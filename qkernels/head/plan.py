"""Which way through the head: the plans of the hidden-states path, what each costs, and how one is chosen.

| plan | when | GEMMs, in units of 2 N V H |
|---|---|---|
| forward_only | nothing needs a gradient | 1: logits |
| frozen_head | the head needs no gradient, only `logps` has one | 2: logits, unscaled dX |
| pair_chunks, sequence_chunks, token_chunks | the loss is a sum over such units, and they fit | 3: logits, dX, dW |
| recompute | everything else | 4: logits, logits again, dX, dW |

(one GEMM less where hidden states or weight need no gradient; the reference costs one more, two under `recompute`
with a gradient of a divergence). N counts valid rows: ignored ones are dropped first. With a loss that leaves rows
without a gradient, such as those of advantage 0, the last two GEMMs run over the others only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core import devices
from ..core.fields import DIVERGENCES, stats_dtype
from ..core.memory import free_memory
from ..distributed.vocab_parallel import Shard
from .call import Model, apart
from .chunks import FIRST_ROWS, saved_dtype
from .products import block_bytes, gradient_dtype, logits_product
from .waiting import logits_lie_behind, waits

# The plans that know the gradient of a unit while its logits exist, by the unit.
BY_UNIT = {unit: f"{unit}_chunks" for unit in ("pair", "sequence", "token")}
PLANS = ("frozen_head", *BY_UNIT.values(), "recompute")

# A chunk of logits is at most this large unless asked for, by device type: enough rows that the GEMMs run at full
# speed (2000 rows of V = 128256 on a GPU).
_DEFAULT_BYTES = {"cpu": 256 * 2**20}
_DEFAULT_BYTES_ELSEWHERE = 2**30
# ... and at most this share of the memory that is free; twice that for a pair that has to fit.
_SHARE_OF_FREE = 8
# ... for which nobody looks where all rows take less than this: asking the system takes longer than they do.
_SMALL_BYTES = 2**20


class LinearPlan(NamedTuple):
    """What a call on hidden states does, known before it runs.

    name: "forward_only", "frozen_head", "pair_chunks", "sequence_chunks", "token_chunks" or "recompute".
    reason: why this one.
    rows: valid rows, N; all rows where the labels' values cannot be read yet.
    chunk_rows: rows of logits that exist at a time, at most.
    chunks: number of chunks.
    products: GEMMs of the policy's head, in units of 2 N V H; the backward's included.
    reference_products: the same of the reference's head.
    chunk_bytes: size of a chunk's buffers.
    peak_bytes: memory beyond inputs and their gradients, at most: the chunk, and what the plan keeps besides.
    logits: how the GEMMs of the logits run.
    idle_rows: rows among `rows` that are known beforehand to have no gradient, and leave the GEMMs of the backward.
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
    idle_rows: int = 0

    def __str__(self) -> str:
        reference = f" + {self.reference_products} of the reference" if self.reference_products else ""
        idle = f", {self.idle_rows} of them without a gradient" if self.idle_rows else ""
        return (
            f"{self.name}: {self.reason}\n"
            f"  {self.rows} rows in {self.chunks} chunks of at most {self.chunk_rows}{idle}\n"
            f"  {self.products} GEMMs of 2 N V H{reference}; logits: {self.logits}\n"
            f"  chunk {_mib(self.chunk_bytes)}, peak beyond inputs and gradients {_mib(self.peak_bytes)}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def default_chunk_bytes(device: torch.device) -> int:
    """The budget of a chunk unless asked for, with the memory that is free now."""
    return _budget(device, free_memory(device))


def _budget(device: torch.device, free: int) -> int:
    return min(_DEFAULT_BYTES.get(device.type, _DEFAULT_BYTES_ELSEWHERE), free // _SHARE_OF_FREE)


class Work(NamedTuple):
    """What a call on hidden states has to do, as far as its plan depends on it.

    policy, reference: the models; the reference is None without one.
    dtype, reference_dtype: of the GEMMs.
    softcap: whether the logits are capped, which takes a buffer more.
    needs: whether hidden states, weight and bias need a gradient.
    fields: bit mask of the per-row results.
    only_logps: whether `logps` is the only per-row result that carries gradient.
    coupled: None if the loss of each unit is known from that unit alone, else why not.
    valid_rows: how many rows are valid.
    unit_rows: valid rows of the largest unit.
    wanted: "auto" or a plan's name.
    max_chunk_bytes: the caller's budget; None for one from the free memory.
    shard: this rank's shard of the vocabulary.
    unit: "pair", "sequence" or "token".
    idle: whether some rows may turn out to have no gradient.
    idle_rows: how many are known to have none.
    """

    policy: Model
    reference: Model | None
    dtype: torch.dtype
    reference_dtype: torch.dtype
    softcap: bool
    needs: tuple[bool, bool, bool]
    fields: int
    only_logps: bool
    coupled: str | None
    valid_rows: int
    unit_rows: int
    wanted: str
    max_chunk_bytes: int | None
    shard: Shard | None
    unit: str = "pair"
    idle: bool = False
    idle_rows: int = 0

    @property
    def trains_head(self) -> bool:
        return self.needs[1] or self.needs[2]

    @property
    def widest(self) -> int:
        """Columns of the vocabulary that the widest rank holds."""
        return self.policy.weight.shape[0] if self.shard is None else self.shard.widest

    def bytes_per_row(self) -> int:
        """Bytes that one row of a chunk takes: its logits, both models' where they exist at once; for a softcap's slope
        the gradient, which is written over the logits otherwise."""
        wide = stats_dtype(self.dtype).itemsize
        size = wide
        if self.reference is not None and not apart(self.fields, self.dtype, self.reference_dtype, self.shard):
            size += stats_dtype(self.reference_dtype).itemsize
        if any(self.needs) and self.softcap:
            size += wide
        return self.widest * size

    def bytes_besides(self, name: str, rows: int, chunks: int) -> int:
        """Bytes that a plan takes besides the chunk's buffers and the gradients themselves, some per row left out.

        Args:
            name: of the plan.
            rows: of a chunk.
            chunks: how many there are.
        """
        policy, dtype, needs = self.policy, self.dtype, self.needs
        vocab, hidden = policy.weight.shape
        device = policy.hidden.device
        products = gradient_dtype(device, dtype)
        # A chunk's hidden states as they come and as the GEMM packs them, their gradient, and the part of the head that
        # is widened at a time.
        size = rows * hidden * (2 * dtype.itemsize + products.itemsize)
        waiting = needs[1] and waits(policy.weight, dtype, self.valid_rows, chunks)
        sums = name != "frozen_head" and needs[1] and chunks > 1 and not waiting
        size += block_bytes(device, dtype, vocab, hidden, rows=rows, sums=sums, trains=any(needs))
        if self.reference is not None:
            size += rows * self.reference.hidden.shape[1] * self.reference_dtype.itemsize
        if any(needs) and products.itemsize < stats_dtype(dtype).itemsize:
            size += min(rows, FIRST_ROWS) * self.widest * products.itemsize
        # Heads that are not in the GEMMs' dtype (autocast) are cast once.
        for model, of_model in ((policy, dtype), (self.reference, self.reference_dtype)):
            if model is not None and model.weight.dtype != of_model:
                size += model.weight.numel() * of_model.itemsize
        if name == "frozen_head":
            size += policy.hidden.numel() * saved_dtype(dtype).itemsize
        elif needs[1]:
            if waiting:  # the gradients of all logits, the chunk's among these or not, and the hidden states
                beside = self.valid_rows - rows * logits_lie_behind(device)
                size += (beside * self.widest + self.valid_rows * hidden) * products.itemsize
            summed = products if chunks <= 1 or waiting else stats_dtype(dtype)
            if summed != policy.weight.dtype:
                size += policy.weight.numel() * summed.itemsize
        if name in BY_UNIT.values() and needs[0] and saved_dtype(policy.hidden.dtype) != policy.hidden.dtype:
            size += policy.hidden.numel() * saved_dtype(policy.hidden.dtype).itemsize
        return size


def plan(work: Work) -> LinearPlan:
    """Choose the plan and work out what it costs.

    Raises:
        ValueError: a plan asked for by name that cannot do the work; a budget too small for one row.
    """
    per_row = work.bytes_per_row()
    fit = _chunk_rows(work, per_row)
    name, reason = _choose(work, fit)
    needs_hidden, needs_weight, _ = work.needs
    backward = needs_hidden + needs_weight
    known = name in BY_UNIT.values()
    products = 1 + backward if known else {"forward_only": 1, "frozen_head": 2}.get(name, 2 + backward)
    with_kl = bool(work.fields & DIVERGENCES)
    number = -(-work.valid_rows // fit) if work.valid_rows else 0
    return LinearPlan(
        name=name,
        reason=reason,
        rows=work.valid_rows,
        chunk_rows=fit,
        chunks=number,
        products=products,
        reference_products=0 if work.reference is None else 2 if name == "recompute" and with_kl else 1,
        chunk_bytes=fit * per_row,
        peak_bytes=fit * per_row + work.bytes_besides(name, fit, number),
        logits=logits_product(work.policy.hidden.device, work.dtype),
        idle_rows=work.idle_rows if known else 0,
    )


def _chunk_rows(work: Work, per_row: int) -> int:
    """Rows of a chunk that fit the budget, `per_row` bytes each."""
    # Room for a whole unit is of use to one plan only.
    by_units = work.wanted in BY_UNIT.values() or (
        work.wanted == "auto" and (work.trains_head or not work.only_logps or work.idle)
    )
    unit_rows = work.unit_rows if by_units and any(work.needs) and work.coupled is None else 0
    budget, needed = work.max_chunk_bytes, work.valid_rows * per_row
    if budget is None and needed <= _SMALL_BYTES and work.shard is None:
        budget = max(needed, per_row)
    elif budget is None:
        device = work.policy.hidden.device
        # Of several ranks the least, which ranks on GPUs tell one another once: not to be trusted beyond the default.
        free = free_memory(device) if work.shard is None else work.shard.free
        if work.shard is not None and not devices.on_cpu(device):
            free = min(free, _SHARE_OF_FREE * _DEFAULT_BYTES.get(device.type, _DEFAULT_BYTES_ELSEWHERE))
        share, of_unit = free // _SHARE_OF_FREE, unit_rows * per_row
        budget = max(_budget(device, free), of_unit if of_unit <= 2 * share else 0, per_row)
    elif budget < per_row:
        raise ValueError(
            f"max_chunk_bytes={budget} holds not even one row: the smallest that works is {per_row}"
            f" (one row of {work.widest} logits and what its gradient takes)"
        )
    return max(1, min(budget // per_row, max(work.valid_rows, 1)))


def _choose(work: Work, chunk_rows: int) -> tuple[str, str]:
    """Name of the plan and the reason for it, where `chunk_rows` rows fit a chunk."""
    wanted = work.wanted
    if wanted not in ("auto", *PLANS):
        raise ValueError(f"plan must be one of {', '.join(map(repr, ('auto', *PLANS)))}, got {wanted!r}")
    if not any(work.needs):
        return "forward_only", "nothing needs a gradient"
    no_frozen = None
    if work.trains_head:
        no_frozen = "the head needs a gradient"
    elif not work.only_logps:
        no_frozen = "not only the log-probs carry gradient"
    by_units, no_units = BY_UNIT[work.unit], work.coupled
    if no_units is None and work.unit_rows > chunk_rows:
        no_units = f"the largest {work.unit} has {work.unit_rows} valid rows and a chunk holds {chunk_rows}"
    if wanted == "frozen_head" and no_frozen:
        raise ValueError(f"plan='frozen_head' is not possible: {no_frozen}")
    if wanted in BY_UNIT.values() and wanted != by_units:
        raise ValueError(
            f"plan={wanted!r} is not possible: the unit of this loss is the {work.unit}, plan={by_units!r}"
        )
    if wanted == by_units and no_units:
        raise ValueError(f"plan={by_units!r} is not possible: {no_units}")
    if wanted != "auto":
        return wanted, "asked for by name"
    # A frozen head takes two GEMMs either way, but by units rows without a gradient leave the second one.
    if no_units is None and (no_frozen is not None or work.idle):
        unit = work.unit
        return by_units, f"each {unit}'s loss is known from that {unit} alone, and every {unit} fits a chunk"
    if no_frozen is None:
        return "frozen_head", "the head needs no gradient, and only the log-probs carry one"
    return "recompute", f"{no_frozen}, and {no_units}"
