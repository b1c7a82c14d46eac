"""Row operations as CUDA kernels in the compiled extension (`csrc/cuda`), on the current stream of the tensor's device.

As in `cpu.py` the extension sees addresses, sizes and strides. Nothing here synchronises with the device, so a step
may be captured in a CUDA graph; scratch memory is torch's, and only needed where a few rows are split over many blocks.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.calls import PairLoss, RowGrad, RowStats
from ..core.checks import check_labels
from ..core.layout import address
from . import cpu, takes
from .cpu import CODES, view_of
from .pieces import ITERATION, pieces_for


def _load() -> ModuleType | None:
    """The compiled extension; None where it is missing.

    QKERNELS_CUDA_EMULATION names a build of csrc/tests/cuda_emulation instead, which runs the kernels on CPU tensors:
    for tests, correct and slow.
    """
    path = os.environ.get("QKERNELS_CUDA_EMULATION")
    if not path:
        return cpu.extension
    spec = importlib.util.spec_from_file_location("_cuda_emulation", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"QKERNELS_CUDA_EMULATION must name a compiled module, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


extension: Any = _load()
EMULATED = bool(getattr(extension, "CUDA_EMULATED", False))

# Blocks per SM that split rows make at most, and the fewest entries of a piece.
_BLOCKS_PER_SM = 4
_SMALLEST_PIECE = ITERATION


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take such a tensor; None if it can."""
    if extension is None:
        return cpu.why_missing()
    if not extension.HAS_CUDA:
        return f"this build has no CUDA kernels: {why_not_built()}"
    if EMULATED:
        if device.type != "cpu":
            return f"its kernels are emulated on the CPU in this process, the tensor is on {device}"
        return None if dtype in CODES else f"its kernels take float32, bfloat16 and float16, got {dtype}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs, the tensor is on {device}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if reason := _unfit(device):
        return reason
    if dtype not in CODES:
        return f"its kernels take float32, bfloat16 and float16, got {dtype}"
    return None


def wrong_build(device: torch.device) -> str | None:
    """Why the CUDA kernels that are installed were not built for this GPU or its driver; None if they were."""
    here = extension is not None and extension.HAS_CUDA and not EMULATED and device.type == "cuda"
    return _unfit(device) if here and torch.version.hip is None and torch.cuda.is_available() else None


def _unfit(device: torch.device) -> str | None:
    """Why the compiled kernels cannot run on an NVIDIA GPU; None if they can."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"its kernels need compute capability 8.0 or higher, cuda:{index} has {capability[0]}.{capability[1]}"
    if reason := _cannot_run(index):
        return f"{reason} (cuda:{index}; compiled for {', '.join(architectures())})"
    return None


def why_not_built() -> str:
    """Why the extension at hand has no CUDA kernels."""
    built = cpu.build_info().get("cuda") or {}
    return f"{built.get('reason') or 'it was built without'}; reinstall qkernels where nvcc is on the PATH"


def architectures() -> list[str]:
    """What the kernels were compiled for; the last one is there as PTX too, for later GPUs."""
    assert extension is not None
    names = [name.removesuffix("-real") for name in extension.CUDA_ARCHITECTURES.split(",")]
    return [f"sm_{name}" for name in names] + [f"compute_{names[-1]}"]


def describe() -> dict[str, Any]:
    """What `qkernels.info()` says about the CUDA part of the extension."""
    if extension is None:
        return {"built": False, "reason": cpu.why_missing()}
    if EMULATED:
        return {"built": False, "reason": "the kernels are emulated on the CPU (QKERNELS_CUDA_EMULATION)"}
    if not extension.HAS_CUDA:
        return {"built": False, "reason": why_not_built()}
    return {
        "built": True,
        "version": extension.CUDA_VERSION,
        "compiled_for": architectures(),
    }


@lru_cache(maxsize=64)
def _cannot_run(index: int) -> str:
    assert extension is not None
    return extension.cuda_unavailable(index)


@lru_cache(maxsize=64)
def _processors(index: int | None) -> int:
    """Number of SMs of a device; the emulation has none and takes that of a small GPU."""
    if EMULATED:
        return 16
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def splits_for(rows: int, vocab: int, processors: int, most: int) -> int:
    """Over how many blocks a row is split, at most, on that many SMs."""
    return pieces_for(rows, vocab, processors, blocks=_BLOCKS_PER_SM, smallest=_SMALLEST_PIECE, most=most)


def _where(logits: Tensor, rows: int, splits: int | None = None, scratch: int = 0) -> tuple[int, int, int, int]:
    """Device, stream, blocks per row and scratch memory of a launch."""
    if splits is None:
        splits = _splits(logits, rows)
    if EMULATED:
        return (0, 0, splits, scratch)
    return (logits.device.index, torch.cuda.current_stream(logits.device).cuda_stream, splits, scratch)


def _splits(logits: Tensor, rows: int) -> int:
    assert extension is not None
    return splits_for(rows, logits.shape[-1], _processors(logits.device.index), extension.CUDA_MAX_SPLITS)


@takes(RowStats)
def row_stats(call: RowStats) -> Tensor:
    """Per-row results. See `qkernels.core.calls`."""
    logits, labels, reference, fields, temperature, ignore_index, _ = call
    assert extension is not None
    check_labels(labels, logits.shape[-1], ignore_index)
    out = logits.new_empty((fields.bit_count(), *labels.shape), dtype=torch.float32)
    rows = labels.numel()
    splits = _splits(logits, rows)
    scratch = None
    if splits > 1:  # of two models at most; kept until the launches are queued, after which the allocator knows
        size = 2 * rows * splits * extension.CUDA_PARTIAL_BYTES
        scratch = torch.empty(size, dtype=torch.uint8, device=logits.device)
    extension.cuda_row_stats(
        shape=logits.shape,
        policy=view_of(logits),
        reference=view_of(reference),
        labels=address(labels, torch.int64),
        ignore_index=ignore_index,
        temperature=temperature,
        fields=fields,
        out=out.data_ptr(),
        where=_where(logits, rows, splits, address(scratch, torch.uint8)),
    )
    return out


@takes(RowGrad, after=1)
def row_grad_into(out: Tensor, call: RowGrad) -> None:
    """dL/dlogits into `out`, whose dtype may be narrower. See `qkernels.backends`."""
    logits, labels, reference, softmax, reference_softmax, coefficients, upstream, temperature, ignore_index, _ = call
    assert extension is not None
    softmax, coefficients = softmax.contiguous(), coefficients.float().contiguous()
    reference_softmax = None if reference is None or reference_softmax is None else reference_softmax.contiguous()
    extension.cuda_row_grad(
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
        where=_where(logits, labels.numel()),
    )


@takes(RowGrad)
def row_grad(call: RowGrad) -> Tensor:
    """dL/dlogits as a new tensor. See `qkernels.core.calls`."""
    out = torch.empty_like(call.logits, memory_format=torch.contiguous_format)
    row_grad_into(out, call)
    return out


@takes(RowGrad)
def row_grad_(call: RowGrad) -> None:
    """dL/dlogits over the logits themselves. See `qkernels.core.calls`."""
    row_grad_into(call.logits, call)


@takes(PairLoss)
def pair_loss(call: PairLoss) -> tuple[Tensor, ...]:
    """The default objective in one step. See `qkernels.core.calls`."""
    assert extension is not None
    return cpu.run_pair_loss(partial(extension.cuda_pair_loss, where=_where(call.logps, 0, 1)), call)
