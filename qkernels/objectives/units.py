"""Units: what one entry of a loss depends on, and with it when its gradient is known.

| unit | an entry of the loss depends on |
|---|---|
| token | its own token |
| sequence | the tokens of its sequence |
| pair | the tokens of its chosen and its rejected answer |
| batch | anything |

From hidden states the first three take three GEMMs, two with a frozen head: a chunk holds whole units, so dL/dlogp of
its rows is known while their logits exist. `batch` takes one GEMM more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import checks

UNITS = ("token", "sequence", "pair", "batch")

F = TypeVar("F", bound=Callable[..., Tensor])


def declare_unit(unit: str) -> Callable[[F], F]:
    """A decorator by which a function that is passed as `loss_type` declares its unit; without one it is "batch".

        @declare_unit("pair")
        def my_loss(scores, beta, margin=1.0):
            return torch.relu(margin - beta * scores.margins)

    A function that reads another unit than its own is found when it is first used: the scores of other units are
    changed, and its entries must not be.

    Args:
        unit: "pair" on `PairScores`, "sequence" on `SequenceScores`, "token" or "sequence" on `PolicyScores`, or
            "batch".

    Raises:
        ValueError: an unknown unit.
    """
    checked_unit(unit, UNITS)

    def declare(function: F) -> F:
        function.unit = unit  # type: ignore[attr-defined]
        return function

    return declare


def checked_unit(unit: str, allowed: Sequence[str]) -> str:
    """`unit`, if it is one of those allowed; else ValueError."""
    return checks.choice(unit, "unit", tuple(allowed))


def declared_unit(function: Callable[..., Tensor], allowed: Sequence[str]) -> str:
    """The unit that a user's function declares, "batch" without a declaration.

    Raises:
        ValueError: a unit that this kind of loss does not have.
    """
    unit = getattr(function, "unit", "batch")
    if unit not in allowed:
        name = getattr(function, "__name__", type(function).__name__)
        known = ", ".join(map(repr, allowed))
        raise ValueError(f"loss_type {name} declares the unit {unit!r}; a loss of this function may have {known}")
    return str(unit)


# Functions that have been seen to keep their unit.
_checked: weakref.WeakSet[Any] = weakref.WeakSet()


def check_once(function: Any, unit: str, losses: Callable[[Any], Tensor], scores: Any, whole: Tensor) -> None:
    """Check, the first time that a user's function sees two units or more, that it keeps the unit it declares.

    The scores of every second unit are changed, then left out: the entries of the others must stay. With
    QKERNELS_CHECK=1 it is checked every time; on another device than the CPU only then, since the host looks.

    Args:
        function: the user's.
        unit: that it declares.
        losses: from scores to one entry per unit.
        scores: a dataclass with tensors `[n, ...]` among its fields.
        whole: `losses(scores)`, `[n]`.

    Raises:
        ValueError: an entry that depends on other units.
    """
    number = whole.shape[0]
    always = checks.asked_to_check()
    if number < 2 or not checks.readable(whole) or (not always and _seen(function)):
        return
    kept = torch.arange(number, device=whole.device) % 2 == 0

    def with_fields(change: Callable[[Tensor], Tensor]) -> Any:
        fields = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
        own = {k: v.detach() for k, v in fields.items() if isinstance(v, Tensor) and v.shape[:1] == whole.shape[:1]}
        return dataclasses.replace(scores, **{name: change(value) for name, value in own.items()})

    def moved(value: Tensor) -> Tensor:
        stays = kept.view(-1, *(1 for _ in value.shape[1:]))
        return torch.where(stays, value, value.flip(0) + 1 if value.is_floating_point() else value.flip(0))

    with torch.no_grad():
        changed = losses(with_fields(moved))[kept]
        alone = losses(with_fields(lambda value: value[kept]))
    for what, found in (("change", changed), ("are left out", alone)):
        truth = whole.detach()[kept]
        same = torch.isclose(found, truth, rtol=1e-4, atol=1e-6, equal_nan=True)
        if not bool(same.all()):
            first = int((~same).nonzero()[0])
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(
                f"loss_type {name} declares unit={unit!r}, but the loss of {unit} {2 * first} depends on other {unit}s:"
                f" {truth[first].item():.6g} becomes {found[first].item():.6g} where they {what}. Declare"
                f" unit 'batch', or make it a function of its own {unit} alone"
            )
    with contextlib.suppress(TypeError):  # what cannot be remembered is checked again
        _checked.add(function)


def _seen(function: Any) -> bool:
    try:
        return function in _checked
    except TypeError:
        return False
