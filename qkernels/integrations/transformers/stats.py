"""Per-token results of a model on a batch, and of a reference beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional.logits import shift_labels
from ...functional.results import Outputs, TokenStats
from .hook import run
from .parameters import HiddenAndHead, LogitsTransform, check_same_logits_transform, hidden_and_adapted_head
from .requests import HiddenStatesRequest, StatsRequest
from .wrappers import contains_fsdp, head_module, peft_wrapper, unwrap

# Entries of a batch that are about the loss and not for the model: those of TRL's preference collator, and of ours.
_NOT_INPUTS = ("labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "token_weights",
               "ref_token_logps", "cu_seqlens")  # fmt: skip


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that are for the model.

    Raises:
        TypeError: not a mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batch must be a mapping such as tokenizer(texts, return_tensors='pt') returns, with input_ids and"
            f" attention_mask; got {type(batch).__name__}"
        )
    return {name: value for name, value in batch.items() if name not in _NOT_INPUTS}


def batch_labels(
    batch: Mapping[str, Any],
    labels: Tensor | None = None,
    completion_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels `[B, T]` aligned with the rows (row t has token t + 1), from a batch of model inputs.

    Tokens to be scored, in this order of precedence: `labels`, or `batch["labels"]` (as transformers has them: aligned
    with the tokens, `ignore_index` for the others); otherwise `input_ids` where `completion_mask` (or
    `batch["completion_mask"]`), if there is one, and `attention_mask`, if there is one, are not 0, and whose
    predecessor is not padding. The first token of a sequence of a packed row is never scored; where sequences start is
    read from `cu_seq_lens_q`, or from `position_ids` that are 0.

    Raises:
        TypeError, ValueError: entries that are missing or do not fit each other.
    """
    if labels is None:
        labels = batch.get("labels")
    if completion_mask is None:
        completion_mask = batch.get("completion_mask")
    given = labels is not None
    if labels is None:
        labels = _labels_of_inputs(batch, completion_mask, ignore_index)
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape [B, T], got {tuple(labels.shape)}")
    ends, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    starts = None
    if ends is not None:
        starts = torch.isin(torch.arange(labels.shape[1], device=labels.device), ends.to(labels.device))
    elif not given and positions is not None and positions.shape == labels.shape:
        starts = positions == 0
    if starts is not None:
        labels = labels.masked_fill(starts, ignore_index)
    return shift_labels(labels, ignore_index=ignore_index)


def _labels_of_inputs(batch: Mapping[str, Any], completion_mask: Tensor | None, ignore_index: int) -> Tensor:
    """`input_ids` with `ignore_index` where the masks are 0, and at the first token after padding."""
    labels = batch.get("input_ids")
    if not isinstance(labels, Tensor):
        raise ValueError(f"the batch has neither labels nor input_ids; it has {sorted(map(str, batch))}")
    attention_mask = batch.get("attention_mask")
    if attention_mask is not None and attention_mask.shape == labels.shape:
        labels = labels.masked_fill(attention_mask == 0, ignore_index)
        labels[:, 1:] = labels[:, 1:].masked_fill(attention_mask[:, :-1] == 0, ignore_index)
    if completion_mask is not None:
        if completion_mask.shape != labels.shape:
            raise ValueError(
                f"completion_mask must have the shape of input_ids, {tuple(labels.shape)}, got"
                f" {tuple(completion_mask.shape)}"
            )
        labels = labels.masked_fill(completion_mask == 0, ignore_index)
    return labels


def compute_token_stats(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    outputs: Sequence[str] = ("logps", "logsumexp"),
    labels: Tensor | None = None,
    reference_model: nn.Module | None = None,
    temperature: float = 1.0,
    logits_dtype: str = "float32",
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Any subset of the per-token results of a model on a batch, differentiable, without storing logits.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. It is called
            once.
        batch: what the model takes (input_ids `[B, T]`, attention_mask, ...), and optionally labels or
            completion_mask, which say what tokens to score; see `batch_labels`.
        outputs: names of fields of `qkernels.TokenStats`.
        labels: `[B, T]` int64, aligned with the tokens, instead of `batch["labels"]`.
        reference_model: for the outputs that compare with a reference: another model with the same vocabulary, softcap
            and logit scale, or `model` itself if it is a PEFT model, whose adapter is then switched off. It is called
            without gradients.
        temperature, logits_dtype, max_chunk_bytes, backend: as in `qkernels.linear_token_stats`.
        ignore_index: the label that marks a token as not to be scored.

    Returns:
        `TokenStats` of `[B, T]` tensors: entry t belongs to token t + 1, as row t of the logits does; 0 where nothing
        is scored.

    Raises:
        TypeError, ValueError: what cannot be done; the message names the argument.
        IndexError: a label outside the vocabulary.
    """
    inputs = model_inputs(batch)
    Outputs.of(outputs, "reference_model", reference_model is not None)
    aligned = batch_labels(batch, labels, ignore_index=ignore_index)
    request = StatsRequest(
        tuple(outputs),
        reference=None if reference_model is None else reference_rows(reference_model, inputs, model),
        options={
            "temperature": temperature,
            "logits_dtype": logits_dtype,
            "ignore_index": ignore_index,
            "max_chunk_bytes": max_chunk_bytes,
            "backend": backend,
        },
    )
    stats = run(model, inputs, request, aligned).stats
    assert stats is not None
    length = aligned.shape[1]  # prompt-learning PEFT puts virtual tokens in front
    return TokenStats(*(None if values is None else values[:, -length:] for values in stats))


def compute_token_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    logits_dtype: str = "float32",
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each token of a batch under a model, differentiable, without storing logits.

    Args:
        As `compute_token_stats`.

    Returns:
        `[B, T]` fp32, nats: entry t is log pi(token t + 1 | tokens up to t); 0 where nothing is scored.

    Raises:
        As `compute_token_stats`.
    """
    stats = compute_token_stats(
        model,
        batch,
        outputs=("logps",),
        labels=labels,
        temperature=temperature,
        logits_dtype=logits_dtype,
        ignore_index=ignore_index,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
    )
    assert stats.logps is not None
    return stats.logps


# --- hidden states and references ----------------------------------------------------------------------------------


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The hidden states that a model's head gets, for all positions; the logits are not computed.

    They are after the final norm and whatever else the model does before its head. One call of `model(**inputs)`,
    through all its wrappers, with `use_cache=False` where the model knows it. Gradients flow as in any forward.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile.
        inputs: what the model takes: input_ids `[B, T]`, attention_mask, pixel_values ...; no labels.

    Returns:
        `[B, T, H]` in the dtype that the model computes in. (A prompt-learning PEFT method adds its virtual tokens in
        front.) With `head_parameters(model)` they give the logits, but for LoRA dropout on the head.

    Raises:
        TypeError, ValueError: not such a model; a head that is not known here (the message says what to do).
    """
    if "labels" in inputs:
        raise ValueError("hidden_states takes no labels; give them to linear_token_logps, shifted with shift_labels")
    hidden = run(model, inputs, HiddenStatesRequest()).hidden
    assert hidden is not None
    return hidden


def hidden_and_head(model: nn.Module, inputs: Mapping[str, Any]) -> HiddenAndHead:
    """Hidden states, weight and bias of a model as it is now, without gradients, for use as a reference."""
    causal = unwrap(model)
    with torch.no_grad():
        if contains_fsdp(model):  # which frees the gathered head when the forward ends
            copies = run(model, inputs, HiddenStatesRequest(copy_head=True))
            assert copies.hidden is not None and copies.weight is not None
            return HiddenAndHead(copies.hidden, copies.weight, copies.bias)
        found = hidden_and_adapted_head(head_module(causal), hidden_states(model, **inputs))
    return found.truncated(LogitsTransform.of(causal).vocab_size).detached()


def reference_rows(reference_model: nn.Module, inputs: Mapping[str, Any], model: nn.Module) -> HiddenAndHead:
    """Hidden states `[B, T, H]`, weight and bias of a reference, without gradients.

    Args:
        reference_model: another model, or `model` itself with its PEFT adapter, which is switched off.
        inputs: what the model takes.
        model: the policy, whose softcap and logit scale the reference must share.

    Raises:
        ValueError: `model` itself without a PEFT adapter; another softcap, logit scale or vocabulary size.
    """
    adapter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if reference_model is model:
        peft = peft_wrapper(model)
        if peft is None:
            raise ValueError(
                "reference_model is model itself, which has no PEFT adapter to switch off; pass a frozen copy"
            )
        adapter = peft.disable_adapter()  # type: ignore[operator]
    check_same_logits_transform(model, reference_model)
    with adapter:
        return hidden_and_head(reference_model, inputs)
