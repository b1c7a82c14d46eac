"""How long the row kernels should take on an H200: a model from their machine code, no measurement.

An SM works on as many blocks at a time as registers, threads and shared memory allow. A block waits for the memory
twice, for the label and for the first vectors of its part of a row, and where it finishes a row's sums once for the
caches, for the label's logit. It goes through its iterations, of which each but the first waits for the memory again,
and does what a row costs besides: the tiles that are compared with the label, reductions, the end. A call takes the
longest of

- these steps of one block after the other, as often as an SM has to take new blocks;
- its bytes at the memory's bandwidth, or the issuing of all its instructions, and besides what one block waits for and
  does outside its iterations.

SMs that get one block more than others count: N rows are ceil(N / SMs) per SM. Where rows are split, a second kernel
waits for the first, then twice for the caches: for the sums and labels, and for the label's logit.

Instructions per entry are those of the machine code's main loop. What a row costs besides is counted in executed PTX
(`bench.instruction_counts`) and scaled by how many machine instructions the main loop's PTX became.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

# An H200 moving 4.3 TB/s; each of its 132 SMs issues four instructions of warps per clock at 1.8 GHz.
BYTES_PER_SECOND = 4.3e12
SMS, CLOCK, ISSUED_PER_CLOCK = 132, 1.8e9, 4
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 << 10
# Assumptions: latency of the memory under load, and of the L2 cache; clocks between two instructions of a warp that
# wait for each other, and between those of a main loop, whose entries do not; from the end of a kernel to the first
# instruction of the next.
LATENCY, CACHE_LATENCY, DEPENDENT_CLOCKS, LOOP_CLOCKS, NEXT_KERNEL = 800e-9, 300e-9, 4, 2, 1e-6

COUNTS = Path(__file__).parent / "results" / "instruction-counts.json"
NEAR = 1.1  # at the memory's floor: within 10 % of moving the bytes


@dataclass(frozen=True)
class Kernel:
    """What the model needs to know of a compiled kernel.

    threads, registers, shared: of a block, per thread, and bytes of a block.
    loads: bytes that a thread loads per iteration of the main loop.
    per_entry: machine instructions per entry of a row, of one thread.
    ptx_per_entry, ptx_per_row, ptx_longest: issue slots of the PTX per entry, per row besides, and of the warp of a
        block with the most to do besides its entries.
    ptx_combine: the same of the kernel that combines split rows.
    """

    threads: int
    registers: int
    shared: int
    loads: int
    per_entry: float
    ptx_per_entry: float = 0.0
    ptx_per_row: float = 0.0
    ptx_longest: float = 0.0
    ptx_combine: float = 0.0

    @property
    def blocks(self) -> int:
        """Blocks that an SM works on at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, THREADS // self.threads, BLOCKS, SHARED // (self.shared + 1024))

    @property
    def in_flight(self) -> int:
        """Bytes in flight per SM: half of the loads of an iteration on average."""
        return self.blocks * self.threads * self.loads // 2

    @property
    def machine_per_ptx(self) -> float:
        return self.per_entry / (32 * self.ptx_per_entry) if self.ptx_per_entry else 1.0


@dataclass(frozen=True)
class Work:
    """A call: rows, entries of a row, bytes moved and bytes loaded per entry, over how many blocks a row is split.

    span: entries of such a piece; 0 for equal ones.
    models: rows per row, where two models are independent blocks.
    """

    rows: int
    vocab: int
    bytes_moved: int
    bytes_loaded: int
    splits: int = 1
    span: int = 0
    models: int = 1
    combined: bool = True  # whether rows are summed: a second kernel adds up what split ones left


@dataclass(frozen=True)
class Estimate:
    """seconds; floor: moving the bytes alone; bound: by "memory", "issue" or "latency"."""

    seconds: float
    floor: float
    bound: str

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor

    @property
    def at_the_floor(self) -> bool:
        return self.ratio <= NEAR


def estimate(kernel: Kernel, work: Work) -> Estimate:
    """The model above."""
    blocks = work.rows * work.splits * work.models
    floor = work.rows * work.vocab * work.bytes_moved * work.models / BYTES_PER_SECOND
    entries = work.vocab / work.splits
    per_sm = math.ceil(blocks / SMS)
    step = DEPENDENT_CLOCKS / CLOCK
    finishes = work.combined and work.splits == 1  # a row: only then the label's logit is read, after its sums
    outside = 2 * LATENCY + finishes * CACHE_LATENCY + kernel.machine_per_ptx * kernel.ptx_longest * step
    of_a_thread = kernel.loads / work.bytes_loaded  # entries of an iteration
    iterations = (work.span or entries) / (kernel.threads * of_a_thread)
    computing = math.floor(iterations) * of_a_thread * kernel.per_entry * LOOP_CLOCKS / CLOCK
    alone = outside + computing + max(math.ceil(iterations) - 1, 0) * LATENCY
    moving = per_sm * entries * work.bytes_moved / (BYTES_PER_SECOND / SMS)
    slots = entries * kernel.per_entry / 32 + kernel.machine_per_ptx * kernel.ptx_per_row
    issuing = per_sm * slots / (ISSUED_PER_CLOCK * CLOCK)
    waves = math.ceil(per_sm / kernel.blocks)
    seconds = max(waves * alone, max(moving, issuing) + outside)
    if work.splits > 1 and work.combined:
        seconds += NEXT_KERNEL + 2 * CACHE_LATENCY + kernel.machine_per_ptx * kernel.ptx_combine * step
    bound = "memory" if seconds <= NEAR * floor else "issue" if issuing > max(moving, waves * alone) else "latency"
    return Estimate(seconds, floor, bound)


@functools.cache
def counts() -> dict[str, dict[str, dict[str, float]]]:
    """Compiler -> variant -> executed PTX, as `bench.instruction_counts` wrote it."""
    return dict(json.loads(COUNTS.read_text(encoding="utf-8"))["counts"])
