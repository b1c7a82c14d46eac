"""Answers with each token coloured by its reward: in a notebook, in a terminal, as HTML, as PNG."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .credit import low_reward_spans
from .report.page import ScoredPair, Token, answer_map, document, heat_map, number, scale_of
from .text.characters import printable, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Background colours of the 256-colour palette, weakest first, each readable under black: orange as in the reports for
# tokens made less likely, blue for those made more likely; white for neither, or the weakest would stand out most on a
# dark terminal.
_BELOW = (230, 223, 222, 215, 208)
_ABOVE = (195, 153, 117, 111, 75)
_NEITHER = 231
_BLACK, _RESET, _BOLD, _DIM = "\x1b[38;5;16m", "\x1b[0m", "\x1b[1m", "\x1b[2m"

_TAIL_LINES, _TAIL_CHARACTERS = 6, 480  # of the prompt, where it is not wanted whole


class HeatMap:
    """One answer, or a pair of them, with token rewards; shows itself in notebooks and prints itself in terminals.

    Args:
        answers: name -> tokens; "chosen" and "rejected" for a pair.
        prompt: (role, text) of each message before them.
        scale: the |reward| that gets the full colour; by default the 99 % quantile of those shown.

    Raises:
        ValueError: no answers, or a scale that is not above 0.
    """

    def __init__(
        self,
        answers: Mapping[str, Sequence[Token]],
        prompt: Sequence[tuple[str, str]] = (),
        *,
        scale: float | None = None,
    ):
        if not answers:
            raise ValueError("answers must hold at least one answer")
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.answers = {name: list(tokens) for name, tokens in answers.items()}
        self.prompt = list(prompt)
        self.scale = scale or scale_of(token.reward for tokens in self.answers.values() for token in tokens)

    @staticmethod
    def of_rewards(
        texts: Sequence[str], rewards: Sequence[float], *, name: str = "answer", scale: float | None = None
    ) -> HeatMap:
        """From the texts of an answer's tokens and their rewards, such as a row of `TokenDPOOutput.token_rewards`."""
        tokens = [Token(text, float(reward)) for text, reward in zip(texts, rewards, strict=True)]
        return HeatMap({name: tokens}, scale=scale)

    def rewards(self) -> dict[str, float]:
        """The answers' rewards: the sums over their tokens."""
        return {name: sum(token.reward for token in tokens) for name, tokens in self.answers.items()}

    # --- HTML -------------------------------------------------------------------------------------------------------

    def _body(self) -> str:
        if set(self.answers) == {"chosen", "rejected"}:
            pair = ScoredPair(self.prompt, self.answers["chosen"], self.answers["rejected"])
            return heat_map([pair], scale=self.scale)
        return "".join(
            answer_map(name, tokens, () if i else self.prompt, scale=self.scale)
            for i, (name, tokens) in enumerate(self.answers.items())
        )

    def html(self) -> str:
        """A document complete in itself."""
        return document("Token rewards", self._body())

    def _repr_html_(self) -> str:
        """For notebooks: the document in a frame, where its style stays; it makes itself as tall as it needs."""
        characters = sum(len(token.text) for tokens in self.answers.values() for token in tokens)
        characters += min(480, sum(len(text) for _, text in self.prompt))
        height = 190 + 34 * (characters // 90 + 2 * len(self.answers))
        return (
            f'<iframe srcdoc="{escape(self.html())}" style="width: 100%; height: {min(height, 900)}px; border: 0"'
            ' title="Token rewards"></iframe>'
        )

    # --- terminal ---------------------------------------------------------------------------------------------------

    def text(
        self,
        color: bool | None = None,
        *,
        stream: TextIO | None = None,
        spans: int = 3,
        whole_prompt: bool = True,
    ) -> str:
        """For a terminal: tokens with coloured backgrounds; without colours, the stretches of low reward in brackets.

        Args:
            color: whether to colour; by default if `stream` is a terminal, unless the variable NO_COLOR is set (to
                anything) or TERM is "dumb".
            stream: where it is going; standard output by default.
            spans: how many of `low_reward_spans` to list below each answer, and to bracket.
            whole_prompt: whether all of the prompt comes before the answers, or the end of its last message.
        """
        if color is None:
            color = _takes_color(stream or sys.stdout)
        prompt = self.prompt if whole_prompt else [(role, _tail(text)) for role, text in self.prompt[-1:]]
        blocks = [f"{_styled(_plain(role), _DIM, color)}  {_plain(text)}" for role, text in prompt]
        left_out = len(self.prompt) - len(prompt)
        if left_out:
            blocks.insert(0, _styled(f"({left_out} earlier message{'s' * (left_out > 1)})", _DIM, color))
        for name, tokens in self.answers.items():
            low = low_reward_spans([token.reward for token in tokens], limit=spans)
            total = number(sum(token.reward for token in tokens), 3, True)
            marks = {span.start: "[" for span in low}, {span.end - 1: "]" for span in low}
            body = "".join(
                self._colored(token) if color else _bracketed(_shown(token), marks[0].get(i, ""), marks[1].get(i, ""))
                for i, token in enumerate(tokens)
            )
            blocks.append(f"{_styled(f'{_plain(name)}  {total}', _BOLD, color)}\n{body.rstrip()}")
            if low:
                texts = [visible("".join(t.text for t in tokens[span.start : span.end])) for span in low]
                listed = ", ".join(
                    f"{number(span.reward, 3, True)} “{text}”" for span, text in zip(low, texts, strict=True)
                )
                blocks[-1] += f"\n{_styled(f'lowest: {listed}', _DIM, color)}"
        rewards = self.rewards()
        if set(rewards) == {"chosen", "rejected"}:
            blocks.append(f"margin  {number(rewards['chosen'] - rewards['rejected'], 3, True)}")
        if color:
            ramp = "".join(f"\x1b[48;5;{shade}m  " for shade in (*_BELOW[::-1], _NEITHER, *_ABOVE))
            blocks.append(f"{number(-self.scale, 2)} {ramp}{_RESET} {number(self.scale, 2, True)}  token reward")
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.text()

    def _colored(self, token: Token) -> str:
        if token.reward != token.reward:
            return _shown(token)
        level = round(min(1.0, abs(token.reward) / self.scale) * len(_BELOW))
        shade = (_ABOVE if token.reward > 0 else _BELOW)[level - 1] if level else _NEITHER
        text = _shown(token)
        body = text.rstrip("\n")
        return f"{_BLACK}\x1b[48;5;{shade}m{body}{_RESET}{text[len(body) :]}"

    # --- pictures ---------------------------------------------------------------------------------------------------

    def figure(self, *, width: float = 9.0, title: str = "") -> Figure:
        """A matplotlib figure, as tall as the answers need.

        Args:
            width: in inches.
            title: above it; the prompt's last message by default.
        """
        from .report.figure import Content, draw

        return draw(Content(self.answers, self.rewards(), self.scale, self.prompt), width, title)

    def save_png(self, path: str | os.PathLike[str], *, width: float = 9.0, dpi: int = 160, title: str = "") -> None:
        """Write a picture; needs matplotlib.

        Args:
            path: of the file.
            width: in inches.
            dpi: dots per inch.
            title: as in `figure`.
        """
        figure = self.figure(width=width, title=title)
        with warnings.catch_warnings():
            # A character that no font at hand has is shown as a box.
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            figure.savefig(path, dpi=dpi, format="png")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the document."""
        Path(path).write_text(self.html(), encoding="utf-8")


def _takes_color(stream: Any) -> bool:
    """https://no-color.org, and no escapes into files and pipes."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(getattr(stream, "isatty", lambda: False)())


def _styled(text: str, style: str, color: bool) -> str:
    return f"{style}{text}{_RESET}" if color else text


def _shown(token: Token) -> str:
    """A token's text with spaces and line ends as they are and everything else without a shape spelt out: control
    characters from the data must not act on the terminal."""
    return _plain(token.text)


def _bracketed(text: str, before: str, after: str) -> str:
    """The brackets close to the word: the space that most tokens begin with stays outside."""
    lead = " " if before and text.startswith(" ") and text.strip() else ""
    return lead + before + text[len(lead) :] + after


def _tail(text: str) -> str:
    """The last lines of a message, and a mark if there is more before them."""
    end = "\n".join(text[-_TAIL_CHARACTERS:].split("\n")[-_TAIL_LINES:])
    return text if len(end) == len(text) else f"…{end}"


def _plain(text: str) -> str:
    return printable(text, keep=" \n")
