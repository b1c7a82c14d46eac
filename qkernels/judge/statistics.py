"""From verdicts to a win rate: an interval by resampling prompts, what the order does, and what length does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..intervals import Interval, bootstrap, bootstrap_mean, unseen

_SHARE = (0.0, 1.0)
_RIDGE = 0.1  # on the slope of the length: a normal prior of standard deviation 3 logits
_STEPS = 30  # of Newton's method; it has converged after 5 to 10
_LARGEST = 20.0  # logits; a model that always wins has an infinite one


class Verdict(NamedTuple):
    """What was judged of one prompt.

    a_first: 1 if A's answer was judged better with A's shown first, 0 if B's, 0.5 for a tie, or a probability; None if
        this order was not judged.
    b_first: the same, still of A's answer, with B's shown first. A judge that sees one answer at a time knows no order:
        both are the same then.
    a_length, b_length: of the answers, in characters.
    """

    a_first: float | None
    b_first: float | None
    a_length: int = 0
    b_length: int = 0

    @property
    def wins(self) -> float:
        """The mean over the orders that were judged: between 0 (B is better) and 1 (A is)."""
        known = [value for value in (self.a_first, self.b_first) if value is not None]
        return sum(known) / len(known)


class WinRate(NamedTuple):
    """How A's answers stand against B's. Intervals come from resampling prompts.

    prompts: how many were judged.
    win_rate: mean over prompts of `Verdict.wins`; a tie, or two orders that contradict each other, is half a win.
    wins, ties, losses: prompts with `Verdict.wins` above, at and below a half.
    both_orders: prompts that were judged in both orders.
    agreement: share of those whose verdict is the same in both orders; None without any.
    first_wins: mean share of the answer that is shown first, over the same prompts: 0.5 for a judge without a bias for
        a position; None without any.
    a_length, b_length: mean lengths of the answers, in characters.
    length_controlled: the win rate that a logistic regression on the difference in length predicts for answers of equal
        length; None where that cannot be told, with `length_note` saying why.
    length_effect: what the odds of A are multiplied by, per standard deviation that A's answer is longer, near equal
        lengths; None likewise.
    length_note: "" or a sentence.
    """

    prompts: int
    win_rate: Interval
    wins: int
    ties: int
    losses: int
    both_orders: int
    agreement: Interval | None
    first_wins: Interval | None
    a_length: float
    b_length: float
    length_controlled: Interval | None
    length_effect: Interval | None
    length_note: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; intervals as objects."""
        return {
            name: value._asdict() if isinstance(value, Interval) else value for name, value in self._asdict().items()
        }


def win_rate(verdicts: Sequence[Verdict], *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> WinRate:
    """The win rate of A over B.

    Length control is that of length-controlled AlpacaEval (Dubois et al. 2024) for two models: the chance that A wins
    is sigma(theta + phi tanh(d / s)), d being the difference in length of A's and B's answer and s its standard
    deviation over the prompts; the figure is sigma(theta), where d = 0. AlpacaEval's third term, how hard a prompt is,
    needs verdicts on many models and is left out. theta is free, phi has a weak prior (ridge 0.1).

    Args:
        verdicts: one per prompt.
        resamples, level, seed: of the bootstrap (`qkernels.intervals.bootstrap`).

    Raises:
        ValueError: no verdict; one without any order, or outside [0, 1].
    """
    if not verdicts:
        raise ValueError("verdicts must hold at least one verdict")
    for i, verdict in enumerate(verdicts):
        known = [value for value in (verdict.a_first, verdict.b_first) if value is not None]
        if not known or not all(0 <= value <= 1 for value in known):
            raise ValueError(f"verdict {i} must have a value between 0 and 1 in some order, got {verdict[:2]}")
    how: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    wins = [verdict.wins for verdict in verdicts]
    both = [(v.a_first, v.b_first) for v in verdicts if v.a_first is not None and v.b_first is not None]
    same = [float((a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5)) for a, b in both]
    first = [(a + 1 - b) / 2 for a, b in both]
    controlled, effect, note = _length_controlled(verdicts, wins, **how)
    return WinRate(
        prompts=len(verdicts),
        win_rate=bootstrap_mean(wins, bounds=_SHARE, **how),
        wins=sum(value > 0.5 for value in wins),
        ties=sum(value == 0.5 for value in wins),
        losses=sum(value < 0.5 for value in wins),
        both_orders=len(both),
        agreement=bootstrap_mean(same, bounds=_SHARE, **how) if both else None,
        first_wins=bootstrap_mean(first, bounds=_SHARE, **how) if both else None,
        a_length=sum(v.a_length for v in verdicts) / len(verdicts),
        b_length=sum(v.b_length for v in verdicts) / len(verdicts),
        length_controlled=controlled,
        length_effect=effect,
        length_note=note,
    )


def _length_controlled(
    verdicts: Sequence[Verdict], wins: Sequence[float], *, resamples: int, level: float, seed: int
) -> tuple[Interval | None, Interval | None, str]:
    """Win rate at equal lengths, the odds' factor of length, and why they are missing."""
    difference = torch.tensor([v.a_length - v.b_length for v in verdicts], dtype=torch.float64)
    spread = difference.std(correction=0).item()
    if spread == 0:
        if difference[0] == 0:
            return (
                bootstrap_mean(wins, bounds=_SHARE, resamples=resamples, level=level, seed=seed),
                None,
                ("All pairs of answers are equally long."),
            )
        return (
            None,
            None,
            (
                f"A's answer is {difference[0]:+.0f} characters longer than B's on every prompt: what is due to length"
                " cannot be told from what is due to the model."
            ),
        )
    x, y = torch.tanh(difference / spread), torch.tensor(wins, dtype=torch.float64)
    if bool((y == y[0]).all()):
        return unseen(y[0].item(), _SHARE, len(wins), level), None, "All verdicts are the same, whatever the lengths."
    how: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    controlled = bootstrap(lambda weights: torch.sigmoid(_fit(x, y, weights)[0]), len(wins), **how)
    effect = bootstrap(lambda weights: torch.exp(_fit(x, y, weights)[1]), len(wins), **how)
    one_side = bool((difference > 0).all()) or bool((difference < 0).all())
    note = ""
    if one_side:
        longer = "A" if difference[0] > 0 else "B"
        note = f"{longer}'s answer is the longer one on every prompt: the figure for equal lengths is an extrapolation."
    return controlled, effect, note


def _fit(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regressions of y on x, one for each row of weights `[R, N]`: intercepts and slopes `[R]`.

    Newton's method on the two by two systems of all rows at once. The log-likelihood less the ridge is concave; a step
    of more than two logits is shortened, so that a row whose verdicts are all the same walks to the limit and stops.
    """
    theta = torch.zeros(weights.shape[0], dtype=x.dtype)
    phi = torch.zeros_like(theta)
    for _ in range(_STEPS):
        p = torch.sigmoid(theta[:, None] + phi[:, None] * x)
        residual, curvature = weights * (y - p), weights * p * (1 - p)
        g0, g1 = residual.sum(1), (residual * x).sum(1) - _RIDGE * phi
        h00, h01 = curvature.sum(1) + 1e-9, (curvature * x).sum(1)
        h11 = (curvature * x * x).sum(1) + _RIDGE
        determinant = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        size = torch.maximum(step0.abs(), step1.abs()).clamp_min(1e-300)
        shorter = (2.0 / size).clamp_max(1.0)
        theta = (theta + shorter * step0).clamp(-_LARGEST, _LARGEST)
        phi = (phi + shorter * step1).clamp(-_LARGEST, _LARGEST)
        if bool((size < 1e-10).all()):
            break
    return theta, phi


def is_close_to_half(rate: WinRate) -> bool:
    """Whether the interval of the win rate holds a half: neither model has been shown to be better."""
    return rate.win_rate.low <= 0.5 <= rate.win_rate.high or math.isnan(rate.win_rate.estimate)
