"""Memory: how much is free, and large CPU tensors on fresh pages."""

from __future__ import annotations

import contextlib
import math
import mmap
import os

import torch
from torch import Tensor

from .compile import constant_when_compiled

# Where torch would copy a whole tensor to another dtype first, the copy is made of so many elements at a time.
BLOCK_ELEMENTS = 2**16

# From this size on malloc itself maps fresh pages for a tensor.
_LARGE = 32 * 2**20


def fresh_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A large contiguous CPU tensor of zeros that takes no memory until it is written; None for others.

    Huge pages are asked for: a fault for every 4 KiB costs more than the copy of them (128 MiB filled in 33 ms, in
    10 ms with huge pages, in 6 ms where the pages are there; two cores of an AMD EPYC).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch's allocator says so in the words that callers know
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on fresh huge pages where the tensor is large and on the CPU."""
    zeros = fresh_zeros(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device) if zeros is None else zeros


@constant_when_compiled  # what is free while tracing stands for later
def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now; 8 GiB where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30
