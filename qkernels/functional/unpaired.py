"""The public losses on sequences that are not paired, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.compile import eager_with_groups
from ..head.plan import LinearPlan
from .head_inputs import HeadRequest
from .rows import RowsRequest
from .sequence_loss import SequenceArguments, SequenceOutput
from .unit_loss import HiddenUnits, UnitOptions, from_logits

SequenceLossType = str | Callable[..., Tensor]


@eager_with_groups
def fused_sequence_loss(
    logits: Tensor,
    labels: Tensor,
    desirable: Tensor,
    *,
    reference_logits: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    kl: float | Tensor | None = None,
    kl_logps: Tensor | None = None,
    kl_reference_logps: Tensor | None = None,
    beta: float = 0.1,
    loss_type: SequenceLossType = "kto",
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    outputs: Sequence[str] = (),
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> SequenceOutput:
    """A preference loss on sequences that are not paired, such as KTO, from logits.

    Args:
        logits: `[S, T, V]`, or packed `[N, V]` with `cu_seqlens`; fp32, bf16, fp16 or fp64.
        labels: int64 `[S, T]` or `[N]`, aligned with the rows (see `shift_labels`); `ignore_index` marks prompt and
            padding, which cost nothing.
        desirable: bool `[S]`, whether each answer is a wanted one.
        reference_logits: like `logits`, any floating dtype; a constant.
        reference_logps: instead, cached log-probs: per token, shaped like `labels`, or per sequence, `[S]`. 0.0 states
            "reference-free".
        kl: the estimate of KL(pi || pi_ref) of `kto`, 0 or more; a constant. Over several ranks, their mean.
        kl_logps, kl_reference_logps: instead, `[M]` each, summed log-probs of mismatched answers (each prompt with the
            answer of another one, as TRL shifts them) under the policy and the reference: kl is the mean of their
            difference, at least 0.
        beta: strength of the KL constraint; above 0.
        loss_type: a name of `qkernels.objectives.SEQUENCE_OBJECTIVES`, or a callable on `SequenceScores` that returns
            one loss per sequence and declares its unit (`qkernels.objectives.declare_unit`).
        loss_kwargs: options of the loss: `desirable_weight`, `undesirable_weight`.
        token_weights: floating point, shaped like `labels`; factor of each token in its sequence's sums, 0 or more.
        outputs: names of fields of `TokenStats` to be returned besides, without gradient.
        cu_seqlens: int32 `[S + 1]`, sequence boundaries of a packed batch.
        temperature: divides both models' logits: a number, or a tensor shaped like `labels`. (A tensor makes a copy of
            the logits in fp32.)
        reduction: "mean" or "sum" over sequences, or "none" for `[S]`.
        ignore_index, inplace_backward, backend, tp_group: as in `token_logps`.
        sp_group: as in `fused_token_dpo`.

    Returns:
        `SequenceOutput`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or combination; no reference, or no KL where the
            loss needs it; a callable that reads other sequences than its own. The message names it.
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
    """
    given = dict(locals())
    request = RowsRequest(
        function="fused_sequence_loss",
        name="logits",
        logits=logits,
        labels=labels,
        reference_logits=reference_logits,
        temperature=temperature,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
        tp_group=tp_group,
        sp_group=sp_group,
    )
    return from_logits(request, cu_seqlens, outputs, SequenceArguments.check(given))


@eager_with_groups
def fused_linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    *,
    bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    kl: float | Tensor | None = None,
    kl_logps: Tensor | None = None,
    kl_reference_logps: Tensor | None = None,
    beta: float = 0.1,
    loss_type: SequenceLossType = "kto",
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    outputs: Sequence[str] = (),
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: str = "float32",
    plan: str = "auto",
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> SequenceOutput:
    """`fused_sequence_loss` from hidden states and the head's weight; the logits are never stored.

    Three GEMMs over the valid rows, two with a frozen head.

    Args:
        hidden: `[S, T, H]`, or packed `[N, H]` with `cu_seqlens`: the last hidden states (after the final norm).
        weight: `[V, H]`, in the dtype of `hidden` (any under autocast).
        labels: int64 `[S, T]` or `[N]`, aligned with the rows (see `shift_labels`).
        bias: `[V]`.
        reference_hidden, reference_weight, reference_bias: of the reference, which may have an H of its own; constants.
        valid_rows: S ints, how many rows of each sequence are valid; see `fused_linear_token_dpo`.
        temperature: a number, or a tensor shaped like `labels`, which takes no copy here.
        softcap, logit_scale, logits_dtype, max_chunk_bytes, backend, tp_group, sp_group: as in
            `fused_linear_token_dpo`.
        plan: "auto", "frozen_head", "sequence_chunks" or "recompute".
        desirable, reference_logps, kl, kl_logps, kl_reference_logps, beta, loss_type, loss_kwargs, token_weights,
            outputs, cu_seqlens, ignore_index, reduction: as in `fused_sequence_loss`.

    Returns:
        `SequenceOutput`, with the `LinearPlan` that was followed.

    Raises:
        As `fused_sequence_loss`, and ValueError for a plan that cannot do the work, a budget too small for one row, and
        `valid_rows` that are not what the labels have.
    """
    given = dict(locals())
    output: SequenceOutput = _prepared(given).run()
    return output


def plan_linear_sequences(
    hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, **arguments: Any
) -> LinearPlan:
    """What `fused_linear_sequence_loss` would do with these arguments, without doing it.

    Args:
        hidden, weight, labels, desirable, arguments: those of `fused_linear_sequence_loss`; tensors on the meta device
            will do.

    Returns:
        `LinearPlan`: name, reason, chunk sizes, number of products, expected peak memory.

    Raises:
        As `fused_linear_sequence_loss`; TypeError for an argument that it does not have.
    """
    defaults = fused_linear_sequence_loss.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
    if unknown := sorted(set(arguments) - set(defaults)):
        raise TypeError(f"fused_linear_sequence_loss has no argument {unknown}")
    rows = {"hidden": hidden, "weight": weight, "labels": labels, "desirable": desirable}
    chosen = _prepared({**defaults, **arguments, **rows}).plan
    assert chosen is not None
    return chosen


def _prepared(given: dict[str, Any]) -> HiddenUnits:
    """Check the arguments of `fused_linear_sequence_loss`, by name, and choose a plan."""
    model = HeadRequest.of("fused_linear_sequence_loss", given)
    return HiddenUnits.prepare(model, UnitOptions.of(given), SequenceArguments.check(given))
