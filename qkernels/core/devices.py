"""What a device can do that another cannot."""

from __future__ import annotations

import torch


def on_cpu(device: torch.device) -> bool:
    """Whether the host can look at a tensor there without waiting, and torch has a CPU's GEMMs for it.

    Called as `devices.on_cpu`, so that tests can let a CPU be taken for a GPU (tests/support/like_a_gpu.py).
    """
    return device.type == "cpu"
