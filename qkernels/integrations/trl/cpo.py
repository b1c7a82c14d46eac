"""TRL's experimental CPOTrainer with its log-probs and losses computed here. Imports TRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer

from ..transformers.requests import LossRequest
from .paired import IGNORE, FoundScores, PairedInputs, PairedLoss
from .step import FasterSteps
from .version import require_methods

require_methods(CPOTrainer, "get_batch_loss_metrics", "concatenated_forward", "concatenated_inputs")

# Losses on log-probs per token; the others are on sums over the answer.
_AVERAGED = ("ipo", "simpo")
# Losses that label smoothing changes; TRL ignores it in the others, with a warning.
_SMOOTHED = ("sigmoid", "simpo")


class TokenCPOTrainer(FasterSteps, PairedLoss, CPOTrainer):
    """TRL's experimental `CPOTrainer`, its log-probs and losses computed here. Takes the same arguments and options.

    Every `loss_type` (`sigmoid`, `hinge`, `ipo`, `simpo`, `alphapo`), with `cpo_alpha`, `alpha` and `label_smoothing`:
    with the same options, data and seed, losses, metrics and parameters are those of TRL's trainer up to rounding.
    Logits exist a chunk at a time, only of the answers' tokens, and are made once. Where AlphaPO's p^-alpha overflows,
    the loss stays finite.

    Raises:
        ValueError: an encoder-decoder model; prompt-learning PEFT; options that `qkernels.objectives.cpo` refuses.
    """

    def _request(self, inputs: PairedInputs) -> LossRequest:
        smoothing = self.label_smoothing if self.loss_type in _SMOOTHED else 0.0
        own: dict[str, Any] = {"form": self.loss_type, "cpo_alpha": self.cpo_alpha, "alpha": self.alpha}
        if self.loss_type == "simpo":
            own["simpo_gamma"] = self.simpo_gamma
        return LossRequest(
            inputs.labels.shape[1],
            mean_logits=True,
            reference_logps=0.0,
            options={"loss_type": "cpo", "beta": self.beta, "label_smoothing": smoothing, "loss_kwargs": own},
        )

    def _scores(self, inputs: PairedInputs, logps: Tensor) -> FoundScores:
        sums, counts = logps.sum(1), (inputs.labels != IGNORE).sum(1)
        pairs = len(sums) // 2
        nll = -sums[:pairs].sum() / counts[:pairs].sum()
        chosen, rejected = (sums / counts if self.loss_type in _AVERAGED else sums).chunk(2)
        return FoundScores(chosen, rejected, torch.zeros_like(nll) if self.cpo_alpha == 0 else nll)
