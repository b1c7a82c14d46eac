"""Row operations in pure torch: any device, any floating dtype, float64 included. Kernels are tested against them.

Arithmetic is in float32 (float64 for float64 logits). Three choices keep it exact, and every other backend repeats
them:

- The label's own term is left out of the sum of exponentials and added last. The sum over the *other* entries keeps
  its full relative precision that way, so `logps` and `1 - p_label` do too when the model is almost certain.
- Differences are taken before anything is added back: `(z_y - m) - log sum exp(z - m)`, never `z_y - (m + log s)`,
  which loses everything to a common offset of the logits. `logsumexp` is kept as its two halves for the same reason.
- 0 * log 0 = 0: entries with probability zero (logit -inf) contribute nothing to entropy and divergences.

Memory: a handful of tensors of the size of the logits; this is the clear version, not the small one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.calls import PairLoss, RowGrad, RowStats
from ..core.checks import label_error
from ..core.fields import BIT, NEEDS_REFERENCE, field_names, stats_dtype
from ..core.sequences import Sequences, log_ratios
from . import takes


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take such a tensor; None if it can."""
    return None if dtype.is_floating_point else f"logits must be floating point, got {dtype}"


class _Model:
    """Softmax quantities of one model's rows, `[S, T, V]` and `[S, T, 1]`."""

    def __init__(self, logits: Tensor, labels: Tensor, temperature: float):
        raw = logits.to(stats_dtype(logits.dtype))
        self.max = raw.amax(-1, keepdim=True)
        # A row of nothing but -inf has no softmax: NaN. Elsewhere m is finite and -inf entries give exp(-inf) = 0.
        self.shifted = (raw - self.max) / temperature  # z - m / temperature
        exp = self.shifted.exp()
        label_exp = exp.gather(-1, labels)
        others = exp.scatter(-1, labels, 0.0).sum(-1, keepdim=True)
        total = others + label_exp
        self.log_sum = torch.where(label_exp == 1, others.log1p(), total.log())
        self.logps = self.shifted.gather(-1, labels) - self.log_sum
        self.logsumexp = self.max / temperature + self.log_sum
        self.log_probs = self.shifted - self.log_sum
        self.probs = self.log_probs.exp()
        # Summed in units of 2^30: rows masked with the lowest number of the type have a finite sum as well.
        self.mean = (raw * 2.0**-30).mean(-1, keepdim=True) * (2.0**30 / temperature)
        at_max = raw == self.max
        earlier = torch.arange(raw.shape[-1], device=raw.device) < labels
        self.top1 = at_max.gather(-1, labels) & ~(at_max & earlier).any(-1, keepdim=True)


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """sum p * value, where p = 0 contributes nothing whatever the value is (NaN stays NaN)."""
    return torch.where(probs == 0, torch.zeros_like(probs), probs * values).sum(-1, keepdim=True)


def _kl(p: _Model, q: _Model) -> Tensor:
    """KL(p || q), never below 0: the rounding of a sum that should cancel can leave it at -1e-8."""
    return _expectation(p.probs, p.log_probs - q.log_probs).clamp_min(0.0)


def _safe_labels(labels: Tensor, vocab: int, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that can be gathered with, and where they were out of range (raises on the CPU)."""
    bad = ~ignored & ((labels < 0) | (labels >= vocab))
    if labels.device.type == "cpu" and bool(bad.any()):
        raise label_error(labels, int(bad.reshape(-1).nonzero()[0]), vocab)
    return labels.masked_fill(ignored | bad, 0).unsqueeze(-1), bad


@takes(RowStats)
@torch.no_grad()  # the results are constants, as every backend's are; autograd is in `qkernels.autograd`
def row_stats(call: RowStats) -> Tensor:
    """Per-row results. See `qkernels.core.calls`."""
    logits, labels, reference, fields, temperature, ignore_index, _ = call
    dtype = stats_dtype(logits.dtype)
    vocab = logits.shape[-1]
    ignored = labels == ignore_index
    safe, bad = _safe_labels(labels, vocab, ignored)
    policy = _Model(logits, safe, temperature)
    ref = None
    if reference is not None and fields & NEEDS_REFERENCE:
        ref = _Model(reference.to(torch.promote_types(dtype, reference.dtype)), safe, temperature)

    values: dict[str, Tensor] = {
        "row_max": policy.max,
        "log_sum": policy.log_sum,
        "logps": policy.logps,
        "logsumexp": policy.logsumexp,
    }
    if ref is not None:
        values |= {
            "reference_row_max": ref.max,
            "reference_log_sum": ref.log_sum,
            "reference_logps": ref.logps,
            "reference_logsumexp": ref.logsumexp,
        }
        if fields & BIT["kl_reference_policy"]:
            values["kl_reference_policy"] = _kl(ref, policy)
        if fields & BIT["kl_policy_reference"]:
            values["kl_policy_reference"] = _kl(policy, ref)
    if fields & BIT["entropy"]:
        values["entropy"] = -_expectation(policy.probs, policy.log_probs)
    if fields & BIT["log_sum_sq_probs"]:
        values["log_sum_sq_probs"] = policy.probs.square().sum(-1, keepdim=True).log()
    if fields & BIT["mean_logits"]:
        values["mean_logits"] = policy.mean
    if fields & BIT["is_top1"]:
        values["is_top1"] = policy.top1

    # A row of -inf, a NaN, a bad label: NaN in that row alone. An ignored row: 0.
    invalid = bad | policy.log_sum.squeeze(-1).isnan()
    out = torch.stack([values[name].squeeze(-1).to(dtype) for name in field_names(fields)])
    return out.masked_fill(invalid, float("nan")).masked_fill(ignored, 0.0)


@takes(RowGrad)
def row_grad(call: RowGrad) -> Tensor:
    """dL/dlogits as a new tensor. See `qkernels.core.calls`."""
    return _row_grad(call).to(call.logits.dtype)


@takes(RowGrad, after=1)
def row_grad_into(out: Tensor, call: RowGrad) -> None:
    """dL/dlogits into `out`, whose dtype may be narrower. See `qkernels.backends`."""
    out.copy_(_row_grad(call))


@takes(RowGrad)
def row_grad_(call: RowGrad) -> None:
    """dL/dlogits over the logits themselves. See `qkernels.core.calls`."""
    call.logits.copy_(_row_grad(call))


def _row_grad(call: RowGrad) -> Tensor:
    """The gradient, not yet rounded to the dtype of the logits."""
    logits, labels, reference, softmax, reference_softmax, coefficients, upstream, temperature, ignore_index, _ = call
    dtype = stats_dtype(logits.dtype)
    if upstream is not None:
        coefficients = coefficients * upstream
    ignored = (labels == ignore_index) | (coefficients == 0).all(0)
    bad = ~ignored & ((labels < 0) | (labels >= logits.shape[-1]))
    safe = labels.masked_fill(ignored | bad, 0).unsqueeze(-1)
    coefs = coefficients.to(dtype).unsqueeze(-1)
    row_max, log_sum, logps = softmax[:3].to(dtype).unsqueeze(-1)
    log_p = (logits.to(dtype) - row_max) / temperature - log_sum
    p = log_p.exp()
    label = coefs[0]
    if coefs.shape[0] == 1:
        others = torch.zeros_like(p)
    else:
        _, p_plain, p_logp, p_logq, q_plain = coefs
        slope = p_plain.expand_as(p)
        slope = slope + torch.where(p_logp == 0, 0.0, p_logp * log_p)
        if reference is not None and reference_softmax is not None:
            reference_max, reference_log_sum = reference_softmax.to(dtype).unsqueeze(-1)[:2]
            log_q = (reference.to(dtype) - reference_max) / temperature - reference_log_sum
            slope = slope - torch.where(p_logq == 0, 0.0, p_logq * log_q)
            others = torch.where(p == 0, torch.zeros_like(p), p * slope) - q_plain * log_q.exp()
        else:
            others = torch.where(p == 0, torch.zeros_like(p), p * slope)
    # 1 - p_y from the log-prob keeps its digits when p_y -> 1.
    at_label = others.gather(-1, safe) - label * torch.expm1(logps)
    grad = (others - label * p).scatter(-1, safe, at_label) / temperature
    return grad.masked_fill(bad.unsqueeze(-1), float("nan")).masked_fill(ignored.unsqueeze(-1), 0.0)


@takes(PairLoss)
def pair_loss(call: PairLoss) -> tuple[Tensor, ...]:
    """The default objective in one step. See `qkernels.core.calls`."""
    logps, reference_logps, labels, weights, cu_seqlens, beta, label_smoothing, ignore_index, _ = call
    dtype = logps.dtype
    sequences = Sequences.of(logps, cu_seqlens)
    if weights is None:
        weights = (labels != ignore_index).to(dtype)
    counts = weights != 0
    per_sequence = reference_logps is not None and reference_logps.dim() == 1
    if reference_logps is None:
        reference_logps = torch.zeros_like(logps)
    values = logps if per_sequence else log_ratios(logps, reference_logps)
    values = torch.where(counts, values, 0.0)
    sums = sequences.sums(values * weights, keep_double=True)
    if per_sequence:
        sums = log_ratios(sums, reference_logps.double())
        tokens = logps.new_empty((0, *logps.shape))
    else:
        tokens = torch.stack([beta * values, torch.where(counts, reference_logps, 0.0)])
    chosen, rejected = sums.chunk(2)
    logits = beta * (chosen - rejected)
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
    slope = -beta * ((1 - label_smoothing) * torch.sigmoid(-logits) - label_smoothing * torch.sigmoid(logits))
    per_sequence_grad = torch.cat([slope, -slope]) / chosen.numel()
    grad = torch.where(counts, sequences.to_tokens(per_sequence_grad.to(dtype)) * weights, 0.0)
    return losses.mean().to(dtype), (beta * sums).to(dtype), grad, tokens
