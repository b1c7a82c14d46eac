"""TRL's DPOTrainer with its log-probs and losses computed here, and with token weights, TDPO, packing and token caches.

Imported through `qkernels.integrations.trl`, which checks TRL first. What the trainer takes over from TRL's:

    the head of both models  `add_token_head` for `add_fused_lm_head`, in the constructor (constructor.py)
    the collator             `TokenPreferenceCollator` for `DataCollatorForPreference`, in the constructor
    the loss                 `_compute_loss`: `qkernels.objectives`, inside the policy's own forward
    cached references        `_precompute_ref_logps`: a log-prob for each token

Everything else (data, reference model, adapters, optimiser, checkpoints, logging) is TRL's own.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, tqdm
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.models import prepare_deepspeed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import get_config_model_id, use_adapter

from ... import objectives
from ...core.sequences import log_ratios
from ...functional.logits import shift_labels
from ...functional.preference import Batch
from ...functional.results import TokenDPOOutput, TokenStats
from ...objectives import PSPO
from ..transformers.hook import run
from ..transformers.parameters import HiddenAndHead, check_same_logits_transform
from ..transformers.requests import LossRequest, StatsRequest
from ..transformers.stats import hidden_and_head, model_inputs
from ..transformers.wrappers import unwrap
from .collator import REFERENCE_COLUMNS, WEIGHT_COLUMNS
from .config import check_options, head_options, loss_options
from .constructor import patched_constructor
from .links import DataPass, learned_links, load_links, save_links, warn_of_wrong_signs
from .results import METRIC_OUTPUTS, TokenResults, metric_averages, metric_sums
from .step import FasterSteps

IGNORE = -100


class _LabelledBatch(NamedTuple):
    """A collated batch as the loss takes it.

    labels: int64 `[2B, T]`, or packed `[1, N]`, aligned with the rows.
    token_weights: shaped like them, or None.
    cu_seqlens: int32 `[2B + 1]` of a packed batch, or None.
    batch: the same with LD-DPO folded in, for sums over sequences.
    """

    labels: Tensor
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    batch: Batch


def _aligned_with_rows(per_token: Tensor) -> Tensor:
    """From values aligned with the tokens to values aligned with the rows that predict them."""
    return nn.functional.pad(per_token[:, 1:], (0, 1))


class TokenDPOTrainer(FasterSteps, DPOTrainer):
    """TRL's `DPOTrainer`, its per-token log-probs and losses computed here. Takes the same arguments and options.

    Per step it enters each model once, through `model(...)`; logits exist a chunk at a time, and only of valid tokens:
    prompt and padding cost nothing in the head. With the same options, data and seed, losses, metrics and parameters
    are those of TRL's trainer up to rounding. Beyond it:

    - `loss_type` may also be "tdpo1" and "tdpo2" (per-token KL to the reference), "simpo" (no reference is loaded), or
      a function of `qkernels.PairScores`; options through `TokenDPOConfig.loss_kwargs`.
    - Token weights: columns `chosen_token_weights` and `rejected_token_weights` of the data set, one number for each
      token of the answer as tokenised here (with the end-of-sequence token). A zero leaves the token out.
    - `padding_free=True`: the 2B sequences of a batch in one row, no padding. Needs a model that tells sequences apart
      by `position_ids` (attention does, state-space layers do not).
    - `precompute_ref_log_probs=True` keeps a log-prob for each token (columns `ref_chosen_token_logps` and
      `ref_rejected_token_logps`; NaN for tokens cut off), so that weights and `ld_alpha` may change afterwards. A data
      set that has these columns already is taken as it is.
    - A data set with the columns `prompt_ids`, `chosen_ids` and `rejected_ids` is tokenised already, and not again.
    - LoRA on the head.
    - `label_smoothing` smooths `sigmoid` as well (cDPO; with a warning, since TRL ignores it there).
    - `loss_type` may be "ospo" or "pspo", whose link function is learned; their options (`qkernels.semiparametric`) go
      through `loss_kwargs`. The objects are in `learned_links`; checkpoints hold their state, so a resumed run equals
      an uninterrupted one. `refit_on="data"` of "pspo" takes a forward pass over the training data each time.
    - `on_token_results` sees the per-token results of every step.

    Metrics have TRL's names and meaning; averages over tokens are over the valid tokens (weight not 0). With TDPO,
    `kl/chosen` and `kl/rejected` are the mean per-token KL(ref || policy).

    Raises:
        ValueError: options that contradict each other; as `qkernels.fused_linear_token_dpo` for the loss.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        *others: Any,
        **options: Any,
    ):
        if args is None:  # as in TRL
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        self._loss_options, self._head_options = loss_options(args), head_options(args)
        self._loss_spec = objectives.resolve(
            **{name: value for name, value in self._loss_options.items() if name != "beta"}
        )
        # SFT needs no reference for its loss, but TRL logs rewards with it.
        sft = any(term.name == "sft" for term, _, _ in self._loss_spec.terms)
        wanted = sft or args.precompute_ref_log_probs or ref_model is not None
        self._reference_free = self._loss_spec.reference_free and not wanted
        padding_free = bool(args.padding_free)
        check_options(args, self._loss_spec, reference_free=self._reference_free, data_collator=data_collator)
        with patched_constructor(
            args,
            head_options=self._head_options,
            skip_reference=self._reference_free,
            policy_is_path=isinstance(model, str),
        ):
            super().__init__(model, ref_model, args, data_collator, *others, **options)
        self.padding_free = padding_free
        self.learned_links = learned_links(self._loss_spec)
        self._data_pass: DataPass | None = None
        self._check_model()

    def _check_model(self) -> None:
        """Raise for what only shows once model and data are there."""
        on_data = [link for link in self.learned_links if isinstance(link, PSPO) and link.refit_on == "data"]
        if on_data and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                'loss_kwargs refit_on="data" needs a map-style Dataset, and the data set is an IterableDataset; use'
                ' refit_on="memory"'
            )
        first = next(iter(self.train_dataset), None)
        if first is None:
            raise ValueError(
                f"train_dataset has no pair left: it was empty, or every prompt alone fills max_length="
                f"{self.args.max_length}, and such pairs are left out"
            )
        columns = first.keys()
        self._weighted = any(name in columns for name in WEIGHT_COLUMNS)
        if self._is_vision_dataset and (self._weighted or self.padding_free):
            what = "token weights" if self._weighted else "padding_free=True"
            raise ValueError(
                f"{what} and a vision data set do not go together: its answers are tokenised batch by batch"
            )
        if self._loss_spec.needs_kl and self.ref_model is not None:
            check_same_logits_transform(self.model, self.ref_model)
        if not self.padding_free:
            return
        causal = unwrap(self.model)
        if (
            getattr(causal, "_is_stateful", False)
            or "position_ids" not in inspect.signature(type(causal).forward).parameters
        ):
            raise ValueError(
                f"padding_free=True needs a model that tells sequences of one row apart by position_ids;"
                f" {type(causal).__name__} does not"
            )
        if is_peft_model(self.model) and any(c.is_prompt_learning for c in self.model.peft_config.values()):
            raise ValueError("padding_free=True and prompt-learning PEFT do not go together: one row holds 2B prompts")

    # --- data ------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, *others: Any, **options: Any) -> Any:
        """As TRL; a data set that has token ids already is taken as it is."""
        columns = getattr(dataset, "column_names", None) or ()
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(columns):
            return dataset
        return super()._prepare_dataset(dataset, *others, **options)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if not self._is_vision_dataset:
            added = WEIGHT_COLUMNS + REFERENCE_COLUMNS
            self._signature_columns += [name for name in added if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """A data set with the reference's log-prob of each token, as TRL makes one with sums over sequences."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "precompute_ref_log_probs=True needs a map-style Dataset, and the data set is an IterableDataset; set"
                " it to False"
            )
        if set(REFERENCE_COLUMNS) <= set(dataset.column_names):
            return dataset
        collator = self.data_collator
        if getattr(collator, "packed", False):
            collator = replace(collator, packed=False)
        made_with = (
            "token log-probs", dataset._fingerprint, self._precompute_model_hash, self.args.max_length,
            self.args.truncation_mode,
        )  # fmt: skip
        fingerprint = [Hasher.hash(made_with)]
        broadcast_object_list(fingerprint, from_process=0)
        cache_file = dataset._get_cache_file_path(fingerprint[0])
        if all(gather_object([os.path.exists(cache_file)])):
            return concatenate_datasets([dataset, Dataset.from_file(cache_file)], axis=1)
        computed = self._compute_reference_columns(dataset, name, batch_size, collator)
        if self.accelerator.is_main_process and not os.path.exists(cache_file):
            dataset.map(
                lambda _, index: {column: computed[column][index] for column in REFERENCE_COLUMNS},
                with_indices=True,
                remove_columns=dataset.column_names,
                new_fingerprint=fingerprint[0],
                cache_file_name=cache_file,
                desc=f"Caching reference log probs for {name} dataset",
            )
        self.accelerator.wait_for_everyone()
        # A data set that was made in memory has its cache in a folder of each process' own.
        columns = Dataset.from_file(cache_file) if os.path.exists(cache_file) else Dataset.from_dict(computed)
        return concatenate_datasets([dataset, columns], axis=1)

    def _compute_reference_columns(
        self, dataset: Any, name: str, batch_size: int, collator: Callable[..., Any]
    ) -> dict[str, list[list[float]]]:
        """The reference's log-probs of the tokens of each answer, NaN where the answer is cut off, by column."""
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=lambda examples: {**collator(examples), "answers": _answer_lengths(examples)},
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            shuffle=False,
        )
        loader = self.accelerator.prepare(loader)
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # As in TRL: the model is not on its device before training starts.
            if self._precompute_engine is None:  # type: ignore[has-type]
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        columns: dict[str, list[list[float]]] = {column: [] for column in REFERENCE_COLUMNS}
        no_bar = bool(os.environ.get("TQDM_DISABLE", ""))
        for batch in tqdm(iterable=loader, desc=f"Computing reference log probs for {name} dataset", disable=no_bar):
            lengths = batch.pop("answers")
            with self._as_reference():
                logps = self._reference_logps(model, batch, self._labelled(batch).labels)
            # Aligned with the tokens again. The first token of a sequence has none: a batch in which that token is not
            # the first, because less of the prompt is cut off, must not take 0 for it.
            logps = nn.functional.pad(logps[:, :-1], (1, 0), value=torch.nan).cpu()
            is_answer = (batch["completion_mask"] != 0).cpu()
            answers = _answer_values(logps, is_answer, lengths, self.args.truncation_mode == "keep_end")
            pairs = list(zip(answers[: len(answers) // 2], answers[len(answers) // 2 :], strict=True))
            for pair in gather_object(pairs):
                for column, values in zip(REFERENCE_COLUMNS, pair, strict=True):
                    columns[column].append(values)
        # Processes that ran out of examples were given the first ones again.
        return {column: values[: len(dataset)] for column, values in columns.items()}

    # --- the reference ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Where the policy itself is the reference: with its adapter off, or the copy of the adapter that TRL made."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            if self.ref_model is None and is_peft_model(self.model):
                policy = self.accelerator.unwrap_model(self.model)
                stack.enter_context(use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None))
            yield

    def _reference_logps(self, model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """The reference's log-probs, shaped like the labels."""
        request = StatsRequest(("logps",), options=self._head_options)
        with self.accelerator.autocast():  # while caches are made, accelerate has not wrapped the model yet
            stats = run(model, model_inputs(inputs), request, labels).stats
        assert stats is not None and stats.logps is not None
        return stats.logps[:, -labels.shape[1] :]

    def _reference(
        self, inputs: Mapping[str, Any], labelled: _LabelledBatch
    ) -> tuple[HiddenAndHead | None, Tensor | float | None]:
        """Hidden states and head of the reference, or its log-probs, as `LossRequest` takes them."""
        if self._reference_free:
            return None, 0.0
        packed = labelled.cu_seqlens is not None
        if self.precompute_ref_logps:
            if "ref_token_logps" in inputs:
                cached = _aligned_with_rows(inputs["ref_token_logps"])
                return None, cached.squeeze(0) if packed else cached
            if "ref_chosen_logps" in inputs:  # of a collator of the user's own
                return None, torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            raise ValueError(
                "precompute_ref_log_probs=True, but the batch has no ref_token_logps: the data_collator has to pass"
                f" on the columns {REFERENCE_COLUMNS} (TokenPreferenceCollator does)"
            )
        model = self.model if self.ref_model is None else self.ref_model
        with self._as_reference():
            if self._loss_spec.needs_kl:
                reference = hidden_and_head(model, model_inputs(inputs))
                return reference._replace(hidden=reference.hidden.squeeze(0)) if packed else reference, None
            logps = self._reference_logps(model, inputs, labelled.batch.labels)
        return None, logps.squeeze(0) if packed else logps

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The reference's log-probs of a batch, summed over each sequence with the weights of the loss: two `[B]`."""
        batch = self._labelled(inputs).batch
        with self._as_reference():
            logps = self._reference_logps(model, inputs, batch.labels)
        return batch.sequences.sums(batch.weights * logps).chunk(2)

    # --- losses that learn their link ------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; a warning at the end where a loss with a learned link has found rewards of the wrong sign."""
        result = super().train(*args, **kwargs)
        warn_of_wrong_signs(self.learned_links)
        return result

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; a link that is fitted to the whole data set is fitted before the step for which it is due."""
        for link in self.learned_links:
            if isinstance(link, PSPO) and link.refit_due:
                if self._data_pass is None:
                    self._data_pass = DataPass(self.train_dataset, self)
                self._data_pass.fit(link, self._forward_passes(model, self._data_pass))
        return super().training_step(model, *args, **kwargs)

    def _forward_passes(self, model: Any, batches: Any) -> Iterator[None]:
        """The loss of one batch after another, for what it leaves behind; no gradients, no metrics, no dropout."""
        training = model.training
        model.eval()
        try:
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                labelled = self._labelled(inputs)
                with torch.no_grad(), self.compute_loss_context_manager():
                    run(model, model_inputs(inputs), self._loss_request(inputs, labelled), labelled.labels)
                yield
        finally:
            model.train(training)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_links(self.learned_links, output_dir, self.args.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_links(self.learned_links, checkpoint, self.args.process_index)

    # --- the loss --------------------------------------------------------------------------------------------------

    def _labelled(self, inputs: Mapping[str, Any]) -> _LabelledBatch:
        """Labels and weights of a batch, aligned with the rows of logits."""
        cu_seqlens = inputs.get("cu_seqlens")
        tokens, mask = inputs["input_ids"], inputs["completion_mask"]
        if cu_seqlens is None:
            labels = shift_labels(tokens, mask=mask)
        else:
            labels = shift_labels(tokens[0], mask=mask[0], cu_seqlens=cu_seqlens).unsqueeze(0)
        weights = inputs.get("token_weights")
        if weights is not None:
            weights = _aligned_with_rows(weights)
        elif getattr(self, "_weighted", False):
            raise ValueError(
                f"the training data have columns {WEIGHT_COLUMNS}, but the batch has no token_weights: the evaluation"
                " data lack the columns, or the data_collator does not pass them on (TokenPreferenceCollator does)"
            )
        batch = Batch.of(labels, weights, cu_seqlens, self._loss_spec, IGNORE, torch.float32)
        return _LabelledBatch(labels, weights, cu_seqlens, batch)

    def _loss_request(self, inputs: Mapping[str, Any], labelled: _LabelledBatch) -> LossRequest:
        """The loss of a batch. Computes its reference."""
        reference, reference_logps = self._reference(inputs, labelled)
        weights = labelled.token_weights
        if weights is not None and labelled.cu_seqlens is not None:
            weights = weights.squeeze(0)
        return LossRequest(
            length=labelled.labels.shape[1],
            outputs=METRIC_OUTPUTS + (("kl_reference_policy",) if self._loss_spec.needs_kl else ()),
            token_weights=weights,
            cu_seqlens=labelled.cu_seqlens,
            reference=reference,
            reference_logps=reference_logps,
            options={**self._loss_options, **self._head_options},
        )

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        labelled = self._labelled(inputs)
        request = self._loss_request(inputs, labelled)
        given = model_inputs(inputs)
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        result = run(model, given, request, labelled.labels)
        assert result.loss is not None and result.stats is not None
        loss = result.loss.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss
        with torch.no_grad():
            length = labelled.labels.shape[1]
            stats = TokenStats(*(x if x is None else _without_virtual_tokens(x, length) for x in result.stats))
            results = self._token_results(mode, loss, result.loss, stats, labelled)
            aux_loss = result.aux_loss if self.aux_loss_enabled else None
            self._log_metrics(inputs, results, stats, labelled.batch, aux_loss)
            self.on_token_results(results)
        if not return_outputs:
            return loss
        warnings.warn(
            "compute_metrics gets logits, which this trainer does not make: they are computed with an extra forward."
            " TRL will remove this in 2.0",
            FutureWarning,
            stacklevel=2,
        )
        with torch.no_grad():
            return loss, model(**model_inputs(inputs))

    def _token_results(
        self, mode: str, loss: Tensor, output: TokenDPOOutput, stats: TokenStats, labelled: _LabelledBatch
    ) -> TokenResults:
        length = labelled.labels.shape[1]
        logps = _without_virtual_tokens(output.token_logps, length)
        reference = output.reference_token_logps
        if reference is not None:
            reference = _without_virtual_tokens(reference, length)
        assert stats.entropy is not None
        return TokenResults(
            mode=mode,
            loss=loss.detach(),
            labels=labelled.batch.labels.view(logps.shape),  # [2B, T], or [N] of a packed batch
            token_weights=labelled.batch.weights.view(logps.shape),
            logps=logps,
            reference_logps=reference,
            token_rewards=None if reference is None else self.beta * log_ratios(logps, reference),
            logsumexp=_without_virtual_tokens(output.logsumexp, length),
            entropy=stats.entropy,
            kl_reference_policy=stats.kl_reference_policy,
            chosen_rewards=output.chosen_rewards.detach(),
            rejected_rewards=output.rejected_rewards.detach(),
            cu_seqlens=labelled.cu_seqlens,
        )

    def on_token_results(self, results: TokenResults) -> None:
        """Called once per step, without gradients, with the per-token results of this process. Does nothing here.

        Override it to watch or keep them. What is added to `self._metrics[results.mode][name]`, a list of numbers, is
        averaged and logged with the other metrics.
        """

    def _log_metrics(
        self,
        inputs: Mapping[str, Any],
        results: TokenResults,
        stats: TokenStats,
        batch: Batch,
        aux_loss: Tensor | None,
    ) -> None:
        """TRL's metrics under TRL's names; one collective between processes for all of them."""
        attended = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if attended is None else attended.sum()
        sums = metric_sums(results, stats, batch, tokens, aux_loss)
        gathered = self.accelerator.gather(torch.stack(list(sums.values())).unsqueeze(0)).sum(0)
        totals = dict(zip(sums, gathered.tolist(), strict=True))
        if results.mode == "train":
            self._total_train_tokens += int(totals["tokens"]) // self._tp_size
        metrics = self._metrics[results.mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, value in metric_averages(totals).items():
            metrics[name].append(value)


def _without_virtual_tokens(per_token: Tensor, length: int) -> Tensor:
    """The last `length` rows of each sequence, detached: PEFT's prompt methods put virtual tokens in front."""
    return per_token[..., -length:].detach()


def _answer_lengths(examples: Sequence[Mapping[str, Any]]) -> Tensor:
    """Tokens of the chosen answers, then of the rejected ones, before truncation."""
    return torch.tensor([len(example[name]) for name in ("chosen_ids", "rejected_ids") for example in examples])


def _answer_values(values: Tensor, is_answer: Tensor, lengths: Tensor, keep_end: bool) -> list[list[float]]:
    """The values of each answer's tokens, with NaN for those that truncation has cut off.

    Args:
        values: `[2B, T]`, aligned with the tokens.
        is_answer: bool, like them; the tokens of the answers.
        lengths: `[2B]`, tokens of each answer before truncation.
        keep_end: truncation cuts off the beginning of a sequence instead of its end.
    """
    answers = []
    for row, mask, length in zip(values, is_answer, lengths.reshape(-1).tolist(), strict=True):
        found = row[mask].tolist()
        cut_off = [float("nan")] * (length - len(found))
        answers.append(cut_off + found if keep_end else found + cut_off)
    return answers
