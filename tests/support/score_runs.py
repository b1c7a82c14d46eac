"""Runs of `qkernels score` on small models: the fixtures and helpers of the tests of scores and of run folders."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch

import hf_models
import qkernels
from processes import Command
from qkernels.cli import main
from qkernels.demo.tokenizer import train_tokenizer
from qkernels.score.files import CHECKSUMS

ROOT = Path(qkernels.__file__).resolve().parents[1]
REAL_PAIRS = ROOT.parent / "shared/data/dpo_en_demo.json"
BETA = 0.3


def llama(vocabulary: int, seed: int = 0, **options) -> torch.nn.Module:
    return hf_models.model("llama", seed=seed, vocab_size=vocabulary, max_position_embeddings=512, **options)


def records(count: int, start: int = 0) -> list[dict]:
    places = ("Lima", "Oslo", "Rome", "Quito", "Cairo")
    return [
        {
            "prompt": f"Tell me about place {i}, please.",
            "chosen": f"Its capital is {places[i % 5]}." + " It is old." * (i % 3),
            "rejected": f"Its capital is {places[(i + 1) % 5]} 😀.\nYes" + " and so on" * (i % 4),
        }
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def models() -> tuple:
    """Policy, reference, tokenizer."""
    texts = [text for record in records(20) for text in record.values()]
    tokenizer = train_tokenizer(texts, 400)
    return llama(len(tokenizer), 0), llama(len(tokenizer), 1), tokenizer


@pytest.fixture(scope="module")
def folders(models: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, saved with their tokenizer, and a data file of 20 pairs."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("policy", "reference"), models[:2], strict=True):
        model.save_pretrained(folder / name)
        models[2].save_pretrained(folder / name)
    write_data(folder / "data.json", records(20))
    return folder


def write_data(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def score(*arguments: object) -> tuple[int, str, str]:
    """Run the command in this process; status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["score", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def usual(folders: Path, out: Path, *more: object) -> list[object]:
    return [
        "--model", folders / "policy", "--reference", folders / "reference", "--data", folders / "data.json",
        "--out", out, "--beta", BETA, *more,
    ]  # fmt: skip


def resign(out: Path) -> None:
    """Make the checksums of a run's folder fit, as somebody who knows of them would."""
    noted = json.loads((out / CHECKSUMS).read_text())
    for name in noted["files"]:
        if (out / name).is_file():
            noted["files"][name] = [hashlib.sha256((out / name).read_bytes()).hexdigest()]
    (out / CHECKSUMS).write_text(json.dumps(noted))


def started(folders: Path, out: Path, *more: object, code: str = "", cwd: Path) -> Command:
    """The command in a process of its own; `code` may change `qkernels.score.store` there."""
    arguments = ["score", *map(str, usual(folders, out, "--batch-tokens", 60, *more))]
    return Command(arguments, cwd, f"from qkernels.score import store\n{code}")
