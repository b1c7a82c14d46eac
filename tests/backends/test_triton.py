"""Runs `triton_checks.py`, the Triton kernels against the oracle: in the interpreter, and on a GPU if there is one.

In a process of its own, because Triton decides at its import whether it interprets. Without a GPU this is the only
way the values of the kernels can be tested; `test_triton_aot.py` looks at their machine code.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels import backends
from qkernels.backends import triton as backend

CHECKS = Path(__file__).parents[1] / "support/triton_checks.py"
HAS_TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.device("cuda", 0)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("where", ["interpreter", "gpu"])
def test_kernels_match_the_truth(where):
    if where == "gpu" and (not torch.cuda.is_available() or backend.unavailable(GPU, torch.float32)):
        pytest.skip("there is no GPU that the Triton kernels run on")
    # The package that is tested here is tested there, wherever it is installed.
    path = os.pathsep.join([str(Path(qkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(CHECKS)],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"},
        cwd=CHECKS.parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert "the tensor is on cpu" in backend.unavailable(cpu, torch.float32)
    assert "the tensor is on meta" in backend.unavailable(torch.device("meta"), torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable(cpu, torch.float32) is None
    assert "got torch.float64" in backend.unavailable(cpu, torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    if torch.version.hip is None:
        assert "8.0 or higher, cuda:0 has 7.5" in backend.unavailable(GPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert backend.unavailable(GPU, torch.bfloat16) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backend.unavailable(cpu, torch.float32)


def test_auto_never_picks_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends._lookup.cache_clear()
    try:
        assert backends._lookup("auto", torch.device("cpu"), torch.float32) in ("cpu", "torch")
    finally:
        backends._lookup.cache_clear()
