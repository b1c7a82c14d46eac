"""The row operations as torch.library ops: what torch.compile sees, and the one place that calls a backend.

Shapes: `logits` is `[S, T, V]` with a contiguous last dimension and any strides before it (a packed batch is
`[1, N, V]`); `labels` is a contiguous int64 `[S, T]`; per-row buffers are `[K, S, T]`, fp32 (fp64 for fp64 logits).
`columns` and the order of every per-row buffer are explained in `qkernels.core.columns`.

- `row_stats`: the requested columns of each row. One read of each logit. A row with an ignored label is not read; it
  is 0 in every column. IndexError for a label outside [0, V) on the CPU, NaN in that row elsewhere.
- `row_grad`: dL/dlogits into a new tensor. One read and one write of each logit; rows that are ignored, or whose
  coefficients are all 0, are set to 0 without being read. `upstream`, a scalar on the device in the dtype of the
  results, multiplies all coefficients; None stands for 1.
- `row_grad_`: the same over the logits' own storage.
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

from .. import backends
from ..core.columns import pair_outputs, stats_dtype

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


for _name, _run, _fake in (
    ("row_stats", _row_stats, _row_stats_fake),
    ("row_grad", _row_grad, _row_grad_fake),
    ("row_grad_", _row_grad_, _row_grad_fake_),
    ("pair_loss", _pair_loss, _pair_loss_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)

row_stats = torch.ops.qkernels.row_stats.default
row_grad = torch.ops.qkernels.row_grad.default
row_grad_ = torch.ops.qkernels.row_grad_.default
pair_loss = torch.ops.qkernels.pair_loss.default

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
