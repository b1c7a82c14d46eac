"""`TokenPreferenceCollator`: TRL's preference batches with values for each token, and packed. Imports TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DataCollatorForPreference

# Columns of a data set beside TRL's own, for the chosen and the rejected answer: lists with one number for each token.
WEIGHT_COLUMNS = ("chosen_token_weights", "rejected_token_weights")
REFERENCE_COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")


@dataclass
class TokenPreferenceCollator(DataCollatorForPreference):
    """TRL's `DataCollatorForPreference`, which also takes numbers for tokens, and packs.

    Further columns of the examples, lists with one number for each token of `chosen_ids` and `rejected_ids`:
    `chosen_token_weights`, `rejected_token_weights`, `ref_chosen_token_logps`, `ref_rejected_token_logps`.

    Further entries of the batch: `token_weights`, `ref_token_logps`, fp32, aligned with the tokens. With `packed`, all
    entries are `[1, N]`, without padding; `position_ids` start anew with each sequence, and `cu_seqlens` (int32
    `[2B + 1]`) says where that is; there is no `attention_mask`.

    Raises (when called):
        ValueError: a list of another length than its answer; a cache that lacks a token.
    """

    packed: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        weights = self._values(examples, WEIGHT_COLUMNS, batch)
        if weights is not None:
            batch["token_weights"] = weights
        logps = self._values(examples, REFERENCE_COLUMNS, batch)
        if logps is not None:
            lacking = logps.isnan() & (batch["completion_mask"] != 0)
            lacking[:, 0] = False  # the first token of a sequence is never scored
            if lacking.any():
                raise ValueError(
                    f"{REFERENCE_COLUMNS} lack tokens that this batch scores: they were made for a smaller max_length"
                    " or another truncation_mode; make them again"
                )
            batch["ref_token_logps"] = logps.nan_to_num(0.0)
        return _packed(batch) if self.packed else batch

    def _values(self, examples: list[dict[str, Any]], columns: tuple[str, str], batch: dict[str, Any]) -> Tensor | None:
        """Two columns' numbers, `[2B, T]` as `batch["input_ids"]`; None where the examples do not have them."""
        present = [column for column in columns if column in examples[0]]
        if not present:
            return None
        if len(present) < 2:
            raise ValueError(f"the data set has a column {present[0]!r}; it needs both of {columns}")
        rows = [self._row(example, column) for column in columns for example in examples]
        values = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return nn.functional.pad(values, (0, batch["input_ids"].shape[1] - values.shape[1]))

    def _row(self, example: dict[str, Any], column: str) -> Tensor:
        """A column's numbers of one example, for the whole sequence, truncated as its tokens are."""
        answer = "chosen_ids" if "chosen" in column else "rejected_ids"
        numbers, tokens = example[column], example[answer]
        if numbers is None:
            raise ValueError(f"{column} is None in an example; expected a number for each token of every answer")
        if len(numbers) != len(tokens):
            raise ValueError(
                f"{column} has {len(numbers)} numbers and the answer {len(tokens)} tokens (the end-of-sequence token"
                " counts); expected one number for each token"
            )
        if column in WEIGHT_COLUMNS and not all(x is not None and 0 <= x < float("inf") for x in numbers):
            raise ValueError(f"{column} must be finite numbers, 0 or more; got {numbers}")
        row = [0.0] * len(example["prompt_ids"]) + [float("nan") if x is None else float(x) for x in numbers]
        if self.max_length is not None:
            row = row[: self.max_length] if self.truncation_mode == "keep_start" else row[-self.max_length :]
        return torch.tensor(row, dtype=torch.float32)


def _packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The sequences of a padded batch in one row, without the padding."""
    is_token = batch.pop("attention_mask") != 0
    packed: dict[str, Any] = {}
    for name, value in batch.items():
        packed[name] = value[is_token].unsqueeze(0) if value.shape == is_token.shape else value
    positions = torch.arange(is_token.shape[1]).expand(is_token.shape)
    packed["position_ids"] = positions[is_token].unsqueeze(0)
    packed["cu_seqlens"] = nn.functional.pad(is_token.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return packed
