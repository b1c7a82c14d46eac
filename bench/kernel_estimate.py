"""How long the row kernels should take on an H200: a model from their machine code, no measurement.

An SM works on as many blocks at a time as registers, threads and shared memory allow. A block first waits twice for the
memory (for the label, then for its first vectors), streams its part of a row, and then does what a row costs besides:
the tiles that are compared with the label, reductions, the end. While it streams, its threads have half of the loads of
an iteration in flight on average, so it draws at most these bytes per latency of the memory; while it does the rest it
draws nothing. So an SM moves

    min(its share of the bandwidth, A b / (b L / f + t))    bytes per second

with A blocks at a time, b bytes and f bytes in flight per block, the latency L, and t for the waiting and the rest. The
time is that, or what issuing all instructions takes if that is longer, and t once more for the last block. SMs that get
one block more than others count: N rows are ceil(N / SMs) per SM. Where rows are split, a second kernel waits for the
first.

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
# Assumptions: latency of the memory under load; clocks between two instructions of a warp that wait for each other;
# from the end of a kernel to the first instruction of the next.
LATENCY, DEPENDENT_CLOCKS, NEXT_KERNEL = 800e-9, 4, 1e-6

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

    models: rows per row, where two models are independent blocks.
    """

    rows: int
    vocab: int
    bytes_moved: int
    bytes_loaded: int
    splits: int = 1
    models: int = 1
    combined: bool = True  # whether a second kernel adds up what split rows left


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
    moved, loaded = entries * work.bytes_moved, entries * work.bytes_loaded
    per_sm = math.ceil(blocks / SMS)
    active = min(kernel.blocks, per_sm)
    rest = kernel.machine_per_ptx * kernel.ptx_longest * DEPENDENT_CLOCKS / CLOCK
    waiting = 2 * LATENCY + rest
    drawn = kernel.in_flight / kernel.blocks / LATENCY  # bytes per second that one block's loads can bring
    rate = min(BYTES_PER_SECOND / SMS, active * moved / (loaded / drawn + waiting))
    streaming = per_sm * moved / rate
    slots = entries * kernel.per_entry / 32 + kernel.machine_per_ptx * kernel.ptx_per_row
    issuing = per_sm * slots / (ISSUED_PER_CLOCK * CLOCK)
    seconds = max(streaming, issuing) + waiting
    if work.splits > 1 and work.combined:
        second = kernel.machine_per_ptx * kernel.ptx_combine * DEPENDENT_CLOCKS / CLOCK
        seconds += NEXT_KERNEL + 2 * LATENCY + second
    bound = "memory" if seconds <= NEAR * floor else "issue" if issuing > streaming else "latency"
    return Estimate(seconds, floor, bound)


@functools.cache
def counts() -> dict[str, dict[str, dict[str, float]]]:
    """Compiler -> variant -> executed PTX, as `bench.instruction_counts` wrote it."""
    return dict(json.loads(COUNTS.read_text(encoding="utf-8"))["counts"])
