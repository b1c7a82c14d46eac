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


def test_import_is_light():
    """The heavy and the optional stay out, also while `info()` looks for them, and of the demo until it runs."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import qkernels; after = set(sys.modules); "
        "str(qkernels.info()); informed = set(sys.modules); "
        "import qkernels.cli, qkernels.demo, qkernels.data, qkernels.report; "
        "print(json.dumps([sorted(s - before) for s in (after, informed, set(sys.modules))]))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "importing qkernels prints"
    after, informed, with_demo = json.loads(done.stdout)
    assert not [name for name in after if name.startswith("qkernels.integrations")]
    heavy = {"transformers", "matplotlib", "triton", "trl", "tokenizers", "tqdm", "datasets", "pandas", "pytest"}
    for modules in (after, informed):
        assert not {name.partition(".")[0] for name in modules} & heavy
    assert not {name.partition(".")[0] for name in with_demo} & {"transformers", "tokenizers", "matplotlib"}


def test_public_modules_are_found_by_name():
    code = "import qkernels; assert 'score' in dir(qkernels); print(qkernels.score.ScoreOptions.__module__)"
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout.strip() == "qkernels.score.options", done.stderr
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
    assert qkernels.TokenStats._fields == (
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
