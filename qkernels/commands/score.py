"""`qkernels score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import DATA, add_data, carry_out, names, options_of

_DESCRIPTION = """\
Score every answer token of a preference file under a model and its reference: reward, log-probs, Q, V, advantage,
entropy, both KL divergences.

Writes OUT/tokens.parquet (a row per token), OUT/pairs.parquet, OUT/summary.json and OUT/report.html, which shows the
most suspicious answers and tokens first. An interrupted run, also by Ctrl-C, keeps what it has scored; the same command
with --resume goes on. `torchrun --nproc-per-node N -m qkernels score ...` shares the pairs among N processes.
"""


def add(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        help="per-token rewards of your own model on your own preference pairs",
        description=_DESCRIPTION,
        epilog=DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.set_defaults(run=run)
    option = score.add_argument
    option(
        "--model",
        required=True,
        metavar="DIR",
        help="the trained model, or a PEFT adapter; transformers format, or OWNER/MODEL on the Hugging Face Hub",
    )
    option(
        "--reference",
        metavar="DIR",
        help="the model that training started from (default for a PEFT adapter: its base, the adapter switched off)",
    )
    option(
        "--reference-logps",
        type=Path,
        metavar="DIR",
        help="instead: an earlier run's OUT (or a Parquet file), whose reference log-probs are taken",
    )
    option("--data", type=Path, required=True, metavar="DATA", help="preference pairs: a file, a folder, a hub name")
    add_data(score)
    option("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    again = score.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in OUT")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run's results in OUT")
    option(
        "--beta", type=float, default=0.1, metavar="X", help="strength of the KL constraint in training (default: 0.1)"
    )
    option(
        "--outputs",
        type=names,
        metavar="NAMES",
        help="columns beside logps, reference_logps and implicit_rewards, separated by commas (default: Q, V, A,"
        " bellman_rewards, entropy, both KLs, is_top1)",
    )
    option("--limit", type=int, metavar="N", help="only the first N pairs")
    option(
        "--max-length",
        type=int,
        metavar="N",
        help="cut prompt and answer to N tokens (default: refuse what is longer than the model takes)",
    )
    option(
        "--prompt-format",
        default="auto",
        metavar="NAME",
        help="chat (the tokenizer's template), plain, or auto (default: chat where there is a template)",
    )
    option("--chat-template", type=Path, metavar="FILE", help="Jinja template in place of the tokenizer's")
    option(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="padded tokens of a forward pass (default: 8192 on a GPU, 1024 on a CPU)",
    )
    option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    option("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto (default: as saved)")
    option("--shown", type=int, default=12, metavar="N", help="pairs in the report (default: 12)")
    option(
        "--trust-remote-code", action="store_true", help="run Python code that comes with a model (default: refuse it)"
    )


def run(args: argparse.Namespace) -> int:
    from ..data import DataError
    from ..score.options import ScoreError, ScoreOptions
    from ..score.run import run_score, summary

    options = ScoreOptions(**options_of(args))
    return carry_out(
        "score",
        lambda: summary(run_score(options), options),
        (DataError, ScoreError),
        "--resume goes on with what has been scored",
    )
