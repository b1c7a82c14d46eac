"""TRL's GRPOTrainer with its log-probs and policy losses computed here. Imports TRL.

What the trainer takes over from TRL's: the heads (`add_token_head` for `add_fused_lm_head`, in the constructor), and
the loss of a step, which is computed inside the policy's own forward, where rows without a gradient leave the GEMMs of
the backward. TRL's `_compute_loss` then runs on the log-probs and entropies that are there already, without a model,
for its metrics and the entropy controller. Everything else (generation, rewards, advantages, references) is TRL's own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

from ..patches import Patch
from ..transformers.hook import run
from ..transformers.requests import UnitLossRequest
from .head import add_token_head
from .step import FasterSteps
from .version import require_methods

require_methods(GRPOTrainer, "_compute_loss", "_get_per_token_logps_and_entropies")

# Losses whose sum over tokens is divided by the tokens of all ranks and accumulated steps.
_BY_ITEMS = ("cispo", "dapo", "vespo")
# Entries of a batch that go to the model besides ids and mask.
_OF_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
              "token_type_ids", "mm_token_type_ids", "image_position_ids")  # fmt: skip


class TokenGRPOTrainer(FasterSteps, GRPOTrainer):
    """TRL's `GRPOTrainer`, its log-probs and losses computed here. Takes the same arguments and options.

    Every `loss_type` of TRL, token and sequence ratios, KL penalty, entropy bonus, off-policy masking and importance
    correction: with the same options, data and seed, losses, metrics and parameters are those of TRL's trainer up to
    rounding. Logits exist a chunk at a time and are made once. Completions of advantage 0 cost no backward of the head
    (without KL penalty and entropy bonus).

    last_idle_rows: how many rows of the last step had no gradient; None before the first.

    Raises:
        ValueError: options that are TRL's alone: `off_policy_mask_threshold` together with vLLM's importance
            correction. `patch_trl` leaves it to TRL.
    """

    # Log-probs, entropies and auxiliary loss of this step, while TRL logs.
    _found: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __init__(self, *arguments: Any, **options: Any):
        with Patch() as patch:
            patch.set(grpo_trainer, "add_fused_lm_head", functools.partial(add_token_head, detach_entropy=False))
            super().__init__(*arguments, **options)
        self.last_idle_rows: int | None = None
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        if corrected and self.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold together with vllm_importance_sampling_correction is not supported by"
                " TokenGRPOTrainer: leave one out, or use TRL's GRPOTrainer with patch_trl"
            )

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        length = completion.shape[1]
        mask = inputs["completion_mask"]
        mask = mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
        tokens = torch.cat([prompt, completion], dim=1)
        # Row t predicts token t + 1: the last `length` tokens belong to the rows before the last one.
        before = prompt.shape[1] - 1

        def aligned(per_token: Tensor | None) -> Tensor | None:
            return None if per_token is None else nn.functional.pad(per_token.expand_as(mask).float(), (before, 1))

        labels = nn.functional.pad(completion.masked_fill(mask == 0, -100), (before, 1), value=-100)
        given = {
            "input_ids": tokens,
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            **{name: inputs[name] for name in _OF_IMAGES if inputs.get(name) is not None},
        }
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        divisor, arguments = self._loss_arguments(inputs)
        arguments |= {
            name: aligned(inputs.get(key))
            for name, key in (("old_logps", "old_per_token_logps"), ("reference_logps", "ref_per_token_logps"))
        }
        advantages = inputs["advantages"]
        arguments["advantages"] = advantages if advantages.dim() == 1 else aligned(advantages)
        arguments["on_policy"] = arguments["old_logps"] is None
        if arguments["importance_correction"] is not None:
            ratio = aligned(inputs["importance_sampling_ratio"])
            assert ratio is not None
            arguments["sampling_logps"] = arguments["old_logps"] - ratio.log()
        request = UnitLossRequest("policy", tokens.shape[1], fp32=self.args.cast_lm_head_to_fp32, arguments=arguments)
        with self.accelerator.autocast():
            result = run(model, given, request, labels)
        output: Any = result.unit_loss
        rows = slice(-1 - length, -1)
        aux_loss = result.aux_loss if self.aux_loss_enabled else None
        self._log_of_trl(model, inputs, (output.token_logps[:, rows], output.stats.entropy[:, rows], aux_loss))
        idle = output.metrics.idle_rows
        self.last_idle_rows = None if idle is None else int(idle)
        loss = output.loss / divisor
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation()
        return loss

    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _loss_arguments(self, inputs: Any) -> tuple[float, dict[str, Any]]:
        """What the loss is divided by, and the options of TRL as arguments of `fused_linear_policy_loss`."""
        args, loss_type, accumulation = self.args, self.loss_type, self._accumulation()
        own: dict[str, Any] = {}
        if loss_type == "cispo":
            own["epsilon_high"] = self.epsilon_high
        elif loss_type == "sapo":
            own = {"temperature_pos": args.sapo_temperature_pos, "temperature_neg": args.sapo_temperature_neg}
        elif loss_type == "vespo":
            names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
            own = {name: getattr(args, f"vespo_{name}") for name in names}
        else:
            own = {"epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high}
            own |= {} if args.delta is None else {"delta": args.delta}
        if self.off_policy_mask_threshold is not None:
            own["off_policy_threshold"] = self.off_policy_mask_threshold
        if self.top_entropy_quantile < 1:
            own["entropy_quantile"] = self.top_entropy_quantile
            if self.accelerator.num_processes > 1:  # as TRL: among the tokens of all of them
                own["entropy_group"] = torch.distributed.group.WORLD
        if self.beta and args.use_bias_correction_kl:
            own["corrected_kl"] = True
        coefficient = 0.0
        if self._entropy_bonus_enabled:
            # As TRL: the controller's coefficient from the end of the step before.
            low = not self.use_adaptive_entropy or self._last_world_entropy <= args.entropy_target
            coefficient = self.entropy_coef if low else 0.0
        items, divisor = None, accumulation
        if loss_type in _BY_ITEMS:
            items, divisor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes, 1.0
            if self.model.training:
                items = items * self.current_gradient_accumulation_steps / args.steps_per_generation
            coefficient /= accumulation
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return divisor, {
            "loss_type": loss_type,
            "loss_kwargs": own,
            "beta": self.beta,
            "importance_sampling_level": self.importance_sampling_level,
            "importance_correction": "token_truncate" if corrected else None,
            "entropy_coef": coefficient,
            "num_items_in_batch": items,
            "max_completion_length": self.max_completion_length if loss_type == "dr_grpo" else None,
            "temperature": self.temperature,
            "outputs": ("entropy",),
        }

    def _log_of_trl(self, model: Any, inputs: Any, results: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """Let TRL log its metrics, and its entropy controller learn, from log-probs and entropies that are there."""
        logps, entropies, aux_loss = results
        self._found = (logps.detach(), entropies.detach(), None if aux_loss is None else aux_loss.detach())
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)
        finally:
            self._found = None

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> Any:
        if self._found is not None:
            return self._found
        return super()._get_per_token_logps_and_entropies(*arguments, **options)
