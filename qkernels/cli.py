"""The command line: `qkernels info`, `qkernels demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a usage or input error (its text on stderr)."""
    parser = argparse.ArgumentParser(prog="qkernels", description="Token-level preference losses and rewards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, backends, instruction sets, threads")
    args = parser.parse_args(argv)
    if args.command == "info":
        from ._info import info

        print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
