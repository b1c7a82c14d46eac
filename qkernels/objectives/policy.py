"""Policy losses: what they are a function of, every formula once, their names and options.

Symbols: lp the log-prob of a token, old that of the policy that sampled it, A its advantage, rho = exp(lp - old) of a
token, or of its sequence (`level`). A formula returns one loss per token. How tokens become one number, KL penalty,
importance correction and entropy bonus are the same for all of them (`qkernels.functional.policy_loss`). Names and
formulas follow TRL where TRL has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.compile import constant_when_compiled
from ..core.sequences import Sequences
from .scores import finite_exp
from .units import declared_unit

LEVELS = ("token", "sequence", "sequence_sum")
REDUCTIONS = ("sequence_mean", "token_mean", "items", "fixed_length", "sequence_sum", "sum", "none")


@dataclass(frozen=True)
class PolicyScores:
    """What a policy loss sees of some tokens: fp32 tensors of one shape (fp64 for fp64 inputs), 0 at ignored tokens.

    logps: log pi(token), with gradient.
    old_logps: log-prob under the policy that sampled; `logps` as a constant where that is this policy.
    log_ratios: logps - old_logps; with the level "sequence" their mean over the sequence, with "sequence_sum" their
        sum, the same at each of its tokens. With gradient.
    advantages: A, per token.
    reference_logps: log pi_ref(token); None without a reference.
    sampling_logps: log-prob that the engine gave the token when it sampled; None without.
    entropy: of pi at the token, a constant; None unless it was asked for.
    importance: corrects for the engine that sampled, exp(old - sampling), truncated or masked; None without correction.
    valid: bool, tokens that are not ignored.
    sequences: how the tokens group; None where the loss is known token by token.
    """

    logps: Tensor
    old_logps: Tensor
    log_ratios: Tensor
    advantages: Tensor
    reference_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    entropy: Tensor | None = None
    importance: Tensor | None = None
    valid: Tensor | None = None
    sequences: Sequences | None = field(default=None, repr=False)

    @property
    def ratios(self) -> Tensor:
        """rho. Past e^80 (fp32) it grows as a logarithm, so that it stays finite."""
        return finite_exp(torch.exp, self.log_ratios)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """At each token the sum of `values` over its sequence, in fp64 inside.

        Raises:
            ValueError: in a loss that is known token by token.
        """
        if self.sequences is None:
            raise ValueError("a loss of the unit 'token' cannot sum over a sequence: declare_unit('sequence') it")
        assert self.valid is not None
        total = self.sequences.sums(torch.where(self.valid, values, 0.0))
        return self.sequences.to_tokens(total)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """At each token the mean of `values` over its sequence."""
        ones = torch.ones_like(values)
        return self.sequence_sum(values) / self.sequence_sum(ones).clamp_min(1.0)


@dataclass(frozen=True)
class PolicyObjective:
    """A policy loss and what goes with it.

    options: the function's own, with defaults.
    unit: "token", "sequence" or "batch".
    level: of the ratio, one of `LEVELS`.
    reduction: one of `REDUCTIONS`.
    scaled: whether a token whose advantage or importance is 0 has no gradient.
    needs_old: whether it compares with the policy that sampled.
    """

    name: str
    function: Callable[..., Tensor]
    options: Mapping[str, Any]
    unit: str = "token"
    level: str = "token"
    reduction: str = "sequence_mean"
    scaled: bool = True
    needs_old: bool = True


POLICY_OBJECTIVES: dict[str, PolicyObjective] = {}


@constant_when_compiled
def _options(function: Callable[..., Tensor]) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _register(function: Callable[..., Tensor], name: str, **how: Any) -> None:
    POLICY_OBJECTIVES[name] = PolicyObjective(name, function, _options(function), **how)


def clipped(
    scores: PolicyScores, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A); PPO (Schulman et al. 2017, eq. 7).

    epsilon_high is epsilon by default (another one: DAPO, Yu et al. 2025, eq. 10). delta is an upper limit of rho in
    the first term, so that tokens of negative advantage are clipped too (INTELLECT-2, 2025, eq. 3).
    """
    ratios, advantages = scores.ratios, scores.advantages
    within = ratios.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    capped = ratios if delta is None else ratios.clamp_max(delta)
    return -torch.min(capped * advantages, within * advantages)


def cispo(scores: PolicyScores, epsilon_high: float = 5.0) -> Tensor:
    """-sg(min(rho, epsilon_high)) A lp: no token loses its gradient to the clip (CISPO, MiniMax-M1 2025, eq. 4)."""
    return -scores.ratios.clamp_max(epsilon_high).detach() * scores.advantages * scores.logps


def _by_sign(wanted: Tensor, positive: float, negative: float, scores: PolicyScores) -> Tensor:
    """One of two numbers for each token, in the dtype of the scores."""
    return torch.full_like(scores.advantages, negative).masked_fill(wanted, positive)


def sapo(scores: PolicyScores, temperature_pos: float = 1.0, temperature_neg: float = 1.05) -> Tensor:
    """-A (4 / tau) sigma(tau (rho - 1)), tau by the sign of A: a soft gate for the clip (SAPO, Gao et al. 2025)."""
    tau = _by_sign(scores.advantages > 0, temperature_pos, temperature_neg, scores)
    return -scores.advantages * torch.sigmoid(tau * (scores.ratios - 1)) * 4 / tau


def vespo(
    scores: PolicyScores, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0
) -> Tensor:
    """-sg(phi(w)) A lp, phi(w) = e^lambda w^k e^(-lambda w) of the sequence's ratio w (VESPO, 2026).

    w = exp of the sum of lp - old, and of the logarithm of the importance correction; k and lambda by the sign of A.
    Exponents are clamped to [log 1e-8, 20], those of a token to [-20, 20].
    """
    low = math.log(1e-8)
    with torch.no_grad():
        log_w = scores.sequence_sum((scores.logps - scores.old_logps).clamp(-20.0, 20.0))
        if scores.importance is not None:
            log_w = log_w + scores.sequence_sum(scores.importance.log().clamp(low, 20.0))
        log_w = log_w.clamp(low, 20.0)
        wanted = scores.advantages >= 0
        k = _by_sign(wanted, k_pos, k_neg, scores)
        rate = _by_sign(wanted, lambda_pos, lambda_neg, scores).clamp_min(1e-4)
        phi = torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return -phi * scores.advantages * scores.logps


_register(clipped, "grpo")
_register(clipped, "bnpo", reduction="token_mean")
_register(clipped, "dr_grpo", reduction="fixed_length")
_register(clipped, "dapo", reduction="items")
_register(clipped, "gspo", level="sequence")
_register(clipped, "luspo", level="sequence", reduction="sequence_sum")
_register(clipped, "rloo", level="sequence_sum")
_register(cispo, "cispo", reduction="items")
_register(sapo, "sapo")
_register(vespo, "vespo", unit="sequence", reduction="items")

# Losses whose formula takes the importance correction itself.
CORRECTED_INSIDE = ("vespo",)


def resolve_policy(loss_type: str | Callable[..., Tensor], options: Mapping[str, Any]) -> PolicyObjective:
    """The objective of that name, or of a user's function, with these options in place of its defaults.

    Raises:
        ValueError: an unknown name or option, or one out of range.
        TypeError: neither a name nor a function, or an option that is not a number.
    """
    if isinstance(loss_type, str):
        if loss_type not in POLICY_OBJECTIVES:
            known = ", ".join(sorted(POLICY_OBJECTIVES))
            raise ValueError(
                f"loss_type {loss_type!r} is unknown; expected one of: {known}; or a callable on PolicyScores"
            )
        found = POLICY_OBJECTIVES[loss_type]
    elif callable(loss_type):
        unit = declared_unit(loss_type, ("token", "sequence", "batch"))
        found = PolicyObjective("", loss_type, _options(loss_type), unit=unit, scaled=False)
    else:
        raise TypeError(f"loss_type must be a name or a callable, got {type(loss_type).__name__}")
    unknown = sorted(set(options) - set(found.options), key=str)
    if unknown:
        label = found.name or getattr(loss_type, "__name__", "of the caller")
        raise ValueError(
            f"options {unknown}, given by name or in loss_kwargs, unknown to loss_type {label}; known:"
            f" {sorted(found.options)}"
        )
    if found.name:
        for name, value in options.items():
            _check_option(name, value)
    merged = {**found.options, **options}
    missing = sorted(name for name, value in merged.items() if value is inspect.Parameter.empty)
    if missing:
        raise ValueError(f"this loss_type needs loss_kwargs {missing}")
    return replace(found, options=merged)


def _check_option(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    lowest, strictly = {"epsilon": (0.0, False), "epsilon_high": (0.0, False)}.get(name, (0.0, True))
    if not (value > lowest or (not strictly and value == lowest)) or not math.isfinite(value):
        raise ValueError(f"{name} must be finite and {'above' if strictly else 'at least'} {lowest:g}, got {value}")
    if name == "epsilon" and value >= 1:
        raise ValueError(f"epsilon must lie in [0, 1), got {value}")
