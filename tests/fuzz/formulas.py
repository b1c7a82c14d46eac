"""Preference losses in float64, written from the papers, and the error that exact fp32 arithmetic may make in them.

A batch of B pairs is a dict of *features* `[..., B]`: r_w and r_l, the weighted sums of log-ratios; logp_w, logp_l,
ref_w, ref_l, the same of log-probs; k_w, k_l, of KL(ref || pi); n_w, n_l, the sums of weights; full_w, of log-probs
without LD-DPO. A loss is a function of them that returns its value and the size of its terms, the sum of their
absolute values: what its own roundings are relative to.

The error that is allowed follows from the features' own: the loss and its slopes are evaluated with every feature
moved by what it may err, in all combinations of signs, and the largest change is taken. The constants of a formula
and the scores move by a few roundings in the same way (`Noise`). Nothing here is fitted to a result.

Formulas that diverge: exp(-r) of the forward KL's link, of the alpha divergence's, and DiscoPOP's exp(-x) for tau > 1
leave fp32 at exponents of 88. An implementation may stop them anywhere from 80 on. So each loss is evaluated twice,
with exponents up to 80 and up to 705; where the two differ, the result may be anything between them, and the
gradient anything but NaN. Where both sides of a pair are beyond, so may the loss.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

LOW, HIGH = 80.0, 705.0  # exponents; see above
HUGE = 1e37  # results of this size may be inf in fp32
SLOPE = 1e28  # slopes of this size may stop: the package keeps them within 1e30
TINY = 2.0**-126  # the smallest normal number of fp32: below it results may be 0


@dataclass
class Noise:
    """Relative changes of scores of either side and of constants, `[P, 1]`: 0, or a few roundings of either sign."""

    w: Tensor | float = 0.0
    l: Tensor | float = 0.0  # noqa: E741
    one: Tensor | float = 0.0


@dataclass
class Settings:
    """Options of a loss."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    alpha: float = 0.5
    gamma: float = 0.5


SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
SCORED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "tdpo1", "tdpo2", "rspo")
# sft has scored=True by default in the package, which makes an f-divergence legal beside it and without effect on it.
PAIRED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
          "apo_zero", "apo_down", "discopop", "tdpo1", "tdpo2", "simpo")  # fmt: skip
COUPLED = ("sft", "aot", "aot_unpaired", "rspo")
NAMES = PAIRED + COUPLED
NEEDS_KL = ("tdpo1", "tdpo2")
REFERENCE_FREE = ("sft", "simpo")
OPTIONS = {"discopop": ("discopop_tau",), "tdpo2": ("alpha",), "simpo": ("gamma",)}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# Slopes that are differences of terms of this size, beta * |ds/dr|: sigma (1 - sigma) of a saturated sigma, two
# logistic terms against each other. fp32 keeps the terms' rounding.
SLOPE_SIZE = {"nca_pair": 1.0, "apo_zero": 1.0, "apo_down": 2.0, "exo_pair": 1.0, "discopop": 1.0}


def nls(x: Tensor) -> Tensor:
    """-log sigma(x); torch's softplus would be off by 2e-9 from its default threshold of 20 on."""
    return softplus(-x, threshold=700.0)


def link(r: Tensor, o: Settings, limit: float) -> Tensor:
    """s = f(r) of the f-divergence."""
    a = o.f_alpha_divergence_coef
    if o.f_divergence == "forward_kl":
        return 1 - torch.exp((-r).clamp_max(limit))  # not expm1, whose slope torch takes from its result
    if o.f_divergence == "js_divergence":
        return math.log(2.0) - nls(r)
    if o.f_divergence == "alpha_divergence" and a != 1:
        return (torch.exp(((a - 1) * r).clamp_max(limit)) - 1) / (a - 1)
    return r


def _exponents(r: Tensor, error: Tensor, o: Settings) -> Tensor:
    """The largest exponent in the link of ratios r, which may err."""
    if o.f_divergence == "forward_kl":
        return error - r
    if o.f_divergence == "alpha_divergence":
        a = o.f_alpha_divergence_coef - 1
        return a * r + abs(a) * error
    return torch.full_like(r, -torch.inf)


def _over(total: Tensor, count: Tensor) -> Tensor:
    """total / count; an empty sequence has the mean 0."""
    return torch.where(count > 0, total / count.clamp_min(1e-300), torch.zeros_like(total))


def _moved(x: Tensor, share: Tensor | float) -> Tensor:
    """x moved up by a share of its size: in the direction in which a feature of that sign pattern moves."""
    return x + x.detach().abs() * share


def losses(name: str, f: dict[str, Tensor], o: Settings, limit: float = HIGH, noise: Noise | None = None):
    """The loss of each pair and the size of its terms, `[..., B]` both."""
    q = noise or Noise()
    beta, eps, one = o.beta, o.label_smoothing, 1 + q.one
    s_w, s_l = _moved(link(f["r_w"], o, limit), q.w), _moved(link(f["r_l"], o, limit), q.l)
    if o.f_divergence != "reverse_kl":  # differences with a constant of about 1
        s_w, s_l = s_w + q.w, s_l + q.l
    r_w, r_l = _moved(f["r_w"], q.w), _moved(f["r_l"], q.l)
    x = beta * (s_w - s_l)

    def signed(x: Tensor, scale: float = 1.0):
        return ((1 - eps) * nls(x) + eps * nls(-x)) * scale, ((1 - eps) * nls(x) + eps * nls(-x)) * abs(scale)

    if name == "sigmoid":
        return signed(x)
    if name == "sigmoid_norm":
        y = nls(beta * (_over(s_w, f["n_w"]) - _over(s_l, f["n_l"])))
        return y, y
    if name == "hinge":
        y = (one - x).clamp_min(0)
        return y, 1 + x.abs()
    if name == "ipo":
        y = (_over(s_w, f["n_w"]) - _over(s_l, f["n_l"]) - one / (2 * beta)) ** 2
        return y, y
    if name == "robust":
        y, z = (1 - eps) * nls(x), eps * nls(-x)
        return (y - z) / (1 - 2 * eps), (y + z) / (1 - 2 * eps)
    if name == "exo_pair":
        u, v = torch.sigmoid(x), torch.sigmoid(-x)
        y = u * (-nls(x) - math.log1p(-eps) * one) + v * (-nls(-x) - math.log(eps) * one)
        return y, u * (nls(x) - math.log1p(-eps)) + v * (nls(-x) - math.log(eps))
    if name == "nca_pair":
        y = nls(beta * r_w) + 0.5 * nls(-beta * r_w) + 0.5 * nls(-beta * r_l)
        return y, y
    if name == "bco_pair":
        y = nls(beta * r_w) + nls(-beta * r_l)
        return y, y
    if name == "sppo_hard":
        y = (r_w - one / (2 * beta)) ** 2 + (r_l + one / (2 * beta)) ** 2
        return y, y
    if name == "apo_zero":
        y = torch.sigmoid(-beta * r_w) + torch.sigmoid(beta * r_l)
        return y, 2 + 0 * y
    if name == "apo_down":
        y = torch.sigmoid(beta * r_w) + torch.sigmoid(-beta * (r_w - r_l))
        return y, 2 + 0 * y
    if name == "discopop":
        m = x / o.discopop_tau
        logistic = torch.sigmoid(-m) * nls(x)
        exponential = torch.exp((-x - nls(m)).clamp_max(limit))  # sigma(m) e^-x
        return logistic + exponential, logistic + exponential + nls(x) * torch.sigmoid(m)
    if name in NEEDS_KL:
        alpha, k_w = (1.0, f["k_w"]) if name == "tdpo1" else (o.alpha, f["k_w"].detach())
        y = nls(x - beta * alpha * (f["k_l"] - k_w))
        return y, y
    if name == "simpo":
        mean_w, mean_l = _over(_moved(f["logp_w"], q.w), f["n_w"]), _over(_moved(f["logp_l"], q.l), f["n_l"])
        y = nls(beta * (mean_w - mean_l) - o.gamma * one)
        return y, y
    if name == "sft":
        tokens = f["n_w"].sum(-1, keepdim=True)
        y = -f["full_w"] * f["n_w"].shape[-1] / torch.where(tokens > 0, tokens, 1.0)
        return y, y.abs()
    if name == "aot":
        policy, reference = _moved(f["logp_w"], q.w) - _moved(f["logp_l"], q.l), f["ref_w"] - f["ref_l"]
        return signed(beta * (policy.sort(-1).values - reference.sort(-1).values))
    if name == "aot_unpaired":
        return signed(beta * (r_w.sort(-1).values - r_l.sort(-1).values))
    if name == "rspo":
        y = nls(x[..., :, None] + x[..., None, :]).mean(-1)
        return y, y
    raise ValueError(f"no formula for {name!r}")


@dataclass
class Truth:
    """A preference loss, its slopes, and how far a result may be from them.

    undefined: bool `[B]`, where terms of both signs leave fp32: their sum is inf - inf.
    losses, losses_low, loss_errors: `[B]`; with exponents up to `HIGH` and `LOW`.
    slopes, slope_errors: of the reduced loss times its upstream gradient, by feature, `[B]`; errors are inf where the
        loss leaves fp32.
    """

    undefined: Tensor
    losses: Tensor
    losses_low: Tensor
    loss_errors: Tensor
    slopes: dict[str, Tensor]
    slope_errors: dict[str, Tensor]


DIFFERENTIATED = ("r_w", "r_l", "logp_w", "logp_l", "k_w", "k_l", "full_w")


def evaluate(
    names: list[str],
    factors: list[float],
    features: dict[str, Tensor],
    errors: dict[str, Tensor],
    importance: Tensor,
    importance_error: Tensor,
    o: Settings,
    upstream: Tensor,
    unit: float,
) -> Truth:
    """Evaluate a weighted sum of losses at the features and at all their neighbours.

    features, errors: float64 `[B]` by name; errors are what each feature may be off by.
    importance, importance_error: WPO's factor of each pair, and its relative error.
    upstream: `[B]`, the factor of each pair's loss in what is differentiated.
    unit: half an ulp of the arithmetic, 2^-24 for fp32.
    """
    # Signs: chosen side, rejected side, KLs against their side, constants.
    with_kl = any(name in NEEDS_KL for name in names)
    signs = [(0, 0, 1, 0)] + [
        s for s in itertools.product((-1, 0, 1), (-1, 0, 1), (-1, 1) if with_kl else (1,), (-1, 1)) if s[:2] != (0, 0)
    ]
    w, l, kl, one = torch.tensor(signs, dtype=torch.float64).T.unsqueeze(-1)  # noqa: E741
    step = {"_w": w, "_l": l}
    moved = {}
    for name, value in features.items():
        side = 0.0 if name.startswith("n_") else step[name[-2:]] * (kl if name.startswith("k_") else 1.0)
        side = -side if name.startswith("ref_") else side
        moved[name] = value + side * errors.get(name, torch.zeros_like(value))
    noise = Noise(8 * unit * w, 8 * unit * l, 8 * unit * one)

    def run(limit: float):
        leaves = {k: v.clone().requires_grad_(k in DIFFERENTIATED) for k, v in moved.items()}
        total = torch.zeros((), dtype=torch.float64)
        up = down = torch.zeros_like(moved["r_w"], dtype=torch.bool)
        size, slope_size = torch.zeros_like(moved["r_w"]), dict.fromkeys(DIFFERENTIATED, 0.0)
        slopes = {k: torch.zeros_like(v) for k, v in leaves.items() if k in DIFFERENTIATED}
        for name, factor in zip(names, factors, strict=True):
            value, terms = losses(name, leaves, o, limit, noise)
            # A WPO factor of 0 leaves 0 even of a loss past float64.
            up, down = up | (value.detach() * factor > HUGE), down | (value.detach() * factor < -HUGE)
            value = torch.where(importance == 0, 0.0, value * factor * importance)
            terms = torch.where(importance == 0, 0.0, terms.detach() * abs(factor) * importance)
            parts = [leaves[k] for k in slopes]
            found = torch.autograd.grad((value * upstream).sum(), parts, allow_unused=True)
            for k, g in zip(slopes, found, strict=True):
                if g is not None:
                    slopes[k] = slopes[k] + g
                    slope_size[k] = slope_size[k] + g.abs()
            total, size = total + value.detach(), size + terms
        return total, size, slopes, slope_size, (up & down).any(0)

    high, size, slopes, slope_size, undefined = run(HIGH)
    low, _, slopes_low, _, _ = run(LOW)
    relative = 16 * unit + importance_error
    loss_errors = (high - high[0]).abs().amax(0) + relative * size.amax(0) + TINY
    slope_errors = {}
    for k, slope in slopes.items():
        error = (slope - slope[0]).abs().amax(0) + relative * _largest(slope_size[k], slope) + TINY
        error = error + 16 * unit * _floor(k, names, factors, features, o, importance * upstream.abs())
        slope_errors[k] = error + _ties(k, slope[0], names, moved, errors)
    # Where the two limits differ, or fp32 ends, slopes are not judged.
    beyond = (high != low).any(0) | (high[0].abs() > HUGE)
    for k, slope in slopes.items():
        beyond |= (slope != slopes_low[k]).any(0) | (slope.abs() > SLOPE).any(0)
    # With both sides beyond, their difference may be anything.
    unknown = (_exponents(features["r_w"], errors["r_w"], o) > LOW) & (
        _exponents(features["r_l"], errors["r_l"], o) > LOW
    )
    if any(name in COUPLED for name in names):
        unknown = unknown | beyond.any()
        beyond = beyond.any().expand(beyond.shape)
    unknown = unknown | ((importance < TINY) & beyond)
    loss_errors = torch.where(unknown, torch.inf, loss_errors.nan_to_num(nan=0.0, posinf=torch.inf))
    for k in slopes:
        slope_errors[k] = torch.where(beyond, torch.inf, slope_errors[k])
    first = {k: v[0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for k, v in slopes.items()}
    return Truth(undefined, high[0], low[0], loss_errors, first, slope_errors)


def _largest(size: Tensor | float, like: Tensor) -> Tensor:
    return size.amax(0) if isinstance(size, Tensor) else torch.zeros_like(like[0])


def _floor(
    feature: str, names: list[str], factors: list[float], features: dict[str, Tensor], o: Settings, scale: Tensor
) -> Tensor:
    """Size of the terms that a slope is the difference of, for the losses of `SLOPE_SIZE` and with label smoothing."""
    if feature not in ("r_w", "r_l", "logp_w", "logp_l"):
        return torch.zeros_like(scale)
    r = features[feature].detach().clone().requires_grad_()
    steep = torch.autograd.grad(link(r, o, HIGH).sum(), r)[0].abs() if feature[0] == "r" else 1.0
    total = torch.zeros_like(scale)
    for name, factor in zip(names, factors, strict=True):
        size = SLOPE_SIZE.get(name, 0.0)
        if name == "discopop":
            size = (1 + features["r_w"].abs() + features["r_l"].abs()) / min(o.discopop_tau, 1.0)
        elif name == "exo_pair":
            size = 1 + o.beta * (features["r_w"].abs() + features["r_l"].abs()) - math.log(o.label_smoothing)
        if name in SMOOTHED and o.label_smoothing:
            size = size + (1 / (1 - 2 * o.label_smoothing) if name == "robust" else 1.0)
        total = total + abs(factor) * size * o.beta * (steep if name in SCORED else 1.0)
    return total * scale


def _ties(feature: str, slope: Tensor, names: list[str], moved: dict[str, Tensor], errors: dict[str, Tensor]) -> Tensor:
    """Losses that sort: entries closer than their errors may change places, and their slopes with them."""
    extra = torch.zeros_like(slope)
    keys: list[tuple[Tensor, Tensor]] = []
    if "aot" in names and feature in ("logp_w", "logp_l"):
        keys.append((moved["logp_w"][0] - moved["logp_l"][0], errors["logp_w"] + errors["logp_l"]))
    if "aot_unpaired" in names and feature in ("r_w", "r_l"):
        keys.append((moved[feature][0], errors[feature]))
    for key, error in keys:
        near = (key[:, None] - key[None, :]).abs() <= 2 * (error[:, None] + error[None, :])
        extra = extra + torch.where(near, (slope[:, None] - slope[None, :]).abs(), 0.0).amax(1)
    return extra
