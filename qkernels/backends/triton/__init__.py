"""Row operations as Triton kernels for NVIDIA and AMD GPUs: one file per operation, its launch beside it.

Triton is imported when an operation runs, not before. With TRITON_INTERPRET=1 in the environment (from the start of
the process) the kernels run on CPU tensors in Triton's interpreter, for tests: correct, and thousands of times slower.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ...core.calls import PairLoss, RowGrad, RowStats
from .. import takes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take such a tensor; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux), or a CUDA build of torch, brings it"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "its kernels run on a GPU, the tensor is on cpu (TRITON_INTERPRET=1 runs them in an interpreter)"
    elif device.type != "cuda":
        return f"its kernels run on a GPU, the tensor is on {device}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"its kernels need compute capability 8.0 or higher, {device} has {major}.{minor}"
    if dtype not in _DTYPES:
        return f"its kernels take float32, bfloat16 and float16, got {dtype}"
    return None


@takes(RowStats)
def row_stats(call: RowStats) -> Tensor:
    """Per-row results. See `qkernels.core.calls`."""
    from . import row_stats_kernel

    return row_stats_kernel.row_stats(call)


@takes(RowGrad, after=1)
def row_grad_into(out: Tensor, call: RowGrad) -> None:
    """dL/dlogits into `out`, whose dtype may be narrower. See `qkernels.backends`."""
    from . import row_grad_kernel

    row_grad_kernel.row_grad_into(out, call)


@takes(RowGrad)
def row_grad(call: RowGrad) -> Tensor:
    """dL/dlogits as a new tensor. See `qkernels.core.calls`."""
    from . import row_grad_kernel

    return row_grad_kernel.row_grad(call)


@takes(RowGrad)
def row_grad_(call: RowGrad) -> None:
    """dL/dlogits over the logits themselves. See `qkernels.core.calls`."""
    from . import row_grad_kernel

    row_grad_kernel.row_grad_(call)


@takes(PairLoss)
def pair_loss(call: PairLoss) -> tuple[Tensor, ...]:
    """The default objective in one step. See `qkernels.core.calls`."""
    from . import pair_loss_kernel

    return pair_loss_kernel.pair_loss(call)
