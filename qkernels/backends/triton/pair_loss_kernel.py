"""`pair_loss`: DPO with label smoothing from per-row log-probs, in one launch: loss, rewards and dloss/dlogps.

Maths, per pair with r the weighted sum over a sequence of log pi - log pi_ref (0 where both are -inf), x = beta (r_w -
r_l) and eps the label smoothing:

    loss  = -(1 - eps) log sigma(x) - eps log sigma(-x), averaged over pairs
    slope = dloss/dr_w = -beta ((1 - eps) sigma(-x) - eps sigma(x)) / pairs = -dloss/dr_l

Programs. One per pair writes its rewards and gradients. Program 0 sums all pairs a second time, several at once, for
the mean of the losses: a second read of a few bytes per token by one program takes the place of atomics, of a second
launch and of a counter that someone would have to reset.

Memory traffic. 12 bytes per token are read (8 with a reference per sequence), twice, and 4 written. Log-probs of rows
of weight 0 are not read, and may be NaN.

Aliasing. None.

Numerics. All in fp64, summed in a fixed order, rounded once at the end. Only cu_seqlens says where sequences begin; no
value is read by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import _INF, joined, log1p

BLOCK = 1024  # tokens of a sequence at once
PAIRS, TOKENS = 8, 128  # pairs and tokens of each at once, where the loss is summed


@triton.jit
def _log_ratio(logp, reference):
    """log pi - log pi_ref; 0 where both are -inf: a token that both models forbid tells nothing about the reward."""
    return tl.where((logp == -_INF) & (reference == -_INF), 0.0, logp - reference)


@triton.jit
def _terms(logps, reference, weights, at, there, PER_SEQUENCE: tl.constexpr):
    """Weighted log-ratios of some tokens in fp64; weighted log-probs where the reference comes per sequence."""
    w = tl.load(weights + at, mask=there, other=0.0).to(tl.float64)
    counts = w != 0
    value = tl.load(logps + at, mask=counts, other=0.0).to(tl.float64)
    if not PER_SEQUENCE:
        value = _log_ratio(value, tl.load(reference + at, mask=counts, other=0.0).to(tl.float64))
    return tl.where(counts, w * value, 0.0)


@triton.jit
def _begin(offsets, sequence, length, there, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(offsets + sequence, mask=there, other=0).to(tl.int64)
    return sequence.to(tl.int64) * length


@triton.jit
def _sequence_sum(logps, reference, weights, begin, end, sequence, PER_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr):
    """Log-ratio of one sequence."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + offset
        total += _terms(logps, reference, weights, at, at < end, PER_SEQUENCE)
    total = tl.sum(total, 0)
    if PER_SEQUENCE:
        total = _log_ratio(total, tl.load(reference + sequence).to(tl.float64))
    return total


@triton.jit
def _sequence_sums(
    logps, reference, weights, offsets, sequence, there, length,
    PER_SEQUENCE: tl.constexpr, PACKED: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Log-ratios of PAIRS sequences."""
    begin = _begin(offsets, sequence, length, there, PACKED)
    end = tl.where(there, _begin(offsets, sequence + 1, length, there, PACKED), begin)
    offset = tl.arange(0, TOKENS)[None, :]
    total = tl.zeros([PAIRS, TOKENS], tl.float64)
    for start in range(0, tl.max(end - begin, 0), TOKENS):
        at = begin[:, None] + (start + offset)
        total += _terms(logps, reference, weights, at, at < end[:, None], PER_SEQUENCE)
    total = tl.sum(total, 1)
    if PER_SEQUENCE:
        total = _log_ratio(total, tl.load(reference + sequence, mask=there, other=0.0).to(tl.float64))
    return total


@triton.jit
def _negative_log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return log1p(e) - tl.minimum(x, 0.0)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


_RUNTIME = (
    "logps", "reference", "weights", "offsets", "loss", "rewards", "grad", "pairs", "length", "beta_high", "beta_low",
    "smoothing_high", "smoothing_low",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def pair_loss_kernel(
    logps,  # (S, T)
    reference,  # (S, T), or (2 * pairs) if PER_SEQUENCE
    weights,  # (S, T)
    offsets,  # (2 * pairs + 1) if PACKED
    loss,  # ()
    rewards,  # (2 * pairs)
    grad,  # (S, T)
    pairs: tl.int32,
    length: tl.int32,  # T
    beta_high: tl.float32,
    beta_low: tl.float32,
    smoothing_high: tl.float32,
    smoothing_low: tl.float32,
    PER_SEQUENCE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    beta = joined(beta_high, beta_low)
    flip = joined(smoothing_high, smoothing_low)
    if tl.program_id(0) == 0:
        total = tl.zeros([PAIRS], tl.float64)
        for first in range(0, pairs, PAIRS):
            pair = first + tl.arange(0, PAIRS)
            there = pair < pairs
            chosen = _sequence_sums(
                logps, reference, weights, offsets, pair, there, length, PER_SEQUENCE, PACKED, PAIRS, TOKENS
            )
            rejected = _sequence_sums(
                logps, reference, weights, offsets, pair + pairs, there, length, PER_SEQUENCE, PACKED, PAIRS, TOKENS
            )
            x = beta * (chosen - rejected)
            value = (1 - flip) * _negative_log_sigmoid(x)
            value += tl.where(flip == 0, 0.0, flip * _negative_log_sigmoid(-x))
            total += tl.where(there, value, 0.0)
        tl.store(loss, (tl.sum(total, 0) / pairs).to(tl.float32))
        return
    pair = tl.program_id(0) - 1
    begin = _begin(offsets, pair, length, True, PACKED)
    end = _begin(offsets, pair + 1, length, True, PACKED)
    r_begin = _begin(offsets, pair + pairs, length, True, PACKED)
    r_end = _begin(offsets, pair + pairs + 1, length, True, PACKED)
    chosen = _sequence_sum(logps, reference, weights, begin, end, pair, PER_SEQUENCE, BLOCK)
    rejected = _sequence_sum(logps, reference, weights, r_begin, r_end, pair + pairs, PER_SEQUENCE, BLOCK)
    tl.store(rewards + pair, (beta * chosen).to(tl.float32))
    tl.store(rewards + pair + pairs, (beta * rejected).to(tl.float32))
    x = beta * (chosen - rejected)
    slope = -beta * ((1 - flip) * _sigmoid(-x) - flip * _sigmoid(x)) / pairs
    _store_grad(grad, weights, begin, end, slope, BLOCK)
    _store_grad(grad, weights, r_begin, r_end, -slope, BLOCK)


@triton.jit
def _store_grad(grad, weights, begin, end, slope, BLOCK: tl.constexpr):
    """dloss/dlogps of a sequence's tokens."""
    offset = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + offset
        w = tl.load(weights + at, mask=at < end, other=0.0).to(tl.float64)
        tl.store(grad + at, tl.where(w == 0, 0.0, slope * w).to(tl.float32), mask=at < end)


# --- host -------------------------------------------------------------------------------------------------------------


def pair_loss(
    logps: Tensor,
    reference_logps: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The default objective in one step. See `qkernels.ops.pair_loss`."""
    logps, reference_logps, weights = logps.contiguous(), reference_logps.contiguous(), weights.contiguous()
    offsets = logps if cu_seqlens is None else cu_seqlens.contiguous()
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    loss, rewards, grad = logps.new_empty(()), logps.new_empty(sequences), torch.empty_like(logps)
    with common.on_device_of(logps):
        pair_loss_kernel[(sequences // 2 + 1,)](
            logps, reference_logps, weights, offsets, loss, rewards, grad, sequences // 2, logps.shape[1],
            *common.two_floats(beta), *common.two_floats(label_smoothing), PER_SEQUENCE=reference_logps.dim() == 1,
            PACKED=cu_seqlens is not None, BLOCK=BLOCK, PAIRS=PAIRS, TOKENS=TOKENS, **common.OPTIONS,
        )  # fmt: skip
    return loss, rewards, grad
