"""Commands that steps run: their output is passed on, so that a step that is stopped shows how far it came."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .step import ROOT, Missing


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds `bench` and the package of this source tree."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def run(*command: str, keep: int = 2, allowed: tuple[int, ...] = (0,), quiet: bool = False, **more: str) -> list[str]:
    """Run a command in the source tree; its last `keep` lines that are not empty.

    Raises:
        RuntimeError: it ended with another status than `allowed`; the message holds its last lines.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if not quiet:
            print(line, end="", flush=True)
        lines.append(line.rstrip())
    last = [line for line in lines if line][-keep:]
    if process.wait() not in allowed:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: " + " | ".join(last))
    return last


def tool(name: str) -> str:
    """A tool of the CUDA toolkit: on the PATH, or where CUDA and Nsight Compute are usually installed.

    Raises:
        Missing: it is not installed.
    """
    places = ["/usr/local/cuda/bin", *map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True))]
    for candidate in (name, *(f"{place}/{name}" for place in places)):
        if found := shutil.which(candidate):
            return found
    raise Missing(f"not installed: {name}")
