"""`pair_loss`: DPO with label smoothing from per-row log-probs, in one launch: loss, rewards, dloss/dlogps, tokens.

Maths, per pair with r the weighted sum over a sequence of log pi - log pi_ref (0 where both are -inf), x = beta (r_w -
r_l) and eps the label smoothing:

    loss  = -(1 - eps) log sigma(x) - eps log sigma(-x), averaged over pairs
    slope = dloss/dr_w = -beta ((1 - eps) sigma(-x) - eps sigma(x)) / pairs = -dloss/dr_l

Programs. One per pair writes its rewards, gradients and tokens. Program 0 sums all pairs a second time, several at
once, for the mean of the losses: a second read of a few bytes per token by one program replaces atomics, a second
launch, or a counter that has to be reset.

Memory traffic. Per token the weight (4 bytes; the label's 8 where there are no weights) and the log-probs of both
models are read, twice by the pair's program and once by program 0, and 12 bytes written. Log-probs of rows of weight 0
are not read, and may be NaN.

Aliasing. None.

Numerics. All but the tokens in fp64, summed in a fixed order, rounded once at the end. Only cu_seqlens says where
sequences begin; no value is read by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import layout
from ...core.calls import PairLoss
from . import common
from .common import _INF, joined, log1p

BLOCK = 1024  # tokens of a sequence at once
PAIRS, TOKENS = 8, 128  # pairs and tokens of each at once, where the loss is summed
OPTIONS = {**common.OPTIONS, "num_warps": 8}  # with 4, some forms of it spill: addresses and fp64 sums take registers


@triton.jit
def _log_ratio(logp, reference):
    """log pi - log pi_ref; 0 where both are -inf: a token that both models mask says nothing about the reward."""
    return tl.where((logp == -_INF) & (reference == -_INF), 0.0, logp - reference)


@triton.jit
def _weights(weights, labels, ignore_index, at, there, WEIGHTED: tl.constexpr):
    """The weights of some tokens, in fp64."""
    if WEIGHTED:
        return tl.load(weights + at, mask=there, other=0.0).to(tl.float64)
    return (there & (tl.load(labels + at, mask=there, other=0) != ignore_index)).to(tl.float64)


@triton.jit
def _values(logps, reference, at, has_weight, REFERENCE: tl.constexpr):
    """Their log-ratios in fp64, 0 where the weight is 0; log-probs where the reference is given per sequence."""
    value = tl.load(logps + at, mask=has_weight, other=0.0).to(tl.float64)
    if REFERENCE == 1:
        value = _log_ratio(value, tl.load(reference + at, mask=has_weight, other=0.0).to(tl.float64))
    return value


@triton.jit
def _begin(offsets, sequence, length, there, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(offsets + sequence, mask=there, other=0).to(tl.int64)
    return sequence.to(tl.int64) * length


@triton.jit
def _sequence_sum(
    logps, reference, labels, weights, ignore_index, begin, end, sequence,
    REFERENCE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-ratio of one sequence."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + offset
        w = _weights(weights, labels, ignore_index, at, at < end, WEIGHTED)
        total += w * _values(logps, reference, at, w != 0, REFERENCE)
    total = tl.sum(total, 0)
    if REFERENCE == 2:
        total = _log_ratio(total, tl.load(reference + sequence).to(tl.float64))
    return total


@triton.jit
def _sequence_sums(
    logps, reference, labels, weights, ignore_index, offsets, sequence, there, length,
    REFERENCE: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Log-ratios of PAIRS sequences."""
    begin = _begin(offsets, sequence, length, there, PACKED)
    end = tl.where(there, _begin(offsets, sequence + 1, length, there, PACKED), begin)
    offset = tl.arange(0, TOKENS)[None, :]
    total = tl.zeros([PAIRS, TOKENS], tl.float64)
    for start in range(0, tl.max(end - begin, 0), TOKENS):
        at = begin[:, None] + (start + offset)
        w = _weights(weights, labels, ignore_index, at, at < end[:, None], WEIGHTED)
        total += w * _values(logps, reference, at, w != 0, REFERENCE)
    total = tl.sum(total, 1)
    if REFERENCE == 2:
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
    "logps", "reference", "labels", "weights", "ignore_index", "offsets", "loss", "rewards", "grad", "tokens", "pairs",
    "length", "rows", "beta_high", "beta_low", "smoothing_high", "smoothing_low",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def pair_loss_kernel(
    logps,  # (S, T)
    reference,  # (S, T) if REFERENCE is 1, (2 * pairs) if it is 2, anything if it is 0
    labels,  # (S, T) int64, or anything if WEIGHTED
    weights,  # (S, T) if WEIGHTED, anything otherwise
    ignore_index: tl.int64,
    offsets,  # (2 * pairs + 1) if PACKED
    loss,  # ()
    rewards,  # (2 * pairs)
    grad,  # (S, T)
    tokens,  # (2, S, T): token rewards, reference; anything if REFERENCE is 2
    pairs: tl.int32,
    length: tl.int32,  # T
    rows: tl.int64,  # S * T
    beta_high: tl.float32,
    beta_low: tl.float32,
    smoothing_high: tl.float32,
    smoothing_low: tl.float32,
    REFERENCE: tl.constexpr,  # 0: none, 1: per token, 2: per sequence
    WEIGHTED: tl.constexpr,
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
                logps, reference, labels, weights, ignore_index, offsets, pair, there, length,
                REFERENCE, WEIGHTED, PACKED, PAIRS, TOKENS,
            )  # fmt: skip
            rejected = _sequence_sums(
                logps, reference, labels, weights, ignore_index, offsets, pair + pairs, there, length,
                REFERENCE, WEIGHTED, PACKED, PAIRS, TOKENS,
            )  # fmt: skip
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
    chosen = _sequence_sum(
        logps, reference, labels, weights, ignore_index, begin, end, pair, REFERENCE, WEIGHTED, BLOCK
    )
    rejected = _sequence_sum(
        logps, reference, labels, weights, ignore_index, r_begin, r_end, pair + pairs, REFERENCE, WEIGHTED, BLOCK
    )
    tl.store(rewards + pair, (beta * chosen).to(tl.float32))
    tl.store(rewards + pair + pairs, (beta * rejected).to(tl.float32))
    x = beta * (chosen - rejected)
    slope = -beta * ((1 - flip) * _sigmoid(-x) - flip * _sigmoid(x)) / pairs
    _store_rows(
        logps, reference, labels, weights, ignore_index, grad, tokens, rows, begin, end, slope, beta_high,
        REFERENCE, WEIGHTED, BLOCK,
    )  # fmt: skip
    _store_rows(
        logps, reference, labels, weights, ignore_index, grad, tokens, rows, r_begin, r_end, -slope, beta_high,
        REFERENCE, WEIGHTED, BLOCK,
    )  # fmt: skip


@triton.jit
def _store_rows(
    logps, reference, labels, weights, ignore_index, grad, tokens, rows, begin, end, slope, beta,
    REFERENCE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/dlogps of a sequence's tokens, their rewards, and the reference's log-probs."""
    offset = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + offset
        w = _weights(weights, labels, ignore_index, at, at < end, WEIGHTED)
        has_weight = w != 0
        tl.store(grad + at, tl.where(has_weight, slope * w, 0.0).to(tl.float32), mask=at < end)
        if REFERENCE != 2:
            # In fp32, as torch would: whatever computes a token's reward, it has the same bits.
            reward = beta * _values(logps, reference, at, has_weight, REFERENCE).to(tl.float32)
            tl.store(tokens + at, reward, mask=at < end)
            of_reference = tl.zeros([BLOCK], tl.float32)
            if REFERENCE == 1:
                of_reference = tl.load(reference + at, mask=has_weight, other=0.0)
            tl.store(tokens + rows + at, of_reference, mask=at < end)


# --- host -------------------------------------------------------------------------------------------------------------


def pair_loss(call: PairLoss) -> tuple[Tensor, ...]:
    """The default objective in one step. See `qkernels.core.calls`."""
    logps, reference_logps, labels, weights, cu_seqlens, beta, label_smoothing, ignore_index, _ = call
    layout.dense(labels, torch.int64)
    loss, rewards, grad, tokens = call.outputs()
    logps = logps.contiguous()
    reference = logps if reference_logps is None else reference_logps.contiguous()
    offsets = logps if cu_seqlens is None else cu_seqlens.contiguous()
    pairs = rewards.shape[0] // 2
    with common.on_device_of(logps):
        pair_loss_kernel[(pairs + 1,)](
            logps, reference, labels, labels if weights is None else weights.contiguous(), ignore_index, offsets,
            loss, rewards, grad, tokens, pairs, logps.shape[1], logps.numel(),
            *common.two_floats(beta), *common.two_floats(label_smoothing),
            REFERENCE=0 if reference_logps is None else 2 if reference_logps.dim() == 1 else 1,
            WEIGHTED=weights is not None, PACKED=cu_seqlens is not None, BLOCK=BLOCK, PAIRS=PAIRS, TOKENS=TOKENS,
            **OPTIONS,
        )  # fmt: skip
    return loss, rewards, grad, tokens
