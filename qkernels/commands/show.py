"""`qkernels show`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import fail


def add(commands: argparse._SubParsersAction) -> None:
    show = commands.add_parser(
        "show",
        help="one pair of a scored folder, its tokens coloured by their rewards",
        description="Show one pair of a folder that `qkernels score` wrote, each token on the colour of its reward.",
    )
    show.set_defaults(run=run)
    option = show.add_argument
    option("folder", type=Path, metavar="DIR", help="what `qkernels score --out` wrote")
    option("--pair", type=int, metavar="N", help="number of the pair (default: the one with the lowest margin)")
    option("--side", choices=("chosen", "rejected"), help="one answer alone")
    option("--prompt", action="store_true", help="print the whole prompt (default: the end of its last message)")
    option("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    option("--png", type=Path, metavar="FILE", help="write a picture instead of printing; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    from ..score.options import ScoreError
    from ..score.store import read_scores

    try:
        table = read_scores(args.folder)
        pair = args.pair
        if pair is None:
            rewards = table.pair_rewards()
            pair = int(rewards["pair"][rewards["margins"].argmin()])
        elif pair not in table.pairs():
            raise ScoreError(f"--pair {pair}: not among the {len(table.pairs())} pairs of {args.folder}")
        heat_map = table.heat_map(pair, args.side)
        if args.html is not None:
            heat_map.save_html(args.html)
        if args.png is not None:
            heat_map.save_png(args.png)
    except ScoreError as error:
        return fail("show", error)
    except OSError as error:
        return fail("show", f"cannot write ({error})")
    except ModuleNotFoundError as error:
        return fail("show", f"needs {error.name}: pip install {error.name}")
    if args.html is None and args.png is None:
        print(f"pair {pair}\n\n{heat_map.text(whole_prompt=args.prompt)}")
    return 0
