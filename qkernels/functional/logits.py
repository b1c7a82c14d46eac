"""The public functions on logits. Each builds a request by keyword and reads as: validate, agree, run, assemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd.logits import KnownLoss, LossOfLogits
from ..backends import ops
from ..core import checks
from ..core.calls import PairLoss
from ..core.compile import eager_with_groups
from ..core.fields import BIT, DIFFERENTIABLE, SOFTMAX, field_index, stats_dtype
from ..distributed.fingerprint import Fingerprint
from ..objectives import LossType
from . import preference
from .preference import Batch, Loss, LossRequest, Reference
from .results import Outputs, TokenDPOOutput, TokenStats
from .rows import Rows, RowsRequest


def shift_labels(
    labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Align token ids with the rows of logits that predict them: row t gets token t + 1, the last row `ignore_index`.

    Shifting the labels (a small tensor) and leaving the logits whole saves the copy that `logits[:, :-1]` costs in its
    backward.

    Args:
        labels: int64 `[..., T]` token ids (or labels with `ignore_index` in place), or packed `[N]`.
        mask: same shape, bool or integer; tokens where it is 0 (prompt, padding) become `ignore_index`. It is
            aligned with the tokens, as `labels` is before the shift.
        cu_seqlens: `[2B + 1]`, for packed labels: no sequence's last row gets the next sequence's first token.
        ignore_index: the label that marks a row to be left out.

    Returns:
        int64, shaped like `labels`.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    labels = checks.tensor(labels, "labels")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.dim() == 0:
        raise ValueError("labels must have a time dimension, got a scalar")
    ignore_index = checks.ignore_index(ignore_index)
    if mask is not None:
        mask = checks.tensor(mask, "mask")
        if mask.shape != labels.shape:
            raise ValueError(f"mask must have the shape of labels, {tuple(labels.shape)}, got {tuple(mask.shape)}")
        checks.same_device(mask, "mask", labels, "labels")
        labels = labels.masked_fill(mask == 0, ignore_index)
    if labels.shape[-1] == 0:  # there is no last row to be padded
        return labels.clone()
    shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if cu_seqlens is not None:
        cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
        # Rows before a boundary. (Not torch.isin, which sorts where there are many and makes the host wait for a GPU.
        # There boundaries are not checked, and one out of range must not end the process.)
        rows = labels.shape[0]
        ends = torch.zeros(rows + 1, dtype=torch.bool, device=labels.device)
        ends[cu_seqlens.long().clamp(0, rows)] = True
        shifted = shifted.masked_fill(ends[1:], ignore_index)
    return shifted


def _with_logsumexp(fields: int) -> tuple[int, int]:
    """These fields and the log-sum-exp, and where that lies."""
    fields |= BIT["logsumexp"]
    return fields, field_index(fields, "logsumexp")


# The fields of default DPO: with cached log-probs of the reference, and with its logits.
_DEFAULT = _with_logsumexp(SOFTMAX)
_DEFAULT_WITH_MODEL = _with_logsumexp(SOFTMAX | BIT["reference_logps"])
_LOGPS = field_index(SOFTMAX, "logps")
_REFERENCE_LOGPS = field_index(SOFTMAX | BIT["reference_logps"], "reference_logps")


@eager_with_groups
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), differentiable, one read of the logits.

    Args:
        logits: `[..., V]` fp32, bf16, fp16 or fp64; last dimension contiguous, any strides before it.
        labels: `[...]` int64, aligned with the rows (see `shift_labels`); rows with `ignore_index` are not read.
        temperature: divides the logits; above 0.
        ignore_index: the label that marks a row to be left out.
        inplace_backward: let the backward write dL/dlogits over `logits`' own storage, which saves a tensor of their
            size. A second backward, or using the logits again, raises.
        backend: "auto", or by name; `qkernels.info()` lists what can run.
        tp_group: process group (or 1-D `DeviceMesh`) over whose ranks, in their order, the vocabulary is split: each
            passes its columns of the logits and the same labels (of the whole vocabulary), and gets the results of
            the whole rows. Logits that are a DTensor sharded in their last dimension over a 1-D mesh imply their
            group. See docs/scaling.md.

    Returns:
        `[...]` fp32 (fp64 for fp64 logits), nats; 0 at ignored rows. -inf for a label whose logit is -inf; NaN for a
        row with a NaN or nothing but -inf, in that row alone.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, stride or option; the message names it.
        ValueError, RuntimeError: ranks of a group that disagree, or one that failed; on every rank.
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
        RuntimeError: logits that an earlier in-place backward has overwritten.
    """
    request, agreement = RowsRequest(
        function="token_logps",
        name="logits",
        logits=logits,
        labels=labels,
        reference_logits=None,
        temperature=temperature,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
        tp_group=tp_group,
    ).local()
    with agreement as ranks:
        rows = request.validate().agree(ranks, request.function)
    return rows.stats(BIT["logps"], ("logps",))["logps"].view(rows.shape)


@eager_with_groups
def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    reference_logits: Tensor | None = None,
    outputs: Sequence[str] = ("logps", "logsumexp"),
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
) -> TokenStats:
    """Any subset of the per-token numbers of a policy (and its reference) in one pass over the logits.

    Args:
        logits: `[..., V]`, as in `token_logps`.
        labels: `[...]` int64, as in `token_logps`.
        reference_logits: `[..., V]`, any floating dtype; a constant. Needed by the KLs and the reference's outputs.
        outputs: names of fields of `TokenStats`; only these are computed, the others are None.
        temperature, ignore_index, inplace_backward, backend, tp_group: as in `token_logps`; the temperature divides
            the reference's logits too, and their columns are split like the policy's.

    Returns:
        `TokenStats`: fp32 (fp64 for fp64 logits) tensors shaped like `labels`, `is_top1` bool; 0 at ignored rows.

    Raises:
        As `token_logps`; ValueError for an unknown output, for one that needs a reference when there is none, and for
        a reference that no output reads.
    """
    request, agreement = RowsRequest(
        function="token_stats",
        name="logits",
        logits=logits,
        labels=labels,
        reference_logits=reference_logits,
        temperature=temperature,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
        tp_group=tp_group,
    ).local()
    with agreement as ranks:
        wanted = Outputs.of(outputs, "reference_logits", reference_logits is not None)
        rows = request.validate().agree(ranks, request.function, None if ranks is None else wanted.fingerprint())
    differentiable = tuple(name for name in DIFFERENTIABLE if name in wanted.names)
    return TokenStats.of(rows.stats(wanted.fields, differentiable), wanted.names, rows.shape)


@eager_with_groups
def fused_token_dpo(
    policy_logits: Tensor,
    labels: Tensor,
    *,
    reference_logits: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> TokenDPOOutput:
    """A preference loss from logits, with the reward of every token ("From r to Q*", eqs. 9 and 11).

    The first B sequences are chosen, the last B rejected. Forward reads each logit once; backward reads and writes
    each once; nothing of the logits' size is stored.

    Args:
        policy_logits: `[2B, T, V]`, or packed `[N, V]` with `cu_seqlens`; fp32, bf16, fp16 or fp64.
        labels: int64 `[2B, T]` or `[N]`, aligned with the rows (see `shift_labels`); `ignore_index` marks prompt and
            padding, which cost nothing.
        reference_logits: like `policy_logits`, any floating dtype; a constant.
        reference_logps: instead of reference logits, cached log-probs: per token, shaped like `labels`, or per
            sequence, `[2B]` (sums made with the same weights, taken as they are; a packed batch whose N is 2B is read
            as per token). 0.0 states "reference-free".
        beta: strength of the KL constraint; above 0.
        loss_type: a name of `qkernels.objectives.OBJECTIVES`, a callable on `PairScores`, or a list of them.
        loss_weights: with a list, one factor each (MPO).
        label_smoothing: for the losses that have it.
        loss_kwargs: options of the loss: `ld_alpha`, `use_weighting` (WPO), `f_divergence`, `discopop_tau`, `gamma` ...
        token_weights: floating point, shaped like `labels`; factor of each token in its sequence's sums, 0 or more. A
            zero weight is an ignored row.
        cu_seqlens: int32 `[2B + 1]`, sequence boundaries of a packed batch.
        temperature: divides both models' logits.
        reduction: "mean" or "sum" over pairs, or "none" for `[B]`.
        ignore_index, inplace_backward, backend, tp_group: as in `token_logps`.
        sp_group: process group over whose ranks the positions of every sequence are split: each passes its own rows
            of the same 2B sequences (`[2B, T_local, ...]`, T_local may differ, or packed), and gets the loss of the
            whole sequences with the gradient of its own rows. Parameters' gradients are to be summed over its ranks.

    Returns:
        `TokenDPOOutput`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, stride, option or combination; the message names it.
        ValueError, RuntimeError: ranks of a group that disagree, or one that failed; on every rank.
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
        RuntimeError: logits that an earlier in-place backward has overwritten.
    """
    request = RowsRequest(
        function="fused_token_dpo",
        name="policy_logits",
        logits=policy_logits,
        labels=labels,
        reference_logits=reference_logits,
        temperature=temperature,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
        tp_group=tp_group,
        sp_group=sp_group,
    )
    wanted = LossRequest(
        reference_logps=reference_logps,
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        loss_kwargs=loss_kwargs,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        reduction=reduction,
        policy_name="policy_logits",
        model_name="reference_logits",
    )
    return _loss(request, wanted)


def _loss(request: RowsRequest, wanted: LossRequest) -> TokenDPOOutput:
    """Validate, agree with the ranks if there are any, run and assemble."""
    request, agreement = request.local()
    has_model = request.reference_logits is not None
    with agreement as ranks:
        checks.dense_or_packed(request.logits, request.name, "V", packed=wanted.cu_seqlens is not None)
        loss = wanted.loss()
        rows = request.validate()
        options: Fingerprint | None = None
        if ranks is not None:
            options = loss.fingerprint(wanted.cu_seqlens is not None, has_model)
            rows = rows.agree(ranks, request.function, options, wanted.shared_tensors())
        dtype = stats_dtype(rows.logits.dtype)
        inputs = wanted.inputs(loss, request.labels, has_model, dtype, rows.ignore_index)
        shard = None
        if ranks is not None:
            shard = ranks.sequence_shard(inputs.sequences, dtype, options)
    fused = loss.is_fused and ranks is None
    if fused and inputs.weights is None and loss.spec.ld_alpha is None:
        return _fused_loss(rows, loss, inputs.reference, None, inputs.cu_seqlens)
    batch = Batch.of(
        rows.labels,
        inputs.weights,
        inputs.cu_seqlens,
        spec=loss.spec,
        ignore_index=rows.ignore_index,
        dtype=dtype,
        shard=shard,
    )
    rows = rows._replace(labels=batch.labels)
    if fused:
        return _fused_loss(rows, loss, inputs.reference, batch.weights, batch.cu_seqlens)
    stats = rows.stats(loss.fields(has_model), loss.differentiable)
    return preference.loss_and_rewards(stats, batch, inputs.reference, loss, rows.backend, shape=rows.shape)


def _fused_loss(
    rows: Rows, loss: Loss, reference: Reference, weights: Tensor | None, cu_seqlens: Tensor | None
) -> TokenDPOOutput:
    """DPO with a mean over pairs: two operations and nothing between them. Without weights tokens count 1 each.

    Two kernels in the forward (three where few rows are spread over many programs), one in the backward.
    """
    has_model = rows.reference is not None
    fields, logsumexp = _DEFAULT_WITH_MODEL if has_model else _DEFAULT
    call = rows.call(fields)
    stats = ops.row_stats(call)
    logps = stats[_LOGPS]
    total, rewards, gradient, tokens = ops.pair_loss(
        PairLoss(
            logps=logps,
            reference_logps=stats[_REFERENCE_LOGPS] if has_model else reference.given,
            labels=rows.labels,
            weights=weights,
            cu_seqlens=cu_seqlens,
            beta=loss.beta,
            label_smoothing=loss.spec.label_smoothing,
            ignore_index=rows.ignore_index,
            backend=rows.backend,
        )
    )
    if rows.logits.requires_grad and torch.is_grad_enabled():
        total = LossOfLogits.apply(rows.logits, call, KnownLoss(total, gradient, stats), rows.inplace)
    by_name = {"logps": logps, "logsumexp": stats[logsumexp]}
    return preference.assemble(total, rewards, by_name, preference.halves(tokens), rows.shape)
