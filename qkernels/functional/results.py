"""What the public functions return, and how per-row results become it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core import checks
from ..core.fields import BIT, NEEDS_REFERENCE, TokenStats, bits
from ..core.printed import summarised
from ..distributed.fingerprint import Fingerprint
from ..head.plan import LinearPlan


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputsFingerprint(Fingerprint):
    """Of a call that returns the named per-row results."""

    outputs: tuple[str, ...]


class Outputs(NamedTuple):
    """The requested fields of `TokenStats`: their names and their bit mask."""

    names: tuple[str, ...]
    fields: int

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

    def fingerprint(self) -> OutputsFingerprint:
        """What ranks must have alike."""
        return OutputsFingerprint(outputs=self.names)


class _TokenDPOFields(NamedTuple):
    """The fields of a `TokenDPOOutput`. Its plan is none of them: they are tensors, and where torch takes the tuple
    apart and builds it anew (hooks of FSDP, the first step of DDP with a static graph), the plan is None afterwards.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logsumexp: Tensor


class TokenDPOOutput(_TokenDPOFields):
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

    plan: LinearPlan | None = None

    def __repr__(self) -> str:
        return summarised(self)
