"""`python -m bench.report`: medians over several benchmark runs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

report = pytest.importorskip("bench.report", reason="bench/ lies in the source tree only")


def run_of(milliseconds: float, ratio: float, peak: int | None = 10, contender: str = "qkernels") -> list:
    spread = {"fastest": milliseconds - 1, "slowest": milliseconds + 1}
    return [
        report.Entry(
            "work", contender, "fp32", "8 rows x 16", milliseconds, **spread, amount=1.0, unit="GB", floor="copy",
            floor_ratio=ratio, peak_bytes=peak, logits_bytes=512,
        )
    ]  # fmt: skip


def test_medians_over_runs():
    (entry,) = report.merged([run_of(10.0, 1.5, 7), run_of(14.0, 1.1, 9), run_of(11.0, 1.2, None)])
    assert (entry.milliseconds, entry.fastest, entry.slowest) == (11.0, 9.0, 15.0)
    assert entry.floor_ratio == 1.2 and entry.peak_bytes == 9 and entry.work == "work"


def test_runs_of_different_work_are_refused():
    with pytest.raises(ValueError, match=r"runs 1 and 2 did not measure the same: .*'eager'"):
        report.merged([run_of(1.0, 1.0), run_of(1.0, 1.0, contender="eager")])


def written(folder: Path, entries: list, **machine: str) -> str:
    folder.mkdir()
    document = {"machine": machine, "results": [asdict(entry) for entry in entries]}
    (folder / "results.json").write_text(json.dumps(document), encoding="utf-8")
    return str(folder)


def test_command(tmp_path, capsys):
    one, two = written(tmp_path / "1", run_of(10.0, 1.0), cpu="a"), written(tmp_path / "2", run_of(20.0, 2.0), cpu="a")
    report.main([one, two, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert (
        "- runs: 2, medians over them" in text
        and "| qkernels | 15.00 ms | 9.00 ms–21.00 ms | 1.00x | 66.7 | 1.50 |" in text
    )
    other = written(tmp_path / "3", run_of(10.0, 1.0), cpu="b")
    with pytest.raises(SystemExit):
        report.main([one, other, "--out", str(tmp_path / "out")])
    assert "another machine or software" in capsys.readouterr().err


@pytest.mark.nightly
def test_what_scoring_costs_is_measured(tmp_path: Path, monkeypatch, capsys):
    """Both tables of `python -m bench.score_cost`, of a model that is made and of one in a folder."""
    pytest.importorskip("transformers")
    import tiny_models

    score_cost = pytest.importorskip("bench.score_cost")
    texts = [{"prompt": f"Say {i}.", "chosen": "It is so.", "rejected": "No" + " no" * i} for i in range(3)]
    tokenizer = tiny_models.tokenizer([text for row in texts for text in row.values()])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_models.llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.json").write_text(json.dumps(texts))
    usual = ["--data", str(tmp_path / "pairs.json"), "--max-length", "64", "--lengths"]
    small = ["--hidden", "64", "--layers", "1", "--vocabulary", "500"]
    for more, found in (
        (small, r"\| 1 \| [\d.]+ \| [\d.]+ \| "),
        (["--model", str(tmp_path / "model")], "padding is "),
    ):
        monkeypatch.setattr("sys.argv", ["bench.score_cost", *usual, *more])
        score_cost.main()
        assert re.search(found, capsys.readouterr().out)
