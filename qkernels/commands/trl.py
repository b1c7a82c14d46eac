"""`qkernels trl`."""

from __future__ import annotations

import argparse

from .common import fail


def add(commands: argparse._SubParsersAction) -> None:
    trl = commands.add_parser(
        "trl",
        add_help=False,  # TRL's own command line answers --help
        help="TRL's own command line (dpo, kto, grpo, sft ...) with this package's heads and losses",
    )
    trl.set_defaults(run=run)
    trl.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="as for `trl`")


def run(args: argparse.Namespace) -> int:
    from ..integrations.trl.command import run_trl

    try:
        return run_trl(args.arguments)
    except ImportError as error:
        return fail("trl", error)
