"""Row operations in the compiled extension: C++ kernels for the CPU (`csrc/cpu`).

The extension knows nothing of torch: this module hands it pointers, sizes and strides. Tensors are checked before
they come here; what is left to decide is the layout of the output buffers. The GIL is released inside.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..core import layout
from ..core.calls import PairLoss, RowGrad, RowStats
from ..core.checks import label_error
from ..core.compile import constant_when_compiled
from ..core.layout import address
from ..core.memory import fresh_zeros
from . import takes

_C: Any = None
_missing = None
try:
    # A copy of this package under another name (a kernel of the Hugging Face Hub) has no extension of its own.
    _C = importlib.import_module("qkernels._C")
    if not __name__.startswith("qkernels.") and importlib.import_module("qkernels").__version__ != __version__:
        _C, _missing = None, f"the installed qkernels is not version {__version__}, which this copy needs"
except ImportError as error:  # no compiler at installation, or a build for another platform
    _missing = str(error)

if _C is not None and multiprocessing.parent_process() is not None:
    # A child that imports this after the fork cannot know whether its parent's OpenMP threads were left behind.
    _C.use_own_threads()

extension = _C  # for cuda.py; None where it is missing
vendor = "" if _C is None else _C.cpu_vendor()  # "GenuineIntel", "AuthenticAMD", ...; "" where that is not known

# dtype codes of csrc/core/elements.h
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take such a tensor; None if it can."""
    if _C is None:
        return why_missing()
    if device.type != "cpu":
        return f"its kernels run on the CPU, the tensor is on {device}"
    if dtype not in CODES:
        return f"its kernels take float32, bfloat16 and float16, got {dtype}"
    return None


def why_missing() -> str:
    """Why there is no compiled extension, and what to do about it."""
    build = build_info()
    if not build:
        return (
            "this source tree was never built: run `pip install -e .` in it, or leave it to use the installed package"
        )
    reason = build["reason"] or f"it does not load: {_missing}"
    return f"the compiled extension is missing: {reason}; reinstall qkernels where GCC or Clang is on the PATH"


def wrong_build(device: torch.device) -> str | None:
    """Why the extension that is installed does not load on this machine; None if it does, or if there is none."""
    wrong = _C is None and device.type == "cpu" and build_info().get("native")
    return f"the compiled extension does not load: {_missing}" if wrong else None


def build_info() -> dict[str, Any]:
    """What setup.py noted when this copy was built; empty for a source tree that was never built."""
    path = Path(__file__).parents[1] / "_build.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def describe() -> dict[str, Any]:
    """What `qkernels.info()` says about the extension."""
    if _C is None:
        return {"available": False, "reason": why_missing()}
    return {
        "available": True,
        **({"vendor": vendor} if vendor else {}),
        "instruction_set": _C.instruction_set(),
        "compiled_for": _C.instruction_sets(),
        "amx": _C.amx_unavailable() or "available",
        "compiler": _C.compiler(),
        "threads": "torch's OpenMP team" if _C.thread_source() == "OpenMP" else "own pool",
    }


def view_of(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address, dtype code and row strides of `[S, T, V]` logits; zeros for None."""
    if tensor is None:
        return (0, 0, 0, 0)
    outer, inner, _ = layout.strides(tensor)
    return (tensor.data_ptr(), CODES[tensor.dtype], outer, inner)


@takes(RowStats)
def row_stats(call: RowStats) -> Tensor:
    """Per-row results. See `qkernels.core.calls`."""
    logits, labels, reference, fields, temperature, ignore_index, _ = call
    out = logits.new_empty(fields.bit_count(), *labels.shape, dtype=torch.float32)
    bad = _C.row_stats(
        shape=logits.shape,
        policy=view_of(logits),
        reference=view_of(reference),
        labels=address(labels, torch.int64),
        ignore_index=ignore_index,
        temperature=temperature,
        fields=fields,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if bad >= 0:
        raise label_error(labels, bad, logits.shape[-1])
    return out


def _row_grad_into(out: Tensor, out_is_zero: bool, call: RowGrad) -> None:
    logits, labels, reference, softmax, reference_softmax, coefficients, upstream, temperature, ignore_index, _ = call
    softmax = softmax.contiguous()
    coefficients = (coefficients if coefficients.dtype == torch.float32 else coefficients.float()).contiguous()
    reference_softmax = None if reference_softmax is None else reference_softmax.contiguous()
    _C.row_grad(
        shape=logits.shape,
        policy=view_of(logits),
        reference=view_of(reference),
        labels=address(labels, torch.int64),
        ignore_index=ignore_index,
        temperature=temperature,
        softmax=address(softmax),
        reference_softmax=address(reference_softmax),
        coefficients=address(coefficients),
        coefficient_count=coefficients.shape[0],
        upstream=address(upstream),
        out=view_of(out),
        out_is_zero=out_is_zero,
        threads=torch.get_num_threads(),
    )


@takes(RowGrad, after=1)
def row_grad_into(out: Tensor, call: RowGrad) -> None:
    """dL/dlogits into `out`, whose dtype may be narrower. See `qkernels.backends`."""
    _row_grad_into(out, False, call)


@takes(RowGrad)
def row_grad(call: RowGrad) -> Tensor:
    """dL/dlogits as a new tensor. See `qkernels.core.calls`."""
    logits = call.logits
    # Rows of ignored labels stay untouched in it: prompt and padding cost neither time nor memory.
    zeros = fresh_zeros(logits.shape, logits.dtype, logits.device)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format) if zeros is None else zeros
    _row_grad_into(out, zeros is not None, call)
    return out


@takes(RowGrad)
def row_grad_(call: RowGrad) -> None:
    """dL/dlogits over the logits themselves. See `qkernels.core.calls`."""
    _row_grad_into(call.logits, False, call)


def run_pair_loss(run: Callable[..., None], call: PairLoss) -> tuple[Tensor, ...]:
    """Call the extension's pair loss `run`, for the CPU or a GPU."""
    loss, rewards, grad, tokens = call.outputs()
    logps, reference_logps, labels, weights, cu_seqlens, beta, label_smoothing, ignore_index, _ = call
    logps = logps.contiguous()
    reference_logps = None if reference_logps is None else reference_logps.contiguous()
    weights = None if weights is None else weights.contiguous()
    offsets = None if cu_seqlens is None else cu_seqlens.int().contiguous()
    run(
        sequences=rewards.shape[0],
        length=logps.shape[1],
        rows=logps.numel(),
        offsets=address(offsets, torch.int32),
        labels=address(labels, torch.int64),
        ignore_index=ignore_index,
        weights=address(weights),
        logps=address(logps),
        reference=address(reference_logps),
        per_sequence=reference_logps is not None and reference_logps.dim() == 1,
        beta=beta,
        label_smoothing=label_smoothing,
        loss=loss.data_ptr(),
        rewards=rewards.data_ptr(),
        grad=grad.data_ptr(),
        tokens=tokens.data_ptr() if tokens.shape[0] else 0,
    )
    return loss, rewards, grad, tokens


class Gemm(NamedTuple):
    """One of the GEMMs of a head.

    left_depth_first, right_depth_first: whether the depth is the outer dimension of a matrix as it lies in memory.
    narrow: whether the result has the dtype of the matrices rather than fp32.
    accumulate: whether it is added to what is there.
    """

    left_depth_first: bool
    right_depth_first: bool
    narrow: bool
    accumulate: bool


GEMMS = {
    "logits": Gemm(False, False, False, False),  # x w^T, [n, H] and [V, H]
    "dX": Gemm(False, True, True, False),  # g w, [n, V] and [V, H]
    "dX of a block": Gemm(False, True, False, True),  # the same of a part of V
    "dW": Gemm(True, True, True, False),  # g^T x, [n, V] and [n, H]
    "dW of a chunk": Gemm(True, True, False, True),  # the same of a part of the rows
}


@constant_when_compiled
def gemm_kernel(name: str, dtype: torch.dtype) -> str | None:
    """The kernel that runs one of `GEMMS`, from this dtype, on the instruction set in use; None if none does."""
    if _C is None or dtype not in CODES:
        return None
    left, right, narrow, accumulate = GEMMS[name]
    return _C.gemm_kernel(CODES[dtype], left, right, CODES[dtype if narrow else torch.float32], accumulate) or None


def gemm(name: str, left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = left right + bias, or out += left right, in fp32 sums: one of `GEMMS`.

    Args:
        left: bf16 or fp32 `[n, k]`, like `right` copied if its memory is not laid out as `GEMMS` says.
        right: `[k, m]`, in the dtype of `left`.
        out: `[n, m]` with a contiguous last dimension, in the GEMM's dtype.
        bias: fp32 `[m]`.
    """
    left_first, right_first, narrow, accumulate = GEMMS[name]

    def operand(stored: Tensor, depth_first: bool) -> tuple[int, int, bool]:
        operands.append(stored if stored.stride(1) == 1 else stored.contiguous())  # a copy lives until the call is over
        return layout.rows(operands[-1]).data_ptr(), operands[-1].stride(0), depth_first

    operands: list[Tensor] = []
    bias = None if bias is None else bias.contiguous()
    _C.gemm(
        rows=out.shape[0],
        columns=out.shape[1],
        depth=left.shape[1],
        in_type=CODES[left.dtype],
        left=operand(left.t() if left_first else left, left_first),
        right=operand(right if right_first else right.t(), right_first),
        bias=address(bias),
        out=layout.rows(out).data_ptr(),
        out_type=CODES[left.dtype if narrow else torch.float32],
        out_stride=out.stride(0),
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )


@takes(PairLoss)
def pair_loss(call: PairLoss) -> tuple[Tensor, ...]:
    """The default objective in one step. See `qkernels.core.calls`."""
    return run_pair_loss(_C.pair_loss, call)
