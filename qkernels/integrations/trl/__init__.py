"""TRL: a DPO trainer whose per-token log-probs and losses are computed here, and the same heads for other trainers.

    from qkernels.integrations.trl import TokenDPOTrainer   # instead of trl.DPOTrainer: the losses too
    from qkernels.integrations.trl import TokenGRPOTrainer, TokenKTOTrainer   # the same for GRPO and KTO
    from qkernels.integrations.trl import TokenCPOTrainer, TokenORPOTrainer   # and for TRL's experimental CPO and ORPO
    from qkernels.integrations.trl import patch_trl         # or keep your trainer: the heads alone

    version.py      which TRL this package works with
    head.py         `add_token_head`, which does what TRL's `add_fused_lm_head` does
    patch.py        patches that are undone exactly; `patch_trl`
    config.py       `TokenDPOConfig`, and what is read from it
    collator.py     `TokenPreferenceCollator`: token weights, cached log-probs, packing
    constructor.py  what is replaced in TRL while the constructor of its trainer runs
    trainer.py      `TokenDPOTrainer`
    results.py      `TokenResults`: the per-token results of a step, and TRL's metrics from them
    grpo.py         `TokenGRPOTrainer`: policy losses
    kto.py          `TokenKTOTrainer`
    paired.py       what the next two share
    cpo.py          `TokenCPOTrainer`
    orpo.py         `TokenORPOTrainer`

TRL is imported when one of the names below is used, not before. Needs TRL 1.16 or a later 1.x.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .head import add_token_head
from .patch import patch_trl, unpatch_trl
from .version import require_trl

if TYPE_CHECKING:
    from .collator import TokenPreferenceCollator
    from .config import TokenDPOConfig
    from .cpo import TokenCPOTrainer
    from .grpo import TokenGRPOTrainer
    from .kto import TokenKTOTrainer
    from .orpo import TokenORPOTrainer
    from .results import TokenResults
    from .trainer import TokenDPOTrainer

__all__ = [
    "TokenCPOTrainer",
    "TokenDPOConfig",
    "TokenDPOTrainer",
    "TokenGRPOTrainer",
    "TokenKTOTrainer",
    "TokenORPOTrainer",
    "TokenPreferenceCollator",
    "TokenResults",
    "add_token_head",
    "patch_trl",
    "require_trl",
    "unpatch_trl",
]

# Classes that derive from TRL's, by the file that has them: it imports TRL.
_LAZY = {
    "TokenCPOTrainer": "cpo",
    "TokenDPOConfig": "config",
    "TokenDPOTrainer": "trainer",
    "TokenGRPOTrainer": "grpo",
    "TokenKTOTrainer": "kto",
    "TokenORPOTrainer": "orpo",
    "TokenPreferenceCollator": "collator",
    "TokenResults": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_trl()
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
