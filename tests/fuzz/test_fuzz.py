"""Runs the fuzzer, and shows that it can fail: on packages with a known defect, and on the oracle of another loss."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels
from fuzz import calls, engine, generate, wrong_calls
from qkernels import backends

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TRITON_CASES = 20  # for 200 on the CPU: the interpreter takes 50 ms for each row


def _explain(failures: list[engine.Failure], backend: str) -> str:
    return "\n".join(f"{failure.message}\n  {failure.line(backend)}" for failure in failures)


def _command(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m tests.fuzz` with the package that is tested here, wherever it is installed."""
    path = os.pathsep.join([str(Path(qkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *arguments],
        env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "torch", "cuda"])
def test_random_calls(name, fuzz_options):
    cases, seed, wanted = fuzz_options
    if wanted not in (None, name):
        pytest.skip(f"only {wanted} was asked for")
    device = torch.device("cuda" if name == "cuda" and torch.cuda.is_available() else "cpu")
    if wanted is None and (reason := backends.unavailable(name, device, torch.float32)):
        pytest.skip(reason)
    _, failures = engine.fuzz(cases, seed, name)
    assert not failures, _explain(failures, name)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_random_calls_of_triton(fuzz_options):
    """In a process of its own, because Triton decides at its import whether it interprets."""
    cases, seed, wanted = fuzz_options
    if wanted not in (None, "triton"):
        pytest.skip(f"only {wanted} was asked for")
    number = cases if wanted == "triton" else max(1, cases * TRITON_CASES // 200)
    done = _command("--backend", "triton", "--cases", str(number), "--seed", str(seed))
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout[-10000:] + done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, argument, number", wrong_calls.all_wrong_calls())
def test_wrong_call(function, argument, number):
    wrong_calls.attempt(function, argument, number)


def test_every_argument_has_wrong_values():
    """A new argument without a row in the table fails here."""
    import inspect

    for function, call in wrong_calls.FUNCTIONS.items():
        for argument in inspect.signature(call).parameters:
            assert wrong_calls.values(function, argument), f"{function}({argument}=...)"


def test_cases_are_plain_and_the_same_every_time():
    for number in range(50):
        case = generate.draw(5, number, "cpu")
        assert case == generate.draw(5, number, "cpu") == json.loads(json.dumps(case))


def test_every_function_and_option_is_drawn():
    drawn = [generate.draw(11, number, "torch") for number in range(3000)]
    assert {case["call"] for case in drawn} == {*calls.CALLS, "wrong_call"}
    for key in calls.DEFAULTS:
        assert any(key in case for case in drawn), f"no case says {key}"


# --- it can fail ------------------------------------------------------------------------------------------------------


def _first_failure(only: str, cases: int = 3000) -> engine.Failure:
    _, failures = engine.fuzz(cases, 0, "torch", stop_after=1, only=only)
    assert failures, "not found"
    return failures[0]


def test_a_wrong_gradient_of_one_percent_is_found_and_shrunk(monkeypatch):
    from qkernels.backends import torch as backend

    original = backend._row_grad
    monkeypatch.setattr(backend, "_row_grad", lambda *args: original(*args) * 1.01)
    failure = _first_failure("token_logps", 100)
    assert failure.kind == "token_logps: gradient"
    assert set(failure.case) <= {"call", "seed", "dtype", "vocab", "rows"}, failure.case


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_wrong_loss_is_found(monkeypatch, factor):
    from qkernels.objectives.registry import Plan

    original = Plan.losses
    monkeypatch.setattr(Plan, "losses", lambda *args, **kwargs: original(*args, **kwargs) * factor)
    assert _first_failure("fused_token_dpo", 300).kind.startswith("fused_token_dpo: ")


def test_the_line_of_a_failure_repeats_it(monkeypatch):
    done = _command("--backend", "torch", "--case", '{"call": "token_logps", "vocab": 3}')
    assert done.returncode == 0 and done.stdout == "passed\n", done.stderr
    done = _command("--backend", "torch", "--case", '{"call": "token_logps", "vocab": "three"}')
    assert done.returncode == 1 and "failed: token_logps: raised" in done.stdout
    done = _command("--backend", "torch", "--case", '{"call": "token_logps", "vocabulary": 3}')
    assert done.returncode == 1 and "vocabulary" in done.stdout
