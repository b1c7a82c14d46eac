"""What decoding-time processors share: models that follow the rows of a generation, and the padding of the prompts.

`generate` calls a processor with the token ids of each row and the generating model's scores, and says nothing of how
beams were reordered since the last call. An auxiliary model with a KV cache therefore looks its rows up by content: two
rows of the same ids and the same padding have the same cache, so each new row takes over the cache of a row that was
its prefix, whichever row that was. Where there is none (a new prompt, a cache that cannot be reordered) everything is
computed again, so the results never depend on the cache; `use_cache=False` always computes again.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from ..functional.logits import token_stats
from ..integrations.transformers import unwrap
from ..text.padding import left_padding


class Step(NamedTuple):
    """What a model says of the next token.

    logits: fp32 `[R, V]`.
    hidden: by layer, for those who asked: the state that the layer gets of the last token, `[R, H]`.
    attention: by layer, for those who asked: the weights of the last token, fp32 `[R, heads, L]`.
    """

    logits: Tensor
    hidden: Mapping[int, Tensor] = {}
    attention: Mapping[int, Tensor] = {}


class Inside(NamedTuple):
    """Which layers' hidden states and attention weights are wanted."""

    layers: tuple[int, ...]
    attention_layers: tuple[int, ...]


def prefix_rows(known: Tensor | None, rows: Tensor) -> Tensor | None:
    """For each of the rows `[R, L]`, which of `known` `[K, L - 1]` is its prefix, `[R]`; None unless all have one."""
    if known is None or known.shape[1] + 1 != rows.shape[1]:
        return None
    prefixes = rows[:, :-1]
    if torch.equal(prefixes, known):
        return torch.arange(len(rows), device=rows.device)
    _, kind = torch.unique(torch.cat([known, prefixes]), dim=0, return_inverse=True)
    same = kind[len(known) :, None] == kind[None, : len(known)]
    return same.int().argmax(1) if bool(same.any(1).all()) else None


def last_attention(weights: Tensor, length: int) -> Tensor:
    """The last token's row of attention weights `[R, heads, q, K]` over all L tokens, fp32 `[R, heads, L]`.

    A layer with a sliding window has weights for the last K tokens alone; those before it are 0.
    """
    row = weights[:, :, -1].float()
    return nn.functional.pad(row, (length - row.shape[-1], 0)) if row.shape[-1] < length else row


class Auxiliary:
    """A model that follows the rows of a generation, with a KV cache of its own."""

    def __init__(self, model: nn.Module, name: str, use_cache: bool, adapter_off: bool = False):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        causal = unwrap(model)
        if getattr(getattr(causal, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{name} is an encoder-decoder; expected a causal language model")
        if adapter_off and not callable(getattr(model, "disable_adapter", None)):
            raise ValueError(f"adapter_off=True, but {name} is no PEFT model whose adapter could be switched off")
        self.model, self.name, self.adapter_off = model, name, adapter_off
        self.inside: Inside | None = None
        self.use_cache = use_cache
        parameters = inspect.signature(type(causal).forward).parameters
        self._takes = set(parameters)
        self._cache: Any = None
        self._rows: Tensor | None = None  # (rows, length): 2 * id + attended, the rows of the last call

    def reset(self) -> None:
        """Forget all rows."""
        self._cache = self._rows = None

    def next(self, ids: Tensor, mask: Tensor) -> Step:
        """The model's view of the token after each row. ids, mask: int64 `[R, L]`."""
        if self.model.training:
            raise ValueError(
                f"{self.name} is in training mode, in which dropout changes its log-probs: call its .eval() first"
            )
        rows = 2 * ids + mask
        earlier = prefix_rows(self._rows, rows)
        if earlier is not None and self._cache is not None:
            assert self._rows is not None
            if not torch.equal(earlier, torch.arange(len(self._rows), device=earlier.device)):
                self._cache.reorder_cache(earlier.to(self._device()))
            step = self._forward(ids, mask, 1)
        else:
            self.reset()
            # At the start all beams of a prompt are the same row.
            distinct, place = torch.unique(rows, dim=0, return_inverse=True)
            step = self._forward(distinct // 2, distinct % 2, ids.shape[1])
            place = place.to(self._device())
            step = Step(
                step.logits[place],
                {layer: state[place] for layer, state in step.hidden.items()},
                {layer: weights[place] for layer, weights in step.attention.items()},
            )
            if self._cache is not None:
                self._cache.reorder_cache(place)
        self._rows = rows
        return step

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _forward(self, ids: Tensor, mask: Tensor, new: int) -> Step:
        """Run the model on the last `new` tokens; the cache holds those before."""
        device = self._device()
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs: dict[str, Any] = {"input_ids": ids[:, -new:], "attention_mask": mask, "return_dict": True}
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions[:, -new:]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        if "use_cache" in self._takes:
            inputs["use_cache"] = self.use_cache
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        if self.inside is not None:
            inputs.update(output_hidden_states=True, output_attentions=True)
        off: Any = self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext()  # type: ignore[operator]
        with torch.no_grad(), off:
            outputs = self.model(**inputs)
        cache = getattr(outputs, "past_key_values", None) if self.use_cache else None
        self._cache = cache if hasattr(cache, "reorder_cache") else None
        logits = outputs.logits[:, -1].float()
        if self.inside is None:
            return Step(logits)
        attentions = getattr(outputs, "attentions", None)
        wanted = self.inside.attention_layers
        if not attentions or any(attentions[layer] is None for layer in wanted):
            raise ValueError(no_attention(self.name))
        hidden = {layer: outputs.hidden_states[layer][:, -1] for layer in self.inside.layers}
        weights = {layer: last_attention(attentions[layer], ids.shape[1]) for layer in wanted}
        return Step(logits, hidden, weights)


def no_attention(name: str) -> str:
    """The message for a model whose attention implementation forms no weights."""
    return (
        f"{name} returns no attention weights: load it with attn_implementation='eager', or call"
        " model.set_attn_implementation('eager')"
    )


class PromptProcessor(LogitsProcessor):
    """What all processors here share: the padding of the prompts."""

    def __init__(self, attention_mask: Tensor | None, pad_token_ids: Sequence[int], special: Sequence[int]):
        self._attention_mask: Tensor | None = None
        self._pads, self._special = list(pad_token_ids), list(special)
        if attention_mask is not None:
            self.for_prompt(attention_mask)

    def for_prompt(self, attention_mask: Tensor | None) -> None:
        """Say which tokens of the prompts are padding.

        Without it, leading pad tokens are taken for padding; where the pad token is also the begin or end token, that
        cannot be told, and is an error.

        Args:
            attention_mask: `[B, P]`, as `generate` gets it; 0 at padding, on the left. None to go by the pad token.
        """
        if attention_mask is not None:
            attention_mask = left_padding(attention_mask)
        self._attention_mask = attention_mask
        self.reset()

    def reset(self) -> None:
        """Forget all caches: to free their memory, or because a model has been trained since they were made."""

    def _mask(self, ids: Tensor) -> Tensor:
        """int64 `[R, L]` for the rows of a generation: padding of their prompts, and ones."""
        given = self._attention_mask
        if given is not None:
            if len(ids) % len(given) or ids.shape[1] < given.shape[1]:
                raise ValueError(
                    f"attention_mask {tuple(given.shape)} is of another batch than the {tuple(ids.shape)} token ids"
                    " that generate works on: call for_prompt(attention_mask) before each generate"
                )
            prompts = given.to(ids.device).repeat_interleave(len(ids) // len(given), 0)
            return torch.nn.functional.pad(prompts, (0, ids.shape[1] - given.shape[1]), value=1)
        if not self._pads:
            return torch.ones_like(ids)
        is_pad = torch.isin(ids, torch.tensor(self._pads, device=ids.device))
        mask = ((~is_pad).long().cumsum(1) > 0).long()
        if set(self._pads) & set(self._special) and not bool(mask.all()):
            raise ValueError(
                "a prompt starts with a token that pads as well as begins or ends a text: say which it is with"
                " attention_mask=, or for_prompt(attention_mask)"
            )
        return mask


def special_tokens(model: nn.Module) -> tuple[list[int], list[int]]:
    """Pad token ids, and those of the begin and the end of a text."""
    found: dict[str, list[int]] = {}
    causal = unwrap(model)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for source in (getattr(causal, "generation_config", None), getattr(causal, "config", None)):
            value = getattr(source, name, None)
            if value is not None:
                found[name] = [value] if isinstance(value, int) else [int(x) for x in value]
                break
    return found.get("pad_token_id", []), found.get("bos_token_id", []) + found.get("eos_token_id", [])


def normalised(logits: Tensor) -> Tensor:
    """log softmax of fp32 `[R, V]`, its log-sum-exps of all rows in one pass of the fused kernels."""
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    lse = token_stats(logits, labels, outputs=("logsumexp",)).logsumexp
    assert lse is not None
    return logits - lse[:, None]


def finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
