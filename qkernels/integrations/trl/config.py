"""`TokenDPOConfig`, and what is read from a configuration of TRL's. Imports TRL."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl.trainer.dpo_config import DPOConfig

from ... import objectives
from ...objectives import LossSpec


@dataclass
class TokenDPOConfig(DPOConfig):
    """TRL's `DPOConfig` and the options of this package. `TokenDPOTrainer` takes either.

    loss_type: names of `qkernels.objectives.OBJECTIVES` (TRL's fifteen, and tdpo1, tdpo2, simpo, rspo among others) and
        of `STATEFUL` (ospo, pspo), callables on `qkernels.PairScores`, or a list of these.
    loss_kwargs: options of losses that TRL has no field for: `alpha` (tdpo2), `gamma` (simpo), `memory` and the other
        options of `qkernels.semiparametric` (ospo, pspo), those of a callable.
    max_chunk_bytes, backend: as in `qkernels.fused_linear_token_dpo`.
    """

    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of losses that TRL has no field for, such as `alpha` of tdpo2."}
    )
    max_chunk_bytes: int | None = field(
        default=None, metadata={"help": "Memory for a chunk of logits; by default a share of what is free."}
    )
    backend: str = field(default="auto", metadata={"help": "Backend of qkernels, see `qkernels.info()`."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DPOConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    def __post_init__(self) -> None:
        losses: Any = self.loss_type
        self.loss_type: Any = [losses] if callable(losses) else losses
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As TRL's; a loss that is a function is named."""
        result: dict[str, Any] = super().to_dict()
        result["loss_type"] = [_name(loss) for loss in self.loss_type]
        return result


def _name(loss: Any) -> str:
    """A loss as a line of JSON has it: its name, or that of the function or class."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


# Options of the loss that TRL has a field for: their names in `loss_kwargs`, and the fields.
_FIELDS = {
    "ld_alpha": "ld_alpha",
    "use_weighting": "use_weighting",
    "f_divergence": "f_divergence_type",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "discopop_tau": "discopop_tau",
}


def loss_options(args: Any) -> dict[str, Any]:
    """TRL's options of the loss, as keyword arguments of `fused_linear_token_dpo`; losses with a memory are new.

    Args:
        args: a `DPOConfig` or `TokenDPOConfig`.

    Raises:
        ValueError: an option in `loss_kwargs` that the configuration has a field for.
    """
    kwargs = dict(getattr(args, "loss_kwargs", None) or {})
    for name, option in _FIELDS.items():
        if name in kwargs:
            raise ValueError(f"loss_kwargs[{name!r}] is the option {option} of the configuration; set it there")
    if args.ld_alpha is not None:
        kwargs["ld_alpha"] = args.ld_alpha
    if args.use_weighting:
        kwargs["use_weighting"] = True
    if args.f_divergence_type != "reverse_kl":
        kwargs["f_divergence"] = args.f_divergence_type
    if args.f_divergence_type == "alpha_divergence":
        kwargs["f_alpha_divergence_coef"] = args.f_alpha_divergence_coef
    if "discopop" in args.loss_type:
        kwargs["discopop_tau"] = args.discopop_tau
    losses, kwargs = objectives.for_run(list(args.loss_type), kwargs)
    return {
        "beta": args.beta,
        "loss_type": losses,
        "loss_weights": args.loss_weights or None,
        "label_smoothing": args.label_smoothing,
        "loss_kwargs": kwargs,
    }


def head_options(args: Any) -> dict[str, Any]:
    """The options of the head, as keyword arguments of `linear_token_stats`."""
    return {
        "max_chunk_bytes": getattr(args, "max_chunk_bytes", None),
        "backend": getattr(args, "backend", "auto"),
    }


def check_options(args: Any, loss: LossSpec, *, reference_free: bool, data_collator: Any) -> None:
    """Raise for options that contradict each other, before anything is loaded; warn where TRL ignores one.

    Args:
        args: a `DPOConfig` or `TokenDPOConfig`.
        loss: what its options of the loss mean.
        reference_free: whether the trainer has no reference.
        data_collator: of the user, or None.

    Raises:
        ValueError: a loss that the other options do not allow; packing with a collator that does not pack; DeepSpeed
            ZeRO-3.
    """
    if loss.needs_kl and args.precompute_ref_log_probs:
        raise ValueError(
            f"loss_type {args.loss_type} needs the whole distribution of the reference at every token, which"
            " precompute_ref_log_probs=True does not keep; set it to False"
        )
    if reference_free and args.sync_ref_model:
        raise ValueError(f"sync_ref_model=True has no meaning for loss_type {args.loss_type}: it has no reference")
    if args.padding_free and data_collator is not None and not getattr(data_collator, "packed", False):
        raise ValueError(
            "padding_free=True packs in the trainer's own collator, and a data_collator is given; leave it out, or"
            " give a TokenPreferenceCollator(..., packed=True)"
        )
    if args.label_smoothing and "sigmoid" in args.loss_type:
        warnings.warn(
            f"label_smoothing={args.label_smoothing} smooths the loss 'sigmoid' here (cDPO); TRL's own trainer"
            " ignores it there",
            stacklevel=3,
        )
    refuse_zero3(args)


def refuse_zero3(args: Any) -> None:
    """Raise `ValueError` for DeepSpeed ZeRO-3, whichever of TRL's configurations or launchers has asked for it."""
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 shards the head's weight between forward and backward, which this trainer does not"
            " handle; use ZeRO-2, or FSDP2, which shards weights too (accelerate launch --use_fsdp --fsdp_version 2)"
        )
