"""verl: this package's head behind `linear_cross_entropy` and `FusedLinearForPPO`, verl's two fused heads.

    QKERNELS_VERL=1 python -m verl.trainer.main_ppo ... actor_rollout_ref.model.use_fused_kernels=True

An entry point of the group `verl.plugins` loads `plugin.py` with verl; without the variable it changes nothing. In
place of the variable, verl's configuration may name `model.external_lib: qkernels.integrations.verl.enable`.

    heads.py    the functions, with verl's signatures
    plugin.py   what the entry point loads
    enable.py   importing it installs the heads
"""

from .heads import install, uninstall

__all__ = ["install", "uninstall"]
