"""Which losses there are by name, and what a request for one means: options, label smoothing, weights of several."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core.compile import constant_when_compiled
from .scores import F_DIVERGENCE_ALIASES, F_DIVERGENCES, PairScores
from .units import check_once, checked_unit, declared_unit


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs to know before it runs.

    options: its keys of `loss_kwargs`, with defaults.
    smoothing: label_smoothing may lie in [smoothing[0], smoothing[1]); None if it has no meaning.
    scored: whether the loss is a function of the scores s, so that an f-divergence has a meaning.
    needs_kl: whether it reads KL(ref || pi) per token, which takes the reference's logits.
    reference_free: whether the loss does without a reference.
    unit: what one entry of the loss depends on: a "pair" alone, or the whole "batch" (`qkernels.objectives.units`).
    discounted: whether LD-DPO's discount of the longer answer's tail applies to it.
    fused: the backends' operation that computes its mean over pairs, with the gradient; None for none.
    """

    name: str
    function: Callable[..., Tensor]
    options: Mapping[str, Any]
    smoothing: tuple[float, float] | None = None
    scored: bool = True
    needs_kl: bool = False
    reference_free: bool = False
    unit: str = "pair"
    discounted: bool = True
    fused: str | None = None

    @property
    def separable(self) -> bool:
        """Whether each pair's loss depends on that pair alone."""
        return self.unit != "batch"


OBJECTIVES: dict[str, Objective] = {}
# Names of classes of objectives that keep a memory from step to step; `create` makes an object of one.
STATEFUL: dict[str, Callable[..., Any]] = {}

# Where label_smoothing may lie, from the first number up to below the second: the probability that a label is the wrong
# way round. From a half on, a loss would prefer the rejected answers. A user's function may mean something else by it.
SMOOTHED = (0.0, 0.5)
_SMOOTHED_BY_A_USER = (0.0, 1.0)

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
    unit: str = "pair",
    separable: bool = True,
    discounted: bool = True,
    fused: str | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as `loss_type=<its name>`. The flags are those of `Objective`.

    `separable=False` is another way to say `unit="batch"`.
    """
    unit = checked_unit(unit, ("pair", "batch")) if separable else "batch"

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OBJECTIVES[function.__name__] = Objective(
            name=function.__name__,
            function=function,
            options=_options(function),
            smoothing=smoothing,
            scored=scored,
            needs_kl=needs_kl,
            reference_free=reference_free,
            unit=unit,
            discounted=discounted,
            fused=fused,
        )
        _resolve_name.cache_clear()
        return function

    return register


def stateful(name: str) -> Callable[[type], type]:
    """Register a class under `create(name)`: its objects are objectives with a memory, one for each training run."""

    def register(made: type) -> type:
        STATEFUL[name] = made
        return made

    return register


# Options that act on weights or scores, whatever the objective.
_SHARED_OPTIONS = ("ld_alpha", "use_weighting")
_LINK_OPTIONS = ("f_divergence", "f_alpha_divergence_coef")

LossType = str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]]


@dataclass(frozen=True)
class LossSpec:
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
            and term.fused == "pair_loss"
            and weight == 1.0
            and self.f_divergence == "reverse_kl"
            and not self.use_weighting
        )

    def losses(self, scores: PairScores, beta: float, pair_weights: Tensor | None = None) -> Tensor:
        """The loss of each pair, `[B]`.

        pair_weights: WPO factors, `[B]`, taken as constants.

        Raises:
            ValueError: a loss of another shape, or one that depends on other pairs than it declares.
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
            if not term.name and term.unit == "pair":
                again = partial(_call, term, beta=beta, options=options)
                # `chosen_nll` is a pair's own but for this mean over the batch, which stays what it is.
                mean = scores.chosen_counts.mean() if scores.chosen_mean_count is None else scores.chosen_mean_count
                check_once(term.function, "pair", again, replace(scores, chosen_mean_count=mean), loss)
            if pair_weights is not None:
                loss = torch.where(pair_weights == 0, 0.0, loss * pair_weights)  # the loss may be inf
            loss = loss if weight == 1.0 else loss * weight
            total = loss if total is None else total + loss
        assert total is not None
        return total


def _made_with(term: Objective) -> list[str]:
    """Options of the class that a loss with a memory is an object of; none for a function."""
    kind = type(term.function)
    return _constructor_options(kind) if kind in STATEFUL.values() else []


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
                f"loss_type {loss_type!r} learns from one step to the next, so it is not available by name: make an"
                f" object once, `loss = qkernels.objectives.create({loss_type!r})`, and pass loss_type=loss in every"
                " step"
            )
        if loss_type not in OBJECTIVES:
            known = ", ".join(sorted(OBJECTIVES))
            raise ValueError(
                f"loss_type {loss_type!r} is unknown{_meant(loss_type)}; expected one of: {known}; or a callable on"
                " PairScores"
            )
        return OBJECTIVES[loss_type]
    if not callable(loss_type):
        raise TypeError(f"loss_type must be a name, a callable or a list of them, got {type(loss_type).__name__}")
    for registered in OBJECTIVES.values():
        if loss_type is registered.function:
            return registered
    smoothed = any(name == "label_smoothing" for name, _ in _parameters(loss_type))
    # A user's function may couple pairs: nothing is assumed of it that it does not declare.
    unit = declared_unit(loss_type, ("pair", "batch"))
    return Objective("", loss_type, _options(loss_type), _SMOOTHED_BY_A_USER if smoothed else None, unit=unit)


def _meant(name: str) -> str:
    """What somebody who wrote an unknown name may have meant."""
    if name.lower() == "dpo":
        return " (DPO's loss is 'sigmoid')"
    close = difflib.get_close_matches(name.lower(), [*OBJECTIVES, *STATEFUL], 1, cutoff=0.8)
    return f" (did you mean {close[0]!r}?)" if close else ""


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
        made: Callable[..., Any] = STATEFUL[name](**options)
        return made
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(sorted({*OBJECTIVES, *STATEFUL}))}")
    if options:
        raise TypeError(f"{name!r} takes its options as loss_kwargs of the loss function, got {sorted(options)} here")
    return name


def for_run(
    loss_type: LossType, loss_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[str | Callable[..., Tensor]], dict[str, Any]]:
    """The losses of a whole training run and what is left of their options: names of `STATEFUL` become new objects.

    What the trainers call once, so that "ospo" and "pspo" are names like any other there: options of their classes are
    taken off `loss_kwargs`, and the rest is for `resolve`.

    Args:
        loss_type: as in `resolve`.
        loss_kwargs: options of the losses and of the classes of `STATEFUL` (`qkernels.semiparametric`) that are named.

    Raises:
        TypeError, ValueError: an option of a class that is of the wrong type or out of range.
    """
    entries = list(loss_type) if isinstance(loss_type, (list, tuple)) else [loss_type]
    kwargs = dict(loss_kwargs or {})
    taken: set[str] = set()
    made: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and entry in STATEFUL:
            own = {name: kwargs[name] for name in _constructor_options(STATEFUL[entry]) if name in kwargs}
            taken.update(own)
            entry = create(entry, **own)
        made.append(entry)
    return made, {name: value for name, value in kwargs.items() if name not in taken}


def _constructor_options(made: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(made).parameters)


def resolve(
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
) -> LossSpec:
    """Check a request for a loss and return it as a `LossSpec`.

    Args:
        loss_type: a name of `OBJECTIVES`, a callable on `PairScores`, or a list of these (MPO).
        loss_weights: one factor per entry of the list; 1 each by default.
        label_smoothing: eps in [0, 0.5), for the objectives that have it: how probable it is that a label is wrong.
        loss_kwargs: options of the objectives by name, and for any of them `ld_alpha` (LD-DPO, [0, 1]),
            `use_weighting` (WPO), `f_divergence` with `f_alpha_divergence_coef` (objectives on scores).

    Raises:
        ValueError: an unknown loss, an option that none of the losses knows, a value out of range.
        TypeError: an argument of the wrong type.
    """
    # The common case costs nothing the second time: a loss is called once a step, and a step may be short.
    label_smoothing = _number(label_smoothing, "label_smoothing")
    if loss_kwargs is not None and not isinstance(loss_kwargs, Mapping):
        raise TypeError(f"loss_kwargs must be a mapping of option names to values, got {type(loss_kwargs).__name__}")
    if type(loss_type) is str and loss_weights is None and not loss_kwargs and not torch.compiler.is_compiling():
        return _resolve_name(loss_type, label_smoothing)
    return _resolve(loss_type, loss_weights, label_smoothing, loss_kwargs)


def _number(value: Any, name: str) -> Any:
    """`value`, if it is a number and not a bool."""
    if type(value) is float:  # the usual case: asking for an abstract class takes longer than all that follows
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


@lru_cache(maxsize=256)
def _resolve_name(loss_type: str, label_smoothing: float) -> LossSpec:
    """What `resolve` makes of a name; kept."""
    return _resolve(loss_type, None, label_smoothing, None)


def _resolve(
    loss_type: LossType,
    loss_weights: Sequence[float] | None,
    label_smoothing: float,
    loss_kwargs: Mapping[str, Any] | None,
) -> LossSpec:
    several = isinstance(loss_type, (list, tuple))
    entries: Sequence[Any] = loss_type if several else [loss_type]  # type: ignore[assignment]
    if not entries:
        raise ValueError("loss_type is an empty list; expected at least one loss")
    objectives = [_as_objective(entry) for entry in entries]
    if loss_weights is None:
        weights = [1.0] * len(objectives)
    elif isinstance(loss_weights, str) or not isinstance(loss_weights, Collection):
        raise TypeError(f"loss_weights must be a sequence of numbers, got {type(loss_weights).__name__}")
    elif len(loss_weights) != len(objectives):
        raise ValueError(f"loss_weights has {len(loss_weights)} entries for {len(objectives)} loss types")
    else:
        weights = [float(_number(weight, f"loss_weights[{i}]")) for i, weight in enumerate(loss_weights)]
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
                + (" (it is the share of labels that are wrong)" if label_smoothing >= high else "")
            )

    kwargs = dict(loss_kwargs or {})
    scored = any(term.scored for term in objectives)
    own = {key for term in objectives for key in term.options}
    allowed = own | set(_SHARED_OPTIONS) | (set(_LINK_OPTIONS) if scored else set())
    unknown = sorted(set(kwargs) - allowed, key=str)
    if unknown:
        made = {name for term in objectives for name in _made_with(term)}
        raise ValueError(
            f"loss_kwargs {unknown} unknown to loss_type {names}; known: {sorted(allowed)}"
            + (f"; and when the object is made, or by name in a trainer: {sorted(made)}" if made else "")
        )
    missing = sorted(
        key
        for term in objectives
        for key, default in term.options.items()
        if default == _REQUIRED and key not in kwargs
    )
    if missing:
        raise ValueError(f"loss_type {names} needs loss_kwargs {missing}")

    shared = _shared_options(kwargs)
    terms = tuple(
        (term, weight, {key: kwargs[key] for key in term.options if key in kwargs})
        for term, weight in zip(objectives, weights, strict=True)
    )
    return LossSpec(terms, label_smoothing, **shared)


def _shared_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the options that act on weights or scores, whatever the objective, off `loss_kwargs`, checked."""
    f_divergence = kwargs.pop("f_divergence", "reverse_kl")
    f_divergence = F_DIVERGENCE_ALIASES.get(f_divergence, f_divergence)
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"loss_kwargs['f_divergence'] is {f_divergence!r}; expected one of {F_DIVERGENCES}")
    if "f_alpha_divergence_coef" in kwargs and f_divergence != "alpha_divergence":
        raise ValueError(f"loss_kwargs['f_alpha_divergence_coef'] has no meaning for f_divergence {f_divergence!r}")
    name = "loss_kwargs['f_alpha_divergence_coef']"
    alpha = float(_number(kwargs.pop("f_alpha_divergence_coef", 0.5), name))
    if not math.isfinite(alpha):
        raise ValueError(f"{name} must be finite, got {alpha}")
    ld_alpha = kwargs.pop("ld_alpha", None)
    if ld_alpha is not None and not 0 <= _number(ld_alpha, "loss_kwargs['ld_alpha']") <= 1:
        raise ValueError(f"loss_kwargs['ld_alpha'] must lie in [0, 1], got {ld_alpha}")
    if not 0 < _number(kwargs.get("discopop_tau", 1.0), "loss_kwargs['discopop_tau']") < math.inf:
        raise ValueError(f"loss_kwargs['discopop_tau'] must be positive and finite, got {kwargs['discopop_tau']}")
    use_weighting = kwargs.pop("use_weighting", False)
    if not isinstance(use_weighting, bool):
        raise TypeError(f"loss_kwargs['use_weighting'] must be a bool, got {type(use_weighting).__name__}")
    return {
        "f_divergence": f_divergence,
        "f_alpha_divergence_coef": alpha,
        "ld_alpha": ld_alpha,
        "use_weighting": use_weighting,
    }
