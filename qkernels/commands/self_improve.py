"""`qkernels self-improve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import carry_out, options_of

_DESCRIPTION = """\
Let a model make its own preference data and train on it: it writes several answers to each prompt, its own Yes or No
scores them, the best and the worst make a pair, DPO trains on the pairs; then the next round ("Your language model is
secretly a preference classifier", Garg et al. 2025).

Writes OUT/round-N/pairs.jsonl, which `qkernels score` and `qkernels train` read, and OUT/round-N/model. An interrupted
run keeps finished rounds and the pairs made so far; the same command with --resume goes on, as it does with a larger
--rounds.
"""

_PROMPTS = """\
--prompts takes JSON lines (.jsonl) or an array (.json) of
  "..."   or   {"prompt": "...", "category": "chat"}
or else a text with one prompt a line. Categories are needed by --judge published: chat, code, math, safety.
"""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "self-improve",
        help="rounds of a model's own preference pairs and DPO on them",
        description=_DESCRIPTION,
        epilog=_PROMPTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    option = command.add_argument
    option("--model", required=True, metavar="DIR", help="an instruction-tuned model; transformers format, or"
           " OWNER/MODEL on the Hugging Face Hub")  # fmt: skip
    option("--prompts", type=Path, required=True, metavar="FILE", help="what the model is asked")
    option("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    option("--resume", action="store_true", help="go on with what is in OUT")
    option("--rounds", type=int, default=1, metavar="N", help="(default: 1, as in the paper)")
    option("--samples", type=int, default=4, metavar="N", help="answers to each prompt (default: 4)")
    option("--temperature", type=float, default=0.7, metavar="X", help="of the answers (default: 0.7)")
    option("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    option(
        "--min-gap", type=float, default=0.0, metavar="X", help="keep pairs whose scores differ by more (default: 0)"
    )
    option("--judge", default="own", metavar="NAME", help="own (one question for all prompts, by the chat template) or"
           " published (the questions of the authors' code, by category) (default: own)")  # fmt: skip
    option("--beta", type=float, default=0.1, metavar="X", help="strength of the KL constraint (default: 0.1)")
    option("--learning-rate", type=float, default=1e-6, metavar="X", help="peak, of AdamW (default: 1e-6)")
    option("--epochs", type=int, default=1, metavar="N", help="passes over the pairs of a round (default: 1)")
    option("--batch-size", type=int, default=8, metavar="N", help="pairs per step (default: 8)")
    option("--seed", type=int, default=0, metavar="N", help="of samples and training (default: 0)")
    option("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    option("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto (default: as saved)")
    option(
        "--trust-remote-code", action="store_true", help="run Python code that comes with a model (default: refuse it)"
    )


def run(args: argparse.Namespace) -> int:
    from ..self_preference import SelfPreferenceError
    from ..self_preference.command import run_self_improve, summary

    return carry_out(
        "self-improve",
        lambda: summary(run_self_improve(**options_of(args))),
        (SelfPreferenceError,),
        "--resume goes on with what is finished",
    )
