"""Autograd of the row operations on logits: what is saved, and how upstream gradients reach the kernel.

Saved: the logits themselves (no copy), labels, and the per-row results; nothing of the logits' size. The backward
turns upstream gradients of all columns into at most five coefficients per row and makes one pass over the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops
from ..core.coefficients import coefficients as coefficients_of
from ..core.columns import BIT, RowConfig, column_index
from ..distributed.vocab_parallel import IGNORED, Shard, row_stats
from . import once_differentiable
from .saved import carried, restored, saveable

# Attribute set on the storage that an in-place backward has turned into a gradient: the version of its tensors at that
# moment, so that logits refilled since then are welcome again. All views share both, the storage and the version.
_OVERWRITTEN = "_qkernels_overwritten"


def refuse_overwritten(logits: Tensor, name: str) -> None:
    """Raise if these logits were overwritten by an in-place backward."""
    if torch.compiler.is_compiling():  # traced tensors have no storage; the compiler tracks mutations itself
        return
    mark = getattr(logits.untyped_storage(), _OVERWRITTEN, None)
    # The mark first: tensors of inference mode have no version, and no backward can have overwritten them.
    if mark is not None and mark == logits._version:
        raise RuntimeError(
            f"{name} no longer holds logits: a backward with inplace_backward=True wrote the gradient over them"
        )


class RowStats(torch.autograd.Function):
    """`(logits [S, T, V], labels [S, T], reference [S, T, V] or None) -> stats [K, S, T], columns [S, T] ...`.

    `stats` is a constant; the columns named in `carrying`, which follow it, are differentiable in the logits. What
    carries no gradient costs nothing in the backward. The reference is a constant. With a `shard`, the logits are this
    rank's columns and the results those of the whole rows.
    """

    @staticmethod
    def forward(
        ctx, logits, labels, reference, config: RowConfig, inplace: bool, carrying: tuple[str, ...],
        shard: Shard | None = None,
    ):  # fmt: skip
        stats = row_stats(logits, labels, reference, config, shard)
        with_kl = config.columns & (BIT["kl_reference_policy"] | BIT["kl_policy_reference"])
        (kept,) = saveable(ctx, reference if with_kl else None)
        ctx.save_for_backward(logits, labels, kept, stats)
        ctx.config, ctx.inplace, ctx.carrying, ctx.shard = config, inplace, carrying, shard
        return carried(ctx, stats, config.columns, carrying)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads):
        logits, labels, kept, stats = ctx.saved_tensors
        (reference,) = restored(ctx, kept)
        config: RowConfig = ctx.config
        coefficients = coefficients_of(stats, dict(zip(ctx.carrying, grads, strict=True)), config.columns)
        reference_state = None if reference is None else stats[3:6]
        args = (logits, labels, reference, stats[:3], reference_state, coefficients, None, config, ctx.inplace)
        result = _row_grad(*args, ctx.shard)
        return result, None, None, None, None, None, None


def _row_grad(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    state: Tensor,
    reference_state: Tensor | None,
    coefficients: Tensor,
    upstream: Tensor | None,
    config: RowConfig,
    inplace: bool,
    shard: Shard | None = None,
) -> Tensor:
    """dL/dlogits, new or over the logits; in the second case the logits are marked as gone."""
    ignore_index = config.ignore_index
    if shard is not None:
        labels, state, coefficients = shard.gradient_inputs(
            logits, labels, state, coefficients, config.temperature, ignore_index
        )
        ignore_index = IGNORED
    args = (labels, reference, state, reference_state, coefficients, upstream)
    how = (config.temperature, ignore_index, config.backend)
    if not inplace:
        return ops.run("row_grad", logits, *args, *how)
    out = logits.detach()
    if torch.compiler.is_compiling():
        ops.run("row_grad_", out, *args, *how)
        return out
    # The write goes past autograd: tell it, so that whoever saved these logits refuses to use them. Before the write as
    # well: an exception in the middle of it, such as Ctrl-C, leaves logits that are partly gradients.
    torch.autograd.graph.increment_version(logits)
    _mark_overwritten(logits)
    try:
        ops.run("row_grad_", out, *args, *how)
    finally:
        _mark_overwritten(logits)  # an op that torch has dispatched counts as a write of its own
    return out


def _mark_overwritten(logits: Tensor) -> None:
    setattr(logits.untyped_storage(), _OVERWRITTEN, logits._version)


class DefaultLoss(torch.autograd.Function):
    """`logits [S, T, V] -> loss [], rewards [2B], stats [K, S, T], tokens [2, S, T]` of the default objective.

    The same operations as `RowStats` and `PairLoss`, with one node in the graph and nothing between them: two kernels
    in the forward (three where few rows are spread over many programs), one in the backward.
    """

    @staticmethod
    def forward(
        ctx, logits, labels, reference, reference_logps, weights, cu_seqlens, config: RowConfig, inplace: bool,
        beta: float, label_smoothing: float,
    ):  # fmt: skip
        stats = ops.run("row_stats", logits, labels, reference, *config)
        logps = stats[column_index(config.columns, "logps")]
        if reference is not None:
            reference_logps = stats[column_index(config.columns, "reference_logps")]
        loss, rewards, grad, tokens = ops.run(
            "pair_loss", logps, reference_logps, labels, weights, cu_seqlens, beta, label_smoothing,
            config.ignore_index, config.backend,
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, stats, grad)
        ctx.config, ctx.inplace = config, inplace
        ctx.mark_non_differentiable(rewards, stats, tokens)
        ctx.set_materialize_grads(False)
        return loss, rewards, stats, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        logits, labels, stats, grad = ctx.saved_tensors
        if grad_loss is None:  # the loss does not enter what is differentiated
            return (None,) * 10
        coefficients = grad.unsqueeze(0)
        result = _row_grad(logits, labels, None, stats[:3], None, coefficients, grad_loss, ctx.config, ctx.inplace)
        return result, None, None, None, None, None, None, None, None, None


class PairLoss(torch.autograd.Function):
    """The operation `pair_loss` on `logps [S, T]`, whose gradient is known after the forward: loss, rewards, tokens."""

    @staticmethod
    def forward(
        ctx, logps, reference_logps, labels, weights, cu_seqlens, beta: float, label_smoothing: float,
        ignore_index: int, backend: str,
    ):  # fmt: skip
        args = (reference_logps, labels, weights, cu_seqlens, beta, label_smoothing, ignore_index, backend)
        loss, rewards, grad, tokens = ops.run("pair_loss", logps, *args)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(rewards, tokens)
        ctx.set_materialize_grads(False)
        return loss, rewards, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return None if grad_loss is None else grad * grad_loss, None, None, None, None, None, None, None, None
