"""`qkernels demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..objectives import OBJECTIVES, STATEFUL
from .common import DATA, add_data, carry_out, options_of

_DESCRIPTION = """\
Train a small language model with token-level DPO and show where its rewards fall.

Without --data the pairs are generated: answers with facts about countries, the rejected ones with wrong facts planted
in them. It takes a good minute on a CPU; nothing is downloaded. Writes OUT/report.html, OUT/metrics.json, and in
transformers format OUT/model and OUT/reference (the SFT model that training started from).
"""


def add(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model with token-level DPO and report its token rewards",
        description=_DESCRIPTION,
        epilog=DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.set_defaults(run=run)
    option = demo.add_argument
    option(
        "--out", type=Path, default=Path("demo_output"), metavar="DIR", help="folder to create (default: demo_output)"
    )
    option("--overwrite", action="store_true", help="replace an earlier demo's DIR, once the new run has succeeded")
    option("--data", type=Path, metavar="DATA", help="your own preference pairs (default: generated ones)")
    add_data(demo)
    option("--seed", type=int, default=0, metavar="N", help="same seed, same result on the same machine (default: 0)")
    option("--tiny", action="store_true", help="a run of seconds that checks that everything works, not that it learns")
    option("--sft-steps", type=int, metavar="N", help="steps of supervised fine-tuning before (default: by the data)")
    option("--steps", type=int, metavar="N", help="steps of preference training (default: by the data)")
    option("--batch-size", type=int, metavar="N", help="pairs per step (default: 32; 8 with --data)")
    option("--beta", type=float, default=0.1, metavar="X", help="strength of the KL constraint (default: 0.1)")
    option(
        "--loss",
        default="sigmoid",
        metavar="NAME",
        help=f"one of {', '.join(sorted({*OBJECTIVES, *STATEFUL}))} (default: sigmoid, DPO)",
    )
    option(
        "--sft-weight",
        type=float,
        default=1.0,
        metavar="X",
        help="factor of the chosen answers' negative log-likelihood in the loss; with 0, what follows an error is"
        " blamed with it (default: 1)",
    )
    option("--max-length", type=int, metavar="N", help="most tokens of prompt and answer (default: all, at most 512)")
    option(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads; more are faster if nothing else runs (default: 1; with --data torch's)",
    )


def run(args: argparse.Namespace) -> int:
    from ..data import DataError
    from ..demo import DemoError, DemoOptions, run_demo
    from ..demo.run import summary

    options = DemoOptions(**options_of(args))
    return carry_out(
        "demo", lambda: summary(run_demo(options), args.out), (DataError, DemoError), "nothing was written"
    )
