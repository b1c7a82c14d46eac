"""Lengths of token sequences: what a model takes, how sequences are cut, which share a padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_OF_A_GPU = 8192


def position_limit(model: Any) -> int | None:
    """Most tokens of a sequence that a model of transformers takes; None if its configuration does not say."""
    config = model.config.get_text_config()
    value = getattr(config, "max_position_embeddings", None)
    return int(value) if isinstance(value, int) and value > 0 else None


def kept_lengths(answer: int, max_length: int) -> tuple[int, int]:
    """How many tokens of a prompt (its last ones) and of an answer (its first ones) a cut leaves, at most.

    The answer comes first: the prompt keeps what it leaves, but never less than a quarter of the room.

    Args:
        answer: tokens of the answer (of the longer one, where two share a prompt).
        max_length: of both together.
    """
    for_prompt = max(max_length - answer, max_length // 4)
    return for_prompt, max_length - for_prompt


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens of a forward pass where the caller does not say: 8192 on a GPU.

    1024 on a CPU: it is busy with as little, and results come, are shown and are saved eight times as often.
    """
    return _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_OF_A_GPU)


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences that share a padded batch of at most `budget` tokens, or one that has more alone.

    Longest first: a batch is hardly padded, and what does not fit in memory shows at once.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and (len(group) + 1) * lengths[group[0]] > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
