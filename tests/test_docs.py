"""The snippets of docs/integrations.md and docs/troubleshooting.md run, and quoted messages are those of the code."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest
import torch

import qkernels

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = Path(qkernels.__file__).parent


def blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def run(code: str, title: str, namespace: dict) -> None:
    exec(compile(code, title, "exec"), namespace)


SETUP, *SNIPPETS = blocks("integrations.md")


@pytest.fixture(scope="module")
def setup():
    for name in ("transformers", "datasets", "tokenizers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    namespace: dict = {"__name__": "__main__"}
    run(SETUP, "docs/integrations.md, set-up", namespace)
    return namespace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_of_the_integrations(number, setup, tmp_path, monkeypatch):
    """Each block after the set-up; those of one section share what they define."""
    for name in ("trl", "peft"):
        if f"from {name} import" in SNIPPETS[number]:
            pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    if "torch.compile" in SNIPPETS[number]:  # inductor takes half a minute; test_ops and test_linear_compile run it
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run(SNIPPETS[number], f"docs/integrations.md, snippet {number + 1}", setup)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(blocks("troubleshooting.md"))))
def test_snippet_of_troubleshooting(number):
    run(
        blocks("troubleshooting.md")[number], f"docs/troubleshooting.md, snippet {number + 1}", {"__name__": "__main__"}
    )


def _literals() -> str:
    """The package's sources with adjacent string literals joined, as messages are written."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


@pytest.mark.parametrize("message", blocks("troubleshooting.md", "text"))
def test_messages_are_those_of_the_code(message):
    """Messages in ```text are this package's; "..." stands for what varies."""
    source = _literals()
    parts = [part.strip(" \n") for part in re.split(r"\.\.\.", " ".join(message.split()))]
    assert any(parts)
    for part in parts:
        assert part in source, part
