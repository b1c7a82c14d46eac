"""Reference values for the tests of every backend: each formula written out in float64, sharing no code with qkernels.

Rows are treated with torch's own `log_softmax`, `gather` and autograd; sequences are plain Python lists of row numbers,
so that dense and packed batches become the same thing before a formula is applied. Where the literature has a formula
in terms of likelihood ratios, it is written that way here and not in the form the package uses.

Notation: z = logits / temperature, p = softmax(z), q = softmax(reference / temperature), y = label.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Every per-row result, in the order of `TokenStats`, with its error bound: error <= bound * max(1, |truth|). eps32 is
# 6e-8, half an ulp of fp32 relative to the number. fp32 and 16-bit logits have the same bounds: 16-bit logits are exact
# inputs and everything after the load is fp32.
#
# logps, reference_logps   2e-6. The design's number. x = z_y - m carries one rounding of the subtraction and one of the
#                          temperature quotient (2 eps32 |x|), the rest is log(sum) and the drift of a blocked sum.
# logsumexp                5e-7. The same log(sum) plus m, which is exact: two roundings and nothing that cancels.
# entropy, both KLs        1e-6. sum p_j x_j: each p_j carries the rounding of its exponent, |x_j| eps32, so terms err
#                          by p_j |x_j|^2 eps32, and the sum of these stays near (log V)^2 eps32 with signs that
#                          average out. A KL is a mean of differences log p - log q, so its error follows
#                          E(|log p| + |log q|) and not itself: that is `size` (never below 1).
# log_sum_sq_probs         2e-6. 2 |x| eps32 in the exponents, and twice log(sum).
# mean_logits              3e-7 of the mean size of the entries (`size`), which may cancel in the mean.
# is_top1                  exact.
ROW_BOUNDS = {
    "logps": 2e-6,
    "logsumexp": 5e-7,
    "entropy": 1e-6,
    "kl_reference_policy": 1e-6,
    "kl_policy_reference": 1e-6,
    "log_sum_sq_probs": 2e-6,
    "mean_logits": 3e-7,
    "is_top1": 0.0,
    "reference_logps": 2e-6,
    "reference_logsumexp": 5e-7,
}
STATS = tuple(ROW_BOUNDS)
WITH_REFERENCE = ("kl_reference_policy", "kl_policy_reference", "reference_logps", "reference_logsumexp")
WITH_GRADIENT = ("logps", "logsumexp", "entropy", "kl_reference_policy", "kl_policy_reference")


def exact(logits: Tensor) -> Tensor:
    """16-bit and fp32 logits as float64: their values are exact inputs. On the CPU, a leaf of its own."""
    return logits.detach().cpu().double().clone()


def _on_one_thread(function):
    """Run without torch's threads: `conftest.py` says why."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


# --- rows -----------------------------------------------------------------------------------------------------------


@_on_one_thread
def token_stats(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Every per-token number in float64, differentiable in float64 `logits`; 0 at ignored rows."""
    assert logits.dtype == torch.float64
    keep = labels != ignore_index
    # Ignored rows may hold anything, NaN too; nothing of them may enter.
    z = torch.where(keep.unsqueeze(-1), logits, torch.zeros_like(logits)) / temperature
    y = torch.where(keep, labels, torch.zeros_like(labels)).unsqueeze(-1)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    out = {
        "logps": log_p.gather(-1, y).squeeze(-1),
        "logsumexp": z.logsumexp(-1),
        "entropy": -(p * _finite_where(p, log_p)).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": (z.argmax(-1) == y.squeeze(-1)).double(),
    }
    if reference is not None:
        z_ref = torch.where(keep.unsqueeze(-1), reference, torch.zeros_like(reference)) / temperature
        log_q = z_ref.log_softmax(-1)
        q = log_q.exp()
        out["kl_reference_policy"] = (q * (_finite_where(q, log_q) - _finite_where(q, log_p))).sum(-1)
        out["kl_policy_reference"] = (p * (_finite_where(p, log_p) - _finite_where(p, log_q))).sum(-1)
        out["reference_logps"] = log_q.gather(-1, y).squeeze(-1)
        out["reference_logsumexp"] = z_ref.logsumexp(-1)
    return {name: torch.where(keep, value, torch.zeros_like(value)) for name, value in out.items()}


def _finite_where(probabilities: Tensor, values: Tensor) -> Tensor:
    """`values`, and 0 where the probability is 0: 0 log 0 = 0."""
    return values.masked_fill(probabilities == 0, 0.0)


@_on_one_thread
def gradient(
    logits: Tensor,
    labels: Tensor,
    upstream: dict[str, Tensor],
    reference: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """d(sum of upstream * output)/dlogits by float64 autograd."""
    leaf = exact(logits).requires_grad_()
    ref = None if reference is None else exact(reference)
    stats = token_stats(leaf, labels.cpu(), ref, temperature=temperature, ignore_index=ignore_index)
    total = sum((stats[name] * weight.cpu().double()).sum() for name, weight in upstream.items())
    (grad,) = torch.autograd.grad(total, leaf)
    return grad


class Terms(NamedTuple):
    """What the entries of a gradient are made of, for judging their errors.

    size: the sum of the absolute values of the terms whose signed sum is the entry. Where they cancel (p_j - q_j for
        equal models), a result in fp32 keeps the rounding of its terms, so an error has to be compared with this.
    unsure: what cannot be judged: the part of `size` that belongs to probabilities below the smallest normal fp32
        number (and one step between such numbers), and at the label the rounding of 1 - p in float64 autograd itself.
    """

    size: Tensor
    unsure: Tensor


# Twice the smallest normal fp32 number: room for the rounding of an exponent.
DENORMAL = 2.0**-125
STEP = 2.0**-149  # between denormal fp32 numbers


@_on_one_thread
def gradient_terms(
    logits: Tensor,
    labels: Tensor,
    upstream: dict[str, Tensor],
    reference: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Terms:
    """The terms of the gradient of these outputs with these upstream gradients, from the closed formulas."""
    z = exact(logits) / temperature
    keep = (labels != ignore_index).cpu().unsqueeze(-1)
    y = labels.cpu().masked_fill(~keep.squeeze(-1), 0).unsqueeze(-1)
    log_p = torch.where(keep, z, torch.zeros_like(z)).log_softmax(-1)
    p = log_p.exp()
    size_p = _finite_where(p, log_p).abs()
    weights = {name: weight.cpu().double().abs().unsqueeze(-1) for name, weight in upstream.items()}
    of_label = q = of_q = torch.zeros_like(p)  # terms: of_label + p * of_p + q * of_q
    of_p = torch.zeros_like(p)
    if "logps" in weights:
        # At the label 1 - p is one number (formed without cancellation), elsewhere there is only p.
        at_label = torch.zeros_like(p).scatter(-1, y, 1.0)
        of_label = at_label * weights["logps"] * (1 - p).abs()
        of_p = of_p + (1 - at_label) * weights["logps"]
    if "logsumexp" in weights:
        of_p = of_p + weights["logsumexp"]
    if "entropy" in weights:
        entropy = (p * size_p).sum(-1, keepdim=True)
        of_p = of_p + weights["entropy"] * (size_p + entropy)
    if reference is not None:
        z_ref = exact(reference) / temperature
        log_q = torch.where(keep, z_ref, torch.zeros_like(z_ref)).log_softmax(-1)
        q = log_q.exp()
        size_q = _finite_where(p, log_q).abs()
        if "kl_reference_policy" in weights:
            of_p = of_p + weights["kl_reference_policy"]
            of_q = weights["kl_reference_policy"]
        if "kl_policy_reference" in weights:
            divergence = (p * (size_p + size_q)).sum(-1, keepdim=True)
            of_p = of_p + weights["kl_policy_reference"] * (size_p + size_q + divergence)
    size = of_label + p * of_p + q * of_q
    unsure = torch.where(p < DENORMAL, (p + STEP) * of_p, 0.0) + torch.where(q < DENORMAL, (q + STEP) * of_q, 0.0)
    if "logps" in weights:
        unsure = unsure + at_label * weights["logps"] * 2.0**-51
    return Terms(*(torch.where(keep, part, 0.0) / temperature for part in (size, unsure)))


# --- the head -------------------------------------------------------------------------------------------------------


@_on_one_thread
def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """Logits of float64 hidden states `[..., H]`, differentiable: the linear layer, Cohere's scale, Gemma's cap."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class HeadGradient(NamedTuple):
    """dL/dhidden, dL/dweight and dL/dbias (None without one), and the size of the terms that each entry sums."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    sizes: dict[str, Tensor]


@_on_one_thread
def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    size: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> HeadGradient:
    """Carry dL/dlogits `[..., V]` through the head by float64 autograd.

    hidden, weight, bias: float64.
    grad: dL/dlogits.
    size: of the terms of `grad` (`Terms.size`).
    """
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    head_logits(leaves[0], leaves[1], *leaves[2:], softcap=softcap, logit_scale=logit_scale).backward(grad)
    linear = torch.nn.functional.linear(hidden, weight, bias)
    slope = logit_scale * (1.0 if softcap is None else torch.cosh(logit_scale * linear / softcap) ** -2)
    terms = (slope * torch.maximum(size, grad.abs())).flatten(0, -2)
    sizes = {
        "hidden": (terms @ weight.abs()).view_as(hidden),
        "weight": terms.T @ hidden.abs().flatten(0, -2),
        "bias": terms.sum(0),
    }
    return HeadGradient(leaves[0].grad, leaves[1].grad, leaves[2].grad if bias is not None else None, sizes)


# --- sequences ------------------------------------------------------------------------------------------------------


def spans(labels: Tensor, cu_seqlens: Tensor | None) -> list[list[int]]:
    """The flat row numbers of each sequence."""
    if cu_seqlens is None:
        count, length = labels.shape
        return [list(range(i * length, (i + 1) * length)) for i in range(count)]
    ends = cu_seqlens.tolist()
    return [list(range(start, end)) for start, end in itertools.pairwise(ends)]


@dataclass
class Pair:
    """Sums over one pair's valid tokens; w is chosen, l rejected."""

    r_w: Tensor
    r_l: Tensor
    logp_w: Tensor
    logp_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    n_w: float
    n_l: float
    kl_w: Tensor | None = None
    kl_l: Tensor | None = None
    importance: float = 1.0  # WPO
    full_logp_w: Tensor | None = None  # before LD-DPO


def pairs(
    stats: dict[str, Tensor],
    labels: Tensor,
    *,
    reference_logps: Tensor | float | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    ignore_index: int = -100,
) -> list[Pair]:
    """Group float64 per-token stats into pairs, sequence by sequence.

    reference_logps: None takes the stats' own (live reference); else 0.0, per token, or per sequence `[2B]`.
    """
    flat = {name: value.reshape(-1) for name, value in stats.items()}
    ids = labels.cpu().reshape(-1).tolist()
    factors = [1.0] * len(ids) if token_weights is None else token_weights.cpu().double().reshape(-1).tolist()
    rows = [[t for t in span if ids[t] != ignore_index and factors[t] != 0] for span in spans(labels, cu_seqlens)]
    half = len(rows) // 2
    per_sequence = None
    if reference_logps is None:
        reference = flat["reference_logps"]
    elif not isinstance(reference_logps, Tensor):
        reference = torch.zeros(len(ids), dtype=torch.float64)
    elif reference_logps.shape == labels.shape:
        reference = reference_logps.cpu().double().reshape(-1)
    else:
        reference, per_sequence = None, reference_logps.cpu().double()

    def total(values: Tensor, span: list[int], weights: list[float]) -> Tensor:
        result = torch.zeros((), dtype=torch.float64)
        for t, w in zip(span, weights, strict=True):
            result = result + w * values[t]
        return result

    out = []
    for i in range(half):
        sides = []
        shared = min(len(rows[i]), len(rows[half + i]))
        for s in (i, half + i):
            base = [factors[t] for t in rows[s]]
            weights = [w * (ld_alpha if ld_alpha is not None and k >= shared else 1.0) for k, w in enumerate(base)]
            logp = total(flat["logps"], rows[s], weights)
            ref = per_sequence[s] if per_sequence is not None else total(reference, rows[s], weights)
            kl = total(flat["kl_reference_policy"], rows[s], weights) if "kl_reference_policy" in flat else None
            aligned = total((flat["logps"] - flat["log_sum_sq_probs"]).detach(), rows[s], base)
            n = sum(base)
            sides.append((logp - ref, logp, ref, n, kl, math.exp(float(aligned) / n) if n else 1.0))
        (r_w, lp_w, ref_w, n_w, kl_w, u_w), (r_l, lp_l, ref_l, n_l, kl_l, u_l) = sides
        full = total(flat["logps"], rows[i], [factors[t] for t in rows[i]])
        out.append(Pair(r_w, r_l, lp_w, lp_l, ref_w, ref_l, n_w, n_l, kl_w, kl_l, u_w * u_l, full))
    return out


# --- objectives -----------------------------------------------------------------------------------------------------


def _nls(x: Tensor) -> Tensor:
    """-log sigma(x)."""
    return torch.nn.functional.softplus(-x)


def link(r: Tensor, f_divergence: str = "reverse_kl", a: float = 0.5) -> Tensor:
    """f'(u) of the f-divergence at the likelihood ratio u = e^r, up to the constants that cancel in a difference."""
    if f_divergence == "reverse_kl":
        return r  # log u
    u = torch.exp(r)
    if f_divergence == "forward_kl":
        return 1 - 1 / u
    if f_divergence in ("js", "js_divergence"):
        return torch.log(2 * u / (1 + u))
    if f_divergence in ("alpha", "alpha_divergence"):
        return (u ** (a - 1) - 1) / (a - 1)
    raise AssertionError(f_divergence)


@dataclass
class Options:
    """What an objective reads besides the pair."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    alpha: float = 0.5
    gamma: float = 0.5
    power: float | None = None  # AlphaPO's alpha; None for the objective's default
    length_normalised: bool = True
    form: str = "sigmoid"
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    extra: dict = field(default_factory=dict)


def _mean(total: Tensor, count: float) -> Tensor:
    return total / count if count else total * 0


def objective(name: str, batch: list[Pair], o: Options) -> Tensor:
    """The losses of all pairs, `[B]`, by the name TRL gives the objective."""
    eps, beta = o.label_smoothing, o.beta

    def score(r: Tensor) -> Tensor:
        return link(r, o.f_divergence, o.f_alpha_divergence_coef)

    def margin(pair: Pair) -> Tensor:
        return score(pair.r_w) - score(pair.r_l)

    if name == "aot":
        policy = torch.stack([pair.logp_w - pair.logp_l for pair in batch]).sort().values
        reference = torch.stack([pair.ref_w - pair.ref_l for pair in batch]).sort().values
        d = policy - reference
        return (1 - eps) * _nls(beta * d) + eps * _nls(-beta * d)
    if name == "aot_unpaired":
        chosen = torch.stack([pair.r_w for pair in batch]).sort().values
        rejected = torch.stack([pair.r_l for pair in batch]).sort().values
        d = chosen - rejected
        return (1 - eps) * _nls(beta * d) + eps * _nls(-beta * d)
    if name == "sft":
        tokens = sum(pair.n_w for pair in batch)
        # Per pair so that the mean over pairs is the mean over the batch's chosen tokens.
        return torch.stack([-pair.full_logp_w * len(batch) / (tokens or 1.0) for pair in batch])

    if name == "rspo":
        t = [beta * margin(pair) for pair in batch]
        return torch.stack([sum(_nls(a + b) for b in t) / len(t) for a in t])

    def nll(pair: Pair) -> Tensor:
        return -pair.full_logp_w * len(batch) / (sum(other.n_w for other in batch) or 1.0)

    def log_odds(logp: Tensor) -> Tensor:
        """log p/(1 - p); an answer without tokens has p = 1 - 1e-30."""
        return logp - torch.log(1 - torch.exp(logp)) if logp != 0 else logp * 0 - math.log(1e-30)

    def alpha_reward(logp: Tensor) -> Tensor:
        a = {"alphapo": 0.25}.get(name, 0.0) if o.power is None else o.power
        return (1 - torch.exp(-a * logp)) / a if a else logp

    def one(pair: Pair) -> Tensor:
        x = beta * margin(pair)
        mean_w, mean_l = _mean(pair.logp_w, pair.n_w), _mean(pair.logp_l, pair.n_l)
        if name == "orpo":
            return nll(pair) + beta * _nls(log_odds(mean_w) - log_odds(mean_l))
        if name == "alphapo":
            return _nls(beta * (alpha_reward(mean_w) - alpha_reward(mean_l)) - o.gamma)
        if name == "cpo":
            means = o.form in ("ipo", "simpo")
            d = alpha_reward(mean_w if means else pair.logp_w) - alpha_reward(mean_l if means else pair.logp_l)
            y = beta * d - (o.simpo_gamma if o.form == "simpo" else 0.0)
            value = (1 - eps) * _nls(y) + eps * _nls(-y)
            value = {"hinge": torch.clamp(1 - y, min=0), "ipo": (d - 1 / (2 * beta)) ** 2}.get(o.form, value)
            return value + o.cpo_alpha * nll(pair)
        w, l = beta * pair.r_w, beta * pair.r_l  # noqa: E741
        if name == "sigmoid":
            return (1 - eps) * _nls(x) + eps * _nls(-x)
        if name == "sigmoid_norm":
            return _nls(beta * (_mean(score(pair.r_w), pair.n_w) - _mean(score(pair.r_l), pair.n_l)))
        if name == "hinge":
            return torch.clamp(1 - x, min=0)
        if name == "ipo":
            sums = score(pair.r_w), score(pair.r_l)
            w, l = (_mean(sums[0], pair.n_w), _mean(sums[1], pair.n_l)) if o.length_normalised else sums  # noqa: E741
            return (w - l - 1 / (2 * beta)) ** 2
        if name == "robust":
            return ((1 - eps) * _nls(x) - eps * _nls(-x)) / (1 - 2 * eps)
        if name == "exo_pair":
            u = torch.sigmoid(x)
            return u * (-_nls(x) - math.log(1 - eps)) + (1 - u) * (-_nls(-x) - math.log(eps))
        if name == "nca_pair":
            return _nls(w) + 0.5 * _nls(-w) + 0.5 * _nls(-l)
        if name == "bco_pair":
            return _nls(w) + _nls(-l)
        if name == "sppo_hard":
            return (pair.r_w - 1 / (2 * beta)) ** 2 + (pair.r_l + 1 / (2 * beta)) ** 2
        if name == "apo_zero":
            return (1 - torch.sigmoid(w)) + torch.sigmoid(l)
        if name == "apo_down":
            return torch.sigmoid(w) + (1 - torch.sigmoid(w - l))
        if name == "discopop":
            m = torch.sigmoid(x / o.discopop_tau)
            return (1 - m) * _nls(x) + m * torch.exp(-x)
        if name == "tdpo1":
            return _nls(beta * (margin(pair) - (pair.kl_l - pair.kl_w)))
        if name == "tdpo2":
            return _nls(beta * (margin(pair) - o.alpha * (pair.kl_l - pair.kl_w.detach())))
        if name == "simpo":
            return _nls(beta * (_mean(pair.logp_w, pair.n_w) - _mean(pair.logp_l, pair.n_l)) - o.gamma)
        raise AssertionError(f"the oracle has no formula for {name}")

    return torch.stack([one(pair) for pair in batch])


# Objectives whose slope is a difference of terms that can nearly cancel (ipo and sppo_hard close to their target,
# apo_down, nca_pair, discopop), or that saturates through sigma' = sigma (1 - sigma) (apo_zero): there the slope keeps
# the rounding of its terms. Values: the size of those terms.
SLOPE_CANCELS = {
    "ipo": lambda o: 1 / o.beta,
    "sppo_hard": lambda o: 1 / o.beta,
    "apo_zero": lambda o: o.beta,
    "apo_down": lambda o: o.beta,
    "nca_pair": lambda o: o.beta,
    "discopop": lambda o: o.beta / o.discopop_tau,
}


def slope_error(name: str, batch: list[Pair], o: Options, sizes: list[float]) -> list[float]:
    """By how much dL/dr of each sequence may err, chosen first, for a sum of losses.

    sizes: the sum over each sequence's tokens of w * max(1, |log-prob|), policy and reference. 2e-7 of it is the error
    of r: log-probs err by a tenth of their bound, and rarely all in one direction. Two roundings of the slope's own
    terms come on top.
    """
    ratios = [getattr(pair, side).detach().requires_grad_() for side in ("r_w", "r_l") for pair in batch]
    half = len(batch)
    moved = [dataclasses.replace(pair, r_w=ratios[i], r_l=ratios[half + i]) for i, pair in enumerate(batch)]
    slopes = torch.autograd.grad(objective(name, moved, o).sum(), ratios, create_graph=True)
    links = link(torch.stack(ratios), o.f_divergence, o.f_alpha_divergence_coef)
    steepness = torch.autograd.grad(links.sum(), ratios)
    errors = []
    for slope, steep in zip(slopes, steepness, strict=True):
        error = 2.0**-23 * SLOPE_CANCELS[name](o) * abs(steep.item())
        curvature = torch.autograd.grad(slope, ratios, retain_graph=True, allow_unused=True)
        for second, size in zip(curvature, sizes, strict=True):
            error += 2e-7 * size * abs(second.item()) if second is not None else 0.0
        errors.append(error)
    return errors


def row_slope_errors(
    name: str,
    batch: list[Pair],
    o: Options,
    rows: list[list[int]],
    ratios: list[Tensor],
    logps: Tensor,
    stats: dict[str, Tensor],
) -> Tensor:
    """`slope_error` of each row: its sequence's, times its weight in the sequence's sum.

    rows: of each sequence. ratios: r of all sequences, functions of `logps`.
    """
    if not any(ratio.requires_grad for ratio in ratios):
        return torch.zeros_like(stats["logps"])
    (weights,) = torch.autograd.grad(sum(ratios), logps)
    sizes = stats["logps"].abs().clamp_min(1)
    if "reference_logps" in stats:
        sizes = sizes + stats["reference_logps"].abs().clamp_min(1)
    sizes = (weights * sizes).reshape(-1)
    errors = torch.zeros_like(sizes)
    for span, error in zip(rows, slope_error(name, batch, o, [sizes[span].sum().item() for span in rows]), strict=True):
        errors[span] = error
    return errors.view_as(weights) * weights


@dataclass
class Loss:
    """A preference loss in float64: per pair, its gradient, and how errors of the log-probs carry into it.

    losses: `[B]`.
    grad: d(reduced)/dlogits, shaped like the logits.
    sensitivity: the change of the reduced loss (of each pair for "none") if every log-prob, reference log-prob and KL
        moved by max(1, |itself|).
    chosen_rewards, rejected_rewards: `[B]`.
    """

    losses: Tensor
    loss: Tensor
    grad: Tensor
    terms: Terms
    sensitivity: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    stats: dict[str, Tensor]


@_on_one_thread
def preference(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor | None = None,
    *,
    loss_type: str | list[str] = "sigmoid",
    loss_weights: list[float] | None = None,
    options: Options | None = None,
    reference_logps: Tensor | float | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    upstream: Tensor | float = 1.0,
) -> Loss:
    """The whole path from logits to a preference loss and its gradient.

    upstream: dL/dloss; `[B]` for reduction "none".
    """
    o = options or Options()
    labels = labels.cpu()
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    factors = loss_weights or [1.0] * len(names)
    leaf = exact(logits).requires_grad_()
    stats = token_stats(
        leaf, labels, None if reference is None else exact(reference), temperature=temperature,
        ignore_index=ignore_index,
    )  # fmt: skip
    inner = {name: value.detach().requires_grad_() for name, value in stats.items()}
    if reference is None and reference_logps is None:
        reference_logps = 0.0

    def losses_of(values: dict[str, Tensor]) -> tuple[Tensor, list[Pair]]:
        batch = pairs(
            values, labels, reference_logps=reference_logps, token_weights=token_weights, cu_seqlens=cu_seqlens,
            ld_alpha=ld_alpha, ignore_index=ignore_index,
        )  # fmt: skip
        total = sum(f * objective(name, batch, o) for f, name in zip(factors, names, strict=True))
        if use_weighting:
            total = total * torch.tensor([pair.importance for pair in batch], dtype=torch.float64)
        if not total.requires_grad:  # no valid token anywhere: a constant, whose gradient is 0
            total = total + 0 * values["logps"].sum()
        return total, batch

    def reduced(losses: Tensor) -> Tensor:
        return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses

    losses, batch = losses_of(stats)
    loss = reduced(losses)
    upstream = torch.as_tensor(upstream, dtype=torch.float64).cpu()
    (grad,) = torch.autograd.grad((loss * upstream).sum(), leaf)

    # First-order error propagation, on the per-token numbers.
    touched = [name for name in ("logps", "reference_logps", "kl_reference_policy") if name in inner]

    def carried(value: Tensor) -> Tensor:
        slopes = torch.autograd.grad(value, [inner[name] for name in touched], retain_graph=True, allow_unused=True)
        return sum(
            (slope.abs() * inner[name].detach().abs().clamp_min(1)).sum()
            for name, slope in zip(touched, slopes, strict=True)
            if slope is not None
        )

    inner_losses = reduced(losses_of(inner)[0])
    sensitivity = (
        carried(inner_losses) if inner_losses.dim() == 0 else torch.stack([carried(value) for value in inner_losses])
    )
    slopes = dict(
        zip(
            touched,
            torch.autograd.grad((inner_losses * upstream).sum(), [inner[n] for n in touched], allow_unused=True),
            strict=True,
        )
    )
    row_upstream = {name: slope for name, slope in slopes.items() if slope is not None and name in WITH_GRADIENT}
    terms = gradient_terms(logits, labels, row_upstream, reference, temperature=temperature, ignore_index=ignore_index)
    per_loss = float(upstream.abs().max()) / (len(batch) if reduction == "mean" else 1)
    known = {name: value.detach() for name, value in stats.items()}
    for factor, name in zip(factors, names, strict=True):
        if name in SLOPE_CANCELS and row_upstream:
            ratios = [ratio for pair in losses_of(inner)[1] for ratio in (pair.r_w, pair.r_l)]
            errors = row_slope_errors(name, batch, o, spans(labels, cu_seqlens), ratios, inner["logps"], known)
            unsure = gradient_terms(
                logits, labels, {"logps": errors * abs(factor) * per_loss}, temperature=temperature,
                ignore_index=ignore_index,
            ).size  # fmt: skip
            terms = Terms(terms.size, terms.unsure + unsure)
    beta = o.beta
    return Loss(
        losses.detach(),
        loss.detach(),
        grad,
        terms,
        sensitivity.detach(),
        torch.stack([beta * pair.r_w for pair in batch]).detach(),
        torch.stack([beta * pair.r_l for pair in batch]).detach(),
        known,
    )
