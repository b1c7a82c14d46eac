"""How far two sets of log-probs of the same tokens lie apart, in the terms in which importance sampling feels it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..intervals import Interval, bootstrap


class Agreement(NamedTuple):
    """Figures over tokens; r = exp(trainer's log-prob - engine's), as in the importance ratio of a policy loss.

    tokens, sequences: how many.
    largest, mean_absolute: of |log r|, nats.
    ratio: mean of r; 1 in expectation, where the engine sampled from what it says.
    outside: share of tokens whose r lies outside of the limits.
    k1, k3: estimates of KL(engine || trainer) per token, nats: mean of -log r, and of r - 1 - log r (Schulman 2020),
        which is never negative and varies less.
    effective: (sum r)^2 / (n sum r^2), the share of the sample that is left to importance sampling.
    """

    tokens: int
    sequences: int
    largest: float
    mean_absolute: float
    ratio: Interval
    outside: Interval
    k1: Interval
    k3: Interval
    effective: float


def agreement(
    trainer: Sequence[Tensor],
    engine: Sequence[Tensor],
    *,
    limits: tuple[float, float] = (0.9, 1.1),
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Compare log-probs, a tensor per sequence.

    Args:
        trainer, engine: for each sequence `[T]` log-probs, nats, of the same tokens.
        limits: of the ratios that count as close.
        resamples, seed: of the bootstrap, which draws whole sequences.

    Returns:
        `Agreement`; ratios are kept within e^+-20, so that one token at log-prob -inf leaves the means finite.

    Raises:
        ValueError: other numbers of sequences or tokens, or no token at all.

    A sequence without tokens has no ratio, and is no unit of the bootstrap: a draw of such alone would have no mean.
    """
    if len(trainer) != len(engine) or any(a.shape != b.shape for a, b in zip(trainer, engine, strict=True)):
        raise ValueError("trainer and engine must have log-probs of the same tokens, a tensor for each sequence")
    differences = [log_ratio(a, b) for a, b in zip(trainer, engine, strict=True)]
    flat = torch.cat(differences) if differences else torch.empty(0)
    if not flat.numel():
        raise ValueError("there is no token to compare")
    ratio = flat.exp()
    sizes = [d.numel() for d in differences if d.numel()]
    counts = torch.tensor(sizes, dtype=torch.float64)

    def mean(values: Tensor) -> Interval:
        sums = torch.stack([part.sum() for part in values.split(sizes)])
        return bootstrap(lambda w: (w @ sums) / (w @ counts), len(sizes), resamples=resamples, seed=seed)

    return Agreement(
        tokens=flat.numel(),
        sequences=len(differences),
        largest=float(flat.abs().max()),
        mean_absolute=float(flat.abs().mean()),
        ratio=mean(ratio),
        outside=mean(((ratio < limits[0]) | (ratio > limits[1])).double()),
        k1=mean(-flat),
        k3=mean(torch.expm1(flat) - flat),
        effective=float(ratio.sum() ** 2 / (flat.numel() * ratio.square().sum())),
    )


def log_ratio(trainer: Tensor, engine: Tensor) -> Tensor:
    """log r of each token, float64, within +-20; 0 where both are -inf."""
    difference = trainer.double() - engine.double()
    return torch.nan_to_num(difference, nan=0.0, posinf=20.0, neginf=-20.0).clamp(-20, 20)


class Group(NamedTuple):
    """Tokens that share something: what, how many, mean and mean absolute log r, share outside of the limits."""

    name: str
    tokens: int
    mean: float
    mean_absolute: float
    outside: float


def grouped(names: Sequence[str], keys: Tensor, values: Tensor, limits: tuple[float, float]) -> list[Group]:
    """`values` `[n]` (log r) by `keys` `[n]` int64, which index `names`; groups without tokens are left out."""
    found = []
    outside = ((values < math.log(limits[0])) | (values > math.log(limits[1]))).double()
    for key, name in enumerate(names):
        chosen = keys == key
        if bool(chosen.any()):
            part = values[chosen]
            means = (float(part.mean()), float(part.abs().mean()), float(outside[chosen].mean()))
            found.append(Group(name, int(chosen.sum()), *means))
    return found


def by_position(differences: Sequence[Tensor], limits: tuple[float, float]) -> list[Group]:
    """Groups of positions in the generated text, each twice as long as the one before."""
    longest = max(d.numel() for d in differences)
    levels = max(1, math.ceil(math.log2(max(longest, 2))))
    keys = torch.cat([torch.arange(1, d.numel() + 1).log2().floor().long() for d in differences])
    names = ["1" if n == 0 else f"{2**n} to {2 ** (n + 1) - 1}" for n in range(levels + 1)]
    return grouped(names, keys, torch.cat(list(differences)), limits)


def by_probability(engine: Tensor, differences: Tensor, limits: tuple[float, float]) -> list[Group]:
    """Groups of the engine's probability of the token."""
    edges = torch.tensor([0.01, 0.1, 0.5, 0.9], dtype=torch.float64)
    keys = torch.bucketize(engine.double().exp(), edges, right=True)
    return grouped(["below 1 %", "1 to 10 %", "10 to 50 %", "50 to 90 %", "90 % and above"], keys, differences, limits)
