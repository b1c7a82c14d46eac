"""Backends: who computes the row operations, and which one `backend="auto"` picks.

A backend is a module with `row_stats`, `row_grad`, `row_grad_` and `pair_loss` (each takes its arguments as one of the
NamedTuples in `qkernels.core.calls`, which state the contracts), `row_grad_into(out, call)`, which is `row_grad` into a
given tensor `[S, T, V]` of the logits' dtype or, for fp32 logits, of 16 bits, and `unavailable(device, dtype)`, which
returns None when it can take such a tensor and otherwise says why not. A compiled one also has `wrong_build(device)`:
None, or why what is installed was not built for this machine, of which "auto" warns. To add one, write the module and
enter it in `_MODULES`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, TypeVar

import torch

from ..core.compile import constant_when_compiled

# Name -> module, in the order in which "auto" tries them. CUDA before Triton is an estimate from their machine code
# (bench/results/machine-code.md), not a measurement: to change it, change the order of the lines.
_MODULES: dict[str, str] = {
    "cuda": ".cuda",
    "triton": ".triton",
    "cpu": ".cpu",
    "torch": ".reference",
}
NAMES: tuple[str, ...] = ("auto", *_MODULES)

Result = TypeVar("Result")


def takes(arguments: type, after: int = 0) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a backend's function be called with a NamedTuple, as the engine does, or with its fields spelt out in order.

    Args:
        arguments: the NamedTuple.
        after: how many arguments come before it.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(*args: Any) -> Result:
            if len(args) == after + 1:
                return function(*args)
            return function(*args[:after], arguments(*args[after:]))

        return run

    return decorate


@cache
def get(name: str) -> ModuleType:
    """The backend module of that name."""
    return importlib.import_module(_MODULES[name], __name__)


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the named backend cannot take a tensor on `device` of `dtype`; None if it can."""
    reason: str | None = get(name).unavailable(device, dtype)
    return reason


@lru_cache(maxsize=256)
def _lookup(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name == "auto":
        # "triton" and "cuda" take CPU tensors in an interpreter or emulation, for tests: only when asked by name.
        candidates = [name for name in _MODULES if name not in ("triton", "cuda") or device.type != "cpu"]
        chosen = next(candidate for candidate in candidates if unavailable(candidate, device, dtype) is None)
        for passed_over in candidates[: candidates.index(chosen)]:
            if reason := getattr(get(passed_over), "wrong_build", lambda device: None)(device):
                warnings.warn(
                    f"qkernels: backend {passed_over!r} is installed and cannot run here: {reason}. Backend {chosen!r} "
                    f"is used on {device} instead; `qkernels info` shows what else can run",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return chosen
    if name not in NAMES:
        raise ValueError(f"backend {name!r} is unknown; expected one of {', '.join(NAMES)}")
    reason = unavailable(name, device, dtype)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run here: {reason}; backend='auto' picks one that can")
    return name


@constant_when_compiled  # torch.compile need not look inside: the answer depends on nothing else
def resolve_for(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The same for a tensor that does not exist yet."""
    if not isinstance(name, str):
        raise ValueError(f"backend {name!r} is unknown; expected one of {', '.join(NAMES)}")
    return _lookup(name, device, dtype)


def resolve(name: str, tensor: torch.Tensor) -> str:
    """The backend that will run on `tensor`: the named one, or for "auto" the first that can.

    Raises:
        ValueError: an unknown name, or a named backend that cannot take this tensor.
    """
    return resolve_for(name, tensor.device, tensor.dtype)
