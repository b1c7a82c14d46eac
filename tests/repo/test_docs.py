"""The snippets of docs/ run, and quoted messages are those of the code."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest
import torch

import qkernels

DOCS = Path(__file__).parents[2] / "docs"
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
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run(SNIPPETS[number], f"docs/integrations.md, snippet {number + 1}", setup)


@pytest.mark.parametrize("number", range(len(blocks("numerics.md"))))
def test_snippet_of_numerics(number):
    run(blocks("numerics.md")[number], f"docs/numerics.md, snippet {number + 1}", {"torch": torch})


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


# --- docs/score.md, search.md, monitor.md, objectives.md --------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder such as the demo leaves, as working directory: two small models and their tokenizer."""
    for name in ("transformers", "tokenizers", "pyarrow"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from qkernels.demo.tokenizer import train_tokenizer
    from toy_models import llama

    texts = ["Japan lies in Asia.", "The government sits in Rome.", *["Answer with just Yes or No, yes, no."] * 5]
    tokenizer = train_tokenizer(texts, 340)
    for seed, name in enumerate(("model", "reference")):
        llama(seed, len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "demo_output" / name)
        tokenizer.save_pretrained(tmp_path / "demo_output" / name)
    monkeypatch.chdir(tmp_path)


def test_the_snippets_of_scoring(trained, capsys):
    recipe, scoring, credit, classifier, own = blocks("score.md")
    assert "import ray" in recipe  # tests/apps/test_ray.py runs it, where Ray is installed
    namespace: dict = {}
    run(scoring, "docs/score.md", namespace)
    assert len(namespace["table"]["logps"]) > 50
    run(credit, "docs/score.md, credit", namespace)
    assert "Detection(auroc=" in capsys.readouterr().out
    run(classifier, "docs/score.md, classifier", namespace)
    assert 0 < float(namespace["chosen"]) < 1
    run(own, "docs/score.md, pairs of a model's own", namespace)
    assert Path("own.jsonl").exists() and namespace["made"].records


def test_the_snippets_of_search(trained, capsys):
    search, tree, best, scan, tuning, copying = blocks("search.md")
    namespace: dict = {}
    run(search, "docs/search.md", namespace)
    assert namespace["found"].rewards.shape == (2, 5)
    run(tree, "docs/search.md, tree", namespace)
    assert namespace["tree"].beams.scores.isfinite().all()
    run(best, "docs/search.md, best of n", namespace)
    assert namespace["found"].scores.shape == (2, 8)
    run(scan, "docs/search.md, strengths", namespace)
    assert namespace["scan"].scores.shape == (4,)
    run(tuning, "docs/search.md, processors", namespace)
    assert namespace["ids"].shape[1] > namespace["inputs"]["input_ids"].shape[1]
    run(copying, "docs/search.md, copying", namespace)
    assert namespace["scored"].logps.shape == (1,) and 0 <= namespace["mixture"].copy_probabilities < 0.5
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_snippet_of_monitor_in_a_loop(capsys):
    run(blocks("monitor.md")[0], "docs/monitor.md", {})
    assert "step 0 -> 4, 4 pairs" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_snippet_of_monitor_in_a_trainer(trained, capsys):
    for name in ("trl", "datasets", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    run(blocks("monitor.md")[1], "docs/monitor.md, trainer", {"__name__": "__main__"})
    assert "step 0 -> 4, 4 pairs" in capsys.readouterr().out


def test_the_snippet_of_objectives():
    namespace: dict = {}
    run(blocks("objectives.md")[0], "docs/objectives.md", namespace)
    assert namespace["checkpoint"]["loss"]


def test_the_snippet_of_the_demo(trained, capsys):
    run(blocks("demo.md")[0], "docs/demo.md", {})
    assert "<|end|>" in capsys.readouterr().out


def test_the_snippets_of_judging(capsys):
    scorer, figures = blocks("judge.md")
    namespace: dict = {}
    run(scorer, "docs/judge.md, scorer", namespace)
    assert namespace["right_capital"]("Tell me about Peru.", "Its capital is Lima.") == 1.0
    assert namespace["shorter"]("", "abc", "abcdefgh") == "first" and namespace["shorter"]("", "abc", "abc") == "tie"
    run(figures, "docs/judge.md, figures", {})
    first = capsys.readouterr().out.splitlines()[0]
    assert f"print(rate.win_rate)  # {first}" in figures, "the figures in the comment are those that are printed"


# Pages whose snippets another test runs: test_readme, tests/distributed, test_recipes (CONTRIBUTING.md).
@pytest.mark.parametrize("number", range(4))
def test_the_losses_page(number):
    run(blocks("losses.md")[number], f"docs/losses.md, snippet {number + 1}", {})


RUN_ELSEWHERE = {"frameworks.md", "linear.md", "logits.md", "scaling.md"}


def test_every_snippet_is_run():
    """A page with a Python block has its test, here or elsewhere, and none of its blocks is left out."""
    here = Path(__file__).read_text(encoding="utf-8")
    for path in sorted(DOCS.glob("*.md")):
        if blocks(path.name) and path.name not in RUN_ELSEWHERE:
            assert f'blocks("{path.name}")' in here, f"no test runs the snippets of docs/{path.name}"


def test_the_snippets_of_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(blocks("data.md")[0], "docs/data.md", {"__name__": "__main__"})
    assert "left out 1 record: 1 x expected two different answers" in capsys.readouterr().out
