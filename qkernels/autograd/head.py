"""Autograd of the passes over hidden states: what is saved, and how upstream gradients reach the GEMMs.

Nothing of the logits' size is ever saved. `HeadStats` saves the inputs and recomputes the logits; `FrozenHead` saves
d logp / d hidden, which an upstream gradient scales row by row; `KnownGradient` has the gradients already, up to the
upstream gradient of a scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import devices
from ..core.coefficients import coefficients
from ..core.fields import DIVERGENCES
from ..core.memory import block_elements
from ..head import chunks, ops
from ..head.call import HeadCall, Model
from ..head.chunks import Gradients
from . import once_differentiable
from .saved import restored, results_of, saveable


class HeadStats(torch.autograd.Function):
    """`(hidden [N, H], weight [V, H], bias [V] or None, call) -> stats [K, N], fields [N] ...`. Four GEMMs.

    `call` has the same model, the reference, which is a constant, and the labels. `stats` is a constant; the fields
    named in `differentiable`, which follow it, have a gradient with respect to hidden, weight and bias.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, differentiable: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        if call.policy.hidden is not hidden:  # inside torch.compile
            call = call._replace(policy=Model(hidden, weight, bias))
        stats = ops.linear_stats.as_op(call) if torch.compiler.is_compiling() else chunks.stats(call)
        fields = call.config.fields
        with_kl = fields & DIVERGENCES
        reference = call.reference if with_kl and call.reference is not None else (None, None, None)
        constants = saveable(ctx, *reference, call.temperatures)
        ctx.save_for_backward(hidden, weight, bias, *constants, call.labels, call.valid, stats)
        ctx.config, ctx.differentiable = call.config, differentiable
        return results_of(ctx, stats, fields, differentiable)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved, labels, valid, stats = ctx.saved_tensors
        reference_hidden, reference_weight, reference_bias, temperatures = restored(ctx, *saved)
        reference = None
        if reference_hidden is not None and reference_weight is not None:
            reference = Model(reference_hidden, reference_weight, reference_bias)
        call = HeadCall(
            policy=Model(hidden, weight, bias),
            reference=reference,
            labels=labels,
            config=ctx.config,
            valid=valid,
            temperatures=temperatures,
        )
        upstream = coefficients(stats, dict(zip(ctx.differentiable, grads, strict=True)), ctx.config.fields)
        softmax = stats[:3] if reference is None else stats[:6]
        needs = list(ctx.needs_input_grad[:3])
        if torch.compiler.is_compiling():
            found = ops.linear_gradients.as_op(ops.GradientsCall(softmax, upstream, needs, call))
            found = tuple(g if needed else None for g, needed in zip(found, needs, strict=True))
        else:
            found = chunks.gradients(call, softmax, upstream, needs)
        return *found, None, None


class FrozenHead(torch.autograd.Function):
    """`(hidden [N, H], call) -> stats [K, N], logps [N]` for a head without gradient. Two GEMMs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: HeadCall) -> tuple[Tensor, ...]:
        if call.policy.hidden is not hidden:  # inside torch.compile
            call = call._replace(policy=call.policy._replace(hidden=hidden))
        compiling = torch.compiler.is_compiling()
        stats, unit = ops.linear_unit_gradient.as_op(call) if compiling else chunks.unit_gradient(call)
        ctx.save_for_backward(unit, call.labels == call.config.ignore_index, call.valid)
        ctx.dtype, ctx.shard = hidden.dtype, call.config.shard
        return results_of(ctx, stats, call.config.fields, ("logps",))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, ignored, valid = ctx.saved_tensors
        # The upstream gradient of an ignored row may be anything: 0 * NaN would be NaN.
        grad = grad.masked_fill(ignored, 0.0).unsqueeze(1)
        gradient = scaled(unit, grad, ctx.dtype)
        if ctx.shard is not None:
            gradient = ctx.shard.sum_rows(gradient, valid)
        return gradient, None


class Known(NamedTuple):
    """Gradients of hidden states, weight and bias that exist already, and how to compute them again."""

    gradients: Gradients
    again: Callable[[], Gradients]


class KnownGradient(torch.autograd.Function):
    """A scalar loss whose gradients with respect to hidden states, weight and bias exist already.

    The backward multiplies them by the upstream gradient in their own memory and gives them away; those of fp16 inputs
    come in fp32 (`chunks.saved_dtype`) and are rounded after that. A second backward through the same graph computes
    them again.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, known: Known) -> Tensor:
        # On the context and not through save_for_backward: they belong to nobody else, and are to be written over.
        ctx.gradients, ctx.again = known
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(hidden, weight, bias)  # so that torch notices if they change before a second backward
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _ = ctx.saved_tensors  # raises if the graph has been freed, or the inputs have changed
            gradients = ctx.again()
        # The host may look at a number in its own memory: the usual factor 1 saves a pass over dW, and a plain number
        # needs no wide copy of it.
        factor = grad.item() if devices.on_cpu(grad.device) else None
        for gradient in gradients:
            if gradient is None or factor == 1:
                continue
            if factor is not None:
                gradient.mul_(factor)
            else:
                torch.mul(gradient, grad.view((1,) * gradient.dim()), out=gradient)
        results = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, *results, None


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values `[N, H]` * factor `[N, 1]` in `dtype`, multiplied in fp32 or better and rounded once."""
    if torch.compiler.is_compiling():
        return (values * factor).to(dtype)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if not devices.on_cpu(values.device) or values.dtype == factor.dtype == dtype:
        return torch.mul(values, factor, out=out)
    step = max(1, block_elements(values.device) // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):  # a CPU would make wide copies of it all
        block = slice(start, start + step)
        out[block] = values[block] * factor[block]
    return out
