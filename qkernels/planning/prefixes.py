"""A causal language model that is asked for the next token after many prefixes of a tree, and reads each token once.

The keys and values of every token that was read lie in one pool per layer, by a number that the tree keeps (a slot).
To go on from any node, the slots of its path are gathered into a cache of transformers, whose rows then grow together
for as long as their completions do. So a token costs one forward of one position, however often the search comes by.
A model whose cache is no list of keys and values reads its prefixes again at every step.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import unwrap


class PrefixModel:
    """Next-token logits after prefixes.

    Args:
        model: a causal language model of transformers, in eval mode.
        adapter_off: ask a PEFT model without its adapter.
        use_cache: keep keys and values.
    """

    def __init__(self, model: nn.Module, *, adapter_off: bool = False, use_cache: bool = True):
        causal = unwrap(model)
        self.model, self.adapter_off = model, adapter_off
        self._takes = set(inspect.signature(type(causal).forward).parameters)
        stateful = getattr(causal, "_is_stateful", False)
        self.cached = use_cache and not stateful and {"past_key_values", "use_cache"} <= self._takes
        self._keys: list[Tensor] = []  # per layer, [slots, heads, width]
        self._values: list[Tensor] = []
        self._used = 0
        self._ids = self._mask = torch.empty(0, 0, dtype=torch.int64)  # of the rows that are followed
        self._cache: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[list[int]]]:
        """Read prompts, padded on the left, int64 `[B, P]`: logits of what comes next, `[B, V]`, and their slots."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache: Any = _new_cache() if self.cached else None
        logits = self._forward(ids, mask, ids.shape[1], cache)
        if cache is not None:
            self.cached = _is_plain(cache, ids.shape[1])
        if not self.cached:
            return logits, [[] for _ in range(len(ids))]
        kept = mask.bool()
        first = self._used
        of_layers = []
        for layer in cache.layers:  # each where its layer is: a model may be spread over devices
            there = kept.to(layer.keys.device)
            of_layers.append((layer.keys.transpose(1, 2)[there], layer.values.transpose(1, 2)[there]))
        self._store(of_layers)
        slots = iter(range(first, self._used))
        return logits, [[next(slots) for _ in range(int(count))] for count in kept.sum(1)]

    def follow(self, prefixes: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> None:
        """Begin at these prefixes: their tokens, and the slots of the tokens (what `read` and `step` said)."""
        longest = max(map(len, prefixes))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prefixes])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prefixes])
        self._ids, self._mask = ids.to(self.device), mask.to(self.device)
        self._cache = None
        if self.cached:
            index = torch.tensor([[0] * (longest - len(row)) + list(row) for row in slots])
            of_layers = []
            for keys, values in zip(self._keys, self._values, strict=True):
                there = index.to(keys.device)
                of_layers.append((keys[there].transpose(1, 2), values[there].transpose(1, 2)))
            self._cache = _new_cache(of_layers)

    def step(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """Append a token to each row, `[R]`: logits of the next one, fp32 `[R, V]`, and the slots of those appended."""
        self._ids = torch.cat([self._ids, tokens.to(self.device)[:, None]], 1)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        logits = self._forward(self._ids, self._mask, 1 if self.cached else self._ids.shape[1], self._cache)
        if not self.cached:
            return logits, [-1] * len(tokens)
        first = self._used
        self._store([(layer.keys[:, :, -1], layer.values[:, :, -1]) for layer in self._cache.layers])
        return logits, list(range(first, self._used))

    def keep(self, rows: Tensor) -> None:
        """Follow only these rows from now on."""
        rows = rows.to(self.device)
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def _forward(self, ids: Tensor, mask: Tensor, new: int, cache: Any) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs: dict[str, Any] = {"input_ids": ids[:, -new:], "attention_mask": mask}
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions[:, -new:]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        if "use_cache" in self._takes:
            inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs["past_key_values"] = cache
        off: Any = self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext()  # type: ignore[operator]
        with torch.no_grad(), off:
            logits: Tensor = self.model(**inputs).logits
        return logits[:, -1].float()

    def _store(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put keys and values of new tokens, `[n, heads, width]`, behind those in the pool."""
        count = len(layers[0][0])
        if not self._keys:
            self._keys, self._values = ([pair[side].clone() for pair in layers] for side in (0, 1))
        else:
            for pool, side in ((self._keys, 0), (self._values, 1)):
                for i, pair in enumerate(layers):
                    if self._used + count > len(pool[i]):
                        grown = pool[i].new_empty(2 * (self._used + count), *pool[i].shape[1:])
                        grown[: self._used] = pool[i][: self._used]
                        pool[i] = grown
                    pool[i][self._used : self._used + count] = pair[side]
        self._used += count


def _new_cache(layers: Any = None) -> Any:
    """A cache that keeps every position: the masks of a model, not its cache, say what a sliding window sees."""
    from transformers import DynamicCache

    return DynamicCache() if layers is None else DynamicCache(layers)


def _is_plain(cache: Any, length: int) -> bool:
    """Whether every layer has kept keys and values `[B, heads, length, width]`, and nothing else."""
    from transformers.cache_utils import DynamicLayer

    return bool(cache.layers) and all(
        type(layer) is DynamicLayer and layer.keys is not None and layer.keys.shape[-2] == length
        for layer in cache.layers
    )
