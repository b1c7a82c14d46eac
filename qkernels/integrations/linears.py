"""Linear layers of a model's body, in fp32 on a CPU where this package's GEMM is faster than torch's.

MKL, which torch calls, runs AVX2 code on processors that are not Intel's (see `qkernels.head.products`). There the
layers below the head, which take most of the time of a model, leave half of the speed unused as well. `faster_linears`
lets them use the GEMM that the head uses; the results differ from torch's by rounding only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..head.products import multiply, own_kernel

# Fewer take torch's GEMM: that of this package has the time of a tile of 12 rows in any case.
_FEWEST_ROWS = 12


class _Linear(torch.autograd.Function):
    """x W^T + b for `[..., in]` and `[out, in]`, like `torch.nn.functional.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad  # a frozen layer does not keep its input, as torch's does not
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shape, ctx.weight_shape = x.shape, weight.shape
        rows = _rows(x)
        out = multiply("logits", rows, weight.t(), rows.new_empty(rows.shape[0], weight.shape[0]), bias)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, dx, dw = _rows(grad), None, None
        # With create_graph=True by operations that have a backward of their own.
        multiply_once = _differentiable if torch.is_grad_enabled() else multiply
        if weight is not None:
            dx = multiply_once("dX", rows, weight, rows.new_empty(rows.shape[0], weight.shape[1])).view(ctx.shape)
        if x is not None:
            dw = multiply_once("dW", rows.t(), _rows(x), rows.new_empty(ctx.weight_shape))
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def _differentiable(name: str, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return left @ right


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _served(x: Any, weight: Any, bias: Any) -> bool:
    """Whether this package's GEMM takes the input of a layer with these parameters."""
    return (
        type(x) is Tensor
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 for t in (weight, bias) if t is not None)
        and x.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.layout == weight.layout == torch.strided
        and weight.numel() > 0
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if _served(input, weight, bias):
        result: Tensor = _Linear.apply(input, weight, bias)
        return result
    return nn.functional.linear(input, weight, bias)


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile has any part of a model in hand; it would compile this detour, too."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def with_head(model: nn.Module) -> Any:
    """The outermost module that says it has a head; None if none does."""
    return next((module for module in model.modules() if hasattr(type(module), "get_output_embeddings")), None)


@contextlib.contextmanager
def faster_linears(model: nn.Module) -> Iterator[None]:
    """Within it, linear layers with fp32 weights on the CPU run by this package's GEMM if that is the faster one here.

    Enter it around the forward and the backward of a step: with gradient checkpointing, layers run again in the latter.
    Calls with other dtypes or devices, under autocast or torch.compile, of tensor subclasses (DTensor), the head, and
    layers whose `forward` somebody else has replaced are left alone.
    """
    layers: list[nn.Linear] = []
    first = next(model.parameters(), None)  # of a model on a GPU each call would take a turn through Python for nothing
    here = first is not None and own_kernel("logits", first.device, torch.float32) is not None
    if here and not compiled(model):
        causal = with_head(model)
        head = None if causal is None else causal.get_output_embeddings()  # `transformers.hook` replaces its forward
        layers = [
            layer
            for layer in model.modules()
            if type(layer) is nn.Linear and layer is not head and "forward" not in vars(layer)
        ]
    try:
        for layer in layers:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
