"""axolotl: fused log-probs by one line of its YAML.

    plugins:
      - qkernels.integrations.axolotl.QKernelsPlugin

With TRL 1.16 or newer its trainers get this package's heads (`patch_trl`: no logits); with the TRL that axolotl pins
(1.9 in axolotl 0.19), the fused log-probs from logits (`patch_log_softmax`). An unknown version is left as it is, with
one warning.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

from .log_softmax import patch_log_softmax
from .trl.patch import patch_trl
from .trl.version import is_known

if TYPE_CHECKING:
    BasePlugin = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError:  # tests and documentation; axolotl is there whenever axolotl loads this
        BasePlugin = object

_HOOKS = ("pre_model_load", "post_trainer_create")


class QKernelsPlugin(BasePlugin):
    """Puts this package's heads or log-probs behind the trainers that axolotl takes from TRL."""

    def pre_model_load(self, cfg: Any) -> None:
        """Patch TRL for preference and reinforcement training (`rl:` in the configuration); before a model is loaded.

        Args:
            cfg: axolotl's configuration; without `rl` nothing is changed.
        """
        missing = [name for name in _HOOKS if BasePlugin is not object and not hasattr(BasePlugin, name)]
        if missing:
            version = importlib.metadata.version("axolotl")
            warnings.warn(
                f"qkernels: axolotl {version} has no plugin hook {', '.join(missing)}; its own path stays",
                stacklevel=2,
            )
            return
        if not cfg.get("rl"):
            return
        if is_known():
            patch_trl()
        else:
            patch_log_softmax(("trl", "axolotl"))
