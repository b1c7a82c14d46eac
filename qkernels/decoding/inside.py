"""Hidden states and attention weights of the forward that `generate` runs anyway, and which heads copy.

A processor of `generate` gets token ids and scores. What it needs from inside the model would take a forward of its
own, at twice the cost. `Watch` takes it from the forward that has just made the scores, by hooks on the layers: the
last token's rows alone, copied, so that nothing of a long prompt stays alive. A catch is handed out once, and only if
it fits the call: the same last tokens, the same length, and logits that differ from the scores by one constant per row.
Where nothing fits (scores from elsewhere, a cache of fixed size, layers that are not found), the caller runs the model.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import unwrap
from .auxiliary import Auxiliary, Inside, Step, last_attention, no_attention

_FINGERPRINT = 16  # entries of a row of logits that are compared with the scores
_REPEATED, _ROWS = 24, 2  # tokens that are said twice, and how often, to find the heads that copy


def _nothing(*_: Any, **__: Any) -> None:
    """What a hook is in a copy of a model."""


def _no_hook() -> Any:
    return _nothing


class _Hook:
    """A hook that does not keep its owner alive, and that a copied or saved model has no part of."""

    def __init__(self, owner: Watch, method: str, layer: int = -1):
        self._owner, self._method, self._layer = weakref.ref(owner), method, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        owner = self._owner()
        if owner is not None and not torch.is_grad_enabled():
            getattr(owner, self._method)(self._layer, args, kwargs, output)

    def __reduce__(self) -> Any:
        return _no_hook, ()


class Watch:
    """Catches what a model computes for the last token of each row.

    Args:
        model: a causal language model of transformers, or its wrapper.
        inside: what to catch.

    Attributes:
        works: whether anything is caught; known after `try_out`.
    """

    def __init__(self, model: nn.Module, inside: Inside):
        self._inside, self.works = inside, False
        self._hidden: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        self._caught: tuple[Tensor, Step] | None = None
        causal: Any = unwrap(model)
        layers = decoder_layers(causal)
        attentions = [attention_module(layers[layer]) if layers else None for layer in inside.attention_layers]
        self._handles: list[Any] = []
        if layers is None or any(module is None for module in attentions):
            return
        handles = self._handles
        handles.append(causal.register_forward_hook(_Hook(self, "_end"), with_kwargs=True))
        for layer in inside.layers:
            hook = _Hook(self, "_state", layer)
            handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
        for layer, module in zip(inside.attention_layers, attentions, strict=True):
            handles.append(module.register_forward_hook(_Hook(self, "_weights", layer), with_kwargs=True))  # type: ignore[union-attr]
        weakref.finalize(self, _remove, handles)

    def _state(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        state = args[0] if args else kwargs.get("hidden_states")
        if isinstance(state, Tensor) and state.dim() == 3:
            self._hidden[layer] = state[:, -1].clone()

    def _weights(self, layer: int, _: tuple[Any, ...], __: dict[str, Any], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.dim() == 4:
            self._attention[layer] = weights[:, :, -1:].clone()

    def _end(self, _: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, logits = args[0] if args else kwargs.get("input_ids"), getattr(output, "logits", None)
        self._caught = None
        complete = len(self._hidden) == len(set(self._inside.layers)) and len(self._attention) == len(
            set(self._inside.attention_layers)
        )
        if isinstance(ids, Tensor) and isinstance(logits, Tensor) and complete:
            step = Step(logits[:, -1].float(), dict(self._hidden), dict(self._attention))
            self._caught = ids[:, -1].clone(), step
        self._hidden.clear()
        self._attention.clear()

    def try_out(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Run the model over two tokens; catch nothing any more if that is not what the model itself reports.

        Returns:
            Its last hidden states `[1, H]` and logits `[1, V]` of the second one.

        Raises:
            ValueError: the model reports no attention weights.
        """
        parameter = next(model.parameters())
        ids = torch.tensor([[1, 0]], device=parameter.device)
        with torch.no_grad():
            outputs = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, output_attentions=True,
                return_dict=True,
            )  # fmt: skip
        caught, self._caught = self._caught, None
        attentions = getattr(outputs, "attentions", None)
        if not attentions or any(attentions[layer] is None for layer in self._inside.attention_layers):
            raise ValueError(no_attention("model"))
        states = outputs.hidden_states
        if caught is not None:
            step = caught[1]
            same = all(torch.equal(step.hidden[i], states[i][:, -1]) for i in self._inside.layers)
            weights = self._inside.attention_layers
            self.works = same and all(torch.equal(step.attention[i], attentions[i][:, :, -1:]) for i in weights)
        else:
            self.works = False
        if not self.works:
            _remove(self._handles)
        return states[-1][:, -1], outputs.logits[:, -1].float()

    def take(self, ids: Tensor, scores: Tensor) -> Step | None:
        """What was caught of the forward that made these scores; None if that was another one.

        Args:
            ids: int64 `[R, L]`.
            scores: `[R, V]`, the model's logits or log-probs, which processors before may have changed in part.
        """
        caught, self._caught = self._caught, None
        if caught is None:
            return None
        last, step = caught
        if step.logits.shape != scores.shape or not torch.equal(last.to(ids.device), ids[:, -1]):
            return None
        if any(weights.shape[-1] != ids.shape[1] for weights in step.attention.values()):
            return None  # a cache of fixed size or a sliding window: which tokens these are is not known here
        every = max(1, scores.shape[1] // _FINGERPRINT)
        known, given = step.logits[:, ::every].to(scores.device), scores[:, ::every].float()
        difference = torch.where(given == -torch.inf, torch.nan, given - known)
        usual = difference.nanmedian(1, keepdim=True).values
        near = (difference - usual).abs() <= 1e-3 + 1e-3 * known.abs()
        if not bool((near.sum(1) * 2 > known.shape[1]).all()):
            return None
        attention = {layer: last_attention(weights, ids.shape[1]) for layer, weights in step.attention.items()}
        return Step(step.logits, step.hidden, attention)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def layer_count(model: nn.Module) -> int:
    """Number of decoder layers, by the configuration."""
    return int(unwrap(model).config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]


def decoder_layers(causal: nn.Module) -> nn.ModuleList | None:
    """The list of a model's layers; None if there is none of the configured length whose members attend."""
    count = layer_count(causal)
    for module in causal.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if all(attention_module(layer) is not None for layer in module):
            return module
    return None


def attention_module(layer: nn.Module) -> nn.Module | None:
    """The attention of a decoder layer."""
    for name in ("self_attn", "attn", "attention", "self_attention"):
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def copying_heads(auxiliary: Auxiliary, count: int) -> list[tuple[int, int]]:
    """The `count` heads of a model that copy most, as (layer, head), found by what they do.

    The model reads a row of random tokens twice (two rows of 24). At the second reading a head that copies looks at the
    token that followed the first time: the induction heads of Olsson et al. (2022), which are the heads that fetch
    names and numbers from a text, too (Wu et al. 2024, "retrieval heads"). A head's score is the attention that it pays
    to that token on average. Costs one forward of about a hundred tokens; the tokens are the same at every call.
    """
    model: Any = unwrap(auxiliary.model)
    vocab = int(model.config.get_text_config().vocab_size)
    first, last = (vocab // 100, vocab // 4) if vocab >= 1000 else (0, vocab)  # frequent tokens of a byte-pair table
    generator = torch.Generator().manual_seed(0)
    said = torch.randint(first, last, (_ROWS, _REPEATED), generator=generator)
    begin = getattr(model.config.get_text_config(), "bos_token_id", None)
    start = [] if not isinstance(begin, int) else [torch.full((_ROWS, 1), begin)]
    ids = torch.cat([*start, said, said], 1)
    before = len(start)
    device = next(auxiliary.model.parameters()).device
    with torch.no_grad():
        outputs = auxiliary.model(
            input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device), output_attentions=True,
            return_dict=True,
        )  # fmt: skip
    found = getattr(outputs, "attentions", None)
    if not found or any(weights is None for weights in found):
        raise ValueError(no_attention(auxiliary.name))
    queries = torch.arange(before + _REPEATED, before + 2 * _REPEATED - 1)
    follows = queries - _REPEATED + 1
    scores = torch.stack([weights.float()[:, :, queries, follows].mean((0, 2)).cpu() for weights in found])
    if count > scores.numel():
        raise ValueError(f"heads must be at most the {scores.numel()} heads of {auxiliary.name}, got {count}")
    order = scores.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [(i // scores.shape[1], i % scores.shape[1]) for i in order]
