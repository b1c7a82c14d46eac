"""A temperature for each row of logits: the kernels take one for all, so the rows are divided before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..core.fields import stats_dtype
from .rows import RowsRequest


class Tempered(torch.autograd.Function):
    """`logits [..., V] / temperatures [...]` as a new tensor in fp32 (fp64): nothing is rounded to 16 bits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperatures: Tensor) -> Tensor:
        ctx.save_for_backward(temperatures)
        ctx.dtype = logits.dtype
        return logits.to(stats_dtype(logits.dtype)) / temperatures.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (temperatures,) = ctx.saved_tensors
        return (grad / temperatures.unsqueeze(-1)).to(ctx.dtype), None


def tempered(request: RowsRequest, temperatures: Tensor | None) -> RowsRequest:
    """The same request on logits divided by a temperature for each row."""
    if temperatures is None:
        return request
    logits, reference = request.logits, request.reference_logits
    wide = temperatures.to(stats_dtype(logits.dtype))
    divided: Tensor = Tempered.apply(logits, wide)
    if reference is not None:
        reference = reference.detach().to(stats_dtype(reference.dtype)) / wide.unsqueeze(-1)
    return request._replace(logits=divided, reference_logits=reference, temperature=1.0)
