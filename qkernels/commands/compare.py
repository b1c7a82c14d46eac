"""`qkernels compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import carry_out, options_of

_DESCRIPTION = """\
How far the log-probs of a rollout engine lie from a trainer's, on the tokens that the engine generated: mean ratio,
share outside of 0.9 to 1.1, estimates of the KL, by position and token, the worst tokens in their context, and how much
of it rounding the logits to 16 bits explains alone.

Writes OUT/compare.json and OUT/report.html.
"""

_FILES = """\
a record of the file (JSON lines, JSON, Parquet ...) is a generated sequence:
  {"prompt_token_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-0.5, -1.25]}
names and log-probs as vLLM, SGLang, TRL and verl write them are known too; docs/numerics.md lists them.
"""


def add(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare",
        help="log-probs of a rollout engine beside a model's, token by token",
        description=_DESCRIPTION,
        epilog=_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.set_defaults(run=run)
    option = compare.add_argument
    option("--engine", type=Path, required=True, metavar="FILE", help="token ids with the engine's log-probs")
    option("--model", metavar="DIR", help="the model whose log-probs are compared with them")
    option("--other", type=Path, metavar="FILE", help="instead: a second file of the same tokens")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    option("--overwrite", action="store_true", help="replace an earlier comparison in OUT")
    option("--temperature", type=float, default=1.0, metavar="X", help="divides the model's logits (default: 1)")
    option("--low", type=float, default=0.9, metavar="X", help="ratios below are counted (default: 0.9)")
    option("--high", type=float, default=1.1, metavar="X", help="ratios above are counted (default: 1.1)")
    option("--tokenizer", metavar="DIR", help="shows tokens as text (default: the model's)")
    option("--limit", type=int, metavar="N", help="only the first N sequences")
    option("--shown", type=int, default=20, metavar="N", help="worst tokens in the report (default: 20)")
    option("--batch-tokens", type=int, metavar="N", help="padded tokens of a forward pass (default: 8192 on a GPU, 1024"
           " on a CPU)")  # fmt: skip
    option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    option("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto (default: as saved)")
    option("--trust-remote-code", action="store_true", help="run Python code that comes with a model")


def run(args: argparse.Namespace) -> int:
    from ..compare import CompareError, CompareOptions, run_compare
    from ..compare.run import summary
    from ..data import DataError

    options = CompareOptions(**options_of(args))
    return carry_out(
        "compare", lambda: summary(run_compare(options), options.out), (DataError, CompareError), "nothing was written"
    )
