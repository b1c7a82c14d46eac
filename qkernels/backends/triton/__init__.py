"""Row operations as Triton kernels for NVIDIA and AMD GPUs: one file per operation, its launch beside it.

Triton is imported when an operation runs, not before. With TRITON_INTERPRET=1 in the environment (from the start of
the process) the kernels run on CPU tensors in Triton's interpreter, for tests: correct, and thousands of times slower.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

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


def row_stats(
    logits: Tensor, labels: Tensor, reference: Tensor | None, columns: int, temperature: float, ignore_index: int
) -> Tensor:
    """Per-row results. See `qkernels.backends.ops.row_stats`."""
    from . import row_stats_kernel

    return row_stats_kernel.row_stats(logits, labels, reference, columns, temperature, ignore_index)


def row_grad_into(out: Tensor, logits: Tensor, *args: Any) -> None:
    """dL/dlogits into `out`, whose dtype may be narrower. See `qkernels.backends`."""
    from . import row_grad_kernel

    row_grad_kernel.row_grad_into(out, logits, *args)


def row_grad(logits: Tensor, *args: Any) -> Tensor:
    """dL/dlogits as a new tensor. See `qkernels.backends.ops.row_grad`."""
    from . import row_grad_kernel

    return row_grad_kernel.row_grad(logits, *args)


def row_grad_(logits: Tensor, *args: Any) -> None:
    """dL/dlogits over the logits themselves. See `qkernels.backends.ops.row_grad_`."""
    from . import row_grad_kernel

    row_grad_kernel.row_grad_(logits, *args)


def pair_loss(logps: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The default objective in one step. See `qkernels.backends.ops.pair_loss`."""
    from . import pair_loss_kernel

    return pair_loss_kernel.pair_loss(logps, *args)
