"""The machine that figures belong to, and why nothing can run on it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings

import torch

from .. import measure
from . import commands
from .step import ROOT


def why_no_gpu() -> str | None:
    """Why torch cannot use a GPU here, in the driver's or torch's own words; None if it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) is built without CUDA"
    try:  # is_available() hides the reason, such as a driver that is older than what torch was built with
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return str(said[0].message).splitlines()[0] if said else "torch.cuda.is_available() is False"


def why_not(device: torch.device) -> dict[str, str]:
    """Backend of a GPU -> why it cannot run here: not built, a driver that is too old, an architecture not compiled."""
    from qkernels import backends

    reasons = {name: backends.unavailable(name, device, torch.float32) for name in ("cuda", "triton")}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "rehearsal on the CPU"


def facts(device: torch.device) -> dict[str, str]:
    """The machine and software that the figures belong to, and which backends could run."""
    import qkernels

    found = measure.machine()
    found["backends"] = "; ".join(f"{name}: {state}" for name, state in qkernels.info()["backends"].items())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        gpu = f"{properties.name}, {properties.multi_processor_count} SMs, {memory}"
        built = qkernels.info()["native_extension"]["cuda"].get("version", "none")
        return {"GPU": gpu, "CUDA": f"{torch.version.cuda} of torch, {built} of the extension", **found}
    return {"rehearsal": "tiny tensors on the CPU; the figures mean nothing", **found}


def facts_anew(device: torch.device) -> dict[str, str]:
    """`facts` of a new process: this one may have imported the package before its extension was built."""
    code = "import json, sys, torch; from bench.gpu_check import machine\n"
    code += "print(json.dumps(machine.facts(torch.device(sys.argv[1]))))"
    try:
        return dict(json.loads(commands.run(sys.executable, "-c", code, str(device), keep=1, quiet=True)[0]))
    except (RuntimeError, IndexError, ValueError):
        return facts(device)


def age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def sources() -> str:
    """A digest of the package's and the kernels' sources: whether two calls checked the same code."""
    digest = hashlib.sha256()
    for folder, endings in (("qkernels", (".py",)), ("csrc", (".cpp", ".cu", ".cuh", ".h", ".txt"))):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in endings:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
