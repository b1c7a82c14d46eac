"""Logits processors for transformers' `generate`: other models, or the prompt itself, take part in each next token.

    ProxyTuning             pi ~ pi_base (pi_proxy / pi_ref)^gamma            "From r to Q*", eq. 14
    ImplicitRewardGuidance  pi ~ pi_base exp(weight * beta log(pi / pi_ref))   the implicit reward (11) as guidance
    CopyMixture             (1 - c) pi_base + c * attention to the prompt      LargePiG (Sun et al. 2024)

They work with greedy search, sampling and beams, in batches padded on the left. `generate` calls a processor with the
token ids of each row and the generating model's scores, and says nothing of how beams were reordered since the last
call. An auxiliary model with a KV cache therefore looks its rows up by content: two rows of the same ids and the same
padding have the same cache, so each new row takes over the cache of a row that was its prefix, whichever row that was.
Where there is none (a new prompt, a cache that cannot be reordered) everything is computed again, so the results never
depend on the cache; `use_cache=False` always computes again.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from .core import checks
from .functional.logits import token_stats
from .integrations.transformers import head_parameters, unwrap
from .text.padding import left_padding


class _Step(NamedTuple):
    """What an auxiliary model says of the next token: logits fp32 `[R, V]`, and for those who asked, per layer the
    hidden state of the last token `[R, H]`, and the last layer's attention of the last token, fp32 `[R, heads, L]`."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    attention: Tensor | None = None


class _Auxiliary:
    """A model that follows the rows of a generation, with a KV cache of its own."""

    def __init__(self, model: nn.Module, name: str, use_cache: bool, adapter_off: bool = False, inside: bool = False):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        causal = unwrap(model)
        if getattr(getattr(causal, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{name} is an encoder-decoder; expected a causal language model")
        if adapter_off and not callable(getattr(model, "disable_adapter", None)):
            raise ValueError(f"adapter_off=True, but {name} is no PEFT model whose adapter could be switched off")
        self.model, self.name, self.adapter_off, self.inside = model, name, adapter_off, inside
        self.use_cache = use_cache
        parameters = inspect.signature(type(causal).forward).parameters
        self._takes = set(parameters)
        self._cache: Any = None
        self._rows: Tensor | None = None  # (rows, length): 2 * id + attended, the rows of the last call

    def reset(self) -> None:
        """Forget all rows."""
        self._cache = self._rows = None

    def next(self, ids: Tensor, mask: Tensor) -> _Step:
        """The model's view of the token after each row. ids, mask: int64 `[R, L]`."""
        if self.model.training:
            raise ValueError(
                f"{self.name} is in training mode, in which dropout changes its log-probs: call its .eval() first"
            )
        rows = 2 * ids + mask
        earlier = self.find(rows)
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
            step = _Step(
                step.logits[place],
                tuple(state[place] for state in step.hidden),
                None if step.attention is None else step.attention[place],
            )
            if self._cache is not None:
                self._cache.reorder_cache(place)
        self._rows = rows
        return step

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def find(self, rows: Tensor) -> Tensor | None:
        """For each row, which row of the last call was its prefix, `[R]`; None unless all have one."""
        known = self._rows
        if known is None or known.shape[1] + 1 != rows.shape[1]:
            return None
        prefixes = rows[:, :-1]
        if torch.equal(prefixes, known):
            return torch.arange(len(rows), device=rows.device)
        _, kind = torch.unique(torch.cat([known, prefixes]), dim=0, return_inverse=True)
        same = kind[len(known) :, None] == kind[None, : len(known)]
        return same.int().argmax(1) if bool(same.any(1).all()) else None

    def _forward(self, ids: Tensor, mask: Tensor, new: int) -> _Step:
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
        if self.inside:
            inputs.update(output_hidden_states=True, output_attentions=True)
        off: Any = self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext()  # type: ignore[operator]
        with torch.no_grad(), off:
            outputs = self.model(**inputs)
        cache = getattr(outputs, "past_key_values", None) if self.use_cache else None
        self._cache = cache if hasattr(cache, "reorder_cache") else None
        logits = outputs.logits[:, -1].float()
        if not self.inside:
            return _Step(logits)
        attentions = getattr(outputs, "attentions", None)
        if not attentions or attentions[-1] is None:
            raise ValueError(
                f"{self.name} returns no attention weights: load it with attn_implementation='eager', or call"
                " model.set_attn_implementation('eager')"
            )
        hidden = tuple(state[:, -1] for state in outputs.hidden_states)
        return _Step(logits, hidden, attentions[-1][:, :, -1].float())


class _PromptProcessor(LogitsProcessor):
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


def _special_tokens(model: nn.Module) -> tuple[list[int], list[int]]:
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


def _normalised(logits: Tensor) -> Tensor:
    """log softmax of fp32 `[R, V]`, its log-sum-exps of all rows in one pass of the fused kernels."""
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    lse = token_stats(logits, labels, outputs=("logsumexp",)).logsumexp
    assert lse is not None
    return logits - lse[:, None]


def _log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The difference of two rows of logits. 0 where the denominator forbids a token: its log-prob is outside of what
    the reward is defined on, whatever the numerator says of it."""
    return torch.where(denominator == -torch.inf, 0.0, numerator - denominator)


class _LogRatioProcessor(_PromptProcessor):
    """scores + scale * (log of one model - log of another), normalised."""

    def __init__(
        self,
        scale: float,
        numerator: _Auxiliary | None,
        denominator: _Auxiliary | None,
        plausibility: float,
        shared_vocab: int | None,
        attention_mask: Tensor | None,
    ):
        if isinstance(plausibility, bool) or not isinstance(plausibility, (int, float)):
            raise TypeError(f"plausibility must be a number, got {type(plausibility).__name__}")
        if not 0 <= plausibility <= 1:
            raise ValueError(f"plausibility must lie in [0, 1], got {plausibility}")
        if shared_vocab is not None and (isinstance(shared_vocab, bool) or not isinstance(shared_vocab, int)):
            raise TypeError(f"shared_vocab must be an int or None, got {type(shared_vocab).__name__}")
        self.scale, self._numerator, self._denominator = scale, numerator, denominator
        self.plausibility, self.shared_vocab = float(plausibility), shared_vocab
        some = numerator or denominator
        assert some is not None
        super().__init__(attention_mask, *_special_tokens(some.model))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The log-probs `[R, V]` of the combined distribution.

        Args:
            input_ids: int64 `[R, L]`, prompt and tokens so far.
            scores: `[R, V]`, logits or log-probs of the generating model.
        """
        with torch.no_grad():
            mask = self._mask(input_ids)
            vocab = scores.shape[-1]
            scores = scores.float()
            own = scores
            sides = [
                own if model is None else self._fit(model.next(input_ids, mask).logits.to(scores.device), model, vocab)
                for model in (self._numerator, self._denominator)
            ]
            tuned = scores + self.scale * _log_ratio(*sides)
            # -inf + inf cannot come about: what the generating model (or a processor before) forbids stays forbidden.
            tuned = torch.where(scores == -torch.inf, scores, tuned)
            if self.shared_vocab is not None:
                tuned[:, self.shared_vocab :] = -torch.inf
            if self.plausibility > 0:
                least = scores.amax(-1, keepdim=True) + math.log(self.plausibility)
                tuned = tuned.masked_fill(scores < least, -torch.inf)
            result = _normalised(tuned)
            self._observe(result, sides[1])
            return result

    def _observe(self, result: Tensor, denominator: Tensor) -> None:
        """What a subclass wants to know of a step: log-probs of the result, logits of the denominator, `[R, V]`."""

    def _fit(self, logits: Tensor, model: _Auxiliary, vocab: int) -> Tensor:
        """Cut or fill logits to the generating model's vocabulary, as `shared_vocab` allows."""
        if self.shared_vocab is not None:
            if not 0 < self.shared_vocab <= min(vocab, logits.shape[-1]):
                raise ValueError(
                    f"shared_vocab must lie in [1, {min(vocab, logits.shape[-1])}], got {self.shared_vocab}"
                )
            return torch.nn.functional.pad(logits[:, : self.shared_vocab], (0, vocab - self.shared_vocab))
        if logits.shape[-1] != vocab:
            raise ValueError(
                f"{model.name} has V = {logits.shape[-1]} and the generating model V = {vocab}: they must share the"
                " vocabulary. If only their tables are padded to different sizes, pass shared_vocab=len(tokenizer)"
            )
        return logits

    def reset(self) -> None:
        for model in (self._numerator, self._denominator):
            if model is not None:
                model.reset()


class ProxyTuning(_LogRatioProcessor):
    """Decoding-time tuning ("From r to Q*", eq. 14): pi ~ pi_base (pi_proxy / pi_ref)^gamma.

    The generating model (pi_base, large, say) behaves as if it had been trained as the small proxy was from its
    reference: the proxy's implicit reward is added to its log-probs. gamma = 1 is the case of the works that (14)
    generalises (emulated fine-tuning, proxy tuning); gamma above 1 goes further than the proxy's training did.

    Use: `base.generate(..., logits_processor=LogitsProcessorList([ProxyTuning(proxy, reference)]))`; the result is
    normalised log-probs, so beam search ranks by the tuned likelihood. Temperature, top-k and the like come after it.

    Args:
        proxy, reference: causal language models in eval mode, with the generating model's tokens; on any device.
        gamma: any finite number.
        adapter_off: `reference` is a PEFT model (the proxy itself, usually): switch its adapter off while it is asked.
        plausibility: tokens below this share of the base's likeliest token are forbidden; 0 for none. Log-ratios of
            tokens that no model expects are noise, which a large gamma amplifies; contrastive decoding takes 0.1.
        shared_vocab: ids below it mean the same to all models, those from it on to none; needed where embedding tables
            are padded to different sizes.
        use_cache: keep KV caches of proxy and reference.
        attention_mask: `[B, P]` of the prompts; see `for_prompt`.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range. When called: models in training mode, of
            different vocabularies, a mask of another batch, padding that cannot be told.
    """

    def __init__(
        self,
        proxy: nn.Module,
        reference: nn.Module,
        gamma: float = 1.0,
        *,
        adapter_off: bool = False,
        plausibility: float = 0.0,
        shared_vocab: int | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
    ):
        super().__init__(
            _finite(gamma, "gamma"),
            _Auxiliary(proxy, "proxy", use_cache),
            _Auxiliary(reference, "reference", use_cache, adapter_off),
            plausibility,
            shared_vocab,
            attention_mask,
        )


class ImplicitRewardGuidance(_LogRatioProcessor):
    """Guide a model by the implicit reward r = beta log(pi / pi_ref): pi_out ~ pi_base exp(weight * r) at each token.

    1 / weight stands for the strength of the KL constraint to the base. Leave `policy` or `reference` out
    where the generating model plays that part:

        base = reference: weight = 1 / beta gives the policy itself, less goes part of the way, more beyond it. This
            approximates the policy that DPO with beta' = 1 / weight would have given, as decoding-time realignment
            does; it is that policy for completions of one token alone, because a product of mixtures that are
            normalised at each token is not the mixture of whole completions.
        base = policy: weight adds to what training did; pi ~ pi (pi / pi_ref)^(weight * beta)

    Args:
        policy: trained with preferences, in eval mode; None for the generating model.
        reference: that its training started from, in eval mode; None for the generating model.
        weight: of the reward; any finite number.
        beta: that the policy was trained with.
        adapter_off, plausibility, shared_vocab, use_cache, attention_mask: as in `ProxyTuning`.

    Raises:
        As `ProxyTuning`; ValueError if both models are left out.
    """

    def __init__(
        self,
        policy: nn.Module | None = None,
        reference: nn.Module | None = None,
        *,
        weight: float,
        beta: float = 0.1,
        adapter_off: bool = False,
        plausibility: float = 0.0,
        shared_vocab: int | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
    ):
        if policy is None and reference is None:
            raise ValueError("give a policy, a reference or both: the generating model cannot be both")
        if adapter_off and reference is None:
            raise ValueError("adapter_off is about the reference, and there is none")
        super().__init__(
            _finite(weight, "weight") * checks.positive(beta, "beta"),
            None if policy is None else _Auxiliary(policy, "policy", use_cache),
            None if reference is None else _Auxiliary(reference, "reference", use_cache, adapter_off),
            plausibility,
            shared_vocab,
            attention_mask,
        )


class MeasuredGuidance(ImplicitRewardGuidance):
    """`ImplicitRewardGuidance` that keeps the divergence of what it makes from the reference, for each step and row.

    `divergences` has a tensor `[R]` for each step since the last `reset`: KL(result || reference) of the next token, in
    nats. Their sum over the tokens of a sampled completion is an unbiased estimate of the divergence of whole
    completions, with less variance than the log-ratio of the completion. Arguments as in `ImplicitRewardGuidance`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.divergences: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.divergences = []

    def _observe(self, result: Tensor, denominator: Tensor) -> None:
        terms = result.exp() * (result - _normalised(denominator))
        self.divergences.append(torch.where(result == -torch.inf, 0.0, terms).sum(-1))


class CopyMixture(_PromptProcessor):
    """LargePiG (Sun et al. 2024): a language model as a pointer-generator, without training.

    P = c * ptr + (1 - c) * softmax(scores). ptr is the last layer's attention of the last token over the source, mean
    over heads, normalised to 1 and added up by token id; c = clamp(scale * max_j JS(p, p_j), 0, 1/2), with p the
    model's next-token distribution, p_j the one read off its layer j by the final norm and the head, and JS the
    Jensen-Shannon divergence in nats (at most ln 2). The authors' code leaves ptr below 1 by the attention outside the
    source, and has a divergence by another scale: KL(M || p) + KL(M || p_j) divided by twice the vocabulary's size,
    with scale 100.

    The attention weights come from a forward of its own (with a KV cache of its own), so a token takes twice the work.
    What earlier processors forbid stays forbidden.

    Args:
        model: the generating model, in eval mode, with attn_implementation="eager".
        source_mask: bool `[B, P]`, the tokens of the prompts that may be copied; None for all but padding, begin and
            end tokens.
        scale: of the divergence; 0 or more.
        layers: whose distributions are compared with the last one's, from 0 (the embeddings) to the number of layers
            less 1; None for the upper half.
        final_norm: the module before the head; None to look for it.
        use_cache, attention_mask: as in `ProxyTuning`.

    Attributes:
        copy_probabilities: `[R]`, c of each row at the last call.

    Raises:
        As `ProxyTuning`; ValueError for a model without attention weights or whose final norm is not found, and for
        layers or masks that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        source_mask: Tensor | None = None,
        *,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        final_norm: nn.Module | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
    ):
        self._auxiliary = _Auxiliary(model, "model", use_cache, inside=True)
        self._prompt_length: int | None = None
        super().__init__(attention_mask, *_special_tokens(model))
        if not _finite(scale, "scale") >= 0:
            raise ValueError(f"scale must be 0 or more, got {scale}")
        if source_mask is not None:
            source_mask = checks.tensor(source_mask, "source_mask")
            if source_mask.dim() != 2 or source_mask.dtype not in (torch.bool, torch.int64):
                raise ValueError(f"source_mask must be bool [B, P], got {source_mask.dtype} {tuple(source_mask.shape)}")
        self.scale = float(scale)
        self._source_mask = source_mask
        self._norm = _final_norm(model) if final_norm is None else final_norm
        count = int(unwrap(model).config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]
        self.layers = list(range(count // 2, count)) if layers is None else [int(layer) for layer in layers]
        if not self.layers or not all(0 <= layer < count for layer in self.layers):
            raise ValueError(f"layers must name some of 0 to {count - 1}, got {self.layers}")
        self.copy_probabilities: Tensor | None = None
        self._checked = False

    def for_prompt(self, attention_mask: Tensor | None) -> None:
        super().for_prompt(attention_mask)
        self._prompt_length = None if self._attention_mask is None else self._attention_mask.shape[1]

    def reset(self) -> None:
        self._auxiliary.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The log-probs `[R, V]` of the mixture; arguments as in `ProxyTuning`."""
        with torch.no_grad():
            mask = self._mask(input_ids)
            source = self._source(input_ids, mask)
            step = self._auxiliary.next(input_ids, mask)
            if step.logits.shape[-1] != scores.shape[-1]:
                raise ValueError(f"model has V = {step.logits.shape[-1]}, the generating model V = {scores.shape[-1]}")
            head = head_parameters(self._auxiliary.model)

            def read_off(hidden: Tensor) -> Tensor:
                logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
                logits = logits * head.logit_scale
                return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

            if not self._checked:
                # hidden_states[-1] is after the norm in transformers; if a model does otherwise, it shows here.
                if not torch.allclose(read_off(step.hidden[-1]), step.logits, rtol=2e-2, atol=2e-2):
                    raise ValueError(
                        "the model's last hidden state does not give its logits by the head alone; layers cannot be"
                        " read off"
                    )
                self._checked = True
            log_last = _normalised(step.logits)
            divergences = [
                _jensen_shannon(log_last, _normalised(read_off(self._norm(step.hidden[layer]))))
                for layer in self.layers
            ]
            copy = (self.scale * torch.stack(divergences).amax(0)).clamp(0, 0.5).to(scores.device)

            assert step.attention is not None
            weight = step.attention.mean(1).to(scores.device)[:, : source.shape[1]] * source
            total = weight.sum(1, keepdim=True)
            copy = torch.where(total[:, 0] > 0, copy, 0.0)
            weight = weight / torch.where(total > 0, total, 1.0)
            pointer = torch.zeros_like(scores, dtype=torch.float32)
            pointer.scatter_add_(1, input_ids[:, : source.shape[1]], weight)
            self.copy_probabilities = copy
            mixed = torch.logaddexp(
                _normalised(scores.float()) + torch.log1p(-copy)[:, None], pointer.log() + copy.log()[:, None]
            )
            return _normalised(torch.where(scores == -torch.inf, -torch.inf, mixed))

    def _source(self, ids: Tensor, mask: Tensor) -> Tensor:
        """float `[R, P]`: 1 where the prompt may be copied from."""
        given = self._source_mask
        if given is not None:
            if len(ids) % len(given) or ids.shape[1] < given.shape[1]:
                raise ValueError(
                    f"source_mask {tuple(given.shape)} is of another batch than the {tuple(ids.shape)} token ids that"
                    " generate works on"
                )
            source = given.to(ids.device).repeat_interleave(len(ids) // len(given), 0) != 0
        else:
            length = self._prompt_length
            given_mask = self._attention_mask is not None
            # Rows that do not continue those of the last call are a new prompt.
            if not given_mask and (length is None or self._auxiliary.find(2 * ids + mask) is None):
                length = self._prompt_length = ids.shape[1]
            assert length is not None
            special = torch.tensor([*self._pads, *self._special], dtype=torch.int64, device=ids.device)
            source = ~torch.isin(ids[:, :length], special)
        return (source & (mask[:, : source.shape[1]] != 0)).float()


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS(p, q) in nats, `[R, V]` log-probs to `[R]`."""
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


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
