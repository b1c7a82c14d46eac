"""The passes over hidden states (`qkernels.head.chunks`) as torch.library ops, for torch.compile.

Eager code calls the passes directly. Compiled code has no shards, and does not know the indices of the valid rows; it
may know their number, `valid_rows`, which on a GPU saves the synchronisation in which the host would learn it. A wrong
number drops rows, or takes one several times; the caller compares it with the labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_labels
from ..core.fields import stats_dtype
from ..core.operations import NAMESPACE, Operation, Traits
from . import chunks
from .call import HeadCall
from .chunks import saved_dtype

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class GradientsCall(NamedTuple):
    """The arguments of `chunks.gradients`.

    softmax: `[3 or 6, N]`, the softmax statistics of the models.
    coefficients: `[1 or 5, N]`, see `qkernels.core.coefficients`.
    needs: whether hidden, weight and bias need a gradient.
    """

    softmax: Tensor
    coefficients: Tensor
    needs: list[bool]
    call: HeadCall


def _checked(call: HeadCall) -> HeadCall:
    # Eager code has done this already, in the shape of the batch. Chunks do not know where their rows come from.
    check_labels(call.labels, call.policy.weight.shape[0], call.config.ignore_index)
    return call


def _stats_fake(call: HeadCall) -> Tensor:
    hidden, config = call.policy.hidden, call.config
    return hidden.new_empty((config.fields.bit_count(), hidden.shape[0]), dtype=stats_dtype(config.dtype))


def _unit_gradient_fake(call: HeadCall) -> tuple[Tensor, Tensor]:
    hidden = call.policy.hidden
    return _stats_fake(call), hidden.new_empty(hidden.shape, dtype=saved_dtype(call.config.dtype))


def _gradients(given: GradientsCall) -> tuple[Tensor, ...]:
    result = chunks.gradients(given.call, given.softmax, given.coefficients, given.needs)
    return tuple(given.softmax.new_empty(0) if gradient is None else gradient for gradient in result)


def _gradients_fake(given: GradientsCall) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if needed and x is not None
        else given.softmax.new_empty(0)
        for x, needed in zip(given.call.policy, given.needs, strict=True)
    )


_TRAITS = Traits(symbolic=("chunk_rows", "valid_rows"), left_out=("shard", "valid"))
linear_stats = Operation(
    _library, "linear_stats", HeadCall, "Tensor",
    run=lambda call: chunks.stats(_checked(call)), fake=_stats_fake, traits=_TRAITS,
)  # fmt: skip
linear_unit_gradient = Operation(
    _library, "linear_unit_gradient", HeadCall, "(Tensor, Tensor)",
    run=lambda call: chunks.unit_gradient(_checked(call)), fake=_unit_gradient_fake,
    traits=_TRAITS,
)  # fmt: skip
linear_gradients = Operation(
    _library, "linear_gradients", GradientsCall, "(Tensor, Tensor, Tensor)",
    run=_gradients, fake=_gradients_fake, traits=_TRAITS,
)  # fmt: skip
