"""The public policy losses, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.compile import eager_with_groups
from ..head.plan import LinearPlan
from .head_inputs import HeadRequest
from .policy_loss import PolicyArguments, PolicyOutput
from .rows import RowsRequest
from .unit_loss import HiddenUnits, UnitOptions, from_logits

PolicyLossType = str | Callable[..., Tensor]


@eager_with_groups
def fused_policy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    on_policy: bool = False,
    reference_logits: Tensor | None = None,
    reference_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    loss_type: PolicyLossType = "grpo",
    beta: float = 0.0,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str | None = None,
    importance_correction: str | None = None,
    correction_min: float | None = None,
    correction_max: float | None = None,
    entropy_coef: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    reduction: str | None = None,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    outputs: Sequence[str] = (),
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> PolicyOutput:
    """A policy-gradient loss from logits: GRPO and its family, with metrics from the same pass.

    With lp the log-prob of a token, rho its ratio to the policy that sampled, A its advantage, each token loses
    importance * l(rho, A, lp) + beta * k3(ref, lp); `reduction` makes one number of them, and entropy_coef times the
    mean entropy is subtracted. docs/losses.md has every l.

    Args:
        logits: `[S, T, V]`, or packed `[N, V]` with `cu_seqlens`; fp32, bf16, fp16 or fp64.
        labels: int64 `[S, T]` or `[N]`, aligned with the rows (see `shift_labels`); `ignore_index` marks prompts,
            padding and whatever else was not sampled, such as the output of tools.
        advantages: `[S]` per sequence, or shaped like `labels` per token (which a packed batch of as many rows as
            sequences is read as); a constant.
        old_logps: log-probs under the policy that sampled, shaped like `labels`; a constant.
        on_policy: instead, that this is the policy itself: every ratio is 1, with the gradient of rho.
        reference_logits: like `logits`, any floating dtype; a constant. For `beta`, and for `kl` of the metrics.
        reference_logps: instead, cached log-probs shaped like `labels`.
        sampling_logps: log-probs that the engine reported when it sampled, shaped like `labels`; NaN where it has none.
        loss_type: a name of `qkernels.objectives.POLICY_OBJECTIVES`, or a callable on `PolicyScores` that returns one
            loss per token and declares its unit (`qkernels.objectives.declare_unit`).
        beta: factor of the KL penalty exp(y) - 1 - y, y = ref - lp; 0 or more.
        epsilon, epsilon_high, delta: the clip 1 - epsilon, 1 + epsilon_high (epsilon by default), and the cap of rho on
            the other side; for `cispo`, epsilon_high is the cap itself. None for the loss's own.
        importance_sampling_level: "token", "sequence" (exp of the mean over the sequence, GSPO) or "sequence_sum" (of
            the sum, RLOO); None for the loss's own.
        importance_correction: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask": what is done to
            exp(old - sampling), which corrects for an engine whose log-probs differ; of the sequence, exp of the sum.
        correction_min, correction_max: truncated to these, or 0 outside of them.
        entropy_coef: of the entropy bonus, with gradient.
        loss_kwargs: options of the loss, and for any of them `corrected_kl` (the KL penalty times rho),
            `off_policy_threshold` (sequences of negative advantage whose mean of old - lp is above it do not count;
            DeepSeek-V3.2), `entropy_quantile` (the share of tokens, those of the highest entropy, that the loss is
            taken over; Wang et al. 2025), `entropy_group` (the process group whose ranks' tokens are compared for that,
            where each rank has sequences of its own; those of `sp_group` are compared in any case).
        reduction: "sequence_mean" (mean over tokens, then over sequences), "token_mean", "items" (sum over tokens /
            num_items_in_batch), "fixed_length" (sum / (S * max_completion_length)), "sequence_sum" (sum over tokens,
            mean over sequences), "sum" or "none"; None for the loss's own.
        num_items_in_batch: tokens that the sum is divided by, of all ranks and accumulated steps; None for those here.
        max_completion_length: for "fixed_length".
        outputs: names of fields of `TokenStats` to be returned besides, without gradient.
        cu_seqlens: int32 `[S + 1]`, sequence boundaries of a packed batch.
        temperature: divides both models' logits: a number, or a tensor shaped like `labels`. (A tensor makes a copy of
            the logits in fp32.)
        ignore_index, inplace_backward, backend, tp_group: as in `token_logps`.
        sp_group: as in `fused_token_dpo`.

    Returns:
        `PolicyOutput`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or combination; tensors that the loss needs and does
            not get, or gets and does not read; a callable that reads other units than its own. The message names it.
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
    """
    given = dict(locals())
    request = RowsRequest(
        function="fused_policy_loss",
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
    return from_logits(request, cu_seqlens, outputs, PolicyArguments.check(given))


@eager_with_groups
def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    on_policy: bool = False,
    bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    loss_type: PolicyLossType = "grpo",
    beta: float = 0.0,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str | None = None,
    importance_correction: str | None = None,
    correction_min: float | None = None,
    correction_max: float | None = None,
    entropy_coef: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    reduction: str | None = None,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    outputs: Sequence[str] = (),
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: str = "float32",
    plan: str = "auto",
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> PolicyOutput:
    """`fused_policy_loss` from hidden states and the head's weight; the logits are never stored.

    Three GEMMs over the valid rows, two with a frozen head. Rows without a gradient leave the last ones: those whose
    advantage is 0 (without `beta` and `entropy_coef`), and on a CPU the clipped ones too; `metrics.idle_rows` counts
    them. A loss that couples the batch, or a sequence that does not fit a chunk, takes one GEMM more.

    Args:
        hidden: `[S, T, H]`, or packed `[N, H]` with `cu_seqlens`: the last hidden states (after the final norm).
        weight: `[V, H]`, in the dtype of `hidden` (any under autocast).
        labels: int64 `[S, T]` or `[N]`, aligned with the rows (see `shift_labels`).
        bias: `[V]`.
        reference_hidden, reference_weight, reference_bias: of the reference, which may have an H of its own; constants.
        valid_rows: S ints, how many labels of each sequence are not `ignore_index`; see `fused_linear_token_dpo`. With
            it, rows without a gradient stay in the GEMMs on a GPU.
        temperature: a number, or a tensor shaped like `labels`, which takes no copy here.
        softcap, logit_scale, logits_dtype, max_chunk_bytes, backend, tp_group, sp_group: as in
            `fused_linear_token_dpo`.
        plan: "auto", "frozen_head", "token_chunks" or "sequence_chunks" (as the unit of the loss is), or "recompute".
        advantages, old_logps, on_policy, reference_logps, sampling_logps, loss_type, beta, epsilon, epsilon_high,
            delta, importance_sampling_level, importance_correction, correction_min, correction_max, entropy_coef,
            loss_kwargs, reduction, num_items_in_batch, max_completion_length, outputs, cu_seqlens, ignore_index: as in
            `fused_policy_loss`.

    Returns:
        `PolicyOutput`, with the `LinearPlan` that was followed.

    Raises:
        As `fused_policy_loss`, and ValueError for a plan that cannot do the work, a budget too small for one row, and
        `valid_rows` that are not what the labels have.
    """
    given = dict(locals())
    output: PolicyOutput = _prepared(given).run()
    return output


def plan_linear_policy(hidden: Tensor, weight: Tensor, labels: Tensor, **arguments: Any) -> LinearPlan:
    """What `fused_linear_policy_loss` would do with these arguments, without doing it.

    Args:
        hidden, weight, labels, arguments: those of `fused_linear_policy_loss`; tensors on the meta device will do.

    Returns:
        `LinearPlan`: name, reason, chunks, number of products, rows known to have no gradient, expected peak memory.

    Raises:
        As `fused_linear_policy_loss`; TypeError for an argument that it does not have.
    """
    defaults = fused_linear_policy_loss.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
    unknown = sorted(set(arguments) - set(defaults) - {"advantages"})
    if unknown or "advantages" not in arguments:
        raise TypeError(f"fused_linear_policy_loss has no argument {unknown}" if unknown else "advantages are missing")
    chosen = _prepared({**defaults, **arguments, "hidden": hidden, "weight": weight, "labels": labels}).plan
    assert chosen is not None
    return chosen


def _prepared(given: dict[str, Any]) -> HiddenUnits:
    """Check the arguments of `fused_linear_policy_loss`, by name, and choose a plan."""
    model = HeadRequest.of("fused_linear_policy_loss", given)
    return HiddenUnits.prepare(model, UnitOptions.of(given), PolicyArguments.check(given))
