"""Heat maps of token rewards: notebook frame, terminal text with and without colours, picture, `qkernels show`."""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from html_pages import NASTY, Tree
from qkernels.cli import main
from qkernels.heatmap import HeatMap
from qkernels.report.page import Token

CHOSEN = [
    Token("Its", 0.01, -1.0, -1.1, 0.2), Token(" capital", 0.0, -1.0, -1.0, 0.2), Token(" Lima", 0.5, -1.0, -6.0, 0.2),
    Token(".\n", 0.02, -0.1, -0.3, 0.1), Token("<|end|>", 0.0, -0.1, -0.1, 0.1, special=True),
]  # fmt: skip
REJECTED = [
    Token("Its", 0.01, -1.0, -1.1, 0.2), Token(" capital", 0.0, -1.0, -1.0, 0.2), Token(" Os", -0.5, -6.0, -1.0, 0.2),
    Token("lo", -0.25, -3.5, -1.0, 0.2), Token(".", 0.02, -0.1, -0.3, 0.1),
]  # fmt: skip
PAIR = HeatMap({"chosen": CHOSEN, "rejected": REJECTED}, [("user", "Tell me about Peru.")])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_text_without_colours_brackets_the_spans_and_lists_them() -> None:
    text = PAIR.text(color=False)
    assert "\x1b" not in text
    assert "user  Tell me about Peru." in text
    assert "chosen  +0.530\nIts capital Lima.\n<|end|>" in text  # nothing is low there
    assert "rejected  −0.720\nIts capital [Oslo].\nlowest: −0.750 “␣Oslo”" in text
    assert text.endswith("margin  +1.250")
    assert PAIR.text(color=False, spans=0).count("[") == 0


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in PAIR.text(stream=Terminal())
    assert "\x1b" not in PAIR.text(stream=io.StringIO())
    assert "\x1b" not in str(PAIR)  # pytest's standard output is no terminal
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in PAIR.text(stream=Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")  # only a value that is not empty counts (no-color.org)
    assert "\x1b[" in PAIR.text(stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in PAIR.text(stream=Terminal())
    assert "\x1b[" in PAIR.text(color=True)


def test_colours_go_with_the_rewards_and_end_before_the_line_does() -> None:
    text = PAIR.text(color=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "Its capital Oslo." in plain and "[" not in plain
    shades = {m[2]: int(m[1]) for m in re.finditer(r"\x1b\[48;5;(\d+)m([^\x1b ]+|\s\w+)\x1b\[0m", text)}
    assert shades[" Os"] == 208 and shades[" Lima"] == 75  # the strongest orange and blue
    assert shades["lo"] not in (208, 75) and shades["Its"] == 231
    assert text.count("\x1b[0m") >= len(shades) and not re.search(r"48;5;\d+m[^\x1b]*\n", text)


def test_text_from_the_data_cannot_act_on_the_terminal() -> None:
    tokens = [Token("\x1b[31mred\x07", -1.0), Token("\r\u202e", 0.5), Token("\n\n", math.nan), Token("\t", -math.inf)]
    for color in (False, True):
        shown = re.sub(
            r"\x1b\[[0-9;]*m", "", HeatMap({"an\x1bswer": tokens}, [("us\x1ber", "\x1b]0;x\x07")]).text(color)
        )
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)
        assert "␛[31mred␇" in shown


def test_the_notebook_frame_holds_a_whole_document() -> None:
    frame = PAIR._repr_html_()
    (element,) = Tree(frame).elements
    assert element["tag"] == "iframe" and "width: 100%" in element["style"]
    assert element["srcdoc"] == PAIR.html() and html.unescape(frame).count("<!DOCTYPE html>") == 1
    tree = Tree(PAIR.html())
    tokens = [e for e in tree.of("t") if "data-v" in e]
    assert len(tokens) == len(CHOSEN) + len(REJECTED)
    assert "margin <b>+1.250</b>" in PAIR.html() and ">+0.530</b>" in PAIR.html()
    assert tokens[2]["data-v"] == "0.5 -1 -6 0.2" and tokens[2]["style"] == "--a:100%"


def test_one_answer_from_rewards_alone() -> None:
    heat_map = HeatMap.of_rewards(["Its", " name", NASTY], [0.1, -0.2, 0.0], name=NASTY)
    tree = Tree(heat_map.html())
    assert [e["data-v"] for e in tree.of("t") if "data-v" in e] == ["0.1", "-0.2", "0"]
    assert [e["tag"] for e in tree.elements].count("script") == 1
    assert heat_map.rewards() == {NASTY: pytest.approx(-0.1)}
    assert heat_map.scale == 0.2
    assert "ranked" not in heat_map.html() and "margin" not in heat_map.text(color=False)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        HeatMap.of_rewards(["a"], [0.1, 0.2])
    with pytest.raises(ValueError, match="at least one answer"):
        HeatMap({})
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        HeatMap({"a": CHOSEN}, scale=0)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread
    from matplotlib.patches import FancyBboxPatch

    PAIR.save_png(tmp_path / "pair.png", width=6, dpi=100)
    image = imread(tmp_path / "pair.png")
    assert image.shape[1] == 600 and 100 < image.shape[0] < 400
    figure = PAIR.figure(width=6)
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert "Tell me about Peru." in texts and "+0.530" in texts and "−0.720" in texts and "Lima" in texts
    # Colour is the sign of a token's reward; an answer's own number, which may have either sign, is in the text's.
    assert {text.get_color() for text in axes.texts if text.get_text() in ("+0.530", "−0.720")} == {"#1c1f24"}
    boxes = [patch.get_facecolor()[:3] for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    for full in ((246, 153, 63), (111, 177, 242)):  # of " Os" and " Lima"
        assert sum(box == pytest.approx([c / 255 for c in full], abs=0.01) for box in boxes) == 1
    # Long answers, one-token lines, mathematics and missing glyphs are set without complaint.
    words = [Token(f" word{i}", 0.01 * (i % 7 - 3)) for i in range(200)]
    odd = [Token("$x^2$ $", 0.0), Token("-" * 500, -0.1), Token("\n", 0.0), Token("漢", math.nan)]
    taller = HeatMap({"answer": [*words, *odd, Token("😀", 0.1, planted=True)]})
    taller.save_png(tmp_path / "tall.png", width=6, dpi=50, title="A title")
    assert imread(tmp_path / "tall.png").shape[0] > imread(tmp_path / "pair.png").shape[0] / 2


def test_lines_of_the_picture_break_between_words() -> None:
    pytest.importorskip("matplotlib")
    tokens = [Token(text, 0.1) for i in range(60) for text in (" " + "ab" * (i % 4 + 1), "cd", "ef")]
    (axes,) = HeatMap({"answer": tokens}).figure(width=5).axes
    placed = [
        (text.get_text(), text.get_position()) for text in axes.texts if text.get_text()[:2] in ("ab", "cd", "ef")
    ]
    assert len(placed) == 180 and len({y for _, (_, y) in placed}) > 3
    for word in range(0, 180, 3):
        assert len({y for _, (_, y) in placed[word : word + 3]}) == 1
    (axes,) = HeatMap({"answer": [Token("abcdef", 0.1)] * 60}).figure(width=5).axes  # longer than a line
    assert len({text.get_position()[1] for text in axes.texts if text.get_text() == "abcdef"}) > 3


# --- qkernels show ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as `qkernels score` writes, without a model."""
    pytest.importorskip("pyarrow")
    import numpy as np

    from qkernels.score.encode import EncodedAnswer
    from qkernels.score.table import TokenTable

    def answer(pair: int, side: str, tokens: list[Token]):
        encoded = EncodedAnswer([1], list(range(len(tokens))), [t.text for t in tokens], [(-1, -1)] * len(tokens))
        names = {"logps": "logp", "reference_logps": "reference_logp", "implicit_rewards": "reward"}
        columns = {name: np.array([getattr(t, field) for t in tokens], np.float32) for name, field in names.items()}
        return pair, side, encoded, columns

    out = tmp_path_factory.mktemp("scored")
    rows = [answer(0, "chosen", CHOSEN), answer(0, "rejected", REJECTED)]
    rows += [answer(1, "chosen", REJECTED), answer(1, "rejected", CHOSEN)]
    TokenTable.of_answers(rows).write_parquet(out / "tokens.parquet")
    outputs = ["logps", "reference_logps", "implicit_rewards"]
    settings = {"model": "", "reference": "", "beta": 0.1, "outputs": outputs, "special_ids": [4]}
    (out / "settings.json").write_text(json.dumps({"format": 1, **settings}))
    return out


def show(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["show", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def test_show_prints_or_writes_a_pair(folder: Path, tmp_path: Path) -> None:
    status, out, _ = show(folder)
    assert status == 0 and out.startswith("pair 1\n") and "margin  −1.250" in out  # the most suspicious
    status, out, _ = show(folder, "--pair", 0, "--side", "rejected")
    assert status == 0 and "Its capital [Oslo]." in out and "chosen" not in out
    pytest.importorskip("matplotlib")
    status, out, _ = show(folder, "--pair", 0, "--html", tmp_path / "a.html", "--png", tmp_path / "a.png")
    assert status == 0 and not out
    assert "margin <b>+1.250</b>" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_show_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([folder, "--pair", 2], "--pair 2: not among the 2 pairs"),
        ([tmp_path], "not a folder of scores"),
        ([tmp_path / "absent"], "not a folder of scores"),
        ([folder, "--html", tmp_path / "absent/a.html"], "cannot write"),
    ):
        status, out, err = show(*arguments)
        assert status == 2 and message in err and not out and "Traceback" not in err
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    status, _, err = show(tmp_path)
    assert status == 2 and "nothing has been scored there yet" in err


def test_the_prompt_is_shown_by_its_end_unless_asked_for() -> None:
    lines = "\n".join(f"line {i}" for i in range(50))
    heat_map = HeatMap({"chosen": CHOSEN}, [("user", "the very first"), ("assistant", "yes"), ("user", lines)])
    whole, end = heat_map.text(), heat_map.text(whole_prompt=False)
    assert "the very first" in whole and "line 0\n" in whole
    assert "(2 earlier messages)" in end and "…line 44\n" in end and "line 49" in end
    assert "the very first" not in end and "line 43" not in end and len(end.splitlines()) < 15
    short = HeatMap({"chosen": CHOSEN}, [("user", "Why?")]).text(whole_prompt=False)
    assert "user  Why?" in short and "earlier" not in short and "…" not in short


def test_a_closed_pipe_is_no_crash(folder: Path) -> None:
    """As `qkernels show scores | head` closes it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qkernels", "show", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and not errors
