"""Policy losses from per-token log-probs: ratios, KL penalty, importance correction, entropy bonus, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..autograd import FiniteGradient
from ..core import checks
from ..core.sequences import Sequences, log_ratios
from ..distributed.fingerprint import Fingerprint, words
from ..distributed.groups import gather_vectors, process_group
from ..head.plan import LinearPlan
from ..objectives.policy import CORRECTED_INSIDE, LEVELS, REDUCTIONS, PolicyObjective, PolicyScores, resolve_policy
from ..objectives.scores import expm1, finite_exp
from ..objectives.units import check_once
from .preference import Batch
from .results import TokenStats
from .unit_chunks import Part
from .unit_loss import LossArguments, UnitLoss, fields_of, per_token

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# A log-ratio of more than this is not exponentiated: rho continues as a logarithm there.
_OVERFLOW = {torch.float32: 80.0, torch.float64: 700.0}


class PolicyMetrics(NamedTuple):
    """Numbers of one call of a policy loss, each a constant `[]` on the device; over valid tokens. None without.

    policy_loss: the loss before the entropy bonus, the KL penalty included.
    ratio_mean, ratio_min, ratio_max: of rho, of the sequence where the loss has such a ratio.
    clip_low, clip_high: shares of tokens whose ratio is below 1 - epsilon with A < 0, above 1 + epsilon_high with A > 0
        (CISPO: above epsilon_high with A > 0).
    overflows: tokens whose ratio is too large for the dtype; the loss goes on with a finite one.
    old_kl: mean of exp(x) - 1 - x at x = logps - old_logps, an estimate of KL(old || pi).
    kl: mean of exp(y) - 1 - y at y = reference_logps - logps, an estimate of KL(pi || pi_ref); needs a reference.
    entropy: mean, in nats; where the loss reads it.
    importance_mean: of the correction for the engine that sampled.
    idle_rows: valid rows without a gradient, which have left the GEMMs of the backward (from logits: which it does not
        read). None where the plan makes no use of them.
    """

    policy_loss: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clip_low: Tensor | None
    clip_high: Tensor | None
    overflows: Tensor
    old_kl: Tensor
    kl: Tensor | None
    entropy: Tensor | None
    importance_mean: Tensor | None
    idle_rows: Tensor | None


class _PolicyFields(NamedTuple):
    """The fields of a `PolicyOutput`."""

    loss: Tensor
    token_logps: Tensor
    token_ratios: Tensor
    token_kl: Tensor | None
    metrics: PolicyMetrics
    stats: TokenStats | None


class PolicyOutput(_PolicyFields):
    """What the policy losses return. Only `loss` carries gradient.

    loss: `[]`, or shaped like `labels` with reduction="none".
    token_logps: log pi(label) per row, shaped like `labels`; 0 at ignored rows, as in all per-token outputs.
    token_ratios: rho per row; that of the sequence at each of its tokens where the loss has such a ratio.
    token_kl: exp(y) - 1 - y per row at y = log pi_ref - log pi; None without a reference.
    metrics: `PolicyMetrics`.
    stats: `TokenStats` with the `outputs` asked for; None without.

    Besides these fields it has an attribute `plan`: what `fused_linear_policy_loss` did (`LinearPlan`); None from
    logits and from inside torch.compile.
    """

    plan: LinearPlan | None = None


class PolicyOptions(NamedTuple):
    """Checked options of a policy loss that do not depend on tensors.

    objective: with its options.
    level, reduction: its own or the caller's.
    beta: of the KL penalty; corrected_kl: whether it is multiplied by the ratio.
    correction: one of `CORRECTIONS` or None, with its limits.
    entropy_coef: of the entropy bonus.
    entropy_quantile: share of the tokens, those of the highest entropy, that the policy's loss is taken over.
    entropy_group: the process group whose ranks' tokens are compared for that, or None.
    off_policy_threshold: sequences of negative advantage that are further off are left out; None for none.
    """

    objective: PolicyObjective
    level: str
    reduction: str
    beta: float
    corrected_kl: bool
    correction: str | None
    limits: tuple[float | None, float | None]
    entropy_coef: float
    entropy_quantile: float
    entropy_group: Any
    off_policy_threshold: float | None
    max_completion_length: int | None
    on_policy: bool

    @property
    def unit(self) -> str:
        """What the loss of a token depends on."""
        if self.objective.unit == "batch" or self.entropy_quantile < 1:
            return "batch"
        by_sequence = (
            self.objective.unit == "sequence"
            or self.level != "token"
            or self.off_policy_threshold is not None
            or (self.on_policy and self.correction is not None and self.correction.startswith("sequence"))
        )
        return "sequence" if by_sequence else "token"

    @property
    def reads_entropy(self) -> bool:
        return self.entropy_coef != 0 or self.entropy_quantile < 1


class PolicyArguments(LossArguments[PolicyOutput]):
    """The arguments of the policy losses, named as there."""

    def __init__(self, options: PolicyOptions, given: Mapping[str, Any]):
        self.options, self.given = options, given

    @staticmethod
    def check(given: Mapping[str, Any]) -> PolicyArguments:
        """Check what does not depend on tensors; `given` has all arguments by name."""
        own: dict[str, Any] = dict(_mapping(given["loss_kwargs"]))
        for name in ("epsilon", "epsilon_high", "delta"):
            if given[name] is not None:
                if name in own:
                    raise ValueError(f"{name} is given both as an argument and in loss_kwargs")
                own[name] = given[name]
        shared = {name: own.pop(name) for name in _SHARED if name in own}
        objective = resolve_policy(given["loss_type"], own)
        level, reduction = given["importance_sampling_level"], given["reduction"]
        level = objective.level if level is None else checks.choice(level, "importance_sampling_level", LEVELS)
        reduction = objective.reduction if reduction is None else checks.choice(reduction, "reduction", REDUCTIONS)
        correction = given["importance_correction"]
        if correction is not None:
            correction = checks.choice(correction, "importance_correction", CORRECTIONS)
        options = PolicyOptions(
            objective=objective,
            level=level,
            reduction=reduction,
            beta=_number(given["beta"], "beta"),
            corrected_kl=checks.flag(shared.get("corrected_kl", False), "loss_kwargs['corrected_kl']"),
            correction=correction,
            limits=_limits(given["correction_min"], given["correction_max"], correction),
            entropy_coef=_number(given["entropy_coef"], "entropy_coef", signed=True),
            entropy_quantile=_share(shared.get("entropy_quantile", 1.0)),
            entropy_group=_entropy_group(shared),
            off_policy_threshold=_optional(shared.get("off_policy_threshold"), "loss_kwargs['off_policy_threshold']"),
            max_completion_length=_length(given["max_completion_length"], reduction),
            on_policy=checks.flag(given["on_policy"], "on_policy"),
        )
        _check_combination(options, given)
        return PolicyArguments(options, given)

    def tensors(self) -> dict[str, Any]:
        names = ("advantages", "old_logps", "reference_logps", "sampling_logps")
        found = {name: self.given[name] for name in names}
        items = self.given["num_items_in_batch"]
        return {**found, "num_items_in_batch": items if isinstance(items, Tensor) else None}

    def fingerprint(self) -> PolicyFingerprint:
        objective, items = self.options.objective, self.given["num_items_in_batch"]
        named = objective.name or objective.function.__qualname__
        return PolicyFingerprint(
            loss=(named, sorted(objective.options.items()), self.options._replace(entropy_group=None)[1:]),
            num_items=None if isinstance(items, Tensor) else items,
        )

    def token_weights(self, labels: Tensor, ignore_index: int) -> Tensor | None:
        return None

    def of(self, labels: Tensor, batch: Batch, has_model: bool) -> PolicyLoss:
        return PolicyLoss(self, labels, batch, has_model)


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyFingerprint(Fingerprint):
    """Of a policy loss: its name and options, and the number of tokens it is divided by where that is a number."""

    loss: tuple[Any, ...] = field(metadata=words("the loss"))
    num_items: float | None = field(metadata=words("num_items_in_batch as a number"))


class PolicyLoss(UnitLoss[PolicyOutput]):
    """A policy loss with its tensors: all of them `[S, T]`, 0 at ignored rows.

    `scale` is what each token's loss counts for in the reduced loss.
    """

    def __init__(self, arguments: PolicyArguments, labels: Tensor, batch: Batch, has_model: bool):
        self.options, given = arguments.options, arguments.given
        options = self.options
        self.unit = options.unit
        self.fields = fields_of(
            *(("reference_logps",) if has_model else ()), *(("entropy",) if options.reads_entropy else ())
        )
        self.differentiable = ("logps", "entropy") if options.entropy_coef else ("logps",)
        self.shape, self.batch = labels.shape, batch
        self.advantages = _advantages(given["advantages"], labels, batch)
        self.old = None if options.on_policy else per_token(given["old_logps"], "old_logps", labels, batch)
        self.reference = _reference(given["reference_logps"], labels, batch, has_model, options.beta)
        self.sampling = None
        if given["sampling_logps"] is not None:
            self.sampling = per_token(given["sampling_logps"], "sampling_logps", labels, batch)
        # Without old log-probs the correction is a function of the policy's own.
        self.importance = None if self.old is None else self._importance(self.old, Part.whole(batch))
        self.scale = _scale(batch, options, given["num_items_in_batch"])
        self.threshold: Tensor | None = None  # of the entropy

    def unreduced(self) -> str | None:
        return (
            "reduction='none' leaves each token's factor to what follows" if self.options.reduction == "none" else None
        )

    def active(self) -> Tensor | None:
        options = self.options
        if not options.objective.scaled or options.beta or options.entropy_coef:
            return None
        active = self.advantages != 0
        # A loss that takes the correction itself does not multiply by it: of importance 0 it has a gradient, too.
        inside = options.objective.name in CORRECTED_INSIDE
        return active if self.importance is None or inside else active & (self.importance != 0)

    def _importance(self, old: Tensor, part: Part) -> Tensor | None:
        """exp(old - sampling) per token or of the sequence, truncated or masked; 1 where sampling has a NaN."""
        mode = self.options.correction
        if self.sampling is None or mode is None:
            return None
        difference = (old.detach() - part.rows(self.sampling)).nan_to_num(nan=0.0)
        if mode.startswith("sequence"):
            sequences = part.batch.sequences
            difference = sequences.to_tokens(sequences.sums(torch.where(part.batch.valid, difference, 0.0)))
        ratio = finite_exp(torch.exp, difference)
        low, high = self.options.limits
        if mode.endswith("truncate"):
            return ratio if low is None and high is None else ratio.clamp(low, high)
        outside = torch.zeros_like(ratio, dtype=torch.bool)
        outside = outside if low is None else outside | (ratio < low)
        outside = outside if high is None else outside | (ratio > high)
        return ratio.masked_fill(outside, 0.0)

    def scores(self, stats: Mapping[str, Tensor], part: Part) -> PolicyScores:
        """What the objective sees of a part."""
        options, valid = self.options, part.batch.valid
        logps = FiniteGradient.apply(stats["logps"])
        old = logps.detach() if self.old is None else part.rows(self.old)
        reference = stats.get("reference_logps")
        if reference is None and self.reference is not None:
            reference = part.rows(self.reference)
        importance = self._importance(old, part) if self.old is None else self.importance
        if importance is not None and self.old is not None:
            importance = part.rows(importance)
        sequences = None if self.unit == "token" else part.batch.sequences.for_rows()
        scores = PolicyScores(
            logps=logps,
            old_logps=old,
            log_ratios=log_ratios(logps, old),
            advantages=part.rows(self.advantages),
            reference_logps=reference,
            sampling_logps=None if self.sampling is None else part.rows(self.sampling),
            entropy=stats["entropy"].detach() if "entropy" in stats else None,
            importance=importance,
            valid=valid,
            sequences=sequences,
        )
        if options.level == "token":
            return scores
        total = scores.sequence_mean if options.level == "sequence" else scores.sequence_sum
        return replace(scores, log_ratios=total(scores.log_ratios))

    def per_token(self, scores: PolicyScores, stats: Mapping[str, Tensor]) -> Tensor:
        """The loss of each token, without the entropy bonus."""
        options, objective = self.options, self.options.objective
        losses = objective.function(scores, **objective.options)
        self._check(losses, scores)
        if options.off_policy_threshold is not None:
            sampled = scores.old_logps if scores.sampling_logps is None else scores.sampling_logps
            distance = scores.sequence_mean((sampled - scores.logps.detach()).nan_to_num(nan=0.0))
            losses = losses * ((scores.advantages >= 0) | (distance <= options.off_policy_threshold))
        if options.entropy_quantile < 1:
            losses = losses * self.wanted(stats)
        if scores.importance is not None and objective.name not in CORRECTED_INSIDE:
            losses = losses * scores.importance
        if options.beta:
            penalty = k3(scores)
            losses = losses + options.beta * (penalty * scores.ratios if options.corrected_kl else penalty)
        assert scores.valid is not None
        return torch.where(scores.valid, losses, 0.0)

    def _check(self, losses: Any, scores: PolicyScores) -> None:
        """A user's function has to return one loss per token, and to keep the unit that it declares."""
        objective, valid = self.options.objective, scores.valid
        if objective.name:
            return
        function = objective.function
        if not isinstance(losses, Tensor) or losses.shape != scores.logps.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(
                f"loss_type {name} must return one loss per token, shape {tuple(scores.logps.shape)}; got {got}"
            )
        if objective.unit == "batch" or valid is None or not checks.readable(losses):
            return
        if objective.unit == "token":
            tokens = _each(scores, lambda value: value[valid])
            check_once(function, "token", lambda s: function(s, **objective.options), tokens, losses[valid])
            return
        dense = _as_dense(scores)
        check_once(function, "sequence", _of_sequences(function, objective.options), dense,
                   _of_sequences(function, objective.options)(dense))  # fmt: skip

    def wanted(self, stats: Mapping[str, Tensor]) -> Tensor:
        """bool, the valid tokens of the highest entropy, among those of all ranks that share the batch."""
        valid, entropy, shard = self.batch.valid, stats["entropy"].detach(), self.batch.sequences.shard
        if self.threshold is None:  # once: each rank sends the same number of messages
            group, share = self.options.entropy_group, 1 - self.options.entropy_quantile
            if group is not None:
                compared = gather_vectors(entropy[valid].float(), group)
            elif shard is not None:
                compared = shard.gather(entropy[valid].float())
            else:  # (Not the valid ones alone: for their number the host would wait for a GPU.)
                compared = entropy.float().masked_fill(~valid, torch.nan)
            # Of no valid tokens it is NaN, which selects none.
            self.threshold = compared.nanquantile(share) if compared.numel() else entropy.new_zeros(())
        return valid & (entropy.float() >= self.threshold)  # as it was compared: fp64 might lie below its own rounding

    def everywhere(self, value: Tensor) -> Tensor:
        """The sum over the ranks of `sp_group`; the value itself without."""
        shard = self.batch.sequences.shard
        return value if shard is None else shard.sum(value)

    def total(self, stats: Mapping[str, Tensor], part: Part) -> Tensor:
        losses = self.per_token(self.scores(stats, part), stats)
        total = self.everywhere((losses.double() * part.rows(self.scale)).sum())
        return total - self._bonus(stats, part) if self.options.entropy_coef else total

    def _bonus(self, stats: Mapping[str, Tensor], part: Part) -> Tensor:
        """The entropy bonus: its factor times the mean entropy of the tokens that the loss is taken over, fp64."""
        wanted = part.rows(self.batch.valid) if self.options.entropy_quantile >= 1 else self.wanted(stats)
        number = (self.batch.valid if self.options.entropy_quantile >= 1 else wanted).sum()
        number = self.everywhere(number).clamp_min(1)
        summed = self.everywhere(torch.where(wanted, stats["entropy"].double(), 0.0).sum())
        return self.options.entropy_coef * summed / number

    def output(self, stats: Mapping[str, Tensor], part: Part, known: Mapping[str, Any]) -> PolicyOutput:
        options, dtype = self.options, self.batch.weights.dtype
        scores = self.scores(stats, part)
        losses = self.per_token(scores, stats)
        if options.reduction == "none":
            loss = losses.reshape(self.shape)
            policy_loss = self.everywhere(losses.detach().sum())
        else:
            total = self.everywhere((losses.double() * self.scale).sum())
            policy_loss = total.detach().to(dtype)
            loss = (total - self._bonus(stats, part) if options.entropy_coef else total).to(dtype)
        with torch.no_grad():
            scores = replace(scores, logps=scores.logps.detach(), log_ratios=scores.log_ratios.detach())
            token_kl = None if scores.reference_logps is None else torch.where(self.batch.valid, k3(scores), 0.0)
            ratios = torch.where(self.batch.valid, scores.ratios, 0.0)
            idle = None if known["idle_rows"] is None else self.everywhere(known["idle_rows"])
            metrics = self._metrics(scores, token_kl, policy_loss, idle)
        return PolicyOutput(
            loss=loss,
            token_logps=scores.logps.reshape(self.shape),
            token_ratios=ratios.reshape(self.shape),
            token_kl=None if token_kl is None else token_kl.reshape(self.shape),
            metrics=metrics,
            stats=known["stats"],
        )

    def _metrics(
        self, scores: PolicyScores, token_kl: Tensor | None, policy_loss: Tensor, idle: Tensor | None
    ) -> PolicyMetrics:
        valid, ratios = self.batch.valid, scores.ratios
        number = self.everywhere(valid.sum()).clamp_min(1)

        def mean(values: Tensor) -> Tensor:
            summed = self.everywhere(torch.where(valid, values.double(), 0.0).sum())
            return (summed / number).to(policy_loss.dtype)

        lowest, highest = self._range(ratios)

        low, high = self._clips(scores)
        own = log_ratios(scores.logps, scores.old_logps)
        return PolicyMetrics(
            policy_loss=policy_loss,
            ratio_mean=mean(ratios),
            ratio_min=lowest,
            ratio_max=highest,
            clip_low=None if low is None else mean(low),
            clip_high=None if high is None else mean(high),
            overflows=self.everywhere((valid & (scores.log_ratios > _OVERFLOW[ratios.dtype])).sum()),
            old_kl=mean(finite_exp(expm1, own) - own),
            kl=None if token_kl is None else mean(token_kl),
            entropy=None if scores.entropy is None else mean(scores.entropy),
            importance_mean=None if scores.importance is None else mean(scores.importance),
            idle_rows=idle,
        )

    def _range(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest of valid tokens; NaN if there is none."""
        valid, shard = self.batch.valid, self.batch.sequences.shard
        none = torch.nan if shard is None else -torch.inf
        lowest, highest = (
            (x.masked_fill(~valid, -torch.inf).amax() if valid.numel() else x.new_tensor(none))
            for x in (-ratios, ratios)
        )
        if shard is not None:
            lowest, highest = shard.largest(lowest), shard.largest(highest)
        lowest, highest = (x.masked_fill(x == -torch.inf, torch.nan) for x in (lowest, highest))
        return -lowest, highest

    def _clips(self, scores: PolicyScores) -> tuple[Tensor | None, Tensor | None]:
        """Tokens that are clipped from below and from above; None where the loss has no such clip."""
        own, ratios, advantages = self.options.objective.options, scores.ratios, scores.advantages
        if self.options.objective.name == "cispo":
            return None, (ratios > own["epsilon_high"]) & (advantages > 0)
        if not self.options.objective.name or "epsilon" not in own:
            return None, None
        epsilon, high, delta = own["epsilon"], own["epsilon_high"], own["delta"]
        ratios = ratios if delta is None else ratios.clamp_max(delta)
        below = (ratios < 1 - epsilon) & (advantages < 0)
        return below, (ratios > 1 + (epsilon if high is None else high)) & (advantages > 0)


def k3(scores: PolicyScores) -> Tensor:
    """exp(y) - 1 - y at y = log pi_ref - log pi: 0 or more, with the mean KL(pi || pi_ref) (Schulman 2020)."""
    assert scores.reference_logps is not None
    y = log_ratios(scores.reference_logps, scores.logps)
    return finite_exp(expm1, y) - y


def _of_sequences(function: Callable[..., Tensor], options: Mapping[str, Any]) -> Callable[[PolicyScores], Tensor]:
    """From dense scores to the sum of each sequence's token losses."""

    def losses(scores: PolicyScores) -> Tensor:
        own = replace(scores, sequences=Sequences.of(scores.logps, None))
        assert scores.valid is not None
        return torch.where(scores.valid, function(own, **options), 0.0).sum(1)

    return losses


def _as_dense(scores: PolicyScores) -> PolicyScores:
    """Scores of a packed batch as `[S, T]`; the host reads where sequences end."""
    if scores.sequences is None or scores.sequences.offsets is None:
        return scores
    lengths = scores.sequences.offsets.diff().tolist()

    return _each(scores, lambda value: pad_sequence(value[0].detach().split(lengths), batch_first=True))


def _each(scores: PolicyScores, change: Callable[[Tensor], Tensor]) -> PolicyScores:
    """The scores with each of their tensors changed."""
    tensors = {name: change(value) for name, value in vars(scores).items() if isinstance(value, Tensor)}
    return replace(scores, **tensors)  # type: ignore[arg-type]


# Options that all policy losses take in `loss_kwargs`.
_SHARED = ("corrected_kl", "entropy_group", "entropy_quantile", "off_policy_threshold")


def _mapping(value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"loss_kwargs must be a mapping of option names to values, got {type(value).__name__}")
    return value or {}


def _number(value: Any, name: str, signed: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (value < 0 and not signed):
        raise ValueError(f"{name} must be finite{'' if signed else ' and 0 or more'}, got {value}")
    return float(value)


def _optional(value: Any, name: str) -> float | None:
    return None if value is None else _number(value, name)


def _share(value: Any) -> float:
    value = _number(value, "loss_kwargs['entropy_quantile']")
    if not 0 < value <= 1:
        raise ValueError(f"loss_kwargs['entropy_quantile'] must lie in (0, 1], got {value}")
    return value


def _entropy_group(shared: Mapping[str, Any]) -> Any:
    if shared.get("entropy_group") is None:
        return None
    if _share(shared.get("entropy_quantile", 1.0)) == 1:
        raise ValueError("loss_kwargs['entropy_group'] has no meaning without entropy_quantile below 1")
    return process_group(shared["entropy_group"], "loss_kwargs['entropy_group']")


def _limits(low: Any, high: Any, correction: str | None) -> tuple[float | None, float | None]:
    low, high = _optional(low, "correction_min"), _optional(high, "correction_max")
    if correction is None and (low is not None or high is not None):
        raise ValueError("correction_min and correction_max have no meaning without importance_correction")
    if low is not None and high is not None and low > high:
        raise ValueError(f"correction_min must not be above correction_max, got {low} and {high}")
    return low, high


def _length(value: Any, reduction: str) -> int | None:
    if reduction != "fixed_length":
        if value is not None:
            raise ValueError(f"max_completion_length has no meaning for reduction={reduction!r}")
        return None
    if value is None:
        raise ValueError("reduction 'fixed_length' (Dr. GRPO) needs max_completion_length, tokens per sequence")
    if checks.row_count(value, "max_completion_length") == 0:
        raise ValueError("max_completion_length must be 1 or more, got 0")
    return int(value)


def _check_combination(options: PolicyOptions, given: Mapping[str, Any]) -> None:
    """Tensors that the loss needs and does not have, or has and does not read."""
    name = options.objective.name or getattr(options.objective.function, "__name__", "of the caller")
    if given["old_logps"] is None and not options.on_policy:
        raise ValueError(
            f"loss_type {name} compares with the policy that sampled: give old_logps, its log-probs, or on_policy=True"
            " where that is this policy (ratios are 1 then)"
        )
    if given["old_logps"] is not None and options.on_policy:
        raise ValueError("old_logps have no meaning with on_policy=True, which says that they are the policy's own")
    sampling, threshold = given["sampling_logps"], options.off_policy_threshold
    if options.correction is not None and sampling is None:
        raise ValueError(f"importance_correction={options.correction!r} needs sampling_logps")
    if sampling is not None and options.correction is None and threshold is None and options.objective.name:
        raise ValueError(
            "sampling_logps are read by importance_correction, one of "
            f"{', '.join(map(repr, CORRECTIONS))}, and by loss_kwargs['off_policy_threshold']; neither is given"
        )
    inside = options.objective.name in CORRECTED_INSIDE
    if inside and options.correction is not None and options.correction.startswith("sequence"):
        raise ValueError(f"loss_type {name} takes a correction per token, got {options.correction!r}")
    if options.corrected_kl and not options.beta:
        raise ValueError("loss_kwargs['corrected_kl'] has no meaning with beta=0, which leaves the KL penalty out")
    items = given["num_items_in_batch"]
    if items is not None and options.reduction != "items":
        raise ValueError(f"num_items_in_batch has no meaning for reduction={options.reduction!r}")
    if options.reduction == "none" and options.entropy_coef:
        raise ValueError("reduction='none' has no entropy bonus, which is a mean over tokens: use entropy_coef=0")


def _advantages(value: Any, labels: Tensor, batch: Batch) -> Tensor:
    """Per token, or per sequence `[S]`, as `[S, T]`."""
    number = batch.sequences.number
    value = checks.tensor(value, "advantages")
    if value.shape == labels.shape:
        return per_token(value, "advantages", labels, batch)
    if value.shape != (number,):
        raise ValueError(
            f"advantages must have shape {tuple(labels.shape)} (per token) or ({number},) (per sequence), got"
            f" {tuple(value.shape)}"
        )
    value = checks.like(value, "advantages", torch.Size([number]), labels, "labels").detach()
    return torch.where(batch.valid, batch.sequences.to_tokens(value.to(batch.weights.dtype)), 0.0)


def _reference(given: Any, labels: Tensor, batch: Batch, has_model: bool, beta: float) -> Tensor | None:
    if given is not None and has_model:
        raise ValueError("give either the reference's own rows or reference_logps, not both")
    if given is not None:
        return per_token(given, "reference_logps", labels, batch)
    if beta and not has_model:
        raise ValueError(f"beta={beta} penalises KL(pi || pi_ref): give a reference, as reference_logps or by its rows")
    return None


def _scale(batch: Batch, options: PolicyOptions, items: Any) -> Tensor:
    """What each token's loss counts for, fp64 `[S, T]`."""
    valid, sequences = batch.valid.double(), batch.sequences
    number, reduction = max(1, sequences.number), options.reduction
    if reduction == "sequence_mean":
        return valid / sequences.to_tokens(sequences.sums(valid).clamp_min(1.0)) / number
    if reduction in ("sequence_sum", "sum", "none"):
        return valid / number if reduction == "sequence_sum" else valid
    if reduction == "fixed_length":
        assert options.max_completion_length is not None
        return valid / (number * options.max_completion_length)
    if reduction == "items" and items is not None:
        if isinstance(items, Tensor):
            if items.numel() != 1:
                raise ValueError(f"num_items_in_batch must be one number, got shape {tuple(items.shape)}")
            return valid / items.detach().to(valid).reshape(()).clamp_min(1.0)
        return valid / max(1.0, _number(items, "num_items_in_batch"))
    total = valid.sum() if sequences.shard is None else sequences.shard.sum(valid.sum())
    return valid / total.clamp_min(1.0)
