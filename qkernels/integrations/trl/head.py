"""`add_token_head`: TRL's fused language model head, computed by this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..transformers.hook import hook_of, install
from ..transformers.requests import HeadCall, HeadResult, StatsRequest
from ..transformers.wrappers import text_config
from .version import require_trl

if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput

# TRL's name of an output -> ours.
_OUTPUTS = {
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}


def add_token_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    detach_entropy: bool = False,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> None:
    """What TRL's `add_fused_lm_head` does, done here: `model(..., labels=labels, fused_lm_head=True)` gives log-probs.

    With `fused_lm_head=True` the model returns TRL's `FusedCausalLMOutput`; without it, what it always returns. LoRA
    adapters on the head count and are trained. Rows without a label are dropped on every device.

    Args:
        model: a causal language model of transformers (of a PEFT model, the base model).
        temperature: divides the logits.
        cast_lm_head_to_fp32: run the head in fp32, outside autocast.
        outputs: fields of `FusedCausalLMOutput` to compute.
        detach_entropy: the entropy is only logged. Saves a product with a frozen head.
        max_chunk_bytes, backend: as in `qkernels.linear_token_stats`.

    Raises:
        ImportError: as `require_trl`.
        ValueError, TypeError: an unknown output; a head that is not known here.
    """
    require_trl()
    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be of {', '.join(_OUTPUTS)}; got {unknown}")
    wanted = tuple(dict.fromkeys(("log_probs", *outputs)))
    request = StatsRequest(
        tuple(_OUTPUTS[name] for name in wanted),
        fp32=cast_lm_head_to_fp32,
        options={
            "temperature": temperature,
            "detached": ("entropy",) if detach_entropy and "entropy" in wanted else (),
            "max_chunk_bytes": max_chunk_bytes,
            "backend": backend,
        },
    )
    coefficient = float(getattr(text_config(model), "router_aux_loss_coef", None) or 0.0)

    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        hook = hook_of(self)
        if not fused_lm_head:
            passed = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return hook.forward(*args, **{k: v for k, v in passed.items() if v is not None}, **kwargs)
        # As in TRL: without labels that are shifted already, the last row predicts nothing and is left out.
        if shift_labels is not None:
            aligned = shift_labels
        elif labels is not None:
            aligned = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        else:
            raise ValueError("fused_lm_head=True needs labels or shift_labels")
        result = hook.forward(*args, qkernels=HeadCall(request), labels=aligned, **kwargs)
        end = None if shift_labels is not None else -1
        return _fused_output(result, wanted, (aligned != -100)[:, :end], num_items_in_batch, coefficient)

    install(model, forward)


def _fused_output(
    result: HeadResult, names: Sequence[str], mask: Tensor, num_items_in_batch: Any, aux_loss_coefficient: float
) -> FusedCausalLMOutput:
    """TRL's output from ours.

    Args:
        result: of a `StatsRequest`.
        names: TRL's names of what was requested.
        mask: `[B, T]` or `[B, T - 1]`, which rows are scored; the outputs are cut to its length.
        num_items_in_batch: divisor of the loss; None for the number of scored rows.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    fields = {name: getattr(result.stats, _OUTPUTS[name])[:, : mask.shape[1]] for name in names}
    divisor = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -fields["log_probs"].sum() / divisor
    if result.aux_loss is not None:
        loss = loss + aux_loss_coefficient * result.aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=result.aux_loss, **fields)
