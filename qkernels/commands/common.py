"""What the commands share: how data is named, how errors are told, how a run is stopped."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from ..text.characters import printable

DATA = """\
--data takes JSON (an array of records), JSON lines, CSV, Parquet or Arrow, plain or .gz; a folder of these; what
`save_to_disk` of `datasets` writes; or OWNER/NAME of a data set on the Hugging Face Hub. Layouts of a record:
  {"prompt": "...", "chosen": "...", "rejected": "..."}
  {"prompt": [MESSAGE, ...], "chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}
  {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}
  {"conversations": [TURN, ...], "chosen": TURN, "rejected": TURN}
  MESSAGE: {"role": "user", "content": "..."}   TURN: {"from": "human", "value": "..."}
and those of Alpaca, HH-RLHF, UltraFeedback and others, which docs/data.md lists.
"""


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options of --data."""
    add = parser.add_argument
    add("--split", metavar="NAME", help="of a folder or a hub data set (default: its only one, or train)")
    add("--data-config", metavar="NAME", help="of a hub data set that has several")
    add("--skip-invalid", action="store_true", help="leave out records that cannot be used, and say how many and why")


def names(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command, without what the parser keeps beside them."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "run")}


def fail(command: str, error: object) -> int:
    """Tell an error, which may quote data, on one line."""
    print(f"qkernels {command}: error: {printable(str(error))}", file=sys.stderr)
    return 2


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """Let SIGTERM leave through the clean-up, which its default action would skip."""
    earlier = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def carry_out(command: str, run: Callable[[], str], errors: tuple[type[Exception], ...], interrupted: str) -> int:
    """Run a command that works on a folder, and print its summary.

    Args:
        command: its name, for messages.
        run: does it; returns the summary.
        errors: what is told in one line instead of a traceback.
        interrupted: what holds after Ctrl-C.

    Returns:
        The exit status: 0, 2 after one of the errors, 130 when interrupted.
    """
    try:
        with stopped_cleanly():
            text = run()
    except errors as error:
        return fail(command, error)
    except KeyboardInterrupt:
        print(f"\nqkernels {command}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    if text:  # of several processes, the first one speaks
        print(printable(text, keep=" \n"))
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through the clean-up, which the default action of the signal would skip."""
    raise SystemExit(128 + number)
