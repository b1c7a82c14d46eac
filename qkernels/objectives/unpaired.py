"""Losses on sequences that are not paired: what they are a function of, every formula once, their names and options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.compile import constant_when_compiled
from .units import declared_unit


@dataclass(frozen=True)
class SequenceScores:
    """What an unpaired loss sees of S sequences: fp32 tensors `[S]` (fp64 for fp64 inputs).

    log_ratios: sums over the sequence of w * (log pi - log pi_ref), with gradient.
    logps, reference_logps: sums of w * log pi, w * log pi_ref.
    counts: sums of the token weights (number of tokens without weights).
    desirable: bool, whether the answer is a wanted one.
    kl: `[]`, the estimate of KL(pi || pi_ref) from mismatched answers, a constant, 0 or more; None without.
    """

    log_ratios: Tensor
    logps: Tensor
    reference_logps: Tensor
    counts: Tensor
    desirable: Tensor
    kl: Tensor | None = None


@dataclass(frozen=True)
class SequenceObjective:
    """An unpaired loss.

    options: the function's own, with defaults.
    unit: "sequence" or "batch".
    needs_kl: whether it reads the KL estimate.
    takes_beta: whether it has a parameter `beta`.
    """

    name: str
    function: Callable[..., Tensor]
    options: Mapping[str, Any]
    unit: str = "sequence"
    needs_kl: bool = False
    takes_beta: bool = True


SEQUENCE_OBJECTIVES: dict[str, SequenceObjective] = {}


@constant_when_compiled
def _options(function: Callable[..., Tensor]) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.default for p in named if p.name != "beta"}


@constant_when_compiled
def _takes_beta(function: Callable[..., Tensor]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "beta" or p.kind is p.VAR_KEYWORD for p in parameters)


def _register(function: Callable[..., Tensor], needs_kl: bool) -> None:
    name = function.__name__
    SEQUENCE_OBJECTIVES[name] = SequenceObjective(name, function, _options(function), needs_kl=needs_kl)


def _weighted(scores: SequenceScores, losses: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    return torch.where(scores.desirable, desirable_weight * losses, undesirable_weight * losses)


def _signed(scores: SequenceScores, values: Tensor) -> Tensor:
    """Values as they are for wanted answers, with the other sign for unwanted ones."""
    return torch.where(scores.desirable, values, -values)


def _sigmoid(x: Tensor) -> Tensor:
    """sigma(x) whose gradient keeps its digits where it is close to 1."""
    return torch.exp(logsigmoid(x))


def kto(scores: SequenceScores, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8): 1 - sigma(beta (r - kl)) wanted, 1 - sigma(beta (kl - r)) unwanted."""
    assert scores.kl is not None
    losses = _sigmoid(-beta * _signed(scores, scores.log_ratios - scores.kl))
    return _weighted(scores, losses, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    scores: SequenceScores, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7), unpaired as in TRL: 1 - sigma(beta r) wanted, sigma(beta r) not."""
    losses = _sigmoid(-beta * _signed(scores, scores.log_ratios))
    return _weighted(scores, losses, desirable_weight, undesirable_weight)


_register(kto, needs_kl=True)
_register(apo_zero_unpaired, needs_kl=False)


def resolve_sequence(
    loss_type: str | Callable[..., Tensor], loss_kwargs: Mapping[str, Any] | None
) -> SequenceObjective:
    """The objective of that name, or of a user's function, with these options in place of its defaults.

    Raises:
        ValueError: an unknown name or option, or one out of range.
        TypeError: neither a name nor a function, or an option that is not a number.
    """
    if loss_kwargs is not None and not isinstance(loss_kwargs, Mapping):
        raise TypeError(f"loss_kwargs must be a mapping of option names to values, got {type(loss_kwargs).__name__}")
    if isinstance(loss_type, str):
        if loss_type not in SEQUENCE_OBJECTIVES:
            known = ", ".join(sorted(SEQUENCE_OBJECTIVES))
            raise ValueError(
                f"loss_type {loss_type!r} is unknown; expected one of: {known}; or a callable on SequenceScores"
                " (losses on pairs are those of fused_token_dpo)"
            )
        found = SEQUENCE_OBJECTIVES[loss_type]
    elif callable(loss_type):
        unit = declared_unit(loss_type, ("sequence", "batch"))
        found = SequenceObjective("", loss_type, _options(loss_type), unit, takes_beta=_takes_beta(loss_type))
    else:
        raise TypeError(f"loss_type must be a name or a callable, got {type(loss_type).__name__}")
    options = dict(loss_kwargs or {})
    unknown = sorted(set(options) - set(found.options), key=str)
    if unknown:
        label = found.name or getattr(loss_type, "__name__", "of the caller")
        raise ValueError(f"loss_kwargs {unknown} unknown to loss_type {label}; known: {sorted(found.options)}")
    if found.name:
        for name, value in options.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"loss_kwargs[{name!r}] must be a number, got {type(value).__name__}")
            if not 0 <= value < math.inf:
                raise ValueError(f"loss_kwargs[{name!r}] must be finite and 0 or more, got {value}")
    merged = {**found.options, **options}
    missing = sorted(name for name, value in merged.items() if value is inspect.Parameter.empty)
    if missing:
        raise ValueError(f"this loss_type needs loss_kwargs {missing}")
    return replace(found, options=merged)
