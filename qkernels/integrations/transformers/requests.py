"""What one call of a model computes at its head, and the result.

A request enters through the model's wrappers with the other inputs, and the result leaves through them as the model's
output. Wrappers treat the tensors that they find on the way: FSDP with mixed precision rounds inputs, accelerate turns
16-bit outputs into fp32, DDP and FSDP prepare the backward of every output. So

- a request travels inside a `HeadCall`, an object of a plain class, in which no wrapper looks for tensors: log-probs of
  a reference must not be rounded to bf16 on their way in;
- the result is a `HeadResult`, a named tuple of tensors and named tuples, in which all of them find every tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...functional.hidden import linear_token_dpo, linear_token_stats
from ...functional.policy import fused_linear_policy_loss
from ...functional.policy_loss import PolicyOutput
from ...functional.results import TokenDPOOutput, TokenStats
from ...functional.sequence_loss import SequenceOutput
from ...functional.unpaired import fused_linear_sequence_loss
from .parameters import HiddenAndHead, LogitsTransform


@dataclass(frozen=True)
class HiddenStatesRequest:
    """The hidden states that the head gets.

    copy_head: also copies of weight and bias, as they are while the model runs. (FSDP frees them afterwards.)
    """

    copy_head: bool = False


@dataclass(frozen=True)
class StatsRequest:
    """Per-token results.

    outputs: names of fields of `TokenStats`.
    reference: of the outputs that compare with a reference.
    fp32: run the head in fp32, outside autocast.
    options: further keyword arguments of `linear_token_stats`: temperature, ignore_index, detached, backend ...
    """

    outputs: tuple[str, ...]
    reference: HiddenAndHead | None = None
    fp32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossRequest:
    """A preference loss, and per-token results of the policy from the same pass.

    length: positions of a sequence (of the packed row) as the caller has them. PEFT's prompt methods put virtual tokens
        in front, and the hidden states have more.
    outputs: names of fields of `TokenStats`.
    mean_logits: also the mean logit of every row, scored or not.
    token_weights: `[2B, T]`, or packed `[N]`.
    cu_seqlens: int32 `[2B + 1]`, boundaries of the sequences of a packed row, or of all rows one after another; None
        for a padded batch.
    reference: the reference model's hidden states and head, or
    reference_logps: its log-probs, `[2B, T]`, packed `[N]`, or sums `[2B]`; 0.0 for a loss without reference.
    options: further keyword arguments of `linear_token_dpo`: beta, loss_type, loss_weights, label_smoothing,
        loss_kwargs, max_chunk_bytes, backend.
    """

    length: int
    outputs: tuple[str, ...] = ()
    mean_logits: bool = False
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reference: HiddenAndHead | None = None
    reference_logps: Tensor | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitLossRequest:
    """A policy loss, or a loss on sequences that are not paired.

    kind: "policy" for `fused_linear_policy_loss`, "sequence" for `fused_linear_sequence_loss`.
    length: positions of a sequence as the caller has them, as in `LossRequest`.
    fp32: run the head in fp32, outside autocast.
    arguments: further arguments of that function; per-token tensors are `[B, T]`.
    """

    kind: str
    length: int
    fp32: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


HeadRequest: TypeAlias = HiddenStatesRequest | StatsRequest | LossRequest | UnitLossRequest


class HeadCall:
    """A request as the keyword `qkernels` of a model's forward; see the top of this file for why it is wrapped up."""

    def __init__(self, request: HeadRequest):
        self.request = request


class HeadResult(NamedTuple):
    """What a request gave; None for what it did not ask for.

    hidden: `[B, T, H]`, of `HiddenStatesRequest`.
    weight, bias: copies of the head's, with `copy_head`.
    stats: the outputs of `StatsRequest` and `LossRequest`, `[B, T]` or packed `[N]` each.
    loss, mean_logits: of `LossRequest`; the latter fp32 `[B, T]`.
    unit_loss: of `UnitLossRequest`.
    aux_loss: `[]`, the load-balancing loss of a mixture of experts.
    head_probe: `[]`, a value that depends on the head's parameters, with `HiddenStatesRequest`. The caller applies them
        outside of the model; an output that depends on them keeps DDP from taking them for unused.
    sentinel_logits: `[1, 1, V]`, what the model made of `HeadHook.sentinel_logits`; None once they are verified.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    stats: TokenStats | None = None
    loss: TokenDPOOutput | None = None
    mean_logits: Tensor | None = None
    unit_loss: PolicyOutput | SequenceOutput | None = None
    aux_loss: Tensor | None = None
    head_probe: Tensor | None = None
    sentinel_logits: Tensor | None = None


def compute_at_head(
    request: HeadRequest, hidden: Tensor, head: HiddenAndHead, labels: Tensor | None, transform: LogitsTransform
) -> HeadResult:
    """Compute what was requested, inside the model's forward.

    Args:
        hidden: `[B, T, H]`, what the model passes to its head.
        head: the same with the head's weight and bias, LoRA included.
        labels: `[B, T]`, aligned with the rows; no use with `HiddenStatesRequest`. The results are on their device,
            which is another than the head's where a model is spread over several (`device_map`).
        transform: what the model does to its logits.

    Raises:
        ValueError: labels that do not fit the hidden states; as `linear_token_stats` and `linear_token_dpo`.
    """
    if isinstance(request, HiddenStatesRequest):
        if request.copy_head:
            bias = None if head.bias is None else head.bias.clone()
            return HeadResult(hidden=head.hidden, weight=head.weight.clone(), bias=bias)
        return HeadResult(hidden=hidden, head_probe=_head_probe(head))
    if labels is None or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"one label for each of the {tuple(hidden.shape[:-1])} positions is expected, got"
            f" {None if labels is None else tuple(labels.shape)}"
        )
    if labels.device == head.hidden.device:
        return _results(request, head, labels, transform)
    there = on_device(request, head.hidden.device)
    result: HeadResult = on_device(_results(there, head, labels.to(head.hidden.device), transform), labels.device)
    return result


def _results(
    request: StatsRequest | LossRequest | UnitLossRequest, head: HiddenAndHead, labels: Tensor,
    transform: LogitsTransform,
) -> HeadResult:  # fmt: skip
    if isinstance(request, LossRequest):
        return _loss(request, head, labels, transform)
    if isinstance(request, UnitLossRequest):
        return _unit_loss(request, head, labels, transform)
    return HeadResult(stats=_stats(request, head, labels, transform))


def on_device(value: Any, device: torch.device) -> Any:
    """Requests, results and what they are made of, with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        items = [on_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, Mapping):
        return {name: on_device(item, device) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_device(getattr(value, f.name), device) for f in fields(value)})
    return value


def _head_probe(head: HiddenAndHead) -> Tensor | None:
    if not torch.is_grad_enabled():
        return None
    entries = [p.reshape(-1)[0] for p in (head.weight, head.bias) if p is not None and p.requires_grad]
    return torch.stack([entry.float() for entry in entries]).sum() if entries else None


def _reference_arguments(reference: HiddenAndHead | None) -> dict[str, Any]:
    if reference is None:
        return {}
    return {
        "reference_hidden": reference.hidden,
        "reference_weight": reference.weight,
        "reference_bias": reference.bias,
    }


def _in_fp32(head: HiddenAndHead) -> tuple[HiddenAndHead, contextlib.AbstractContextManager[Any]]:
    """Hidden states and head in fp32, and the context in which autocast leaves them so."""
    hidden, weight, bias = head
    wide = HiddenAndHead(hidden.float(), weight.float(), None if bias is None else bias.float())
    return wide, torch.autocast(hidden.device.type, enabled=False)


def _stats(request: StatsRequest, head: HiddenAndHead, labels: Tensor, transform: LogitsTransform) -> TokenStats:
    (hidden, weight, bias), autocast = _in_fp32(head) if request.fp32 else (head, contextlib.nullcontext())
    with autocast:
        return linear_token_stats(
            hidden,
            weight,
            labels,
            bias=bias,
            outputs=request.outputs,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
            **_reference_arguments(request.reference),
            **request.options,
        )


def _loss(request: LossRequest, head: HiddenAndHead, labels: Tensor, transform: LogitsTransform) -> HeadResult:
    hidden = head.hidden
    virtual_tokens = labels.shape[1] - request.length

    def padded(value: Any) -> Any:
        """Zeros for the virtual tokens in front of per-token values `[2B, T]`."""
        if virtual_tokens and isinstance(value, Tensor) and value.dim() == 2:
            return nn.functional.pad(value, (virtual_tokens, 0))
        return value

    if request.cu_seqlens is not None:
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
    output, stats = linear_token_dpo(
        hidden,
        head.weight,
        labels,
        lm_head_bias=head.bias,
        outputs=request.outputs,
        token_weights=padded(request.token_weights),
        cu_seqlens=request.cu_seqlens,
        reference_logps=padded(request.reference_logps),
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        **_reference_arguments(request.reference),
        **request.options,
    )
    # A plain tuple of tensors: wrappers rebuild it field by field, and would lose the attribute `plan`.
    means = _mean_logits(head, transform) if request.mean_logits else None
    return HeadResult(stats=stats, loss=TokenDPOOutput(*output), mean_logits=means)


@torch.no_grad()
def _mean_logits(head: HiddenAndHead, transform: LogitsTransform) -> Tensor:
    """The mean logit of every row, `[B, T]`: without a softcap from the mean row of the head, with one from logits."""
    hidden, weight, bias = head
    if transform.softcap is None and not hasattr(weight, "to_local"):
        with torch.autocast(hidden.device.type, enabled=False):
            means = hidden.float() @ weight.mean(0, dtype=torch.float32)
        means = means if bias is None else means + bias.mean(dtype=torch.float32)
        return means * transform.logit_scale
    every = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    found = _stats(StatsRequest(("mean_logits",)), head, every, transform).mean_logits
    assert found is not None
    return found


def _unit_loss(request: UnitLossRequest, head: HiddenAndHead, labels: Tensor, transform: LogitsTransform) -> HeadResult:
    virtual_tokens = labels.shape[1] - request.length
    function: Any = fused_linear_policy_loss if request.kind == "policy" else fused_linear_sequence_loss
    given: dict[str, Any] = {
        name: nn.functional.pad(value, (virtual_tokens, 0))
        if virtual_tokens and isinstance(value, Tensor) and value.shape[1:] == (request.length,)
        else value
        for name, value in request.arguments.items()
    }
    (hidden, weight, bias), autocast = _in_fp32(head) if request.fp32 else (head, contextlib.nullcontext())
    with autocast:
        output = function(
            hidden, weight, labels, bias=bias, softcap=transform.softcap, logit_scale=transform.logit_scale, **given
        )
    # As above: a plain tuple of tensors.
    return HeadResult(unit_loss=(PolicyOutput if request.kind == "policy" else SequenceOutput)(*output))
