"""Patches of TRL that are undone exactly, and `patch_trl`, which gives TRL's own trainers this package's heads."""

from __future__ import annotations

import functools
import gc
import sys
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..patches import Patch, holders
from .head import add_token_head
from .version import require_trl


class _NoAdapter:
    """A class without instances."""


def allow_adapter_on_head(patch: Patch, dpo_trainer: ModuleType) -> None:
    """Let TRL's DPOTrainer take LoRA on the head.

    Stands for `isinstance(model.get_output_embeddings(), BaseTunerLayer)` in `DPOTrainer.__init__` (TRL 1.16.0,
    trl/trainer/dpo_trainer.py:835), which raises because TRL's own head ignores the adapter. This package's does not.
    """
    if hasattr(dpo_trainer, "BaseTunerLayer"):  # only where PEFT is installed
        patch.set(dpo_trainer, "BaseTunerLayer", _NoAdapter)


# --- patch_trl -----------------------------------------------------------------------------------------------------

# Modules whose trainers only log the entropy.
_LOG_ENTROPY = ("trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.sft_trainer")

_active: _TRLPatch | None = None


class _TRLPatch(Patch):
    """The patch of `patch_trl`. Leaving the block of a second one, made while the first is in force, undoes nothing.

    heads: the functions that replace TRL's `add_fused_lm_head`.
    original: TRL's own.
    """

    def __init__(self, owner: bool = True) -> None:
        super().__init__()
        self.owner = owner
        self.original: Any = None
        self.heads: list[Callable[..., None]] = []

    def undo(self) -> None:
        if self.owner:
            unpatch_trl()

    def put_back(self) -> None:
        """What `unpatch_trl` does first."""
        super().undo()


def _models_with_head_of(add_head: Any) -> int:
    """How many live models have been given TRL's own head: their forwards are functions made inside `add_head`."""
    code = getattr(add_head, "__code__", None)
    inner = [] if code is None else [part for part in code.co_consts if isinstance(part, CodeType)]

    def count() -> int:
        return sum(isinstance(holder, FunctionType) for part in inner for holder in gc.get_referrers(part))

    if count():
        gc.collect()  # trainers that are gone may wait for it, in cycles
    return count()


def patch_trl(*, max_chunk_bytes: int | None = None, backend: str = "auto") -> Patch:
    """Give TRL's trainers this package's heads: every trainer made from now on that would use TRL's fused head.

    Their losses, metrics and options stay TRL's; the per-token log-probs (and entropy, ...) come from here. LoRA on the
    head, which TRL's DPOTrainer refuses, becomes possible in it. Trainers of modules that are imported later are
    patched as well. Calling it again changes nothing. A trainer made before keeps TRL's head; where there is one, a
    warning says so.

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
    dpo_trainer = require_trl()
    patch = _TRLPatch()
    patch.original = vars(sys.modules["trl.trainer.utils"])["add_fused_lm_head"]
    if (before := _models_with_head_of(patch.original)) > 0:
        warnings.warn(
            f"patch_trl() comes too late for {before} {'model' if before == 1 else 'models'} whose trainers exist"
            " already: they keep TRL's own head. Call patch_trl() before trainers are made, or make them again",
            stacklevel=2,
        )
    for module in holders(patch.original, "add_fused_lm_head", ("trl",)):
        head = functools.partial(
            add_token_head,
            detach_entropy=module.__name__ in _LOG_ENTROPY,
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )
        patch.heads.append(head)
        patch.set(module, "add_fused_lm_head", head)
    allow_adapter_on_head(patch, dpo_trainer)
    _active = patch
    return patch


def unpatch_trl() -> None:
    """Undo `patch_trl`, also in modules that were imported meanwhile; does nothing if it is not in force."""
    global _active
    if _active is None:
        return
    patch, _active = _active, None
    patch.put_back()
    for head in patch.heads:
        for module in holders(head, "add_fused_lm_head", ("trl",)):
            vars(module)["add_fused_lm_head"] = patch.original
