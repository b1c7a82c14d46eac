"""Runs `tests/support/triton_checks.py`, the Triton kernels against the oracle: interpreted, and on a GPU where one is.

In a process of its own, because Triton decides at its import whether it interprets. Without a GPU this is the only
way the values of the kernels can be tested; `test_triton_aot.py` looks at their machine code.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import qkernels
from qkernels import backends
from qkernels.backends import triton as backend

CHECKS = Path(__file__).parents[1] / "support/triton_checks.py"
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
HAS_TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", params=["interpreter", "gpu"])
def outcomes(request, tmp_path_factory):
    """Name of a check -> what each of its cases ended with: "" or the last lines of its failure."""
    if request.param == "gpu" and (not torch.cuda.is_available() or backend.unavailable(GPU, torch.float32)):
        pytest.skip("there is no GPU that the Triton kernels run on")
    written = tmp_path_factory.mktemp("triton") / "checks.xml"
    # The interpreter is slow; on a GPU every case runs.
    some = request.param == "interpreter" and "not nightly" in request.config.option.markexpr
    # The package that is tested here is tested there, wherever it is installed.
    path = os.pathsep.join([str(Path(qkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
         f"--junitxml={written}", *(["-m", "not nightly"] if some else []), str(CHECKS)],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if request.param == "interpreter" else "0"},
        cwd=CHECKS.parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), f"the checks did not run:\n{done.stdout[-2000:]}\n{done.stderr[-1000:]}"
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(written).iter("testcase"):
        failed = [*case.iter("failure"), *case.iter("error")]
        lines = (failed[0].text or "").splitlines()[-20:] if failed else []
        found.setdefault(case.attrib["name"].partition("[")[0], []).append(
            "\n".join([case.attrib["name"], *lines]) if failed else ""
        )
    return found


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize("name", NAMES)
def test_kernels(outcomes, name):
    """Every case of the check of this name has run and passed; the first that failed is printed."""
    assert outcomes[name], "the check has not run"
    failed = [text for text in outcomes[name] if text]
    if failed:
        pytest.fail(f"{len(failed)} of {len(outcomes[name])} cases failed; the first: {failed[0]}", pytrace=False)


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
