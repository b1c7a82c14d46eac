"""Row operations in the compiled extension: C++ kernels for the CPU (`csrc/cpu`).

The extension knows nothing of torch: this module hands it pointers, sizes and strides. Tensors are checked before
they come here; what is left to decide is the layout of the output buffers. The GIL is released inside.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..rows import column_names, label_error

try:
    from .. import _C
    _missing = None
except ImportError as error:  # no compiler at installation, or a build for another platform
    _C = None  # type: ignore[assignment]
    _missing = str(error)

# dtype codes of csrc/core/elements.h
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take such a tensor; None if it can."""
    if _C is None:
        return f"the compiled extension is not there ({_missing}); reinstall qkernels where a C++ compiler is on the PATH"
    if device.type != "cpu":
        return f"its kernels run on the CPU, the tensor is on {device}"
    if dtype not in _CODES:
        return f"its kernels take float32, bfloat16 and float16, got {dtype}"
    return None


def describe(build: dict[str, Any]) -> dict[str, Any]:
    """What `qkernels.info()` says about the extension."""
    if _C is None:
        return {"available": False, "reason": build.get("reason") or _missing}
    return {
        "available": True,
        "instruction_set": _C.instruction_set(),
        "compiled_for": _C.instruction_sets(),
        "compiler": _C.compiler(),
    }
