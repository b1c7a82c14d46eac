"""`qkernels info`."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser("info", help="versions, backends, instruction sets, threads")
    info.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    from ..functional.info import info

    print(info())
    return 0
