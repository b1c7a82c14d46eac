"""`qkernels trl dpo --config cfg.yaml`: TRL's own command line on this package's heads and losses.

TRL parses its options and starts its training script through `accelerate launch`; here that starts this module. It
patches TRL (`patch_trl`), puts this package's trainers and configurations in place of TRL's where there are any, and
runs TRL's script.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..patches import Patch
from .patch import patch_trl
from .version import require_trl

# TRL's command -> its names that are replaced, with ours.
OURS = {
    "dpo": {"DPOTrainer": "TokenDPOTrainer", "DPOConfig": "TokenDPOConfig"},
    "kto": {"KTOTrainer": "TokenKTOTrainer"},
    "grpo": {"GRPOTrainer": "TokenGRPOTrainer"},
}


def run_trl(arguments: Sequence[str]) -> int:
    """Run TRL's command line in this package's way.

    Args:
        arguments: those of `trl`, such as `["dpo", "--config", "cfg.yaml"]`. A command for which this package has a
            trainer also takes the options of that trainer's configuration (`TokenDPOConfig`).

    Returns:
        TRL's exit status.

    Raises:
        ImportError: as `require_trl`.
    """
    require_trl()
    main = importlib.import_module("trl.cli.main").main
    launcher = importlib.import_module("trl.cli.accelerate_launcher")
    name = next((argument for argument in arguments if argument in OURS), "")
    with Patch() as patch:
        patch.set(launcher, "launch_training_script", _launch)
        _replace(patch, name)
        return int(main(list(arguments)))


def _launch(*, script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
    """Start this module, in place of TRL's script of that name, in the processes that accelerate makes."""
    launch = importlib.import_module("accelerate.commands.launch")
    script = ["--module", __name__, Path(script_name).stem, *training_script_args]
    launch.launch_command(launch.launch_command_parser().parse_args([*launch_args, *script]))


def _replace(patch: Patch, name: str) -> None:
    """Put this package's classes in place of those of TRL that a command uses."""
    ours = importlib.import_module("qkernels.integrations.trl")
    trl: ModuleType = importlib.import_module("trl")
    for theirs, own in OURS.get(name, {}).items():
        patch.set(trl, theirs, getattr(ours, own))


def _train(name: str, patch: Patch) -> None:
    """Run TRL's training script with this package's heads, and its losses where there are any."""
    require_trl()
    patch_trl()
    _replace(patch, name)
    script: Any = importlib.import_module(f"trl.scripts.{name}")
    parsed = script.make_parser().parse_args_and_config(fail_with_unknown_args=False)
    script.main(*parsed)


if __name__ == "__main__":
    _train(sys.argv.pop(1), Patch())
