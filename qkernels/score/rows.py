"""Pairs in tokens, in the columns that TRL's preference collator takes, and ours.

Token ids are those of `qkernels score`: the prompt and an answer rendered and tokenised as one text. In a trajectory,
what the assistant did not say has a token weight of 0, which leaves it out of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records.pairs import Preference
from ..text.between import interleaved
from .encode import EncodedAnswer, Encoder


def in_memory(encoder: Encoder, pairs: Sequence[Preference]) -> Any:
    """A few pairs as a `datasets.Dataset` without a file.

    Raises:
        ScoreError: a pair that cannot be rendered, or does not fit the model.
    """
    from datasets import Dataset

    trajectories = any(pair.chosen_turns for pair in pairs)
    return Dataset.from_list([row(*answers, trajectories) for answers in encoder.pairs(dict(enumerate(pairs)))])


def columns(trajectories: bool) -> tuple[str, ...]:
    """The names of the columns."""
    plain = ("prompt_ids", "chosen_ids", "rejected_ids")
    return (*plain, "chosen_token_weights", "rejected_token_weights") if trajectories else plain


def row(chosen: EncodedAnswer, rejected: EncodedAnswer, trajectories: bool) -> dict[str, list[Any]]:
    """The entries of a pair.

    The prompt is the longest that both answers have: a token that reaches over its end belongs to the answers.
    """
    sides = {"chosen": interleaved(chosen.ids, chosen.between), "rejected": interleaved(rejected.ids, rejected.between)}
    common = min(len(chosen.prompt), len(rejected.prompt))
    if chosen.prompt[:common] != rejected.prompt[:common]:
        common = next(i for i in range(common) if chosen.prompt[i] != rejected.prompt[i])
    entries: dict[str, list[Any]] = {"prompt_ids": chosen.prompt[:common]}
    for (side, (tokens, scored)), prompt in zip(sides.items(), (chosen.prompt, rejected.prompt), strict=True):
        entries[f"{side}_ids"] = [*prompt[common:], *tokens]
        if trajectories:
            entries[f"{side}_token_weights"] = [float(flag) for flag in [True] * (len(prompt) - common) + scored]
    return entries
