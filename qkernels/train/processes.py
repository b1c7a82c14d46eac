"""Several processes: whether a launcher has started as many as it was asked for, FSDP2 on CPUs, saving shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..integrations.patches import Patch
from .options import TrainError


def check_launcher(processes: int) -> None:
    """Refuse to train in one process what was started as several.

    Args:
        processes: how many accelerate sees.

    Raises:
        TrainError: `accelerate launch --cpu` has started one process for several, or processes would not know of each
            other.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if processes != started:
        raise TrainError(
            f"the launcher has started {started} processes, and accelerate joins {processes}; without an accelerator"
            " they are joined with --use-cpu"
        )
    # accelerate sets the address where it was asked for several, and no launcher but mpirun has told their number.
    ranks = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    if on_cpus and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in ranks):
        raise TrainError(
            "accelerate launch has started one process where several were asked for: with --cpu (or `use_cpu: true`) it"
            " leaves that to mpirun, and needs --mpirun_hostfile. Use torchrun --nproc-per-node N -m qkernels train"
            " ..., or accelerate launch --multi_gpu --num_processes N -m qkernels train ..., which takes CPUs too"
        )


def check_sharding(args: Any) -> None:
    """Refuse DeepSpeed ZeRO-3, and the FSDP that torch has for accelerators alone where there is none.

    Args:
        args: TRL's `DPOConfig`.

    Raises:
        TrainError: one of them is asked for, in `args` or of `accelerate launch`.
    """
    import torch

    from ..integrations.trl.config import refuse_zero3

    try:
        refuse_zero3(args)
    except ValueError as error:
        raise TrainError(str(error)) from None

    if fsdp_version(args) == 1 and (args.use_cpu or not torch.accelerator.is_available()):
        raise TrainError(
            "FSDP1 shards models on accelerators alone, and there is none; FSDP2 does on CPUs as well: --fsdp_version 2"
            " of accelerate launch (`fsdp_version: 2` in its file), or --fsdp-config '{\"version\": 2}'"
        )


def fsdp_version(args: Any) -> int | None:
    """The FSDP that TRL's `DPOConfig` or `accelerate launch` has asked for; None for none."""
    if plugin := getattr(args, "fsdp_plugin_args", None):
        return int(plugin["fsdp_version"])
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return int(os.environ.get("FSDP_VERSION") or 1) if asked else None


def sharding_on_cpus() -> Patch:
    """As a context: FSDP2 that was asked for shards models on CPUs as well.

    torch's FSDP2 takes gloo. accelerate reads what it is told of FSDP where it finds accelerators, and trains without
    sharding and without a word elsewhere.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        shared = PartialState._shared_state
        if options.get("fsdp_plugin") is not None and shared.get("distributed_type") == DistributedType.MULTI_CPU:
            # Of the types that accelerate looks for FSDP under; with the plugin it makes it DistributedType.FSDP.
            shared["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **options)

    patch = Patch()
    patch.set(AcceleratorState, "__init__", init)
    return patch


def save_model(trainer: Any, folder: Path) -> None:
    """Save the trained model in one piece; every process calls it.

    By itself transformers saves no model whose checkpoints are in shards, which is accelerate's default for FSDP2.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
