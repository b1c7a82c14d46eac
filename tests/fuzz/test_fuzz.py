"""Runs the fuzzer, and shows that it can fail: each loss, and a gradient, that are off by 1 % are found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oracle
import qkernels
from fuzz import __main__ as command_line
from fuzz import calls, engine, formulas, generate, setup, tensors, wrong_calls
from qkernels import backends

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TRAINED = ("gradient of hidden", "gradient of weight", "gradient of bias")
TRITON_CASES = 10  # for 200 on the CPU: the interpreter takes 50 ms for each row


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


WRONG_CALLS = wrong_calls.all_wrong_calls()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, argument", dict.fromkeys(call[:2] for call in WRONG_CALLS))
def test_wrong_calls(function, argument):
    """Every wrong value of an argument."""
    taken = []
    for call in WRONG_CALLS:
        if call[:2] == (function, argument):
            try:
                wrong_calls.attempt(*call)
            except wrong_calls.Mismatch as mismatch:
                taken.append(str(mismatch))
    assert not taken, "\n".join(taken)


def test_every_argument_has_wrong_values():
    """A new argument without a row in the table fails here."""
    for function in wrong_calls.FUNCTIONS:
        for argument in wrong_calls.parameters(function):
            assert wrong_calls.values(function, argument), f"{function}({argument}=...)"


def test_cases_are_plain_and_the_same_every_time():
    for number in range(50):
        case = generate.draw(5, number, "cpu")
        assert case == generate.draw(5, number, "cpu") == json.loads(json.dumps(case))


def test_every_function_and_option_is_drawn():
    drawn = [generate.draw(11, number, "torch") for number in range(3000)]
    assert {case["call"] for case in drawn} == {*calls.CALLS, "wrong_call"}
    for key in setup.DEFAULTS:
        assert any(key in case for case in drawn), f"no case says {key}"


# --- it can fail ------------------------------------------------------------------------------------------------------


def _first_failure(only: str, cases: int = 3000) -> engine.Failure:
    _, failures = engine.fuzz(cases, 0, "torch", stop_after=1, only=only)
    assert failures, "not found"
    return failures[0]


def test_a_wrong_gradient_of_one_percent_is_found_and_shrunk(monkeypatch):
    from qkernels.backends import reference as backend

    original = backend._row_grad
    monkeypatch.setattr(backend, "_row_grad", lambda *args: original(*args) * 1.01)
    failure = _first_failure("token_logps", 100)
    assert failure.kind == "token_logps: gradient"
    assert set(failure.case) <= {"call", "seed", "dtype", "vocab", "rows"}, failure.case


@pytest.mark.parametrize("name", formulas.NAMES)
@pytest.mark.parametrize("call", ["fused_token_dpo", "fused_linear_token_dpo"])
def test_a_loss_that_is_off_by_one_percent_is_found(monkeypatch, name, call):
    from qkernels.objectives.registry import LossSpec

    original = LossSpec.losses
    monkeypatch.setattr(LossSpec, "losses", lambda *args, **kwargs: original(*args, **kwargs) * 1.01)
    drawn = (generate.draw(2, number, "torch") for number in range(400))
    # The default loss with a mean over pairs is another operation of the backend.
    cases = ({**case, "loss": [name], "reduction": "sum"} for case in drawn if case["call"] == call)
    found = next((failure for case in cases if (failure := engine.run(case, "torch"))), None)
    assert found is not None and found.kind.split(": ")[1] in ("loss", "gradient", *TRAINED)
    monkeypatch.undo()
    assert engine.run(found.case, "torch") is None


@pytest.mark.parametrize("name", formulas.NAMES)
@pytest.mark.parametrize("divergence", formulas.DIVERGENCES)
def test_the_formulas_are_those_of_the_oracle(name, divergence):
    """The formulas here, which stay finite, and the oracle's, which are written in likelihood ratios."""
    random = tensors.Random(3)
    values = {key: 3 * random.normal(5).double() for key in ("r", "logp", "ref", "full", "k")}
    pairs = [
        oracle.Pair(
            r_w=values["r"][i], r_l=values["r"][-i], logp_w=values["logp"][i], logp_l=values["logp"][-i],
            ref_w=values["ref"][i], ref_l=values["ref"][-i], n_w=i + 1.0, n_l=5.0 - i, kl_w=values["k"][i].abs(),
            kl_l=values["k"][-i].abs(), full_logp_w=values["full"][i],
        )
        for i in range(5)
    ]  # fmt: skip
    eps = 0.1 if name in formulas.SMOOTHED else 0.0
    expected = oracle.objective(name, pairs, oracle.Options(0.3, eps, divergence, discopop_tau=0.5))
    keys = {"r_w": "r_w", "r_l": "r_l", "logp_w": "logp_w", "logp_l": "logp_l", "ref_w": "ref_w", "ref_l": "ref_l",
            "n_w": "n_w", "n_l": "n_l", "k_w": "kl_w", "k_l": "kl_l", "full_w": "full_logp_w"}  # fmt: skip
    features = {
        key: torch.stack([torch.as_tensor(getattr(pair, field), dtype=torch.float64) for pair in pairs])
        for key, field in keys.items()
    }
    settings = formulas.Settings(0.3, eps, divergence, discopop_tau=0.5)
    actual, size = formulas.losses(name, features, settings)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert bool((size >= actual.abs() - 1e-12).all())


@pytest.mark.parametrize(
    "case, status, said",
    [('{"call": "token_logps", "vocab": 3}', 0, "passed\n"),
     ('{"call": "token_logps", "vocab": "three"}', 1, "failed: token_logps: raised"),
     ('{"call": "token_logps", "vocabulary": 3}', 1, "vocabulary")],
)  # fmt: skip
def test_the_line_of_a_failure_repeats_it(monkeypatch, capsys, case, status, said):
    monkeypatch.setattr(sys, "argv", ["tests.fuzz", "--backend", "torch", "--case", case])
    try:
        ended = command_line.main()
    except Exception as error:  # as a process it ends with 1, and its traceback is in sight
        ended, printed = 1, str(error)
    else:
        printed = capsys.readouterr().out
    assert ended == status and said in printed
