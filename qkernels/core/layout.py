"""The memory layouts that kernels read: the one place that decides whether a tensor may be handed over by its address.

A kernel gets an address, sizes and strides, and cannot see a mistake in them: it would read other numbers, or past the
end of the tensor. Every backend takes its arguments through these two functions, whatever its callers promise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, if it is contiguous and of that dtype: labels, weights, and all per-row buffers.

    Raises:
        ValueError: another layout or dtype.
    """
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"a kernel takes contiguous {dtype} here, got {tensor.dtype} of shape {tuple(tensor.shape)} with strides"
            f" {tuple(tensor.stride())}"
        )
    return tensor


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself, if each row of it, `[S, T, V]` or `[N, V]`, lies in consecutive elements; any strides before.

    Raises:
        ValueError: the last dimension is not contiguous.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"a kernel takes rows whose last dimension is contiguous, got shape {tuple(tensor.shape)} with strides"
            f" {tuple(tensor.stride())}"
        )
    return tensor
