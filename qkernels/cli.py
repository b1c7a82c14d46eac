"""The command line: `qkernels info`, `qkernels demo`, `qkernels score`, `qkernels show`, `qkernels judge`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ._version import __version__
from .objectives import OBJECTIVES, STATEFUL
from .text.characters import printable

_DEMO = """\
Train a small language model with token-level DPO and show where its rewards fall.

Without --data the pairs are generated: answers with facts about countries, the rejected ones with wrong facts planted
in them. It takes a good minute on a CPU; nothing is downloaded. Writes OUT/report.html, OUT/metrics.json, and in
transformers format OUT/model and OUT/reference (the SFT model that training started from).
"""

_SCORE = """\
Score every answer token of a preference file under a model and its reference: reward, log-probs, Q, V, advantage,
entropy, both KL divergences.

Writes OUT/tokens.parquet (a row per token), OUT/pairs.parquet, OUT/summary.json and OUT/report.html, which shows the
most suspicious answers and tokens first. An interrupted run, also by Ctrl-C, keeps what it has scored; the same command
with --resume goes on.
"""

_JUDGE = """\
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

_JUDGE_DATA = """\
files are JSON lines, JSON, Parquet or CSV, a record each:
  prompts    {"prompt": "..."} or {"prompt": [MESSAGE, ...]}, or preference pairs, whose prompts are taken
  answers    {"prompt": ..., "answer": "..."}     (answers_a.jsonl of an earlier run is one)
  verdicts   {"prompt": ..., "order": "ab" or "ba", "winner": "first", "second", "a", "b" or "tie"}
  MESSAGE: {"role": "user", "content": "..."}
"""

_DATA = """\
--data takes JSON (an array of records), JSON lines, CSV, Parquet or Arrow, plain or .gz; a folder of these; what
`save_to_disk` of `datasets` writes; or OWNER/NAME of a data set on the Hugging Face Hub. Layouts of a record:
  {"prompt": "...", "chosen": "...", "rejected": "..."}
  {"prompt": [MESSAGE, ...], "chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}
  {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}
  {"conversations": [TURN, ...], "chosen": TURN, "rejected": TURN}
  MESSAGE: {"role": "user", "content": "..."}   TURN: {"from": "human", "value": "..."}
and those of Alpaca, HH-RLHF, UltraFeedback and others, which docs/data.md lists.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a usage or input error (its text on stderr), 130 when interrupted, 141 when
    what read the output (`head`, a pager) has closed it."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as from other programs
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qkernels", description="Token-level preference losses and rewards.")
    parser.add_argument("--version", action="version", version=f"qkernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    info = commands.add_parser("info", help="versions, backends, instruction sets, threads")
    info.set_defaults(run=_info)
    demo = commands.add_parser(
        "demo",
        help="train a small model with token-level DPO and report its token rewards",
        description=_DEMO,
        epilog=_DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    add = demo.add_argument
    add("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="folder to create (default: demo_output)")
    add("--overwrite", action="store_true", help="replace an earlier demo's DIR, once the new run has succeeded")
    add("--data", type=Path, metavar="DATA", help="your own preference pairs (default: generated ones)")
    _add_data(demo)
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
        help=f"one of {', '.join(sorted({*OBJECTIVES, *STATEFUL}))} (default: sigmoid, DPO)",
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
    _add_score(commands)
    _add_show(commands)
    _add_judge(commands)
    _add_trl(commands)
    return parser


def _add_score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        help="per-token rewards of your own model on your own preference pairs",
        description=_SCORE,
        epilog=_DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.set_defaults(run=_score)
    add = score.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="the trained model, or a PEFT adapter; transformers format, or OWNER/MODEL on the Hugging Face Hub",
    )
    add(
        "--reference",
        metavar="DIR",
        help="the model that training started from (default for a PEFT adapter: its base, the adapter switched off)",
    )
    add(
        "--reference-logps",
        type=Path,
        metavar="DIR",
        help="instead: an earlier run's OUT (or a Parquet file), whose reference log-probs are taken",
    )
    add("--data", type=Path, required=True, metavar="DATA", help="preference pairs: a file, a folder, a hub name")
    _add_data(score)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    again = score.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in OUT")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run's results in OUT")
    add("--beta", type=float, default=0.1, metavar="X", help="strength of the KL constraint in training (default: 0.1)")
    add(
        "--outputs",
        type=_names,
        metavar="NAMES",
        help="columns beside logps, reference_logps and implicit_rewards, separated by commas (default: Q, V, A,"
        " bellman_rewards, entropy, both KLs, is_top1)",
    )
    add("--limit", type=int, metavar="N", help="only the first N pairs")
    add("--max-length", type=int, metavar="N", help="cut prompt and answer to N tokens (default: refuse what is longer"
        " than the model takes)")  # fmt: skip
    add("--prompt-format", default="auto", metavar="NAME", help="chat (the tokenizer's template), plain, or auto"
        " (default: chat where there is a template)")  # fmt: skip
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template in place of the tokenizer's")
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="padded tokens of a forward pass (default: 8192 on a GPU, 1024 on a CPU)",
    )
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto (default: as saved)")
    add("--shown", type=int, default=12, metavar="N", help="pairs in the report (default: 12)")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model (default: refuse it)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    """The options of --data."""
    add = parser.add_argument
    add("--split", metavar="NAME", help="of a folder or a hub data set (default: its only one, or train)")
    add("--data-config", metavar="NAME", help="of a hub data set that has several")
    add("--skip-invalid", action="store_true", help="leave out records that cannot be used, and say how many and why")


def _add_show(commands: argparse._SubParsersAction) -> None:
    show = commands.add_parser(
        "show",
        help="one pair of a scored folder, its tokens coloured by their rewards",
        description="Show one pair of a folder that `qkernels score` wrote, each token on the colour of its reward.",
    )
    show.set_defaults(run=_show)
    add = show.add_argument
    add("folder", type=Path, metavar="DIR", help="what `qkernels score --out` wrote")
    add("--pair", type=int, metavar="N", help="number of the pair (default: the one with the lowest margin)")
    add("--side", choices=("chosen", "rejected"), help="one answer alone")
    add("--prompt", action="store_true", help="print the whole prompt (default: the end of its last message)")
    add("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    add("--png", type=Path, metavar="FILE", help="write a picture instead of printing; needs matplotlib")


def _add_judge(commands: argparse._SubParsersAction) -> None:
    judge = commands.add_parser(
        "judge",
        help="win rate of one model's answers over another's, in both orders, with intervals",
        description=_JUDGE,
        epilog=_JUDGE_DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judge.set_defaults(run=_judge)
    add = judge.add_argument
    add("--a", required=True, metavar="SIDE", help="a model (folder, or OWNER/MODEL on the hub) or a file of answers")
    add("--b", required=True, metavar="SIDE", help="what it is compared with")
    add("--prompts", type=Path, metavar="FILE", help="prompts (default: those of the files of answers)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    again = judge.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in OUT")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in OUT")
    who = judge.add_mutually_exclusive_group()
    who.add_argument("--scorer", metavar="NAME", help="module:function or file.py:function; its code is run")
    who.add_argument("--judge", metavar="DIR", help="a model that judges")
    who.add_argument("--verdicts", type=Path, metavar="FILE", help="verdicts that were made elsewhere")
    add("--template", type=Path, metavar="FILE", help="the question to --judge, with {prompt} and {response} in it")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest generated answer (default: 256)")
    add("--temperature", type=float, default=0.0, metavar="X", help="of generated answers (default: 0, greedy)")
    add("--seed", type=int, default=0, metavar="N", help="of samples and of the bootstrap (default: 0)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts that are answered together (default: 8)")
    add("--batch-tokens", type=int, metavar="N", help="padded tokens of a forward pass of --judge (default: 8192 on a"
        " GPU, 1024 on a CPU)")  # fmt: skip
    add("--resamples", type=int, default=2000, metavar="N", help="draws of the bootstrap (default: 2000)")
    add("--level", type=float, default=0.95, metavar="X", help="probability of the intervals (default: 0.95)")
    add("--shown", type=int, default=12, metavar="N", help="prompts lost and won in the report (default: 12 each)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, or auto (default: as saved)")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model (default: refuse it)")


def _add_trl(commands: argparse._SubParsersAction) -> None:
    trl = commands.add_parser(
        "trl",
        add_help=False,  # TRL's own command line answers --help
        help="TRL's own command line (dpo, kto, grpo, sft ...) with this package's heads and losses",
    )
    trl.set_defaults(run=_trl)
    trl.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="as for `trl`")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _info(_: argparse.Namespace) -> int:
    from .functional.info import info

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
        return _fail("demo", error)
    except KeyboardInterrupt:
        print("\nqkernels demo: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, earlier)
    print(printable(summary(metrics, args.out), keep=" \n"))
    return 0


def _score(args: argparse.Namespace) -> int:
    from .data import DataError
    from .score.options import ScoreError, ScoreOptions
    from .score.run import run_score, summary

    chosen = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    options = ScoreOptions(**chosen)
    earlier = signal.signal(signal.SIGTERM, _terminate)
    try:
        figures = run_score(options)
    except (DataError, ScoreError) as error:
        return _fail("score", error)
    except KeyboardInterrupt:
        print("\nqkernels score: interrupted; --resume goes on with what has been scored", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, earlier)
    print(printable(summary(figures, options), keep=" \n"))
    return 0


def _judge(args: argparse.Namespace) -> int:
    from .data import DataError
    from .judge.options import JudgeError, JudgeOptions
    from .judge.run import run_judge, summary

    chosen = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    options = JudgeOptions(**chosen)
    earlier = signal.signal(signal.SIGTERM, _terminate)
    try:
        figures = run_judge(options)
    except (DataError, JudgeError) as error:
        return _fail("judge", error)
    except KeyboardInterrupt:
        print("\nqkernels judge: interrupted; --resume goes on with what is finished", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, earlier)
    print(printable(summary(figures, options), keep=" \n"))
    return 0


def _show(args: argparse.Namespace) -> int:
    from .score.options import ScoreError
    from .score.store import read_scores

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
        return _fail("show", error)
    except OSError as error:
        return _fail("show", f"cannot write ({error})")
    except ModuleNotFoundError as error:
        return _fail("show", f"needs {error.name}: pip install {error.name}")
    if args.html is None and args.png is None:
        print(f"pair {pair}\n\n{heat_map.text(whole_prompt=args.prompt)}")
    return 0


def _trl(args: argparse.Namespace) -> int:
    from .integrations.trl.command import run_trl

    try:
        return run_trl(args.arguments)
    except ImportError as error:
        return _fail("trl", error)


def _fail(command: str, error: object) -> int:
    """Tell an error, which may quote data, on one line."""
    print(f"qkernels {command}: error: {printable(str(error))}", file=sys.stderr)
    return 2


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through the clean-up, which the default action of the signal would skip."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
