"""`python -m bench.compare_installs`: equal installations are equal, and one number that is changed is found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import qkernels

compare = pytest.importorskip("bench.compare_installs", reason="bench/ lies in the source tree only")
HERE = Path(qkernels.__file__).resolve().parent
ONLY = "fused_token_dpo: torch, float32, dense, reference none, ipo"


@pytest.fixture
def copied(tmp_path):
    """This package once more, as a source tree of its own."""
    shutil.copytree(HERE, tmp_path / "qkernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.nightly  # the test below finds all calls equal but those of one loss
def test_a_copy_is_equal(copied, capsys):
    assert compare.main([str(HERE.parent), str(copied), "--only", ONLY]) == 0
    printed = capsys.readouterr().out
    assert f"B: {copied / 'qkernels'}" in printed and "1 calls (0 of which raise)" in printed


def test_a_changed_number_is_found(copied, capsys):
    path = copied / "qkernels/objectives/formulas.py"
    text = path.read_text(encoding="utf-8")
    assert "1 / (2 * beta)" in text
    path.write_text(text.replace("1 / (2 * beta)", "1.0001 / (2 * beta)"), encoding="utf-8")
    every_loss = ONLY.removesuffix("ipo")
    assert compare.main([str(HERE.parent), str(copied), "--only", every_loss]) == 1
    printed = capsys.readouterr().out
    (found,) = re.findall(r"(\d+) of (\d+) calls differ; the first: (.*)", printed)
    assert 0 < int(found[0]) < int(found[1]) and found[2].startswith(f"{ONLY}: loss: 1 of 1 entries; at ()"), printed


def test_what_cannot_be_run_has_a_status_of_its_own(tmp_path, capsys):
    assert compare.main([str(tmp_path / "python"), str(HERE.parent)]) == 2
    assert "the calls did not run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        compare.main([str(HERE.parent)])
    assert caught.value.code == 2 and "got 1" in capsys.readouterr().err


def test_every_kind_of_difference():
    x = torch.tensor([1.0, -0.0, torch.nan])
    y = torch.tensor([1.0, 0.0, torch.nan])
    assert compare.difference({"a": x, "b": None}, {"a": x.clone(), "b": None}) is None
    assert compare.difference({"a": x}, {"a": y}) == "a: 1 of 3 entries; at (1,) -0.0 and 0.0"
    assert compare.difference({"a": x}, {"a": x.double()}).startswith("a: torch.float32 (3,) and torch.float64")
    assert compare.difference({"a": x}, {"a": None}) == "a: a tensor and None"
    assert compare.difference({"a": x}, {"c": x}) == "results ['a'] and ['c']"
    assert compare.difference("ValueError", {"a": x}) == "ValueError and no error"
    assert compare.difference("ValueError", "ValueError") is None


def test_every_public_function_and_loss_is_called():
    names = [name for name, _ in compare.grid(qkernels)]
    assert len(names) == len(set(names))
    for loss in qkernels.objectives.OBJECTIVES:
        assert any(f", {loss}, pairs" in name for name in names)
    for loss in qkernels.objectives.POLICY_OBJECTIVES:
        assert any(name.startswith("fused_policy_loss") and name.endswith(f", {loss}") for name in names)
    for loss in qkernels.objectives.SEQUENCE_OBJECTIVES:
        assert any(name.startswith("fused_sequence_loss") and name.endswith(f", {loss}") for name in names)
    text = Path(compare.__file__).read_text(encoding="utf-8")
    functions = [name for name in qkernels.__all__ if name.islower() and callable(getattr(qkernels, name))]
    assert {"fused_linear_token_dpo", "token_mdp"} <= set(functions)
    assert [name for name in functions if f"qk.{name}(" not in text] == ["info"]
