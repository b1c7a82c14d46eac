"""Every promise of docs/edges.md names a test, and every test that it names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "edges.md").read_text(encoding="utf-8")
ROWS = [
    line.strip("|").split(" | ")
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| promise", "|---"))
]


@functools.cache
def _tests(file: str) -> set[str]:
    tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip()[:40] for row in ROWS])
def test_a_promise_names_tests_that_exist(row):
    assert len(row) == 2, "a row has a promise and its tests"
    named = re.findall(r"`([\w/]+)::(\w+)`", row[1])
    assert named and re.sub(r"`[\w/]+::\w+`|[, |]", "", row[1]) == "", row[1]
    for file, test in named:
        assert test in _tests(file), f"{file}::{test}"


def test_the_page_has_promises():
    assert len(ROWS) > 25 and len(ROWS) == PAGE.count("` |\n")
