"""What the trainers of CPO and ORPO share: a loss on pairs inside the model's forward, and TRL's metrics from it.

TRL's trainers of both make the logits of all positions in `concatenated_forward`, and their loss and metrics from those
in `get_batch_loss_metrics`. Here the loss is computed first, in the policy's own forward; then TRL's method runs on the
log-probs that are there already, without a model, for its metrics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from ...functional.logits import shift_labels
from ..transformers.hook import run
from ..transformers.requests import HeadResult, LossRequest

IGNORE = -100


class PairedInputs(NamedTuple):
    """A batch of B pairs, the chosen answers first; one label for each row of logits, -100 where there is none.

    given: what the model takes; `input_ids` and `attention_mask` are `[2B, T]`.
    labels: `[2B, T]`, tokens of the answers, and of prompts where the loss reads them.
    starts: `[2B]`, the row that predicts the first token of the answer, where the loss reads prompts; else None.
    """

    given: dict[str, Any]
    labels: Tensor
    starts: Tensor | None = None


class FoundScores(NamedTuple):
    """What TRL's loss is a function of, without gradient: log-probs of the answers, `[B]` each, and the likelihood."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    nll: Tensor


class PairedLoss:
    """Mixed into a trainer of TRL, in front of it."""

    # What TRL's `concatenated_forward` would return, while TRL logs.
    _found: tuple[Tensor, ...] | None = None
    # Rows of a sequence whose logits TRL averages for its metrics.
    _logged_rows = slice(None)

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        trainer: Any = self
        name = type(self).__name__
        stock = f"use TRL's {name.removeprefix('Token')}"
        if trainer.is_encoder_decoder:
            raise ValueError(f"{name} takes no encoder-decoder models: {stock}")
        if is_peft_model(trainer.model) and any(c.is_prompt_learning for c in trainer.model.peft_config.values()):
            raise ValueError(f"{name} takes no prompt-learning PEFT, and neither does TRL's trainer: use LoRA")

    def _request(self, inputs: PairedInputs) -> LossRequest:
        """The loss of a batch."""
        raise NotImplementedError

    def _scores(self, inputs: PairedInputs, logps: Tensor) -> FoundScores:
        """What TRL's loss is a function of, from log-probs `[2B, T]`."""
        raise NotImplementedError

    def _inputs(self, batch: Any) -> PairedInputs:
        trainer: Any = self
        padding = getattr(trainer, "padding_value", None)
        both = trainer.concatenated_inputs(
            batch,
            padding_value=trainer.pad_token_id if padding is None else padding,
            device=trainer.accelerator.device,
        )
        given = {name: both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")}
        if trainer.aux_loss_enabled:
            given["output_router_logits"] = True
        return PairedInputs(given, shift_labels(both["concatenated_labels"]))

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: Any = "train") -> Any:
        """The loss of a batch, from its own forward; and TRL's metrics of it."""
        trainer: Any = self
        inputs = self._inputs(batch)
        result = run(model, inputs.given, self._request(inputs), inputs.labels)
        assert result.loss is not None
        loss = result.loss.loss
        if trainer.aux_loss_enabled:
            loss = loss + trainer.aux_loss_coef * result.aux_loss
        with torch.no_grad():
            self._found = self._as_trl(inputs, result)
            try:
                _, metrics = super().get_batch_loss_metrics(model, batch, train_eval)  # type: ignore[misc]
            finally:
                self._found = None
        return loss, metrics

    def _as_trl(self, inputs: PairedInputs, result: HeadResult) -> tuple[Tensor, ...]:
        """What TRL's `concatenated_forward` returns; in place of logits their means over the vocabulary."""
        assert result.loss is not None and result.mean_logits is not None
        scores = self._scores(inputs, result.loss.token_logps.view(inputs.labels.shape))
        chosen, rejected = result.mean_logits[:, self._logged_rows].chunk(2)
        found = (scores.chosen_logps, scores.rejected_logps, chosen, rejected, scores.nll)
        return found if result.aux_loss is None else (*found, result.aux_loss.detach())

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """What is there already, while TRL logs; else TRL's own."""
        if self._found is not None:
            return self._found
        return super().concatenated_forward(model, batch)  # type: ignore[misc]
