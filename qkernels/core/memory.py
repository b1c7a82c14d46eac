"""Memory: how much is free, large CPU tensors on fresh pages, and scratch buffers that stay from call to call."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import mmap
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from .compile import constant_when_compiled

# From this size on malloc itself maps fresh pages for a tensor.
_LARGE = 32 * 2**20


def fresh_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A large contiguous CPU tensor of zeros that takes no memory until it is written; None for others.

    Huge pages are asked for: a fault for every 4 KiB costs more than the copy of them (128 MiB filled in 33 ms, in
    10 ms with huge pages, in 6 ms where the pages are there; two cores of an AMD EPYC).
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch's allocator says so in the words that callers know
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    # Not a view, which would keep its base: autograd adds to a gradient in place only where nobody shares its storage.
    return torch.frombuffer(pages, dtype=dtype).resize_(shape)


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on fresh huge pages where the tensor is large and on the CPU."""
    zeros = fresh_zeros(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device) if zeros is None else zeros


def block_elements(device: torch.device) -> int:
    """Where torch would copy a whole tensor to another dtype first, the copy is made of so many elements at a time.

    On a CPU they are to stay in a cache; elsewhere each block costs launches.
    """
    return 2**16 if device.type == "cpu" else 2**26


# Storages of scratch buffers on the CPU that no call uses at the moment, by address. Storages and not tensors: a tensor
# made in inference mode could not be written outside of it.
_scratch: dict[int, torch.UntypedStorage] = {}
_SCRATCH_BYTES = 256 * 2**20


def take_scratch(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`empty`, on the pages of an earlier call's scratch buffer where one is large enough.

    Pages that are new to the process are zeroed by the system when they are first written: 15 ms for 128 MiB on a
    2-core Xeon, half of the time of the GEMM that fills them.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size >= _LARGE:
        for address, storage in sorted(_scratch.items(), key=lambda item: item[1].nbytes()):
            if storage.nbytes() >= size and _scratch.pop(address, None) is not None:  # None: another thread has it
                return torch.empty(0, dtype=torch.uint8).set_(storage)[:size].view(dtype).view(shape)
    return empty(shape, dtype, device)


def give_back_scratch(buffers: Iterable[Tensor]) -> None:
    """Keep a call's buffers of `take_scratch` in place of earlier ones, as many in order as fit 256 MiB together.

    Nothing of them may be in use any more.
    """
    storages = [buffer.untyped_storage() for buffer in buffers if buffer.device.type == "cpu"]
    storages = [storage for storage in storages if storage.nbytes() >= _LARGE]
    if not storages:
        return
    _scratch.clear()
    room = _SCRATCH_BYTES
    for storage in storages:
        if storage.nbytes() <= room:
            room -= storage.nbytes()
            _scratch[storage.data_ptr()] = storage


def drop_scratch(freed: bool = False) -> None:
    """Give all buffers that no call uses back to the system: before a model's backward, where the memory of a step is
    at its peak.

    Args:
        freed: whether also what malloc keeps of freed memory: with glibc 230 MiB after the forward of Gemma 3 270M on
            1500 tokens in fp32, 90 MiB in bf16. Later calls take new pages instead, which is 4 to 5 % of a step.
    """
    _scratch.clear()
    if freed:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def collect() -> None:
    """Free what is in reference cycles, as a model with an installed head is, and what CUDA's allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def give_back_end(buffer: Tensor, kept: int) -> None:
    """Give the pages of a CPU buffer behind its first `kept` bytes back to the system, where it takes them.

    What they held is lost. They may be written again.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or buffer.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    address = buffer.data_ptr()
    start = -(-(address + kept) // page) * page
    size = (address + buffer.numel() * buffer.element_size()) // page * page - start
    if size > 0:
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@constant_when_compiled  # what is free while tracing stands for later
def free_memory(device: torch.device) -> int:
    """Bytes that are available on a device now; 8 GiB where it does not say.

    On a GPU with what torch's allocator keeps and no tensor uses: in a training loop that is most of the device.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
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
