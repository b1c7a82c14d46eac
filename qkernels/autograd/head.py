"""Autograd of the row operations on hidden states: what is saved, and how upstream gradients reach the products.

Nothing of the logits' size is ever saved. `LinearStats` saves the inputs and makes the logits again; `FrozenHead` saves
d logp / d hidden, which an upstream gradient scales row by row; `KnownGradient` has the gradients already, up to the
upstream gradient of a scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.coefficients import coefficients as coefficients_of
from ..core.columns import BIT
from ..core.memory import BLOCK_ELEMENTS
from ..head import chunks, ops
from ..head.chunks import LinearConfig, Model
from . import once_differentiable
from .saved import carried, restored, saveable

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _reference(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Model | None:
    return None if hidden is None or weight is None else Model(hidden, weight, bias)


class LinearStats(torch.autograd.Function):
    """`(hidden [N, H], weight [V, H], bias [V] or None) -> stats [K, N], columns [N] ...`. Four products.

    `stats` is a constant; the columns named in `carrying`, which follow it, are differentiable in all three. The
    reference is a constant. `valid`: the numbers of the rows that count, None where the host does not know how many.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels, valid,
        config: LinearConfig, carrying: tuple[str, ...],
    ):  # fmt: skip
        reference = _reference(reference_hidden, reference_weight, reference_bias)
        if torch.compiler.is_compiling():
            stats = ops.linear_stats(
                hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels, *config.for_op()
            )
        else:
            stats = chunks.stats(Model(hidden, weight, bias), reference, labels, config, valid)
        if not config.columns & (BIT["kl_reference_policy"] | BIT["kl_policy_reference"]):
            reference_hidden = reference_weight = reference_bias = None  # the backward needs no reference
        kept = saveable(ctx, reference_hidden, reference_weight, reference_bias)
        ctx.save_for_backward(hidden, weight, bias, *kept, labels, valid, stats)
        ctx.config, ctx.carrying = config, carrying
        return carried(ctx, stats, config.columns, carrying)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads):
        hidden, weight, bias, *kept, labels, valid, stats = ctx.saved_tensors
        reference_hidden, reference_weight, reference_bias = restored(ctx, *kept)
        config: LinearConfig = ctx.config
        coefficients = coefficients_of(stats, dict(zip(ctx.carrying, grads, strict=True)), config.columns)
        states = stats[:3] if reference_hidden is None else stats[:6]
        needs = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():
            result = ops.linear_gradients(
                hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels, states, coefficients,
                list(needs), *config.for_op(),
            )  # fmt: skip
            result = tuple(g if needed else None for g, needed in zip(result, needs, strict=True))
        else:
            reference = _reference(reference_hidden, reference_weight, reference_bias)
            policy = Model(hidden, weight, bias)
            result = chunks.gradients(policy, reference, labels, states, coefficients, needs, config, valid)
        return *result, None, None, None, None, None, None, None


class FrozenHead(torch.autograd.Function):
    """`hidden [N, H] -> stats [K, N], logps [N]` for a head without gradient. Two products."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels, valid,
        config: LinearConfig,
    ):  # fmt: skip
        if torch.compiler.is_compiling():
            stats, unit = ops.linear_unit_gradient(
                hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels, *config.for_op()
            )
        else:
            reference = _reference(reference_hidden, reference_weight, reference_bias)
            stats, unit = chunks.unit_gradient(Model(hidden, weight, bias), reference, labels, config, valid)
        ctx.save_for_backward(unit, labels == config.ignore_index, valid)
        ctx.dtype, ctx.shard = hidden.dtype, config.shard
        return carried(ctx, stats, config.columns, ("logps",))

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad):
        unit, ignored, valid = ctx.saved_tensors
        # Upstream an ignored row may have anything: 0 * NaN would be NaN.
        grad = grad.masked_fill(ignored, 0.0).unsqueeze(1)
        gradient = scaled(unit, grad, ctx.dtype)
        if ctx.shard is not None:
            gradient = ctx.shard.sum_rows(gradient, valid)
        return gradient, None, None, None, None, None, None, None, None


class KnownGradient(torch.autograd.Function):
    """A scalar loss whose gradients with respect to hidden states, weight and bias exist already.

    The backward multiplies them by the upstream gradient in their own memory and gives them away; those of fp16 inputs
    come in fp32 (`chunks.kept_dtype`) and are rounded after that. A second backward through the same graph makes them
    anew.
    """

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, gradients: Gradients, again: Callable[[], Gradients]):
        # On the context and not through save_for_backward: they belong to nobody else, and are to be written over.
        ctx.gradients, ctx.again = gradients, again
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(hidden, weight, bias)  # so that torch notices if they change before a second backward
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _ = ctx.saved_tensors  # raises if the graph has been freed, or the inputs have changed
            gradients = ctx.again()
        # The host may look at a number in its own memory: the usual factor 1 saves a pass over dW, and a plain number
        # needs no wide copy of it.
        factor = grad.item() if grad.device.type == "cpu" else None
        for gradient in gradients:
            if gradient is None or factor == 1:
                continue
            if factor is not None:
                gradient.mul_(factor)
            else:
                torch.mul(gradient, grad.view((1,) * gradient.dim()), out=gradient)
        results = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, *results, None, None


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values `[N, H]` * factor `[N, 1]` in `dtype`, multiplied in fp32 or better and rounded once."""
    if torch.compiler.is_compiling():
        return (values * factor).to(dtype)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.device.type != "cpu" or values.dtype == factor.dtype == dtype:
        return torch.mul(values, factor, out=out)
    step = max(1, BLOCK_ELEMENTS // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):  # a CPU would make wide copies of it all
        block = slice(start, start + step)
        out[block] = values[block] * factor[block]
    return out
