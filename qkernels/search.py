"""Likelihood search on a policy trained with preferences, which is planning with its value function; what it found.

"From r to Q*", eqs. 12 and 13: the sequence that maximises K steps of reward and reference log-prob plus the value of
the state they lead to is the one that maximises -V(s_0) + sum beta log pi. So a beam search by the sum of log-probs,
without a length penalty, is a search with rewards and a value function, of which no model other than the policy has to
be asked. `beam_search` runs it through transformers' own `generate` and returns beside every beam its log-probs, its
values and, given the reference, its implicit rewards. Ways to change what is searched or sampled are in
`qkernels.decoding`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .core import checks
from .core.sequences import log_ratios
from .functional.results import summarised
from .integrations.transformers import compute_token_stats, unwrap

# What keeps `generate` to the policy's own distribution, whatever the model's generation_config says, unless the caller
# does: the sum of log-probs as the score, and no processors that change it.
_PLAIN = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_PLAIN_BEAMS = {"length_penalty": 0.0, "early_stopping": "never"}
_PLAIN_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
# generate scores a beam that does not exist with -1e9 or less.
_NO_BEAM = -1e8


class ScoredSequences(NamedTuple):
    """Completions and their numbers, `[S, T]` per token with 0 outside the completion, `[S]` per sequence.

    token_logps: log pi(token), nats.
    token_values: V = beta * logsumexp of the state before the token (6), in units of reward.
    reference_token_logps: log pi_ref(token); None without a reference.
    token_rewards: beta * (log pi - log pi_ref), the implicit reward (11); None without a reference.
    logps: sum of token_logps.
    rewards: sum of token_rewards; None without a reference.
    """

    token_logps: Tensor
    token_values: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logps: Tensor
    rewards: Tensor | None

    def __repr__(self) -> str:
        return summarised(self)


class Beams(NamedTuple):
    """What a search found: K sequences for each of B prompts, best first (as drawn, when sampling).

    sequences: int64 `[B, K, P + T]`, the prompt with its padding and the completion.
    completions: int64 `[B, K, T]`; the pad token after the end.
    completion_mask: bool `[B, K, T]`, the tokens of the completion, its end token included.
    finished: bool `[B, K]`, whether it ends with an end token, and not for want of room.
    scores: fp32 `[B, K]`, what generate ranked by: the sum of the log-probs after all logits processors, divided as the
        length penalty says (none by default). Without beams the same as `logps`. -inf for a beam that does not exist,
        because there are fewer sequences than beams; its mask is empty.
    token_logps, token_values, reference_token_logps, token_rewards: `[B, K, T]`, as in `ScoredSequences`.
    logps, rewards: `[B, K]`, their sums: log pi and the implicit reward of the completion.
    beta: that rewards and values were made with.
    """

    sequences: Tensor
    completions: Tensor
    completion_mask: Tensor
    finished: Tensor
    scores: Tensor
    token_logps: Tensor
    token_values: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logps: Tensor
    rewards: Tensor | None
    beta: float

    @property
    def plan_values(self) -> Tensor:
        """`[B, K]`, V(s_0) + beta log pi: the value of the completion as a plan (12, 13), in units of reward."""
        return self.token_values[..., 0] + self.beta * self.logps

    @property
    def lengths(self) -> Tensor:
        """int64 `[B, K]`, tokens of the completion."""
        return self.completion_mask.sum(-1)

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The completions as text, special tokens left out: for each of B prompts a list of K."""
        return [tokenizer.batch_decode(beams, skip_special_tokens=True) for beams in self.completions]

    def __repr__(self) -> str:
        return summarised(self)


def beam_search(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    reference_model: nn.Module | None = None,
    beta: float = 0.1,
    num_beams: int = 5,
    num_return_sequences: int | None = None,
    max_new_tokens: int = 128,
    logits_processor: Sequence[Any] | None = None,
    batch_size: int = 16,
    **generate_kwargs: Any,
) -> Beams:
    """Search the likeliest completions under a policy, and say what they are worth to it. No gradients.

    One call of `model.generate`, then one teacher-forced forward of policy and reference over what came out, in
    `batch_size` sequences at a time, through `qkernels.integrations.transformers` (no logits are stored). Rewards and
    values are therefore those of the models themselves, whatever processors took part in the search. In 16 bits they
    may differ from the search's own scores by the rounding of two ways to compute the same thing.

    Args:
        model: a causal language model of transformers with `generate`, in eval mode: the policy.
        input_ids: int64 `[B, P]`, prompts, padded on the left; or what a tokenizer returns, with the mask in it.
        attention_mask: `[B, P]`, 0 at padding; None if there is none.
        reference_model: the frozen reference the policy was trained from, for the implicit rewards; `model` itself if
            it is a PEFT model, whose adapter is then switched off; None to do without.
        beta: strength of the KL constraint the policy was trained with; the unit of values and rewards.
        num_beams: width of the search; 1 is greedy.
        num_return_sequences: K; num_beams by default.
        max_new_tokens: longest completion.
        logits_processor: transformers' or `qkernels.decoding`'s; the latter are told the attention mask.
        batch_size: sequences per scoring forward.
        generate_kwargs: anything else that `generate` takes. Unless given here, `do_sample=False`, `length_penalty=0`,
            `early_stopping="never"` and no repetition penalty hold whatever the model's generation_config says; with
            `do_sample=True`, temperature 1 and no truncation.

    Returns:
        `Beams`, on the device of `input_ids`.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or option; a model in training mode, without `generate`, or with a
            head that is not known (`qkernels.integrations.transformers`); padding on the right.
    """
    prompts: Any = input_ids
    if isinstance(prompts, Mapping) and attention_mask is None:  # what a tokenizer returns
        prompts, attention_mask = prompts.get("input_ids"), prompts.get("attention_mask")
    input_ids, attention_mask = _prompts(prompts, attention_mask)
    beta = checks.positive(beta, "beta")
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        _at_least_one(value, name)
    if num_return_sequences is None:
        num_return_sequences = num_beams
    _at_least_one(num_return_sequences, "num_return_sequences")
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise TypeError(f"{type(model).__name__} has no generate(); expected a causal language model of transformers")
    for name, module in (("model", model), ("reference_model", reference_model)):
        if module is not None and module.training:
            raise ValueError(f"{name} is in training mode, in which dropout changes its log-probs: call {name}.eval()")
    for name in ("return_dict_in_generate", "output_scores", "generation_config"):
        if name in generate_kwargs:
            raise ValueError(f"{name} is beam_search's own; give generation options as keywords")
    kwargs: dict[str, Any] = {**_PLAIN, **(_PLAIN_BEAMS if num_beams > 1 else {})}
    if generate_kwargs.get("do_sample"):
        kwargs.update(_PLAIN_SAMPLING)
    kwargs.update(generate_kwargs)
    if logits_processor is not None:
        for processor in logits_processor:
            if hasattr(processor, "for_prompt"):
                processor.for_prompt(attention_mask)
        kwargs["logits_processor"] = _processor_list(logits_processor)
    with torch.no_grad():
        output = generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_scores=num_beams > 1,
            **kwargs,
        )
    prompt_length = input_ids.shape[1]
    sequences = output.sequences
    completions = sequences[:, prompt_length:]
    mask, finished = _completion_mask(output, completions, model, kwargs)
    exists = torch.ones(len(sequences), dtype=torch.bool, device=sequences.device)
    if num_beams > 1:
        exists = output.sequences_scores > _NO_BEAM
        mask &= exists[:, None]
    attended = torch.cat([attention_mask.repeat_interleave(num_return_sequences, 0), mask.long()], 1)
    scored = score_completions(
        model, sequences, attended, mask, reference_model=reference_model, beta=beta, batch_size=batch_size
    )
    logps = scored.logps.masked_fill(~exists, -torch.inf)
    shape = (len(input_ids), num_return_sequences)

    def shaped(value: Tensor) -> Tensor:
        return value.unflatten(0, shape)

    def optional(value: Tensor | None) -> Tensor | None:
        return None if value is None else shaped(value)

    return Beams(
        sequences=shaped(sequences),
        completions=shaped(completions),
        completion_mask=shaped(mask),
        finished=shaped(finished & exists),
        scores=shaped(output.sequences_scores.masked_fill(~exists, -torch.inf) if num_beams > 1 else logps),
        token_logps=shaped(scored.token_logps),
        token_values=shaped(scored.token_values),
        reference_token_logps=optional(scored.reference_token_logps),
        token_rewards=optional(scored.token_rewards),
        logps=shaped(logps),
        rewards=optional(scored.rewards),
        beta=beta,
    )


def score_completions(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    reference_model: nn.Module | None = None,
    beta: float = 0.1,
    batch_size: int = 16,
) -> ScoredSequences:
    """Log-probs, values and implicit rewards of completions that are at hand, however they were made. No gradients.

    Args:
        model, reference_model, beta, batch_size: as in `beam_search`.
        sequences: int64 `[S, L]`, prompt and completion; padding anywhere that `attention_mask` says.
        attention_mask: `[S, L]`, 0 at padding.
        completion_mask: bool `[S, T]` over the last T tokens: those to be scored.

    Returns:
        `ScoredSequences`, `[S, T]` and `[S]`, fp32, on the device of `sequences`.

    Raises:
        As `beam_search`.
    """
    beta = checks.positive(beta, "beta")
    _at_least_one(batch_size, "batch_size")
    sequences = checks.tensor(sequences, "sequences")
    if sequences.dim() != 2 or sequences.dtype != torch.int64:
        raise ValueError(f"sequences must be int64 [S, L], got {sequences.dtype} {tuple(sequences.shape)}")
    attention_mask = checks.tensor(attention_mask, "attention_mask").to(sequences.device)
    if attention_mask.shape != sequences.shape:
        raise ValueError(
            f"attention_mask must have the shape of sequences, {tuple(sequences.shape)}, got"
            f" {tuple(attention_mask.shape)}"
        )
    completion_mask = checks.tensor(completion_mask, "completion_mask")
    length = completion_mask.shape[-1]
    if completion_mask.dim() != 2 or len(completion_mask) != len(sequences) or length >= sequences.shape[1]:
        raise ValueError(
            f"completion_mask must have shape [S, T] with S = {len(sequences)} and T below L = {sequences.shape[1]} (a"
            f" completion has a prompt), got {tuple(completion_mask.shape)}"
        )
    completion_mask = completion_mask.to(sequences.device) != 0
    labels = sequences.new_full(sequences.shape, -100)
    if length:
        labels[:, -length:] = sequences[:, -length:].masked_fill(~completion_mask, -100)
    names = ("logps", "logsumexp", *(("reference_logps",) if reference_model is not None else ()))
    parts: list[list[Tensor]] = [[] for _ in names]
    # Positions count tokens and not padding, as `generate` has them.
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(type(unwrap(model)).forward).parameters
    with torch.no_grad():
        for rows in torch.arange(len(sequences)).split(batch_size):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            # Columns that are padding in all of these rows are not computed.
            used = attention_mask[span].any(0)
            batch = {"input_ids": sequences[span][:, used], "attention_mask": attention_mask[span][:, used]}
            if takes_positions:
                batch["position_ids"] = positions[span][:, used]
            stats = compute_token_stats(
                model,
                _to_model(batch, model),
                outputs=names,
                labels=_to_model({"labels": labels[span][:, used]}, model)["labels"],
                reference_model=reference_model,
            )
            for part, name in zip(parts, names, strict=True):
                # Entry t of the statistics belongs to token t + 1.
                aligned = torch.nn.functional.pad(getattr(stats, name)[:, :-1].to(sequences.device), (1, 0))
                whole = aligned.new_zeros(len(rows), sequences.shape[1])
                whole[:, used] = aligned
                part.append(whole[:, sequences.shape[1] - length :])
    empty = torch.zeros(0, length, device=sequences.device)
    logps, logsumexp, *reference = (torch.cat(part) if part else empty for part in parts)
    values = beta * logsumexp * completion_mask
    if not reference:
        return ScoredSequences(logps, values, None, None, _sums(logps), None)
    rewards = beta * log_ratios(logps, reference[0])
    return ScoredSequences(logps, values, reference[0], rewards, _sums(logps), _sums(rewards))


def _sums(tokens: Tensor) -> Tensor:
    return tokens.double().sum(1).to(tokens.dtype)


def _to_model(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _processor_list(processors: Sequence[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


def _completion_mask(output: Any, completions: Tensor, model: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which of `[S, T]` are tokens of the completion, and whether an end token is among them, `[S]`."""

    def token_ids(name: str) -> Tensor:
        value = kwargs.get(name)
        value = getattr(model.generation_config, name) if value is None else value
        return torch.as_tensor([] if value is None else value, dtype=torch.int64).reshape(-1).to(completions.device)

    is_end = torch.isin(completions, token_ids("eos_token_id"))
    beam_indices = getattr(output, "beam_indices", None)
    if beam_indices is not None:  # -1 after the last token of a beam
        mask = beam_indices >= 0
        return mask, (is_end & mask).any(1)
    mask = (is_end.long().cumsum(1) - is_end.long()) == 0  # up to and including the first end token
    if any(kwargs.get(name) is not None for name in ("stop_strings", "stopping_criteria", "max_time")):
        # Sequences that something else than an end token has stopped go on in padding.
        is_pad = torch.isin(completions, token_ids("pad_token_id")) & ~is_end
        mask &= is_pad.flip(1).long().cumprod(1).flip(1) == 0
    return mask, is_end.any(1)


def _prompts(input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Checked prompts and their mask, int64 `[B, P]`."""
    input_ids = checks.tensor(input_ids, "input_ids")
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids must be int64, got {input_ids.dtype}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape [B, P] and hold a prompt, got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    attention_mask = left_padding(attention_mask).to(input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got"
            f" {tuple(attention_mask.shape)}"
        )
    return input_ids, attention_mask


def left_padding(attention_mask: Any) -> Tensor:
    """An attention mask `[B, P]` of prompts that are padded on the left, checked, as int64."""
    attention_mask = checks.tensor(attention_mask, "attention_mask")
    if attention_mask.dim() != 2 or 0 in attention_mask.shape:
        raise ValueError(f"attention_mask must have shape [B, P], got {tuple(attention_mask.shape)}")
    attended = attention_mask != 0
    if bool((attended[:, 1:] < attended[:, :-1]).any()) or not bool(attended[:, -1].all()):
        raise ValueError("attention_mask: prompts must be padded on the left (padding_side='left'), and not be empty")
    return attended.long()


def _at_least_one(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
