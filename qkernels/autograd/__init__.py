"""Autograd functions: what is saved, what is recomputed, and how upstream gradients reach the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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


# No gradient of a sequence's sum is larger than this, by dtype: products with weights, probabilities and hidden states
# have room up to the largest number.
_LARGEST_GRADIENT = {torch.float32: 1e30, torch.float64: 1e300}


def finite_gradient(gradient: Tensor) -> Tensor:
    """A gradient kept within +-1e30 (fp32) or +-1e300 (fp64).

    A loss that overflows, such as the square of an exponential, has an infinite gradient. Times a weight or a
    probability of 0 it would be NaN, and one pair would turn the gradients of the whole batch into NaN.
    """
    largest = _LARGEST_GRADIENT[gradient.dtype]
    return gradient.clamp(-largest, largest)


class FiniteGradient(torch.autograd.Function):
    """A tensor as it is; its gradient is kept finite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else finite_gradient(gradient)
