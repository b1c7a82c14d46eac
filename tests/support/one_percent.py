"""A pytest plugin that makes one place of the engine wrong by 1 %: `QK_ONE_PERCENT=row_stats pytest -p one_percent`.

`tests/repo/test_quick.py` runs the quick tier with each place, and expects it to fail.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qkernels import backends
from qkernels.head.products import Head, WeightGrad
from qkernels.objectives import OBJECTIVES

SLIGHTLY = 1.01
VARIABLE = "QK_ONE_PERCENT"


def _scaled(result: Any) -> Any:
    return result * SLIGHTLY if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def _results(module: Any, name: str, *places: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Scale what an operation of a backend returns; of a tuple only these places."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        real = getattr(module, name)

        def wrong(*args: Any) -> Any:
            result = real(*args)
            if not places:
                return _scaled(result)
            return tuple(_scaled(part) if i in places else part for i, part in enumerate(result))

        patch.setattr(module, name, wrong)

    return apply


def _written(owner: Any, name: str, place: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Scale what an operation writes into the argument at this place, or into the first field of a call given whole."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)

        def wrong(*args: Any) -> Any:
            result = real(*args)
            target = args[place]
            (target if isinstance(target, torch.Tensor) else target[0]).mul_(SLIGHTLY)
            return result

        patch.setattr(owner, name, wrong)

    return apply


def _weight_gradient(patch: pytest.MonkeyPatch) -> None:
    """Scale the gradients that the head's weight and bias sum up."""
    real = WeightGrad.add

    def wrong(self: WeightGrad, g: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
        real(self, g * SLIGHTLY, x, *rest)

    patch.setattr(WeightGrad, "add", wrong)


def _objective(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Scale the loss of one objective."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        real = OBJECTIVES[name]

        def wrong(*args: Any, **options: Any) -> torch.Tensor:
            return real.function(*args, **options) * SLIGHTLY

        patch.setitem(OBJECTIVES, name, dataclasses.replace(real, function=wrong))

    return apply


def _places() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    found: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}
    for backend in ("cpu", "torch"):
        module = backends.get(backend)
        found |= {
            f"row_stats of {backend}": _results(module, "row_stats"),
            f"row_grad of {backend}": _results(module, "row_grad"),
            f"row_grad_ of {backend}": _written(module, "row_grad_", 0),
            f"row_grad_into of {backend}": _written(module, "row_grad_into", 0),
        }
        for place, part in enumerate(("loss", "rewards", "gradient", "tokens")):
            found[f"{part} of pair_loss of {backend}"] = _results(module, "pair_loss", place)
    found["logits of the head"] = _written(Head, "logits", 2)
    found["gradient of the head's input"] = _results(Head, "input_grad")
    found["gradient of the head's weight"] = _weight_gradient
    return found | {f"objective {name}": _objective(name) for name in OBJECTIVES}


PLACES = _places()


def pytest_configure() -> None:
    if place := os.environ.get(VARIABLE):
        PLACES[place](pytest.MonkeyPatch())
