"""Autograd of the row operations on logits: what is saved, and how upstream gradients reach the kernel.

Saved for backward: the logits themselves (no copy), labels, and the per-row results; nothing of the logits' size. The
backward turns upstream gradients of all fields into at most five coefficients per row and makes one pass over the
logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..core import calls, checks
from ..core.coefficients import coefficients
from ..core.fields import DIVERGENCES
from ..distributed.vocab_parallel import Shard, row_stats
from . import once_differentiable
from .saved import restored, results_of, saveable


class Backward(NamedTuple):
    """How the gradient of logits is made.

    inplace: over the logits' own storage.
    differentiable: names of the differentiable fields.
    shard: this rank's shard of the vocabulary; None where it holds all of it.
    """

    inplace: bool
    differentiable: tuple[str, ...]
    shard: Shard | None = None


class RowStats(torch.autograd.Function):
    """`(logits [S, T, V], call) -> stats [K, S, T], fields [S, T] ...`.

    `call` has the same logits, labels and the reference, which is a constant. `stats` is a constant; the fields named
    in `how.differentiable`, which follow it, have a gradient with respect to the logits. Those without cost nothing in
    the backward. With a shard, the logits are this rank's columns and the results those of the whole rows.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: calls.RowStats, how: Backward) -> tuple[Tensor, ...]:
        if call.logits is not logits:  # inside torch.compile
            call = call._replace(logits=logits)
        stats = row_stats(call, how.shard)
        with_kl = call.fields & DIVERGENCES
        (saved,) = saveable(ctx, call.reference if with_kl else None)
        ctx.save_for_backward(logits, call.labels, saved, stats)
        ctx.how, ctx.options = how, call[3:]
        return results_of(ctx, stats, call.fields, how.differentiable)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, saved, stats = ctx.saved_tensors
        (reference,) = restored(ctx, saved)
        fields, temperature, ignore_index, backend = ctx.options
        call = calls.RowGrad(
            logits=logits,
            labels=labels,
            reference=reference,
            softmax=stats,
            reference_softmax=None if reference is None else stats[3:6],
            coefficients=coefficients(stats, dict(zip(ctx.how.differentiable, grads, strict=True)), fields),
            upstream=None,
            temperature=temperature,
            ignore_index=ignore_index,
            backend=backend,
        )
        shard, inplace = ctx.how.shard, ctx.how.inplace
        return _row_grad(call if shard is None else shard.gradient_inputs(call), inplace), None, None


def _row_grad(call: calls.RowGrad, inplace: bool) -> Tensor:
    """dL/dlogits, new or over the logits; in the second case the logits are marked as overwritten."""
    if not inplace:
        gradient: Tensor = ops.row_grad(call)
        return gradient
    logits = call.logits
    out = logits.detach()
    call = call._replace(logits=out)
    if torch.compiler.is_compiling():
        ops.row_grad_(call)
        return out
    # The write goes past autograd: tell it, so that whoever saved these logits refuses to use them. Before the write as
    # well: an exception in the middle of it, such as Ctrl-C, leaves logits that are partly gradients.
    torch.autograd.graph.increment_version(logits)
    checks.mark_overwritten(logits)
    try:
        ops.row_grad_(call)
    finally:
        checks.mark_overwritten(logits)  # an op that torch has dispatched counts as a write of its own
    return out


class KnownLoss(NamedTuple):
    """A loss of the rows' log-probs that has been computed, and its gradient: both without a graph.

    loss: `[]`; it gets its place in the graph.
    gradient: `[S, T]`, d(loss) / d(log-prob).
    stats: `[K, S, T]`, what `row_stats` returned.
    """

    loss: Tensor
    gradient: Tensor
    stats: Tensor


class LossOfLogits(torch.autograd.Function):
    """`logits [S, T, V], call, known -> loss []`: the computed loss as a function of the logits.

    One node in the graph, and one kernel in its backward. What else a loss returns is not differentiable: it does not
    pass through here, which would cost the host time for each tensor.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: calls.RowStats, known: KnownLoss, inplace: bool) -> Tensor:
        loss, gradient, stats = known
        ctx.save_for_backward(logits, call.labels, stats, gradient)
        ctx.inplace, ctx.options = inplace, call[4:]
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, stats, gradient = ctx.saved_tensors
        if grad_loss is None:  # the loss does not enter what is differentiated
            return None, None, None, None
        temperature, ignore_index, backend = ctx.options
        call = calls.RowGrad(
            logits=logits,
            labels=labels,
            reference=None,
            softmax=stats,
            reference_softmax=None,
            coefficients=gradient[None],
            upstream=grad_loss,
            temperature=temperature,
            ignore_index=ignore_index,
            backend=backend,
        )
        return _row_grad(call, ctx.inplace), None, None, None


class PairLoss(torch.autograd.Function):
    """The operation `pair_loss` on `logps [S, T]`, whose gradient is known after the forward: loss, rewards, tokens."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, call: calls.PairLoss) -> tuple[Tensor, Tensor, Tensor]:
        if call.logps is not logps:  # inside torch.compile
            call = call._replace(logps=logps)
        loss, rewards, grad, tokens = ops.pair_loss(call)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(rewards, tokens)
        ctx.set_materialize_grads(False)
        return loss, rewards, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return None if grad_loss is None else grad * grad_loss, None
