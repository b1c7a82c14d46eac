"""examples/qkernels.ipynb runs from top to bottom, and shows a heat map."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import qkernels

for name in ("transformers", "tokenizers", "pyarrow", "pandas"):
    pytest.importorskip(name, reason=f"{name} is not installed")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "qkernels.ipynb"
ROOT = Path(qkernels.__file__).resolve().parents[1]


@pytest.fixture
def cells() -> list[dict]:
    if not NOTEBOOK.is_file():
        pytest.skip("the examples are not here")
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_cells_run(cells, tmp_path, monkeypatch, capsys):
    """In this process; `test_the_notebook_runs` has a kernel of its own."""
    monkeypatch.chdir(tmp_path)
    assert all(not cell.get("outputs") for cell in cells), "outputs are made where it is read"
    namespace: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    out = capsys.readouterr().out
    lines = out.splitlines()
    margins = [float(line.rpartition("margin ")[2]) for line in lines if line.startswith("step ")]
    assert margins[0] == 0 and margins[-1] > 0, "it has learnt something"
    assert sum("rejected" in line and "[" in line for line in lines) >= 1
    assert sum(line.startswith("log-prob ") for line in lines) == 4
    assert namespace["table"].heat_map(0)._repr_html_().startswith("<iframe")


@pytest.mark.nightly
def test_the_notebook_runs(cells, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": path})
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("Token rewards" in data.get("text/html", "") for data in shown) == 1, "the heat map is in the page"
    assert any("<table" in data.get("text/html", "") for data in shown), "and the table of tokens"
