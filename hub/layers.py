"""Layers for `kernels.use_kernel_mapping`: modules without state, of which only `forward` is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional.hidden import linear_token_logps
from .functional.logits import shift_labels as shifted
from .functional.logits import token_logps

__all__ = ["ForCausalLMLoss", "LinearLogprobs"]


class LinearLogprobs(nn.Module):
    """Per-token log-probs from hidden states and the head's weight; see `linear_token_logps`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """`[...]` log-probs of `labels [...]` under the logits of `hidden [..., H]` and `weight [V, H]`, fp32."""
        return linear_token_logps(hidden, weight, labels, **options)


class ForCausalLMLoss(nn.Module):
    """The next-token loss, with the arguments of transformers' layer "ForCausalLMLoss".

    With `hidden_states` and `lm_head_weight` no logits are made. transformers 5.23 lists such a layer in its mapping,
    but none of its models calls it yet; until one does, call this yourself.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        hidden_states: Tensor | None = None,
        lm_head_weight: Tensor | None = None,
        lm_head_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Scalar loss: minus the sum of log-probs over `num_items_in_batch`, or over the number of labels that count.

        Args:
            logits: `[B, T, V]`, unless `hidden_states` are given.
            labels: `[B, T]` int64, unshifted; or `shift_labels`, aligned with the rows already.
            vocab_size, hidden_size (in options): not needed; the tensors have them.
            num_items_in_batch: divisor of the loss under gradient accumulation.
            ignore_index: the label of rows that do not count.
            hidden_states: `[B, T, H]`, with `lm_head_weight` `[V, H]` and `lm_head_bias` `[V]`.
            options: `final_logit_softcapping`, of Gemma.
        """
        if shift_labels is None:
            if labels is None:
                raise ValueError("ForCausalLMLoss needs labels or shift_labels")
            shift_labels = shifted(labels, ignore_index=ignore_index)
        if hidden_states is not None and lm_head_weight is not None:
            softcap = options.get("final_logit_softcapping")
            logps = linear_token_logps(
                hidden_states,
                lm_head_weight,
                shift_labels,
                bias=lm_head_bias,
                softcap=softcap,
                ignore_index=ignore_index,
            )
        elif logits is not None:
            logps = token_logps(logits, shift_labels, ignore_index=ignore_index)
        else:
            raise ValueError("ForCausalLMLoss needs logits, or hidden_states with lm_head_weight")
        count: Any = num_items_in_batch
        if count is None:
            count = (shift_labels != ignore_index).sum().clamp(min=1)
        return -logps.sum() / (count.to(logps.device) if isinstance(count, torch.Tensor) else count)
