"""The tests' own layers: each module in a folder, no test module imports another, `support` imports no test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

TESTS = Path(__file__).parents[1]


def imported(text: str) -> set[str]:
    """Every module, and every name taken from one, that the text imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name for alias in node.names for name in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return found


def wrong_imports(root: Path) -> list[str]:
    """`FILE imports MODULE`, for each test module, or conftest, that another file below `root` imports."""
    names = {path.stem for path in root.rglob("test_*.py")} | {"conftest"}
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in sorted(root.rglob("*.py"))
        for name in sorted(imported(path.read_text(encoding="utf-8")) & names)
    ]


def test_no_test_module_is_imported():
    """What two of them need belongs into `tests/support`."""
    assert wrong_imports(TESTS) == []


def test_an_import_of_a_test_module_is_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/test_one.py").write_text("def test_x():\n    pass\n")
    (tmp_path / "a/test_two.py").write_text("def test_y():\n    from test_one import test_x\n")
    (tmp_path / "helper.py").write_text("import tests.a.test_two as two\nfrom conftest import z\n")
    assert wrong_imports(tmp_path) == [
        "a/test_two.py imports test_one",
        "helper.py imports conftest",
        "helper.py imports test_two",
    ]


def test_every_test_module_is_in_a_folder():
    assert list(TESTS.glob("test_*.py")) == []
