"""TRL's KTOTrainer with its log-probs and losses computed here. Imports TRL.

What the trainer takes over from TRL's: the heads (`add_token_head` for `add_fused_lm_head`, in the constructor), and
the loss of a step, which is computed inside the policy's own forward once the reference and the KL estimate are known.
TRL's `_compute_loss` then runs on the results that are there already, without a model, for its metrics.
"""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer import kto_trainer
from trl.trainer.kto_trainer import KTOTrainer

from ...functional.logits import shift_labels
from ..patches import Patch
from ..transformers.hook import run
from ..transformers.requests import UnitLossRequest
from .head import add_token_head
from .step import FasterSteps
from .version import require_methods

require_methods(KTOTrainer, "_compute_loss", "_compute_kl_logps", "compute_ref_log_probs")

# Entries of a batch that are not for the model: those of `KTOTrainer._compute_loss`.
_NOT_INPUTS = ("completion_mask", "KL_input_ids", "KL_attention_mask", "KL_completion_mask", "KL_token_type_ids",
               "KL_mm_token_type_ids", "label", "ref_logps", "ref_KL_logps")  # fmt: skip


class TokenKTOTrainer(FasterSteps, KTOTrainer):
    """TRL's `KTOTrainer`, its log-probs and losses computed here. Takes the same arguments and options.

    Both of TRL's losses, `kto` and `apo_zero_unpaired`, with its KL estimate from mismatched answers: with the same
    options, data and seed, losses, metrics and parameters are those of TRL's trainer up to rounding. Logits exist a
    chunk at a time, and are made once.

    Raises:
        ValueError: a vision data set, which `patch_trl` leaves to TRL's own trainer.
    """

    # TRL computes its loss again from these, for its metrics.
    _kl_logps: Tensor | None = None
    _logs = False

    def __init__(self, *arguments: Any, **options: Any):
        with Patch() as patch:
            patch.set(kto_trainer, "add_fused_lm_head", functools.partial(add_token_head, detach_entropy=True))
            super().__init__(*arguments, **options)
        if self._is_vision_dataset:
            raise ValueError("TokenKTOTrainer takes no vision data sets: use TRL's KTOTrainer with patch_trl")

    def _compute_kl_logps(self, model: Any, batch: Any) -> Tensor | None:
        return self._kl_logps if self._logs else super()._compute_kl_logps(model, batch)

    def _reference(self, batch: dict[str, Any], model: Any) -> tuple[Tensor, Tensor | None]:
        """Sums of the reference's log-probs over the answers, and over the mismatched ones."""
        if self.precompute_ref_logps:
            return batch["ref_logps"], batch["ref_KL_logps"] if self.calculate_KL else None
        found: tuple[Tensor, Tensor | None] = self.compute_ref_log_probs(
            self.model if self.ref_model is None else self.ref_model, batch
        )
        return found

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        device = self.accelerator.device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        kl_logps = self._compute_kl_logps(model, batch)
        reference, reference_kl = self._reference(batch, model)
        kl = None
        if self.calculate_KL:
            assert kl_logps is not None and reference_kl is not None
            mean = (kl_logps - reference_kl).mean().detach()
            kl = self.accelerator.gather_for_metrics(mean).mean().clamp(min=0)
        aligned = shift_labels(batch["input_ids"], mask=batch["completion_mask"])
        given = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        request = UnitLossRequest(
            "sequence",
            aligned.shape[1],
            arguments={
                "desirable": torch.as_tensor(batch["label"], dtype=torch.bool, device=device),
                "reference_logps": reference.float(),
                "kl": kl,
                "beta": self.beta,
                "loss_type": self.loss_type,
                "loss_kwargs": {
                    "desirable_weight": self.desirable_weight,
                    "undesirable_weight": self.undesirable_weight,
                },
                "outputs": ("entropy", "mean_logits"),
            },
        )
        result = run(model, given, request, aligned)
        output: Any = result.unit_loss
        loss = output.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss
        self._log_of_trl(inputs, result, (kl_logps, reference, reference_kl))
        if not return_outputs:
            return loss
        warnings.warn(
            "compute_metrics gets logits, which this trainer does not make: they are computed with an extra forward."
            " TRL will remove this in 2.0",
            FutureWarning,
            stacklevel=2,
        )
        with torch.no_grad():
            return loss, model(**given)

    def _log_of_trl(self, inputs: Any, result: Any, known: tuple[Tensor | None, Tensor, Tensor | None]) -> None:
        """Let TRL log its metrics from results that are there."""
        output = result.unit_loss

        def model(**_: Any) -> Any:
            rows = slice(None, -1)  # the last row predicts nothing
            return SimpleNamespace(
                log_probs=output.token_logps[:, rows],
                entropy=output.stats.entropy[:, rows],
                mean_logits=output.stats.mean_logits[:, rows],
                aux_loss=None if result.aux_loss is None else result.aux_loss.detach(),
            )

        self._kl_logps, reference, reference_kl = known
        cached = {**inputs, "ref_logps": reference, "ref_KL_logps": reference_kl}
        precomputed: bool = self.precompute_ref_logps  # type: ignore[has-type]
        self._logs, self.precompute_ref_logps = True, True
        try:
            with torch.no_grad():
                super()._compute_loss(model, cached, False)
        finally:
            self._logs, self._kl_logps, self.precompute_ref_logps = False, None, precomputed
