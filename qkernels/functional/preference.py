"""From per-token log-probs to a preference loss and token rewards: what every path into an objective shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import objectives
from ..autograd.logits import PairLoss
from ..autograd.sequence_sums import Summed, Totals, sequence_sums
from ..backends import ops
from ..core import checks
from ..core.calls import PairLoss as PairLossCall
from ..core.fields import BIT
from ..core.sequences import Sequences, Shard
from ..distributed.fingerprint import Fingerprint, words
from ..objectives import LossSpec, LossType, PairScores
from .results import TokenDPOOutput


class Loss(NamedTuple):
    """A checked choice of loss: what it is, its beta, and how the pairs' losses become one."""

    spec: LossSpec
    beta: float
    reduction: str

    @property
    def is_fused(self) -> bool:
        """Whether the operation `pair_loss` computes it in one launch."""
        return self.spec.is_default and self.reduction == "mean"

    def fields(self, has_model: bool) -> int:
        """The per-row results it needs; `has_model` says whether the reference's come from its own rows."""
        wanted = BIT["logps"] | BIT["logsumexp"]
        if has_model:
            wanted |= BIT["reference_logps"]
        if self.spec.needs_kl:
            wanted |= BIT["kl_reference_policy"]
        if self.spec.use_weighting:
            wanted |= BIT["log_sum_sq_probs"]
        return wanted

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Those of them that it differentiates."""
        return ("logps", "kl_reference_policy") if self.spec.needs_kl else ("logps",)

    def fingerprint(self, packed: bool, has_model: bool) -> LossFingerprint:
        """What ranks that share it must have alike."""
        spec = self.spec
        terms = [(term.name or term.function.__qualname__, weight, options) for term, weight, options in spec.terms]
        link = (spec.f_divergence, spec.f_alpha_divergence_coef)
        return LossFingerprint(
            loss=(terms, spec.label_smoothing, link, spec.ld_alpha, spec.use_weighting),
            beta=self.beta,
            reduction=self.reduction,
            packed=packed,
            has_model=has_model,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LossFingerprint(Fingerprint):
    """Of a preference loss. `loss`: its terms with their weights and options, and what it does with them."""

    loss: tuple[Any, ...] = field(metadata=words("the loss"))
    beta: float
    reduction: str
    packed: bool = field(metadata=words("a packed batch"))
    has_model: bool = field(metadata=words("a reference model"))


class LossInputs(NamedTuple):
    """The checked tensors of a loss besides its rows.

    weights: `[S, T]`, per-token factors, or None.
    cu_seqlens: `[2B + 1]` of a packed batch, or None.
    reference: cached log-probs.
    sequences: how many there are, 2B.
    """

    weights: Tensor | None
    cu_seqlens: Tensor | None
    reference: Reference
    sequences: int


class LossRequest(NamedTuple):
    """The arguments of a preference loss that both paths share, as they came; named as the public functions have them.

    policy_name, model_name: of the arguments with the policy's and the reference's rows.
    """

    reference_logps: Tensor | float | None
    beta: float
    loss_type: LossType
    loss_weights: Sequence[float] | None
    label_smoothing: float
    loss_kwargs: Mapping[str, Any] | None
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    reduction: str
    policy_name: str
    model_name: str

    def shared_tensors(self) -> dict[str, Any]:
        """Arguments that all ranks of `tp_group` have to have alike, by name."""
        return {
            "token_weights": self.token_weights,
            "cu_seqlens": self.cu_seqlens,
            "reference_logps": self.reference_logps,
        }

    def loss(self) -> Loss:
        """Check what does not depend on tensors."""
        beta = checks.positive(self.beta, "beta")
        reduction = checks.choice(self.reduction, "reduction", ("mean", "sum", "none"))
        spec = objectives.resolve(self.loss_type, self.loss_weights, self.label_smoothing, self.loss_kwargs)
        return Loss(spec, beta, reduction)

    def inputs(self, loss: Loss, labels: Tensor, has_model: bool, dtype: torch.dtype, ignore_index: int) -> LossInputs:
        """Check the tensors, given the labels as the caller shaped them.

        Args:
            loss: the checked choice.
            labels: `[2B, T]` or `[N]`.
            has_model: whether the reference model's own rows were given.
            dtype: of the per-row results.
            ignore_index: the label of rows whose weight does not matter.
        """
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None:
            sequences = labels.shape[0]
            checks.pairs(sequences, f"{self.policy_name} holds")
        else:
            cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
            sequences = cu_seqlens.shape[0] - 1
        given = self.token_weights
        weights = None if given is None else check_token_weights(given, labels, ignore_index)
        reference = NO_LOGPS
        if self._reads_given(loss.spec, has_model):
            reference = Reference.of(self.reference_logps, labels, sequences, dtype)
        return LossInputs(weights, cu_seqlens, reference, sequences)

    def _reads_given(self, spec: LossSpec, has_model: bool) -> bool:
        """Whether the reference comes as `reference_logps`; ValueError where there are two references, or too few."""
        given, model_name = self.reference_logps, self.model_name
        if has_model:
            if given is not None:
                raise ValueError(f"give either {model_name} or reference_logps, not both")
            return False
        if spec.needs_kl:
            names = ", ".join(repr(term.name) for term, _, _ in spec.terms if term.needs_kl)
            raise ValueError(f"loss_type {names} needs KL(reference || policy) per token, hence {model_name}")
        if given is None and not spec.reference_free:
            raise ValueError(
                f"no reference: give {model_name}, or reference_logps (cached log-probs; 0.0 for reference-free)"
            )
        return given is not None


class Batch(NamedTuple):
    """The rows of a preference batch and what each counts for.

    labels: int64 `[S, T]`, with `ignore_index` also where the weight is 0.
    valid: bool `[S, T]`, the rows that are not ignored.
    weights: fp32 `[S, T]`, factors in the sequence sums, LD-DPO's included; 0 at ignored rows.
    base_weights: the same before LD-DPO.
    sequences, cu_seqlens: the grouping of the rows.
    ignore_index: the label of rows that are not valid.
    counts: fp64 `[2B]`, sums of `base_weights` over the whole sequences, where these rows are not all that the sums
        are over; None where they are.
    mean_count: fp64 `[]`, chosen tokens per pair of the whole batch, where these rows are a part of it; None where not.
    """

    labels: Tensor
    valid: Tensor
    weights: Tensor
    base_weights: Tensor
    sequences: Sequences
    cu_seqlens: Tensor | None
    ignore_index: int
    counts: Tensor | None = None
    mean_count: Tensor | None = None

    @staticmethod
    def of(
        labels: Tensor,
        token_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        spec: LossSpec,
        ignore_index: int,
        dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> Batch:
        """Fold mask, weights and LD-DPO into one weight per row. With a `shard` rows are a part of each sequence."""
        sequences = Sequences.of(labels, cu_seqlens, shard)
        valid = labels != ignore_index
        base = valid.to(dtype)
        if token_weights is None and spec.ld_alpha is None:
            return Batch(
                labels=labels,
                valid=valid,
                weights=base,
                base_weights=base,
                sequences=sequences,
                cu_seqlens=cu_seqlens,
                ignore_index=ignore_index,
            )
        if token_weights is not None:
            base = torch.where(valid, token_weights.to(dtype), 0.0)
            valid = base != 0
        weights = base
        if spec.ld_alpha is not None:
            position = sequences.positions(valid)
            chosen, rejected = sequences.sums(valid.double()).chunk(2)
            shared = sequences.to_tokens(torch.minimum(chosen, rejected).repeat(2))
            weights = torch.where(position > shared, base * spec.ld_alpha, base)
        # WPO and SFT average over all tokens, also those that LD-DPO gives no weight.
        valid = (base if spec.use_weighting or not spec.discounted else weights) != 0
        labels = labels.masked_fill(~valid, ignore_index)
        return Batch(
            labels=labels,
            valid=valid,
            weights=weights,
            base_weights=base,
            sequences=sequences,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
        )

    @staticmethod
    def unpaired(
        labels: Tensor, token_weights: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int, dtype: torch.dtype
    ) -> Batch:
        """Rows of sequences that are not paired; labels `[S, T]`, or `[1, N]` with `cu_seqlens`."""
        plain = LossSpec(())
        return Batch.of(labels, token_weights, cu_seqlens, spec=plain, ignore_index=ignore_index, dtype=dtype)


class Reference(NamedTuple):
    """Where the reference's log-probs come from: at most one is set, none for a reference model or for log-probs of 0.

    tokens: `[S, T]`, per token; anything where a row is not valid.
    sequence_sums: `[2B]`, per sequence.
    """

    tokens: Tensor | None
    sequence_sums: Tensor | None

    @staticmethod
    def of(given: Any, labels: Tensor, sequences: int, dtype: torch.dtype) -> Reference:
        """Check cached log-probs: per token, per sequence, or 0.0.

        Args:
            given: `reference_logps` of the caller.
            labels: as the caller shaped them.
            sequences: how many there are.
            dtype: of the per-row results.
        """
        if not isinstance(given, Tensor):
            if isinstance(given, bool) or given != 0:
                raise ValueError(f"reference_logps must be a tensor or 0.0 (reference-free), got {given!r}")
            return NO_LOGPS
        per_token = given.shape == labels.shape
        if not per_token and given.shape != (sequences,):
            raise ValueError(
                f"reference_logps must have shape {tuple(labels.shape)} (per token) or ({sequences},)"
                f" (per sequence), got {tuple(given.shape)}"
            )
        logps = checks.like(given, "reference_logps", given.shape, labels, "labels")
        if logps.requires_grad:
            logps = logps.detach()
        if logps.dtype != dtype:
            logps = logps.to(dtype)
        if not per_token:
            return Reference(None, logps)
        return Reference(logps if labels.dim() == 2 else logps.unsqueeze(0), None)

    @property
    def given(self) -> Tensor | None:
        """What was given, as the operation `pair_loss` takes it."""
        return self.tokens if self.tokens is not None else self.sequence_sums


NO_LOGPS = Reference(None, None)  # where none were given


def check_token_weights(token_weights: Any, labels: Tensor, ignore_index: int) -> Tensor | None:
    """Per-token factors: floating point or bool, shaped like the labels, a constant; where the host can look, numbers
    of 0 or more in the valid rows."""
    if token_weights is None:
        return None
    if isinstance(token_weights, Tensor) and token_weights.dtype == torch.bool:
        token_weights = token_weights.float()
    weights = checks.like(token_weights, "token_weights", labels.shape, labels, "labels")
    if weights.requires_grad:
        raise ValueError("token_weights is a constant and gets no gradient; pass token_weights.detach()")
    if checks.readable(weights):
        wrong = ~((weights >= 0) & (weights < torch.inf)) & (labels != ignore_index)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"token_weights must be finite and 0 or more, got {weights[tuple(at)].item()} at"
                f" [{', '.join(map(str, at))}]"
            )
    return weights if labels.dim() == 2 else weights.unsqueeze(0)


def loss_and_rewards(
    stats: dict[str, Tensor], batch: Batch, reference: Reference, loss: Loss, backend: str, shape: torch.Size
) -> TokenDPOOutput:
    """Per-row results in, `TokenDPOOutput` out.

    Args:
        stats: the fields of `Loss.fields`, `[S, T]`; `logps` and `kl_reference_policy` may carry gradient.
        batch: the rows.
        reference: cached log-probs; when it is empty, `stats` holds those of the reference model.
        loss: what to compute.
        backend: name of the one that computes the default objective.
        shape: of the caller's labels.
    """
    spec, beta, reduction = loss
    logps, tokens = stats["logps"], stats.get("reference_logps")
    if loss.is_fused and batch.sequences.shard is None:
        call = _pair_call(stats, batch, reference, loss, backend)
        if logps.requires_grad:
            total, rewards, both = PairLoss.apply(logps, call)
        else:
            total, rewards, _, both = ops.pair_loss(call)
        per_token = halves(both)
    else:
        if tokens is None and reference.sequence_sums is None:  # 0 in rows that are not valid
            given = reference.tokens
            tokens = torch.zeros_like(batch.weights) if given is None else torch.where(batch.valid, given, 0.0)
        summed = Summed(
            sequences=batch.sequences,
            weights=batch.weights,
            base_weights=batch.base_weights,
            reference_tokens=tokens,
            reference_sums=reference.sequence_sums if tokens is None else None,
            counts=batch.counts,
            with_full_logps=spec.ld_alpha is not None and not spec.discounted,
        )
        totals = sequence_sums(logps, stats["kl_reference_policy"] if spec.needs_kl else None, summed)
        scores = _pair_scores(totals, batch, spec)
        losses = spec.losses(scores, beta, _wpo_weights(stats, batch) if spec.use_weighting else None)
        total = losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
        rewards, ratios = beta * totals.ratios, totals.row_ratios
        per_token = () if tokens is None or ratios is None else (beta * ratios, tokens)
    return assemble(total, rewards, stats, per_token, shape)


def _pair_call(stats: dict[str, Tensor], batch: Batch, reference: Reference, loss: Loss, backend: str) -> PairLossCall:
    """The arguments of the operation `pair_loss`."""
    return PairLossCall(
        logps=stats["logps"],
        reference_logps=stats.get("reference_logps", reference.given),
        labels=batch.labels,
        weights=batch.weights,
        cu_seqlens=batch.cu_seqlens,
        beta=loss.beta,
        label_smoothing=loss.spec.label_smoothing,
        ignore_index=batch.ignore_index,
        backend=backend,
    )


def halves(tokens: Tensor) -> tuple[Tensor, ...]:
    """The token rewards and the reference's log-probs, out of what `pair_loss` returns of both."""
    return (tokens[0], tokens[1]) if tokens.shape[0] else ()


def assemble(
    loss: Tensor, rewards: Tensor, stats: dict[str, Tensor], per_token: Sequence[Tensor], shape: torch.Size
) -> TokenDPOOutput:
    """The output of a loss that has been computed.

    Args:
        rewards: `[2B]`, chosen first.
        per_token: token rewards and the reference's log-probs, `[S, T]` each; empty where these came per sequence.
        shape: of the caller's labels.
    """
    pairs = rewards.shape[0] // 2
    logps, logsumexp = stats["logps"], stats["logsumexp"]
    if logps.requires_grad:
        logps = logps.detach()
    if logsumexp.requires_grad:
        logsumexp = logsumexp.detach()
    token_rewards, reference_tokens = per_token or (None, None)
    if logps.shape != shape:
        logps, logsumexp = logps.view(shape), logsumexp.view(shape)
        if token_rewards is not None and reference_tokens is not None:
            token_rewards, reference_tokens = token_rewards.view(shape), reference_tokens.view(shape)
    return TokenDPOOutput(
        loss=loss,
        chosen_rewards=rewards[:pairs],
        rejected_rewards=rewards[pairs:],
        token_logps=logps,
        reference_token_logps=reference_tokens,
        token_rewards=token_rewards,
        logsumexp=logsumexp,
    )


def loss_gradient(
    stats: dict[str, Tensor], batch: Batch, reference: Reference, loss: Loss, backend: str
) -> dict[str, Tensor]:
    """d(sum of the pairs' losses) / d(field), for the fields that a loss differentiates. Arguments as above."""
    if loss.spec.is_default:
        of_mean: Tensor = ops.pair_loss(_pair_call(stats, batch, reference, loss, backend))[2]
        return {"logps": of_mean * (batch.sequences.number // 2)}
    leaves: dict[str, Tensor] = {name: stats[name].detach().requires_grad_() for name in loss.differentiable}
    with torch.enable_grad():
        summed = loss._replace(reduction="sum")
        shape = batch.labels.shape
        total = loss_and_rewards({**stats, **leaves}, batch, reference, summed, backend, shape=shape).loss
    if not total.requires_grad:  # a caller's loss that is a constant
        return {"logps": torch.zeros_like(stats["logps"])}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _pair_scores(totals: Totals, batch: Batch, spec: LossSpec) -> PairScores:
    """What objectives see of a batch."""
    of = totals.parts
    chosen_kl, rejected_kl = of.get("kl", (None, None))
    return PairScores(
        chosen_log_ratios=of["ratios"][0],
        rejected_log_ratios=of["ratios"][1],
        chosen_logps=of["logps"][0],
        rejected_logps=of["logps"][1],
        reference_chosen_logps=of["reference"][0],
        reference_rejected_logps=of["reference"][1],
        chosen_counts=of["counts"][0],
        rejected_counts=of["counts"][1],
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
        chosen_full_logps=of["full_logps"][0] if "full_logps" in of else None,
        chosen_mean_count=None if batch.mean_count is None else batch.mean_count.to(batch.weights.dtype),
        f_divergence=spec.f_divergence,
        f_alpha_divergence_coef=spec.f_alpha_divergence_coef,
    )


def _wpo_weights(stats: dict[str, Tensor], batch: Batch) -> Tensor:
    """WPO (Zhou et al. 2024, eq. 2): exp of the mean of log pi - log sum pi^2, of both sequences; no gradient."""
    aligned = torch.where(batch.base_weights == 0, 0.0, stats["logps"].detach() - stats["log_sum_sq_probs"])
    total, counts = batch.sequences.sums_of([batch.base_weights * aligned, batch.base_weights])
    factors = torch.exp(total / torch.where(counts > 0, counts, 1.0)).to(aligned.dtype)
    chosen, rejected = factors.chunk(2)
    return chosen * rejected
