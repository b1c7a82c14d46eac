"""Printable text, lengths of sequences, and that the modules which share them do not import each other."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import pytest

import qkernels
from qkernels.text.characters import PrintableError, first_line, printable, visible
from qkernels.text.lengths import batches_by_length, kept_lengths

ROOT = Path(qkernels.__file__).resolve().parents[1]


def test_every_character_is_printable_afterwards() -> None:
    """All of Unicode: what has a shape stays, the rest is spelt out, and nothing but a line end ends a line."""
    for code in range(0, sys.maxunicode + 1, 256):
        text = "".join(map(chr, range(code, code + 256)))
        shown = printable(text)
        assert shown.isprintable() and len(shown.splitlines()) == 1
        runs = [(kept, "".join(run)) for kept, run in groupby(text, str.isprintable)]
        assert shown == "".join(run if kept else visible(run) for kept, run in runs)
    assert printable("a\n\tb \x1b[m") == "a↵⇥b ␛[m"
    assert printable("a\n\tb", keep=" \n") == "a\n⇥b"
    assert printable("a b", keep="") == "a␣b"


def test_an_error_is_printable() -> None:
    class Refusal(PrintableError, ValueError):
        pass

    with pytest.raises(ValueError) as error:
        raise Refusal("field \x1b]0;x\x07 of\nthe data")
    assert str(error.value) == "field ␛]0;x␇ of↵the data"
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"


def test_a_cut_keeps_the_answer_first() -> None:
    assert kept_lengths(10, 100) == (90, 10) and kept_lengths(90, 100) == (25, 75) and kept_lengths(500, 8) == (2, 6)
    assert list(batches_by_length([3, 9, 3, 3], 9)) == [[1], [0, 2, 3]]
