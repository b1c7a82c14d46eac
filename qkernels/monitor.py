"""How implicit rewards move in preference training, and what known situations their movement is a sign of.

    monitor = RewardMonitor(beta=0.1)
    out = fused_token_dpo(...)
    pairs = pair_rewards(labels, out.token_logps, out.reference_token_logps, beta=0.1)
    for finding in monitor.observe(step, pairs):
        print(finding)

Trends are clearest on a fixed set of pairs; `measure_rewards` of `qkernels.integrations.monitor` scores one with both
models, exact KL included, and `RewardMonitorCallback` there does so during a transformers or TRL training. Equation
numbers are of "From r to Q*" (Rafailov et al. 2024).

What is looked for, with the thresholds of `RewardMonitor` by name. Rewards are means over pairs of sequence rewards, in
units of beta times nats; share = chosen reward / margin.

    reference mismatch  at step 0 some |log pi - log pi_ref| > mismatch_tolerance; it should be exactly 0
    falling together    chosen <= -max(share_band * |margin|, least_fall), and rejected <= -least_fall
    rejected alone      margin >= least_margin, and |chosen| < max(share_band * margin, least_fall)
    length bias         over at least least_pairs pairs the correlation r of margin and length difference has
                        |r| >= least_correlation and |atanh r| * sqrt(pairs - 3) >= 3, three standard errors

All but the first must hold in `patience` observations running; each is reported when it begins, not again while it
lasts. A run in which the chosen reward rises by share_band of the margin or more, without length bias, has no finding.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core import checks
from .core.sequences import Sequences, log_ratios


class PairRewards(NamedTuple):
    """What is known of each of B pairs: float64 `[B]`, on the CPU.

    chosen_rewards, rejected_rewards: beta * sum of log pi / pi_ref over the sequence (11).
    chosen_tokens, rejected_tokens: how many tokens it has.
    largest_log_ratio: max over the tokens of both sequences of |log pi - log pi_ref|, nats.
    chosen_kl_reference_policy, rejected_kl_reference_policy: sum over the sequence of KL(pi_ref || pi), nats; None
        unless given.
    chosen_kl_policy_reference, rejected_kl_policy_reference: the same of KL(pi || pi_ref).
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    largest_log_ratio: Tensor
    chosen_kl_reference_policy: Tensor | None = None
    rejected_kl_reference_policy: Tensor | None = None
    chosen_kl_policy_reference: Tensor | None = None
    rejected_kl_policy_reference: Tensor | None = None


def pair_rewards(
    labels: Tensor,
    token_logps: Tensor,
    reference_token_logps: Tensor,
    *,
    beta: float,
    kl_reference_policy: Tensor | None = None,
    kl_policy_reference: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> PairRewards:
    """Per-token results of a preference batch, summed per pair. No gradients.

    Args:
        labels: int64 `[2B, T]` (or packed `[N]` with `cu_seqlens`), aligned with the rows; chosen sequences first.
        token_logps, reference_token_logps: shaped like `labels`, nats; from `fused_token_dpo` or `token_stats`.
        beta: of the loss.
        kl_reference_policy, kl_policy_reference: per token, from `token_stats`.
        cu_seqlens: `[2B + 1]`, boundaries of a packed batch.
        ignore_index: the label of rows that do not count.

    Raises:
        TypeError, ValueError: shapes that do not agree, an odd number of sequences, beta that is not above 0.
    """
    beta = checks.positive(beta, "beta")
    labels = checks.tensor(labels, "labels")
    if cu_seqlens is not None:
        cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
    elif labels.dim() != 2:
        raise ValueError(f"labels must have shape [2B, T], or [N] with cu_seqlens; got {tuple(labels.shape)}")
    else:
        checks.pairs(labels.shape[0], "labels hold")
    rows = labels if cu_seqlens is None else labels.unsqueeze(0)
    valid = rows != ignore_index
    sequences = Sequences.of(rows, cu_seqlens)

    def prepared(value: Any, name: str) -> Tensor:
        value = checks.like(value, name, labels.shape, labels, "labels").detach().double()
        return torch.where(valid, value.reshape(rows.shape), 0.0)

    def halves(value: Any, name: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if value is None:
            return None, None
        chosen, rejected = sequences.sums(prepared(value, name)).cpu().chunk(2)
        return chosen, rejected

    ratios = log_ratios(prepared(token_logps, "token_logps"), prepared(reference_token_logps, "reference_token_logps"))
    chosen, rejected = (beta * sequences.sums(ratios)).cpu().chunk(2)
    chosen_tokens, rejected_tokens = sequences.sums(valid.double()).cpu().chunk(2)
    # The largest of a sequence, dense or packed: scattered by the sequence's number.
    number = sequences.to_tokens(torch.arange(sequences.number, device=rows.device)).expand_as(rows)
    largest = torch.zeros(sequences.number, dtype=torch.float64, device=rows.device)
    largest.scatter_reduce_(0, number.reshape(-1), ratios.abs().reshape(-1), "amax")
    largest_chosen, largest_rejected = largest.cpu().chunk(2)
    return PairRewards(
        chosen,
        rejected,
        chosen_tokens,
        rejected_tokens,
        torch.maximum(largest_chosen, largest_rejected),
        *halves(kl_reference_policy, "kl_reference_policy"),
        *halves(kl_policy_reference, "kl_policy_reference"),
    )


def concatenate(parts: Iterable[PairRewards]) -> PairRewards:
    """The pairs of several batches as one. ValueError for none, or where only some have a KL."""
    parts = list(parts)
    if not parts:
        raise ValueError("no batch of pairs")
    joined: list[Any] = []
    for name in PairRewards._fields:
        values = [getattr(part, name) for part in parts]
        missing = sum(value is None for value in values)
        if missing not in (0, len(values)):
            raise ValueError(
                f"{name} is given for {len(values) - missing} of {len(values)} batches; expected all or none"
            )
        joined.append(None if missing else torch.cat(values))
    return PairRewards(*joined)


def __getattr__(name: str) -> Any:
    if name != "measure_rewards":  # it needs transformers, which this module does not
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(".integrations.monitor", __package__).measure_rewards


class RewardStats(NamedTuple):
    """One observation: means over pairs, unless it says otherwise.

    chosen_reward, rejected_reward, margin: sequence rewards and their difference, in units of beta times nats.
    accuracy: share of pairs with the larger reward on the chosen side; a tie is half.
    chosen_kl_reference_policy, rejected_kl_reference_policy: KL(pi_ref || pi) per token, nats, over all tokens of the
        side; None if unknown. By (16) a token drawn from the reference has reward -beta times this on average.
    chosen_kl_policy_reference, rejected_kl_policy_reference: the same of KL(pi || pi_ref).
    chosen_token_reward, rejected_token_reward: reward per token, over all tokens of the side.
    chosen_tokens, rejected_tokens: length.
    length_correlation: Pearson's r of margin and length difference (chosen less rejected) over pairs; None where one
        of them does not vary.
    largest_log_ratio: of any token, nats.
    """

    step: int
    pairs: int
    chosen_reward: float
    rejected_reward: float
    margin: float
    accuracy: float
    chosen_kl_reference_policy: float | None
    rejected_kl_reference_policy: float | None
    chosen_kl_policy_reference: float | None
    rejected_kl_policy_reference: float | None
    chosen_token_reward: float
    rejected_token_reward: float
    chosen_tokens: float
    rejected_tokens: float
    length_correlation: float | None
    largest_log_ratio: float

    @staticmethod
    def of(step: int, pairs: PairRewards) -> RewardStats:
        """Summarise pairs. ValueError for none."""
        n = len(pairs.chosen_rewards)
        if n == 0:
            raise ValueError("no pairs")
        margins = pairs.chosen_rewards - pairs.rejected_rewards
        right = (margins > 0).double() + 0.5 * (margins == 0).double()

        def per_token(total: Tensor | None, tokens: Tensor) -> float | None:
            return None if total is None else (total.sum() / tokens.sum().clamp_min(1)).item()

        chosen_token_reward = per_token(pairs.chosen_rewards, pairs.chosen_tokens)
        rejected_token_reward = per_token(pairs.rejected_rewards, pairs.rejected_tokens)
        assert chosen_token_reward is not None and rejected_token_reward is not None
        return RewardStats(
            step,
            n,
            pairs.chosen_rewards.mean().item(),
            pairs.rejected_rewards.mean().item(),
            margins.mean().item(),
            right.mean().item(),
            per_token(pairs.chosen_kl_reference_policy, pairs.chosen_tokens),
            per_token(pairs.rejected_kl_reference_policy, pairs.rejected_tokens),
            per_token(pairs.chosen_kl_policy_reference, pairs.chosen_tokens),
            per_token(pairs.rejected_kl_policy_reference, pairs.rejected_tokens),
            chosen_token_reward,
            rejected_token_reward,
            pairs.chosen_tokens.mean().item(),
            pairs.rejected_tokens.mean().item(),
            _correlation(margins, pairs.chosen_tokens - pairs.rejected_tokens),
            pairs.largest_log_ratio.max().item(),
        )


def _correlation(x: Tensor, y: Tensor) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / size if size > 0 else None


class Finding(NamedTuple):
    """A known situation that training has entered.

    name: "reference_mismatch", "falling_together", "rejected_alone" or "length_bias".
    step: when it was seen.
    severity: "note" (expected, or a matter of taste) or "warning".
    text: what was seen, what it means and what to do, for a person.
    """

    name: str
    step: int
    severity: str
    text: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.severity}: {self.text}"


class RewardMonitor:
    """Keeps the observations of a training run and reports known situations once each time they begin.

    Args:
        beta: of the loss, for what the texts say of KL.
        patience: observations running in which a situation must be seen.
        share_band, least_fall, least_margin, least_pairs, least_correlation, mismatch_tolerance: see the top of this
            module. least_fall and least_margin are rewards: 0.05 and 0.1 move a preference by 1 and 2.5 percent.
            mismatch_tolerance is in nats; the default is far above the rounding of fp32 models and far below that of
            16-bit ones that take different paths (3e-2), which is worth knowing about.

    Attributes:
        history: every `RewardStats`, in order.
        findings: every `Finding`, in order.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        patience: int = 3,
        share_band: float = 0.1,
        least_fall: float = 0.05,
        least_margin: float = 0.1,
        least_pairs: int = 20,
        least_correlation: float = 0.3,
        mismatch_tolerance: float = 1e-3,
    ):
        self.beta = checks.positive(beta, "beta")
        self.patience = checks.integer(patience, "patience", 1)
        self.least_pairs = checks.integer(least_pairs, "least_pairs", 4)
        self.share_band = checks.positive(share_band, "share_band")
        self.least_fall = checks.positive(least_fall, "least_fall")
        self.least_margin = checks.positive(least_margin, "least_margin")
        self.least_correlation = checks.positive(least_correlation, "least_correlation")
        self.mismatch_tolerance = checks.positive(mismatch_tolerance, "mismatch_tolerance")
        self.history: list[RewardStats] = []
        self.findings: list[Finding] = []
        self._running = dict.fromkeys(("falling_together", "rejected_alone", "length_bias"), 0)

    def observe(self, step: int, pairs: PairRewards) -> list[Finding]:
        """Take in one observation.

        Args:
            step: optimiser steps done so far; 0 before the first.
            pairs: from `pair_rewards` or `measure_rewards`.

        Returns:
            The findings that begin with it, also added to `findings`.

        Raises:
            ValueError: no pairs, or a step before the last one.
        """
        if self.history and step < self.history[-1].step:
            raise ValueError(f"step {step} comes after step {self.history[-1].step}")
        now = RewardStats.of(step, pairs)
        self.history.append(now)
        new = []
        if step == 0 and len(self.history) == 1 and not now.largest_log_ratio <= self.mismatch_tolerance:
            new.append(Finding("reference_mismatch", step, "warning", _mismatch_text(now)))
        band = max(self.share_band * abs(now.margin), self.least_fall)
        seen = {
            "falling_together": now.chosen_reward <= -band and now.rejected_reward <= -self.least_fall,
            "rejected_alone": now.margin >= self.least_margin and abs(now.chosen_reward) < band,
            "length_bias": self._length_bias(now),
        }
        for name, is_seen in seen.items():
            self._running[name] = self._running[name] + 1 if is_seen else 0
            if self._running[name] == self.patience:
                new.append(self._finding(name, now))
        self.findings += new
        return new

    def _length_bias(self, now: RewardStats) -> bool:
        r = now.length_correlation
        if r is None or now.pairs < self.least_pairs or abs(r) < self.least_correlation:
            return False
        return abs(r) >= 1 or abs(math.atanh(r)) * math.sqrt(now.pairs - 3) >= 3

    def _finding(self, name: str, now: RewardStats) -> Finding:
        if name == "falling_together":
            learns = now.margin >= self.least_margin
            return Finding(name, now.step, "note" if learns else "warning", _falling_text(now, self.beta, learns))
        if name == "rejected_alone":
            return Finding(name, now.step, "note", _alone_text(now))
        return Finding(name, now.step, "warning", _length_text(now))

    def state_dict(self) -> dict[str, Any]:
        """All observations and findings as JSON values, for a checkpoint."""
        return {
            "history": [observation._asdict() for observation in self.history],
            "findings": [finding._asdict() for finding in self.findings],
            "running": dict(self._running),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` has returned, in place of what was observed so far."""
        self.history = [RewardStats(**observation) for observation in state["history"]]
        self.findings = [Finding(**finding) for finding in state["findings"]]
        self._running = {**dict.fromkeys(self._running, 0), **state["running"]}

    def logs(self, prefix: str = "qkernels/") -> dict[str, float]:
        """The last observation as flat numbers for a logger; empty before the first."""
        if not self.history:
            return {}
        last = self.history[-1]._asdict()
        return {prefix + k: float(v) for k, v in last.items() if v is not None and k not in ("step", "pairs")}

    def report(self) -> str:
        """The run so far for a person: first and last observation, and all findings."""
        if not self.history:
            return "no observations yet"
        first, last = self.history[0], self.history[-1]
        lines = [
            f"step {first.step} -> {last.step}, {last.pairs} pairs",
            f"  chosen reward    {first.chosen_reward:+.3f} -> {last.chosen_reward:+.3f}",
            f"  rejected reward  {first.rejected_reward:+.3f} -> {last.rejected_reward:+.3f}",
            f"  margin           {first.margin:+.3f} -> {last.margin:+.3f}, ranked right {last.accuracy:.0%}",
        ]
        if last.chosen_kl_reference_policy is not None and last.chosen_kl_policy_reference is not None:
            lines.append(
                f"  KL per token     {last.chosen_kl_reference_policy:.4f} (ref || policy),"
                f" {last.chosen_kl_policy_reference:.4f} (policy || ref) nats, on chosen answers"
            )
        if last.length_correlation is not None:
            lines.append(
                f"  length           correlation of margin and length difference {last.length_correlation:+.2f}"
            )
        return "\n".join([*lines, *(f"  {finding}" for finding in self.findings)])


def _mismatch_text(now: RewardStats) -> str:
    return (
        f"policy and reference differ before the first update: some token has |log pi - log pi_ref| ="
        f" {now.largest_log_ratio:.3g} nats, and every token reward should be exactly 0. Rewards measured from here on"
        " carry this error. Usual causes: the reference is another checkpoint; dropout is on in one of them; cached"
        " reference log-probs were made with another dtype, attention kernel, padding or chat template, or belong to"
        " other labels; an adapter is not initialised to zero. Make both from the same weights, in eval mode, on the"
        " same path; make cached log-probs again."
    )


def _expectation(now: RewardStats, beta: float) -> str:
    """What (16) says, if the KL is known."""
    if now.chosen_kl_reference_policy is None:
        return ""
    expected = -beta * now.chosen_kl_reference_policy
    return (
        f" A token drawn from the reference has an expected reward of {expected:+.2g} there (exactly, eq. 16); a chosen"
        f" token has {now.chosen_token_reward:+.2g}."
    )


def _falling_text(now: RewardStats, beta: float, learns: bool) -> str:
    text = (
        f"chosen and rejected rewards fall together (chosen {now.chosen_reward:+.2f}, rejected"
        f" {now.rejected_reward:+.2f}, margin {now.margin:+.2f}, ranked right {now.accuracy:.0%})."
        f"{_expectation(now, beta)} This is expected after supervised fine-tuning on the chosen answers: on average"
        " over what the reference writes, the implicit reward can only fall as the policy moves away from it (eq. 16),"
        " and chosen answers are what it writes."
    )
    if learns:
        return (
            f"{text} While the margin grows nothing need be done. If answers degenerate or drift in length, hold the"
            ' chosen side: add the SFT term (loss_type=["sigmoid", "sft"]), use apo_zero, or raise beta or lower the'
            " learning rate."
        )
    return (
        f"{text} But the margin does not grow with it: the policy leaves its reference without learning the"
        " preferences. Lower the learning rate or raise beta, look for labels that are swapped or noisy, and check the"
        " prompt mask."
    )


def _alone_text(now: RewardStats) -> str:
    return (
        f"the margin ({now.margin:+.2f}) comes from the rejected side alone: chosen {now.chosen_reward:+.2f}, rejected"
        f" {now.rejected_reward:+.2f}. The policy learns what to avoid and nothing of what to prefer, and the"
        " probability it takes away may go to answers that are in neither set. Read some of its samples. To raise the"
        ' chosen side, add the SFT term (loss_type=["sigmoid", "sft"]) or use apo_zero; tdpo2 limits how far the'
        " rejected side is pushed."
    )


def _length_text(now: RewardStats) -> str:
    assert now.length_correlation is not None
    longer = now.length_correlation > 0
    return (
        f"rewards follow length: over {now.pairs} pairs the margin correlates with the length difference by r ="
        f" {now.length_correlation:+.2f} (chosen answers have {now.chosen_tokens:.0f} tokens on average, rejected ones"
        f" {now.rejected_tokens:.0f}). {'Longer' if longer else 'Shorter'} answers gain reward for being"
        f" {'longer' if longer else 'shorter'}, and what is generated will become so. Compare with the data: balance"
        " the lengths of chosen and rejected answers there, or take length out of the score with sigmoid_norm or simpo,"
        ' or with loss_kwargs={"ld_alpha": 0.5} (LD-DPO).'
    )
