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


class FiniteGradients(torch.autograd.Function):
    """Tensors as they are; their gradients are kept within +-1e30 (fp32) or +-1e300 (fp64).

    A loss that overflows, such as the square of an exponential, has an infinite gradient. Times a weight or a
    probability of 0 it would be NaN, and one pair would spoil the gradients of the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(
            None if g is None else g.clamp(-_LARGEST_GRADIENT[g.dtype], _LARGEST_GRADIENT[g.dtype]) for g in grads
        )
