"""The documentation site: every public name is in the API reference, and what `make docs` refuses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkernels

pytest.importorskip("sphinx", reason="Sphinx is not installed")

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS / "ext"))

import docstrings  # noqa: E402
import public_names  # noqa: E402

DIRECTIVES = re.findall(
    r"^\.\. auto\w+:: (qkernels[\w.]*)",
    "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md"))),
    re.MULTILINE,
)


@pytest.mark.parametrize("module", public_names.modules())
def test_every_public_module_is_in_the_reference(module):
    """By a directive for the module, which shows its names, or by one for each name. `make docs` checks the names."""
    if module in DIRECTIVES:
        return
    if module.endswith(".trl"):
        pytest.importorskip("trl", reason="trl is not installed")
    wanted = {f"{module}.{name}" for name in public_names.names(importlib.import_module(module))}
    assert wanted and not wanted - set(DIRECTIVES), f"docs/api/ lacks {sorted(wanted - set(DIRECTIVES))}"


def test_a_missing_name_is_noticed():
    pytest.importorskip("trl", reason="trl is not installed")
    everything = set(public_names.missing([]))
    assert {f"qkernels.{name}" for name in qkernels.__all__} - everything == {
        "qkernels.objectives",
        "qkernels.reference",
    }
    assert "qkernels.search.beam_search" in everything and "qkernels.integrations.trl.TokenDPOTrainer" in everything
    assert public_names.missing(everything - {"qkernels.search.beam_search"}) == ["qkernels.search.beam_search"]
    same_object = everything - {"qkernels.semiparametric.OSPO"}
    assert public_names.missing(same_object) == [], "qkernels.objectives.OSPO is the same class"


def test_docstrings_become_lists():
    text = "One `a*b` line.\n\nArgs:\n    x, y: two of them,\n        both 2*2.\n    As `z`.\n\nReturns:\n    `[B]`.\n"
    assert docstrings.restructured(text, parameters=["x", "y"]) == [
        "One \\ ``a*b``\\  line.", "",
        "**Arguments**", "", "- ``x``, ``y``: two of them,", "  both 2\\*2.", "", "As \\ ``z``\\ .", "",
        "**Returns**", "", "\\ ``[B]``\\ .", "",
    ]  # fmt: skip


def test_a_parameter_that_is_gone_is_a_warning(monkeypatch):
    warned = []
    monkeypatch.setattr(docstrings.log, "warning", lambda text, *values: warned.append(text % values))
    docstrings.restructured("Args:\n    x: here.\n    gone: not here.\n", parameters=["x"], where="module.function")
    assert warned == ["module.function: the docstring describes 'gone', which is not a parameter"]


def test_a_broken_link_fails_the_build(tmp_path):
    """The real configuration on pages of which one has links that lead nowhere."""
    (tmp_path / "README.md").write_text("# Start\n\n[page](docs/linear.md) [gone](docs/nowhere.md)\n", encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "linear.md").write_text("# Page\n\n[anchor](../README.md#nothing)\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(qkernels.__file__).parents[1]), *sys.path])}
    options = ["-q", "-W", "--keep-going", "-b", "dummy", "-c", str(DOCS), "-D", "extensions=myst_parser"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(tmp_path), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "docs/nowhere.md" in done.stderr and "'nothing'" in done.stderr, done.stderr
