"""What can run on this machine: backends with the devices and dtypes they take."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from qkernels import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Backend:
    """A backend and a device it runs on."""

    name: str
    device: torch.device

    def __str__(self) -> str:
        return self.name if self.device.type == _home(self.name) else f"{self.name}-{self.device.type}"

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether logits of this dtype can be given to it."""
        return backends.unavailable(self.name, self.device, dtype) is None

    @property
    def module(self):
        """The module with its row operations."""
        return backends.get(self.name)


def _home(name: str) -> str:
    return "cuda" if name in ("cuda", "triton") else "cpu"


@functools.cache
def runnable_backends() -> list[Backend]:
    """Every registered backend on every device where it can take fp32 logits."""
    devices = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    found = [Backend(name, device) for name in backends._MODULES for device in devices]
    return [backend for backend in found if backend.takes(torch.float32)]


CPU = Backend("cpu", torch.device("cpu"))
