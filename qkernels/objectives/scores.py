"""What an objective sees of a batch of pairs: summed log-ratios, log-probs, token counts and divergences.

Symbols, as in the literature: r = weighted sum over a sequence of log pi/pi_ref; n = sum of its weights; s = f(r) with
the f-divergence's link; D = s_chosen - s_rejected; K = weighted sum of KL(ref || pi).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
F_DIVERGENCE_ALIASES = {"js": "js_divergence", "alpha": "alpha_divergence"}
# exp of more than this comes close to overflowing, by dtype of the scores; links continue as a logarithm there.
_MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, with the slope exp(x): torch's expm1 takes it from its result, which is -1 in fp32 for x < -17."""
    return torch.where(x > -1, torch.expm1(x), torch.exp(x.clamp_max(0.0)) - 1)


def finite_exp(exp: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
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
    chosen_mean_count: chosen tokens per pair, `[]`, where these pairs are a part of a batch; None for their own mean.
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
    chosen_mean_count: Tensor | None = None

    def _link(self, log_ratios: Tensor) -> Tensor:
        """s = f'(pi/pi_ref) as a function of the log-ratio r."""
        if self.f_divergence == "forward_kl":
            return -finite_exp(expm1, -log_ratios)
        if self.f_divergence == "js_divergence":
            return math.log(2.0) + logsigmoid(log_ratios)
        if self.f_divergence == "alpha_divergence" and abs(self.f_alpha_divergence_coef - 1) >= 1e-6:
            slope = self.f_alpha_divergence_coef - 1
            return finite_exp(expm1, slope * log_ratios) / slope
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
    def chosen_nll(self) -> Tensor:
        """Each pair's share of the chosen answers' mean negative log-likelihood per token of the whole batch.

        It is scaled so that the mean over the batch's pairs is the mean over its chosen tokens. LD-DPO leaves it alone.
        """
        logps = self.chosen_logps if self.chosen_full_logps is None else self.chosen_full_logps
        mean = self.chosen_counts.mean() if self.chosen_mean_count is None else self.chosen_mean_count
        return -logps / torch.where(mean > 0, mean, 1.0)

    @property
    def mean_chosen_logps(self) -> Tensor:
        """log pi per token of the chosen answer; 0 without tokens."""
        return per_token(self.chosen_logps, self.chosen_counts)

    @property
    def mean_rejected_logps(self) -> Tensor:
        """log pi per token of the rejected answer; 0 without tokens."""
        return per_token(self.rejected_logps, self.rejected_counts)

    @property
    def margins(self) -> Tensor:
        """D = s_w - s_l."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_margins(self) -> Tensor:
        """s_w / n_w - s_l / n_l."""
        return per_token(self.chosen_scores, self.chosen_counts) - per_token(self.rejected_scores, self.rejected_counts)


def per_token(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 for a sequence without tokens."""
    return total / count.masked_fill(count.logical_not(), 1.0)
