"""`qkernels.info()`: what is installed, what can run, and what `backend="auto"` picks."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import backends
from .._version import __version__
from ..head.plan import default_chunk_bytes
from ..head.products import gradient_products, logits_product, why_this_kernel

_AUTO_RULE = "the first available of " + ", ".join(backends._MODULES) + " for the tensor's device and dtype"


class Info(dict[str, Any]):
    """A plain dict that prints as a table."""

    def __str__(self) -> str:
        lines: list[str] = []
        _render(self, 0, lines)
        return "\n".join(lines)

    __repr__ = __str__


def _render(mapping: dict[str, Any], depth: int, lines: list[str]) -> None:
    width = max((len(str(key)) for key in mapping), default=0) + 2
    for key, value in mapping.items():
        label = "  " * depth + str(key).ljust(width)
        if isinstance(value, dict):
            lines.append(label.rstrip())
            _render(value, depth + 1, lines)
        else:
            lines.append(label + (", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def info() -> Info:
    """Versions, backends with the reason where one cannot run, instruction sets and threads.

    Returns:
        A dict that prints as a table. `info()["backends"][name]` is "available" or the reason why not;
        `info()["auto"][device]` is what `backend="auto"` picks for fp32 tensors there;
        `info()["hidden_states"]` how logits and gradients come out of hidden states, and the memory of a chunk unless
        asked for.
    """
    from ..backends import cpu, cuda

    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    names = [name for name in backends.NAMES if name != "auto"]
    home = {"cuda": devices[-1], "triton": devices[-1]}

    def state(name: str) -> str:
        return backends.unavailable(name, home.get(name, devices[0]), torch.float32) or "available"

    return Info(
        qkernels=__version__,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _package_version(name) for name in ("triton", "transformers", "trl")},
        },
        platform=f"{platform.system()} {platform.machine()}",
        backends={name: state(name) for name in names},
        auto={device.type: backends.resolve_for("auto", device, torch.float32) for device in devices},
        auto_rule=_AUTO_RULE,
        native_extension={**cpu.describe(), "cuda": cuda.describe()},
        hidden_states={
            **{
                f"{device.type} {name}{what}": words(device, dtype)
                for device in devices
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
                for what, words in ((" logits", logits_product), (" dX, dW", gradient_products))
            },
            "cpu bf16 because": why_this_kernel(),
            **{f"{device.type} chunk": f"{default_chunk_bytes(device) / 2**20:.0f} MiB" for device in devices},
        },
        threads={"torch": torch.get_num_threads(), "cores": os.cpu_count()},
    )
