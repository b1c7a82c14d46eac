"""The report's pieces: numbers shown are the numbers given, and nothing from the data can act on the page."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from difflib import SequenceMatcher

import pytest

from html_pages import NASTY, Tree
from qkernels.report.page import (
    Figure,
    Page,
    ScoredPair,
    Section,
    Series,
    Token,
    heat_map,
    line_chart,
    number,
    reward_scale,
    smooth,
    table,
    ticks,
    tiles,
    visible,
)


def token(text: str, reward: float = 0.0, **more) -> Token:
    return Token(text, reward, -1.5, -1.25, **more)


def pair(chosen: list[Token], rejected: list[Token], prompt: str = "Why?") -> ScoredPair:
    return ScoredPair([("user", prompt)], chosen, rejected)


def page(*bodies: str) -> str:
    return Page("Title", "Subtitle", sections=[Section("Heading", body) for body in bodies]).html()


def test_nothing_from_the_data_becomes_markup() -> None:
    views = [
        ScoredPair([(NASTY, NASTY)], [token(NASTY), token(" " + NASTY)], [token(NASTY, -1.0, planted=True)], NASTY),
        ScoredPair([("user", NASTY * 20)], [token("a")], [token("b")]),
    ]
    chart = line_chart(NASTY, [Series(NASTY, [(0, 1), (1, 2)])], x_label=NASTY, y_label=NASTY, description=NASTY)
    pieces = (heat_map(views), chart, table((NASTY,), [(NASTY, NASTY)]), tiles([Figure(NASTY, NASTY, NASTY)]))
    whole = Page(NASTY, NASTY, sections=[Section(NASTY, piece, NASTY) for piece in pieces]).html()
    tree = Tree(whole)
    assert [e["tag"] for e in tree.elements].count("script") == 1
    assert not [e for e in tree.elements if any(name.startswith("on") and name != "on" for name in e)]
    assert {visible(NASTY), visible(" " + NASTY)} <= {e["data-t"] for e in tree.of("t") if "data-t" in e}
    assert {e["text"] for e in tree.of("ws")} == {visible(NASTY)}
    assert {e["text"] for e in tree.of("role")} == {NASTY, "user"}


def test_the_page_needs_nothing_beside_itself() -> None:
    chart = line_chart("A", [Series("b", [(0, 1), (1, 2)])], x_label="x", y_label="y")
    html = page(heat_map([pair([token("a", 1.0)], [token("b", -1.0)])]), chart)
    tree = Tree(html)
    assert not [e for e in tree.elements if e["tag"] in ("link", "img", "iframe", "object", "embed", "base", "form")]
    assert not [e for e in tree.elements if {"src", "href", "xlink:href", "action"} & set(e)]
    assert not re.search(r"https?:|url\(|@import", html)
    # The policy lets this very script run and no other.
    (script,) = [e["text"] for e in tree.elements if e["tag"] == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [e["content"] for e in tree.elements if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_token_shows_its_numbers_its_colour_and_its_mark() -> None:
    chosen = [token(" Lima", 0.5, entropy=0.25), token(".")]
    rejected = [token(" Oslo", -0.25, planted=True), token(".", 0.0), token("<|end|>", 2.0, special=True)]
    tree = Tree(page(heat_map([pair(chosen, rejected)], scale=0.5)))
    lima, stop, oslo, _, end = [e for e in tree.of("t") if "data-v" in e]
    assert lima["text"] == "Lima" and lima["data-t"] == "␣Lima"  # the space stands outside the box
    assert [float(x) for x in lima["data-v"].split()] == [0.5, -1.5, -1.25, 0.25]
    assert lima["class"] == "t p" and lima["style"] == "--a:100%"
    assert oslo["class"] == "t n planted" and oslo["style"] == "--a:50%"
    assert "style" not in stop and stop["class"] == "t"
    assert end["class"] == "t p special" and end["style"] == "--a:100%"  # beyond the scale
    assert stop["data-k"] == "1" and "data-k" not in oslo  # the counterpart of the other answer
    assert [e["tabindex"] for e in (lima, stop, oslo, end)] == ["0", "-1", "0", "-1"]  # one stop per answer
    html = page(heat_map([pair(chosen, rejected)]))
    assert ">+0.500</b>" in html and ">+1.750</b>" in html and "margin <b>−1.250</b>" in html and "ranked wrong" in html


def test_a_tie_and_a_reward_that_is_no_number_are_shown_as_such() -> None:
    html = page(heat_map([pair([token("a", float("nan"))], [token("b", 0.0)])]))
    (broken,) = Tree(html).of("nan")
    assert "style" not in broken
    tie = page(heat_map([pair([token("a", 0.1)], [token("b", 0.1)])]))
    assert [[e["text"] for e in Tree(shown).of("badge")] for shown in (html, tie)] == [["not ranked"], ["tie"]]


def test_numbers_that_are_not_finite_are_written_as_the_script_reads_them() -> None:
    html = heat_map([pair([Token("a", float("inf"), float("-inf"), float("nan"))], [token("b")])])
    assert 'data-v="Infinity -Infinity nan"' in html


def test_counterparts_are_what_both_answers_share() -> None:
    def numbers(chosen: list[str], rejected: list[str]) -> list[list[str | None]]:
        tree = Tree(heat_map([pair([token(t) for t in chosen], [token(t) for t in rejected])]))
        marks = [e.get("data-k") for e in tree.of("t") if "data-v" in e]
        return [marks[: len(chosen)], marks[len(chosen) :]]

    assert numbers(list("abcde"), list("axcyye")) == [["0", None, "2", None, "4"], ["0", None, "2", None, None, "4"]]
    assert numbers(list("aa"), list("aaa")) == [["0", "1"], ["0", "1", None]]  # no token is of the start and of the end


def test_counterparts_in_long_answers_that_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    longest = SequenceMatcher.find_longest_match

    def counting(self: SequenceMatcher, alo: int, ahi: int, *rest: int) -> object:
        looked_at.append(sum(len(self.b2j.get(text, ())) for text in self.a[alo:ahi]))
        return longest(self, alo, ahi, *rest)

    monkeypatch.setattr(SequenceMatcher, "find_longest_match", counting)
    length = 600
    chosen, rejected = ([token("ab"[i % n == 0]) for i in range(length)] for n in (3, 4))
    heat_map([pair(chosen, rejected)])
    assert looked_at and sum(looked_at) <= length**2  # once each token of one beside each of the other


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b", "␣a␣b"),
        ("\n\t\r", "↵⇥␍"),
        ("\x00\x1b", "␀␛"),
        ("\x7f\x85", "⟨U+007F⟩⟨U+0085⟩"),
        ("\u200b\u202e\u2028\xa0\xad", "⟨U+200B⟩⟨U+202E⟩⟨U+2028⟩⟨U+00A0⟩⟨U+00AD⟩"),
        ("<F0><9F>", "<F0><9F>"),
        ("é漢😀", "é漢😀"),
    ],
)
def test_whitespace_and_control_characters_are_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_newline_token_breaks_the_line() -> None:
    html = heat_map([pair([token("a"), token("\n\n"), token("b")], [token("c")])])
    assert ">↵↵</span><br>" in html


def test_the_scale_is_not_set_by_one_outlier() -> None:
    many = [token("a", 0.001 * i) for i in range(100)]
    assert reward_scale([pair(many, [*many, token("b", -50.0)])]) == pytest.approx(0.099, abs=0.002)
    assert reward_scale([pair([token("a")], [token("b")])]) == 1.0  # an untrained policy
    assert reward_scale([pair([token("a", 1e-9)], [token("b")] * 500)]) == 1e-9
    assert reward_scale([pair([token("a", float("inf"))], [token("b", 0.5)])]) == 0.5


def test_numbers() -> None:
    assert number(-0.0004) == "−0.0004" and number(0.00037, 2, True) == "+0.0004"
    assert number(-3e-7, sign=True) == number(-0.0) == "0.000"
    assert number(-1.25, 2) == "−1.25"
    assert number(0.5, 1, sign=True) == "+0.5"
    assert number(float("-inf")) == "−inf" and number(float("inf"), sign=True) == "+inf"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-0.37, 0.03), (0.5, 1), (0, 200), (1, 1), (-1e-7, 3e-7), (0, 12345), (-3, -1), (0, 3e-12), (1e17, 1e17)],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks == sorted(marks) and 3 <= len(marks) <= 9
    assert marks[0] <= low and marks[-1] >= high
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert steps[0] > 0 and steps == pytest.approx([steps[0]] * len(steps), rel=1e-9)


def test_a_chart_draws_the_points_it_is_given() -> None:
    points = [(0.0, 0.0), (50.0, 0.25), (100.0, -0.5)]
    html = line_chart("Rewards", [Series("chosen", points, "chosen")], x_label="step", y_label="reward")
    tree = Tree(html)
    (line,) = [e for e in tree.elements if e["tag"] == "polyline"]
    drawn = [tuple(map(float, xy.split(","))) for xy in line["points"].split()]
    (svg,) = tree.of("plot")
    assert [point[1:] for point in json.loads(svg["data-lines"])[0]] == [list(point) for point in points]
    assert [point[0] for point in json.loads(svg["data-lines"])[0]] == [x for x, _ in drawn]
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) / (y2 - y0) == pytest.approx(0.5, abs=0.01)  # up is smaller in SVG
    labels = [e["text"] for e in tree.elements if e["tag"] == "text"]
    assert {"step", "0", "100", "−0.4"} <= set(labels)
    assert "chosen from 0 to -0.5" in svg["aria-label"]


def test_a_chart_survives_empty_and_broken_series() -> None:
    for points in (
        [], [(1, 5.0)], [(0, float("nan")), (1, 1.0)], [(0, 1e-12), (1, 3e-12)], [(0, 5e-324)], [(1e17, 1.0)],
        [(1e17, 1.0), (1e17 + 16, 1.0)],
    ):  # fmt: skip
        html = line_chart("A", [Series("a", points)], x_label="x", y_label="y", percent=True)
        assert "nan" not in html and "inf" not in html
        Tree(html)


def test_the_running_mean_keeps_its_length_and_a_straight_line() -> None:
    line = [(float(i), 2.0 * i) for i in range(20)]
    assert smooth(line, 1) == line
    smoothed = smooth(line, 5)
    assert [x for x, _ in smoothed] == [x for x, _ in line]
    assert [y for _, y in smoothed[2:-2]] == pytest.approx([y for _, y in line[2:-2]])
    assert smoothed[0][1] == pytest.approx(2.0)  # of the first three
    for window in (4, 5):
        assert smooth(line, window)[10][1] == pytest.approx(sum(y for _, y in line[8 : 8 + window]) / window)
