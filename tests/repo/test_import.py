"""What importing the package does and does not do, its public names and signatures, and the command line."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels import backends, objectives
from qkernels.cli import main

ROOT = Path(qkernels.__file__).resolve().parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run this Python in a process of its own, with this copy of the package on its path."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, **environment}, check=False,
    )  # fmt: skip


HEAVY = ("transformers", "matplotlib", "triton", "trl", "tokenizers", "tqdm", "datasets", "pandas", "pytest")
# Statement -> what must not have been imported once it has run.
STAYS_OUT = {
    "import qkernels": (*HEAVY, "qkernels.integrations"),
    "import qkernels; str(qkernels.info())": HEAVY,  # also while it looks for them
    "import qkernels.cli, qkernels.demo, qkernels.data, qkernels.report": ("transformers", "tokenizers", "matplotlib"),
    "import qkernels.cli, qkernels.score, qkernels.heatmap, qkernels.preference_classifier": (
        "transformers", "tokenizers", "pyarrow", "pandas", "matplotlib", "peft",
    ),
    "import qkernels.integrations.transformers, qkernels.integrations.trl": (
        "transformers", "trl", "peft", "accelerate", "datasets",
    ),
    "import qkernels; assert 'score' in dir(qkernels); qkernels.score.ScoreOptions": ("qkernels.demo", "transformers"),
    # who imports whom
    "import qkernels.text.lengths, qkernels.text.characters": ("qkernels.score",),
    "import qkernels.demo, qkernels.demo.encode": ("qkernels.score",),
    "import qkernels.preference_classifier": ("qkernels.score",),
    "import qkernels.monitor": ("qkernels.integrations",),
    "import qkernels.score": ("qkernels.demo",),
}  # fmt: skip
# Importing torch takes seconds: one process does it, and runs each statement in a fork of itself.
FORKS = """
import json, os, sys, torch
before = set(sys.modules)
for statement in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            exec(statement, {})
            told = sorted(set(sys.modules) - before)
        except BaseException as error:
            told = repr(error)
        print(json.dumps([statement, told]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported():
    """Statement -> the modules that it imports, torch's aside, or the error that it ends with."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    done = python("-c", FORKS, json.dumps(list(STAYS_OUT)))
    assert done.returncode == 0 and done.stderr == "", f"importing prints: {done.stderr[-2000:]}"
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("statement", STAYS_OUT)
def test_the_heavy_and_the_optional_stay_out(imported, statement):
    if "demo.encode" in statement:
        pytest.importorskip("transformers")
    found = imported[statement]
    assert isinstance(found, list), found
    inside = [n for n in found if any(n == out or n.startswith(f"{out}.") for out in STAYS_OUT[statement])]
    assert inside == []


def test_a_name_that_is_no_module():
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        qkernels.scores  # noqa: B018


def test_command_line_info():
    done = python("-m", "qkernels", "info")
    assert done.returncode == 0, done.stderr
    assert qkernels.__version__ in done.stdout and torch.__version__ in done.stdout
    for word in ("backends", "threads", "torch", "cpu", "triton", "cuda", "auto"):
        assert word in done.stdout, f"{word} is missing:\n{done.stdout}"
    assert re.search(r"torch +available", done.stdout)
    for name in backends.NAMES[1:]:
        assert re.search(rf"^ +{name} +\S", done.stdout, re.MULTILINE), f"no line on backend {name}"


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_command_line_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and "usage" in printed.err and printed.out == ""


def test_command_line_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.strip() == f"qkernels {qkernels.__version__}"


def test_info_tells_what_runs_and_why_not(backend):
    info = qkernels.info()
    assert info["qkernels"] == qkernels.__version__ == qkernels.info()["qkernels"]
    assert info["backends"][backend.name] == "available"
    assert info["versions"]["torch"] == torch.__version__
    for name in backends.NAMES[1:]:
        device = backend.device if name == backend.name else torch.device("cpu")
        reason = backends.unavailable(name, device, torch.float32)
        assert (info["backends"][name] == "available") or reason or name in ("cuda", "triton")
    picked = info["auto"][backend.device.type]
    assert picked == backends.resolve("auto", torch.zeros(1, device=backend.device))
    json.dumps({key: str(value) for key, value in info.items()})


def test_auto_takes_the_first_backend_that_can(backend):
    able = [name for name in backends._MODULES if backends.unavailable(name, backend.device, torch.float32) is None]
    assert backends.resolve("auto", torch.zeros(1, device=backend.device)) == able[0]
    assert backends.resolve("auto", torch.zeros(1, dtype=torch.float64, device=backend.device)) == "torch"
    if "cpu" in able:
        assert able[0] == "cpu", "compiled kernels come before the reference"


def test_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", qkernels.__version__)


# --- public names -----------------------------------------------------------------------------------------------------

# As designed. A "/" would forbid names for the tensors, so there is none.
SIGNATURES = {
    "fused_token_dpo": (
        "policy_logits, labels, *, reference_logits=None, reference_logps=None, beta=0.1, loss_type='sigmoid',"
        " loss_weights=None, label_smoothing=0.0, loss_kwargs=None, token_weights=None, cu_seqlens=None,"
        " temperature=1.0, ignore_index=-100, reduction='mean', inplace_backward=False, backend='auto',"
        " tp_group=None, sp_group=None"
    ),
    "token_logps": (
        "logits, labels, *, temperature=1.0, ignore_index=-100, inplace_backward=False, backend='auto', tp_group=None"
    ),
    "token_stats": (
        "logits, labels, *, reference_logits=None, outputs=('logps', 'logsumexp'), temperature=1.0,"
        " ignore_index=-100, inplace_backward=False, backend='auto', tp_group=None"
    ),
    "token_mdp": (
        "logits, labels, *, reference_logits=None, reference_logps=None, beta=0.1, cu_seqlens=None,"
        " ignore_index=-100, backend='auto'"
    ),
    "shift_labels": "labels, *, mask=None, cu_seqlens=None, ignore_index=-100",
    "info": "",
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signature(name):
    signature = inspect.signature(getattr(qkernels, name))
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == f"({SIGNATURES[name]})"


@pytest.mark.quick
def test_public_names():
    for name in qkernels.__all__:
        assert getattr(qkernels, name) is not None
    assert set(SIGNATURES) <= set(qkernels.__all__)
    assert {"objectives", "reference", "TokenStats", "TokenDPOOutput", "TokenMDP"} <= set(qkernels.__all__)


@pytest.mark.quick
def test_fields_of_the_results():
    assert qkernels.TokenDPOOutput._fields == (
        "loss", "chosen_rewards", "rejected_rewards", "token_logps", "reference_token_logps", "token_rewards",
        "logsumexp",
    )  # fmt: skip
    # A new per-token output comes after these.
    assert qkernels.TokenStats._fields[:10] == (
        "logps", "logsumexp", "entropy", "kl_reference_policy", "kl_policy_reference", "log_sum_sq_probs",
        "mean_logits", "is_top1", "reference_logps", "reference_logsumexp",
    )  # fmt: skip
    assert qkernels.TokenMDP._fields == ("Q", "V", "A", "implicit_rewards", "bellman_rewards")


def test_every_public_function_says_what_it_does():
    """Shapes, results and errors are in the docstring (house rule)."""
    for name in ("fused_token_dpo", "token_logps", "token_stats", "token_mdp", "shift_labels"):
        text = inspect.getdoc(getattr(qkernels, name))
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in text, f"{name} has no {section}"
        for parameter in inspect.signature(getattr(qkernels, name)).parameters:
            assert parameter in text, f"{name} does not explain {parameter}"


def test_reference_module_runs_the_torch_backend():
    logits, labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.ones(2, 3, dtype=torch.int64)
    expected = logits.log_softmax(-1)[..., 1]
    assert torch.allclose(qkernels.reference.token_logps(logits, labels), expected, atol=1e-12)
    assert qkernels.reference.token_stats(logits, labels).logps.dtype == torch.float64
    out = qkernels.reference.fused_token_dpo(logits, labels, reference_logps=0.0)
    assert torch.allclose(out.token_logps, expected, atol=1e-12)
    assert torch.allclose(qkernels.reference.token_mdp(logits, labels, reference_logps=0.0).A, 0.1 * expected)


def test_objectives_are_listed_with_their_options():
    assert objectives.OBJECTIVES["discopop"].options == {"discopop_tau": 0.05}
    assert objectives.OBJECTIVES["tdpo2"].options == {"alpha": 0.5}
    assert not objectives.OBJECTIVES["sigmoid"].options
    coupled = {name for name, objective in objectives.OBJECTIVES.items() if not objective.separable}
    assert coupled == {"sft", "aot", "aot_unpaired", "rspo"}
