"""The public functions on hidden states: logits exist only as a chunk, never as a whole.

Each builds a request by keyword and reads as: validate, agree, count and plan, run, assemble. The steps of a loss are
in `hidden_loss.py`, those of per-token results here; the passes are in `qkernels.head.chunks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core import checks
from ..core.compile import eager_with_groups
from ..core.fields import DIFFERENTIABLE
from ..head import chunks
from ..head import plan as head_plan
from ..head.plan import LinearPlan
from ..objectives import LossType
from . import valid_rows as counting
from .head_inputs import HeadInputs, HeadRequest, detached
from .hidden_loss import HiddenLossRequest
from .results import Outputs, TokenDPOOutput, TokenStats


@eager_with_groups
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    outputs: Sequence[str] = ("logps", "logsumexp"),
    detached: Sequence[str] = (),
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: str = "float32",
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_rows: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
) -> TokenStats:
    """Any subset of the per-token numbers of a policy (and its reference), from hidden states.

    Logits are softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap) / temperature, in fp32, a chunk at a
    time. Rows with an ignored label are dropped before the first product.

    Args:
        hidden: `[..., H]`, the last hidden states (after the final norm); fp32, bf16, fp16 or fp64.
        weight: `[V, H]`, the head's, in the dtype of `hidden` (any under autocast).
        labels: `[...]` int64, aligned with the rows (see `shift_labels`); `ignore_index` marks rows that cost nothing.
        bias: `[V]`.
        reference_hidden, reference_weight, reference_bias: of the reference, which may have an H of its own; constants.
        outputs: names of fields of `TokenStats`; only these are computed, the others are None.
        detached: those of them that need no gradient. With a frozen head, log-probs alone take two products where
            log-probs and an entropy with gradient take three.
        softcap: of Gemma; None for none.
        logit_scale: of Cohere (`logit_scale`) and Granite (1 / `logits_scaling`), applied before the softcap.
        logits_dtype: "float32" keeps logits exact; "input" rounds them to the dtype of the GEMMs, to match an engine
            whose head has a 16-bit result. The gradient takes no notice of the rounding.
        temperature: divides the logits; above 0.
        ignore_index: the label that marks a row to be left out.
        valid_rows: how many labels are not `ignore_index`, exactly, counted where the labels were on the CPU. With it
            there is no host-device synchronisation (but see `tp_group`); without it, one.
        max_chunk_bytes: memory for a chunk's logits and their gradient; None takes a share of the free memory.
        backend: "auto", or by name; `qkernels.info()` lists what can run.
        tp_group: process group (or 1-D `DeviceMesh`) over whose ranks, in their order, the vocabulary is split: each
            holds its rows of weight and bias, and the same hidden states and labels (of the whole vocabulary). A
            weight that is a DTensor sharded in dimension 0 over a 1-D mesh implies its group. dL/dhidden is summed
            over the ranks. See docs/scaling.md.

    Returns:
        `TokenStats` of fp32 (fp64 for fp64 inputs) tensors shaped like `labels`; log-probs, logsumexp, entropy and the
        KLs are differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or option; a budget too small for one row (the message says
            the smallest that works); ranks of a group that disagree, on every one of them; a `valid_rows` that is not
            what the labels have (CPU, or QKERNELS_CHECK=1; on a GPU and inside torch.compile all rows and their
            gradients become NaN, and is_top1 False).
        RuntimeError: another rank of a group failed; the message quotes its error.
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
    """
    request, agreement = HeadRequest(
        function="linear_token_stats",
        names=("hidden", "weight", "bias"),
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        reference_bias=reference_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        ignore_index=ignore_index,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        tp_group=tp_group,
    ).local()
    with agreement as ranks:
        wanted = Outputs.of(outputs, "reference_hidden", reference_hidden is not None)
        number = None if valid_rows is None else checks.row_count(valid_rows, "valid_rows")
        inputs = request.validate()
        options = None if ranks is None else wanted.fingerprint()
        inputs = inputs.agree(ranks, request, options, counting.as_equal(number, ranks))
        factor = None if number is None else counting.check_number(number, inputs.labels, inputs.ignore_index)
    inputs.refuse_meta("hidden")
    differentiable = _differentiable(wanted.names, detached)
    inputs, plan = _plan_stats(inputs, wanted.fields, differentiable, number)
    stats = counting.times(inputs.stats(plan, wanted.fields, differentiable), factor)
    return TokenStats.of(stats, wanted.names, inputs.shape)


def _differentiable(outputs: tuple[str, ...], detached: Sequence[str]) -> tuple[str, ...]:
    """The differentiable outputs."""
    detached = checks.names(detached, "detached")
    unknown = [name for name in detached if name not in outputs]
    if unknown:
        raise ValueError(f"detached names {unknown}, which are not among the outputs {list(outputs)}")
    return tuple(name for name in DIFFERENTIABLE if name in outputs and name not in detached)


def _plan_stats(
    inputs: HeadInputs, fields: int, differentiable: tuple[str, ...], number: int | None
) -> tuple[HeadInputs, LinearPlan]:
    """Count the valid rows, where `number` does not say how many there are, and choose a plan."""
    if not differentiable:  # nothing to be saved for a backward that cannot come
        inputs = inputs._replace(policy=detached(inputs.policy))
    valid = None
    if counting.host_can_count(inputs.labels):
        valid = chunks.valid_rows(inputs.labels, inputs.ignore_index, number)
    inputs = inputs._replace(valid_rows=number, valid=valid)
    work = inputs.work(
        "auto",
        fields,
        only_logps=differentiable == ("logps",),
        coupled="the upstream gradient is not known in advance",
        valid_rows=(inputs.labels if inputs.valid is None else inputs.valid).shape[0],
        unit_rows=0,
    )
    return inputs, head_plan.plan(work)


@eager_with_groups
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: str = "float32",
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_rows: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
) -> Tensor:
    """Log-probability of each label, from hidden states; differentiable under any loss.

    Two products if the head needs no gradient, four otherwise, one without gradients; each over valid rows only.

    Args:
        As `linear_token_stats`.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), nats; 0 at ignored rows.

    Raises:
        As `linear_token_stats`.
    """
    stats = linear_token_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        outputs=("logps",),
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        temperature=temperature,
        ignore_index=ignore_index,
        valid_rows=valid_rows,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        tp_group=tp_group,
    )
    assert stats.logps is not None
    return stats.logps


@eager_with_groups
def plan_linear(
    policy_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float = 1.0,
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
) -> LinearPlan:
    """What `fused_linear_token_dpo` would do with these arguments, without doing it.

    Takes the same arguments, checks them the same way, and runs no product. Tensors on the meta device will do (all
    rows count as valid then, or as many as `valid_rows` says). With a `tp_group` or `sp_group` every rank of it has to
    call this.

    Returns:
        `LinearPlan`: name, reason, chunk sizes, number of products, expected peak memory. It prints as a summary.

    Raises:
        As `fused_linear_token_dpo`.
    """
    request = HiddenLossRequest(
        policy_hidden=policy_hidden,
        lm_head_weight=lm_head_weight,
        labels=labels,
        lm_head_bias=lm_head_bias,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        reference_bias=reference_bias,
        reference_logps=reference_logps,
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        loss_kwargs=loss_kwargs,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        valid_rows=valid_rows,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        plan=plan,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        tp_group=tp_group,
        sp_group=sp_group,
    )
    chosen = request.prepare().plan
    assert chosen is not None
    return chosen


@eager_with_groups
def fused_linear_token_dpo(
    policy_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float = 1.0,
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
) -> TokenDPOOutput:
    """A preference loss from hidden states and the head's weight; the logits are never stored.

    The first B sequences are chosen, the last B rejected. Logits are softcap * tanh(logit_scale * (hidden weight^T +
    bias) / softcap) / temperature, in fp32, one chunk of rows at a time. Rows with an ignored label are dropped before
    the first product: prompt and padding cost nothing.

    Args:
        policy_hidden: `[2B, T, H]`, or packed `[N, H]` with `cu_seqlens`: the last hidden states (after the final
            norm); fp32, bf16, fp16 or fp64.
        lm_head_weight: `[V, H]`, in the dtype of `policy_hidden` (any under autocast).
        labels: int64 `[2B, T]` or `[N]`, aligned with the rows (see `shift_labels`).
        lm_head_bias: `[V]`.
        reference_hidden, reference_weight, reference_bias: of the reference, which may have an H of its own; constants.
        reference_logps: instead, cached log-probs per token or per sequence, as in `fused_token_dpo`.
        beta, loss_type, loss_weights, label_smoothing, loss_kwargs, token_weights, cu_seqlens, temperature,
            ignore_index, reduction: as in `fused_token_dpo`.
        valid_rows: 2B ints, how many rows of each sequence are valid, exactly: those whose label is not `ignore_index`
            and whose token weight, if there are any, is not 0. (With `ld_alpha=0` a row past the shorter of the pair's
            two numbers is not valid either, unless the loss has WPO weights or the SFT term; with `sp_group` the rows
            of this rank are meant.) Count them where the labels are on the CPU, `(labels != -100).sum(1).tolist()`:
            there is no host-device synchronisation then (but see `tp_group`), without them one per call.
        softcap: of Gemma; None for none.
        logit_scale: of Cohere (`logit_scale`) and Granite (1 / `logits_scaling`), applied before the softcap.
        logits_dtype: "float32" keeps logits exact; "input" rounds them to the dtype of the GEMMs, to match an engine
            whose head has a 16-bit result. The gradient takes no notice of the rounding.
        plan: "auto", "frozen_head", "pair_chunks" or "recompute"; see `qkernels.head.plan` and `plan_linear`.
        max_chunk_bytes: memory for a chunk's logits and their gradient; None takes a share of the free memory.
        backend: "auto", or by name; `qkernels.info()` lists what can run.
        tp_group: process group (or 1-D `DeviceMesh`) over whose ranks, in their order, the vocabulary is split: each
            holds its rows of weight and bias, and the same hidden states and labels (of the whole vocabulary). A
            weight that is a DTensor sharded in dimension 0 over a 1-D mesh implies its group. dL/dhidden is summed
            over the ranks. See docs/scaling.md.
        sp_group: process group over whose ranks the positions of every sequence are split: each passes its own rows
            of the same 2B sequences (`[2B, T_local, ...]`, T_local may differ, or packed), and gets the loss of the
            whole sequences with the gradient of its own rows. Parameters' gradients are to be summed over its ranks.

    Returns:
        `TokenDPOOutput`, with the `LinearPlan` that was followed.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or combination; a plan that cannot do the work; a
            budget too small for one row (the message says the smallest that works); `valid_rows` that are not what
            the labels have, with the first sequence that differs (CPU, or QKERNELS_CHECK=1; on a GPU, inside
            torch.compile, and with `sp_group` and `ld_alpha` the loss, the per-token outputs and all gradients become
            NaN instead).
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
    """
    request = HiddenLossRequest(
        policy_hidden=policy_hidden,
        lm_head_weight=lm_head_weight,
        labels=labels,
        lm_head_bias=lm_head_bias,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        reference_bias=reference_bias,
        reference_logps=reference_logps,
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        loss_kwargs=loss_kwargs,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        valid_rows=valid_rows,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        plan=plan,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        tp_group=tp_group,
        sp_group=sp_group,
    )
    return request.prepare().run()[0]


def linear_token_dpo(
    policy_hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *, outputs: Sequence[str] = (), **options: Any
) -> tuple[TokenDPOOutput, TokenStats]:
    """`fused_linear_token_dpo`, and further per-token results of the policy from the same pass; for integrations.

    Args:
        outputs: names of fields of `TokenStats`, without gradient here; they cost next to nothing.
        policy_hidden, lm_head_weight, labels, options: the arguments of `fused_linear_token_dpo`.

    Returns:
        What `fused_linear_token_dpo` returns, and the outputs.

    Raises:
        As `fused_linear_token_dpo`; ValueError for an unknown output.
    """
    work = HiddenLossRequest(policy_hidden, lm_head_weight, labels, outputs=outputs, **options).prepare()
    output, stats = work.run()
    return output, TokenStats.of(stats, outputs, work.inputs.shape, detach=True)
