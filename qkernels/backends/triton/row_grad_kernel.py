"""`row_grad`: dL/dlogits from the logits, what the forward saved of each row, and up to five coefficients per row.

Maths. With the coefficients a (label), b (p), c (p_logp), d (p_logq), h (q) of `rows.COEFFICIENTS`, entry j of a row is

    g_j = [ a (1[j=y] - p_j) + p_j (b + c log p_j - d log q_j) - h q_j ] / T

With t = (z - row_max) log2(e) / T, e = 2^t, log p = t ln 2 - log_sum and primes for the reference this is, j != y,

    g_j = e (constant + slope t + r_slope t') + q_scale e'

    constant = exp(-log_sum) (b - a - c log_sum + d log_sum') / T     slope   =  exp(-log_sum) c ln 2 / T
    q_scale  = -h exp(-log_sum') / T                                  r_slope = -exp(-log_sum) d ln 2 / T

whose four factors are computed once per row in fp64. Where only `logps` is differentiated it is constant * e.

The label's entry is computed separately, in fp64 from its saved log-prob: -a expm1(logp) = a (1 - p) keeps its relative
precision when p -> 1, and is rounded once. The tile that holds the label is never one of the whole tiles, so its entry
is put in its place before that tile is stored: no second store, and no order of stores to rely on.

Memory traffic. Each logit (and each of the reference's, if c, d or h can need it) is read once, each gradient written
once. Ignored rows and rows whose coefficients are all 0 are set to 0 without being read. Tiles begin at multiples of 16
bytes of `out`, so all stores of whole tiles are 128 bits wide. Loads are too if the logits' rows have the alignment of
those of `out` modulo 16 bytes (in place always, and for contiguous logits), else they are as narrow as the elements.

Aliasing. `out` may be the logits: a tile is read by the threads that write it, before they write it, and no tile
overlaps another. Softmax statistics, coefficients, labels and the reference are not written; `functional` refuses a
reference in the same storage.

Numerics. e of an entry below the smallest normal number is 0. -inf logits have e = 0 and gradient 0 whatever the
factor is; -inf of the reference only matters where r_slope is not 0. NaN in the softmax statistics makes the row NaN,
and so does a label outside [0, V).

Few rows are split over programs; the pieces of a row do not depend on each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import layout
from ...core.calls import RowGrad
from . import common
from .common import (
    _LOG2E,
    expm1,
    head_of,
    joined,
    label_tile,
    part_bounds,
    row_of,
    tile_offsets,
    weighted,
    whole_tiles,
)

_LN2 = tl.constexpr(0.69314718055994530942)
# Tiles per iteration of the loop over whole tiles, by whether there is a reference: four 128-bit loads in flight per
# thread.
UNROLL = {False: 4, True: 2}


@triton.jit
def _entries(
    z, rz, scale, row_max, r_max, constant, slope, r_slope, q_scale, FULL: tl.constexpr, WITH_REFERENCE: tl.constexpr
):
    """Gradient of a tile z [LANES, VEC], but for the label's entry."""
    t = (z - row_max) * scale
    e = tl.exp2(t)
    if not FULL:
        return constant * e
    factor = constant + slope * t
    if WITH_REFERENCE:
        rt = (rz - r_max) * scale
        factor += tl.where(r_slope != 0, r_slope * rt, 0.0)
        return weighted(e, factor) + q_scale * tl.exp2(rt)
    return weighted(e, factor)


@triton.jit
def _fill_row(out, n, value, LANES: tl.constexpr, VEC: tl.constexpr):
    """n elements from `out` on, all the same."""
    TILE: tl.constexpr = LANES * VEC
    head = head_of(out, VEC)
    tiles = whole_tiles(n, head, TILE)
    body = tl.multiple_of(out + head, 16)
    off = tile_offsets(LANES, VEC)
    same = (tl.zeros([LANES, VEC], tl.float32) + value).to(out.dtype.element_ty)
    tl.store(out + off, same, mask=off < tl.minimum(head, n))
    for i in tl.range(0, tiles, num_stages=1):
        tl.store(body + tl.cast(i, tl.int64) * TILE + off, same)
    at = head + tiles * TILE + off
    tl.store(out + at, same, mask=at < n)


_RUNTIME = (
    "logits", "reference", "labels", "softmax", "r_softmax", "coefficients", "upstream", "out", "inner", "vocab",
    "outer_stride", "inner_stride", "r_outer_stride", "r_inner_stride", "out_outer_stride", "out_inner_stride",
    "ignore_index", "inverse_high", "inverse_low", "splits", "span",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def row_grad_kernel(
    logits,  # (S, T, V)
    reference,  # (S, T, V), or anything without one
    labels,  # (S, T) int64
    softmax,  # (3, S, T): row_max, log_sum, logps
    r_softmax,  # (3, S, T), or anything without a reference
    coefficients,  # (1 or 5, S, T), in the order of rows.COEFFICIENTS
    upstream,  # (), which all coefficients are multiplied by, if SCALED; anything otherwise
    out,  # (S, T, V), may be the logits
    inner: tl.int32,  # T
    vocab: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    r_outer_stride: tl.int64,
    r_inner_stride: tl.int64,
    out_outer_stride: tl.int64,
    out_inner_stride: tl.int64,
    ignore_index: tl.int64,
    inverse_high: tl.float32,  # 1 / temperature
    inverse_low: tl.float32,
    splits: tl.int32,
    span: tl.int32,  # elements per program
    FULL: tl.constexpr,  # five coefficients
    SCALED: tl.constexpr,
    WITH_REFERENCE: tl.constexpr,
    ALIGNED: tl.constexpr,  # the logits' rows have the alignment of those of `out`
    R_ALIGNED: tl.constexpr,  # the reference's rows have
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    TILE: tl.constexpr = LANES * VEC
    piece = tl.program_id(0) % splits
    row = tl.program_id(0) // splits
    rows = tl.num_programs(0) // splits
    start = piece * span
    n = tl.minimum(span, vocab - start)
    out_row = row_of(out, row, inner, out_outer_stride, out_inner_stride) + start

    label64 = tl.load(labels + row)
    scaled_by = tl.load(upstream).to(tl.float64) if SCALED else 1.0
    of_label = tl.load(coefficients + row).to(tl.float64) * scaled_by
    zero = (label64 == ignore_index) | (of_label == 0)
    if FULL:
        of_p = tl.load(coefficients + rows + row).to(tl.float64) * scaled_by
        of_logp = tl.load(coefficients + 2 * rows + row).to(tl.float64) * scaled_by
        of_logq = tl.load(coefficients + 3 * rows + row).to(tl.float64) * scaled_by
        of_q = tl.load(coefficients + 4 * rows + row).to(tl.float64) * scaled_by
        others = (of_p == 0) & (of_logp == 0) & (of_logq == 0) & (of_q == 0)
        zero = (label64 == ignore_index) | ((of_label == 0) & others)
    if zero | (label64 < 0) | (label64 >= vocab):
        _fill_row(out_row, n, tl.where(zero, 0.0, float("nan")), LANES, VEC)
        return

    inverse_temperature = joined(inverse_high, inverse_low)
    scale = (inverse_temperature * _LOG2E).to(tl.float32)
    row_max = tl.load(softmax + row)
    log_sum = tl.load(softmax + rows + row).to(tl.float64)
    logp = tl.load(softmax + 2 * rows + row).to(tl.float64)
    p = tl.exp(logp)
    p_scale = tl.exp(-log_sum) * inverse_temperature
    at_label = -of_label * expm1(logp)  # label (1 - p), with its relative precision when p -> 1
    constant = -of_label
    slope = 0.0
    r_slope = 0.0
    q_scale = 0.0
    r_max = 0.0
    if FULL:
        constant += of_p - of_logp * log_sum
        slope = (p_scale * of_logp * _LN2).to(tl.float32)
        at_p = of_p + tl.where(of_logp == 0, 0.0, of_logp * logp)
        if WITH_REFERENCE:
            r_max = tl.load(r_softmax + row)
            r_log_sum = tl.load(r_softmax + rows + row).to(tl.float64)
            ry = tl.load(row_of(reference, row, inner, r_outer_stride, r_inner_stride) + label64).to(tl.float64)
            logq = (ry - r_max.to(tl.float64)) * inverse_temperature - r_log_sum
            at_p -= tl.where(of_logq == 0, 0.0, of_logq * logq)
            at_label -= of_q * tl.exp(logq)
            constant += of_logq * r_log_sum
            r_slope = (-p_scale * of_logq * _LN2).to(tl.float32)
            q_scale = (-of_q * tl.exp(-r_log_sum) * inverse_temperature).to(tl.float32)
        at_label += weighted(p, at_p)
    constant = (p_scale * constant).to(tl.float32)
    at_label = (at_label * inverse_temperature).to(tl.float32)

    label = label64.to(tl.int32) - start
    z_row = row_of(logits, row, inner, outer_stride, inner_stride) + start
    r_row = row_of(reference, row, inner, r_outer_stride, r_inner_stride) + start
    head = head_of(out_row, VEC)
    tiles = whole_tiles(n, head, TILE)
    in_tile = label_tile(label, head, tiles, TILE)
    # The hint has to be given where the pointer is computed; Triton loses it on the way into a helper.
    body = tl.multiple_of(out_row + head, 16)
    z_body = tl.multiple_of(z_row + head, 16) if ALIGNED else z_row + head
    r_body = tl.multiple_of(r_row + head, 16) if R_ALIGNED else r_row + head
    off = tile_offsets(LANES, VEC)
    for part in range((head == 0).to(tl.int32), 3):
        first, last, there = part_bounds(part, in_tile, tiles)
        for i in tl.range(first, last, num_stages=1, loop_unroll_factor=UNROLL):
            at64 = tl.cast(i, tl.int64) * TILE
            z = tl.load(z_body + at64 + off).to(tl.float32)
            rz = z
            if WITH_REFERENCE:
                rz = tl.load(r_body + at64 + off).to(tl.float32)
            g = _entries(z, rz, scale, row_max, r_max, constant, slope, r_slope, q_scale, FULL, WITH_REFERENCE)
            tl.store(body + at64 + off, g.to(out.dtype.element_ty))
        at = head + last * TILE + off
        inside = (at >= 0) & (at < tl.where(part == 0, tl.minimum(head, n), n)) & there
        z = tl.load(z_row + at, mask=inside, other=0.0).to(tl.float32)
        rz = z
        if WITH_REFERENCE:
            rz = tl.load(r_row + at, mask=inside, other=0.0).to(tl.float32)
        g = _entries(z, rz, scale, row_max, r_max, constant, slope, r_slope, q_scale, FULL, WITH_REFERENCE)
        g = tl.where(at == label, at_label, g)
        tl.store(out_row + at, g.to(out.dtype.element_ty), mask=inside)


# --- host -------------------------------------------------------------------------------------------------------------


def row_grad_into(out: Tensor, call: RowGrad) -> None:
    """dL/dlogits into `out`, whose dtype may be narrower. See `qkernels.backends`."""
    logits, labels, reference, softmax, reference_softmax, coefficients, upstream, temperature, ignore_index, _ = call
    rows, vocab = labels.numel(), logits.shape[-1]
    if rows == 0:
        return
    common.check_vocab(vocab)
    layout.dense(labels, torch.int64)
    layout.rows(logits)
    softmax, coefficients = softmax.contiguous(), coefficients.float().contiguous()
    full = coefficients.shape[0] > 1
    ref, r_softmax, with_reference = logits, softmax, False
    if full and reference is not None and reference_softmax is not None:
        ref, r_softmax, with_reference = reference, reference_softmax.contiguous(), True
    vector = common.vector_length(logits, ref, out)
    splits, span = common.split_row(logits, rows)
    with common.on_device_of(logits):
        row_grad_kernel[(rows * splits,)](
            logits, ref, labels, softmax, r_softmax, coefficients, coefficients if upstream is None else upstream, out,
            logits.shape[1], vocab, *common.row_strides(logits), *common.row_strides(ref), *common.row_strides(out),
            ignore_index, *common.two_floats(1 / temperature), splits, span, FULL=full,
            SCALED=upstream is not None, WITH_REFERENCE=with_reference,
            ALIGNED=common.same_alignment(out, logits, vector), R_ALIGNED=common.same_alignment(out, ref, vector),
            LANES=common.LANES, VEC=vector, UNROLL=UNROLL[with_reference], **common.OPTIONS,
        )  # fmt: skip


def row_grad(call: RowGrad) -> Tensor:
    """dL/dlogits as a new tensor. See `qkernels.core.calls`."""
    out = torch.empty_like(call.logits, memory_format=torch.contiguous_format)
    row_grad_into(out, call)
    return out


def row_grad_(call: RowGrad) -> None:
    """dL/dlogits over the logits themselves. See `qkernels.core.calls`."""
    row_grad_into(call.logits, call)
