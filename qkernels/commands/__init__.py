"""The commands of the command line, one file each: `add(commands)` declares its options, `run(args)` carries it out.

A new command is a file here and its name in `COMMANDS`; what it does stands in a folder of its own, which `run`
imports. `main` is public as `qkernels.cli.main`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .._version import __version__

# In the order in which `qkernels --help` lists them.
COMMANDS = (
    "info",
    "demo",
    "train",
    "score",
    "show",
    "judge",
    "self_improve",
    "compare",
    "trl",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a usage or input error (its text on stderr), 130 when interrupted, 141 when
    what read the output (`head`, a pager) has closed it."""
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # argparse would take flags that it hands on for its own
        args = argparse.Namespace(run=importlib.import_module(".train", __name__).run, arguments=argv[1:])
    else:
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help(sys.stderr)
            parser.exit(2)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as from other programs
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qkernels", description="Token-level preference losses and rewards.")
    parser.add_argument("--version", action="version", version=f"qkernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f".{name}", __name__).add(commands)
    return parser
