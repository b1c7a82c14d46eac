"""Every preference loss, once: pair scores in, one loss per pair out, in plain torch on small tensors.

The kernels never see a loss formula; they need dL/dlogp of each row, and autograd gets that from the functions here.
To add an objective, write a function of `PairScores` and register it:

    @objective()
    def my_loss(scores: PairScores, beta: float, margin: float = 1.0) -> Tensor:
        return torch.relu(margin - beta * scores.margins)

Keyword parameters after `beta` become valid keys of `loss_kwargs`. Without registering, the function itself can be
passed as `loss_type`.

Symbols, as in the literature: r = weighted sum over a sequence of log pi/pi_ref; n = sum of its weights; s = f(r) with
the f-divergence's link; D = s_chosen - s_rejected; K = weighted sum of KL(ref || pi). Names and formulas follow TRL
where TRL has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ._compile import constant_when_compiled

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_F_DIVERGENCE_ALIASES = {"js": "js_divergence", "alpha": "alpha_divergence"}
# exp of more than this comes close to overflowing, by dtype of the scores; links continue as a logarithm there.
_MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


def _finite(exp: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """exp(x), or expm1(x), and exp(c) (1 + log(1 + x - c)) past the exponent c near which it would overflow.

    The continuation meets exp in value and slope. It stays finite and keeps increasing, so that two scores past c can
    still be compared, and their gradients have the right sign and are neither inf nor NaN.
    """
    limit = _MAX_EXPONENT[x.dtype]
    return exp(x.clamp_max(limit)) + math.exp(limit) * torch.log1p((x - limit).clamp_min(0.0))


@dataclass(frozen=True)
class PairScores:
    """What an objective sees of a batch of B pairs: fp32 tensors `[B]` (fp64 for fp64 logits).

    chosen_log_ratios, rejected_log_ratios: r, sums over the sequence of w * (log pi - log pi_ref).
    chosen_logps, rejected_logps: sums of w * log pi.
    reference_chosen_logps, reference_rejected_logps: the same of the reference (0 when reference-free).
    chosen_counts, rejected_counts: n, sums of the token weights (number of tokens without weights).
    chosen_kl, rejected_kl: K, sums of w * KL(ref || pi); None unless an objective asked for it.
    chosen_full_logps: with LD-DPO, `chosen_logps` before it discounts the tail; None without.
    f_divergence, f_alpha_divergence_coef: the link between log-ratios and scores.
    """

    chosen_log_ratios: Tensor
    rejected_log_ratios: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None
    chosen_full_logps: Tensor | None = None
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    def _link(self, log_ratios: Tensor) -> Tensor:
        """s = f'(pi/pi_ref) as a function of the log-ratio r."""
        if self.f_divergence == "forward_kl":
            return -_finite(torch.expm1, -log_ratios)
        if self.f_divergence == "js_divergence":
            return math.log(2.0) + logsigmoid(log_ratios)
        if self.f_divergence == "alpha_divergence" and abs(self.f_alpha_divergence_coef - 1) >= 1e-6:
            slope = self.f_alpha_divergence_coef - 1
            return _finite(torch.expm1, slope * log_ratios) / slope
        return log_ratios  # reverse KL; also the limit of the alpha divergence at 1

    @property
    def chosen_scores(self) -> Tensor:
        """s_w = f(r_w)."""
        return self._link(self.chosen_log_ratios)

    @property
    def rejected_scores(self) -> Tensor:
        """s_l = f(r_l)."""
        return self._link(self.rejected_log_ratios)

    @property
    def margins(self) -> Tensor:
        """D = s_w - s_l."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_margins(self) -> Tensor:
        """s_w / n_w - s_l / n_l."""
        return _per_token(self.chosen_scores, self.chosen_counts) - _per_token(
            self.rejected_scores, self.rejected_counts
        )


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs to know before it runs.

    options: its keys of `loss_kwargs`, with defaults.
    smoothing: label_smoothing may lie in [smoothing[0], smoothing[1]); None if it has no meaning.
    scored: whether the loss is a function of the scores s, so that an f-divergence has a meaning.
    needs_kl: whether it reads KL(ref || pi) per token, which takes the reference's logits.
    reference_free: whether the loss does without a reference.
    separable: whether each pair's loss depends on that pair alone.
    discounted: whether LD-DPO's discount of the longer answer's tail applies to it.
    """

    name: str
    function: Callable[..., Tensor]
    options: Mapping[str, Any]
    smoothing: tuple[float, float] | None = None
    scored: bool = True
    needs_kl: bool = False
    reference_free: bool = False
    separable: bool = True
    discounted: bool = True


@lru_cache(maxsize=256)
def _resolve_name(loss_type: str, label_smoothing: float) -> Plan:
    """What `resolve` makes of a name; kept."""
    return _resolve(loss_type, None, label_smoothing, None)


OBJECTIVES: dict[str, Objective] = {}

_SMOOTHED = (0.0, 1.0)
_ABOVE_ZERO = 5e-324


_REQUIRED = "required"  # stands for the default of an option that has none


@constant_when_compiled  # torch.compile cannot look into a signature and need not
def _parameters(function: Callable[..., Tensor]) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of a loss function's parameters after the first; "**" among them if it takes any keyword."""
    options: dict[str, Any] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            options["**"] = None
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            options[parameter.name] = _REQUIRED if parameter.default is parameter.empty else parameter.default
    return tuple(options.items())


def _options(function: Callable[..., Tensor]) -> dict[str, Any]:
    """A loss function's own options, by name, with their defaults."""
    return {k: v for k, v in _parameters(function) if k not in ("beta", "label_smoothing", "**")}


def objective(
    *,
    smoothing: tuple[float, float] | None = None,
    scored: bool = True,
    needs_kl: bool = False,
    reference_free: bool = False,
    separable: bool = True,
    discounted: bool = True,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as `loss_type=<its name>`. The flags are those of `Objective`."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OBJECTIVES[function.__name__] = Objective(
            function.__name__, function, _options(function), smoothing, scored, needs_kl, reference_free, separable,
            discounted,
        )  # fmt: skip
        _resolve_name.cache_clear()
        return function

    return register


def _per_token(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 for a sequence without tokens."""
    return total / torch.where(count > 0, count, torch.ones_like(count))


def _smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sigma(x) - eps log sigma(-x)."""
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


@objective(smoothing=_SMOOTHED)
def sigmoid(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7; "From r to Q*", eq. 9); with label smoothing cDPO (Mitchell 2023)."""
    return _smoothed_logistic(beta * scores.margins, label_smoothing)


@objective()
def sigmoid_norm(scores: PairScores, beta: float) -> Tensor:
    """DPO on length-normalised scores."""
    return -logsigmoid(beta * scores.mean_margins)


@objective()
def hinge(scores: PairScores, beta: float) -> Tensor:
    """SLiC (Zhao et al. 2023) on the normalised likelihood."""
    return torch.relu(1 - beta * scores.margins)


@objective()
def ipo(scores: PairScores, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17), length-normalised as its authors' experiments were."""
    return (scores.mean_margins - 1 / (2 * beta)) ** 2


@objective(smoothing=(0.0, 0.5))
def robust(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Unbiased under label flips of rate eps (Chowdhury et al. 2024)."""
    x = beta * scores.margins
    clean, flipped = -(1 - label_smoothing) * logsigmoid(x), -label_smoothing * logsigmoid(-x)
    return (clean - flipped) / (1 - 2 * label_smoothing)


@objective(smoothing=(_ABOVE_ZERO, 1.0))
def exo_pair(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """EXO for pairs (Ji et al. 2024, eq. 16): reverse KL to the smoothed preference; eps > 0, 1e-3 in the paper."""
    x = beta * scores.margins
    chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(label_smoothing))


@objective(scored=False)
def nca_pair(scores: PairScores, beta: float) -> Tensor:
    """NCA for pairs (Chen et al. 2024)."""
    chosen, rejected = beta * scores.chosen_log_ratios, beta * scores.rejected_log_ratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@objective(scored=False)
def bco_pair(scores: PairScores, beta: float) -> Tensor:
    """BCO for pairs (Jung et al. 2024), without its reward shift."""
    return -logsigmoid(beta * scores.chosen_log_ratios) - logsigmoid(-beta * scores.rejected_log_ratios)


@objective(scored=False)
def sppo_hard(scores: PairScores, beta: float) -> Tensor:
    """SPPO (Wu et al. 2024, eq. 4.7) with the winner's probability set to 1."""
    return (scores.chosen_log_ratios - 0.5 / beta) ** 2 + (scores.rejected_log_ratios + 0.5 / beta) ** 2


@objective(scored=False)
def apo_zero(scores: PairScores, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen up, rejected down."""
    return 1 - torch.sigmoid(beta * scores.chosen_log_ratios) + torch.sigmoid(beta * scores.rejected_log_ratios)


@objective(scored=False)
def apo_down(scores: PairScores, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8): both down, rejected more."""
    difference = scores.chosen_log_ratios - scores.rejected_log_ratios
    return torch.sigmoid(beta * scores.chosen_log_ratios) + 1 - torch.sigmoid(beta * difference)


@objective()
def discopop(scores: PairScores, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5): logistic and exponential loss, blended by the margin."""
    x = beta * scores.margins
    # exp(-x) sigma(x / tau) as one exponential: apart, the first overflows where the second is 0.
    return -logsigmoid(x) * torch.sigmoid(-x / discopop_tau) + _finite(torch.exp, logsigmoid(x / discopop_tau) - x)


@objective(reference_free=True, separable=False, discounted=False)
def sft(scores: PairScores, beta: float) -> Tensor:
    """Mean negative log-likelihood over all chosen tokens of the batch (Rafailov et al.'s SFT term).

    Pair i's share is scaled so that the mean over pairs is the mean over tokens. LD-DPO leaves it alone.
    """
    logps = scores.chosen_logps if scores.chosen_full_logps is None else scores.chosen_full_logps
    tokens = scores.chosen_counts.sum()
    return -logps * (logps.numel() / torch.where(tokens > 0, tokens, 1.0))


@objective(smoothing=_SMOOTHED, scored=False, separable=False)
def aot(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired (Melnyk et al. 2024): sorted policy margins against sorted reference margins."""
    policy = (scores.chosen_logps - scores.rejected_logps).sort().values
    reference = (scores.reference_chosen_logps - scores.reference_rejected_logps).sort().values
    return _smoothed_logistic(beta * (policy - reference), label_smoothing)


@objective(smoothing=_SMOOTHED, scored=False, separable=False)
def aot_unpaired(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired (Melnyk et al. 2024): sorted chosen against sorted rejected log-ratios."""
    delta = scores.chosen_log_ratios.sort().values - scores.rejected_log_ratios.sort().values
    return _smoothed_logistic(beta * delta, label_smoothing)


@objective(needs_kl=True)
def tdpo1(scores: PairScores, beta: float) -> Tensor:
    """TDPO-1 (Zeng et al. 2024): the margin less the difference of sequence KLs, K_l - K_w."""
    assert scores.chosen_kl is not None and scores.rejected_kl is not None
    return -logsigmoid(beta * (scores.margins - (scores.rejected_kl - scores.chosen_kl)))


@objective(needs_kl=True)
def tdpo2(scores: PairScores, beta: float, alpha: float = 0.5) -> Tensor:
    """TDPO-2 (Zeng et al. 2024): K of the chosen side is a constant, alpha scales the difference."""
    assert scores.chosen_kl is not None and scores.rejected_kl is not None
    return -logsigmoid(beta * (scores.margins - alpha * (scores.rejected_kl - scores.chosen_kl.detach())))


@objective(scored=False, reference_free=True)
def simpo(scores: PairScores, beta: float, gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2024): mean log-probs, target margin gamma, no reference."""
    chosen = _per_token(scores.chosen_logps, scores.chosen_counts)
    rejected = _per_token(scores.rejected_logps, scores.rejected_counts)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


@objective(separable=False)
def rspo(scores: PairScores, beta: float) -> Tensor:
    """RSPO (Kallus 2025): ranks every chosen-over-rejected index above every mirrored one; any monotone link.

    Pair i loses the mean over the batch's pairs j (itself included) of softplus(-(t_i + t_j)), t = beta D.
    """
    t = beta * scores.margins
    return softplus(-(t[:, None] + t[None, :])).mean(1)


# Options that act on weights or scores, whatever the objective.
_SHARED_OPTIONS = ("ld_alpha", "use_weighting")
_LINK_OPTIONS = ("f_divergence", "f_alpha_divergence_coef")

# Objectives that keep a memory from step to step (`qkernels.semiparametric`); `create` makes them.
STATEFUL = ("ospo", "pspo")

LossType = str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]]


@dataclass(frozen=True)
class Plan:
    """A validated request: which objectives with which options, and what they need of the rows.

    terms: objective, weight (MPO) and its own options.
    label_smoothing, f_divergence, f_alpha_divergence_coef: shared by the terms that know them.
    ld_alpha: LD-DPO weight of the tokens past the pair's shared length; None for no LD-DPO.
    use_weighting: WPO.
    """

    terms: tuple[tuple[Objective, float, dict[str, Any]], ...]
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False

    @property
    def needs_kl(self) -> bool:
        return any(term.needs_kl for term, _, _ in self.terms)

    @property
    def discounted(self) -> bool:
        """Whether no term reads the tokens that LD-DPO discounts at their full weight."""
        return all(term.discounted for term, _, _ in self.terms)

    @property
    def reference_free(self) -> bool:
        return all(term.reference_free for term, _, _ in self.terms)

    @property
    def separable(self) -> bool:
        """Whether each pair's loss can be computed without the other pairs."""
        return all(term.separable for term, _, _ in self.terms)

    @property
    def is_default(self) -> bool:
        """Whether this is plain (smoothed) DPO, which the `pair_loss` operation computes in one step."""
        term, weight, _ = self.terms[0]
        return (
            len(self.terms) == 1
            and term.function is sigmoid
            and weight == 1.0
            and self.f_divergence == "reverse_kl"
            and not self.use_weighting
        )

    def losses(self, scores: PairScores, beta: float, pair_weights: Tensor | None = None) -> Tensor:
        """The loss of each pair, `[B]`.

        pair_weights: WPO factors, `[B]`, taken as constants.
        """
        total = None
        for term, weight, options in self.terms:
            if term.smoothing is not None:
                options = {**options, "label_smoothing": self.label_smoothing}
            loss = term.function(scores, beta=beta, **options) if term.name else _call(term, scores, beta, options)
            if loss.shape != scores.chosen_logps.shape:
                expected = tuple(scores.chosen_logps.shape)
                raise ValueError(
                    f"loss_type {_label(term)} must return one loss per pair, shape {expected}; got {tuple(loss.shape)}"
                )
            if pair_weights is not None:
                loss = loss * pair_weights
            loss = loss if weight == 1.0 else loss * weight
            total = loss if total is None else total + loss
        assert total is not None
        return total


def _label(term: Objective) -> str:
    return repr(term.name) if term.name else getattr(term.function, "__name__", type(term.function).__name__)


def _call(term: Objective, scores: PairScores, beta: float, options: dict[str, Any]) -> Tensor:
    """Call a user's function with those of (beta, options) that its signature takes."""
    if any(name in ("beta", "**") for name, _ in _parameters(term.function)):
        options = {**options, "beta": beta}
    return term.function(scores, **options)


def _as_objective(loss_type: str | Callable[..., Tensor]) -> Objective:
    if isinstance(loss_type, str):
        if loss_type in STATEFUL:
            raise ValueError(
                f"loss_type {loss_type!r} learns from one step to the next, so it cannot be had by name: make an object"
                f" once, `loss = qkernels.objectives.create({loss_type!r})`, and pass loss_type=loss in every step"
            )
        if loss_type not in OBJECTIVES:
            known = ", ".join(sorted(OBJECTIVES))
            raise ValueError(
                f"loss_type {loss_type!r} is unknown; expected one of: {known}; or a callable on PairScores"
            )
        return OBJECTIVES[loss_type]
    if not callable(loss_type):
        raise TypeError(f"loss_type must be a name, a callable or a list of them, got {type(loss_type).__name__}")
    for registered in OBJECTIVES.values():
        if loss_type is registered.function:
            return registered
    smoothed = any(name == "label_smoothing" for name, _ in _parameters(loss_type))
    # A user's function may couple pairs, so nothing is assumed of it.
    return Objective("", loss_type, _options(loss_type), _SMOOTHED if smoothed else None, separable=False)


def create(name: str, **options: Any) -> str | Callable[..., Tensor]:
    """A valid `loss_type` for a whole training run out of a name: a new object for an objective with a memory.

    Args:
        name: of `OBJECTIVES`, which is returned as it is, or of `STATEFUL`.
        options: of the class that stands for a name of `STATEFUL` (`qkernels.semiparametric`).

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: options for an objective without a memory, whose options are `loss_kwargs`.
    """
    if name in STATEFUL:
        from . import semiparametric

        return {"ospo": semiparametric.OSPO, "pspo": semiparametric.PSPO}[name](**options)
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(sorted({*OBJECTIVES, *STATEFUL}))}")
    if options:
        raise TypeError(f"{name!r} takes its options as loss_kwargs of the loss function, got {sorted(options)} here")
    return name


def resolve(
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """Check a request for a loss and return it as a `Plan`.

    Args:
        loss_type: a name of `OBJECTIVES`, a callable on `PairScores`, or a list of these (MPO).
        loss_weights: one factor per entry of the list; 1 each by default.
        label_smoothing: eps in [0, 1), for the objectives that have it.
        loss_kwargs: options of the objectives by name, and for any of them `ld_alpha` (LD-DPO, [0, 1]),
            `use_weighting` (WPO), `f_divergence` with `f_alpha_divergence_coef` (objectives on scores).

    Raises:
        ValueError: an unknown loss, an option that none of the losses knows, a value out of range.
        TypeError: an argument of the wrong type.
    """
    # The common case costs nothing the second time: a loss is called once a step, and a step may be short.
    if type(loss_type) is str and loss_weights is None and not loss_kwargs and not torch.compiler.is_compiling():
        return _resolve_name(loss_type, label_smoothing)
    return _resolve(loss_type, loss_weights, label_smoothing, loss_kwargs)


def _resolve(
    loss_type: LossType,
    loss_weights: Sequence[float] | None,
    label_smoothing: float,
    loss_kwargs: Mapping[str, Any] | None,
) -> Plan:
    several = isinstance(loss_type, (list, tuple))
    entries: Sequence[Any] = loss_type if several else [loss_type]  # type: ignore[assignment]
    if not entries:
        raise ValueError("loss_type is an empty list; expected at least one loss")
    objectives = [_as_objective(entry) for entry in entries]
    if loss_weights is None:
        weights = [1.0] * len(objectives)
    elif len(loss_weights) != len(objectives):
        raise ValueError(f"loss_weights has {len(loss_weights)} entries for {len(objectives)} loss types")
    else:
        weights = [float(weight) for weight in loss_weights]
        if not all(-math.inf < weight < math.inf for weight in weights):
            raise ValueError(f"loss_weights must be finite, got {weights}")
    names = ", ".join(_label(term) for term in objectives)

    ranges = [(term, term.smoothing) for term in objectives if term.smoothing is not None]
    if label_smoothing and not ranges:
        raise ValueError(f"label_smoothing={label_smoothing} has no meaning for loss_type {names}")
    for term, (low, high) in ranges:
        if not low <= label_smoothing < high:
            interval = f"[0, {high:g})" if low == 0 else f"(0, {high:g})"
            raise ValueError(
                f"label_smoothing must lie in {interval} for loss_type {_label(term)}, got {label_smoothing}"
            )

    kwargs = dict(loss_kwargs or {})
    scored = any(term.scored for term in objectives)
    own = {key for term in objectives for key in term.options}
    allowed = own | set(_SHARED_OPTIONS) | (set(_LINK_OPTIONS) if scored else set())
    unknown = sorted(set(kwargs) - allowed)
    if unknown:
        raise ValueError(f"loss_kwargs {unknown} unknown to loss_type {names}; known: {sorted(allowed)}")
    missing = sorted(
        key
        for term in objectives
        for key, default in term.options.items()
        if default == _REQUIRED and key not in kwargs
    )
    if missing:
        raise ValueError(f"loss_type {names} needs loss_kwargs {missing}")

    f_divergence = kwargs.pop("f_divergence", "reverse_kl")
    f_divergence = _F_DIVERGENCE_ALIASES.get(f_divergence, f_divergence)
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"loss_kwargs['f_divergence'] is {f_divergence!r}; expected one of {F_DIVERGENCES}")
    if "f_alpha_divergence_coef" in kwargs and f_divergence != "alpha_divergence":
        raise ValueError(f"loss_kwargs['f_alpha_divergence_coef'] has no meaning for f_divergence {f_divergence!r}")
    alpha = float(kwargs.pop("f_alpha_divergence_coef", 0.5))
    ld_alpha = kwargs.pop("ld_alpha", None)
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"loss_kwargs['ld_alpha'] must lie in [0, 1], got {ld_alpha}")
    if kwargs.get("discopop_tau", 1.0) <= 0:
        raise ValueError(f"loss_kwargs['discopop_tau'] must be positive, got {kwargs['discopop_tau']}")
    use_weighting = kwargs.pop("use_weighting", False)
    if not isinstance(use_weighting, bool):
        raise TypeError(f"loss_kwargs['use_weighting'] must be a bool, got {type(use_weighting).__name__}")
    terms = tuple(
        (term, weight, {key: kwargs[key] for key in term.options if key in kwargs})
        for term, weight in zip(objectives, weights, strict=True)
    )
    return Plan(terms, label_smoothing, f_divergence, alpha, ld_alpha, use_weighting)
