"""The report of a comparison of log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from ..intervals import Interval
from ..report.page import Figure, Page, Section, number, table, tiles
from ..text.characters import printable
from .agreement import Agreement, Group

_EXPLANATION = """<div class="prose">
<p>r = exp(trainer's log-prob - engine's) is the ratio by which a policy loss weighs a token when nothing has been
learnt yet; it should be 1. The engine's tokens are samples of what it says, so that the mean of r estimates 1, the mean
of -log r (k1) and of r - 1 - log r (k3) the divergence of the trainer from the engine. Intervals are of 95 %, from
drawing whole sequences anew.</p></div>"""


class Worst(NamedTuple):
    """A token far from agreement: where, both log-probs, log r as the figures count it, and the text around it."""

    place: str
    trainer: float
    engine: float
    log_ratio: float
    before: str
    token: str
    after: str


def make_page(
    sources: tuple[str, str],
    result: Agreement,
    rounding: Agreement | None,
    groups: Sequence[tuple[str, Sequence[Group]]],
    worst: Sequence[Worst],
    limits: tuple[float, float],
) -> str:
    """The document.

    Args:
        sources: the trainer's side and the engine's, as the user named them.
        result: of all tokens.
        rounding: of the trainer's own log-probs with logits rounded to 16 bits, against those without.
        groups: tables by heading.
        worst: tokens, the worst first.
        limits: of the ratios that count as close.
    """
    trainer, engine = (printable(name) for name in sources)
    page = Page(
        "Log-probs beside an engine's",
        f"Trainer: {trainer}. Engine: {engine}. {result.tokens} tokens of {result.sequences} sequences.",
        lead=tiles(_tiles(result, rounding, limits)),
    )
    page.sections.append(Section("What the figures are", _EXPLANATION))
    page.sections.append(Section("All tokens", _figures(result, rounding)))
    for heading, rows in groups:
        header = (heading, "tokens", "mean log r", "mean |log r|", f"r outside {limits[0]:g} to {limits[1]:g}")
        cells = [
            (
                row.name,
                str(row.tokens),
                number(row.mean, 4, sign=True),
                number(row.mean_absolute, 4),
                _percent(row.outside),
            )
            for row in rows
        ]
        page.sections.append(Section(f"By {heading}", table(header, cells)))
    if worst:
        header = ("where", "trainer", "engine", "r", "token in its context")
        body = "".join(
            f"<tr><th scope=row>{escape(w.place)}</th><td>{number(w.trainer)}</td><td>{number(w.engine)}</td>"
            f"<td>{_ratio(w)}</td><td>{escape(w.before)}<b>[{escape(w.token)}]</b>{escape(w.after)}</td></tr>"
            for w in worst
        )
        head = "".join(f"<th scope=col>{escape(name)}</th>" for name in header)
        html = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        page.sections.append(Section("The worst tokens", html))
    return page.html()


def _ratio(worst: Worst) -> str:
    value = worst.log_ratio
    return f"{math.exp(value):.3g}" if abs(value) < 20 else ("0" if value < 0 else "inf")


def _tiles(result: Agreement, rounding: Agreement | None, limits: tuple[float, float]) -> list[Figure]:
    found = [
        Figure(f"{result.ratio.estimate:.4f}", "mean ratio", _range(result.ratio, 4)),
        Figure(_percent(result.outside.estimate), f"outside {limits[0]:g} to {limits[1]:g}", "of the tokens"),
        Figure(f"{result.k3.estimate:.2e}", "KL per token (k3)", "nats"),
        Figure(_percent(result.effective), "effective sample", "left to importance sampling"),
    ]
    if rounding is not None:
        share = rounding.k3.estimate / result.k3.estimate if result.k3.estimate else 1.0
        found.append(Figure(_percent(min(share, 1.0)), "explained by rounding", "of the KL: logits in 16 bits"))
    return found


def _figures(result: Agreement, rounding: Agreement | None) -> str:
    names = {
        "mean of r": ("ratio", 5), "share outside of the limits": ("outside", 5),
        "KL, k1 (nats)": ("k1", 6), "KL, k3 (nats)": ("k3", 6),
    }  # fmt: skip
    columns: list[tuple[str, Any]] = [("trainer against engine", result)]
    if rounding is not None:
        columns.append(("rounding of logits alone", rounding))
    rows = [
        (
            name,
            *(
                f"{number(getattr(c, field).estimate, digits)} ({_range(getattr(c, field), digits)})"
                for _, c in columns
            ),
        )
        for name, (field, digits) in names.items()
    ]
    rows += [
        ("mean |log r|", *(number(c.mean_absolute, 5) for _, c in columns)),
        ("largest |log r|", *(number(c.largest, 4) for _, c in columns)),
        ("effective sample", *(_percent(c.effective) for _, c in columns)),
    ]
    return table(("", *(name for name, _ in columns)), rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\u00a0%"


def _range(interval: Interval, digits: int) -> str:
    return f"{number(interval.low, digits)} to {number(interval.high, digits)}"
