"""From per-token log-probs to a preference loss and token rewards: what every path into an objective shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import FiniteGradients
from ..autograd.logits import PairLoss
from ..backends import ops
from ..core import checks
from ..core.columns import BIT
from ..core.sequences import Sequences, Shard, log_ratios
from ..head.plan import LinearPlan
from ..objectives import LossSpec, PairScores


class TokenDPOOutput(NamedTuple):
    """What the preference losses return. Only `loss` carries gradient.

    loss: `[]`, or `[B]` with reduction="none".
    chosen_rewards, rejected_rewards: `[B]`, beta times the weighted sum of log-ratios over each sequence.
    token_logps: log pi(label) per row, shaped like `labels`; 0 at ignored rows, as in all per-token outputs.
    reference_token_logps: log pi_ref(label) per row; None when the reference came as per-sequence sums.
    token_rewards: beta * (token_logps - reference_token_logps); None when the reference came as per-sequence sums.
    logsumexp: per row; V(s) = beta * logsumexp.

    Besides these fields it has an attribute `plan`: what `fused_linear_token_dpo` did (`LinearPlan`); None from logits,
    from inside torch.compile, and where a wrapper such as FSDP has rebuilt the tuple.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logsumexp: Tensor

    @property
    def plan(self) -> LinearPlan | None:
        return None


class PlannedOutput(TokenDPOOutput):
    """A `TokenDPOOutput` that knows its plan, which is not one of the fields: they are tensors.

    To torch it is a named tuple of tensors; where torch takes it apart and builds it anew (hooks of FSDP, the first
    step of DDP with a static graph), the plan is None afterwards.
    """

    plan: LinearPlan | None = None  # type: ignore[assignment]

    @staticmethod
    def of(output: TokenDPOOutput, plan: LinearPlan | None) -> PlannedOutput:
        planned = PlannedOutput(*output)
        planned.plan = plan
        return planned


class Batch(NamedTuple):
    """The rows of a preference batch and what each counts for.

    labels: int64 `[S, T]`, with `ignore_index` also where the weight is 0.
    used: bool `[S, T]`, the rows that are not ignored.
    weights: fp32 `[S, T]`, factors in the sequence sums, LD-DPO's included; 0 at ignored rows.
    base_weights: the same before LD-DPO.
    sequences, cu_seqlens: the grouping of the rows.
    ignore_index: the label of rows that are not used.
    counts: fp64 `[2B]`, sums of `base_weights` over the whole sequences, where these rows are not all that the sums
        are over; None where they are.
    """

    labels: Tensor
    used: Tensor
    weights: Tensor
    base_weights: Tensor
    sequences: Sequences
    cu_seqlens: Tensor | None
    ignore_index: int
    counts: Tensor | None = None

    @staticmethod
    def of(
        labels: Tensor,
        token_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        plan: LossSpec,
        ignore_index: int,
        dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> Batch:
        """Fold mask, weights and LD-DPO into one weight per row. With a `shard` rows are a part of each sequence."""
        sequences = Sequences.of(labels, cu_seqlens, shard)
        valid = labels != ignore_index
        base = valid.to(dtype)
        if token_weights is None and plan.ld_alpha is None:
            return Batch(labels, valid, base, base, sequences, cu_seqlens, ignore_index)
        if token_weights is not None:
            base = torch.where(valid, token_weights.to(dtype), 0.0)
            valid = base != 0
        weights = base
        if plan.ld_alpha is not None:
            position = sequences.positions(valid)
            chosen, rejected = sequences.sums(valid.double()).chunk(2)
            shared = sequences.to_tokens(torch.minimum(chosen, rejected).repeat(2))
            weights = torch.where(position > shared, base * plan.ld_alpha, base)
        # WPO and SFT average over all tokens, also those that LD-DPO gives no weight.
        used = (base if plan.use_weighting or not plan.discounted else weights) != 0
        labels = labels.masked_fill(~used, ignore_index)
        return Batch(labels, used, weights, base, sequences, cu_seqlens, ignore_index)


class Reference(NamedTuple):
    """Where the reference's log-probs come from: at most one is set, none for reference logits or for log-probs of 0.

    tokens: `[S, T]`, per token; anything where a row is not used.
    sequence_sums: `[2B]`, per sequence.
    """

    tokens: Tensor | None
    sequence_sums: Tensor | None

    @property
    def given(self) -> Tensor | None:
        """What was given, as the operation `pair_loss` takes it."""
        return self.tokens if self.tokens is not None else self.sequence_sums

    @staticmethod
    def of(
        reference_logps: Any,
        has_live_reference: bool,
        live_name: str,
        plan: LossSpec,
        labels: Tensor,
        sequences: int,
        dtype: torch.dtype,
    ) -> Reference:
        """Check the caller's choice of reference.

        Args:
            reference_logps: the argument of that name.
            has_live_reference: whether the reference model's own rows were given, as the argument `live_name`.
            plan: the loss, which may do without a reference or insist on a live one.
            labels: the caller's labels, for their shape and device.
            sequences: how many there are, 2B.
            dtype: of the per-row results.
        """
        if has_live_reference:
            if reference_logps is not None:
                raise ValueError(f"give either {live_name} or reference_logps, not both")
            return Reference(None, None)
        if plan.needs_kl:
            raise ValueError(f"this loss_type needs KL(reference || policy) per token, hence {live_name}")
        if reference_logps is None:
            if plan.reference_free:
                return Reference(None, None)
            raise ValueError(
                f"no reference: give {live_name}, or reference_logps (cached log-probs; 0.0 for reference-free)"
            )
        if not isinstance(reference_logps, Tensor):
            if isinstance(reference_logps, bool) or reference_logps != 0:
                raise ValueError(f"reference_logps must be a tensor or 0.0 (reference-free), got {reference_logps!r}")
            return Reference(None, None)
        if reference_logps.shape == labels.shape:
            tokens = checks.like(reference_logps, "reference_logps", labels.shape, labels, "labels").detach().to(dtype)
            return Reference(tokens if labels.dim() == 2 else tokens.unsqueeze(0), None)
        if reference_logps.shape != (sequences,):
            raise ValueError(
                f"reference_logps must have shape {tuple(labels.shape)} (per token) or ({sequences},)"
                f" (per sequence), got {tuple(reference_logps.shape)}"
            )
        sums = checks.like(reference_logps, "reference_logps", torch.Size([sequences]), labels, "labels").detach()
        return Reference(None, sums.to(dtype))


def check_token_weights(token_weights: Any, labels: Tensor) -> Tensor | None:
    """Per-token factors: floating point or bool, shaped like the labels, a constant."""
    if token_weights is None:
        return None
    if isinstance(token_weights, Tensor) and token_weights.dtype == torch.bool:
        token_weights = token_weights.float()
    weights = checks.like(token_weights, "token_weights", labels.shape, labels, "labels")
    if weights.requires_grad:
        raise ValueError("token_weights is a constant and gets no gradient; pass token_weights.detach()")
    return weights if labels.dim() == 2 else weights.unsqueeze(0)


def described(plan: LossSpec, beta: float, reduction: str, cu_seqlens: Any, live: bool) -> dict[str, Any]:
    """What ranks that share a loss have to agree on, by name."""
    terms = [(term.name or term.function.__qualname__, weight, options) for term, weight, options in plan.terms]
    link = (plan.f_divergence, plan.f_alpha_divergence_coef)
    return {
        "the loss": (terms, plan.label_smoothing, link, plan.ld_alpha, plan.use_weighting),
        "beta": beta,
        "reduction": reduction,
        "a packed batch": cu_seqlens is not None,
        "a live reference": live,
    }


def columns(plan: LossSpec, has_live_reference: bool) -> int:
    """The per-row results that a loss needs."""
    wanted = BIT["logps"] | BIT["logsumexp"]
    if has_live_reference:
        wanted |= BIT["reference_logps"]
    if plan.needs_kl:
        wanted |= BIT["kl_reference_policy"]
    if plan.use_weighting:
        wanted |= BIT["log_sum_sq_probs"]
    return wanted


def carrying(plan: LossSpec) -> tuple[str, ...]:
    """Those of them that a loss differentiates."""
    return ("logps", "kl_reference_policy") if plan.needs_kl else ("logps",)


def loss_and_rewards(
    stats: dict[str, Tensor],
    batch: Batch,
    reference: Reference,
    plan: LossSpec,
    beta: float,
    reduction: str,
    backend: str,
    shape: torch.Size,
) -> TokenDPOOutput:
    """Per-row results in, `TokenDPOOutput` out.

    Args:
        stats: the columns of `columns(...)`, `[S, T]`; `logps` and `kl_reference_policy` may carry gradient.
        batch: the rows.
        reference: cached log-probs; when it is empty, `stats` holds the live reference's.
        plan, beta, reduction: the loss.
        backend: who computes the default objective.
        shape: of the caller's labels.
    """
    logps, tokens = stats["logps"], stats.get("reference_logps")
    if plan.is_default and reduction == "mean" and batch.sequences.shard is None:
        loss, rewards, both = PairLoss.apply(
            logps, reference.given if tokens is None else tokens, batch.labels, batch.weights, batch.cu_seqlens, beta,
            plan.label_smoothing, batch.ignore_index, backend,
        )  # fmt: skip
        per_token = both.unbind(0)
    else:
        if tokens is None and reference.sequence_sums is None:  # 0 in rows that are not used
            tokens = torch.zeros_like(batch.weights)
            tokens = tokens if reference.tokens is None else torch.where(batch.used, reference.tokens, tokens)
        scores = pair_scores(stats, batch, tokens, reference.sequence_sums, plan)
        losses = plan.losses(scores, beta, _wpo_weights(stats, batch) if plan.use_weighting else None)
        loss = losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
        rewards = beta * torch.cat([scores.chosen_log_ratios, scores.rejected_log_ratios]).detach()
        per_token = () if tokens is None else (log_ratios(logps.detach(), tokens).mul_(beta), tokens)
    return assemble(loss, rewards, stats, per_token, shape)


def assemble(
    loss: Tensor,
    rewards: Tensor,
    stats: dict[str, Tensor],
    per_token: tuple[Tensor, ...],
    shape: torch.Size,
) -> TokenDPOOutput:
    """The output of a loss that has been computed.

    Args:
        rewards: `[2B]`, chosen first.
        per_token: token rewards and the reference's log-probs, `[S, T]` each; empty where these came per sequence.
        shape: of the caller's labels.
    """
    chosen_rewards, rejected_rewards = rewards.chunk(2)
    token_rewards, reference_tokens = per_token or (None, None)
    return TokenDPOOutput(
        loss,
        chosen_rewards,
        rejected_rewards,
        _shaped(_constant(stats["logps"]), shape),
        None if reference_tokens is None else _shaped(reference_tokens, shape),
        None if token_rewards is None else _shaped(token_rewards, shape),
        _shaped(_constant(stats["logsumexp"]), shape),
    )


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows if rows.shape == shape else rows.view(shape)


def loss_gradient(
    stats: dict[str, Tensor], batch: Batch, reference: Reference, plan: LossSpec, beta: float, backend: str
) -> dict[str, Tensor]:
    """d(sum of the pairs' losses) / d(column), for the columns that a loss differentiates. Arguments as above."""
    if plan.is_default:
        tokens = stats.get("reference_logps", reference.given)
        args = (batch.labels, batch.weights, batch.cu_seqlens, beta, plan.label_smoothing, batch.ignore_index, backend)
        of_mean = ops.run("pair_loss", stats["logps"], tokens, *args)[2]
        return {"logps": of_mean * (batch.sequences.number // 2)}
    leaves: dict[str, Tensor] = {name: stats[name].detach().requires_grad_() for name in carrying(plan)}
    with torch.enable_grad():
        loss = loss_and_rewards(
            {**stats, **leaves}, batch, reference, plan, beta, "sum", backend, batch.labels.shape
        ).loss
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def pair_scores(
    stats: dict[str, Tensor],
    batch: Batch,
    reference_tokens: Tensor | None,
    reference_sums: Tensor | None,
    plan: LossSpec,
) -> PairScores:
    """Per-token results summed to what objectives see. Ratios are summed as ratios: sums of log-probs are thousands
    of times larger, and their difference would have lost the digits."""
    sequences, weights = batch.sequences, batch.weights
    per_token = {"logps": weights * stats["logps"]}
    if batch.counts is None:
        per_token["counts"] = batch.base_weights
    if plan.needs_kl:
        per_token["kl"] = weights * stats["kl_reference_policy"]
    if plan.ld_alpha is not None and not plan.discounted:
        per_token["full_logps"] = batch.base_weights * stats["logps"]
    if reference_tokens is not None:
        per_token["ratios"] = weights * log_ratios(stats["logps"], reference_tokens)
        per_token["reference"] = weights * reference_tokens
    sums = dict(zip(per_token, sequences.sums_of(list(per_token.values())), strict=True))
    if reference_tokens is None:
        assert reference_sums is not None
        sums["reference"] = reference_sums.double()
        sums["ratios"] = log_ratios(sums["logps"], sums["reference"])
    if batch.counts is not None:
        sums["counts"] = batch.counts
    totals = FiniteGradients.apply(*(total.to(weights.dtype) for total in sums.values()))
    halves = {name: total.chunk(2) for name, total in zip(sums, totals, strict=True)}
    chosen_kl, rejected_kl = halves.get("kl", (None, None))
    return PairScores(
        chosen_log_ratios=halves["ratios"][0],
        rejected_log_ratios=halves["ratios"][1],
        chosen_logps=halves["logps"][0],
        rejected_logps=halves["logps"][1],
        reference_chosen_logps=halves["reference"][0],
        reference_rejected_logps=halves["reference"][1],
        chosen_counts=halves["counts"][0],
        rejected_counts=halves["counts"][1],
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
        chosen_full_logps=halves["full_logps"][0] if "full_logps" in halves else None,
        f_divergence=plan.f_divergence,
        f_alpha_divergence_coef=plan.f_alpha_divergence_coef,
    )


def _wpo_weights(stats: dict[str, Tensor], batch: Batch) -> Tensor:
    """WPO (Zhou et al. 2024, eq. 2): exp of the mean of log pi - log sum pi^2, of both sequences; no gradient."""
    aligned = torch.where(batch.base_weights == 0, 0.0, stats["logps"].detach() - stats["log_sum_sq_probs"])
    total, counts = batch.sequences.sums_of([batch.base_weights * aligned, batch.base_weights])
    factors = torch.exp(total / torch.where(counts > 0, counts, 1.0)).to(aligned.dtype)
    chosen, rejected = factors.chunk(2)
    return chosen * rejected
