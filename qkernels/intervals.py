"""Confidence intervals of means and of whatever else is computed from independent units, such as the prompts of a test.

    bootstrap_mean([1.0, 0.5, 0.0, 1.0])

A unit is what was drawn independently: a prompt, a pair. Results that share a unit (both orders of two answers, two
models on one prompt) have to be combined within it before they come here; the interval is paired then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .core import checks

_ENTRIES = 1 << 22  # of a block of resamples


class Interval(NamedTuple):
    """An estimate with the interval `[low, high]` that covers the true value with probability `level`."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[[Tensor], Tensor], units: int, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The percentile bootstrap (Efron 1979): units are drawn with replacement, as many as there are.

    Args:
        statistic: maps float64 weights `[R, units]`, how often each unit was drawn, to `[R]` values.
        units: how many there are, at least 1.
        resamples: number of draws.
        level: probability of the interval.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        `Interval` whose estimate is the statistic with every weight 1.

    Raises:
        TypeError, ValueError: a number out of range.
    """
    for name, value in (("units", units), ("resamples", resamples)):
        checks.integer(value, name, 1)
    _level(level)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for start in range(0, resamples, max(1, _ENTRIES // units)):
        count = min(resamples - start, max(1, _ENTRIES // units))
        drawn = torch.randint(units, (count, units), generator=generator, device=generator.device)
        weights = torch.zeros(count, units, dtype=torch.float64, device=drawn.device)
        values.append(statistic(weights.scatter_add_(1, drawn, torch.ones_like(weights))))
    found = torch.cat(values)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(found, tails).tolist()
    estimate = statistic(torch.ones(1, units, dtype=torch.float64)).item()
    return Interval(estimate, low, high, level)


def bootstrap_mean(
    values: Sequence[float],
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of one number per unit, with its bootstrap interval.

    Args:
        values: one per unit.
        bounds: the least and the largest value that a unit can have, such as (0, 1) for a share. Where all values are
            equal, every resample is the same and the bootstrap has no width; the interval is then that of the units
            that were not seen (`unseen`).
        resamples, level, seed: as in `bootstrap`.

    Raises:
        ValueError: no values, or one that is not finite or outside the bounds.
    """
    numbers = torch.tensor(list(values), dtype=torch.float64)
    if not numbers.numel() or not bool(numbers.isfinite().all()):
        raise ValueError("values must hold at least one number, all of them finite")
    if bounds is not None and not bounds[0] <= numbers.min() <= numbers.max() <= bounds[1]:
        raise ValueError(f"values must lie in [{bounds[0]:g}, {bounds[1]:g}]")
    found = bootstrap(lambda w: w @ numbers / numbers.numel(), numbers.numel(), resamples=resamples, level=level,
                      seed=seed)  # fmt: skip
    if bounds is not None and bool((numbers == numbers[0]).all()):
        return unseen(found.estimate, bounds, numbers.numel(), level)
    return found


def unseen(estimate: float, bounds: tuple[float, float], units: int, level: float = 0.95) -> Interval:
    """The interval of a mean whose units all had the same value.

    With probability `level` the share of units that would have another value is at most 1 - (1 - level)^(1 / units)
    (Clopper and Pearson 1934: three in n, about); these may lie anywhere within the bounds.
    """
    other = 1 - (1 - level) ** (1 / units)
    low, high = bounds
    return Interval(estimate, estimate - other * (estimate - low), estimate + other * (high - estimate), level)


def wilson(share: float, units: int, level: float = 0.95) -> Interval:
    """The interval of a share of independent units, in closed form (Wilson 1927); for sets too large to resample.

    Args:
        share: between 0 and 1; units that count half may be in it, which makes the interval a little too wide.
        units: how many there are, at least 1.
        level: probability of the interval.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if units < 1:
        raise ValueError(f"units must be 1 or more, got {units}")
    z = NormalDist().inv_cdf((1 + _level(level)) / 2)
    middle = (share + z * z / (2 * units)) / (1 + z * z / units)
    half = z * math.sqrt(share * (1 - share) / units + (z / (2 * units)) ** 2) / (1 + z * z / units)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), level)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return level
