"""From preference pairs to token ids: truncation, which tokens are planted errors, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..credit import overlapping
from ..data import Preference
from ..functional.logits import shift_labels
from ..text.between import Between, first, interleaved, separated
from ..text.lengths import kept_lengths
from .tokenizer import END, encode_prompts, encode_texts, encode_turns, token_id

IGNORE = -100


class EncodedPair(NamedTuple):
    """Token ids of one pair.

    prompt: ends with the role token of the answer.
    chosen, rejected: end with the end token, unless they were cut.
    planted: for each token of `rejected`, whether it overlaps a planted error.
    source: index of the pair in the list that was encoded.
    chosen_between, rejected_between: of answers of several turns, what was said to the assistant between them: tokens
        that are read and neither trained nor scored.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    planted: list[bool]
    source: int
    chosen_between: Between = ()
    rejected_between: Between = ()

    @property
    def answers(self) -> tuple[tuple[list[int], Between], tuple[list[int], Between]]:
        """Both answers, each with what stands between its tokens."""
        return (self.chosen, self.chosen_between), (self.rejected, self.rejected_between)

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + self.longest_answer

    @property
    def longest_answer(self) -> int:
        """Tokens of the longer of the two answers."""
        return max(len(ids) + sum(len(group) for _, group in between) for ids, between in self.answers)


class Truncation(NamedTuple):
    """What did not fit: how many prompts lost their beginning and answers their end, and how many pairs were dropped
    because their answers agree up to the cut."""

    prompts: int = 0
    answers: int = 0
    dropped: int = 0


def encode(pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
    """Tokenise pairs, whole."""
    end = token_id(tokenizer, END)
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in pairs])
    all_chosen = encode_texts(tokenizer, [pair.chosen for pair in pairs])
    all_rejected = encode_texts(tokenizer, [pair.rejected for pair in pairs])
    encoded = []
    for source, (pair, prompt, chosen, rejected) in enumerate(
        zip(pairs, prompts, all_chosen, all_rejected, strict=True)
    ):
        if pair.chosen_turns:
            (better, before_better), (worse, before_worse) = (
                separated(*encode_turns(tokenizer, pair.turns(side))) for side in ("chosen", "rejected")
            )
            planted = [False] * len(worse)
            encoded.append(EncodedPair(prompt, better, worse, planted, source, before_better, before_worse))
            continue
        planted = overlapping(rejected.offsets, pair.planted)
        encoded.append(EncodedPair(prompt, [*chosen.ids, end], [*rejected.ids, end], [*planted, False], source))
    return encoded


def truncate(pairs: Sequence[EncodedPair], max_length: int) -> tuple[list[EncodedPair], Truncation]:
    """Cut pairs to `max_length` tokens, prompt and answer together.

    A prompt is cut from the left, an answer from the right. The answers come first: a prompt keeps what they leave,
    but never less than a quarter of the room.
    """
    kept, prompts, answers = [], 0, 0
    for pair in pairs:
        for_prompt, _ = kept_lengths(pair.longest_answer, max_length)
        prompt = pair.prompt[-for_prompt:]
        room = max_length - len(prompt)
        prompts += len(prompt) < len(pair.prompt)
        (chosen, before_chosen), (rejected, before_rejected) = (
            _first(ids, between, room) for ids, between in pair.answers
        )
        answers += (len(chosen) < len(pair.chosen)) + (len(rejected) < len(pair.rejected))
        if (chosen, before_chosen) != (rejected, before_rejected) and chosen and rejected:
            planted = pair.planted[: len(rejected)]
            kept.append(EncodedPair(prompt, chosen, rejected, planted, pair.source, before_chosen, before_rejected))
    return kept, Truncation(prompts, answers, len(pairs) - len(kept))


def _first(ids: list[int], between: Between, room: int) -> tuple[list[int], Between]:
    count, kept = first(ids, between, room)
    return ids[:count], kept


class TokenBatch(NamedTuple):
    """Padded sequences, on the right.

    input_ids: int64 `[S, T]`. No attention mask goes with it: under a causal model nothing looks at padding that
        comes after it, and the labels leave the padding out.
    labels: int64 `[S, T]`, aligned with the rows of logits (shifted); `IGNORE` at prompts and padding.
    """

    input_ids: Tensor
    labels: Tensor


def pair_batch(pairs: Sequence[EncodedPair], pad: int) -> TokenBatch:
    """`[2B, T]`, all chosen sequences before all rejected ones."""
    return _batch([(p.prompt, *p.answers[0]) for p in pairs] + [(p.prompt, *p.answers[1]) for p in pairs], pad)


def chosen_batch(pairs: Sequence[EncodedPair], pad: int) -> TokenBatch:
    """`[B, T]`, the chosen sequences alone."""
    return _batch([(p.prompt, *p.answers[0]) for p in pairs], pad)


def _batch(sequences: Sequence[tuple[list[int], list[int], Between]], pad: int) -> TokenBatch:
    answers = [interleaved(ids, between) for _, ids, between in sequences]
    length = max(len(prompt) + len(tokens) for (prompt, _, _), (tokens, _) in zip(sequences, answers, strict=True))
    input_ids = torch.full((len(sequences), length), pad)
    is_answer = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, ((prompt, _, _), (tokens, scored)) in enumerate(zip(sequences, answers, strict=True)):
        end = len(prompt) + len(tokens)
        input_ids[row, :end] = torch.tensor(prompt + tokens)
        is_answer[row, len(prompt) : end] = torch.tensor(scored)
    return TokenBatch(input_ids, shift_labels(input_ids, mask=is_answer, ignore_index=IGNORE))
