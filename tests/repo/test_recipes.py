"""The recipes of CONTRIBUTING.md work as written: their code blocks are run, and the places they name are complete."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import oracle
import qkernels
from qkernels import backends, objectives
from qkernels.core.fields import COMBINED, FIELDS
from qkernels.objectives import formulas

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "CONTRIBUTING.md"


def section(title: str) -> str:
    """The text under a heading of CONTRIBUTING.md."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found, f"CONTRIBUTING.md has no section {title!r}"
    return found[1]


def code(title: str) -> list[str]:
    """The Python blocks of a section, in order."""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", section(title), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


# --- add an objective -------------------------------------------------------------------------------------------------


def test_recipe_of_an_objective():
    """The function is written into a copy of formulas.py's namespace; the example then uses its name as `loss_type`."""
    before = dict(objectives.OBJECTIVES)
    function, example = code("Add an objective")
    try:
        exec(compile(function, "CONTRIBUTING.md, the objective", "exec"), dict(vars(formulas)))
        (name,) = set(objectives.OBJECTIVES) - set(before)
        namespace: dict = {"__name__": "__main__"}
        exec(compile(example, "CONTRIBUTING.md, the use of the objective", "exec"), namespace)
        assert f'loss_type="{name}"' in example
        assert namespace["logits"].grad.abs().sum() > 0
        hidden, head = torch.randn(4, 8, 5, requires_grad=True), torch.randn(100, 5)
        out = qkernels.fused_linear_token_dpo(hidden, head, namespace["labels"], reference_logps=0.0, loss_type=name)
        out.loss.backward()
        assert hidden.grad.abs().sum() > 0
    finally:
        for name in set(objectives.OBJECTIVES) - set(before):
            del objectives.OBJECTIVES[name]
        objectives.registry._resolve_name.cache_clear()


# --- add a per-token output -------------------------------------------------------------------------------------------

# What only the backward reads has no field in the results and no definition of its own in the oracle. What is computed
# of both models alike is looked for under the policy's name.
SOFTMAX = ("row_max", "log_sum")
OUTPUTS = [name for name in FIELDS if name not in SOFTMAX and not name.startswith("reference_")]


def places() -> list[str]:
    """The paths in the table of the recipe."""
    return re.findall(r"^\| `([^`]+)` \|", section("Add a per-token output"), re.MULTILINE)


def names(path: str, output: str) -> bool:
    """Whether a file names an output: by its name in Python, by its constant in C++."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if Path(path).suffix != ".py":
        output = "k" + output.title().replace("_", "")
    return re.search(rf"\b{output}\b", text) is not None


def test_the_recipe_names_places():
    assert len(places()) == 5, "one declaration, three implementations (torch, C++, Triton), one independent definition"
    assert not names("qkernels/core/fields.py", "entropy_of_nothing")
    assert not names("csrc/core/fields.h", "entropy_of_nothing")


@pytest.mark.parametrize("path", places())
def test_every_output_is_in_every_place(path):
    """So that a new output that is in all of them is complete."""
    missing = [output for output in OUTPUTS if not names(path, output)]
    assert not missing, f"{path}, a place of the recipe in CONTRIBUTING.md, lacks {', '.join(missing)}"


def test_an_output_is_declared_whole():
    """Its field, and how vocabulary shards of it combine; what the softmax statistics yield combines by itself."""
    fields = {name for name in FIELDS if name.removeprefix("reference_") not in SOFTMAX}
    assert fields == set(qkernels.TokenStats._fields) == set(oracle.STATS)
    by_itself = {"logps", "logsumexp", "reference_logps", "reference_logsumexp"}
    assert set(COMBINED) == fields - by_itself


def test_no_place_is_missing():
    """A file that names most of the outputs is a place where a new one may have to be named, too."""
    folders = ("qkernels/core", "qkernels/backends", "qkernels/distributed", "qkernels/functional", "csrc")
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp") and "tests" not in path.parts
    ]
    rare = ("log_sum_sq_probs", "mean_logits", "is_top1")  # the others are words of their own
    recipe = section("Add a per-token output")
    unnamed = [path for path in files if all(names(path, output) for output in rare) and f"`{path}`" not in recipe]
    assert not unnamed, f"the recipe in CONTRIBUTING.md does not name {', '.join(unnamed)}"


# --- add a backend ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_backend(tmp_path, monkeypatch):
    """The recipe's module, loaded under the name by which the recipe enters it in the registry."""
    module_text, entry = code("Add a backend")
    monkeypatch.setattr(backends, "_MODULES", dict(backends._MODULES))
    exec(compile(entry, "CONTRIBUTING.md, the registry", "exec"), vars(backends))
    (name,) = list(backends._MODULES)[len(backends.NAMES) - 1 :]
    monkeypatch.setattr(backends, "NAMES", ("auto", *backends._MODULES))
    path = tmp_path / f"{name}.py"
    path.write_text(module_text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(backends._MODULES[name], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, backends._MODULES[name], module)
    spec.loader.exec_module(module)
    backends._lookup.cache_clear()
    yield name
    backends._lookup.cache_clear()
    backends.get.cache_clear()


@pytest.mark.parametrize("inplace", [False, True])
def test_recipe_of_a_backend(recipe_backend, inplace):
    """It computes the same as the definition, forward and backward."""
    labels = torch.randint(0, 11, (4, 6))
    labels[1, 2:] = -100
    values, reference = torch.randn(4, 6, 11), torch.randn(4, 6, 11)
    results = []
    for backend in (recipe_backend, "torch"):
        leaf = values.clone().requires_grad_()
        out = qkernels.fused_token_dpo(
            leaf * 1, labels, reference_logits=reference, backend=backend, inplace_backward=inplace, loss_type="tdpo2"
        )
        out.loss.backward()
        results.append((out.token_logps, out.loss.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_recipe_of_a_backend_from_hidden_states(recipe_backend):
    hidden, head = torch.randn(4, 6, 5), torch.randn(11, 5)
    labels = torch.randint(0, 11, (4, 6))
    grads = []
    for backend in (recipe_backend, "torch"):
        leaf = hidden.clone().requires_grad_()
        qkernels.fused_linear_token_dpo(leaf, head, labels, reference_logps=0.0, backend=backend).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_recipe_of_a_backend_says_why_not(recipe_backend):
    assert backends.get(recipe_backend).unavailable(torch.device("cpu"), torch.bfloat16) is None
    with pytest.raises(ValueError, match=r"double.*the tensor is on meta"):
        qkernels.token_logps(
            torch.empty(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"), backend=recipe_backend
        )
