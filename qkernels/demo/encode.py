"""From preference pairs to token ids: truncation, which tokens are planted errors, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import Preference
from ..functional import shift_labels
from .tokenizer import encode_prompt, encode_text

IGNORE = -100


class EncodedPair(NamedTuple):
    """Token ids of one pair.

    prompt: ends with the role token of the answer.
    chosen, rejected: end with the end token, unless they were cut.
    planted: for each token of `rejected`, whether it overlaps a planted error.
    source: index of the pair in the list that was encoded.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    planted: list[bool]
    source: int

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Truncation(NamedTuple):
    """What did not fit: how many prompts lost their beginning and answers their end, and how many pairs were dropped
    because their answers agree up to the cut."""

    prompts: int = 0
    answers: int = 0
    dropped: int = 0

    def __add__(self, other: object) -> Truncation:
        if not isinstance(other, Truncation):
            return NotImplemented
        return Truncation(
            self.prompts + other.prompts, self.answers + other.answers, self.dropped + other.dropped
        )


def encode(
    pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[EncodedPair], Truncation]:
    """Tokenise pairs and cut them to `max_length` tokens, prompt and answer together.

    A prompt is cut from the left, an answer from the right. The answers come first: a prompt keeps what they leave,
    but never less than a quarter of the room.
    """
    encoded, cut = [], [0, 0, 0]
    end = int(tokenizer.convert_tokens_to_ids(tokenizer.eos_token))
    for source, pair in enumerate(pairs):
        prompt = encode_prompt(tokenizer, pair.prompt)
        chosen, _ = encode_text(tokenizer, pair.chosen)
        rejected, offsets = encode_text(tokenizer, pair.rejected)
        planted = [any(start < b and a < stop for a, b in pair.planted) for start, stop in offsets]
        chosen, rejected, planted = [*chosen, end], [*rejected, end], [*planted, False]
        for_prompt = max(max_length - max(len(chosen), len(rejected)), max_length // 4)
        if len(prompt) > for_prompt:
            prompt = prompt[-for_prompt:]
            cut[0] += 1
        room = max_length - len(prompt)
        cut[1] += (len(chosen) > room) + (len(rejected) > room)
        chosen, rejected, planted = chosen[:room], rejected[:room], planted[:room]
        if chosen == rejected:
            cut[2] += 1
        else:
            encoded.append(EncodedPair(prompt, chosen, rejected, planted, source))
    return encoded, Truncation(*cut)


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
    return _batch([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs], pad)


def chosen_batch(pairs: Sequence[EncodedPair], pad: int) -> TokenBatch:
    """`[B, T]`, the chosen sequences alone."""
    return _batch([(p.prompt, p.chosen) for p in pairs], pad)


def _batch(sequences: Sequence[tuple[list[int], list[int]]], pad: int) -> TokenBatch:
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.full((len(sequences), length), pad)
    is_answer = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
        input_ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        is_answer[row, len(prompt) : len(prompt) + len(answer)] = True
    return TokenBatch(input_ids, shift_labels(input_ids, mask=is_answer, ignore_index=IGNORE))
