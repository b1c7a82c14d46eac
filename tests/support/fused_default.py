"""The fused `pair_loss` operation of a backend beside the objective `sigmoid`, in float64 with torch's autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from assertions import EPS32, SMALLEST, assert_within
from cases import IGNORE, generator
from qkernels.backends import ops
from qkernels.core.calls import PairLoss
from qkernels.objectives import OBJECTIVES, PairScores

LAYOUTS = ("dense", "packed")
REFERENCES = ("none", "per token", "per sequence")


@dataclass(frozen=True)
class Case:
    """What is fused besides the pairs themselves.

    layout: "dense" `[2B, T]`, or "packed" `[1, N]` with an empty sequence.
    reference: "none", "per token" `[S, T]` or "per sequence" `[2B]` log-probs.
    weighted: token weights, some of them 0; else labels say which rows count.
    """

    layout: str
    reference: str
    weighted: bool
    label_smoothing: float
    beta: float = 0.3

    def __str__(self) -> str:
        weights = "weights" if self.weighted else "labels"
        return f"{self.layout}-{self.reference}-{weights}-{self.label_smoothing}".replace(" ", "_")


CASES = [Case(*how) for how in itertools.product(LAYOUTS, REFERENCES, (False, True), (0.0, 0.2))]


@dataclass
class Outputs:
    """What the operation returns: loss [], rewards [2B], grad [S, T], tokens [2 or 0, S, T]."""

    loss: Tensor
    rewards: Tensor
    grad: Tensor
    tokens: Tensor


@dataclass
class Truth(Outputs):
    """The same in float64, and for each what a relative error of 1 in every row's weighted log-ratio may change."""

    changes: Outputs


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Log-probs of 3 pairs of up to 11 rows; rows that do not count hold NaN."""
    lengths = [11] * 6 if case.layout == "dense" else [4, 11, 0, 1, 7, 3]
    shape = (6, 11) if case.layout == "dense" else (1, sum(lengths))
    g = generator(6, *lengths)
    logps = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
    reference = logps + torch.randn(shape, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 5, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.3] = IGNORE
    weights = torch.rand(shape, generator=g, dtype=torch.float64).masked_fill(labels == IGNORE, 0.0)
    weights[..., 2] = 0.0
    counts = weights != 0 if case.weighted else labels != IGNORE
    given: Tensor | None = reference.where(counts, torch.nan)
    if case.reference == "per sequence":
        given = -4 * torch.rand(6, generator=g, dtype=torch.float64)
    elif case.reference == "none":
        given = None
    ends = None if case.layout == "dense" else torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "logps": logps.where(counts, torch.nan).to(dtype),
        "reference_logps": None if given is None else given.to(dtype),
        "labels": labels,
        "weights": weights.to(dtype) if case.weighted else None,
        "cu_seqlens": ends,
    }


def expected(case: Case, given: dict[str, Tensor | None], formula: Callable[..., Tensor]) -> Truth:
    """By the objective: sums of float64 log-ratios, its mean over pairs, and autograd through both."""
    labels, ends = given["labels"], given["cu_seqlens"]
    weights = (labels != IGNORE).double() if given["weights"] is None else given["weights"].double()
    logps = given["logps"].double().masked_fill(weights == 0, 0.0).requires_grad_()
    reference, per_sequence = torch.zeros_like(logps), torch.zeros(6, dtype=torch.float64)
    if case.reference == "per token":
        reference = given["reference_logps"].double().masked_fill(weights == 0, 0.0)
    elif case.reference == "per sequence":
        per_sequence = given["reference_logps"].double()

    def sums(rows: Tensor) -> Tensor:
        if ends is None:
            return rows.sum(1)
        return torch.stack([rows[0, a:b].sum() for a, b in itertools.pairwise(ends.tolist())])

    policy, other = sums(weights * logps), sums(weights * reference) + per_sequence
    ratios = policy - other
    halves = [half for values in (ratios, policy, other, sums(weights)) for half in values.chunk(2)]
    loss = formula(PairScores(*halves), case.beta, label_smoothing=case.label_smoothing).mean()
    (grad,) = torch.autograd.grad(loss, logps)
    difference = (logps - reference).detach()
    tokens = torch.stack([case.beta * difference, reference])
    # |dloss/dx| <= 1 and |d2loss/dx2| <= 1/4 in the scaled margin x of each pair, of which the loss is the mean.
    rewards = case.beta * sums(weights * difference.abs())
    of_pair = rewards[:3] + rewards[3:]
    of_rows = case.beta * weights * (of_pair.max() / 4 / 3)
    changes = Outputs(of_pair.mean(), rewards, of_rows, tokens.abs())
    if case.reference == "per sequence":
        tokens, changes.tokens = tokens[:0], tokens[:0]
    return Truth(loss.detach(), case.beta * ratios.detach(), grad, tokens, changes)


def check_fused_default(backend, dtype: torch.dtype, case: Case, formula=OBJECTIVES["sigmoid"].function) -> None:
    """Loss, rewards, gradient and token rewards of the operation are those of the objective.

    Every row's log-ratio and its product with the weight may be rounded, and so may each result (the gradient twice:
    the slope, and its product with the weight). Sums are float64.
    """
    given = inputs(case, dtype)
    truth = expected(case, given, formula)
    here = {name: None if value is None else value.to(backend.device) for name, value in given.items()}
    how = {"beta": case.beta, "label_smoothing": case.label_smoothing, "ignore_index": IGNORE, "backend": backend.name}
    actual = Outputs(*ops.pair_loss(PairLoss(**here, **how)))
    eps = EPS32 if dtype == torch.float32 else 2.0**-50  # of float64 sums the order shows too
    for name in ("loss", "rewards", "grad", "tokens"):
        value, exact = getattr(actual, name), getattr(truth, name)
        assert value.dtype == dtype, f"{name} is {value.dtype}, expected {dtype}"
        assert_within(value, exact, eps * (2 * exact.abs() + 2 * getattr(truth.changes, name)) + SMALLEST, name)
