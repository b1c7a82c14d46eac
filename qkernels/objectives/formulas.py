"""Every preference loss: pair scores in, one loss per pair out, in plain torch on small tensors.

To add an objective, write a function of `PairScores` here and register it:

    @objective()
    def my_loss(scores: PairScores, beta: float, margin: float = 1.0) -> Tensor:
        return torch.relu(margin - beta * scores.margins)

Keyword parameters after `beta` become valid keys of `loss_kwargs`. Without registering, the function itself can be
passed as `loss_type`. Symbols are those of `scores.py`; names and formulas follow TRL where TRL has them.

Each formula stands here once. `sigmoid` with a mean over pairs, the default, is fused a second time: the operation
`pair_loss` of every backend computes it with its gradient in one launch. `fused="pair_loss"` marks it, and
`tests/objectives/test_fused_default.py` ties the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .registry import SMOOTHED, objective
from .scores import PairScores, expm1, finite_exp, per_token

_ABOVE_ZERO = 5e-324


def _smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sigma(x) - eps log sigma(-x)."""
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


@objective(smoothing=SMOOTHED, fused="pair_loss")
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
def ipo(scores: PairScores, beta: float, length_normalised: bool = True) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17), length-normalised as its authors' experiments were; or summed over tokens with
    `length_normalised=False`, as in the code of the DPO authors."""
    return ((scores.mean_margins if length_normalised else scores.margins) - 1 / (2 * beta)) ** 2


@objective(smoothing=SMOOTHED)
def robust(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Unbiased under label flips of rate eps (Chowdhury et al. 2024)."""
    x = beta * scores.margins
    clean, flipped = -(1 - label_smoothing) * logsigmoid(x), -label_smoothing * logsigmoid(-x)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def _sigmoid(x: Tensor) -> Tensor:
    """sigma(x) whose gradient sigma(x) sigma(-x) keeps its digits where sigma(x) is close to 1."""
    return torch.exp(logsigmoid(x))


@objective(smoothing=(_ABOVE_ZERO, SMOOTHED[1]))
def exo_pair(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """EXO for pairs (Ji et al. 2024, eq. 16): reverse KL to the smoothed preference; eps > 0, 1e-3 in the paper."""
    x = beta * scores.margins
    chosen = _sigmoid(x) * (logsigmoid(x) - math.log1p(-label_smoothing))
    return chosen + _sigmoid(-x) * (logsigmoid(-x) - math.log(label_smoothing))


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
    return _sigmoid(-beta * scores.chosen_log_ratios) + _sigmoid(beta * scores.rejected_log_ratios)


@objective(scored=False)
def apo_down(scores: PairScores, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8): both down, rejected more."""
    difference = scores.chosen_log_ratios - scores.rejected_log_ratios
    return _sigmoid(beta * scores.chosen_log_ratios) + _sigmoid(-beta * difference)


@objective()
def discopop(scores: PairScores, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5): logistic and exponential loss, blended by the margin."""
    x = beta * scores.margins
    # exp(-x) sigma(x / tau) as one exponential: apart, the first overflows where the second is 0.
    return -logsigmoid(x) * torch.sigmoid(-x / discopop_tau) + finite_exp(torch.exp, logsigmoid(x / discopop_tau) - x)


@objective(reference_free=True, unit="batch", discounted=False)
def sft(scores: PairScores, beta: float) -> Tensor:
    """Mean negative log-likelihood over all chosen tokens of the batch (Rafailov et al.'s SFT term).

    Pair i's share is scaled so that the mean over pairs is the mean over tokens. LD-DPO leaves it alone.
    """
    logps = scores.chosen_logps if scores.chosen_full_logps is None else scores.chosen_full_logps
    tokens = scores.chosen_counts.sum()
    return -logps * (logps.numel() / torch.where(tokens > 0, tokens, 1.0))


@objective(smoothing=SMOOTHED, scored=False, unit="batch")
def aot(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired (Melnyk et al. 2024): sorted policy margins against sorted reference margins."""
    policy = (scores.chosen_logps - scores.rejected_logps).sort().values
    reference = (scores.reference_chosen_logps - scores.reference_rejected_logps).sort().values
    return _smoothed_logistic(beta * (policy - reference), label_smoothing)


@objective(smoothing=SMOOTHED, scored=False, unit="batch")
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
    """SimPO (Meng et al. 2024): mean log-probs, target margin gamma, no reference.

    gamma is outside of beta, and the published settings have beta at 2 and above: at 0.1, the one default of the
    functions for all losses, the answers' difference counts twenty times less beside gamma than at 2. Pass a beta.
    """
    chosen = per_token(scores.chosen_logps, scores.chosen_counts)
    rejected = per_token(scores.rejected_logps, scores.rejected_counts)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


@objective(unit="batch")
def rspo(scores: PairScores, beta: float) -> Tensor:
    """RSPO (Kallus 2025): ranks every chosen-over-rejected index above every mirrored one; any monotone link.

    Pair i loses the mean over the batch's pairs j (itself included) of softplus(-(t_i + t_j)), t = beta D. The code
    says -log sigma(t_i + t_j), since torch's softplus is off by 2e-9 from its threshold of 20 on.
    """
    t = beta * scores.margins
    return -logsigmoid(t[:, None] + t[None, :]).mean(1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0: the form that keeps its digits on either side of -log 2; x is at most -1e-30.

    Beyond that, an answer that is certain, or has no tokens, would have infinite odds.
    """
    x = x.clamp_max(-1e-30)
    near = x > -math.log(2.0)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


@objective(scored=False, reference_free=True, discounted=False)
def orpo(scores: PairScores, beta: float) -> Tensor:
    """ORPO (Hong et al. 2024, eqs. 6 and 7): the chosen answers' likelihood, and beta times the log odds ratio.

    L = NLL - beta log sigma(log odds_w - log odds_l), odds = P / (1 - P), log P the mean log-prob of an answer's token.
    """
    chosen, rejected = scores.mean_chosen_logps, scores.mean_rejected_logps
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return scores.chosen_nll - beta * logsigmoid(log_odds)


_CPO_FORMS = ("sigmoid", "hinge", "ipo", "simpo")


@objective(smoothing=SMOOTHED, scored=False, reference_free=True, discounted=False)
def cpo(
    scores: PairScores,
    beta: float,
    label_smoothing: float = 0.0,
    form: str = "sigmoid",
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """CPO (Xu et al. 2024, eq. 3), and as in TRL its other forms: the preference term, and cpo_alpha times the NLL.

    form: "sigmoid" and "hinge" on log-probs, "ipo" and "simpo" (Meng et al. 2024) on their means per token; "simpo"
    has the target margin simpo_gamma. alpha other than 0: AlphaPO's rewards (Gupta et al. 2025), (1 - p^-alpha) / alpha
    in place of log p.
    """
    if form not in _CPO_FORMS:
        raise ValueError(f"loss_kwargs['form'] must be one of {', '.join(map(repr, _CPO_FORMS))}, got {form!r}")
    chosen, rejected = scores.chosen_logps, scores.rejected_logps
    if form in ("ipo", "simpo"):
        chosen, rejected = scores.mean_chosen_logps, scores.mean_rejected_logps
    if alpha != 0:
        chosen, rejected = (-finite_exp(expm1, -alpha * logp) / alpha for logp in (chosen, rejected))
    x = beta * (chosen - rejected)
    if form == "hinge":
        loss = torch.relu(1 - x)
    elif form == "ipo":
        loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    else:
        loss = _smoothed_logistic(x - simpo_gamma if form == "simpo" else x, label_smoothing)
    return loss if cpo_alpha == 0 else loss + cpo_alpha * scores.chosen_nll


@objective(scored=False, reference_free=True)
def alphapo(scores: PairScores, beta: float, alpha: float = 0.25, gamma: float = 0.5) -> Tensor:
    """AlphaPO (Gupta et al. 2025): SimPO on the rewards (1 - p^-alpha) / alpha, p the mean likelihood of a token."""
    return cpo(scores, beta, form="simpo", cpo_alpha=0.0, simpo_gamma=gamma, alpha=alpha)
