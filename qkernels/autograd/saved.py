"""What the autograd functions on rows save for backward, and which of their outputs are differentiable."""

from __future__ import annotations

from typing import Any

import torch

from ..core.fields import field_index, field_names


def results_of(ctx: Any, stats: torch.Tensor, fields: int, differentiable: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """What an autograd function on rows returns: the stats, a constant, and the differentiable fields."""
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # a field that nothing depends on has no gradient, rather than a zero one
    return stats, *(stats[field_index(fields, name)] for name in differentiable)


def saveable(ctx: Any, *constants: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Constants for `ctx.save_for_backward`, which refuses those made in inference mode: the context holds these."""
    if torch.compiler.is_compiling():
        ctx.unsaved = None
        return constants
    ctx.unsaved = tuple(c if c is not None and c.is_inference() else None for c in constants)
    return tuple(c if unsaved is None else None for c, unsaved in zip(constants, ctx.unsaved, strict=True))


def restored(ctx: Any, *saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The constants that were given to `saveable`, from what the backward finds of them in `ctx.saved_tensors`."""
    if ctx.unsaved is None:
        return saved
    return tuple(s if unsaved is None else unsaved for s, unsaved in zip(saved, ctx.unsaved, strict=True))


def by_name(
    wanted: int, fields: int, differentiable: tuple[str, ...], results: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """The wanted ones of the fields that such a function has by name: with gradient where they are differentiable."""
    stats, *with_gradient = results
    found = dict(zip(differentiable, with_gradient, strict=True))
    for name in field_names(wanted):
        if name not in found:
            found[name] = stats[field_index(fields, name)]
    return found
