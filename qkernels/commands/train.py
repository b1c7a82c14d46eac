"""`qkernels train`."""

from __future__ import annotations

import argparse

from .common import stopped_cleanly


def add(commands: argparse._SubParsersAction) -> None:
    # Listed here alone: its options are those of TRL's dataclasses, which only `run` imports.
    commands.add_parser(
        "train",
        add_help=False,
        help="train your own model with preferences: TRL's DPO with this package's losses, heads and reports",
    )


def run(args: argparse.Namespace) -> int:
    from ..train import main

    with stopped_cleanly():
        return main(args.arguments)
