"""Text from data, files and other packages, made safe to print: nothing of it may act on a terminal."""

from __future__ import annotations

import unicodedata

_WHITESPACE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


def visible(text: str) -> str:
    """A text with everything that has no shape of its own spelt out: "\\n" as ↵, a zero byte as ␀, U+200B."""
    return "".join(_visible_character(character) for character in text)


def printable(text: str, keep: str = " ") -> str:
    """A text that can be printed whatever it holds: `visible`, except for the characters of `keep`.

    Every message that contains text from outside goes through this function before it reaches a terminal: an escape
    sequence in the name of a data field would otherwise set the terminal's title, move its cursor or hide lines.

    Args:
        text: anything.
        keep: characters that stay as they are; " \\n" for a text of several lines.
    """
    if text.isprintable() and " " in keep:  # exactly the characters that `visible` leaves alone, and the space
        return text
    return "".join(character if character in keep else _visible_character(character) for character in text)


def first_line(error: BaseException) -> str:
    """What an error says first, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class PrintableError(Exception):
    """An error whose message is made `printable`, because it may quote data, file contents or other packages."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def _visible_character(character: str) -> str:
    if character in _WHITESPACE:
        return _WHITESPACE[character]
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 32 else f"⟨U+{ord(character):04X}⟩"
    if category in ("Cf", "Zl", "Zp", "Zs", "Co", "Cn", "Cs"):
        return f"⟨U+{ord(character):04X}⟩"
    return character
