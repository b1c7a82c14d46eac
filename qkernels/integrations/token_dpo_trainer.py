"""TRL's DPOTrainer with its log-probs and losses computed here, and with token weights, TDPO, packing and token caches.

Imported through `qkernels.integrations.trl`, which checks TRL first. What the trainer takes over from TRL's:

    the head of both models  `add_token_head` for `add_fused_lm_head`, in the constructor
    the collator             `TokenPreferenceCollator` for `DataCollatorForPreference`, in the constructor
    the loss                 `_compute_loss`: `qkernels.objectives`, inside the policy's own forward
    cached references        `_precompute_ref_logps`: a log-prob for each token

Everything else (data, reference model, adapters, optimiser, checkpoints, logging) is TRL's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, tqdm
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.models import prepare_deepspeed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import get_config_model_id, use_adapter

from .. import objectives
from ..core.sequences import log_ratios
from ..functional.logits import shift_labels
from ..functional.preference import Batch
from .transformers import HeadCall, check_same_shape_of_logits, hidden_and_head, model_inputs, run, unwrap
from .trl import NotOnTheHead, Patch, add_token_head

IGNORE = -100

# Columns of a data set beside TRL's own, for the chosen and the rejected answer; lists with one number for each token.
WEIGHTS = ("chosen_token_weights", "rejected_token_weights")
CACHES = ("ref_chosen_token_logps", "ref_rejected_token_logps")

# Per-token numbers behind TRL's metrics.
_METRICS = ("entropy", "mean_logits", "is_top1")


@dataclass
class TokenDPOConfig(DPOConfig):
    """TRL's `DPOConfig` and the options of this package. `TokenDPOTrainer` takes either.

    loss_type: names of `qkernels.objectives.OBJECTIVES` (TRL's fifteen, and tdpo1, tdpo2, simpo), callables on
        `qkernels.PairScores`, or a list of these.
    loss_kwargs: options of losses that TRL has no field for: `alpha` (tdpo2), `gamma` (simpo), those of a callable.
    max_chunk_bytes, backend: as in `qkernels.fused_linear_token_dpo`.
    """

    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of losses that TRL has no field for, such as `alpha` of tdpo2."}
    )
    max_chunk_bytes: int | None = field(
        default=None, metadata={"help": "Memory for a chunk of logits; by default a share of what is free."}
    )
    backend: str = field(default="auto", metadata={"help": "Backend of qkernels, see `qkernels.info()`."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DPOConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    def __post_init__(self) -> None:
        losses: Any = self.loss_type
        self.loss_type: Any = [losses] if callable(losses) else losses
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As TRL's; a loss that is a function is named."""
        result: dict[str, Any] = super().to_dict()
        result["loss_type"] = [getattr(loss, "__name__", loss) for loss in self.loss_type]
        return result


class TokenResults(NamedTuple):
    """One step's per-token results, for `TokenDPOTrainer.on_token_results`. All without gradient.

    Token tensors are `[2B, T]` (chosen first), or `[N]` of a packed batch; entry t belongs to token t + 1; they are 0
    where nothing is scored.

    mode: "train" or "eval".
    loss: `[]`.
    labels: the token ids, -100 where nothing is scored.
    token_weights: factor of each token in its sequence's sums, LD-DPO's included.
    logps, reference_logps: log-probs; the reference's are None if they came as sums over sequences.
    token_rewards: beta * (logps - reference_logps), or None.
    logsumexp, entropy: of the policy.
    kl_reference_policy: KL(ref || policy), with the losses that use it; else None.
    chosen_rewards, rejected_rewards: `[B]`.
    cu_seqlens: int32 `[2B + 1]`, boundaries of a packed batch; None for a dense one.
    """

    mode: str
    loss: Tensor
    labels: Tensor
    token_weights: Tensor
    logps: Tensor
    reference_logps: Tensor | None
    token_rewards: Tensor | None
    logsumexp: Tensor
    entropy: Tensor
    kl_reference_policy: Tensor | None
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    cu_seqlens: Tensor | None


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
        for name, columns in (("token_weights", WEIGHTS), ("ref_token_logps", CACHES)):
            present = [column for column in columns if column in examples[0]]
            if not present:
                continue
            if len(present) < 2:
                raise ValueError(f"the data set has a column {present[0]!r}; it needs both of {columns}")
            values = [self._row(example, column) for column in columns for example in examples]
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True)
            length = batch["input_ids"].shape[1]
            batch[name] = nn.functional.pad(batch[name], (0, length - batch[name].shape[1]))
            unknown = batch[name].isnan() & (batch["completion_mask"] != 0)
            unknown[:, 0] = False  # the first token of a sequence is never scored
            if name == "ref_token_logps" and unknown.any():
                raise ValueError(
                    f"{columns} lack tokens that this batch scores: they were made for a smaller max_length or another"
                    " truncation_mode; make them again"
                )
            batch[name] = batch[name].nan_to_num(0.0) if name == "ref_token_logps" else batch[name]
        return self._pack(batch) if self.packed else batch

    def _row(self, example: dict[str, Any], column: str) -> Tensor:
        """A column's numbers of one example, for the whole sequence, truncated as its tokens are."""
        answer = "chosen_ids" if "chosen" in column else "rejected_ids"
        numbers, tokens = example[column], example[answer]
        if len(numbers) != len(tokens):
            raise ValueError(
                f"{column} has {len(numbers)} numbers and the answer {len(tokens)} tokens (the end-of-sequence token"
                " counts); expected one number for each token"
            )
        if column in WEIGHTS and not all(x is not None and 0 <= x < float("inf") for x in numbers):
            raise ValueError(f"{column} must be finite numbers, 0 or more; got {numbers}")
        row = [0.0] * len(example["prompt_ids"]) + [float("nan") if x is None else float(x) for x in numbers]
        if self.max_length is not None:
            row = row[: self.max_length] if self.truncation_mode == "keep_start" else row[-self.max_length :]
        return torch.tensor(row, dtype=torch.float32)

    @staticmethod
    def _pack(batch: dict[str, Any]) -> dict[str, Any]:
        kept = batch.pop("attention_mask") != 0
        lengths = kept.sum(1)
        packed: dict[str, Any] = {}
        for name, value in batch.items():
            packed[name] = value[kept].unsqueeze(0) if value.shape == kept.shape else value
        positions = torch.arange(kept.shape[1]).expand(kept.shape)
        packed["position_ids"] = positions[kept].unsqueeze(0)
        packed["cu_seqlens"] = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return packed


class _Rows(NamedTuple):
    """A batch as the loss sees it.

    labels: int64 `[2B, T]` or `[1, N]`, aligned with the rows.
    token_weights: like them, or None.
    cu_seqlens: of a packed batch.
    batch: the same with LD-DPO folded in, for sums over sequences.
    """

    labels: Tensor
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    batch: Batch


def _one_on(per_token: Tensor) -> Tensor:
    """From numbers aligned with tokens to numbers aligned with the rows that predict them."""
    return nn.functional.pad(per_token[:, 1:], (0, 1))


class TokenDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer`, its per-token log-probs and losses computed here. Takes the same arguments and options.

    Per step it enters each model once, through `model(...)`; logits exist a chunk at a time, and only of tokens that
    count: prompt and padding cost nothing in the head. With the same options, data and seed, losses, metrics and
    parameters are those of TRL's trainer up to rounding. Beyond it:

    - `loss_type` may also be "tdpo1" and "tdpo2" (per-token KL to the reference), "simpo" (no reference is loaded), or
      a function of `qkernels.PairScores`; options through `TokenDPOConfig.loss_kwargs`.
    - Token weights: columns `chosen_token_weights` and `rejected_token_weights` of the data set, one number for each
      token of the answer as tokenised here (with the end-of-sequence token). A zero leaves the token out.
    - `padding_free=True`: the 2B sequences of a batch in one row, no padding. Needs a model that tells sequences apart
      by `position_ids` (attention does, state-space layers do not).
    - `precompute_ref_log_probs=True` keeps a log-prob for each token (columns `ref_chosen_token_logps` and
      `ref_rejected_token_logps`; NaN for tokens cut off), so that weights and `ld_alpha` may change afterwards. A data
      set that has these columns already is taken as it is.
    - LoRA on the head.
    - `label_smoothing` smooths `sigmoid` as well (cDPO; with a warning, since TRL ignores it there).
    - `on_token_results` sees the per-token results of every step.

    Metrics have TRL's names and meaning; averages over tokens are over the tokens that count (weight not 0). With TDPO,
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
        self._loss_options = _loss_options(args)
        self._head_options: dict[str, Any] = {
            "max_chunk_bytes": getattr(args, "max_chunk_bytes", None),
            "backend": getattr(args, "backend", "auto"),
        }
        plan = self._plan = objectives.resolve(
            *(self._loss_options[name] for name in ("loss_type", "loss_weights", "label_smoothing", "loss_kwargs"))
        )
        # SFT needs no reference for its loss, but TRL logs rewards with it.
        sft = any(term.name == "sft" for term, _, _ in plan.terms)
        wanted = sft or args.precompute_ref_log_probs or ref_model is not None
        self._reference_free = plan.reference_free and not wanted
        packed = bool(args.padding_free)
        self._check_options(args, data_collator)
        with Patch() as patch:
            patch.set(dpo_trainer, "add_fused_lm_head", functools.partial(add_token_head, **self._head_options))
            patch.set(
                dpo_trainer, "DataCollatorForPreference", functools.partial(TokenPreferenceCollator, packed=packed)
            )
            if hasattr(dpo_trainer, "BaseTunerLayer"):  # only where PEFT is installed
                patch.set(dpo_trainer, "BaseTunerLayer", NotOnTheHead)
            if packed:
                patch.set(args, "padding_free", False)  # TRL would warn that it does not pack
            if self._reference_free:
                # TRL loads the policy, if it is given by name, and then the reference.
                load = [dpo_trainer.create_model_from_path] if isinstance(model, str) else []
                patch.set(dpo_trainer, "create_model_from_path", lambda *a, **k: load.pop()(*a, **k) if load else None)
            super().__init__(model, ref_model, args, data_collator, *others, **options)
        self.padding_free = packed
        self._check_model()

    # --- checks ----------------------------------------------------------------------------------------------------

    def _check_options(self, args: DPOConfig, data_collator: Any) -> None:
        """Refuse options that contradict each other, before anything is loaded."""
        if self._plan.needs_kl and args.precompute_ref_log_probs:
            raise ValueError(
                f"loss_type {args.loss_type} needs the whole distribution of the reference at every token, which"
                " precompute_ref_log_probs=True does not keep; set it to False"
            )
        if self._reference_free and args.sync_ref_model:
            raise ValueError(f"sync_ref_model=True has no meaning for loss_type {args.loss_type}: it has no reference")
        if args.padding_free and data_collator is not None and not getattr(data_collator, "packed", False):
            raise ValueError(
                "padding_free=True packs in the trainer's own collator, and a data_collator is given; leave it out, or"
                " give a TokenPreferenceCollator(..., packed=True)"
            )
        if args.label_smoothing and "sigmoid" in args.loss_type:
            warnings.warn(
                f"label_smoothing={args.label_smoothing} smooths the loss 'sigmoid' here (cDPO); TRL's own trainer"
                " ignores it there",
                stacklevel=3,
            )
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed ZeRO-3 shards the head's weight between forward and backward, which this trainer does not"
                " handle; use ZeRO-2, or FSDP"
            )

    def _check_model(self) -> None:
        """Refuse what only shows once model and data are there."""
        first = next(iter(self.train_dataset), None)
        if first is None:
            raise ValueError(
                f"train_dataset has no pair left: it was empty, or every prompt alone fills max_length="
                f"{self.args.max_length}, and such pairs are left out"
            )
        columns = first.keys()
        self._weighted = any(name in columns for name in WEIGHTS)
        if self._is_vision_dataset and (self._weighted or self.padding_free):
            what = "token weights" if self._weighted else "padding_free=True"
            raise ValueError(
                f"{what} and a vision data set do not go together: its answers are tokenised batch by batch"
            )
        if self._plan.needs_kl and self.ref_model is not None:
            check_same_shape_of_logits(self.model, self.ref_model)
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

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if not self._is_vision_dataset:
            self._signature_columns += [name for name in WEIGHTS + CACHES if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """A data set with the reference's log-prob of each token, as TRL makes one with sums over sequences."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "precompute_ref_log_probs=True needs a map-style Dataset, and the data set is an IterableDataset; set"
                " it to False"
            )
        if set(CACHES) <= set(dataset.column_names):
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
        caches = self._token_caches(dataset, name, batch_size, collator)
        if self.accelerator.is_main_process and not os.path.exists(cache_file):
            dataset.map(
                lambda _, index: {column: caches[column][index] for column in CACHES},
                with_indices=True,
                remove_columns=dataset.column_names,
                new_fingerprint=fingerprint[0],
                cache_file_name=cache_file,
                desc=f"Caching reference log probs for {name} dataset",
            )
        self.accelerator.wait_for_everyone()
        # A data set that was made in memory has its cache in a folder of each process' own.
        columns = Dataset.from_file(cache_file) if os.path.exists(cache_file) else Dataset.from_dict(caches)
        return concatenate_datasets([dataset, columns], axis=1)

    def _token_caches(
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
        caches: dict[str, list[list[float]]] = {column: [] for column in CACHES}
        hidden = bool(os.environ.get("TQDM_DISABLE", ""))
        for batch in tqdm(iterable=loader, desc=f"Computing reference log probs for {name} dataset", disable=hidden):
            lengths = batch.pop("answers")
            with self._as_reference():
                logps = self._reference_logps(model, batch, self._rows(batch).labels)
            # Aligned with the tokens again; the first token of a sequence has none.
            logps = nn.functional.pad(logps[:, :-1], (1, 0)).cpu()
            scored = (batch["completion_mask"] != 0).cpu()
            found: list[list[float]] = []
            for row, mask, length in zip(logps, scored, lengths.reshape(-1).tolist(), strict=True):
                kept = row[mask].tolist()
                missing = [float("nan")] * (length - len(kept))
                found.append(missing + kept if self.args.truncation_mode == "keep_end" else kept + missing)
            pairs = list(zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True))
            for pair in gather_object(pairs):
                for column, values in zip(CACHES, pair, strict=True):
                    caches[column].append(values)
        # Processes that ran out of examples were given the first ones again.
        return {column: values[: len(dataset)] for column, values in caches.items()}

    # --- the reference ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_reference(self) -> Any:
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
        call = HeadCall(["logps"], **self._head_options)
        with self.accelerator.autocast():  # while caches are made, accelerate has not wrapped the model yet
            logps = run(model, model_inputs(inputs), call, labels)["logps"]
        return logps[:, -labels.shape[1] :]

    def _reference(self, inputs: Mapping[str, Any], rows: _Rows) -> dict[str, Any]:
        """The reference as `linear_token_dpo` takes it."""
        if self._reference_free:
            return {"reference_logps": 0.0}
        if self.precompute_ref_logps:
            if "ref_token_logps" in inputs:
                return {"reference_logps": _one_on(inputs["ref_token_logps"])}
            if "ref_chosen_logps" in inputs:  # of a collator of the user's own
                return {"reference_logps": torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])}
            raise ValueError(
                "precompute_ref_log_probs=True, but the batch has no ref_token_logps: the data_collator has to pass"
                f" on the columns {CACHES} (TokenPreferenceCollator does)"
            )
        model = self.model if self.ref_model is None else self.ref_model
        with self._as_reference():
            if not self._plan.needs_kl:
                return {"reference_logps": self._reference_logps(model, inputs, rows.batch.labels)}
            hidden, weight, bias = hidden_and_head(model, model_inputs(inputs))
        return {"reference_hidden": hidden, "reference_weight": weight, "reference_bias": bias}

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The reference's log-probs of a batch, summed over each sequence with the weights of the loss: two `[B]`."""
        rows = self._rows(inputs)
        with self._as_reference():
            logps = self._reference_logps(model, inputs, rows.batch.labels)
        return rows.batch.sequences.sums(rows.batch.weights * logps).chunk(2)

    # --- the loss --------------------------------------------------------------------------------------------------

    def _rows(self, inputs: Mapping[str, Any]) -> _Rows:
        """Labels and weights of a batch, aligned with the rows of logits."""
        cu_seqlens = inputs.get("cu_seqlens")
        tokens, mask = inputs["input_ids"], inputs["completion_mask"]
        if cu_seqlens is None:
            labels = shift_labels(tokens, mask=mask)
        else:
            labels = shift_labels(tokens[0], mask=mask[0], cu_seqlens=cu_seqlens).unsqueeze(0)
        weights = inputs.get("token_weights")
        if weights is not None:
            weights = _one_on(weights)
        elif getattr(self, "_weighted", False):
            raise ValueError(
                f"the training data have columns {WEIGHTS}, but the batch has no token_weights: the evaluation data"
                " lack the columns, or the data_collator does not pass them on (TokenPreferenceCollator does)"
            )
        batch = Batch.of(labels, weights, cu_seqlens, self._plan, IGNORE, torch.float32)
        return _Rows(labels, weights, cu_seqlens, batch)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        rows = self._rows(inputs)
        packed = rows.cu_seqlens is not None

        def flat(per_token: Tensor | None) -> Tensor | None:
            return per_token.squeeze(0) if packed and per_token is not None else per_token

        reference = self._reference(inputs, rows)
        if isinstance(reference.get("reference_logps"), Tensor) and reference["reference_logps"].dim() == 2:
            reference["reference_logps"] = flat(reference["reference_logps"])
        if packed and "reference_hidden" in reference:
            reference["reference_hidden"] = reference["reference_hidden"].squeeze(0)
        outputs = _METRICS + (("kl_reference_policy",) if self._plan.needs_kl else ())
        call = HeadCall(
            outputs,
            loss=True,
            length=rows.labels.shape[1],
            token_weights=flat(rows.token_weights),
            cu_seqlens=rows.cu_seqlens,
            **reference,
            **self._loss_options,
            **self._head_options,
        )
        given = model_inputs(inputs)
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        result = run(model, given, call, rows.labels)
        loss = result["loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result["aux_loss"]
        results = self._token_results(mode, loss, result, rows)
        with torch.no_grad():
            self._log_metrics(mode, inputs, results, result, rows)
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

    def _token_results(self, mode: str, loss: Tensor, result: Mapping[str, Tensor], rows: _Rows) -> TokenResults:
        length = rows.labels.shape[1]

        def of(name: str) -> Tensor | None:
            value = result.get(name)
            return None if value is None else value[..., -length:].detach()  # without virtual tokens

        logps, reference = of("token_logps"), of("reference_token_logps")
        assert logps is not None
        shape = logps.shape  # [2B, T], or [N]
        return TokenResults(
            mode=mode,
            loss=loss.detach(),
            labels=rows.batch.labels.view(shape),
            token_weights=rows.batch.weights.view(shape),
            logps=logps,
            reference_logps=reference,
            token_rewards=None if reference is None else self.beta * log_ratios(logps, reference),
            logsumexp=of("logsumexp"),  # type: ignore[arg-type]
            entropy=of("entropy"),  # type: ignore[arg-type]
            kl_reference_policy=of("kl_reference_policy"),
            chosen_rewards=result["chosen_rewards"].detach(),
            rejected_rewards=result["rejected_rewards"].detach(),
            cu_seqlens=rows.cu_seqlens,
        )

    def on_token_results(self, results: TokenResults) -> None:
        """Called once per step, without gradients, with the per-token results of this process. Does nothing here.

        Override it to watch or keep them. What is added to `self._metrics[results.mode][name]`, a list of numbers, is
        averaged and logged with the other metrics.
        """

    def _log_metrics(
        self, mode: str, inputs: Mapping[str, Any], results: TokenResults, result: Mapping[str, Tensor], rows: _Rows
    ) -> None:
        """TRL's metrics under TRL's names; one exchange between processes for all of them."""
        batch, length = rows.batch, rows.labels.shape[1]
        used = batch.used
        per_sequence = batch.sequences.sums(used.double())
        chosen_tokens, rejected_tokens = (half.sum() for half in per_sequence.chunk(2))

        def sums(values: Tensor) -> tuple[Tensor, Tensor]:
            """Over the tokens of all chosen, and of all rejected answers."""
            values = values[..., -length:].reshape(used.shape).double()
            chosen, rejected = batch.sequences.sums(torch.where(used, values, 0.0)).chunk(2)
            return chosen.sum(), rejected.sum()

        entropy, logits, correct = (sums(result[name]) for name in _METRICS)
        sequence_logps = batch.sequences.sums(batch.weights * results.logps.reshape(used.shape)).double()
        chosen_logps, rejected_logps = (half.sum() for half in sequence_logps.chunk(2))
        chosen, rejected = results.chosen_rewards.double(), results.rejected_rewards.double()
        attended = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if attended is None else attended.sum()
        pairs = chosen.shape[0]
        collected = {
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
            "pairs": pairs,
            "tokens": tokens,
            "entropy": entropy[0] + entropy[1],
            "logits/chosen": logits[0],
            "logits/rejected": logits[1],
            "mean_token_accuracy": correct[0],
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        divisors = {
            "entropy": ("chosen_tokens", "rejected_tokens"),
            "logits/chosen": ("chosen_tokens",),
            "logits/rejected": ("rejected_tokens",),
            "mean_token_accuracy": ("chosen_tokens",),
        }
        if results.kl_reference_policy is not None:
            collected["kl/chosen"], collected["kl/rejected"] = sums(results.kl_reference_policy)
            divisors |= {"kl/chosen": ("chosen_tokens",), "kl/rejected": ("rejected_tokens",)}
        if self.aux_loss_enabled:
            collected["aux_loss"], collected["processes"] = result["aux_loss"], 1
            divisors["aux_loss"] = ("processes",)
        device = results.logps.device
        numbers = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in collected.values()])
        numbers = self.accelerator.gather(numbers.unsqueeze(0)).sum(0)
        total = dict(zip(collected, numbers.tolist(), strict=True))
        if mode == "train":
            self._total_train_tokens += int(total["tokens"]) // self._tp_size
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        for name in collected:
            if name in ("chosen_tokens", "rejected_tokens", "pairs", "tokens", "processes"):
                continue
            divisor = sum(total[count] for count in divisors.get(name, ("pairs",)))
            metrics[name].append(total[name] / divisor if divisor else 0.0)


# Options of the loss that TRL has a field for, by their names in `loss_kwargs`.
_FIELDS = {
    "ld_alpha": "ld_alpha",
    "use_weighting": "use_weighting",
    "f_divergence": "f_divergence_type",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "discopop_tau": "discopop_tau",
}


def _loss_options(args: Any) -> dict[str, Any]:
    """TRL's options of the loss, as `linear_token_dpo` takes them."""
    kwargs = dict(getattr(args, "loss_kwargs", None) or {})
    for name, option in _FIELDS.items():
        if name in kwargs:
            raise ValueError(f"loss_kwargs[{name!r}] is the option {option} of the configuration; set it there")
    if args.ld_alpha is not None:
        kwargs["ld_alpha"] = args.ld_alpha
    if args.use_weighting:
        kwargs["use_weighting"] = True
    if args.f_divergence_type != "reverse_kl":
        kwargs["f_divergence"] = args.f_divergence_type
    if args.f_divergence_type == "alpha_divergence":
        kwargs["f_alpha_divergence_coef"] = args.f_alpha_divergence_coef
    if "discopop" in args.loss_type:
        kwargs["discopop_tau"] = args.discopop_tau
    return {
        "beta": args.beta,
        "loss_type": list(args.loss_type),
        "loss_weights": args.loss_weights or None,
        "label_smoothing": args.label_smoothing,
        "loss_kwargs": kwargs,
    }


def _answer_lengths(examples: Sequence[Mapping[str, Any]]) -> Tensor:
    """Tokens of the chosen answers, then of the rejected ones, before truncation."""
    return torch.tensor([len(example[name]) for name in ("chosen_ids", "rejected_ids") for example in examples])
