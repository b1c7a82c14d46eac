"""axolotl: fused log-probs by one line of its YAML.

    plugins:
      - qkernels.integrations.axolotl.QKernelsPlugin

With TRL 1.16 or newer its trainers get this package's heads (`patch_trl`: no logits); with the TRL that axolotl pins
(1.9 in axolotl 0.19), the fused log-probs from logits (`patch_log_softmax`, which leaves a TRL that it does not
know as it is, with one warning).
"""

from __future__ import annotations

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


class QKernelsPlugin(BasePlugin):
    """Puts this package's heads or log-probs behind the trainers that axolotl takes from TRL."""

    def pre_model_load(self, cfg: Any) -> None:
        """Patch TRL for preference and reinforcement training (`rl:` in the configuration); before a model is loaded.

        Args:
            cfg: axolotl's configuration; without `rl` nothing is changed.
        """
        if not cfg.get("rl"):
            return
        if is_known():
            patch_trl()
        else:
            patch_log_softmax(("trl", "axolotl"))
