"""The report of a scoring run: what contradicts the labels most comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..report.page import (
    REWARD_FORMULA,
    Figure,
    Page,
    ScoredPair,
    Section,
    Series,
    charts,
    heat_map,
    line_chart,
    number,
    table,
    tiles,
)
from ..text.characters import printable
from .summary import Overview

_SPANS = 15
_BINS = 40

_EXPLANATION = f"""<div class="prose">
<p>How much more, or less, likely preference training has made a token than it was under the reference:</p>
{REWARD_FORMULA}
<p>Summed over an answer it is the answer's reward (eq. 11 of “From r to Q*”, Rafailov et al. 2024). The margin of a
pair is the chosen answer's reward less the rejected one's; below 0 the model contradicts the label.</p>
<p>A low reward is a question, not a verdict. It may point at an error in the text, at a label that is the wrong way
round, or at something the model has learnt wrongly. Read the lowest first; among <i>chosen</i> answers they are the
candidates for data cleaning.</p>
</div>"""


def make_page(
    overview: Overview,
    figures: Mapping[str, Any],
    shown: Sequence[ScoredPair],
    facts: Sequence[tuple[str, str]],
) -> str:
    """The document.

    Args:
        overview: of all pairs.
        figures: what `summary.json` gets.
        shown: pairs for heat maps, the most suspicious first.
        facts: names and values of how it was made.
    """
    sources = figures["sources"]
    page = Page(
        "Token rewards of a preference set",
        f"{_name(sources['model'])} against {_name(sources['reference'])} on {_name(sources['data'])}:"
        f" {figures['pairs']} pairs, {figures['tokens']} answer tokens, β = {figures['settings']['beta']:g}.",
        lead=_tiles(figures, overview),
    )
    page.sections.append(Section("What a token reward is", _EXPLANATION))
    if shown:
        page.sections.append(
            Section(
                "Pairs with the lowest margins",
                heat_map(shown),
                f"The first {len(shown)} of {figures['pairs']} pairs, lowest first. Point at a token,"
                " tap it, or move through an answer with the arrow keys to see its numbers.",
            )
        )
    page.sections.append(_lowest("chosen", overview))
    page.sections.append(_lowest("rejected", overview))
    page.sections.append(Section("Over the data set", _charts(overview)))
    page.sections.append(_means(figures))
    page.sections.append(Section("This run", f'<div class="facts">{table((), facts)}</div>'))
    return page.html()


def _name(path: str) -> str:
    """The last part of a path, by which people know a model or a file."""
    return printable(path.rstrip("/").rpartition("/")[2] or path)


def _tiles(figures: Mapping[str, Any], overview: Overview) -> str:
    wrong = sum(not pair.margins > 0 for pair in overview.pairs)
    length = figures["correlation_of_margin_and_length"]
    shown = [
        Figure(
            _percent(figures["pair_accuracy"]),
            "pairs ranked as labelled",
            f"by reward, {wrong} not; by the reference's log-prob"
            f" {_percent(figures['pair_accuracy_of_reference_logps'])}",
        ),
        Figure(
            number(figures["mean_margin"], 2, True),
            "mean margin",
            f"chosen {number(figures['mean_chosen_reward'], 2, True)},"
            f" rejected {number(figures['mean_rejected_reward'], 2, True)}",
        ),
        Figure(
            "–" if length is None else number(length, 2, True),
            "margin and length",
            "correlation of a pair's margin with how many tokens longer the chosen answer is",
        ),
    ]
    if figures["rewards_not_finite"]:
        shown.append(Figure(str(figures["rewards_not_finite"]), "rewards that are no numbers", "infinite or NaN"))
    return tiles(shown)


def _lowest(side: str, overview: Overview) -> Section:
    spans = overview.spans(side)[:_SPANS]
    rows = "".join(
        f'<tr><td class="num">{number(found.span.reward, 3, True)}</td><td>{found.pair}</td>'
        f'<td class="where" dir="auto">{_shown(found.before)}{_marked(found.text)}'
        f"{_shown(found.after)}</td></tr>"
        for found in spans
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("reward", "pair", "where"))
    body = f'<div class="scroll"><table class="spans"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    intro = (
        "Candidates for data cleaning: what the model has been taught to find less likely, in answers it was to learn"
        " from."
        if side == "chosen"
        else "What is blamed for the rejection."
    )
    intro += (
        " Neighbouring tokens with little reward form one span; its reward is their sum. At most three of an answer."
    )
    return Section(
        f"Least rewarded spans of {side} answers", body if spans else "<p>No token has a reward below 0.</p>", intro
    )


def _marked(text: str) -> str:
    lead = " " if text.startswith(" ") and text.strip() else ""
    return f"{lead}<mark>{_shown(text[len(lead) :])}</mark>"


def _shown(text: str) -> str:
    return escape(printable(text))


def _charts(overview: Overview) -> str:
    margins = sorted(pair.margins for pair in overview.pairs)
    share = [(float(f"{margin:.3g}"), (i + 1) / len(margins)) for i, margin in enumerate(margins)]
    if len(share) > 400:
        step = len(share) / 400
        share = [share[min(len(share) - 1, int(i * step))] for i in range(400)] + share[-1:]
    figures = [
        line_chart(
            "Margins",
            [Series("share of pairs", share)],
            x_label="margin",
            y_label="share of pairs at or below",
            y_range=(0.0, 1.0),
            percent=True,
            description="Where the curve crosses 0: the share of pairs that contradict their label.",
        )
    ]
    curves = []
    longest = max((len(counts) for _, counts in overview.positions.values()), default=0)
    width = max(1, -(-longest // _BINS))
    for side, (totals, counts) in overview.positions.items():
        points = []
        for start in range(0, len(counts), width):
            count = sum(counts[start : start + width])
            if count >= max(1, len(overview.pairs) // 10):  # the few longest answers say nothing about the rest
                points.append((start + (width - 1) / 2, sum(totals[start : start + width]) / count))
        curves.append(Series(side, points, side))
    figures.append(
        line_chart(
            "Reward along the answer",
            curves,
            x_label="token of the answer",
            y_label="mean reward per token",
            description=f"Means over {width} tokens, where a tenth of the answers reach." if width > 1 else "",
        )
    )
    return charts(figures)


_UNITS = {
    "logps": "nats",
    "reference_logps": "nats",
    "logsumexp": "nats",
    "reference_logsumexp": "nats",
    "entropy": "nats",
    "kl_policy_reference": "nats",
    "kl_reference_policy": "nats",
    "log_sum_sq_probs": "nats",
    "mean_logits": "nats",
    "is_top1": "share",
}


def _means(figures: Mapping[str, Any]) -> Section:
    rows = [
        (f"{name} ({_UNITS.get(name, 'reward')})", number(means["chosen"], 4), number(means["rejected"], 4))
        for name, means in figures["token_means"].items()
    ]
    return Section(
        "Means per token",
        table(("", "chosen", "rejected"), rows),
        "Token rewards of answers that the reference was trained on fall on average as training moves away from it"
        " (eq. 16); the margin is what counts.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"
