"""TRL's experimental ORPOTrainer with its log-probs and losses computed here. Imports TRL.

TRL takes the likelihood over the prompts of the chosen answers too, and the odds over the answers alone. So each
sequence is given to the loss as two, its prompt and its answer, and the batch has twice as many pairs: those of prompts
lose their likelihood, those of answers have the odds besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.orpo import ORPOTrainer

from ...functional.logits import shift_labels
from ...objectives import PairScores, declare_unit, formulas
from ..transformers.requests import LossRequest
from .paired import IGNORE, FoundScores, PairedInputs, PairedLoss
from .step import FasterSteps
from .version import require_methods

require_methods(ORPOTrainer, "get_batch_loss_metrics", "concatenated_forward", "concatenated_inputs")


@declare_unit("pair")
def _orpo_and_prompts(scores: PairScores, beta: float) -> Tensor:
    """ORPO where every second pair is of prompts, whose rejected side has no token; the mean is over all pairs."""
    return torch.where(scores.rejected_counts > 0, formulas.orpo(scores, 2 * beta), scores.chosen_nll)


class TokenORPOTrainer(FasterSteps, PairedLoss, ORPOTrainer):
    """TRL's experimental `ORPOTrainer`, its log-probs and losses computed here. Takes the same arguments and options.

    The likelihood is over prompts and answers, as in TRL: with the same options, data and seed, losses, metrics and
    parameters are those of TRL's trainer up to rounding. Logits exist a chunk at a time, only of the answers' tokens
    and of the chosen answers' prompts, and are made once. A rejected answer without a token (cut off by `max_length`)
    has no odds, where TRL's loss is NaN.

    Raises:
        ValueError: an encoder-decoder model; prompt-learning PEFT; a batch of another collator in which the tokens of
            an answer are not the last ones of their sequence.
    """

    _logged_rows = slice(None, -1)  # the last row predicts nothing

    def _inputs(self, batch: Any) -> PairedInputs:
        """As of CPO, with labels for the prompts of the chosen answers."""
        given, answers, _ = super()._inputs(batch)
        tokens = given["input_ids"].masked_fill(given["attention_mask"] != 1, IGNORE)
        pairs, length = len(answers) // 2, answers.shape[1]
        labels = torch.cat([shift_labels(tokens)[:pairs], answers[pairs:]])
        scored = answers != IGNORE
        starts = torch.where(scored.any(1), scored.int().argmax(1), length)
        if bool(((labels != answers) & _answer_rows(starts, length)).any()):
            raise ValueError(
                "TokenORPOTrainer takes answers whose tokens follow each other to the end of their sequence, and this"
                " data_collator gives others: use TRL's ORPOTrainer"
            )
        return PairedInputs(given, labels, starts)

    def _request(self, inputs: PairedInputs) -> LossRequest:
        assert inputs.starts is not None
        number, length = inputs.labels.shape
        first = length * torch.arange(number, device=inputs.labels.device)
        boundaries = torch.stack([first, first + inputs.starts], 1).flatten()
        return LossRequest(
            length,
            mean_logits=True,
            cu_seqlens=torch.cat([boundaries, boundaries.new_tensor([number * length])]).int(),
            reference_logps=0.0,
            options={"loss_type": _orpo_and_prompts, "beta": self.beta},
        )

    def _scores(self, inputs: PairedInputs, logps: Tensor) -> FoundScores:
        assert inputs.starts is not None
        number, length = inputs.labels.shape
        pairs = number // 2
        nll = -logps[:pairs].sum() / (inputs.labels[:pairs] != IGNORE).sum()
        answers = _answer_rows(inputs.starts, length) & (inputs.labels != IGNORE)
        chosen, rejected = ((logps * answers).sum(1) / answers.sum(1)).chunk(2)
        return FoundScores(chosen, rejected, nll)


def _answer_rows(starts: Tensor, length: int) -> Tensor:
    """`[2B, T]`, whether a row is behind the first of its answer."""
    return torch.arange(length, device=starts.device) >= starts[:, None]
