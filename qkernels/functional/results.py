"""What the public functions return, and how per-row results become it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.columns import BIT, NEEDS_REFERENCE, bits
from ..head.plan import LinearPlan

_PRINTED = 4  # entries of a tensor that is shown by its values


def summarised(result: Any) -> str:
    """The representation of a named tuple of tensors: shapes and types, values of the smallest; nothing of None."""
    fields = [f"{name}={_in_short(value)}" for name, value in result._asdict().items() if value is not None]
    return f"{type(result).__name__}({', '.join(fields)})"


def _in_short(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = str(value.dtype).removeprefix("torch.")
    place = "" if value.device.type == "cpu" else f" on {value.device}"
    if type(value) is Tensor and value.device.type != "meta" and value.dim() < 2 and value.numel() <= _PRINTED:
        values = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in value.reshape(-1).tolist()]
        return (f"[{', '.join(values)}]" if value.dim() else values[0]) + place
    return f"<{kind} {list(value.shape)}{place}>"


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

    def __repr__(self) -> str:
        return summarised(self)

    @staticmethod
    def of(stats: Mapping[str, Tensor], outputs: Sequence[str], shape: torch.Size, detach: bool = False) -> TokenStats:
        """The named outputs out of per-row results by name, shaped like the caller's labels."""
        found = {name: stats[name].detach() if detach else stats[name] for name in outputs}
        return TokenStats(**{name: (x > 0 if name == "is_top1" else x).view(shape) for name, x in found.items()})


class Outputs(NamedTuple):
    """Names of fields of `TokenStats`, and the mask of the columns that hold them."""

    names: tuple[str, ...]
    columns: int

    @staticmethod
    def of(outputs: Any, reference_name: str, has_reference: bool) -> Outputs:
        """Check what was asked for.

        Args:
            outputs: the argument of that name.
            reference_name: of the argument with the reference's rows.
            has_reference: whether it was given.

        Raises:
            TypeError: not a sequence of names.
            ValueError: an unknown name; a reference that is missing, or that no output reads.
        """
        outputs = checks.names(outputs, "outputs")
        unknown = [name for name in outputs if name not in TokenStats._fields]
        if unknown or not outputs:
            got = ", ".join(map(repr, unknown)) or "none"
            raise ValueError(f"outputs must name at least one of {', '.join(TokenStats._fields)}; got {got}")
        needing = [name for name in outputs if BIT[name] & NEEDS_REFERENCE]
        if needing and not has_reference:
            raise ValueError(f"outputs {needing} need {reference_name}")
        if has_reference and not needing:
            raise ValueError(f"{reference_name} given, but none of the outputs {list(outputs)} reads it")
        return Outputs(outputs, bits(outputs))


class TokenDPOOutput(NamedTuple):
    """What the preference losses return. Only `loss` carries gradient.

    loss: `[]`, or `[B]` with reduction="none".
    chosen_rewards, rejected_rewards: `[B]`, beta times the weighted sum of log-ratios over each sequence.
    token_logps: log pi(label) per row, shaped like `labels`; 0 at ignored rows, as in all per-token outputs.
    reference_token_logps: log pi_ref(label) per row; None when the reference came as per-sequence sums.
    token_rewards: beta * (token_logps - reference_token_logps); None when the reference came as per-sequence sums.
    logsumexp: per row; V(s) = beta * logsumexp.

    Besides these fields it has an attribute `plan`: what `fused_linear_token_dpo` did (`LinearPlan`); None from logits,
    from inside torch.compile, and where a wrapper such as FSDP has rebuilt the tuple.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logsumexp: Tensor

    @property
    def plan(self) -> LinearPlan | None:
        return None

    def __repr__(self) -> str:
        return summarised(self)


class PlannedOutput(TokenDPOOutput):
    """A `TokenDPOOutput` that knows its plan, which is not one of the fields: they are tensors.

    To torch it is a named tuple of tensors; where torch takes it apart and builds it anew (hooks of FSDP, the first
    step of DDP with a static graph), the plan is None afterwards.
    """

    plan: LinearPlan | None = None  # type: ignore[assignment]

    @staticmethod
    def of(output: TokenDPOOutput, plan: LinearPlan | None) -> PlannedOutput:
        """The same output with its plan."""
        planned = PlannedOutput(*output)
        planned.plan = plan
        return planned
