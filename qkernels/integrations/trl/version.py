"""Which TRL this package works with: its version, and the names in it that are replaced, overridden or called."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from types import ModuleType

OLDEST = (1, 16)
NEWEST_MAJOR = 1

# Names that are replaced or called, by module, and methods of the trainer that ours overrides or calls.
_NAMES = {
    "trl.trainer.utils": ("add_fused_lm_head", "FusedCausalLMOutput"),
    "trl.trainer.dpo_trainer": (
        "add_fused_lm_head",
        "create_model_from_path",
        "DataCollatorForPreference",
        "DPOTrainer",
    ),
}
_METHODS = (
    "_compute_loss",
    "_prepare_dataset",
    "compute_ref_log_probs",
    "_precompute_ref_logps",
    "_set_signature_columns_if_needed",
)


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; zeros for a version that has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_known() -> bool:
    """Whether the installed TRL is in the range that this package's trainer and heads know."""
    try:
        return OLDEST <= _release(importlib.metadata.version("trl")) < (NEWEST_MAJOR + 1, 0)
    except importlib.metadata.PackageNotFoundError:
        return False


def require_trl() -> ModuleType:
    """`trl.trainer.dpo_trainer`, if TRL is installed in a version that this package knows.

    Raises:
        ImportError: no TRL; one that is older than 1.16 or has a major version that is not known here; one that lacks
            a name that is used here. The message names the versions.
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("TRL is not installed: pip install 'qkernels[trl]' (TRL 1.16 or a later 1.x)") from None
    release = _release(version)
    wanted = f"{OLDEST[0]}.{OLDEST[1]} or a later {NEWEST_MAJOR}.x"
    if release < OLDEST:
        raise ImportError(f"TRL {version} is too old for this integration, which needs {wanted}: pip install -U trl")
    if release[0] > NEWEST_MAJOR:
        raise ImportError(
            f"TRL {version} has a major version that this release of qkernels does not know; it knows {wanted}."
            f" pip install 'trl<{NEWEST_MAJOR + 1}', or a newer qkernels"
        )
    missing = []
    for module, names in _NAMES.items():
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


def require_methods(trainer: type, *names: str) -> None:
    """ImportError for a trainer of TRL that lacks a method which this package overrides or calls."""
    missing = [f"{trainer.__name__}.{name}" for name in names if not hasattr(trainer, name)]
    if missing:
        raise ImportError(
            f"TRL {importlib.metadata.version('trl')} lacks {', '.join(missing)}, on which this integration stands; it"
            f" was made for TRL {OLDEST[0]}.{OLDEST[1]}. Use that version, or a newer qkernels"
        )
