"""The report of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..intervals import Interval
from ..report.page import Figure, Page, Section, number, table, tiles
from ..text.characters import printable
from .statistics import Verdict, WinRate, is_close_to_half

if TYPE_CHECKING:
    from .run import Comparison

_LONG = 700  # characters of an answer that are shown

_EXPLANATION = """<div class="prose">
<p>The win rate is the mean over prompts: 1 where A's answer was judged better in both orders of the two answers, 0
where B's was, and a half for ties and for verdicts that change with the order. The interval comes from drawing the
prompts anew, with replacement.</p>
<p>Judges prefer long answers. The length-controlled figure is the win rate that a logistic regression of the verdicts
on the difference in length predicts for answers of equal length (Dubois et al. 2024).</p>
</div>"""


def make_page(
    rate: WinRate,
    figures: Mapping[str, Any],
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    shown: int,
) -> str:
    """The document.

    Args:
        rate, figures: the results.
        comparison: prompts and answers.
        verdicts: one per prompt.
        shown: how many prompts to show of those that A lost, and of those that it won.
    """
    sources = figures["sources"]
    page = Page(
        "Win rate",
        f"A: {_name(sources['a'])} against B: {_name(sources['b'])} on {rate.prompts} prompts, judged by"
        f" {_name(sources['judge'])}.",
        lead=_tiles(rate, figures),
    )
    page.sections.append(Section("What the figures are", _EXPLANATION))
    order = sorted(range(len(verdicts)), key=lambda n: verdicts[n].wins)
    for heading, numbers in (
        ("Prompts that A lost", [n for n in order if verdicts[n].wins < 0.5][:shown]),
        ("Prompts that A won", [n for n in reversed(order) if verdicts[n].wins > 0.5][:shown]),
    ):
        if numbers:
            cards = "".join(_card(n, comparison, verdicts[n], figures["ordered"]) for n in numbers)
            page.sections.append(Section(heading, cards, "The clearest first."))
    page.sections.append(Section("This run", f'<div class="facts">{table((), _facts(rate, figures))}</div>'))
    return page.html()


def _tiles(rate: WinRate, figures: Mapping[str, Any]) -> str:
    verdict = (
        "neither side has been shown to be better"
        if is_close_to_half(rate)
        else ("A is better" if rate.win_rate.estimate > 0.5 else "B is better")
    )
    shown = [
        Figure(
            _percent(rate.win_rate.estimate),
            "prompts won by A",
            f"{_range(rate.win_rate)}: {verdict}; {rate.wins} won, {rate.ties} tied, {rate.losses} lost",
        )
    ]
    lengths = f"A {rate.a_length:.0f}, B {rate.b_length:.0f} characters. {rate.length_note}"
    if rate.length_controlled is None:
        shown.append(Figure("–", "at equal length", lengths))
    else:
        shown.append(
            Figure(
                _percent(rate.length_controlled.estimate),
                "at equal length",
                f"{_range(rate.length_controlled)}; {lengths}",
            )
        )
    if figures["ordered"] and rate.agreement is not None and rate.first_wins is not None:
        shown.append(
            Figure(
                _percent(rate.agreement.estimate),
                "same verdict in both orders",
                f"{_range(rate.agreement)}; the answer shown first wins {_percent(rate.first_wins.estimate)}",
            )
        )
    elif figures["ordered"]:
        shown.append(Figure("one order", "of the two answers", "a judge's preference for a position is in the figure"))
    return tiles(shown)


def _card(n: int, comparison: Comparison, verdict: Verdict, ordered: bool) -> str:
    prompt = comparison.prompts[n]
    turns = "".join(
        f'<p class="turn"><span class="role">{escape(message.role)}</span> <span dir="auto">'
        f"{_text(message.content)}</span></p>"
        for message in prompt
    )
    orders = [f"{name} {value:g}" for name, value in (("A first", verdict.a_first), ("B first", verdict.b_first))
              if value is not None]  # fmt: skip
    said = f"A wins: {', '.join(orders)}" if ordered else f"A wins: {verdict.wins:g}"
    answers = "".join(
        f'<section class="answer"><div class="side"><span class="name">{side.upper()}</span></div>'
        f'<div class="tokens" dir="auto">{_text(comparison.answers[side][n].text)}</div></section>'
        for side in ("a", "b")
    )
    return (
        f'<article class="pair" aria-label="Prompt {n}"><header><div class="prompt">{turns}</div>'
        f'<div class="verdict">prompt {n} · {escape(said)}</div></header>{answers}</article>'
    )


def _text(text: str) -> str:
    cut = text if len(text) <= _LONG else text[:_LONG] + " …"
    return escape(printable(cut, keep=" \n")).replace("\n", "<br>") or "<i>no answer</i>"


def _facts(rate: WinRate, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    sources, settings = figures["sources"], figures["settings"]
    cut = [f"{count} of {side.upper()}" for side, count in figures["unfinished"].items() if count]
    facts = [
        ("A", sources["a"]),
        ("B", sources["b"]),
        ("prompts", sources["prompts"]),
        ("judge", sources["judge"]),
        ("judged in both orders", f"{rate.both_orders} of {rate.prompts} prompts" if figures["ordered"] else
         "the scorer sees one answer at a time"),
        ("intervals", f"{100 * settings['level']:g} %, {settings['resamples']} resamples of the prompts"),
        ("answers that were cut", " and ".join(cut) or "none"),
        ("time", f"{figures['seconds']:.1f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in figures["versions"].items())),
    ]  # fmt: skip
    if rate.length_effect is not None:
        facts.insert(5, (
            "effect of length",
            f"odds of A times {number(rate.length_effect.estimate, 2)} ({number(rate.length_effect.low, 2)} to"
            f" {number(rate.length_effect.high, 2)}) per standard deviation that its answer is longer",
        ))  # fmt: skip
    return facts


def _name(path: str) -> str:
    return printable(path.rstrip("/").rpartition("/")[2] or path)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _range(interval: Interval) -> str:
    return f"{100 * interval.level:g} % interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %"
