"""TRL: a DPO trainer whose per-token log-probs and losses are computed here, and the same heads for other trainers.

    from qkernels.integrations.trl import TokenDPOTrainer   # instead of trl.DPOTrainer: the losses too
    from qkernels.integrations.trl import patch_trl         # or keep your trainer: the heads alone

TRL is imported when the first of these is used, not before. Needs TRL 1.16 or a later 1.x.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .transformers import HeadCall, install, tap_of

if TYPE_CHECKING:
    from .token_dpo_trainer import TokenDPOConfig, TokenDPOTrainer, TokenResults

__all__ = ["TokenDPOConfig", "TokenDPOTrainer", "TokenResults", "add_token_head", "patch_trl", "unpatch_trl"]

OLDEST = (1, 16)
NEWEST_MAJOR = 1

# What of TRL this module stands on: names of modules, and methods of its trainer that ours overrides or calls.
_PLUG_POINTS = {
    "trl.trainer.utils": ("add_fused_lm_head", "FusedCausalLMOutput"),
    "trl.trainer.dpo_trainer": ("add_fused_lm_head", "DataCollatorForPreference", "DPOTrainer"),
}
_METHODS = ("_compute_loss", "compute_ref_log_probs", "_precompute_ref_logps", "_set_signature_columns_if_needed")


def __getattr__(name: str) -> Any:
    if name in ("TokenDPOTrainer", "TokenDPOConfig", "TokenResults"):
        require_trl()
        from . import token_dpo_trainer

        return getattr(token_dpo_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def require_trl() -> ModuleType:
    """`trl.trainer.dpo_trainer`, if TRL is there in a version that this module knows.

    Raises:
        ImportError: no TRL; one that is older than 1.16 or has a major version that is not known here; one that lacks
            a plug point. The message names the versions.
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("TRL is not installed: pip install 'qkernels[trl]' (TRL 1.16 or a later 1.x)") from None
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    wanted = f"{OLDEST[0]}.{OLDEST[1]} or a later {NEWEST_MAJOR}.x"
    if release < OLDEST:
        raise ImportError(f"TRL {version} is too old for this integration, which needs {wanted}: pip install -U trl")
    if release[0] > NEWEST_MAJOR:
        raise ImportError(
            f"TRL {version} has a major version that this release of qkernels does not know; it knows {wanted}."
            f" pip install 'trl<{NEWEST_MAJOR + 1}', or a newer qkernels"
        )
    missing = []
    for module, names in _PLUG_POINTS.items():
        loaded = importlib.import_module(module)
        missing += [f"{module}.{name}" for name in names if not hasattr(loaded, name)]
    dpo = sys.modules["trl.trainer.dpo_trainer"]
    if not missing:
        missing = [f"DPOTrainer.{name}" for name in _METHODS if not hasattr(dpo.DPOTrainer, name)]
    if missing:
        raise ImportError(
            f"TRL {version} lacks {', '.join(missing)}, on which this integration stands; it was made for TRL"
            f" {OLDEST[0]}.{OLDEST[1]}. Use that version, or a newer qkernels"
        )
    return dpo


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
    from trl.trainer.utils import FusedCausalLMOutput

    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be of {', '.join(_OUTPUTS)}; got {unknown}")
    wanted = tuple(dict.fromkeys(("log_probs", *outputs)))
    coefficient = float(getattr(_text_config(model), "router_aux_loss_coef", None) or 0.0)

    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        tap = tap_of(self)
        if not fused_lm_head:
            passed = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return tap.forward(*args, **{k: v for k, v in passed.items() if v is not None}, **kwargs)
        # As in TRL: without labels that are shifted already, the last row predicts nothing and is left out.
        if shift_labels is not None:
            aligned = shift_labels
        elif labels is not None:
            aligned = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        else:
            raise ValueError("fused_lm_head=True needs labels or shift_labels")
        call = HeadCall(
            [_OUTPUTS[name] for name in wanted],
            fp32=cast_lm_head_to_fp32,
            temperature=temperature,
            detached=("entropy",) if detach_entropy and "entropy" in wanted else (),
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )
        result = tap.forward(*args, qkernels=call, labels=aligned, **kwargs)
        end = -1 if shift_labels is None else None
        fields = {name: result[_OUTPUTS[name]][:, :end] for name in wanted}
        mask = (aligned != -100)[:, :end]
        loss = -fields["log_probs"].sum() / (
            mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        )
        aux_loss = result.get("aux_loss")
        if aux_loss is not None:
            loss = loss + coefficient * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    install(model, forward)


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


class NotOnTheHead:
    """Stands for PEFT's layers where TRL refuses an adapter on the head: its own head ignores it, ours does not."""


# --- patching ------------------------------------------------------------------------------------------------------

# Trainers that only log the entropy.
_LOG_ENTROPY = ("trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.sft_trainer")


class Patch:
    """Attributes that stand for something else until `undo`; as a context manager, until its end."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Let `holder.name` be `value`."""
        self._before.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._before:
            setattr(*self._before.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


_active: _TRLPatch | None = None


class _TRLPatch(Patch):
    """The patch of `patch_trl`. Leaving the context of a second one, made while the first holds, undoes nothing."""

    def __init__(self, owner: bool = True) -> None:
        super().__init__()
        self.owner, self.original, self.heads = owner, None, []  # type: ignore[var-annotated]

    def __exit__(self, *exception: object) -> None:
        if self.owner:
            unpatch_trl()


def _users_of_the_head(function: Any) -> Iterator[ModuleType]:
    """TRL's modules that have imported a function under TRL's name for its head."""
    for name, module in list(sys.modules.items()):
        known = name.startswith("trl.") and isinstance(module, ModuleType)
        if known and vars(module).get("add_fused_lm_head") is function:
            yield module


def patch_trl(*, max_chunk_bytes: int | None = None, backend: str = "auto") -> Patch:
    """Give TRL's trainers this package's heads: every trainer made from now on that would use TRL's fused head.

    Their losses, metrics and options stay TRL's; the per-token log-probs (and entropy, ...) come from here. LoRA on the
    head, which TRL's DPOTrainer refuses, becomes possible in it. Trainers of modules that are imported later are
    patched as well. Calling it again changes nothing.

    Args:
        max_chunk_bytes, backend: as in `qkernels.linear_token_stats`.

    Returns:
        A context manager: `with patch_trl(): trainer = DPOTrainer(...)` patches for the block. Models keep the head
        that they have got, as they do with TRL's.

    Raises:
        ImportError: as `require_trl`.
    """
    global _active
    if _active is not None:
        return _TRLPatch(owner=False)
    dpo = require_trl()
    utils = sys.modules["trl.trainer.utils"]
    original = utils.add_fused_lm_head  # type: ignore[attr-defined]
    patch = _TRLPatch()
    for module in _users_of_the_head(original):
        head = functools.partial(
            add_token_head,
            detach_entropy=module.__name__ in _LOG_ENTROPY,
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )
        patch.heads.append(head)
        patch.set(module, "add_fused_lm_head", head)
    if hasattr(dpo, "BaseTunerLayer"):  # only where PEFT is installed
        patch.set(dpo, "BaseTunerLayer", NotOnTheHead)
    patch.original = original
    _active = patch
    return patch


def unpatch_trl() -> None:
    """Undo `patch_trl`; nothing happens if it is not in force. Also in modules that were imported meanwhile."""
    global _active
    if _active is None:
        return
    patch, _active = _active, None
    patch.undo()
    for head in patch.heads:
        for module in _users_of_the_head(head):
            module.add_fused_lm_head = patch.original  # type: ignore[attr-defined]
