"""Gradients of 16-bit logits that wait for one GEMM of dW: when they do, and where they and the logits lie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..core import devices
from ..core.memory import give_back_end
from .products import widens_backward


def waits(weight: Tensor, dtype: torch.dtype, rows: int, chunks: int) -> bool:
    """Whether the gradients of all chunks' logits wait for one GEMM of dW, instead of fp32 sums of one for each chunk.

    They do in bf16, where `[rows, V]` of them take no more memory than `[V, H]` of fp32. (In fp16 each chunk has a
    scale of its own; the gradient of an fp32 weight is summed in the memory that it needs in any case. Where GEMMs run
    on widened inputs, fp32 sums cost next to nothing beside them, and columns of all rows would have to be widened.)

    Args:
        weight: `[V, H]`, as it came.
        dtype: of the GEMMs.
        rows: with a gradient, of all chunks.
        chunks: how many there are.
    """
    bf16 = torch.bfloat16
    if chunks <= 1 or not weight.dtype == dtype == bf16 or widens_backward(weight.device, dtype):
        return False
    return rows * bf16.itemsize <= weight.shape[1] * torch.float32.itemsize


def logits_lie_behind(device: torch.device) -> bool:
    """Whether the logits of a chunk lie behind the gradients that wait, in one allocation (`Waiting`)."""
    return devices.on_cpu(device)


class Waiting:
    """Chunks whose dW is one GEMM: the gradients of their logits `[rows, V]` and their hidden states `[rows, H]`.

    On a CPU the logits of a chunk lie behind the gradients that wait already, and its own gradient takes the first half
    of their place. What they leave is given back to the system before dW is made. No other device takes a part of an
    allocation back: there the logits have a buffer of their own.

    Args:
        memory: uint8; `bytes_with_logits`, or what the gradients take.
        x: `[rows, H]`, for the hidden states.
        vocab: V.
        behind: whether logits lie behind the gradients.
    """

    _ALIGNED = 64  # bytes: where logits begin

    def __init__(self, memory: Tensor, x: Tensor, vocab: int, behind: bool):
        self.memory, self.x, self.vocab, self.behind = memory, x, vocab, behind
        self.rows = 0

    @classmethod
    def bytes_with_logits(
        cls, rows: Sequence[int], leading: Sequence[int], vocab: int, narrow: torch.dtype, wide: torch.dtype
    ) -> int:
        """Memory for chunks of `rows`, `leading` of each with a gradient, with the logits behind: in these dtypes."""
        before = accumulate(leading, initial=0)
        return max(cls._begin(m, vocab, narrow) + n * vocab * wide.itemsize for m, n in zip(before, rows, strict=False))

    @classmethod
    def _begin(cls, before: int, vocab: int, narrow: torch.dtype) -> int:
        """Where logits begin that follow so many rows of gradients."""
        return -(-before * vocab * narrow.itemsize // cls._ALIGNED) * cls._ALIGNED

    def logits(self, rows: int, dtype: torch.dtype) -> Tensor:
        """`[rows, V]` for those of the next chunk."""
        start = self._begin(self.rows, self.vocab, self.x.dtype)
        memory = self.memory[start : start + rows * self.vocab * dtype.itemsize]
        return memory.view(dtype).view(rows, self.vocab)

    def room(self, rows: int) -> Tensor:
        """`[rows, V]` for the next chunk's gradient."""
        return self._gradients(self.rows, self.rows + rows)

    def _gradients(self, start: int, end: int) -> Tensor:
        size = self.vocab * self.x.dtype.itemsize
        return self.memory[start * size : end * size].view(self.x.dtype).view(end - start, self.vocab)

    def add(self, x: Tensor) -> None:
        """The hidden states of the chunk whose gradient has been written to `room`."""
        self.x[self.rows : self.rows + x.shape[0]] = x
        self.rows += x.shape[0]

    def all(self) -> tuple[Tensor, Tensor]:
        """`[rows, V]` and `[rows, H]` of all chunks."""
        return self._gradients(0, self.rows), self.x[: self.rows]

    def give_back_end(self) -> None:
        """Give the memory behind the gradients back."""
        give_back_end(self.memory, self.rows * self.vocab * self.x.dtype.itemsize)
