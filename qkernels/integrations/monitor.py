"""Rewards of a fixed set of pairs under policy and reference, measured once or during a Trainer's (or TRL's) run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..monitor import Finding, PairRewards, RewardMonitor, concatenate, pair_rewards
from .transformers import batch_labels, compute_token_stats

logger = logging.getLogger(__name__)
_STATE = "reward_monitor.json"  # in a checkpoint


def measure_rewards(
    model: nn.Module,
    reference_model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    beta: float,
    max_chunk_bytes: int | None = None,
) -> PairRewards:
    """Score pairs with policy and reference: log-probs and both exact KLs per token, without stored logits.

    Both models are run in eval mode (and put back), in the same way, so equal models have rewards of exactly 0.

    Args:
        model: a causal language model of transformers: the policy.
        reference_model: its frozen reference; `model` itself if it is a PEFT model, whose adapter is then switched off.
        batches: each what the model takes, `input_ids` `[2B, T]` with the chosen sequences first, and
            `completion_mask` or `labels` for what to score (`qkernels.integrations.transformers.batch_labels`). TRL's
            preference collator makes such batches. With `cu_seqlens` `[2B + 1]` one packed row, `[1, N]`.
        beta: of the loss.
        max_chunk_bytes: memory for a chunk's logits.

    Raises:
        As `qkernels.integrations.transformers.compute_token_stats`; ValueError for no batch or an odd number of
        sequences.
    """
    modules = list(dict.fromkeys([*model.modules(), *reference_model.modules()]))
    training = [module for module in modules if module.training]
    device = next(model.parameters()).device
    parts = []
    try:
        for module in training:
            module.training = False
        for batch in batches:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with torch.no_grad():
                stats = compute_token_stats(
                    model,
                    moved,
                    outputs=("logps", "reference_logps", "kl_reference_policy", "kl_policy_reference"),
                    reference_model=reference_model,
                    max_chunk_bytes=max_chunk_bytes,
                )
            cu_seqlens = moved.get("cu_seqlens")
            results = (
                batch_labels(moved),
                stats.logps,
                stats.reference_logps,
                stats.kl_reference_policy,
                stats.kl_policy_reference,
            )
            labels, logps, reference_logps, kl_reference_policy, kl_policy_reference = (
                x if cu_seqlens is None or x is None else x.squeeze(0) for x in results
            )
            assert labels is not None and logps is not None and reference_logps is not None
            parts.append(
                pair_rewards(
                    labels,
                    logps,
                    reference_logps,
                    beta=beta,
                    kl_reference_policy=kl_reference_policy,
                    kl_policy_reference=kl_policy_reference,
                    cu_seqlens=cu_seqlens,
                )
            )
    finally:
        for module in training:
            module.training = True
    return concatenate(parts)


class RewardMonitorCallback(TrainerCallback):
    """Scores a fixed set of pairs before the first step and every so many steps, logs the numbers, reports findings.

    An observation's numbers join the trainer's log entry of the same step under "qkernels/..."; other entries have
    none, so that a curve shows no value at a step where nothing was measured. Findings go to this module's logger, as
    warnings, and into `monitor.findings`. Every process of a distributed run scores the pairs
    (sharded models need that); the main one speaks. Checkpoints hold the observations, and a run that is resumed
    goes on with them.

    With TRL, batches are had from the trainer itself:

        probe = [trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + 8)])
                 for start in range(0, 64, 8)]
        RewardMonitorCallback(probe).attach(trainer)

    `attach` puts the callback before those that report (to TensorBoard, Weights & Biases ...), so that they see its
    numbers; with `callbacks=[...]` or `add_callback` it comes after them, and only `state.log_history` has the numbers.

    Args:
        batches: as `measure_rewards` takes them; 32 pairs or more show length bias.
        reference_model: the frozen reference; None for `attach` to find it, or for a PEFT model, whose adapter is
            switched off instead.
        beta: of the loss; None for the training arguments' own (`DPOConfig.beta`).
        every: steps from one observation to the next; None for the training arguments' `logging_steps`.
        monitor: to be used, with thresholds of its own; None for a `RewardMonitor` with the defaults.

    Raises:
        ValueError: no batches; `every` below 1; when training begins, no beta, or a model without an adapter and no
            reference.
    """

    def __init__(
        self,
        batches: Sequence[Mapping[str, Any]],
        reference_model: nn.Module | None = None,
        *,
        beta: float | None = None,
        every: int | None = None,
        monitor: RewardMonitor | None = None,
    ):
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty: give at least one batch of pairs to score")
        for i, batch in enumerate(self.batches):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches[{i}] must be a mapping of tensors, got {type(batch).__name__}")
            if not any(isinstance(batch.get(name), Tensor) for name in ("input_ids", "labels")):
                raise ValueError(
                    f"batches[{i}] must hold the tensor input_ids or labels, as trainer.data_collator(rows) makes them;"
                    f" it has {sorted(map(str, batch))}"
                )
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be an int of 1 or more, or None; got {every!r}")
        self.reference_model, self.beta, self.every = reference_model, beta, every
        self._monitor = monitor

    def attach(self, trainer: Any) -> RewardMonitorCallback:
        """Add the callback to a trainer, before all others, with the trainer's `ref_model` if none was given."""
        if self.reference_model is None:
            self.reference_model = getattr(trainer, "ref_model", None)
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    @property
    def monitor(self) -> RewardMonitor:
        """The monitor; made when training begins, unless it was given."""
        if self._monitor is None:
            raise ValueError("the monitor does not exist before training begins, unless it is given to the callback")
        return self._monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.beta is None:
            self.beta = self._monitor.beta if self._monitor is not None else getattr(args, "beta", None)
        if self.beta is None:
            raise ValueError("RewardMonitorCallback needs beta=: the training arguments have none")
        if self.reference_model is None and not callable(getattr(model, "disable_adapter", None)):
            raise ValueError(
                "RewardMonitorCallback needs reference_model= (or .attach(trainer), which takes the trainer's): the"
                " model has no PEFT adapter that could be switched off"
            )
        if self._monitor is None:
            self._monitor = RewardMonitor(self.beta)
        self._restore(args, state)
        self._observe(state, model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the observations in the checkpoint, so that a resumed run has them, and finds what it would have."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._monitor is not None and state.is_world_process_zero and folder.is_dir():
            # Complete or not there: a run that is killed now must still be resumed.
            partial = folder / f".{_STATE}.partial"
            partial.write_text(json.dumps(self._monitor.state_dict()), encoding="utf-8")
            partial.replace(folder / _STATE)

    def _restore(self, args: Any, state: Any) -> None:
        path = Path(str(getattr(args, "output_dir", ""))) / f"checkpoint-{state.global_step}" / _STATE
        if not state.global_step or self.monitor.history or not path.is_file():
            return
        try:
            observations = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} cannot be read ({error}): the reward monitor begins anew", stacklevel=2)
            return
        self.monitor.load_state_dict(observations)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self.every or max(1, int(getattr(args, "logging_steps", 1) or 1))
        if state.global_step % every == 0:
            self._observe(state, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        history = self._monitor.history if self._monitor is not None else []
        if not history or history[-1].step != state.global_step:
            return
        numbers = self.monitor.logs()
        if logs is not None:
            logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def _observe(self, state: Any, model: nn.Module) -> None:
        assert self.beta is not None
        history = self.monitor.history
        if history and history[-1].step >= state.global_step:  # training goes on after an interruption
            return
        pairs = measure_rewards(model, self.reference_model or model, self.batches, beta=self.beta)
        findings = self.monitor.observe(state.global_step, pairs)
        if findings and state.is_world_process_zero:
            self.report_findings(findings)

    def report_findings(self, findings: Sequence[Finding]) -> None:
        """Called on the main process with findings that are new; warns through this module's logger."""
        for finding in findings:
            logger.warning("%s", finding)
