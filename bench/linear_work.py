"""The work of the benchmarks from hidden states: tensors, their bare matrix products as a floor, one training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import measure

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Plan -> whether the head is trained, and the products it takes.
PLANS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "pair_chunks": (True, ("logits", "dX", "dW")),
    "frozen_head": (False, ("logits", "dX")),
    "recompute": (True, ("logits", "logits", "dX", "dW")),
}
FLOORS = {1: "bare product", 2: "two bare products", 3: "three bare products", 4: "four bare products"}


@dataclass(frozen=True, eq=False)
class Work:
    """Hidden states, weight and labels, and what the bare products of them take, in seconds."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    products: dict[str, float]

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, labels: Tensor, rounds: int = 5) -> Work:
        """With the median times of the three products of a head, in the dtype of the inputs, as torch runs them."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.mm(flat, weight.t())

        def seconds(product: Callable[[], object]) -> float:
            return statistics.median(measure.device_seconds(product, hidden.device, rounds))

        products = {
            "logits": seconds(lambda: torch.mm(flat, weight.t(), out=logits)),
            "dX": seconds(lambda: torch.mm(logits, weight)),
            "dW": seconds(lambda: torch.mm(logits.t(), flat)),
        }
        return Work(hidden, weight, labels, products)

    def timed_again(self) -> Work:
        """The same, its products timed now: for ratios close to 1 on machines whose speed wanders."""
        return Work.of(self.hidden, self.weight, self.labels, 2)

    @property
    def rows(self) -> int:
        return self.labels.numel()

    @property
    def shape(self) -> str:
        return f"{self.rows} rows, H = {self.hidden.shape[-1]}, V = {self.weight.shape[0]}"

    def facts(self, products: tuple[str, ...], share: float = 1.0) -> dict[str, Any]:
        """What `report.Entry` says of work that takes these products for a share of the rows."""
        flops = len(products) * share * 2 * self.rows * self.hidden.shape[-1] * self.weight.shape[0]
        return {
            "shape": self.shape,
            "amount": flops / 1e9,
            "unit": "GFLOP",
            "floor": FLOORS[len(products)],
            "floor_seconds": share * sum(self.products[name] for name in products),
            "logits_bytes": self.rows * self.weight.shape[0] * self.hidden.element_size(),
        }


def step(loss: Loss, work: Work, labels: Tensor, trains_head: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward; returns the loss and dX."""

    def run() -> tuple[Tensor, Tensor]:
        hidden = work.hidden.detach().requires_grad_()
        weight = work.weight.detach().requires_grad_(trains_head)
        value = loss(hidden, weight, labels)
        value.backward()
        assert hidden.grad is not None
        return value.detach(), hidden.grad

    return run
