"""The memory layouts that kernels read: the one place that decides whether a tensor may be handed over by its address.

A kernel gets an address, sizes and strides, and cannot see a mistake in them: it would read other numbers, or past the
end of the tensor. Every backend takes its arguments through these functions, whatever its callers promise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    """Where the memory of a contiguous tensor of that dtype begins: labels, weights, all per-row buffers. 0 for None.

    Raises:
        ValueError: another layout or dtype.
    """
    if tensor is None:
        return 0
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"a kernel takes contiguous {dtype} here, got {tensor.dtype} of shape {tuple(tensor.shape)} with strides"
            f" {tuple(tensor.stride())}"
        )
    return tensor.data_ptr()


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, if `address` takes it."""
    address(tensor, dtype)
    return tensor


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of a tensor each row of which, `[S, T, V]` or `[N, V]`, lies in consecutive elements; any strides before.

    Raises:
        ValueError: the last dimension is not contiguous.
    """
    found = tensor.stride()
    if found[-1] != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"a kernel takes rows whose last dimension is contiguous, got shape {tuple(tensor.shape)} with strides"
            f" {tuple(found)}"
        )
    return found


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself, if `strides` takes it."""
    strides(tensor)
    return tensor
