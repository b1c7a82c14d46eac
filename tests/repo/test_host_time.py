"""`python -m bench.host_time`: every step runs, and its command prints one line for each. Times are not tested."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

import qkernels

host_time = pytest.importorskip("bench.host_time", reason="bench/ lies in the source tree only")


def test_every_step_runs_and_leaves_gradients():
    for name, step in host_time.steps(qkernels).items():
        result = step()
        # Forward alone returns its results; forward and backward nothing.
        assert (result is None) == ("forward" not in name), name


def test_a_round_is_one_number_for_each_step(monkeypatch, capsys):
    monkeypatch.setattr(host_time, "_WINDOW", 1)
    threads = torch.get_num_threads()
    try:
        host_time.measure(1, "cached reference")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in printed] == [
        "fused_token_dpo, cached reference",
        "fused_linear_token_dpo, cached reference",
    ]
    assert all(re.fullmatch(r"\d+\.\d{3}", line.split(" ", 1)[0]) for line in printed)
    host_time.measure(1, "import")
    assert capsys.readouterr().out.endswith(f" {host_time.IMPORT}\n")


def test_an_installation_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        host_time.round_of("false", 1, "")
