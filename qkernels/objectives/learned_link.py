"""Preference losses that do not assume a link: which function of the reward margin gives the preference is learned.

Bradley-Terry says that the chosen answer wins with probability sigma(t), t = beta D. Kallus 2025 ("Semiparametric
Preference Optimization: Your Language Model is Secretly a Single-Index Model", arXiv 2512.21917) lets it be Psi(t) with
any monotone Psi, estimated beside the policy from the t of earlier steps. Which of two answers is called the first
carries no information, so each pair counts twice, as (t, 1) and as (-t, 0), and Psi(-t) = 1 - Psi(t).

Both losses here are objects with a memory: make one for a training run and pass it as `loss_type` in every step.

    loss = OSPO()
    out = fused_token_dpo(logits, labels, reference_logits=reference, loss_type=loss)

What a policy trained this way knows of the reward is its order, up to a sign and a scale: a link that is free fits t
and 2 t, and a link that need not increase (OSPO's) fits t and -t. Warming up as plain DPO settles the sign, `sign` says
whether it held, and the scale is chosen after training: `qkernels.search.scan_beta`.

`rspo`, which only ranks and needs no memory, is an ordinary name of `qkernels.objectives.OBJECTIVES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ..core import checks
from .registry import stateful
from .scores import PairScores


def isotonic_fit(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The nearest non-decreasing sequence in weighted least squares, by pooling adjacent violators. Exact, O(n).

    Args:
        values: in the order in which the fit must not decrease.
        weights: above 0, one each; 1 by default.
    """
    weights = [1.0] * len(values) if weights is None else weights
    if len(weights) != len(values) or any(not weight > 0 for weight in weights):
        raise ValueError(f"weights must be {len(values)} numbers above 0")
    means: list[float] = []
    masses: list[float] = []
    counts: list[int] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while means and means[-1] >= value:
            mean, mass = means.pop(), masses.pop()
            value = (mean * mass + value * weight) / (mass + weight)
            weight += mass
            count += counts.pop()
        means.append(value)
        masses.append(weight)
        counts.append(count)
    return [mean for mean, count in zip(means, counts, strict=True) for _ in range(count)]


class LearnedLink(ABC):
    """What OSPO and PSPO share: the memory of past t, and plain DPO until there are enough of them.

    A batch enters the memory after its own loss, and only in training (when t carries a gradient), so that evaluation
    leaves no trace and no pair vouches for itself. Each process of a distributed run keeps a memory of its own.

    Args:
        memory: how many pairs are remembered, the latest ones.
        warm_up: pairs that must have been seen before the link is used; until then the loss is -log sigma(t). At the
            first step all t are 0 and say nothing about a link.
    """

    def __init__(self, memory: int, warm_up: int):
        self.memory, self.warm_up = checks.integer(memory, "memory", 1), checks.integer(warm_up, "warm_up", 1)
        self.seen = 0
        self.past = torch.empty(0, dtype=torch.float64, device="cpu")
        self._collected: list[Tensor] | None = None

    def __call__(self, scores: PairScores, beta: float) -> Tensor:
        """One loss per pair, `[B]`. Scores whose t is not finite are left out of the memory."""
        t = beta * scores.margins
        if self._collected is not None:
            self._collected.append(t.detach())
        spread = self.past.square().mean().sqrt().item() if len(self.past) else 0.0
        ready = self.seen >= self.warm_up and spread > 0 and self._has_link()
        loss = self._loss(t, spread) if ready else -logsigmoid(t)
        if t.requires_grad and torch.is_grad_enabled():
            new = t.detach().double().cpu()
            self.past = torch.cat([self.past, new[new.isfinite()]])[-self.memory :]
            self.seen += len(t)
        return loss

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """A list that every call appends its t to, detached, until the block ends."""
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None

    @property
    def sign(self) -> float:
        """1.0, or -1.0 if over the memory t has fallen where the chosen answer won: align the policy with it.

        The sign of the covariance of t and the label, each pair counted as (t, 1) and as (-t, 0), which is that of the
        mean of t. With -1, the reward is -beta log(pi / pi_ref), and the policy to use is pi_ref^(1 + 1/b) pi^(-1/b),
        which `qkernels.search.scan_beta(..., sign=-1)` samples from. 1.0 while the memory is empty.
        """
        return -1.0 if len(self.past) and self.past.mean().item() < 0 else 1.0

    def _has_link(self) -> bool:
        """Whether there is a link to use once the memory is warm."""
        return True

    @abstractmethod
    def _loss(self, t: Tensor, spread: float) -> Tensor:
        """The loss of each pair once the memory is of use; `spread` is the root mean square of the past t."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the training run must keep."""
        return {"past": self.past.clone(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        missing = {"past", "seen"} - set(state)
        if missing:
            raise ValueError(f"the state of {type(self).__name__} needs {sorted(missing)}")
        self.past, self.seen = state["past"].double().cpu()[-self.memory :].clone(), int(state["seen"])


@stateful("ospo")
class OSPO(LearnedLink):
    """OSPO: the link is a kernel regression over the memory, and t moves through it.

    This is the loss of the authors' released code. The paper's "O" stands for orthogonalised, that is for a gradient to
    which the error of the link contributes in second order only; neither their code by default nor this class does
    that, since both hold the memory constant. (Their option that differentiates through the memory was unstable in
    their own simulation.)

    Psi(t) = sum_m K((t - t_m)/h) / sum_m [K((t - t_m)/h) + K((t + t_m)/h)], loss -log Psi(t), with the Gaussian K and
    h = bandwidth * spread * n^(-1/5) over n remembered t_m and their mirror images (spread: root of their mean square).
    The memory gets no gradient. Computed in log space: a t far from all memory has a slope, not an underflow.

    Args:
        memory, warm_up: as in `LearnedLink`.
        bandwidth: factor of the kernel's width; above 0.
    """

    def __init__(self, memory: int = 4096, warm_up: int = 256, bandwidth: float = 1.0):
        super().__init__(memory, warm_up)
        self.bandwidth = checks.positive(bandwidth, "bandwidth")

    def _loss(self, t: Tensor, spread: float) -> Tensor:
        past = self.past.to(t.device, t.dtype)
        width = self.bandwidth * spread * (2 * len(past)) ** -0.2
        won = torch.logsumexp(-0.5 * ((t[:, None] - past) / width) ** 2, 1)
        lost = torch.logsumexp(-0.5 * ((t[:, None] + past) / width) ** 2, 1)
        return softplus(lost - won)


@stateful("pspo")
class PSPO(LearnedLink):
    """PSPO: in turns, an isotonic fit of the link to the memory and the likelihood of t under it.

    Every `refit` steps the points (t_m, 1) and (-t_m, 0) are fitted by the nearest non-decreasing function. Each pool
    of the fit is a knot at its mean t; between knots Psi is linear, beyond them constant, and it stays within [floor,
    1 - floor]. A constant link has no slope, so Psi is mixed with `logistic_share` of sigma(t). The loss is -log of the
    mixture.

    The authors fit to the t of the whole data set under the policy as it stands, which the memory approximates by those
    of past steps. `refit_on="data"` is their way; then the training loop passes these t, whenever `refit_due` says so:

        if loss.refit_due:
            loss.fit_to(beta * margins_of_the_whole_data_set)

    (`TokenDPOTrainer` does it by itself, with one forward pass over the training data.)

    Args:
        memory, warm_up: as in `LearnedLink`.
        refit: steps from one fit to the next.
        logistic_share: in [0, 1].
        floor: in (0, 1/2).
        refit_on: "memory" or "data".
    """

    def __init__(
        self,
        memory: int = 4096,
        warm_up: int = 256,
        refit: int = 10,
        logistic_share: float = 0.05,
        floor: float = 1e-4,
        refit_on: str = "memory",
    ):
        super().__init__(memory, warm_up)
        checks.integer(refit, "refit", 1)
        if not 0 <= logistic_share <= 1:
            raise ValueError(f"logistic_share must lie in [0, 1], got {logistic_share}")
        if not 0 < floor < 0.5:
            raise ValueError(f"floor must lie in (0, 0.5), got {floor}")
        if refit_on not in ("memory", "data"):
            raise ValueError(f'refit_on must be "memory" or "data", got {refit_on!r}')
        self.refit, self.logistic_share, self.floor, self.refit_on = refit, logistic_share, floor, refit_on
        self.knots: tuple[list[float], list[float]] | None = None
        self._until_refit = 0

    @property
    def refit_due(self) -> bool:
        """Whether it is time for `fit_to`: always False with `refit_on="memory"`, which needs no call."""
        return self.refit_on == "data" and self.seen >= self.warm_up and self._until_refit == 0

    def fit_to(self, t: Tensor) -> None:
        """Fit the link to these t = beta D, `[N]`; those that are not finite are left out.

        Raises:
            ValueError: not one of them is finite and other than 0.
        """
        t = checks.tensor(t, "t").detach().double().cpu().reshape(-1)
        t = t[t.isfinite()]
        if not bool((t != 0).any()):
            raise ValueError(f"t must hold a finite number other than 0, got {len(t)} finite ones")
        self.knots = self.fit(t.tolist())
        self._until_refit = self.refit

    def _has_link(self) -> bool:
        return self.refit_on == "memory" or self.knots is not None

    def _loss(self, t: Tensor, spread: float) -> Tensor:
        if self.refit_on == "memory" and (self.knots is None or self._until_refit == 0):
            self.fit_to(self.past)
        if t.requires_grad and torch.is_grad_enabled():
            self._until_refit = max(0, self._until_refit - 1)
        link = self._interpolate(t)
        mixed = (1 - self.logistic_share) * link + self.logistic_share * torch.sigmoid(t)
        return -mixed.clamp(self.floor, 1 - self.floor).log()

    def fit(self, past: Sequence[float]) -> tuple[list[float], list[float]]:
        """Knots of the link: where, and how high; both in increasing order, symmetric about (0, 1/2)."""
        points = sorted([(t, 1.0) for t in past] + [(-t, 0.0) for t in past])
        # Equal t are one point of their mean, or the order in which they come would matter.
        places: list[float] = []
        sums: list[float] = []
        counts: list[float] = []
        for place, won in points:
            if not places or place != places[-1]:
                places.append(place)
                sums.append(0.0)
                counts.append(0.0)
            sums[-1] += won
            counts[-1] += 1.0
        heights = isotonic_fit([total / count for total, count in zip(sums, counts, strict=True)], counts)
        where: list[float] = []
        levels: list[float] = []
        mass = 0.0
        for place, height, count in zip(places, heights, counts, strict=True):
            if levels and height == levels[-1]:
                mass += count
                where[-1] += (place - where[-1]) * count / mass
            else:
                where.append(place)
                levels.append(height)
                mass = count
        return where, [min(max(level, self.floor), 1 - self.floor) for level in levels]

    def _interpolate(self, t: Tensor) -> Tensor:
        assert self.knots is not None
        where, levels = (torch.tensor(x, device=t.device, dtype=t.dtype) for x in self.knots)
        if len(where) == 1:
            return levels.expand_as(t)
        right = torch.searchsorted(where, t.detach().contiguous()).clamp(1, len(where) - 1)
        start, end = where[right - 1], where[right]
        share = ((t - start) / (end - start)).clamp(0, 1)
        return levels[right - 1] + share * (levels[right] - levels[right - 1])

    def link(self, t: float) -> float:
        """Psi(t) of the last fit, without the logistic share; ValueError before the first fit."""
        if self.knots is None:
            raise ValueError("the link is not fitted yet: it is after warm_up pairs")
        where, levels = self.knots
        right = bisect_left(where, t)
        if right == 0 or right == len(where):
            return levels[min(right, len(levels) - 1)]
        share = (t - where[right - 1]) / (where[right] - where[right - 1])
        return levels[right - 1] + share * (levels[right] - levels[right - 1])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "knots": self.knots, "until_refit": self._until_refit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.knots, self._until_refit = state.get("knots"), int(state.get("until_refit", 0))
