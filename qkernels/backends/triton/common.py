"""What the Triton kernels share: the address of a row, how it is divided into tiles, and accurate scalar functions.

Tiling. A row of n elements is divided into a head that ends at the first multiple of 16 bytes, computed from the row's
*address*, whole tiles of LANES x VEC elements, and a tail. Whole tiles need no mask and take 128-bit loads and stores
whatever V, the strides and the base address are; hints never depend on what an argument is divisible by. The tile that
holds the label takes the boundary path of head and tail, with a mask per element, so that the loop over whole tiles
never compares an element with the label. In order, a row is

    part 0   tile -1 (the head; left out where it is empty)
    part 1   tiles 0 .. L-1 whole, then tile L, which holds the label (the tail's tile if it lies there)
    part 2   tiles L+1 .. whole, then the tail (nothing left of it if part 1 had it)

which one loop over parts handles, with one copy of the code for whole tiles and one for the boundary path.

Scalars. Numbers that fp32 would round (1 / temperature, beta) are passed as two fp32 parameters and added in fp64.
Everything that happens once per row happens in fp64: it costs nothing beside the row, and log(1 + x) or 1 - p keep
their relative precision. `tl.log` and `tl.exp` of fp32 do not: lg2.approx is off by 2^-22 near 1.
"""

# No `from __future__ import annotations` in kernel files: Triton reads the annotations of a kernel's parameters.
import contextlib
import ctypes
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.checks import check_labels as check_labels
from ..pieces import ITERATION, pieces_for, span_of

WARPS = 4
WARP_SIZE = 64 if torch.version.hip else 32
# fp fusion is on by default up to triton 3.9 and off later: bench/results/machine-code.md was compiled with it.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}

COMBINE = {"num_warps": 1, "enable_fp_fusion": True}

LANES = WARPS * WARP_SIZE  # rows of a tile, one per thread: each thread then reads 16 bytes of it

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_LOG2E = tl.constexpr(1.4426950408889634074)
_INF = tl.constexpr(float("inf"))


# --- host -------------------------------------------------------------------------------------------------------------


def two_floats(x: float) -> tuple[float, float]:
    """x as a sum of two fp32 numbers. Not by way of a tensor: torch's default device may be the GPU."""
    high = ctypes.c_float(x).value
    return high, x - high


def vector_length(*tensors: Tensor) -> int:
    """Elements per 16 bytes, of the narrowest type."""
    return max(16 // tensor.element_size() for tensor in tensors)


def same_alignment(a: Tensor, b: Tensor, vector: int) -> bool:
    """Whether each row of `a` has the same alignment, modulo `vector` elements, as the same row of `b`."""
    bases = [tensor.data_ptr() // tensor.element_size() for tensor in (a, b)]
    strides = [(a.stride(dim), b.stride(dim)) for dim in range(2) if a.shape[dim] > 1]
    return all((x - y) % vector == 0 for x, y in [tuple(bases), *strides])


def check_vocab(vocab: int) -> None:
    """Positions within a row are 32-bit numbers, and a row's last tile may reach beyond its end."""
    if vocab > 2**30:
        raise ValueError(f"rows of more than 2^30 entries are not supported on a GPU, got {vocab}")


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of the two leading dimensions of `[S, T, V]`."""
    return tensor.stride(0), tensor.stride(1)


def on_device_of(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Number of SMs; the interpreter has none and takes that of a small GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


# Programs per SM that split rows make at most, the fewest entries of a piece, and the most pieces that the combining
# program reads at once.
PROGRAMS_PER_SM, SMALLEST_PIECE, MAX_SPLITS = 4, ITERATION, 64


def splits_for(rows: int, vocab: int, count: int) -> int:
    """Over how many programs a row is split, at most, on `count` SMs."""
    return pieces_for(rows, vocab, count, blocks=PROGRAMS_PER_SM, smallest=SMALLEST_PIECE, most=MAX_SPLITS)


def split_row(logits: Tensor, rows: int) -> tuple[int, int]:
    """Over how many programs the rows of a tensor are split, and entries per program."""
    vocab = logits.shape[-1]
    span = span_of(vocab, splits_for(rows, vocab, processors(logits.device)))
    return -(-vocab // span), span


# --- addresses and tiles ----------------------------------------------------------------------------------------------


@triton.jit
def row_of(pointer, row, inner, outer_stride, inner_stride):
    """First element of a row of `[S, T, V]`; inner = T. Offsets are 64-bit: row * stride passes 2^31."""
    return pointer + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def head_of(pointer, VEC: tl.constexpr):
    """Elements before the first multiple of VEC elements. `%` is that of C: operands are not negative."""
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    lead = (pointer.to(tl.int64) // size) % VEC
    return ((VEC - lead) % VEC).to(tl.int32)


@triton.jit
def tile_offsets(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def whole_tiles(n, head, TILE: tl.constexpr):
    """Number of tiles that need no mask."""
    return tl.maximum(n - head, 0) // TILE


@triton.jit
def label_tile(label, head, tiles, TILE: tl.constexpr):
    """The tile that holds the label, or the first or last one where none does."""
    return tl.minimum(tl.maximum(label - head, 0) // TILE, tiles)


@triton.jit
def part_bounds(part, of_label, tiles):
    """`(start, stop, is_there)` of a part: whole tiles [start, stop), then tile `stop` with a mask if it is there."""
    start = tl.where(part == 2, of_label + 1, tl.where(part == 1, 0, -1))
    stop = tl.where(part == 2, tiles, tl.where(part == 1, of_label, -1))
    return start, stop, (part != 2) | (of_label < tiles)


# --- fp64 scalars -----------------------------------------------------------------------------------------------------


@triton.jit
def joined(high, low):
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 in fp64, as precise as x: log(u) / (u - 1) hardly depends on the rounding of u."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 of x <= 0 in fp64, relative error below 1e-13: a series near 0, where the difference would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.01, series, tl.exp(x) - 1)


@triton.jit
def weighted(e, x):
    """e * x with 0 * inf = 0."""
    return tl.where(e == 0, 0.0, e * x)


@triton.jit
def rescale_exponent(old, new, scale):
    """The change of exponents relative to `old` when the maximum becomes `new`; 0 where nothing was summed yet."""
    return tl.where((old == -_INF) | (old == new), 0.0, (old - new) * scale)
