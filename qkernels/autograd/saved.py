"""What the autograd functions on rows save for backward, and the outputs of theirs that carry a gradient."""

from __future__ import annotations

from typing import Any

import torch

from ..core.fields import field_index, field_names


def carried(ctx: Any, stats: torch.Tensor, fields: int, carrying: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """What an autograd function on rows returns: the stats, a constant, and the fields that carry gradient."""
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # a field that nothing depends on has no gradient, rather than a zero one
    return stats, *(stats[field_index(fields, name)] for name in carrying)


def saveable(ctx: Any, *constants: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Constants for `ctx.save_for_backward`, which refuses those made in inference mode: they wait on the context."""
    if torch.compiler.is_compiling():
        ctx.waiting = None
        return constants
    ctx.waiting = tuple(c if c is not None and c.is_inference() else None for c in constants)
    return tuple(c if kept is None else None for c, kept in zip(constants, ctx.waiting, strict=True))


def restored(ctx: Any, *saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The constants that were given to `saveable`, from what the backward finds of them in `ctx.saved_tensors`."""
    if ctx.waiting is None:
        return saved
    return tuple(s if kept is None else kept for s, kept in zip(saved, ctx.waiting, strict=True))


def by_name(
    wanted: int, fields: int, carrying: tuple[str, ...], results: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """The wanted ones of the fields that such a function has by name: with gradient where they carry one."""
    stats, *differentiable = results
    found = dict(zip(carrying, differentiable, strict=True))
    for name in field_names(wanted):
        if name not in found:
            found[name] = stats[field_index(fields, name)]
    return found
