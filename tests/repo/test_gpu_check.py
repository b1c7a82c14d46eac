"""`python -m bench.gpu_check` rehearsed on the CPU: all steps but the long ones run, and a failure is reported."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

gpu_check = pytest.importorskip("bench.gpu_check", reason="bench/ lies in the source tree only")
pytest.importorskip("qkernels._C", reason="the compiled extension is missing")

# Not the build, which would replace the module that is being tested, and not this test suite.
STEPS = (
    "values", "stats", "backward", "loss", "products", "linear", "linear_rows", "linear_peers", "launch", "waits",
    "graph", "auto", "sanitizer",
)  # fmt: skip


def test_rehearsal(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--steps", *STEPS, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for step in STEPS:
        assert f"- {step}: ok" in printed
    assert "the figures mean nothing" in printed
    (document,) = tmp_path.glob("*.json")
    works = {entry["work"] for entry in json.loads(document.read_text())["results"]}
    assert {"log-probs", "log-probs and entropy", "gradient in place", "loss and gradient, cached reference"} <= works
    assert {"plan pair_chunks", "plan frozen_head", "plan recompute", "loss from hidden states"} <= works
    (page,) = tmp_path.glob("*.md")
    assert page.read_text().strip() in printed


def test_a_failed_step_is_reported_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.STEPS, "values", (gpu_check.values, 0))
    assert gpu_check.main(["--device", "cpu", "--steps", "values", "launch"]) == 1
    printed = capsys.readouterr().out
    assert "- values: FAILED" in printed and "stopped after" in printed and "- launch: ok" in printed


@pytest.mark.parametrize("result, status, ok", [('["a line"]', 0, True), ("[]", 3, False), (None, 0, False)])
def test_what_a_step_measured_is_kept_however_it_ends(tmp_path, monkeypatch, result, status, ok):
    facts = {"work": "w", "contender": "c", "dtype": "d", "shape": "s", "unit": "GB", "floor": "copy"}
    facts |= dict.fromkeys(("milliseconds", "fastest", "slowest", "amount", "floor_ratio"), 1.5)
    lines = [gpu_check.ENTRY + json.dumps(facts | {"peak_bytes": None, "logits_bytes": 8}), "how far it came"]
    lines += [] if result is None else [gpu_check.RESULT + result]
    (tmp_path / "printed").write_text("\n".join([*lines, "a word at exit"]))
    step = tmp_path / "python"
    step.write_text(f"#!/bin/sh\ncat {tmp_path}/printed\nexit {status}\n")
    step.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(step))
    entries: list = []
    told, fine = gpu_check.one_step("values", argparse.Namespace(device="cpu", quick=False), 60, entries)
    assert fine is ok and [(entry.work, entry.milliseconds) for entry in entries] == [("w", 1.5)]
    assert told == (["a line"] if ok else ["how far it came", "a word at exit", f"ended with {status}"])


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_command_that_fails_ends_its_step():
    with pytest.raises(RuntimeError, match="ended with 3"):
        gpu_check._run(sys.executable, "-c", "print('so far'); raise SystemExit(3)")


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--help"], cwd=gpu_check.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "rehearsal" in done.stdout
