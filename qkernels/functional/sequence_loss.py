"""Losses on sequences that are not paired: from per-token log-probs to a loss, rewards of sequences and of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd.sequence_sums import Summed, Totals, sequence_sums
from ..core import checks
from ..distributed.fingerprint import Fingerprint, words
from ..head.plan import LinearPlan
from ..objectives.units import check_once
from ..objectives.unpaired import SequenceObjective, SequenceScores, resolve_sequence
from .preference import NO_LOGPS, Batch, Reference, check_token_weights
from .results import TokenStats
from .unit_chunks import Part
from .unit_loss import LossArguments, UnitLoss, fields_of


class _SequenceFields(NamedTuple):
    """The fields of a `SequenceOutput`."""

    loss: Tensor
    rewards: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    kl: Tensor | None
    stats: TokenStats | None


class SequenceOutput(_SequenceFields):
    """What the losses on plain sequences return. Only `loss` carries gradient.

    loss: `[]`, or `[S]` with reduction="none".
    rewards: `[S]`, beta times the weighted sum of log-ratios over each sequence.
    token_logps: log pi(label) per row, shaped like `labels`; 0 at ignored rows, as in all per-token outputs.
    reference_token_logps: log pi_ref(label) per row; None when the reference came as per-sequence sums.
    token_rewards: beta * (token_logps - reference_token_logps); None when the reference came as per-sequence sums.
    kl: `[]`, the estimate that the loss has used; None without.
    stats: `TokenStats` with the `outputs` asked for; None without.

    Besides these fields it has an attribute `plan`: what `fused_linear_sequence_loss` did (`LinearPlan`); None from
    logits and from inside torch.compile.
    """

    plan: LinearPlan | None = None


class SequenceArguments(LossArguments[SequenceOutput]):
    """The arguments of the losses on plain sequences, named as there."""

    def __init__(self, objective: SequenceObjective, beta: float, reduction: str, given: Mapping[str, Any]):
        self.objective, self.beta, self.reduction, self.given = objective, beta, reduction, given

    @staticmethod
    def check(given: Mapping[str, Any]) -> SequenceArguments:
        """Check what does not depend on tensors; `given` has all arguments by name."""
        return SequenceArguments(
            objective=resolve_sequence(given["loss_type"], given["loss_kwargs"]),
            beta=checks.positive(given["beta"], "beta"),
            reduction=checks.choice(given["reduction"], "reduction", ("mean", "sum", "none")),
            given=given,
        )

    def tensors(self) -> dict[str, Any]:
        names = ("desirable", "token_weights", "reference_logps", "kl", "kl_logps", "kl_reference_logps")
        return {name: value if isinstance(value := self.given[name], Tensor) else None for name in names}

    def fingerprint(self) -> SequenceFingerprint:
        objective = self.objective
        named = objective.name or objective.function.__qualname__
        kl = self.given["kl"]
        return SequenceFingerprint(
            loss=(named, sorted(objective.options.items())),
            beta_and_reduction=(self.beta, self.reduction),
            kl=None if isinstance(kl, Tensor) else kl,
        )

    def token_weights(self, labels: Tensor, ignore_index: int) -> Tensor | None:
        return check_token_weights(self.given["token_weights"], labels, ignore_index)

    def of(self, labels: Tensor, batch: Batch, has_model: bool) -> SequenceLoss:
        return SequenceLoss(self, labels, batch, has_model)


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceFingerprint(Fingerprint):
    """Of a loss on plain sequences: its name and options, and the KL where that is a number."""

    loss: tuple[Any, ...] = field(metadata=words("the loss"))
    beta_and_reduction: tuple[float, str] = field(metadata=words("beta, reduction"))
    kl: float | None = field(metadata=words("kl as a number"))


class SequenceLoss(UnitLoss[SequenceOutput]):
    """A loss on plain sequences with its tensors."""

    def __init__(self, arguments: SequenceArguments, labels: Tensor, batch: Batch, has_model: bool):
        given, self.objective = arguments.given, arguments.objective
        self.beta, self.reduction = arguments.beta, arguments.reduction
        self.unit, self.differentiable, self.shape, self.batch = self.objective.unit, ("logps",), labels.shape, batch
        self.fields = fields_of(*(("reference_logps",) if has_model else ()))
        number, dtype = batch.sequences.number, batch.weights.dtype
        self.share = 1.0 / number if self.reduction == "mean" else 1.0
        self.desirable = _desirable(given["desirable"], number, labels)
        if has_model and given["reference_logps"] is not None:
            raise ValueError("give either the reference's own rows or reference_logps, not both")
        if not has_model and given["reference_logps"] is None:
            raise ValueError(
                "no reference: give reference_logps (cached log-probs; 0.0 for reference-free) or the reference's rows"
            )
        self.has_model = has_model
        self.reference = NO_LOGPS if has_model else Reference.of(given["reference_logps"], labels, number, dtype)
        self.kl = _kl(given, self.objective, labels, dtype)

    def unreduced(self) -> str | None:
        return "reduction='none' leaves each sequence's factor to what follows" if self.reduction == "none" else None

    def sums(self, stats: Mapping[str, Tensor], part: Part) -> Totals:
        """Sums over the sequences of a part."""
        batch, of_sequences = part.batch, self.reference.sequence_sums
        summed = Summed(
            sequences=batch.sequences,
            weights=batch.weights,
            base_weights=batch.base_weights,
            reference_tokens=self._reference_tokens(stats, part),
            reference_sums=None if of_sequences is None else part.sequences(of_sequences),
            parts=1,
        )
        return sequence_sums(stats["logps"], None, summed)

    def scores(self, totals: Totals, part: Part) -> SequenceScores:
        """What the objective sees of a part."""
        of = {name: whole for name, (whole,) in totals.parts.items()}
        return SequenceScores(
            log_ratios=of["ratios"],
            logps=of["logps"],
            reference_logps=of["reference"],
            counts=of["counts"],
            desirable=part.sequences(self.desirable),
            kl=self.kl,
        )

    def _reference_tokens(self, stats: Mapping[str, Tensor], part: Part) -> Tensor | None:
        """The reference's log-probs of the part's rows, 0 at ignored ones; None where they came per sequence."""
        if self.has_model:
            return stats["reference_logps"]
        if self.reference.sequence_sums is not None:
            return None
        if self.reference.tokens is None:
            return torch.zeros_like(part.batch.weights)
        return torch.where(part.batch.valid, part.rows(self.reference.tokens), 0.0)

    def losses(self, scores: SequenceScores) -> Tensor:
        """The loss of each sequence."""
        objective = self.objective
        losses = self._call(scores)
        if not objective.name:
            label = getattr(objective.function, "__name__", type(objective.function).__name__)
            if not isinstance(losses, Tensor) or losses.shape != scores.logps.shape:
                got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                expected = tuple(scores.logps.shape)
                raise ValueError(f"loss_type {label} must return one loss per sequence, shape {expected}; got {got}")
            if objective.unit == "sequence":
                check_once(objective.function, "sequence", self._call, scores, losses)
        return losses

    def _call(self, scores: SequenceScores) -> Tensor:
        objective = self.objective
        own = {"beta": self.beta} if objective.takes_beta else {}
        return objective.function(scores, **own, **objective.options)

    def total(self, stats: Mapping[str, Tensor], part: Part) -> Tensor:
        return self.losses(self.scores(self.sums(stats, part), part)).sum() * self.share

    def output(self, stats: Mapping[str, Tensor], part: Part, known: Mapping[str, Any]) -> SequenceOutput:
        totals = self.sums(stats, part)
        losses = self.losses(self.scores(totals, part))
        loss = losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()
        logps, tokens = stats["logps"].detach(), self._reference_tokens(stats, part)
        rewards = None if totals.row_ratios is None else (self.beta * totals.row_ratios).reshape(self.shape)
        return SequenceOutput(
            loss=loss,
            rewards=self.beta * totals.ratios,
            token_logps=logps.reshape(self.shape),
            reference_token_logps=None if tokens is None else tokens.detach().reshape(self.shape),
            token_rewards=rewards,
            kl=self.kl,
            stats=known["stats"],
        )


def _desirable(value: Any, number: int, labels: Tensor) -> Tensor:
    value = checks.tensor(value, "desirable")
    if value.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {value.dtype}")
    if value.shape != (number,):
        raise ValueError(f"desirable must have shape ({number},), one for each sequence, got {tuple(value.shape)}")
    checks.same_device(value, "desirable", labels, "labels")
    return value


def _kl(given: Mapping[str, Any], objective: SequenceObjective, labels: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The estimate of KL(pi || pi_ref), `[]`: given, or made of log-probs of mismatched answers."""
    kl, logps, reference = given["kl"], given["kl_logps"], given["kl_reference_logps"]
    if (logps is None) != (reference is None):
        raise ValueError("kl_logps and kl_reference_logps belong together: give both or neither")
    if kl is not None and logps is not None:
        raise ValueError("give either kl or kl_logps with kl_reference_logps, not both")
    if kl is None and logps is None:
        if objective.needs_kl:
            raise ValueError(
                f"loss_type {objective.name!r} needs an estimate of KL(pi || pi_ref): kl, or the log-probs of"
                " mismatched answers (each prompt with another one's) as kl_logps and kl_reference_logps"
            )
        return None
    if objective.name and not objective.needs_kl:
        raise ValueError(f"loss_type {objective.name!r} reads no kl; leave kl, kl_logps and kl_reference_logps out")
    if logps is not None:
        logps = checks.tensor(logps, "kl_logps")
        if logps.dim() != 1 or logps.shape[0] == 0:
            raise ValueError(f"kl_logps must have shape [M], one sum for each sequence, got {tuple(logps.shape)}")
        logps = checks.like(logps, "kl_logps", logps.shape, labels, "labels").detach()
        reference = checks.like(reference, "kl_reference_logps", logps.shape, labels, "labels").detach()
        return (logps.double() - reference.double()).mean().clamp_min(0.0).to(dtype)
    if not isinstance(kl, Tensor):
        # (Not torch.tensor, which copies from the host and makes it wait for a GPU.)
        kl = torch.full((), float(kl) if _is_number(kl) else torch.nan, dtype=dtype, device=labels.device)
    if kl.numel() != 1 or (checks.readable(kl) and not bool((kl >= 0) & kl.isfinite())):
        raise ValueError(f"kl must be one finite number, 0 or more, got {given['kl']!r}")
    return kl.detach().to(labels.device, dtype).reshape(())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
