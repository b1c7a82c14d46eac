"""Self-contained HTML reports: token heat maps of answer pairs, line charts, tables, on one page without resources.

Every function returns a piece of HTML in which all text from outside is escaped; `page` puts pieces together with the
style sheet and the script. The script is allowed by its hash alone, so that nothing else on the page can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from html import escape

from ..text.characters import visible
from .assets import SCRIPT, STYLE

# Of the |rewards| on a page this share is within the colour scale; the rest is shown at full strength.
_SCALE_QUANTILE = 0.99
_LONG_PROMPT = 480  # characters; longer ones are folded
_LONG_ANSWER = 500  # tokens; above it, counterparts in the other answer are looked for in less detail

REWARD_FORMULA = (
    '<p class="formula">token reward = β · ( log π(token | text so far)'
    " − log π<sub>ref</sub>(token | text so far) )</p>"
)


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    text: as decoded; whitespace and control characters are made visible here.
    reward: beta * (logp - reference_logp).
    logp, reference_logp: nats; None if unknown.
    entropy: of the policy before the token, nats; None if unknown.
    planted: known to be an error.
    special: a marker such as the end token, not part of the text.
    """

    text: str
    reward: float
    logp: float | None = None
    reference_logp: float | None = None
    entropy: float | None = None
    planted: bool = False
    special: bool = False


@dataclass(frozen=True)
class ScoredPair:
    """Two answers to one prompt.

    prompt: (role, text) of each message.
    note: a remark under the prompt, such as that something was cut.
    """

    prompt: Sequence[tuple[str, str]]
    chosen: Sequence[Token]
    rejected: Sequence[Token]
    note: str = ""

    @property
    def margin(self) -> float:
        """Reward of the chosen answer less that of the rejected one."""
        return sum(token.reward for token in self.chosen) - sum(token.reward for token in self.rejected)


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    color: "chosen", "rejected" or "neutral".
    faint: thin and dashed, for what is only context.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str = "neutral"
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """A key figure: a large value, what it is, and a remark."""

    value: str
    label: str
    remark: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; `body` is HTML, `intro` is text."""

    heading: str
    body: str
    intro: str = ""


_NOISE = 1e-6  # what a difference of two equal sums may leave


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """A number with a true minus, and no minus before a zero.

    Rewards early in training are small: what would round to 0 gets as many digits as its first one takes, down to 1e-6.
    """
    if _NOISE <= abs(value) < 0.5 * 10.0**-digits:
        digits = -math.floor(math.log10(abs(value)))
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if math.isfinite(value) and not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def reward_scale(pairs: Sequence[ScoredPair]) -> float:
    """The |reward| that gets the full colour: a high quantile over all tokens, so that one of them cannot pale the
    rest."""
    return scale_of(token.reward for pair in pairs for side in (pair.chosen, pair.rejected) for token in side)


def scale_of(rewards: Iterable[float]) -> float:
    """The same from rewards."""
    sizes = sorted(abs(reward) for reward in rewards if math.isfinite(reward))
    if not sizes or sizes[-1] == 0:
        return 1.0
    return sizes[min(len(sizes) - 1, math.ceil(_SCALE_QUANTILE * len(sizes)) - 1)] or sizes[-1]


def heat_map(pairs: Sequence[ScoredPair], *, scale: float | None = None) -> str:
    """Pairs of answers with each token coloured by its reward, chosen above rejected, and the legend.

    Args:
        pairs: in the order of the page.
        scale: the |reward| of the full colour; from the pairs by default.
    """
    scale = scale or reward_scale(pairs)
    with_planted = any(token.planted for pair in pairs for token in pair.rejected)
    cards = "\n".join(_card(pair, i, scale) for i, pair in enumerate(pairs, 1))
    return f"{_heat_legend(scale, with_planted)}\n{cards}\n"


def _heat_legend(scale: float, with_planted: bool) -> str:
    planted = '<span class="key"><span class="t planted">word</span> planted error</span>' if with_planted else ""
    return f"""<div class="heat-legend">
<span class="key">token reward</span>
<span class="ramp"><span>≤ {number(-scale, 2)}</span><span class="bar" aria-hidden="true"></span>\
<span>≥ {number(scale, 2, True)}</span></span>
<span class="key"><b class="swatch neg"></b> less likely than under the reference</span>
<span class="key"><b class="swatch pos"></b> more likely</span>
{planted}
</div>"""


def _card(pair: ScoredPair, index: int, scale: float) -> str:
    twins = _twins(pair)
    note = f'<p class="note">{escape(pair.note)}</p>' if pair.note else ""
    return f"""<article class="pair" aria-label="Pair {index}">
<header>{_prompt(pair.prompt)}{_verdict(pair.margin)}</header>
{note}{_answer("chosen", pair.chosen, scale, twins[0])}
{_answer("rejected", pair.rejected, scale, twins[1])}
</article>"""


def _verdict(margin: float) -> str:
    """The margin and what it says; a tie, as before the first step of a training, is neither right nor wrong."""
    if margin > 0:
        kind, text = "right", "✓ ranked right"
    elif margin < 0:
        kind, text = "wrong", "✗ ranked wrong"
    else:
        kind, text = "tie", "not ranked" if math.isnan(margin) else "tie"
    badge = f'<span class="badge {kind}">{text}</span>'
    return f'<div class="verdict">margin <b>{number(margin, 3, True)}</b> {badge}</div>'


def answer_map(
    name: str, tokens: Sequence[Token], prompt: Sequence[tuple[str, str]] = (), *, scale: float | None = None
) -> str:
    """One answer with each token coloured by its reward, and the legend.

    Args:
        name: what stands beside it, such as "rejected".
        tokens: of the answer.
        prompt: (role, text) of each message before it.
        scale: the |reward| of the full colour; from the tokens by default.
    """
    scale = scale or scale_of(token.reward for token in tokens)
    head = f"<header>{_prompt(prompt)}</header>" if prompt else ""
    legend = _heat_legend(scale, any(token.planted for token in tokens))
    body = _answer(name, tokens, scale, [None] * len(tokens))
    return f'{legend}<article class="pair" aria-label="{escape(name)} answer">\n{head}{body}</article>\n'


def _prompt(prompt: Sequence[tuple[str, str]]) -> str:
    turns = "".join(
        f'<p class="turn"><span class="role">{escape(role)}</span> <span dir="auto">{escape(text)}</span></p>'
        for role, text in prompt
    )
    length = sum(len(text) for _, text in prompt)
    if length <= _LONG_PROMPT:
        return f'<div class="prompt">{turns}</div>'
    last = prompt[-1][1].strip()
    opening = escape(last if len(last) <= 160 else last[:157] + "...")
    summary = f'<summary dir="auto">{opening} <span class="more">whole prompt</span></summary>'
    return f'<details class="prompt">{summary}{turns}</details>'


def _twins(pair: ScoredPair) -> tuple[list[int | None], list[int | None]]:
    """For each token the number of its counterpart in the other answer, shared by both; None where they differ."""
    chosen, rejected = [t.text for t in pair.chosen], [t.text for t in pair.rejected]
    start = _shared(chosen, rejected)
    end = _shared(chosen[start:][::-1], rejected[start:][::-1])
    middle = (chosen[start : len(chosen) - end], rejected[start : len(rejected) - end])
    # With `autojunk` no frequent token begins a block; the time is cubic where each may and answers repeat themselves.
    is_long = max(map(len, middle)) > _LONG_ANSWER
    matched = SequenceMatcher(None, *middle, autojunk=is_long).get_matching_blocks()
    blocks = [(0, 0, start), (len(chosen) - end, len(rejected) - end, end)]
    blocks += [(start + a, start + b, size) for a, b, size in matched]
    marks: tuple[list[int | None], list[int | None]] = ([None] * len(chosen), [None] * len(rejected))
    for a, b, size in blocks:
        for i in range(size):
            marks[0][a + i] = marks[1][b + i] = a + i
    return marks


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many tokens two answers share at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _answer(side: str, tokens: Sequence[Token], scale: float, twins: Sequence[int | None]) -> str:
    total = sum(token.reward for token in tokens)
    body = "".join(
        _token(token, scale, twin, i == 0) for i, (token, twin) in enumerate(zip(tokens, twins, strict=True))
    )
    side = escape(side)
    return f"""<section class="answer {side}"><div class="side"><span class="name">{side}</span>\
<b title="reward of the answer: the sum of its tokens' rewards">{number(total, 3, True)}</b></div>
<div class="tokens" role="group" aria-label="{side} answer, tokens with rewards" dir="auto">{body}</div></section>"""


def _token(token: Token, scale: float, twin: int | None, first: bool) -> str:
    classes = ["t"]
    style = ""
    if math.isfinite(token.reward):
        strength = round(100 * min(1.0, abs(token.reward) / scale))
        if strength:
            classes.append("p" if token.reward > 0 else "n")
            style = f' style="--a:{strength}%"'
    else:
        classes.append("nan")
    if token.planted:
        classes.append("planted")
    if token.special:
        classes.append("special")
    # The space that most tokens begin with stays outside the box: lines can break there and words read as words.
    lead = " " if token.text.startswith(" ") and token.text.strip() else ""
    shown = visible(token.text[len(lead) :])
    if not token.text.strip() or shown != token.text[len(lead) :]:
        classes.append("ws")
    known = (token.reward, token.logp, token.reference_logp, token.entropy)
    # The script reads these by JavaScript's Number, for which "-inf" is no number.
    values = ["" if value is None else f"{value:.6g}".replace("inf", "Infinity") for value in known]
    link = "" if twin is None else f' data-k="{twin}"'
    stop = "0" if first else "-1"
    after = "<br>" if "\n" in token.text else ""
    return (
        f'{lead}<span class="{" ".join(classes)}" tabindex="{stop}" data-v="{" ".join(values).rstrip()}"'
        f' data-t="{escape(visible(token.text))}"{link}{style}>{escape(shown)}</span>{after}'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    size = max(abs(low), abs(high))
    if not high - low > max(1e-14 * size, 1e-300):  # no step between such numbers could be told from 0
        around = max(0.5, 1e-9 * size)
        low, high = low - around, low + around
    rough = (high - low) / count
    exponent = math.floor(math.log10(rough))
    step = next(10.0**exponent * m for m in (1, 2, 2.5, 5, 10) if 10.0**exponent * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 1 - exponent) for i in range(first, last + 1)]


_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    description: str = "",
) -> str:
    """Lines over a common x axis, as inline SVG with axes, ticks, labels, a legend and a reading aid.

    Args:
        title: of the chart.
        series: at least one; points that are not finite are left out.
        x_label, y_label: of the axes, with units.
        y_range: fixed ends of the y axis; from the data by default, zero included.
        percent: whether y is a share, labelled in percent.
        description: a sentence below the title.
    """
    kept = [(line, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]) for line in series]
    xs = [x for _, points in kept for x, _ in points] or [0.0, 1.0]
    ys = [y for _, points in kept for _, y in points] or [0.0, 1.0]
    y_ticks = ticks(*y_range) if y_range else ticks(min(0.0, *ys), max(0.0, *ys))
    if y_range:
        y_ticks = [y for y in y_ticks if y_range[0] <= y <= y_range[1]]
    x_marks = ticks(min(xs), max(xs), 6)
    x_ticks = [x for x in x_marks if min(xs) <= x <= max(xs)]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else x_marks[-1]  # above a single x, however large it is
    y_low, y_high = (y_ticks[0], y_ticks[-1]) if y_range is None else y_range
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def px(x: float) -> float:
        return _LEFT + inner_w * (x - x_low) / (x_high - x_low)

    def py(y: float) -> float:
        return _TOP + inner_h * (y_high - y) / (y_high - y_low)

    def label(y: float) -> str:
        return f"{100 * y:g} %" if percent else f"{y:g}".replace("-", "−")

    def reading(points: Sequence[tuple[float, float]]) -> str:
        """The last value: what the legend shows while nothing is pointed at."""
        if not points:
            return ""
        return f"{number(100 * points[-1][1], 1)}\u00a0%" if percent else number(points[-1][1])

    parts = []
    for y in y_ticks:
        kind = "zero" if y == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{label(y)}</text>')
    floor = _TOP + inner_h
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    for x in x_ticks:
        parts.append(f'<line class="axis" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{floor + 17}" text-anchor="middle">{x:g}</text>')
    middle = _LEFT + inner_w / 2
    parts.append(f'<text class="name" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    legend, data = [], []
    for line, points in kept:
        css = f"c-{line.color}" + (" faint" if line.faint else "")
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {css}" points="{path}"/>')
        legend.append(
            f'<span class="key"><svg class="mark" viewBox="0 0 22 8" aria-hidden="true"><line class="line {css}" x1="1"'
            f' x2="21" y1="4" y2="4"/></svg>{escape(line.name)} <output>{reading(points)}</output></span>'
        )
        data.append([[round(px(x), 1), x, round(y, 4)] for x, y in points])
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{floor}" x1="0" x2="0"/>')
    summary = ", ".join(
        f"{line.name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in kept if points
    )
    about = f"<p>{escape(description)}</p>" if description else ""
    return f"""<figure class="chart">
<figcaption><b>{escape(title)}</b> <span class="unit">{escape(y_label)}</span>
<span class="at">{escape(x_label)} {max(xs):g}</span>{about}</figcaption>
<div class="legend">{"".join(legend)}</div>
<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: {escape(summary)}"\
 data-x="{escape(x_label)}" data-percent="{int(percent)}" data-lines="{escape(json.dumps(data))}">
{"".join(parts)}
</svg>
</figure>"""


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred running mean over `window` points, fewer at the ends; if it is even, one more before than after."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        first = i - window // 2
        near = points[max(0, first) : first + window]
        smoothed.append((x, sum(y for _, y in near) / len(near)))
    return smoothed


def charts(figures: Sequence[str]) -> str:
    """Charts side by side, as many as fit."""
    return f'<div class="charts">{"".join(figures)}</div>'


def tiles(figures: Sequence[Figure]) -> str:
    """Key figures in a row."""
    body = "".join(
        f'<div class="tile"><span class="value">{escape(f.value)}</span><span class="label">{escape(f.label)}</span>'
        f'<span class="remark">{escape(f.remark)}</span></div>'
        for f in figures
    )
    return f'<div class="tiles">{body}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, strong: int | None = None) -> str:
    """A table of text; the first column names the rows, `strong` is the row to stress. An empty header has no head."""
    head = f"<thead><tr>{''.join(f'<th scope=col>{escape(h)}</th>' for h in header)}</tr></thead>" if header else ""
    lines = []
    for i, (name, *cells) in enumerate(rows):
        css = ' class="strong"' if i == strong else ""
        lines.append(
            f"<tr{css}><th scope=row>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        )
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


@dataclass
class Page:
    """A whole report.

    title, subtitle: text of the head.
    lead: HTML below it, before the first section.
    sections: in order.
    """

    title: str
    subtitle: str
    lead: str = ""
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        """The document, complete in itself."""
        body = "\n".join(
            f"<section class=part><h2>{escape(s.heading)}</h2>"
            + (f"<p class=intro>{escape(s.intro)}</p>" if s.intro else "")
            + f"{s.body}</section>"
            for s in self.sections
        )
        top = f'<header class="top"><h1>{escape(self.title)}</h1><p>{escape(self.subtitle)}</p></header>'
        return document(self.title, f"{top}\n{self.lead}\n{body}")


def document(title: str, body: str) -> str:
    """A whole HTML document around `body`, with the style sheet and the script, complete in itself."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<div id="tip" role="status" hidden></div>
<script>{SCRIPT}</script>
</body>
</html>
"""
