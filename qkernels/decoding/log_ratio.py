"""The log-ratio of two other models in each next token: proxy tuning, guidance by the implicit reward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from .auxiliary import Auxiliary, PromptProcessor, finite, normalised, special_tokens


def _log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The difference of two rows of logits. 0 where the denominator forbids a token: its log-prob is outside of what
    the reward is defined on, whatever the numerator says of it."""
    return torch.where(denominator == -torch.inf, 0.0, numerator - denominator)


class _LogRatioProcessor(PromptProcessor):
    """scores + scale * (log of one model - log of another), normalised."""

    def __init__(
        self,
        scale: float,
        numerator: Auxiliary | None,
        denominator: Auxiliary | None,
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
        super().__init__(attention_mask, *special_tokens(some.model))

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
            result = normalised(tuned)
            self._observe(result, sides[1])
            return result

    def _observe(self, result: Tensor, denominator: Tensor) -> None:
        """What a subclass wants to know of a step: log-probs of the result, logits of the denominator, `[R, V]`."""

    def _fit(self, logits: Tensor, model: Auxiliary, vocab: int) -> Tensor:
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
            finite(gamma, "gamma"),
            Auxiliary(proxy, "proxy", use_cache),
            Auxiliary(reference, "reference", use_cache, adapter_off),
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
            finite(weight, "weight") * checks.positive(beta, "beta"),
            None if policy is None else Auxiliary(policy, "policy", use_cache),
            None if reference is None else Auxiliary(reference, "reference", use_cache, adapter_off),
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
        terms = result.exp() * (result - normalised(denominator))
        self.divergences.append(torch.where(result == -torch.inf, 0.0, terms).sum(-1))
