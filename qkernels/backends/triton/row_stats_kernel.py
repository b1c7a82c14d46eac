"""`row_stats`: every per-row number of one or two models in one read of their logits.

Maths. z = raw logits of a row, T the temperature, scale = log2(e) / T, y the label. Each lane of a tile keeps, over
the entries it has met and relative to its own running maximum m, with t_j = (z_j - m) scale <= 0 and e_j = 2^t_j:

    s = sum e    st = sum e t    sq = sum e^2    raw = sum z    c = sum e (t - t of the other model)

When a lane's maximum moves by shift = (m_old - m_new) scale, s becomes 2^shift s, st becomes 2^shift (st + shift s), c
becomes 2^shift (c + (shift - shift of the other model) s). That is one exponential per tile and lane, none per
element. At the end lanes are merged by the same rule. The label's entry is left out of all sums (and is not counted
in m); `_complete` adds it in fp64, so that log pi = -log1p(sum of the others) keeps its digits when the model is
almost certain. Formulas of the columns are those of csrc/core/softmax.h.

Programs. One per row of 4 warps; two where both models' log-probs are asked for but no divergence (one each, which
needs fewer registers than one after the other). Divergences need both rows in step. Fewer rows than 4 per processor
are split into pieces of a row: fp32 partial sums go to a scratch buffer, `combine_kernel` merges them in order and
finishes the row. No atomics: results have the same bits from run to run.

Memory traffic. Each logit is read once, 16 bytes at a time whatever V, strides and addresses are (`common`); the
label's logit twice. Ignored rows are not read. The reference's row is read in step with the policy's; where the two lie
differently relative to 16-byte lines (ALIGNED = False, decided by the host for the whole call) the reference's loads
are as narrow as its elements. Written: 4 bytes per column and row.

Aliasing. Nothing that is written is read, except the scratch buffer by the second kernel.

Numerics.
- exp2((z - m) scale), never exp2(z scale - m scale): the difference of two close numbers is exact, so a common offset
  of the logits costs nothing.
- s is formed by the same instructions (an explicit fma) whatever else is gathered, and in the same order for either
  model. So cached and live log-probs of the same row at the same alignment and dtype have equal bits. They may differ
  in the last bit where a row of a tile or more lies differently relative to a 16-byte line (lanes then hold other
  entries), between split rows and whole ones, and in a divergence with a reference of another dtype or alignment.
- m starts at -inf and is replaced by 0 as a base while it is -inf: logits as low as the type allows need no sentinel.
- e comes from the unbounded t, which may be NaN; where e multiplies t, t is bounded or 0 * inf replaced by 0.
- A NaN, a +inf or nothing but -inf: NaN in all of that model's columns, by arithmetic (s is NaN, or the maximum is not
  finite). Both divergences then are NaN as well. A label outside [0, V): NaN without reading the row.
- is_top1 compares the label with the largest entry, and with the largest one before it (`before`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import layout
from ...core.columns import BIT, COLUMNS, NEEDS_REFERENCE
from . import common
from .common import (
    _INF,
    _LOG2E,
    exponent_shift,
    head_of,
    joined,
    label_tile,
    log1p,
    part_bounds,
    row_of,
    tile_offsets,
    weighted,
    whole_tiles,
)

# What is done with the reference's row.
NO_REFERENCE, AFTER, TOGETHER = 0, 1, 2
_AFTER, _TOGETHER = tl.constexpr(AFTER), tl.constexpr(TOGETHER)
# Tiles per trip of the loop over whole tiles. Four 16-byte loads are then under way per thread, without the shared
# memory, barriers and extra instructions of a cp.async pipeline (9.3 instructions per element instead of 7.5).
UNROLL = {NO_REFERENCE: 4, AFTER: 4, TOGETHER: 2}

# Partial sums of a piece of a row, in the order in which the scratch buffer holds them.
PARTIALS = ("max", "exp", "exp_t", "exp_sq", "raw", "before", "r_max", "r_exp", "cross", "r_cross")
_PARTIALS = tl.constexpr(len(PARTIALS))
_LN2 = tl.constexpr(0.69314718055994530942)
# The raw logits are summed times this (kRawUnit of csrc/core/softmax.h): their sum stays finite in fp32.
_RAW_UNIT = tl.constexpr(2.0**-30)


# --- one tile into the running sums of its lanes ----------------------------------------------------------------------


@triton.jit
def _move(m, z, scale):
    """Running maxima m [LANES] with a tile z [LANES, VEC]: `(new m, base, fall of old exponents, factor of old sums)`.

    The base of the exponents is the maximum, or 0 while a lane has seen nothing but -inf; then nothing has been summed,
    and its factor of 0 does not matter.
    """
    new = tl.maximum(m, tl.max(z, 1))
    base = tl.where(new == -_INF, 0.0, new)
    shift = (m - base) * scale
    return new, base, shift, tl.exp2(shift)


@triton.jit
def _fold(z, scale, m, s, st, sq, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    m, base, shift, a = _move(m, z, scale)
    t = (z - base[:, None]) * scale
    e = tl.exp2(t)
    if ENTROPY:
        # An exponent below -200 has e = 0; bounded, it does not make 0 * -inf. e itself comes from the unbounded t,
        # which may be the NaN that `maximum` leaves out.
        st = tl.where(a == 0, 0.0, a * (st + shift * s)) + tl.sum(e * tl.maximum(t, -200.0), 1)
    if EXTRAS:
        sq = a * a * sq + tl.sum(e * e, 1)
    s = tl.fma(a, s, tl.sum(e, 1))
    return m, s, st, sq


@triton.jit
def _fold_pair(z, rz, scale, m, s, st, sq, c, rm, rs, rc, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    m, base, shift, a = _move(m, z, scale)
    rm, r_base, r_shift, ra = _move(rm, rz, scale)
    t = (z - base[:, None]) * scale
    rt = (rz - r_base[:, None]) * scale
    e = tl.exp2(t)
    re = tl.exp2(rt)
    if ENTROPY:
        st = tl.where(a == 0, 0.0, a * (st + shift * s)) + tl.sum(e * tl.maximum(t, -200.0), 1)
    if EXTRAS:
        sq = a * a * sq + tl.sum(e * e, 1)
    d = t - rt
    c = tl.where(a == 0, 0.0, a * (c + (shift - r_shift) * s)) + tl.sum(weighted(e, d), 1)
    rc = tl.where(ra == 0, 0.0, ra * (rc + (r_shift - shift) * rs)) + tl.sum(weighted(re, -d), 1)
    s = tl.fma(a, s, tl.sum(e, 1))
    rs = tl.fma(ra, rs, tl.sum(re, 1))
    return m, s, st, sq, c, rm, rs, rc


# --- one row, or a piece of it ----------------------------------------------------------------------------------------


@triton.jit
def _walk(
    row, n, label, scale, head_mask,
    ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Per-lane sums of n elements from `row` on, without the one at `label`."""
    TILE: tl.constexpr = LANES * VEC
    m = tl.full([LANES], -_INF, tl.float32)
    before = tl.full([LANES], -_INF, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    st = tl.zeros([LANES], tl.float32)
    sq = tl.zeros([LANES], tl.float32)
    raw = tl.zeros([LANES], tl.float32)
    head = head_of(row, VEC) & head_mask
    tiles = whole_tiles(n, head, TILE)
    at_label = label_tile(label, head, tiles, TILE)
    body = tl.multiple_of(row + head, 16)
    off = tile_offsets(LANES, VEC)
    for part in range((head == 0).to(tl.int32), 3):
        start, stop, there = part_bounds(part, at_label, tiles)
        for i in tl.range(start, stop, num_stages=1, loop_unroll_factor=UNROLL):
            z = tl.load(body + tl.cast(i, tl.int64) * TILE + off).to(tl.float32)
            if EXTRAS:
                raw += tl.sum(z * _RAW_UNIT, 1)
            m, s, st, sq = _fold(z, scale, m, s, st, sq, ENTROPY, EXTRAS)
        at = head + stop * TILE + off
        inside = (at >= 0) & (at < tl.where(part == 0, tl.minimum(head, n), n)) & there & (at != label)
        z = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        if EXTRAS:
            raw += tl.sum(z * _RAW_UNIT, 1)
        z = tl.where(inside, z, -_INF)
        if EXTRAS:
            # What comes before the label: all of m so far if this tile starts before it, and part of this tile.
            so_far = tl.maximum(m, tl.max(tl.where(at < label, z, -_INF), 1))
            before = tl.where((part < 2) & (head + stop * TILE <= label), so_far, before)
        m, s, st, sq = _fold(z, scale, m, s, st, sq, ENTROPY, EXTRAS)
    return m, s, st, sq, raw, before


@triton.jit
def _walk_pair(
    row, ref, n, label, scale, head_mask,
    ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The same of both models, in step: tiles begin where the policy's lines do, and the reference's too if ALIGNED."""
    TILE: tl.constexpr = LANES * VEC
    m = tl.full([LANES], -_INF, tl.float32)
    before = tl.full([LANES], -_INF, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    st = tl.zeros([LANES], tl.float32)
    sq = tl.zeros([LANES], tl.float32)
    raw = tl.zeros([LANES], tl.float32)
    c = tl.zeros([LANES], tl.float32)
    rm = tl.full([LANES], -_INF, tl.float32)
    rs = tl.zeros([LANES], tl.float32)
    rc = tl.zeros([LANES], tl.float32)
    head = head_of(row, VEC) & head_mask
    tiles = whole_tiles(n, head, TILE)
    at_label = label_tile(label, head, tiles, TILE)
    # The hint has to stand where the pointer is made; Triton loses it on the way into a helper.
    body = tl.multiple_of(row + head, 16)
    r_body = tl.multiple_of(ref + head, 16) if ALIGNED else ref + head
    off = tile_offsets(LANES, VEC)
    for part in range((head == 0).to(tl.int32), 3):
        start, stop, there = part_bounds(part, at_label, tiles)
        for i in tl.range(start, stop, num_stages=1, loop_unroll_factor=UNROLL):
            at = tl.cast(i, tl.int64) * TILE
            z = tl.load(body + at + off).to(tl.float32)
            rz = tl.load(r_body + at + off).to(tl.float32)
            if EXTRAS:
                raw += tl.sum(z * _RAW_UNIT, 1)
            m, s, st, sq, c, rm, rs, rc = _fold_pair(z, rz, scale, m, s, st, sq, c, rm, rs, rc, ENTROPY, EXTRAS)
        at = head + stop * TILE + off
        inside = (at >= 0) & (at < tl.where(part == 0, tl.minimum(head, n), n)) & there & (at != label)
        z = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        rz = tl.load(ref + at, mask=inside, other=0.0).to(tl.float32)
        if EXTRAS:
            raw += tl.sum(z * _RAW_UNIT, 1)
        z = tl.where(inside, z, -_INF)
        rz = tl.where(inside, rz, -_INF)
        if EXTRAS:
            so_far = tl.maximum(m, tl.max(tl.where(at < label, z, -_INF), 1))
            before = tl.where((part < 2) & (head + stop * TILE <= label), so_far, before)
        m, s, st, sq, c, rm, rs, rc = _fold_pair(z, rz, scale, m, s, st, sq, c, rm, rs, rc, ENTROPY, EXTRAS)
    return m, s, st, sq, raw, before, c, rm, rs, rc


@triton.jit
def _product(a, x):
    """a * x, rounded before anything is added to it.

    A plain product may be contracted with the addition that follows. In the butterfly of a reduction lane i would then
    add round(a_j x_j) to the unrounded a_i x_i, and lane j the other way round: lanes end with different sums, and which
    of them is stored is undefined. A fused multiply-add of 0 is contracted with nothing.
    """
    return tl.fma(a, x, tl.zeros_like(x))


@triton.jit
def _merge(m, s, st, sq, raw, before, c, rm, rs, rc, scale, PAIR: tl.constexpr):
    """Sums of lanes (or pieces of a row), each relative to its own maximum, as sums relative to the largest."""
    top = tl.max(m, 0)
    shift = exponent_shift(m, tl.where(top == -_INF, 0.0, top), scale)
    a = tl.exp2(shift)
    r_top = tl.max(rm, 0)
    r_shift = exponent_shift(rm, tl.where(r_top == -_INF, 0.0, r_top), scale)
    ra = tl.exp2(r_shift)
    st = tl.sum(tl.where(a == 0, 0.0, _product(a, st + shift * s)), 0)
    if PAIR:
        c = tl.where(a == 0, 0.0, _product(a, c + (shift - r_shift) * s))
        rc = tl.where(ra == 0, 0.0, _product(ra, rc + (r_shift - shift) * rs))
    return (
        top, tl.sum(_product(a, s), 0), st, tl.sum(_product(a * a, sq), 0), tl.sum(raw, 0), tl.max(before, 0),
        tl.sum(c, 0), r_top, tl.sum(_product(ra, rs), 0), tl.sum(rc, 0),
    )  # fmt: skip


# --- from sums to columns ---------------------------------------------------------------------------------------------


@triton.jit
def _complete(m, s, label_logit, inverse_temperature):
    """The sums of a row, relative to the maximum of its other entries, with the label's term added. fp64 scalars.

    Returns the maximum, the fall of the old exponents and their factor, the label's exponent and term, the whole sum,
    log_sum and the log-prob.
    """
    scale = inverse_temperature * _LOG2E
    top = tl.maximum(m, label_logit)
    d = exponent_shift(m.to(tl.float64), top.to(tl.float64), scale)
    f = tl.exp2(d)
    t = (label_logit.to(tl.float64) - top.to(tl.float64)) * scale
    e = tl.exp2(t)
    others = f * s.to(tl.float64)
    log_sum = tl.where(label_logit == top, log1p(others), tl.log(others + e))
    log_sum = tl.where(top - top == 0, log_sum, float("nan"))  # nothing but -inf, or a +inf: no softmax
    logp = (label_logit.to(tl.float64) - top.to(tl.float64)) * inverse_temperature - log_sum
    return top, d, f, t, e, others + e, log_sum, logp


@triton.jit
def _put(out, columns, value, rows, COLUMN: tl.constexpr):
    """Store a column if it was asked for, in the slot that the columns before it leave."""
    x = columns & ((1 << COLUMN) - 1)  # count its bits
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    slot = (x + (x >> 8)) & 0x1F
    tl.store(out + slot.to(tl.int64) * rows, value.to(tl.float32), mask=((columns >> COLUMN) & 1) != 0)


@triton.jit
def _finish_policy(
    out, columns, rows, vocab, inverse_temperature, y, m, s, st, sq, raw, before,
    ENTROPY: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """The policy's columns of a row from its complete sums. Numbers are those of `rows.COLUMNS`."""
    top, d, f, t, e, total, log_sum, logp = _complete(m, s, y, inverse_temperature)
    broken = log_sum - log_sum  # NaN if there is no softmax, else 0
    _put(out, columns, top.to(tl.float64) + broken, rows, 0)
    _put(out, columns, log_sum, rows, 1)
    _put(out, columns, logp, rows, 2)
    _put(out, columns, top.to(tl.float64) * inverse_temperature + log_sum, rows, 6)
    if ENTROPY:
        weighted_t = weighted(f, st.to(tl.float64) + d * s.to(tl.float64)) + weighted(e, t)
        entropy = log_sum - _LN2 * (weighted_t / total)
        _put(out, columns, tl.where(entropy < 0, 0.0, entropy), rows, 8)
    if EXTRAS:
        _put(out, columns, tl.log(sq.to(tl.float64) * f * f + e * e) - 2 * log_sum, rows, 11)
        mean = (raw.to(tl.float64) * (1 / _RAW_UNIT) + y.to(tl.float64)) / vocab * inverse_temperature
        _put(out, columns, mean + broken, rows, 12)
        first = (y == top) & (before < y)
        _put(out, columns, tl.where(first, 1.0, 0.0) + broken, rows, 13)


@triton.jit
def _finish_reference(out, columns, rows, inverse_temperature, y, m, s):
    """The reference's own columns."""
    top, _, _, _, _, _, log_sum, logp = _complete(m, s, y, inverse_temperature)
    _put(out, columns, top.to(tl.float64) + (log_sum - log_sum), rows, 3)
    _put(out, columns, log_sum, rows, 4)
    _put(out, columns, logp, rows, 5)
    _put(out, columns, top.to(tl.float64) * inverse_temperature + log_sum, rows, 7)


@triton.jit
def _finish_divergences(out, columns, rows, inverse_temperature, y, ry, m, s, c, rm, rs, rc):
    """Both KLs; never below 0, where the rounding of a sum that should cancel can leave them."""
    _, d, f, t, e, total, log_sum, _ = _complete(m, s, y, inverse_temperature)
    _, rd, rf, rt, re, r_total, r_log_sum, _ = _complete(rm, rs, ry, inverse_temperature)
    r_cross = weighted(rf, rc.to(tl.float64) + (rd - d) * rs.to(tl.float64)) + weighted(re, rt - t)
    kl = _LN2 * (r_cross / r_total) - r_log_sum + log_sum
    _put(out, columns, tl.where(kl < 0, 0.0, kl), rows, 9)
    cross = weighted(f, c.to(tl.float64) + (d - rd) * s.to(tl.float64)) + weighted(e, t - rt)
    kl = _LN2 * (cross / total) - log_sum + r_log_sum
    _put(out, columns, tl.where(kl < 0, 0.0, kl), rows, 10)


@triton.jit
def _fill(out, columns, value, rows, COLUMNS: tl.constexpr):
    """The same value in all columns."""
    for column in tl.static_range(COLUMNS):
        _put(out, columns, value, rows, column)


# --- kernels ----------------------------------------------------------------------------------------------------------

_RUNTIME = (
    "logits", "reference", "labels", "out", "partial", "inner", "vocab", "outer_stride", "inner_stride",
    "r_outer_stride", "r_inner_stride", "ignore_index", "inverse_high", "inverse_low", "columns", "splits", "span",
    "head_mask",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def row_stats_kernel(
    logits,  # (S, T, V)
    reference,  # (S, T, V), or anything without one
    labels,  # (S, T) int64
    out,  # (K, S, T)
    partial,  # (S * T, PARTIALS, splits) fp32 if SPLIT
    inner: tl.int32,  # T
    vocab: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    r_outer_stride: tl.int64,
    r_inner_stride: tl.int64,
    ignore_index: tl.int64,
    inverse_high: tl.float32,  # 1 / temperature
    inverse_low: tl.float32,
    columns: tl.int32,
    splits: tl.int32,
    span: tl.int32,  # elements per program
    head_mask: tl.int32,  # -1; 0 if no row has a whole tile: all of it is one masked tile then, wherever it lies
    REFERENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    R_VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0)
    rows = tl.num_programs(0)
    of_reference = program < 0
    if REFERENCE == _AFTER:
        of_reference = program % 2 == 1
        program = program // 2
        rows = rows // 2
    row = program
    piece = program * 0
    n = vocab
    if SPLIT:
        piece = program % splits
        row = program // splits
        rows = rows // splits
        n = tl.minimum(span, vocab - piece * span)
    start = piece * span
    out += row
    label64 = tl.load(labels + row)
    unusable = (label64 < 0) | (label64 >= vocab)
    if (label64 == ignore_index) | unusable:
        # Each column is written by one program: that of the policy, or the combining one.
        if not (SPLIT or of_reference):
            _fill(out, columns, tl.where(label64 == ignore_index, 0.0, float("nan")), rows, COLUMNS)
        return
    inverse_temperature = joined(inverse_high, inverse_low)
    scale = (inverse_temperature * _LOG2E).to(tl.float32)
    label = label64.to(tl.int32) - start
    z_row = row_of(logits, row, inner, outer_stride, inner_stride) + start
    r_row = row_of(reference, row, inner, r_outer_stride, r_inner_stride) + start
    to = partial + (row.to(tl.int64) * splits + piece) * _PARTIALS
    if REFERENCE == _TOGETHER:
        m, s, st, sq, raw, before, c, rm, rs, rc = _walk_pair(
            z_row, r_row, n, label, scale, head_mask, ENTROPY, EXTRAS, ALIGNED, LANES, VEC, UNROLL
        )
        m, s, st, sq, raw, before, c, rm, rs, rc = _merge(m, s, st, sq, raw, before, c, rm, rs, rc, scale, True)
        if SPLIT:
            _store_policy(to, m, s, st, sq, raw, before)
            _store_reference(to, rm, rs)
            tl.store(to + 8, c)
            tl.store(to + 9, rc)
        else:
            y = tl.load(z_row + label).to(tl.float32)
            ry = tl.load(r_row + label).to(tl.float32)
            _finish_policy(
                out, columns, rows, vocab, inverse_temperature, y, m, s, st, sq, raw, before, ENTROPY, EXTRAS
            )
            _finish_reference(out, columns, rows, inverse_temperature, ry, rm, rs)
            _finish_divergences(out, columns, rows, inverse_temperature, y, ry, m, s, c, rm, rs, rc)
    else:
        no_max = tl.full([LANES], -_INF, tl.float32)
        no_sum = tl.zeros([LANES], tl.float32)
        if of_reference:
            rm, rs, _, _, _, _ = _walk(r_row, n, label, scale, head_mask, False, False, LANES, R_VEC, UNROLL)
            rm, rs, _, _, _, _, _, _, _, _ = _merge(
                rm, rs, no_sum, no_sum, no_sum, no_max, no_sum, no_max, no_sum, no_sum, scale, False
            )
            if SPLIT:
                _store_reference(to, rm, rs)
            else:
                ry = tl.load(r_row + label).to(tl.float32)
                _finish_reference(out, columns, rows, inverse_temperature, ry, rm, rs)
        else:
            m, s, st, sq, raw, before = _walk(z_row, n, label, scale, head_mask, ENTROPY, EXTRAS, LANES, VEC, UNROLL)
            m, s, st, sq, raw, before, _, _, _, _ = _merge(
                m, s, st, sq, raw, before, no_sum, no_max, no_sum, no_sum, scale, False
            )
            if SPLIT:
                _store_policy(to, m, s, st, sq, raw, before)
            else:
                y = tl.load(z_row + label).to(tl.float32)
                _finish_policy(
                    out, columns, rows, vocab, inverse_temperature, y, m, s, st, sq, raw, before, ENTROPY, EXTRAS
                )


@triton.jit
def _store_policy(to, m, s, st, sq, raw, before):
    tl.store(to + 0, m)
    tl.store(to + 1, s)
    tl.store(to + 2, st)
    tl.store(to + 3, sq)
    tl.store(to + 4, raw)
    tl.store(to + 5, before)


@triton.jit
def _store_reference(to, m, s):
    tl.store(to + 6, m)
    tl.store(to + 7, s)


@triton.jit(do_not_specialize=_RUNTIME)
def combine_kernel(
    logits, reference, labels, out,  # as above
    partial,  # (S * T, splits, PARTIALS) fp32
    inner: tl.int32,
    vocab: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    r_outer_stride: tl.int64,
    r_inner_stride: tl.int64,
    ignore_index: tl.int64,
    inverse_high: tl.float32,
    inverse_low: tl.float32,
    columns: tl.int32,
    splits: tl.int32,
    span: tl.int32,
    head_mask: tl.int32,
    REFERENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    out += row
    label64 = tl.load(labels + row)
    unusable = (label64 < 0) | (label64 >= vocab)
    if (label64 == ignore_index) | unusable:
        _fill(out, columns, tl.where(label64 == ignore_index, 0.0, float("nan")), rows, COLUMNS)
        return
    inverse_temperature = joined(inverse_high, inverse_low)
    scale = (inverse_temperature * _LOG2E).to(tl.float32)
    piece = tl.arange(0, MAX_SPLITS)
    there = piece < splits
    at = partial + (row.to(tl.int64) * splits + piece) * _PARTIALS
    m = tl.load(at, mask=there, other=-_INF)
    s = tl.load(at + 1, mask=there, other=0.0)
    st = tl.load(at + 2, mask=there, other=0.0)
    sq = tl.load(at + 3, mask=there, other=0.0)
    raw = tl.load(at + 4, mask=there, other=0.0)
    before = tl.load(at + 5, mask=there, other=-_INF)
    rm = tl.load(at + 6, mask=there, other=-_INF)
    rs = tl.load(at + 7, mask=there, other=0.0)
    c = tl.load(at + 8, mask=there, other=0.0)
    rc = tl.load(at + 9, mask=there, other=0.0)
    m, s, st, sq, raw, before, c, rm, rs, rc = _merge(
        m, s, st, sq, raw, before, c, rm, rs, rc, scale, REFERENCE == _TOGETHER
    )
    y = tl.load(row_of(logits, row, inner, outer_stride, inner_stride) + label64).to(tl.float32)
    _finish_policy(out, columns, rows, vocab, inverse_temperature, y, m, s, st, sq, raw, before, ENTROPY, EXTRAS)
    if REFERENCE:
        ry = tl.load(row_of(reference, row, inner, r_outer_stride, r_inner_stride) + label64).to(tl.float32)
        _finish_reference(out, columns, rows, inverse_temperature, ry, rm, rs)
        if REFERENCE == _TOGETHER:
            _finish_divergences(out, columns, rows, inverse_temperature, y, ry, m, s, c, rm, rs, rc)


# --- host -------------------------------------------------------------------------------------------------------------


def gathers(columns: int) -> dict[str, int | bool]:
    """Which sums the columns need: the compile-time part of a call, besides dtypes."""
    pair = bool(columns & (BIT["kl_reference_policy"] | BIT["kl_policy_reference"]))
    return {
        "REFERENCE": TOGETHER if pair else AFTER if columns & NEEDS_REFERENCE else NO_REFERENCE,
        "ENTROPY": bool(columns & BIT["entropy"]),
        "EXTRAS": bool(columns & (BIT["log_sum_sq_probs"] | BIT["mean_logits"] | BIT["is_top1"])),
    }


def row_stats(
    logits: Tensor, labels: Tensor, reference: Tensor | None, columns: int, temperature: float, ignore_index: int
) -> Tensor:
    """Per-row results. See `qkernels.backends.ops.row_stats`."""
    common.check_labels(labels, logits.shape[-1], ignore_index)
    out = logits.new_empty((columns.bit_count(), *labels.shape), dtype=torch.float32)
    rows, vocab = layout.dense(labels, torch.int64).numel(), layout.rows(logits).shape[-1]
    if rows == 0:
        return out
    common.check_vocab(vocab)
    how = gathers(columns)
    if reference is None or how["REFERENCE"] == NO_REFERENCE:
        reference, how["REFERENCE"] = logits, NO_REFERENCE
    vector, r_vector = common.vector_length(logits), common.vector_length(reference)
    aligned = True
    if how["REFERENCE"] == TOGETHER:
        vector = r_vector = max(vector, r_vector)
        aligned = common.same_alignment(logits, reference, vector)
    lanes = common.LANES
    splits = common.splits_for(rows, vocab, lanes * vector, logits.device)
    programs = 2 if how["REFERENCE"] == AFTER else 1  # a program for each model
    partial = out if splits == 1 else out.new_empty((rows, splits, len(PARTIALS)))
    args = (
        logits, reference, labels, out, partial, logits.shape[1], vocab, *common.row_strides(logits),
        *common.row_strides(reference), ignore_index, *common.two_floats(1 / temperature), columns, splits,
        common.span_of(vocab, splits, 8), 0 if vocab < lanes * min(vector, r_vector) else -1,
    )  # fmt: skip
    with common.on_device_of(logits):
        row_stats_kernel[(rows * splits * programs,)](
            *args, **how, ALIGNED=aligned, SPLIT=splits > 1, COLUMNS=len(COLUMNS), LANES=lanes, VEC=vector,
            R_VEC=r_vector, UNROLL=UNROLL[how["REFERENCE"]], **common.OPTIONS,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(rows,)](*args, **how, COLUMNS=len(COLUMNS), MAX_SPLITS=common.MAX_SPLITS, **common.COMBINE)
    return out
