"""`qkernels judge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import carry_out, options_of

_DESCRIPTION = """\
How often the answers of one side (A) are better than those of another (B) on a set of prompts, with an interval from
resampling the prompts, and with what is left at equal length.

A side is a model, which answers the prompts, or a file of answers. Who judges is one of
  --scorer module:function   of yours: f(prompt, answer) -> number, or f(prompt, first, second) -> 0..1, in both orders
  --judge DIR                a model in transformers format, which sees both answers, in both orders
  --verdicts FILE            verdicts that were made elsewhere
or nobody: then OUT/questions.jsonl asks every question in both orders, to be filled in and given to --verdicts.

Writes OUT/judge.json, OUT/report.html, answers and verdicts. An interrupted run keeps what is finished; the same
command with --resume goes on.
"""

_FILES = """\
files are JSON lines, JSON, Parquet or CSV, a record each:
  prompts    {"prompt": "..."} or {"prompt": [MESSAGE, ...]}, or preference pairs, whose prompts are taken
  answers    {"prompt": ..., "answer": "..."}     (answers_a.jsonl of an earlier run is one)
  verdicts   {"prompt": ..., "order": "ab" or "ba", "winner": "first", "second", "a", "b" or "tie"}
  MESSAGE: {"role": "user", "content": "..."}
"""


def add(commands: argparse._SubParsersAction) -> None:
    judge = commands.add_parser(
        "judge",
        help="win rate of one model's answers over another's, in both orders, with intervals",
        description=_DESCRIPTION,
        epilog=_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judge.set_defaults(run=run)
    option = judge.add_argument
    option(
        "--a", required=True, metavar="SIDE", help="a model (folder, or OWNER/MODEL on the hub) or a file of answers"
    )
    option("--b", required=True, metavar="SIDE", help="what it is compared with")
    option("--prompts", type=Path, metavar="FILE", help="prompts (default: those of the files of answers)")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    again = judge.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in OUT")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in OUT")
    who = judge.add_mutually_exclusive_group()
    who.add_argument("--scorer", metavar="NAME", help="module:function or file.py:function; its code is run")
    who.add_argument("--judge", metavar="DIR", help="a model that judges")
    who.add_argument("--verdicts", type=Path, metavar="FILE", help="verdicts that were made elsewhere")
    option("--template", type=Path, metavar="FILE", help="the question to --judge, with {prompt} and {response} in it")
    option("--limit", type=int, metavar="N", help="only the first N prompts")
    option("--max-new-tokens", type=int, default=256, metavar="N", help="longest generated answer (default: 256)")
    option("--temperature", type=float, default=0.0, metavar="X", help="of generated answers (default: 0, greedy)")
    option("--seed", type=int, default=0, metavar="N", help="of samples and of the bootstrap (default: 0)")
    option("--batch-size", type=int, default=8, metavar="N", help="prompts that are answered together (default: 8)")
    option(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="padded tokens of a forward pass of --judge (default: 8192 on a GPU, 1024 on a CPU)",
    )
    option("--resamples", type=int, default=2000, metavar="N", help="draws of the bootstrap (default: 2000)")
    option("--level", type=float, default=0.95, metavar="X", help="probability of the intervals (default: 0.95)")
    option("--shown", type=int, default=12, metavar="N", help="prompts lost and won in the report (default: 12 each)")
    option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    option("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto (default: as saved)")
    option(
        "--trust-remote-code", action="store_true", help="run Python code that comes with a model (default: refuse it)"
    )


def run(args: argparse.Namespace) -> int:
    from ..data import DataError
    from ..judge.options import JudgeError, JudgeOptions
    from ..judge.run import run_judge, summary

    options = JudgeOptions(**options_of(args))
    return carry_out(
        "judge",
        lambda: summary(run_judge(options), options),
        (DataError, JudgeError),
        "--resume goes on with what is finished",
    )
