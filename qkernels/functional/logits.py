"""The public functions on logits: check arguments, choose a backend, run the row operations, assemble the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, objectives
from ..autograd.logits import DefaultLoss, RowStats, refuse_overwritten
from ..autograd.saved import by_name
from ..core import checks
from ..core.columns import (
    BIT,
    DIFFERENTIABLE,
    NEEDS_REFERENCE,
    REFERENCE_STATE,
    STATE,
    RowConfig,
    bits,
    column_index,
    stats_dtype,
)
from ..core.compile import eager_with_groups
from ..distributed import groups, vocab_parallel
from ..distributed.groups import Ranks
from ..distributed.vocab_parallel import Shard
from ..objectives import LossType
from . import preference
from .preference import Batch, Reference, TokenDPOOutput


class TokenStats(NamedTuple):
    """Per-token results of `token_stats`, each shaped like `labels`; None where not asked for.

    logps: log pi(label), nats. Differentiable.
    logsumexp: log sum exp(logits / temperature), nats; V(s) = beta * logsumexp. Differentiable.
    entropy: of pi, nats. Differentiable.
    kl_reference_policy: KL(pi_ref || pi), nats. Differentiable in the policy.
    kl_policy_reference: KL(pi || pi_ref), nats. Differentiable in the policy.
    log_sum_sq_probs: log sum pi^2, as WPO uses it.
    mean_logits: mean over the vocabulary of logits / temperature.
    is_top1: bool, whether the label has the largest logit (the first of equals).
    reference_logps, reference_logsumexp: the same of the reference.
    """

    logps: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    kl_reference_policy: Tensor | None = None
    kl_policy_reference: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    reference_logps: Tensor | None = None
    reference_logsumexp: Tensor | None = None


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
    shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if cu_seqlens is not None:
        cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
        rows_of_batch = torch.arange(1, labels.shape[0] + 1, device=labels.device)
        shifted = shifted.masked_fill(torch.isin(rows_of_batch, cu_seqlens), ignore_index)
    return shifted


class _Rows(NamedTuple):
    """A checked call on logits: `[S, T, V]` views and how to run on them."""

    logits: Tensor
    labels: Tensor
    reference: Tensor | None
    shape: torch.Size  # of the caller's labels
    temperature: float
    ignore_index: int
    inplace: bool
    backend: str
    shard: Shard | None

    def differentiable(self) -> bool:
        """Whether a gradient may be asked for."""
        return self.logits.requires_grad and torch.is_grad_enabled()

    def stats(self, columns: int, carrying: tuple[str, ...]) -> dict[str, Tensor]:
        """Run `row_stats` with autograd for the columns named in `carrying`; all columns by name, `[S, T]`."""
        differentiable = bool(carrying) and self.differentiable()
        if differentiable:
            columns |= STATE
            if columns & (BIT["kl_reference_policy"] | BIT["kl_policy_reference"]):
                columns |= REFERENCE_STATE
        config = RowConfig(columns, self.temperature, self.ignore_index, self.backend)
        if differentiable:
            args = (self.logits, self.labels, self.reference, config, self.inplace, carrying, self.shard)
            return by_name(columns, carrying, RowStats.apply(*args))
        stats = vocab_parallel.row_stats(self.logits, self.labels, self.reference, config, self.shard)
        return by_name(columns, (), (stats,))


def _prepare(
    logits: Any,
    name: str,
    labels: Any,
    reference_logits: Any,
    temperature: Any,
    ignore_index: Any,
    inplace_backward: Any,
    backend: str,
    ranks: Ranks | None,
    equal: dict[str, Any],
    agreed: dict[str, Any],
) -> _Rows:
    """Check what all functions on logits share, and view the logits as `[S, T, V]`.

    Args (the last two matter with `ranks` only):
        ranks: those to agree with.
        equal: tensors that all ranks of `tp_group` have to have alike, besides the labels.
        agreed: what else has to be the same there.
    """
    logits = checks.logits(logits, name)
    refuse_overwritten(logits, name)
    labels = checks.labels(labels, logits, name)
    reference = None if reference_logits is None else checks.reference_logits(reference_logits, logits, name)
    if reference is not None:
        refuse_overwritten(reference_logits, "reference_logits")
    checked = _Rows(
        _as_3d(logits, name),
        _as_2d(labels),
        None if reference is None else _as_3d(reference, "reference_logits"),
        labels.shape,
        checks.positive(temperature, "temperature"),
        checks.ignore_index(ignore_index),
        checks.inplace(inplace_backward, logits, name, {"reference_logits": reference}),
        backends.resolve(backend, logits),
        None,
    )
    if ranks is not None:
        agreed = agreed | {
            "dtype of the results": stats_dtype(logits.dtype),
            "a reference": reference is not None,
            "temperature, ignore_index": (temperature, ignore_index),
        }
        shard = vocab_parallel.agree(ranks, logits.shape[-1], labels, checked.ignore_index, equal, agreed)
        if shard is None:  # the backend would see them too late for the other ranks of sp_group
            checks.label_range(labels, logits.shape[-1], checked.ignore_index)
        checked = checked._replace(shard=shard)
    return checked


def _as_3d(logits: Tensor, name: str) -> Tensor:
    if logits.dim() == 3:
        return logits
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    try:
        return logits.view(logits.shape[0], math.prod(logits.shape[1:-1]), logits.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"the row dimensions of {name} {tuple(logits.shape)} with strides {tuple(logits.stride())} do not merge;"
            f" use {name}.contiguous()"
        ) from None


def _as_2d(per_row: Tensor) -> Tensor:
    if per_row.dim() <= 2:
        return (per_row if per_row.dim() == 2 else per_row.unsqueeze(0)).contiguous()
    return per_row.reshape(per_row.shape[0], math.prod(per_row.shape[1:])).contiguous()


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
    tp_group, hint, (logits, labels) = groups.to_local(tp_group, logits=(logits, -1), labels=(labels, None))
    with groups.ranks(tp_group, None, logits, hint) as ranks:
        call = _prepare(
            logits, "logits", labels, None, temperature, ignore_index, inplace_backward, backend,
            ranks, {}, {"the call": "token_logps"},
        )  # fmt: skip
    return call.stats(BIT["logps"], ("logps",))["logps"].view(call.shape)


def check_outputs(outputs: Any, reference_name: str, has_reference: bool) -> tuple[tuple[str, ...], int]:
    """Names of fields of `TokenStats`, and the columns that hold them."""
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names, got the string {outputs!r}")
    outputs = tuple(outputs)
    unknown = [name for name in outputs if name not in TokenStats._fields]
    if unknown or not outputs:
        got = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"outputs must name at least one of {', '.join(TokenStats._fields)}; got {got}")
    needing = [name for name in outputs if BIT[name] & NEEDS_REFERENCE]
    if needing and not has_reference:
        raise ValueError(f"outputs {needing} need {reference_name}")
    if has_reference and not needing:
        raise ValueError(f"{reference_name} given, but none of the outputs {list(outputs)} reads it")
    return outputs, bits(outputs)


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
    tp_group, hint, (logits, reference_logits, labels) = groups.to_local(
        tp_group, logits=(logits, -1), reference_logits=(reference_logits, -1), labels=(labels, None)
    )
    with groups.ranks(tp_group, None, logits, hint) as ranks:
        outputs, columns = check_outputs(outputs, "reference_logits", reference_logits is not None)
        call = _prepare(
            logits, "logits", labels, reference_logits, temperature, ignore_index, inplace_backward, backend,
            ranks, {}, {"the call": "token_stats", "outputs": outputs},
        )  # fmt: skip
    stats = call.stats(columns, tuple(name for name in DIFFERENTIABLE if name in outputs))
    result = {name: stats[name].view(call.shape) for name in outputs}
    if "is_top1" in result:
        result["is_top1"] = result["is_top1"] > 0
    return TokenStats(**result)


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
    tp_group, hint, (policy_logits, reference_logits, labels) = groups.to_local(
        tp_group, policy_logits=(policy_logits, -1), reference_logits=(reference_logits, -1), labels=(labels, None)
    )
    with groups.ranks(tp_group, sp_group, policy_logits, hint) as ranks:
        wanted = 3 if cu_seqlens is None else 2
        if checks.tensor(policy_logits, "policy_logits").dim() != wanted:
            expected = "[2B, T, V], or [N, V] with cu_seqlens" if cu_seqlens is None else "[N, V] with cu_seqlens"
            raise ValueError(f"policy_logits must have shape {expected}; got {tuple(policy_logits.shape)}")
        beta = checks.positive(beta, "beta")
        reduction = checks.choice(reduction, "reduction", ("mean", "sum", "none"))
        plan = objectives.resolve(loss_type, loss_weights, label_smoothing, loss_kwargs)
        live = reference_logits is not None
        agreed = {} if ranks is None else preference.described(plan, beta, reduction, cu_seqlens, live)
        call = _prepare(
            policy_logits, "policy_logits", labels, reference_logits, temperature, ignore_index, inplace_backward,
            backend, ranks,
            {"token_weights": token_weights, "cu_seqlens": cu_seqlens, "reference_logps": reference_logps},
            {"the call": "fused_token_dpo", **agreed},
        )  # fmt: skip
        if cu_seqlens is None:
            checks.pairs(labels.shape[0], "policy_logits holds")
        else:
            cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
        weights = preference.check_token_weights(token_weights, labels)
        dtype = stats_dtype(policy_logits.dtype)

        number = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        reference = Reference.of(reference_logps, live, "reference_logits", plan, labels, number, dtype)
        positions = None if ranks is None else ranks.sequence_shard(number, dtype, agreed)
    alone = plan.is_default and reduction == "mean" and ranks is None
    if alone and weights is None and plan.ld_alpha is None:
        return _default_loss(call, None, reference, cu_seqlens, plan.label_smoothing, beta)
    batch = Batch.of(call.labels, weights, cu_seqlens, plan, ignore_index, dtype, positions)
    call = call._replace(labels=batch.labels)
    if alone:
        return _default_loss(call, batch.weights, reference, cu_seqlens, plan.label_smoothing, beta)
    stats = call.stats(preference.columns(plan, live), preference.carrying(plan))
    return preference.loss_and_rewards(stats, batch, reference, plan, beta, reduction, call.backend, call.shape)


def _default_loss(
    call: _Rows,
    weights: Tensor | None,
    reference: Reference,
    cu_seqlens: Tensor | None,
    label_smoothing: float,
    beta: float,
) -> TokenDPOOutput:
    """DPO with a mean over pairs: the two operations and nothing else. Without weights tokens count 1 each."""
    columns = STATE | BIT["logsumexp"]
    if call.reference is not None:
        columns |= BIT["reference_logps"]
    config = RowConfig(columns, call.temperature, call.ignore_index, call.backend)
    loss, rewards, stats, tokens = DefaultLoss.apply(
        call.logits, call.labels, call.reference, reference.given, weights, cu_seqlens, config, call.inplace, beta,
        label_smoothing,
    )  # fmt: skip
    wanted = {name: stats[column_index(columns, name)] for name in ("logps", "logsumexp")}
    return preference.assemble(loss, rewards, wanted, tokens.unbind(0), call.shape)
