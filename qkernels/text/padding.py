"""Padding of prompts: where `generate` wants it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import checks


def left_padding(attention_mask: Any) -> Tensor:
    """An attention mask `[B, P]` of prompts that are padded on the left, checked, as int64."""
    attention_mask = checks.tensor(attention_mask, "attention_mask")
    if attention_mask.dim() != 2 or 0 in attention_mask.shape:
        raise ValueError(f"attention_mask must have shape [B, P], got {tuple(attention_mask.shape)}")
    attended = attention_mask != 0
    if bool((attended[:, 1:] < attended[:, :-1]).any()) or not bool(attended[:, -1].all()):
        raise ValueError("attention_mask: prompts must be padded on the left (padding_side='left'), and not be empty")
    return attended.long()
