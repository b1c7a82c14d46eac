"""A heat map of token rewards as a matplotlib figure: tokens set like text, each on its colour."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.patches import FancyBboxPatch

from .page import Token, number, visible

# The reports' colours (light).
_ORANGE, _BLUE, _INK, _SOFT, _LINE = "#f6993f", "#6fb1f2", "#1c1f24", "#5d6470", "#e4e1db"

# Sizes in points.
_TEXT, _SMALL, _TITLE = 11.0, 9.0, 12.0
_LINE_HEIGHT, _MARGIN, _SIDE = 20.0, 16.0, 70.0
# Matplotlib brings the first; the others know more scripts, where they are installed.
_OTHERS = {"Noto Sans", "Noto Sans CJK SC", "Arial Unicode MS", "Microsoft YaHei", "Hiragino Sans"}
_FONTS = ["DejaVu Sans", *sorted(_OTHERS & set(get_font_names()))]


class _Placed(NamedTuple):
    """A token on the page: left edge and line, width of its box, what is written."""

    x: float
    line: int
    width: float
    text: str
    token: Token


class Content(NamedTuple):
    """What a figure shows.

    answers: name -> tokens.
    rewards: name -> reward of the whole answer.
    scale: the |reward| that gets the full colour.
    prompt: (role, text) of each message before the answers.
    """

    answers: Mapping[str, Sequence[Token]]
    rewards: Mapping[str, float]
    scale: float
    prompt: Sequence[tuple[str, str]]


def draw(content: Content, width: float, title: str) -> Figure:
    """The figure of `HeatMap.figure`, `width` inches wide."""
    figure = Figure(figsize=(width, 1), facecolor="white")
    canvas = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    to_points = 72.0 / figure.dpi
    cache: dict[str, float] = {}

    def measure(text: str) -> float:
        if text not in cache:
            probe = figure.text(0, 0, text, fontsize=_TEXT, family=_FONTS, parse_math=False)
            cache[text] = probe.get_window_extent(renderer).width * to_points
            probe.remove()
        return cache[text]

    page = width * 72.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        space = measure("n n") - measure("nn")
        room = page - 2 * _MARGIN - _SIDE
        blocks = {name: _place(tokens, room, measure, space) for name, tokens in content.answers.items()}
        heading = title or (content.prompt[-1][1] if content.prompt else "")
        lines = textwrap.wrap(visible(heading).replace("␣", " ").replace("↵", " "), int(page / 7.4))[:3]
        height = _MARGIN + 17.0 * len(lines) + (6.0 if lines else 0.0)
        tops = {}
        for name, placed in blocks.items():
            tops[name] = height
            height += _LINE_HEIGHT * (1 + max((p.line for p in placed), default=0)) + 10.0
        height += 26.0
        figure.set_size_inches(width, height / 72.0)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, page)
        axes.set_ylim(height, 0)
        axes.axis("off")
        for i, line in enumerate(lines):
            axes.text(_MARGIN, _MARGIN + 17.0 * i + 6, line, fontsize=_TITLE, color=_INK, family=_FONTS, va="center",
                      parse_math=False, weight="bold")  # fmt: skip
        for name, placed in blocks.items():
            _draw_answer(axes, content, name, placed, tops[name])
        _draw_legend(axes, content.scale, page, height)
    return figure


def _place(tokens: Sequence[Token], room: float, measure, space: float) -> list[_Placed]:
    """Break tokens into lines, between words where the word fits into a line. A space that a token begins with stays
    outside its box, as in the reports."""
    placed, x, line = [], 0.0, 0
    words = _words(tokens, measure)
    for token, word in zip(tokens, words, strict=True):
        lead = _leads(token)
        text = visible(token.text[1:] if lead else token.text)
        if x and word <= room and x + (space if lead else 0.0) + word > room:
            x, line = 0.0, line + 1
            lead = False
        for start in range(0, max(len(text), 1), 60):  # a token of a thousand dashes
            piece = text[start : start + 60]
            width = measure(piece) if piece else 0.0
            gap = space if (lead or token.special) and not start else 0.0
            if x and x + gap + width > room:
                x, line, gap = 0.0, line + 1, 0.0
            placed.append(_Placed(x + gap, line, width, piece, token))
            x += gap + width
        if "\n" in token.text:
            x, line = 0.0, line + 1
    return placed


def _leads(token: Token) -> bool:
    return token.text.startswith(" ") and token.text.strip() != ""


def _words(tokens: Sequence[Token], measure) -> list[float]:
    """For each token the width of the word that begins with it, 0 inside a word."""
    widths, first = [0.0] * len(tokens), 0
    for i, token in enumerate(tokens):
        if i and (_leads(token) or token.special or tokens[i - 1].text[-1:].isspace()):
            first = i
        widths[first] += measure(visible(token.text[1:] if _leads(token) else token.text))
    return widths


def _shade(reward: float, scale: float) -> tuple[float, float, float]:
    strength = min(1.0, abs(reward) / scale) if reward == reward else 0.0
    full = to_rgb(_BLUE if reward > 0 else _ORANGE)
    red, green, blue = (1 - strength * (1 - c) for c in full)
    return red, green, blue


def _draw_answer(axes, content: Content, name: str, placed: list[_Placed], top: float) -> None:
    axes.text(_MARGIN, top + _LINE_HEIGHT / 2, visible(name), fontsize=_SMALL, color=_SOFT, va="center", family=_FONTS,
              parse_math=False)  # fmt: skip
    axes.text(_MARGIN, top + _LINE_HEIGHT / 2 + 13, number(content.rewards[name], 3, True), fontsize=_TEXT,
              color=_INK, va="center", weight="bold")  # fmt: skip
    for box in placed:
        x, y = _MARGIN + _SIDE + box.x, top + _LINE_HEIGHT * (box.line + 0.5)
        if box.token.reward == box.token.reward and abs(box.token.reward) > 0.02 * content.scale:
            shade = _shade(box.token.reward, content.scale)
            style = "round,pad=0,rounding_size=2.5"
            axes.add_patch(
                FancyBboxPatch((x - 0.6, y - 8.2), box.width + 1.2, 16.4, boxstyle=style, fc=shade, ec="none")
            )
        if box.token.planted:
            style = "round,pad=0,rounding_size=2.5"
            outline = FancyBboxPatch((x - 1, y - 8.6), box.width + 2, 17.2, boxstyle=style, fc="none", ec=_INK, lw=1.2)
            axes.add_patch(outline)
        faint = box.token.special or not box.token.text.strip()
        axes.text(x, y, box.text, fontsize=_TEXT, color=_SOFT if faint else _INK, va="center_baseline", family=_FONTS,
                  parse_math=False)  # fmt: skip


def _draw_legend(axes, scale: float, page: float, height: float) -> None:
    ramp = LinearSegmentedColormap.from_list("rewards", [_ORANGE, "white", _BLUE])
    right, y, length = page - _MARGIN - 44, height - 16, 120.0
    steps = 60
    for i in range(steps):
        x = right - length + length * i / steps
        axes.fill_between([x, x + length / steps], y - 5, y + 5, color=ramp(i / (steps - 1)), lw=0)
    axes.plot([right - length, right, right, right - length, right - length], [y - 5, y - 5, y + 5, y + 5, y - 5],
              color=_LINE, lw=0.8)  # fmt: skip
    style = {"fontsize": _SMALL, "color": _SOFT, "va": "center", "family": _FONTS}
    axes.text(right - length - 6, y, f"token reward  ≤ {number(-scale, 2)}", ha="right", **style)
    axes.text(right + 6, y, f"≥ {number(scale, 2, True)}", ha="left", **style)
