"""`row_stats`: all per-row results of one or two models in one read of their logits.

Maths. z = raw logits of a row, T the temperature, scale = log2(e) / T, y the label. Each lane of a tile keeps, over
the entries it has seen and relative to their maximum m, with t_j = (z_j - m) scale <= 0 and e_j = 2^t_j:

    exp = sum e    exp_t = sum e t    exp_sq = sum e^2    raw = sum z    cross = sum e (t - t of the other model)

When a lane's maximum changes, with d = (m_old - m_new) scale, its running sums are rescaled (online softmax): exp
becomes 2^d exp, exp_t becomes 2^d (exp_t + d exp), cross becomes 2^d (cross + (d - d of the other model) exp). That is
one exponential per tile and lane, none per element. At the end the lanes' sums are merged by the same rule. The label's
entry is left out of all sums (and of m); `_complete` adds it in fp64, so that log pi = -log1p(sum of the others) keeps
its relative precision when the model is almost certain. The formulas of the fields are those of csrc/core/fields.h.

Programs. One per row, of 4 warps; two where both models' log-probs are asked for but no divergence (one per model,
which needs fewer registers than both models in one program). Divergences need both rows jointly. Where there are fewer
than 4 rows per SM, rows are split into pieces: fp32 partial sums go to a scratch buffer, `combine_kernel` merges them
in order and finishes the row. No atomics: results have the same bits from run to run.

Memory traffic. Each logit is read once, by 128-bit loads whatever V, strides and addresses are (`common`); the label's
logit twice. Rows whose label is ignored or outside of the vocabulary are not read. Where the reference's rows have
another alignment modulo 16 bytes than the policy's (ALIGNED = False, decided by the host for the whole call) the
reference's loads are as narrow as its elements. Written: 4 bytes per field and row.

Aliasing. Nothing that is written is read, except the scratch buffer by the second kernel.

Numerics.
- exp2((z - m) scale), never exp2(z scale - m scale): the difference of two close numbers is exact, so a common offset
  of the logits costs nothing.
- exp is formed by the same instructions (an explicit fma) whatever else is accumulated, and in the same order for
  either model. So cached and recomputed log-probs of the same row at the same alignment and dtype have equal bits. They
  may differ in the last bit where a row of a tile or more has another alignment modulo 16 bytes (lanes then hold other
  entries), between split rows and whole ones, and in a divergence with a reference of another dtype or alignment.
- m starts at -inf; while it is -inf, exponents are relative to 0: logits as low as the type allows need no sentinel.
- e comes from the unbounded t, which may be NaN; where e multiplies t, t is bounded or 0 * inf replaced by 0.
- A NaN, a +inf or nothing but -inf: NaN in all of that model's fields, by arithmetic (exp is NaN, or the maximum is
  not finite). Both divergences then are NaN as well. A label outside [0, V): NaN without reading the row.
- is_top1 compares the label with the largest entry, and with the largest one before it (`before_label`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import layout
from ...core.calls import RowStats
from ...core.fields import BIT, DIVERGENCES, FIELDS, NEEDS_REFERENCE
from . import common
from .common import (
    _INF,
    _LOG2E,
    head_of,
    joined,
    label_tile,
    log1p,
    part_bounds,
    rescale_exponent,
    row_of,
    tile_offsets,
    weighted,
    whole_tiles,
)

# How the reference's row is read: not at all, by a program of its own, or jointly with the policy's.
NO_REFERENCE, SEPARATE, JOINT = 0, 1, 2
_SEPARATE, _JOINT = tl.constexpr(SEPARATE), tl.constexpr(JOINT)
# Tiles per iteration of the loop over whole tiles. Four 128-bit loads are then in flight per thread, without the shared
# memory, barriers and extra instructions of a cp.async pipeline (9.3 instructions per element instead of 7.5).
UNROLL = {NO_REFERENCE: 4, SEPARATE: 4, JOINT: 2}

# Partial sums of a piece of a row, in the order in which the scratch buffer holds them.
PARTIALS = ("max", "exp", "exp_t", "exp_sq", "raw", "before_label", "cross", "r_max", "r_exp", "r_cross")
_PARTIALS = tl.constexpr(len(PARTIALS))
_R_PARTIALS = tl.constexpr(PARTIALS.index("r_max"))
_LN2 = tl.constexpr(0.69314718055994530942)
# The raw logits are summed times this (kRawUnit of csrc/core/softmax.h): their sum stays finite in fp32.
_RAW_UNIT = tl.constexpr(2.0**-30)

assert len(FIELDS) <= 16, "_put counts the bits of 16 fields"
_ONE = tl.constexpr(1)
_FIELDS = tl.constexpr(len(FIELDS))
_ROW_MAX = tl.constexpr(FIELDS.index("row_max"))
_LOG_SUM = tl.constexpr(FIELDS.index("log_sum"))
_LOGPS = tl.constexpr(FIELDS.index("logps"))
_REFERENCE_ROW_MAX = tl.constexpr(FIELDS.index("reference_row_max"))
_REFERENCE_LOG_SUM = tl.constexpr(FIELDS.index("reference_log_sum"))
_REFERENCE_LOGPS = tl.constexpr(FIELDS.index("reference_logps"))
_LOGSUMEXP = tl.constexpr(FIELDS.index("logsumexp"))
_REFERENCE_LOGSUMEXP = tl.constexpr(FIELDS.index("reference_logsumexp"))
_ENTROPY = tl.constexpr(FIELDS.index("entropy"))
_KL_REFERENCE_POLICY = tl.constexpr(FIELDS.index("kl_reference_policy"))
_KL_POLICY_REFERENCE = tl.constexpr(FIELDS.index("kl_policy_reference"))
_LOG_SUM_SQ_PROBS = tl.constexpr(FIELDS.index("log_sum_sq_probs"))
_MEAN_LOGITS = tl.constexpr(FIELDS.index("mean_logits"))
_IS_TOP1 = tl.constexpr(FIELDS.index("is_top1"))


# --- the running sums of a tile's lanes -------------------------------------------------------------------------------
#
# Sums of the policy are a tuple (maximum, exp, exp_t, exp_sq, cross), those of the reference (maximum, exp, cross).


@triton.jit
def _update_max(maximum, z, scale):
    """Running maxima [LANES] with a tile z [LANES, VEC]: the new maxima, the base of exponents, and what rescales sums.

    The base is the maximum, or 0 while a lane has seen nothing but -inf; then nothing has been summed, and its factor
    of 0 does not matter.
    """
    new = tl.maximum(maximum, tl.max(z, 1))
    base = tl.where(new == -_INF, 0.0, new)
    exponent = (maximum - base) * scale
    return new, base, exponent, tl.exp2(exponent)


@triton.jit
def _accumulate(z, scale, sums, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    """The policy's sums with a tile [LANES, VEC]."""
    maximum, exp, exp_t, exp_sq, cross = sums
    maximum, base, exponent, factor = _update_max(maximum, z, scale)
    t = (z - base[:, None]) * scale
    e = tl.exp2(t)
    if ENTROPY:
        # An exponent below -200 has e = 0; bounded, it does not make 0 * -inf. e itself comes from the unbounded t,
        # which may be the NaN that `maximum` leaves out.
        exp_t = tl.where(factor == 0, 0.0, factor * (exp_t + exponent * exp)) + tl.sum(e * tl.maximum(t, -200.0), 1)
    if EXTRAS:
        exp_sq = factor * factor * exp_sq + tl.sum(e * e, 1)
    exp = tl.fma(factor, exp, tl.sum(e, 1))
    return maximum, exp, exp_t, exp_sq, cross


@triton.jit
def _accumulate_jointly(z, rz, scale, sums, r_sums, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    """The sums of both models with a tile of each."""
    maximum, exp, exp_t, exp_sq, cross = sums
    r_maximum, r_exp, r_cross = r_sums
    maximum, base, exponent, factor = _update_max(maximum, z, scale)
    r_maximum, r_base, r_exponent, r_factor = _update_max(r_maximum, rz, scale)
    t = (z - base[:, None]) * scale
    rt = (rz - r_base[:, None]) * scale
    e = tl.exp2(t)
    re = tl.exp2(rt)
    if ENTROPY:
        exp_t = tl.where(factor == 0, 0.0, factor * (exp_t + exponent * exp)) + tl.sum(e * tl.maximum(t, -200.0), 1)
    if EXTRAS:
        exp_sq = factor * factor * exp_sq + tl.sum(e * e, 1)
    d = t - rt
    moved = exponent - r_exponent
    r_moved = r_exponent - exponent
    cross = tl.where(factor == 0, 0.0, factor * (cross + moved * exp)) + tl.sum(weighted(e, d), 1)
    r_cross = tl.where(r_factor == 0, 0.0, r_factor * (r_cross + r_moved * r_exp)) + tl.sum(weighted(re, -d), 1)
    exp = tl.fma(factor, exp, tl.sum(e, 1))
    r_exp = tl.fma(r_factor, r_exp, tl.sum(re, 1))
    return (maximum, exp, exp_t, exp_sq, cross), (r_maximum, r_exp, r_cross)


# --- one row, or a piece of it ----------------------------------------------------------------------------------------


@triton.jit
def _accumulate_row(
    row, n, label, scale, head_mask,
    ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Per-lane sums of the n elements of a row, without the one at `label`: `(sums, raw, before_label)`."""
    TILE: tl.constexpr = LANES * VEC
    nothing = tl.full([LANES], -_INF, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    sums = (nothing, zero, zero, zero, zero)
    raw = zero
    before_label = nothing
    head = head_of(row, VEC) & head_mask
    tiles = whole_tiles(n, head, TILE)
    of_label = label_tile(label, head, tiles, TILE)
    body = tl.multiple_of(row + head, 16)
    off = tile_offsets(LANES, VEC)
    for part in range((head == 0).to(tl.int32), 3):
        start, stop, there = part_bounds(part, of_label, tiles)
        for i in tl.range(start, stop, num_stages=1, loop_unroll_factor=UNROLL):
            z = tl.load(body + tl.cast(i, tl.int64) * TILE + off).to(tl.float32)
            if EXTRAS:
                raw += tl.sum(z * _RAW_UNIT, 1)
            sums = _accumulate(z, scale, sums, ENTROPY, EXTRAS)
        at = head + stop * TILE + off
        inside = (at >= 0) & (at < tl.where(part == 0, tl.minimum(head, n), n)) & there & (at != label)
        z = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        if EXTRAS:
            raw += tl.sum(z * _RAW_UNIT, 1)
        z = tl.where(inside, z, -_INF)
        if EXTRAS:
            # The largest entry before the label: if this tile starts before it, all so far and part of this tile.
            so_far = tl.maximum(sums[0], tl.max(tl.where(at < label, z, -_INF), 1))
            before_label = tl.where((part < 2) & (head + stop * TILE <= label), so_far, before_label)
        sums = _accumulate(z, scale, sums, ENTROPY, EXTRAS)
    return sums, raw, before_label


@triton.jit
def _accumulate_row_jointly(
    row, r_row, n, label, scale, head_mask,
    ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The same of both models' rows: `(sums, raw, before_label, r_sums)`.

    Tiles begin at multiples of 16 bytes of the policy's row, and of the reference's too if ALIGNED.
    """
    TILE: tl.constexpr = LANES * VEC
    nothing = tl.full([LANES], -_INF, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    sums = (nothing, zero, zero, zero, zero)
    r_sums = (nothing, zero, zero)
    raw = zero
    before_label = nothing
    head = head_of(row, VEC) & head_mask
    tiles = whole_tiles(n, head, TILE)
    of_label = label_tile(label, head, tiles, TILE)
    # The hint has to be given where the pointer is computed; Triton loses it on the way into a helper.
    body = tl.multiple_of(row + head, 16)
    r_body = tl.multiple_of(r_row + head, 16) if ALIGNED else r_row + head
    off = tile_offsets(LANES, VEC)
    for part in range((head == 0).to(tl.int32), 3):
        start, stop, there = part_bounds(part, of_label, tiles)
        for i in tl.range(start, stop, num_stages=1, loop_unroll_factor=UNROLL):
            at = tl.cast(i, tl.int64) * TILE
            z = tl.load(body + at + off).to(tl.float32)
            rz = tl.load(r_body + at + off).to(tl.float32)
            if EXTRAS:
                raw += tl.sum(z * _RAW_UNIT, 1)
            sums, r_sums = _accumulate_jointly(z, rz, scale, sums, r_sums, ENTROPY, EXTRAS)
        at = head + stop * TILE + off
        inside = (at >= 0) & (at < tl.where(part == 0, tl.minimum(head, n), n)) & there & (at != label)
        z = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        rz = tl.load(r_row + at, mask=inside, other=0.0).to(tl.float32)
        if EXTRAS:
            raw += tl.sum(z * _RAW_UNIT, 1)
        z = tl.where(inside, z, -_INF)
        rz = tl.where(inside, rz, -_INF)
        if EXTRAS:
            so_far = tl.maximum(sums[0], tl.max(tl.where(at < label, z, -_INF), 1))
            before_label = tl.where((part < 2) & (head + stop * TILE <= label), so_far, before_label)
        sums, r_sums = _accumulate_jointly(z, rz, scale, sums, r_sums, ENTROPY, EXTRAS)
    return sums, raw, before_label, r_sums


# --- merging lanes, or pieces of a row --------------------------------------------------------------------------------


@triton.jit
def _product(a, x):
    """a * x, rounded before anything is added to it.

    A plain product may be contracted with the addition that follows. In the butterfly of a reduction lane i would then
    add round(a_j x_j) to the unrounded a_i x_i, and lane j the other way round: lanes end with different sums, and
    which of them is stored is undefined. A fused multiply-add of 0 is contracted with nothing.
    """
    return tl.fma(a, x, tl.zeros_like(x))


@triton.jit
def _to_largest(maximum, scale):
    """The largest of some maxima, and the exponents and factors that rescale the sums relative to each of them."""
    largest = tl.max(maximum, 0)
    exponent = rescale_exponent(maximum, tl.where(largest == -_INF, 0.0, largest), scale)
    return largest, exponent, tl.exp2(exponent)


@triton.jit
def _merge_weighted(total, exp, exponent, factor):
    """sum e x of all lanes, where each lane's x changes by `exponent` and its e by `factor`; a factor of 0 leaves 0."""
    return tl.sum(tl.where(factor == 0, 0.0, _product(factor, total + exponent * exp)), 0)


@triton.jit
def _merge_policy(sums, raw, before_label, scale):
    """Sums of lanes (or pieces of a row), each relative to its own maximum, relative to the largest. Not `cross`."""
    maximum, exp, exp_t, exp_sq, _ = sums
    largest, exponent, factor = _to_largest(maximum, scale)
    merged = (
        largest, tl.sum(_product(factor, exp), 0), _merge_weighted(exp_t, exp, exponent, factor),
        tl.sum(_product(factor * factor, exp_sq), 0), 0.0,
    )  # fmt: skip
    return merged, tl.sum(raw, 0), tl.max(before_label, 0)


@triton.jit
def _merge_reference(r_sums, scale):
    """The same of the reference."""
    r_maximum, r_exp, _ = r_sums
    largest, _, factor = _to_largest(r_maximum, scale)
    return largest, tl.sum(_product(factor, r_exp), 0), 0.0


@triton.jit
def _merge_cross(sums, r_sums, scale):
    """`cross` of both models, merged."""
    maximum, exp, _, _, cross = sums
    r_maximum, r_exp, r_cross = r_sums
    _, exponent, factor = _to_largest(maximum, scale)
    _, r_exponent, r_factor = _to_largest(r_maximum, scale)
    cross = _merge_weighted(cross, exp, exponent - r_exponent, factor)
    r_cross = _merge_weighted(r_cross, r_exp, r_exponent - exponent, r_factor)
    return cross, r_cross


@triton.jit
def _merge_jointly(sums, raw, before_label, r_sums, scale):
    """Sums of lanes (or pieces of a row) of both models."""
    cross, r_cross = _merge_cross(sums, r_sums, scale)
    merged, raw, before_label = _merge_policy(sums, raw, before_label, scale)
    r_merged = _merge_reference(r_sums, scale)
    return (
        (merged[0], merged[1], merged[2], merged[3], cross), raw, before_label, (r_merged[0], r_merged[1], r_cross)
    )  # fmt: skip


# --- from sums to fields ----------------------------------------------------------------------------------------------


@triton.jit
def _complete(maximum, exp, label_logit, inverse_temperature):
    """The sums of a row, relative to the maximum of its other entries, with the label's term added. fp64 scalars.

    Returns the maximum, exponent and factor that rescale the other entries' sums, the label's t and e, the whole sum,
    log_sum and the log-prob.
    """
    scale = inverse_temperature * _LOG2E
    row_max = tl.maximum(maximum, label_logit)
    exponent = rescale_exponent(maximum.to(tl.float64), row_max.to(tl.float64), scale)
    factor = tl.exp2(exponent)
    t = (label_logit.to(tl.float64) - row_max.to(tl.float64)) * scale
    e = tl.exp2(t)
    others = factor * exp.to(tl.float64)
    log_sum = tl.where(label_logit == row_max, log1p(others), tl.log(others + e))
    log_sum = tl.where(row_max - row_max == 0, log_sum, float("nan"))  # nothing but -inf, or a +inf: no softmax
    logp = (label_logit.to(tl.float64) - row_max.to(tl.float64)) * inverse_temperature - log_sum
    return row_max, exponent, factor, t, e, others + e, log_sum, logp


@triton.jit
def _put(out, fields, value, rows, FIELD: tl.constexpr):
    """Store a field if it was asked for. Its index in the output is the number of fields before it that were."""
    x = fields & ((_ONE << FIELD) - 1)  # count its bits
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    slot = (x + (x >> 8)) & 0x1F
    tl.store(out + slot.to(tl.int64) * rows, value.to(tl.float32), mask=((fields >> FIELD) & 1) != 0)


@triton.jit
def _finish_policy(
    out, fields, rows, vocab, inverse_temperature, label_logit, sums, raw, before_label,
    ENTROPY: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """The policy's fields of a row from its complete sums."""
    maximum, exp, exp_t, exp_sq, _ = sums
    row_max, exponent, factor, t, e, total, log_sum, logp = _complete(maximum, exp, label_logit, inverse_temperature)
    invalid = log_sum - log_sum  # NaN if there is no softmax, else 0
    _put(out, fields, row_max.to(tl.float64) + invalid, rows, _ROW_MAX)
    _put(out, fields, log_sum, rows, _LOG_SUM)
    _put(out, fields, logp, rows, _LOGPS)
    _put(out, fields, row_max.to(tl.float64) * inverse_temperature + log_sum, rows, _LOGSUMEXP)
    if ENTROPY:
        weighted_t = weighted(factor, exp_t.to(tl.float64) + exponent * exp.to(tl.float64)) + weighted(e, t)
        entropy = log_sum - _LN2 * (weighted_t / total)
        _put(out, fields, tl.where(entropy < 0, 0.0, entropy), rows, _ENTROPY)
    if EXTRAS:
        sum_sq = exp_sq.to(tl.float64) * factor * factor + e * e
        _put(out, fields, tl.log(sum_sq) - 2 * log_sum, rows, _LOG_SUM_SQ_PROBS)
        mean = (raw.to(tl.float64) * (1 / _RAW_UNIT) + label_logit.to(tl.float64)) / vocab * inverse_temperature
        _put(out, fields, mean + invalid, rows, _MEAN_LOGITS)
        first = (label_logit == row_max) & (before_label < label_logit)
        _put(out, fields, tl.where(first, 1.0, 0.0) + invalid, rows, _IS_TOP1)


@triton.jit
def _finish_reference(out, fields, rows, inverse_temperature, r_label_logit, r_sums):
    """The reference's own fields."""
    r_maximum, r_exp, _ = r_sums
    row_max, _, _, _, _, _, log_sum, logp = _complete(r_maximum, r_exp, r_label_logit, inverse_temperature)
    _put(out, fields, row_max.to(tl.float64) + (log_sum - log_sum), rows, _REFERENCE_ROW_MAX)
    _put(out, fields, log_sum, rows, _REFERENCE_LOG_SUM)
    _put(out, fields, logp, rows, _REFERENCE_LOGPS)
    _put(out, fields, row_max.to(tl.float64) * inverse_temperature + log_sum, rows, _REFERENCE_LOGSUMEXP)


@triton.jit
def _finish_divergences(out, fields, rows, inverse_temperature, label_logit, r_label_logit, sums, r_sums):
    """Both KLs; never below 0, where the rounding of a sum that should cancel can leave them."""
    maximum, exp, _, _, cross = sums
    r_maximum, r_exp, r_cross = r_sums
    _, exponent, factor, t, e, total, log_sum, _ = _complete(maximum, exp, label_logit, inverse_temperature)
    _, r_exponent, r_factor, rt, re, r_total, r_log_sum, _ = _complete(
        r_maximum, r_exp, r_label_logit, inverse_temperature
    )
    r_cross = weighted(r_factor, r_cross.to(tl.float64) + (r_exponent - exponent) * r_exp.to(tl.float64))
    r_cross += weighted(re, rt - t)
    kl = _LN2 * (r_cross / r_total) - r_log_sum + log_sum
    _put(out, fields, tl.where(kl < 0, 0.0, kl), rows, _KL_REFERENCE_POLICY)
    cross = weighted(factor, cross.to(tl.float64) + (exponent - r_exponent) * exp.to(tl.float64))
    cross += weighted(e, t - rt)
    kl = _LN2 * (cross / total) - log_sum + r_log_sum
    _put(out, fields, tl.where(kl < 0, 0.0, kl), rows, _KL_POLICY_REFERENCE)


@triton.jit
def _fill(out, fields, value, rows):
    """The same value in all fields."""
    for field in tl.static_range(_FIELDS):
        _put(out, fields, value, rows, field)


# --- the scratch buffer of split rows, in the order of PARTIALS -------------------------------------------------------


@triton.jit
def _store_policy(to, sums, raw, before_label):
    tl.store(to + 0, sums[0])
    tl.store(to + 1, sums[1])
    tl.store(to + 2, sums[2])
    tl.store(to + 3, sums[3])
    tl.store(to + 4, raw)
    tl.store(to + 5, before_label)


@triton.jit
def _store_reference(to, r_sums):
    tl.store(to + _R_PARTIALS, r_sums[0])
    tl.store(to + _R_PARTIALS + 1, r_sums[1])


@triton.jit
def _store_cross(to, sums, r_sums):
    tl.store(to + 6, sums[4])
    tl.store(to + _R_PARTIALS + 2, r_sums[2])


# --- kernels ----------------------------------------------------------------------------------------------------------

_RUNTIME = (
    "logits", "reference", "labels", "out", "partial", "inner", "vocab", "outer_stride", "inner_stride",
    "r_outer_stride", "r_inner_stride", "ignore_index", "inverse_high", "inverse_low", "fields", "splits", "span",
    "head_mask",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def row_stats_kernel(
    logits,  # (S, T, V)
    reference,  # (S, T, V), or anything without one
    labels,  # (S, T) int64
    out,  # (K, S, T)
    partial,  # (S * T, splits, PARTIALS) fp32 if SPLIT, anything otherwise
    inner: tl.int32,  # T
    vocab: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    r_outer_stride: tl.int64,
    r_inner_stride: tl.int64,
    ignore_index: tl.int64,
    inverse_high: tl.float32,  # 1 / temperature
    inverse_low: tl.float32,
    fields: tl.int32,
    splits: tl.int32,
    span: tl.int32,  # elements per program
    head_mask: tl.int32,  # -1; 0 if no row has a whole tile: all of it is one masked tile then, whatever its alignment
    REFERENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    R_VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0)
    rows = tl.num_programs(0)
    of_reference = program < 0
    if REFERENCE == _SEPARATE:
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
    outside = (label64 < 0) | (label64 >= vocab)
    if (label64 == ignore_index) | outside:
        # Each field is written by one program: that of the policy, or the combining one.
        if not (SPLIT or of_reference):
            _fill(out, fields, tl.where(label64 == ignore_index, 0.0, float("nan")), rows)
        return
    inverse_temperature = joined(inverse_high, inverse_low)
    scale = (inverse_temperature * _LOG2E).to(tl.float32)
    label = label64.to(tl.int32) - start
    z_row = row_of(logits, row, inner, outer_stride, inner_stride) + start
    r_row = row_of(reference, row, inner, r_outer_stride, r_inner_stride) + start
    to = partial + (row.to(tl.int64) * splits + piece) * _PARTIALS
    if REFERENCE == _JOINT:
        lane_sums, lane_raw, lane_before, lane_r_sums = _accumulate_row_jointly(
            z_row, r_row, n, label, scale, head_mask, ENTROPY, EXTRAS, ALIGNED, LANES, VEC, UNROLL
        )
        if not SPLIT:  # loaded while the sums of the threads are added, here and below
            label_bits, r_label_bits = tl.load(z_row + label), tl.load(r_row + label)
        sums, raw, before_label, r_sums = _merge_jointly(lane_sums, lane_raw, lane_before, lane_r_sums, scale)
        if SPLIT:
            _store_policy(to, sums, raw, before_label)
            _store_reference(to, r_sums)
            _store_cross(to, sums, r_sums)
        else:
            y, ry = label_bits.to(tl.float32), r_label_bits.to(tl.float32)
            _finish_policy(out, fields, rows, vocab, inverse_temperature, y, sums, raw, before_label, ENTROPY, EXTRAS)
            _finish_reference(out, fields, rows, inverse_temperature, ry, r_sums)
            _finish_divergences(out, fields, rows, inverse_temperature, y, ry, sums, r_sums)
    elif of_reference:
        lanes_of_r, _, _ = _accumulate_row(r_row, n, label, scale, head_mask, False, False, LANES, R_VEC, UNROLL)
        if not SPLIT:
            r_label_bits = tl.load(r_row + label)
        r_sums = _merge_reference((lanes_of_r[0], lanes_of_r[1], lanes_of_r[4]), scale)
        if SPLIT:
            _store_reference(to, r_sums)
        else:
            _finish_reference(out, fields, rows, inverse_temperature, r_label_bits.to(tl.float32), r_sums)
    else:
        lane_sums, lane_raw, lane_before = _accumulate_row(
            z_row, n, label, scale, head_mask, ENTROPY, EXTRAS, LANES, VEC, UNROLL
        )
        if not SPLIT:
            label_bits = tl.load(z_row + label)
        sums, raw, before_label = _merge_policy(lane_sums, lane_raw, lane_before, scale)
        if SPLIT:
            _store_policy(to, sums, raw, before_label)
        else:
            y = label_bits.to(tl.float32)
            _finish_policy(out, fields, rows, vocab, inverse_temperature, y, sums, raw, before_label, ENTROPY, EXTRAS)


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
    fields: tl.int32,
    splits: tl.int32,
    span: tl.int32,
    head_mask: tl.int32,
    REFERENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    out += row
    label64 = tl.load(labels + row)
    outside = (label64 < 0) | (label64 >= vocab)
    if (label64 == ignore_index) | outside:
        _fill(out, fields, tl.where(label64 == ignore_index, 0.0, float("nan")), rows)
        return
    inverse_temperature = joined(inverse_high, inverse_low)
    scale = (inverse_temperature * _LOG2E).to(tl.float32)
    piece = tl.arange(0, MAX_SPLITS)
    there = piece < splits
    at = partial + (row.to(tl.int64) * splits + piece) * _PARTIALS
    maximum = tl.load(at, mask=there, other=-_INF)
    exp = tl.load(at + 1, mask=there, other=0.0)
    exp_t = tl.load(at + 2, mask=there, other=0.0)
    exp_sq = tl.load(at + 3, mask=there, other=0.0)
    raw = tl.load(at + 4, mask=there, other=0.0)
    before_label = tl.load(at + 5, mask=there, other=-_INF)
    cross = tl.load(at + 6, mask=there, other=0.0)
    r_maximum = tl.load(at + _R_PARTIALS, mask=there, other=-_INF)
    r_exp = tl.load(at + _R_PARTIALS + 1, mask=there, other=0.0)
    r_cross = tl.load(at + _R_PARTIALS + 2, mask=there, other=0.0)
    label_bits = tl.load(row_of(logits, row, inner, outer_stride, inner_stride) + label64)
    if REFERENCE:
        r_label_bits = tl.load(row_of(reference, row, inner, r_outer_stride, r_inner_stride) + label64)
    sums, raw, before_label, r_sums = _merge_jointly(
        (maximum, exp, exp_t, exp_sq, cross), raw, before_label, (r_maximum, r_exp, r_cross), scale
    )
    y = label_bits.to(tl.float32)
    _finish_policy(out, fields, rows, vocab, inverse_temperature, y, sums, raw, before_label, ENTROPY, EXTRAS)
    if REFERENCE:
        ry = r_label_bits.to(tl.float32)
        _finish_reference(out, fields, rows, inverse_temperature, ry, r_sums)
        if REFERENCE == _JOINT:
            _finish_divergences(out, fields, rows, inverse_temperature, y, ry, sums, r_sums)


# --- host -------------------------------------------------------------------------------------------------------------


def sums_for(fields: int) -> dict[str, int | bool]:
    """What has to be accumulated for these fields: the compile-time part of a call, besides dtypes."""
    pair = bool(fields & DIVERGENCES)
    return {
        "REFERENCE": JOINT if pair else SEPARATE if fields & NEEDS_REFERENCE else NO_REFERENCE,
        "ENTROPY": bool(fields & BIT["entropy"]),
        "EXTRAS": bool(fields & (BIT["log_sum_sq_probs"] | BIT["mean_logits"] | BIT["is_top1"])),
    }


def row_stats(call: RowStats) -> Tensor:
    """Per-row results. See `qkernels.core.calls`."""
    logits, labels, reference, fields, temperature, ignore_index, _ = call
    common.check_labels(labels, logits.shape[-1], ignore_index)
    out = logits.new_empty((fields.bit_count(), *labels.shape), dtype=torch.float32)
    rows, vocab = labels.numel(), logits.shape[-1]
    if rows == 0:
        return out
    common.check_vocab(vocab)
    layout.dense(labels, torch.int64)
    layout.rows(logits)
    how = sums_for(fields)
    if reference is None or how["REFERENCE"] == NO_REFERENCE:
        reference, how["REFERENCE"] = logits, NO_REFERENCE
    vector, r_vector = common.vector_length(logits), common.vector_length(reference)
    aligned = True
    if how["REFERENCE"] == JOINT:
        vector = r_vector = max(vector, r_vector)
        aligned = common.same_alignment(logits, reference, vector)
    lanes = common.LANES
    splits, span = common.split_row(logits, rows)
    programs = 2 if how["REFERENCE"] == SEPARATE else 1  # one program per model
    partial = out if splits == 1 else out.new_empty((rows, splits, len(PARTIALS)))
    args = (
        logits, reference, labels, out, partial, logits.shape[1], vocab, *common.row_strides(logits),
        *common.row_strides(reference), ignore_index, *common.two_floats(1 / temperature), fields, splits,
        span, 0 if vocab < lanes * min(vector, r_vector) else -1,
    )  # fmt: skip
    with common.on_device_of(logits):
        row_stats_kernel[(rows * splits * programs,)](
            *args, **how, ALIGNED=aligned, SPLIT=splits > 1, LANES=lanes, VEC=vector,
            R_VEC=r_vector, UNROLL=UNROLL[how["REFERENCE"]], **common.OPTIONS,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(rows,)](*args, **how, MAX_SPLITS=common.MAX_SPLITS, **common.COMBINE)
    return out
