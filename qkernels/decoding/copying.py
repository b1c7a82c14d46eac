"""Copying from the prompt while writing: a language model as a pointer-generator, without training (LargePiG)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import checks
from ..integrations.transformers import head_parameters, unwrap
from .auxiliary import Auxiliary, Inside, PromptProcessor, Step, finite, normalised, prefix_rows, special_tokens
from .inside import Watch, copying_heads, layer_count

# Of the calibrated preset: how many of the likeliest tokens the layers are compared on, and how many heads point.
_CANDIDATES = 256
_HEADS = 2
# What the authors' code adds to every place of the source before it normalises.
_AUTHORS_EPSILON = 1e-7


class _Preset(NamedTuple):
    """A rule for the copy probability and the pointer; see `CopyMixture`."""

    scale: float
    heads: int | None  # None: all of the last layer
    reads_norm: bool
    points_at_itself: bool
    gated: bool  # whether what the pointer leaves of its mass stays with the model


_PRESETS = {
    "calibrated": _Preset(0.5, _HEADS, True, False, True),
    "largepig": _Preset(100.0, None, False, True, False),
}


class CopyMixture(PromptProcessor):
    """A language model as a pointer-generator, without training (LargePiG, Sun et al. 2024).

    With p the next-token distribution of the model, p_j the one that the head reads off the hidden state of its layer
    j, and a the attention of the last token to the source, added up by token id (so a sums to the attention m that
    falls on the source, at most 1):

        preset="calibrated"   P = (1 - c m) p + c a,    c = clamp(scale * mean_j JS(p, p_j) / ln 2, 0, cap)
        preset="largepig"     P = (1 - c) p + c a,      c = clamp(scale * max_j D(p, p_j), 0, cap)

    Both copy more where the upper layers still change the prediction, as they do at names and numbers.

    "calibrated", the default, is made to work on any model. JS is the Jensen-Shannon divergence of the two
    distributions renormalised on the model's 256 likeliest tokens; it lies in [0, ln 2], p_j is read off through the
    final norm, and the layers are the upper half. The pointer is the mean of the heads that copy, which are found once,
    when the processor is made, by reading random tokens twice (`heads`); a token does not point at itself. Attention
    outside the source, such as that to the first token of a text, leaves the model's own distribution as it is.

    "largepig" is the rule of the authors' code. D is the mean over the vocabulary of KL(M || p) and KL(M || p_j),
    halved, with M = (p + p_j) / 2; p_j is read off the raw hidden state, without the final norm; the layers are the
    even ones of the upper half; the pointer is the mean of all heads of the last layer. Its scale depends on the model:
    D has 1/V as a factor, and raw hidden states have any size. Unless `normalise` is set, P sums to 1 - c (1 - m), and
    what is returned is log P as it is; sampling and greedy search do not notice.

    Hidden states and attention weights are taken from the forward that `generate` has just run on `model`, so a token
    costs hardly more than without; where that does not fit (scores of another model, a static cache), `model` is run
    again with a cache of its own. What earlier processors forbid stays forbidden.

    Args:
        model: the generating model, in eval mode, with attn_implementation="eager".
        source_mask: bool `[B, P]`, the tokens of the prompts that may be copied; None for the whole prompt. Padding,
            begin and end tokens are never copied. `mark_source` makes one.
        preset: "calibrated" or "largepig".
        scale: of the divergence, 0 or more; None for the preset's (0.5, 100).
        cap: most that c can be, in [0, 1].
        layers: whose distributions are compared with the last one's, from 0 (the embeddings) to the number of layers
            less 1; None for the preset's.
        heads: whose attention is the pointer: (layer, head) pairs, or how many of the heads that copy most; None for
            the preset's (2; all of the last layer).
        normalise: divide the pointer by its sum, so that m = 1.
        special_ids: further ids that are never copied, such as `tokenizer.all_special_ids`.
        final_norm: the module before the head; None to look for it.
        use_cache, attention_mask: as in `ProxyTuning`.

    Attributes:
        copy_probabilities: `[R]`, the weight of the copied part at the last call: c m (c of "largepig").
        layers, heads: those in use.

    Raises:
        As `ProxyTuning`; ValueError for a model without attention weights (it says which implementation to load) or
        whose final norm is not found, and for layers, heads or masks that do not fit.

    Warns:
        UserWarning: `source_mask` covers tokens that begin, end or pad a text, hence most likely a whole chat template,
            whose marks and line breaks draw attention without being worth copying.
    """

    def __init__(
        self,
        model: nn.Module,
        source_mask: Tensor | None = None,
        *,
        preset: str = "calibrated",
        scale: float | None = None,
        cap: float = 0.5,
        layers: Sequence[int] | None = None,
        heads: int | Sequence[tuple[int, int]] | None = None,
        normalise: bool = False,
        special_ids: Sequence[int] = (),
        final_norm: nn.Module | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
    ):
        if preset not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, _PRESETS))}, got {preset!r}")
        self.preset, self._rule = preset, _PRESETS[preset]
        self._auxiliary = Auxiliary(model, "model", use_cache)
        self._prompt_length: int | None = None
        self._rows: Tensor | None = None
        pads, special = special_tokens(model)
        super().__init__(attention_mask, pads, special)
        self.scale = self._rule.scale if scale is None else finite(scale, "scale")
        if not self.scale >= 0:
            raise ValueError(f"scale must be 0 or more, got {scale}")
        self.cap = finite(cap, "cap")
        if not 0 <= self.cap <= 1:
            raise ValueError(f"cap must lie in [0, 1], got {cap}")
        if source_mask is not None:
            source_mask = checks.tensor(source_mask, "source_mask")
            if source_mask.dim() != 2 or source_mask.dtype not in (torch.bool, torch.int64):
                raise ValueError(f"source_mask must be bool [B, P], got {source_mask.dtype} {tuple(source_mask.shape)}")
        self._source_mask, self._warned = source_mask, False
        self._chosen: Tensor | None = None  # prompts of the source mask that are worked on
        self._never = sorted({*pads, *special, *(int(i) for i in special_ids)})
        self.normalise = bool(normalise)
        self._norm = None
        if self._rule.reads_norm:
            self._norm = _final_norm(model) if final_norm is None else final_norm
        count = layer_count(model)
        upper = range(count // 2, count)
        default = upper if self._rule.reads_norm else [layer for layer in upper if layer % 2 == 0] or [count - 1]
        self.layers = list(default) if layers is None else [int(layer) for layer in layers]
        if not self.layers or not all(0 <= layer < count for layer in self.layers):
            raise ValueError(f"layers must name some of 0 to {count - 1}, got {self.layers}")
        if model.training:
            raise ValueError(
                "model is in training mode, in which dropout changes its log-probs: call its .eval() first"
            )
        self.heads = self._find_heads(heads, count)
        inside = Inside(tuple(self.layers), tuple(sorted({layer for layer, _ in self.heads})))
        self._auxiliary.inside = inside
        self._watch = Watch(model, inside)
        hidden, logits = self._watch.try_out(model)
        # hidden_states[-1] is after the norm in transformers; if a model does otherwise, it shows here. A GEMM in bf16
        # errs by some 2^-8 of the largest sum on its way: by more than that of logits that happen to be near 0.
        largest = logits.abs().max()
        if not bool(((head_parameters(model).logits(hidden).to(logits.device) - logits).abs() <= 2e-2 * largest).all()):
            raise ValueError(
                "the model's last hidden state does not give its logits by the head alone; layers cannot be read off"
            )
        self.copy_probabilities: Tensor | None = None

    def _find_heads(self, heads: int | Sequence[tuple[int, int]] | None, count: int) -> list[tuple[int, int]]:
        config: Any = unwrap(self._auxiliary.model).config.get_text_config()  # type: ignore[operator, union-attr]
        each = int(config.num_attention_heads)
        if heads is None:
            heads = self._rule.heads
        if heads is None:
            return [(count - 1, head) for head in range(each)]
        if isinstance(heads, int):
            if isinstance(heads, bool) or heads < 1:
                raise ValueError(f"heads must be 1 or more, or (layer, head) pairs, got {heads!r}")
            return copying_heads(self._auxiliary, heads)
        pairs = [(int(layer), int(head)) for layer, head in heads]
        if not pairs or not all(0 <= layer < count and 0 <= head < each for layer, head in pairs):
            raise ValueError(f"heads must be pairs of a layer below {count} and a head below {each}, got {pairs}")
        return pairs

    def for_prompt(self, attention_mask: Tensor | None) -> None:
        super().for_prompt(attention_mask)
        self._prompt_length = None if self._attention_mask is None else self._attention_mask.shape[1]

    def choose_prompts(self, prompts: Tensor | None) -> None:
        """Say which rows of `source_mask` the next prompts have, where a batch is generated in parts.

        Args:
            prompts: int64 `[b]`, their places in the batch; None for the whole of it.

        Raises:
            ValueError: the mask has no such rows.
        """
        rows = self._source_mask
        if rows is not None and prompts is not None and int(prompts.max()) >= len(rows):
            raise ValueError(f"source_mask has {len(rows)} rows; expected one for each prompt")
        self._chosen = prompts

    def reset(self) -> None:
        self._auxiliary.reset()
        self._rows = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The log-probs `[R, V]` of the mixture; arguments as in `ProxyTuning`."""
        with torch.no_grad():
            mask = self._mask(input_ids)
            span, source = self._source(input_ids, mask)
            step = self._watch.take(input_ids, scores)
            if step is None:
                step = self._auxiliary.next(input_ids, mask)
            if step.logits.shape[-1] != scores.shape[-1]:
                raise ValueError(f"model has V = {step.logits.shape[-1]}, the generating model V = {scores.shape[-1]}")
            copy = (self.scale * self._divergence(step)).clamp(0, self.cap).to(scores.device)
            weight = self._pointer(step, span, source).to(scores.device)
            total = weight.sum(1)
            copy = torch.where(total > 0, copy, 0.0)
            kept = -copy * total if self._rule.gated else -copy
            self.copy_probabilities = -kept
            return self._mixed(input_ids[:, : weight.shape[1]], scores, kept, copy[:, None] * weight)

    def _mixed(self, ids: Tensor, scores: Tensor, kept: Tensor, copied: Tensor) -> Tensor:
        """log of (1 + kept) p + copied, where `copied` `[R, P]` belongs to the token ids at these places."""
        mixed = normalised(scores.float()) + torch.log1p(kept)[:, None]
        summed = torch.zeros_like(mixed).scatter_add_(1, ids, copied).gather(1, ids)
        # Only ids of the source change: a logarithm over the whole vocabulary is saved.
        mixed.scatter_(1, ids, torch.logaddexp(mixed.gather(1, ids), summed.log()))
        forbidden = scores == -torch.inf
        if not bool(forbidden.any()):
            return mixed
        mixed = mixed.masked_fill(forbidden, -torch.inf)
        return normalised(mixed) if self._rule.gated or self.normalise else mixed

    def _pointer(self, step: Step, span: Tensor, source: Tensor) -> Tensor:
        """Attention to the source `[R, P]`; span and source are 0 or 1."""
        rows = [step.attention[layer][:, head] for layer, head in self.heads]
        attention = torch.stack(rows).mean(0).to(source.device)
        weight = attention[:, : source.shape[1]] * source
        if not self._rule.points_at_itself and attention.shape[1] == source.shape[1]:
            weight[:, -1] = 0
        if not self.normalise:
            return weight
        if not self._rule.gated:
            weight = weight + _AUTHORS_EPSILON * span
        total = weight.sum(1, keepdim=True)
        return weight / torch.where(total > 0, total, 1.0)

    def _divergence(self, step: Step) -> Tensor:
        """What c is `scale` times of, `[R]`."""
        head = head_parameters(self._auxiliary.model)
        log_last = step.logits.log_softmax(-1)
        if self._norm is None:
            found = [_mean_kl(log_last, head.logits(step.hidden[layer]).log_softmax(-1)) for layer in self.layers]
            return torch.stack(found).amax(0)
        known, tokens = log_last.topk(min(_CANDIDATES, log_last.shape[-1]), -1)
        states = self._norm(torch.stack([step.hidden[layer] for layer in self.layers], 1))  # [R, layers, H]
        read = head.logits(states, tokens).log_softmax(-1)
        divergence = _jensen_shannon(known.log_softmax(-1)[:, None], read)
        return divergence.mean(1) / math.log(2)

    def _source(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """float `[R, P]`, 1 in the source as it was given; and without what is never copied."""
        given, never = self._source_mask, torch.tensor(self._never, dtype=torch.int64, device=ids.device)
        if given is not None:
            given = given if self._chosen is None else given[self._chosen.to(given.device)]
            if len(ids) % len(given) or ids.shape[1] < given.shape[1]:
                raise ValueError(
                    f"source_mask {tuple(given.shape)} is of another batch than the {tuple(ids.shape)} token ids that"
                    " generate works on"
                )
            span = given.to(ids.device).repeat_interleave(len(ids) // len(given), 0) != 0
        else:
            rows = 2 * ids + mask
            length = self._prompt_length
            # Rows that do not continue those of the last call are a new prompt.
            if self._attention_mask is None and (length is None or prefix_rows(self._rows, rows) is None):
                length = self._prompt_length = ids.shape[1]
            self._rows = rows
            assert length is not None
            span = torch.ones_like(ids[:, :length], dtype=torch.bool)
        length = span.shape[1]
        span = span & (mask[:, :length] != 0)
        marks = torch.isin(ids[:, :length], never)
        if given is not None and not self._warned and bool((span & marks).any()):
            self._warned = True
            found = sorted(set(ids[:, :length][span & marks].tolist()))
            warnings.warn(
                f"source_mask covers tokens of the template (ids {found}, which begin, end or pad a text): they are not"
                " copied, but the template's other marks and line breaks may be. Cover the source text alone, as"
                " qkernels.decoding.mark_source does",
                stacklevel=4,
            )
        return span.float(), (span & ~marks).float()


def mark_source(
    tokenizer: Any, prompts: Sequence[str], sources: Sequence[str], *, add_special_tokens: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids of prompts, and which tokens of each belong to the text that may be copied.

    Args:
        tokenizer: a fast tokenizer of transformers.
        prompts: B texts as the model reads them, chat template included.
        sources: B texts, one for each prompt, which contains it; if it does so several times, the last one counts.
        add_special_tokens: whether the tokenizer adds its begin token; a chat template usually has it already.

    Returns:
        What `generate` takes, input_ids and attention_mask, int64 `[B, P]`, padded on the left; and the source mask,
        bool `[B, P]`: the tokens that lie inside the source as a whole.

    Raises:
        TypeError: strings in place of sequences.
        ValueError: not as many sources as prompts, a source that its prompt does not contain, a tokenizer without
            offsets, or one without a pad token for prompts of different lengths.
    """
    if isinstance(prompts, str) or isinstance(sources, str):
        raise TypeError("prompts and sources must be sequences of strings")
    if len(prompts) != len(sources) or not prompts:
        raise ValueError(f"got {len(prompts)} prompts and {len(sources)} sources; expected as many, and at least one")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "the tokenizer tells no places of its tokens in the text; load the fast one (use_fast=True), or make"
            " source_mask by hand"
        )
    spans = []
    for number, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        start = prompt.rfind(source) if source else -1
        if start < 0:
            raise ValueError(f"prompt {number} does not contain its source {source[:40]!r}")
        spans.append((start, start + len(source)))
    encoded = tokenizer(list(prompts), add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    rows, width = encoded["input_ids"], max(len(row) for row in encoded["input_ids"])
    pad = tokenizer.pad_token_id
    if pad is None and any(len(row) < width for row in rows):
        raise ValueError("the tokenizer has no pad token, and the prompts differ in length: set tokenizer.pad_token")
    ids = torch.full((len(rows), width), pad or 0)
    mask, marked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, offsets, (start, end)) in enumerate(zip(rows, encoded["offset_mapping"], spans, strict=True)):
        first = width - len(tokens)
        ids[row, first:] = torch.tensor(tokens)
        mask[row, first:] = 1
        # A token that begins with the space before the source counts: byte-pair tables join the two.
        inside = [start <= b - 1 and b <= end and a >= start - 1 and b > a for a, b in offsets]
        marked[row, first:] = torch.tensor(inside)
    return {"input_ids": ids, "attention_mask": mask}, marked


def _mean_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The authors' divergence, half the means over the vocabulary of KL(M || p) and KL(M || q): `[R, V]` to `[R]`."""
    middle = 0.5 * (log_p.exp() + log_q.exp())
    return torch.where(middle > 0, middle * (middle.log() - 0.5 * (log_p + log_q)), 0.0).mean(-1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS(p, q) in nats, `[..., V]` log-probs to `[...]`."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def to_middle(log_r: Tensor) -> Tensor:
        return torch.where(log_r == -torch.inf, 0.0, log_r.exp() * (log_r - log_m)).sum(-1)

    return 0.5 * (to_middle(log_p) + to_middle(log_q))


def _final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head."""
    body: Any = unwrap(model)
    body = getattr(body, "base_model", body)
    for owner in (body, getattr(body, "decoder", None), getattr(body, "language_model", None)):
        for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f"):
            found = getattr(owner, name, None)
            if isinstance(found, nn.Module):
                return found
    raise ValueError(f"the final norm of {type(unwrap(model)).__name__} was not found: pass final_norm=")
