"""The passes over hidden states (`qkernels.head.chunks`) as torch.library ops, for torch.compile.

Eager code calls the passes directly. Shapes: hidden states `[N, H]`, weight `[V, H]`, bias `[V]`, labels a contiguous
int64 `[N]`. `valid_rows` is the number of valid rows: on a GPU it saves the synchronisation in which the host would
learn it. A wrong number drops rows, or takes one several times; the caller compares it with the labels.
"""

from __future__ import annotations

import torch

from ..core.columns import check_labels, stats_dtype
from . import chunks
from .chunks import Model, kept_dtype

_library = torch.library.Library("qkernels", "FRAGMENT")

_MODELS = (
    "Tensor hidden, Tensor weight, Tensor? bias,"
    " Tensor? reference_hidden, Tensor? reference_weight, Tensor? reference_bias, Tensor labels"
)
_LINEAR = (
    "int columns, float temperature, float? softcap, float logit_scale, int ignore_index, ScalarType dtype,"
    " ScalarType reference_dtype, SymInt chunk_rows, str backend, SymInt? valid_rows=None"
)
_library.define(f"linear_stats({_MODELS}, {_LINEAR}) -> Tensor")
_library.define(f"linear_unit_gradient({_MODELS}, {_LINEAR}) -> (Tensor, Tensor)")
_library.define(
    f"linear_gradients({_MODELS}, Tensor states, Tensor coefficients, bool[] needs, {_LINEAR})"
    " -> (Tensor, Tensor, Tensor)"
)


def _models(hidden, weight, bias, reference_hidden, reference_weight, reference_bias):
    reference = None if reference_hidden is None else Model(reference_hidden, reference_weight, reference_bias)
    return Model(hidden, weight, bias), reference


def _linear_stats(*args):
    # Eager code has done this already, in the shape of the batch. Chunks do not know where their rows come from.
    check_labels(args[6], args[1].shape[0], args[11])
    return chunks.stats(*_models(*args[:6]), args[6], chunks.LinearConfig(*args[7:]))


def _linear_stats_fake(*args):
    return args[0].new_empty((args[7].bit_count(), args[0].shape[0]), dtype=stats_dtype(args[12]))


def _linear_unit_gradient(*args):
    check_labels(args[6], args[1].shape[0], args[11])
    return chunks.unit_gradient(*_models(*args[:6]), args[6], chunks.LinearConfig(*args[7:]))


def _linear_unit_gradient_fake(*args):
    return _linear_stats_fake(*args), args[0].new_empty(args[0].shape, dtype=kept_dtype(args[12]))


def _linear_gradients(*args):
    labels, states, coefficients, needs = args[6:10]
    config = chunks.LinearConfig(*args[10:])
    result = chunks.gradients(*_models(*args[:6]), labels, states, coefficients, needs, config)
    return tuple(labels.new_empty(0) if gradient is None else gradient for gradient in result)


def _linear_gradients_fake(*args):
    inputs, labels, needs = args[:3], args[6], args[9]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else labels.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    )


for _name, _run, _fake in (
    ("linear_stats", _linear_stats, _linear_stats_fake),
    ("linear_unit_gradient", _linear_unit_gradient, _linear_unit_gradient_fake),
    ("linear_gradients", _linear_gradients, _linear_gradients_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)

linear_stats = torch.ops.qkernels.linear_stats.default
linear_unit_gradient = torch.ops.qkernels.linear_unit_gradient.default
linear_gradients = torch.ops.qkernels.linear_gradients.default
