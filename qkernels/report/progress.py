"""Progress on a terminal as a bar, elsewhere as a handful of lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ..text.characters import printable

_LINES_PER_PHASE = 5
_SECONDS_BETWEEN_NOTES = 60
_BAR = "  {desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Phase:
    """One counted stretch of work; use as a context manager."""

    def __init__(self, name: str, total: int, stream: TextIO) -> None:
        self._name, self._total, self._stream = name, total, stream
        self._done, self._start = 0, time.monotonic()
        self._noted: float | None = None
        self._bar = None
        if total and can_redraw(stream):
            from tqdm import tqdm  # comes with transformers

            self._bar = tqdm(total=total, desc=name, file=stream, dynamic_ncols=True, bar_format=_BAR)
        elif total:
            print(f"  {name} 0/{total}", file=stream, flush=True)  # at once: the first step may take minutes

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, text: str) -> None:
        """What is going on within a step that takes long; where no bar is drawn, at first and once a minute."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if self._total and (self._noted is None or now - self._noted >= _SECONDS_BETWEEN_NOTES):
            self._noted = now
            line = f"  {self._name} {self._done}/{self._total}  {text}  {now - self._start:.0f} s"
            print(line, file=self._stream, flush=True)

    def step(self, note: str = "", steps: int = 1) -> None:
        """So many steps are done; `note` says how it stands."""
        before = self._done
        self._done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
            return
        every = max(1, -(-self._total // _LINES_PER_PHASE))
        if self._done // every > before // every or self._done == self._total:
            seconds = time.monotonic() - self._start
            print(f"  {self._name} {self._done}/{self._total}  {note}  {seconds:.0f} s", file=self._stream, flush=True)


def can_redraw(stream: TextIO) -> bool:
    """Whether a bar can be drawn over itself: a terminal that knows its size (a bare pseudo-terminal has none)."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


class Progress:
    """Where a run says what it is doing."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def say(self, text: str) -> None:
        """A line of its own, made `printable`."""
        print(printable(text), file=self.stream, flush=True)

    def phase(self, name: str, total: int) -> Phase:
        """Begin `total` steps of work."""
        return Phase(name, total, self.stream)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own (saving a model draws some) between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
