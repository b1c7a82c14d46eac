"""The gradient of an input embedding that is the head's weight, in the rows that were read alone.

Such a weight `[V, H]` has two gradients. That of the embedding is 0 but for the rows of the batch's tokens; autograd
makes a tensor `[V, H]` of it, at the end of the backward, and holds the head's gradient until then, to add the two:
with 262144 tokens and a width of 640 two tensors of 640 MiB in fp32, the most memory of a whole step with gradient
checkpointing. `gradient_of_read_rows` lets the embedding read a copy of its rows `[U, H]`, one for each token that
occurs, and adds the gradient of the copy to that of the weight once the backward is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .linears import compiled, with_head


class _Reads:
    """What an embedding has read in a step: tokens, and the copies of their rows that carry gradient."""

    def __init__(self, layer: nn.Embedding):
        self.layer, self.weight = layer, layer.weight
        self.copies: list[tuple[Tensor, Tensor]] = []

    def forward(self, input: Tensor) -> Any:
        layer: Any = self.layer
        if not torch.is_grad_enabled():
            return type(layer).forward(layer, input)
        tokens, where = torch.unique(input, return_inverse=True)
        copy = self.weight.detach()[tokens].requires_grad_()
        padding = layer.padding_idx
        try:
            layer._parameters["weight"] = copy
            if padding is not None:  # the row that has no gradient
                found = (tokens == padding).nonzero()
                layer.padding_idx = int(found) if found.numel() else None
            result = type(layer).forward(layer, where)
        finally:
            layer._parameters["weight"], layer.padding_idx = self.weight, padding
        self.copies.append((tokens, copy))
        return result

    def add(self) -> None:
        """Add the gradients of the copies to that of the weight."""
        for tokens, copy in self.copies:
            if copy.grad is not None:
                if self.weight.grad is None:
                    self.weight.grad = torch.zeros_like(self.weight)
                self.weight.grad.index_add_(0, tokens, copy.grad)


def _served(model: nn.Module) -> nn.Embedding | None:
    """The embedding of a model whose gradient can be had this way."""
    causal = with_head(model)
    if causal is None or not hasattr(causal, "get_input_embeddings"):
        return None
    layer, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if head is None or not isinstance(layer, nn.Embedding) or "forward" in vars(layer) or compiled(model):
        return None
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.layout == torch.strided and weight.device.type == "cpu"
    watched = bool(weight._backward_hooks) or bool(getattr(weight, "_post_accumulate_grad_hooks", None))
    usual = not layer.sparse and not layer.scale_grad_by_freq and layer.max_norm is None
    tied = getattr(head, "weight", None) is weight
    return layer if tied and plain and usual and weight.requires_grad and not watched else None


@contextlib.contextmanager
def gradient_of_read_rows(model: nn.Module) -> Iterator[None]:
    """Enter it around forward and backward of a step in one process; afterwards the weight's gradient is whole.

    Nothing is changed for weights that are not tied to the head, not trained, not on a CPU, tensor subclasses or
    watched by hooks, and for models that torch.compile has in hand.
    """
    layer = _served(model)
    if layer is None:
        yield
        return
    reads = _Reads(layer)
    layer.forward = reads.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(layer).pop("forward", None)
    reads.add()
