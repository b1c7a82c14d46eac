"""The row operations as torch.library ops: what torch.compile sees, and the one place that calls a backend.

Shapes: `logits` is `[S, T, V]` with a contiguous last dimension and any strides before it (a packed batch is
`[1, N, V]`); `labels` is a contiguous int64 `[S, T]`; per-row buffers are `[K, S, T]`, fp32 (fp64 for fp64 logits).
`columns` and the order of every per-row buffer are explained in `qkernels.rows`.

- `row_stats`: the requested columns of each row. One read of each logit. A row with an ignored label is not read; it
  is 0 in every column. IndexError for a label outside [0, V) on the CPU, NaN in that row elsewhere.
- `row_grad`: dL/dlogits into a new tensor. One read and one write of each logit; rows that are ignored, or whose
  coefficients are all 0, are set to 0 without being read. `upstream`, a scalar on the device in the dtype of the
  results, multiplies all coefficients; None stands for 1.
- `row_grad_`: the same over the logits' own storage.
- `linear_stats`, `linear_unit_gradient`, `linear_gradients`: the passes of `qkernels.chunks` over hidden states, for
  torch.compile; eager code calls them directly. `valid_rows` is how many rows count: on a GPU the host waits to learn
  it unless it is given. A wrong number drops rows, or takes one several times; the caller compares it with the labels.
- `pair_loss`: DPO with label smoothing from per-row log-probs: `(loss [], rewards [2B], dloss/dlogps [S, T], tokens
  [2, S, T])`, where rewards are beta times the weighted sums of log-ratios, and tokens are beta times the log-ratio of
  each row, and the reference's log-prob. `weights` `[S, T]` are 0 where the label is ignored, None stands for 1
  elsewhere; rows of weight 0 do not count, are not read, and are 0 in all results. `reference_logps` is per token,
  `[S, T]`, per sequence, `[2B]` (tokens are `[0, S, T]` then), or None for 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from . import backends
from .rows import check_labels, pair_outputs, stats_dtype

_library = torch.library.Library("qkernels", "DEF")

_ROW = "Tensor labels, Tensor? reference"
_BACK = "Tensor state, Tensor? reference_state, Tensor coefficients, Tensor? upstream"
_HOW = "float temperature, int ignore_index, str backend"
_library.define(f"row_stats(Tensor logits, {_ROW}, int columns, {_HOW}) -> Tensor")
_library.define(f"row_grad(Tensor logits, {_ROW}, {_BACK}, {_HOW}) -> Tensor")
_library.define(f"row_grad_(Tensor(a!) logits, {_ROW}, {_BACK}, {_HOW}) -> ()")
_library.define(
    "pair_loss(Tensor logps, Tensor? reference_logps, Tensor labels, Tensor? weights, Tensor? cu_seqlens, float beta,"
    " float label_smoothing, int ignore_index, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)

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


def _row_stats(logits, labels, reference, columns, temperature, ignore_index, backend):
    return backends.get(backend).row_stats(logits, labels, reference, columns, temperature, ignore_index)


def _row_grad(*args):
    return backends.get(args[-1]).row_grad(*args[:-1])


def _row_grad_(*args):
    backends.get(args[-1]).row_grad_(*args[:-1])


def _pair_loss(*args):
    return backends.get(args[-1]).pair_loss(*args[:-1])


def _row_stats_fake(logits, labels, reference, columns, temperature, ignore_index, backend):
    return logits.new_empty((columns.bit_count(), *labels.shape), dtype=stats_dtype(logits.dtype))


def _row_grad_fake(logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _row_grad_fake_(*args):
    return None


def _pair_loss_fake(logps, reference_logps, labels, weights, cu_seqlens, *args):
    return pair_outputs(logps, reference_logps, cu_seqlens)


def _models(hidden, weight, bias, reference_hidden, reference_weight, reference_bias):
    from .chunks import Model  # imports this module

    reference = None if reference_hidden is None else Model(reference_hidden, reference_weight, reference_bias)
    return Model(hidden, weight, bias), reference


def _linear_stats(*args):
    from . import chunks

    # Eager code has done this already, in the shape of the batch. Chunks do not know where their rows come from.
    check_labels(args[6], args[1].shape[0], args[11])
    return chunks.stats(*_models(*args[:6]), args[6], chunks.LinearConfig(*args[7:]))


def _linear_stats_fake(*args):
    return args[0].new_empty((args[7].bit_count(), args[0].shape[0]), dtype=stats_dtype(args[12]))


def _linear_unit_gradient(*args):
    from . import chunks

    check_labels(args[6], args[1].shape[0], args[11])
    return chunks.unit_gradient(*_models(*args[:6]), args[6], chunks.LinearConfig(*args[7:]))


def _linear_unit_gradient_fake(*args):
    from .chunks import kept_dtype

    return _linear_stats_fake(*args), args[0].new_empty(args[0].shape, dtype=kept_dtype(args[12]))


def _linear_gradients(*args):
    from . import chunks

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
    ("row_stats", _row_stats, _row_stats_fake),
    ("row_grad", _row_grad, _row_grad_fake),
    ("row_grad_", _row_grad_, _row_grad_fake_),
    ("pair_loss", _pair_loss, _pair_loss_fake),
    ("linear_stats", _linear_stats, _linear_stats_fake),
    ("linear_unit_gradient", _linear_unit_gradient, _linear_unit_gradient_fake),
    ("linear_gradients", _linear_gradients, _linear_gradients_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)

row_stats = torch.ops.qkernels.row_stats.default
row_grad = torch.ops.qkernels.row_grad.default
row_grad_ = torch.ops.qkernels.row_grad_.default
pair_loss = torch.ops.qkernels.pair_loss.default
linear_stats = torch.ops.qkernels.linear_stats.default
linear_unit_gradient = torch.ops.qkernels.linear_unit_gradient.default
linear_gradients = torch.ops.qkernels.linear_gradients.default

_ROW_OPERATIONS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "row_stats": (row_stats, _row_stats),
    "row_grad": (row_grad, _row_grad),
    "row_grad_": (row_grad_, _row_grad_),
    "pair_loss": (pair_loss, _pair_loss),
}


def run(name, *args):
    """A row operation: as an op where something looks on, else what the op runs, at half of the host's time."""
    op, implementation = _ROW_OPERATIONS[name]
    return op(*args) if torch.compiler.is_compiling() or _watched(args[0]) else implementation(*args)


def _watched(tensor: Tensor) -> bool:
    """Whether torch has to see a call: modes, transforms, traces, profilers, and tensors of a class of their own."""
    return (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or _python_dispatch.is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
    )
