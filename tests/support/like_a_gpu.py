"""Lets the path from hidden states take a CPU for a GPU.

There torch has GEMMs of 16-bit matrices with an fp32 result, fp16 is not widened, and logits have a buffer of their
own. The row operations stay those of the CPU. As a pytest plugin (`-p like_a_gpu`) it is on in all tests of a process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import linear_comparisons
from qkernels.core import devices


def _product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert left.dtype == right.dtype and left.dtype.itemsize == 2 and out_dtype == torch.float32
    return left.float() @ right.float()


def _mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    return _product(left, right, out_dtype)


def _mm_out(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert out.dtype == out_dtype
    return out.copy_(_product(left, right, out_dtype))


def _addmm_out(
    sums: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    assert sums.dtype == out.dtype == out_dtype and beta == alpha == 1
    return out.copy_(sums + _product(left, right, out_dtype))


def register(library: torch.library.Library) -> None:
    """A GPU's kernels for CPUs, which have none of that name."""
    for name, kernel in (("mm.dtype", _mm), ("mm.dtype_out", _mm_out), ("addmm.dtype_out", _addmm_out)):
        library.impl(name, kernel, "CPU")


def patch(setattr_: Callable[[object, str, object], None]) -> None:
    """What tells a GPU from a CPU, and what tests know of it."""
    setattr_(devices, "on_cpu", lambda device: False)
    setattr_(linear_comparisons, "products_of", lambda dtype, device: dtype)


_libraries: list[torch.library.Library] = []  # kernels go with it


def pytest_configure() -> None:
    _libraries.append(torch.library.Library("aten", "IMPL"))
    register(_libraries[0])
    patch(setattr)
