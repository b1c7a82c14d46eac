"""The command line: `qkernels info`, `qkernels demo`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .objectives import OBJECTIVES

_DEMO = """\
Train a small language model with token-level DPO and show where its rewards fall.

Without --data the pairs are generated: answers with facts about countries, the rejected ones with wrong facts planted
in them. It takes a good minute on a CPU; nothing is downloaded. Writes OUT/report.html, OUT/metrics.json, and in
transformers format OUT/model and OUT/reference (the SFT model that training started from).
"""

_DEMO_DATA = """\
layouts of --data, one record a line (.jsonl) or an array of records (.json):
  {"prompt": "...", "chosen": "...", "rejected": "..."}
  {"prompt": [MESSAGE, ...], "chosen": [MESSAGE], "rejected": [MESSAGE]}
  {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}
  {"conversations": [TURN, ...], "chosen": TURN, "rejected": TURN}
  MESSAGE: {"role": "user", "content": "..."}   TURN: {"from": "human", "value": "..."}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a usage or input error (its text on stderr), 130 when interrupted."""
    args = _parser().parse_args(argv)
    return int(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qkernels", description="Token-level preference losses and rewards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, backends, instruction sets, threads")
    info.set_defaults(run=_info)
    demo = commands.add_parser(
        "demo",
        help="train a small model with token-level DPO and report its token rewards",
        description=_DEMO,
        epilog=_DEMO_DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    add = demo.add_argument
    add("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="folder to create (default: demo_output)")
    add("--overwrite", action="store_true", help="replace an earlier demo's DIR, once the new run has succeeded")
    add("--data", type=Path, metavar="FILE", help="your own preference pairs (default: generated ones)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result on the same machine (default: 0)")
    add("--tiny", action="store_true", help="a run of seconds that checks that everything works, not that it learns")
    add("--sft-steps", type=int, metavar="N", help="steps of supervised fine-tuning before (default: by the data)")
    add("--steps", type=int, metavar="N", help="steps of preference training (default: by the data)")
    add("--batch-size", type=int, metavar="N", help="pairs per step (default: 32; 8 with --data)")
    add("--beta", type=float, default=0.1, metavar="X", help="strength of the KL constraint (default: 0.1)")
    add(
        "--loss",
        default="sigmoid",
        metavar="NAME",
        help=f"one of {', '.join(sorted(OBJECTIVES))} (default: sigmoid, DPO)",
    )
    add(
        "--sft-weight",
        type=float,
        default=1.0,
        metavar="X",
        help="factor of the chosen answers' negative log-likelihood in the loss; with 0, what follows an error is"
        " blamed with it (default: 1)",
    )
    add("--max-length", type=int, metavar="N", help="most tokens of prompt and answer (default: all, at most 512)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads; more are faster if nothing else runs (default: 1; with --data torch's)",
    )
    return parser


def _info(_: argparse.Namespace) -> int:
    from ._info import info

    print(info())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .data import DataError
    from .demo import DemoError, DemoOptions, run_demo
    from .demo.run import summary

    chosen = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    earlier = signal.signal(signal.SIGTERM, _terminate)
    try:
        metrics = run_demo(DemoOptions(**chosen))
    except (DataError, DemoError) as error:
        print(f"qkernels demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nqkernels demo: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, earlier)
    print(summary(metrics, args.out))
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through the clean-up, which the default action of the signal would skip."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
