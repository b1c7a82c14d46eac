"""Tensors of a case: random values by seed, and views with the same values in every memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "bool": torch.bool,
}

# Layouts that leave the last dimension contiguous, as logits and hidden states have to be; and all of them.
ROW_LAYOUTS = ("contiguous", "offset", "gap", "every_other", "transposed", "expanded")
LAYOUTS = (*ROW_LAYOUTS, "column")


class Random:
    """Random tensors on the CPU that depend on the seed and the order of the calls alone."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def _poison(dtype: torch.dtype) -> float | int | bool:
    """What lies between the elements of a view: reading it shows."""
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point else 2**30


def view(values: Tensor, layout: str) -> Tensor:
    """`values` in memory of this layout; for "expanded" the first entry of dimension 0 stands for all.

    contiguous: as it is, in memory of its own.
    offset: begins one element after an aligned address.
    gap: between the rows lie three elements that do not belong to it.
    every_other: every second entry of dimension 0.
    transposed: dimensions 0 and 1 change places in memory.
    expanded: stride 0 in dimension 0.
    column: the last dimension has stride 3.
    """
    shape = values.shape
    if layout == "contiguous" or values.dim() == 0:
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "offset":
        memory = values.new_full((values.numel() + 8,), _poison(values.dtype))
        target = memory[1 : 1 + values.numel()].view(shape)
    elif layout == "gap":
        target = values.new_full((*shape[:-1], shape[-1] + 3), _poison(values.dtype))[..., : shape[-1]]
    elif layout == "every_other":
        target = values.new_full((2 * shape[0], *shape[1:]), _poison(values.dtype))[::2]
    elif layout == "transposed":
        if values.dim() < 2:
            return view(values, "contiguous")
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        return values[:1].clone().expand(shape) if shape[0] else values.clone()
    elif layout == "column":
        target = values.new_full((*shape, 3), _poison(values.dtype))[..., 1]
    else:
        raise ValueError(f"unknown layout {layout!r}")
    return target.copy_(values)
