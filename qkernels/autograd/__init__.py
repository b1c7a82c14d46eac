"""Autograd functions: what is saved, what is recomputed, and how upstream gradients reach the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's: no gradients within a backward, and an error for one through it.

    Torch's always enters `no_grad`; where gradients are off already, as in an ordinary backward, this does not.
    """
    with_check = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return with_check(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
