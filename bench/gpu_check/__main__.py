"""Everything that needs a GPU, in order of worth, within a budget of seconds:

    python -m bench.gpu_check --budget 240 --out DIR       build, values, tests that run kernels, memory checks ...
    python -m bench.gpu_check --budget 300 --continue DIR  ... figures, peers, profiles, tuning: what is left
    python -m bench.gpu_check --steps values stats         only these
    python -m bench.gpu_check --device cpu                 a rehearsal: the same code on tiny tensors

What was measured is in DIR after every figure: record.json, which --continue reads, and results.md. A step that does
not fit into what is left of the budget is left to the next call.

Exit status: 0, everything ran and is fine; 1, a step failed; 2, nothing can run, and the message says what is missing;
3, nothing failed, and steps are left for another call; 128 + n, ended by signal n.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from . import machine, record, schedule, worker
from .record import FAILED, RUNNING, STOPPED, Outcome, Record
from .step import ROOT, Bench

BUDGET = 540
_SPARE = 3  # seconds of the budget for writing and for processes to end
_PATIENCE = 10  # a step of a rehearsal may take this many times as long: its processor may be shared with anything


class Ended(BaseException):
    """The call was ended from outside, by this signal."""

    def __init__(self, number: int):
        self.number = number


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and (reason := machine.why_no_gpu()):
        print(f"no GPU can be used: {reason}. --device cpu is a rehearsal without one", file=sys.stderr)
        return 2
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    bench = Bench(device, options.quick, options.wheels)
    if options.worker:
        return worker.work(options.worker, bench)
    if options.wheels is not None and not options.wheels.is_dir():
        print(f"--wheels {options.wheels}: there is no such folder", file=sys.stderr)
        return 2
    try:
        kept = _record(options, device)
    except record.Unusable as error:
        print(error, file=sys.stderr)
        return 2
    names = [name for name in options.steps if not (options.no_build and name == "build")]
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(kept, names, bench, options.budget)
    except Ended as ended:
        said = f"ended by {signal.Signals(ended.number).name}"
        status = 128 + ended.number
    else:
        left = [name for name in names if name not in kept.outcomes or kept.outcomes[name].state == STOPPED]
        bad = [name for name, outcome in kept.outcomes.items() if outcome.state == FAILED]
        status = 1 if bad else 3 if left else 0
        parts = [f"failed: {', '.join(bad)}"] * bool(bad) + [f"left for another call: {', '.join(left)}"] * bool(left)
        said = "; ".join(parts) or "everything ran"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    kept.calls[-1]["ended"] = said
    kept.save()
    print("\n" + kept.page())
    print(said)
    if kept.folder is not None:
        print(f"written to {kept.folder}; to go on: --continue {kept.folder}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=_seconds, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET}")
    parser.add_argument("--continue", type=Path, dest="earlier", metavar="DIR", help="go on with an earlier call's DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: --continue, else build/)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="peers' wheels, used without their dependencies")
    parser.add_argument(
        "--steps", nargs="+", choices=list(schedule.STEPS), default=list(schedule.STEPS), help="only these"
    )
    parser.add_argument("--no-build", action="store_true", help="take the extension that is there")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, a third of the rounds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on tiny tensors")
    parser.add_argument(
        "--worker", nargs="+", choices=[*schedule.STEPS, *schedule.PARTS], help=argparse.SUPPRESS
    )  # fmt: skip
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _record(options: argparse.Namespace, device: torch.device) -> Record:
    """A new record, or the one to be continued."""
    notes = [f"steps {' '.join(options.steps)}"] if len(options.steps) < len(schedule.STEPS) else []
    now, gpu, sources = datetime.datetime.now(), machine.name_of(device), machine.sources()
    if options.earlier is None:
        name = f"{'-'.join(gpu.lower().replace('/', ' ').split())}-{now:%Y-%m-%d-%H%M%S}"
        out = options.out or ROOT / "build" / "gpu_check" / name
        if (out / record.NAME).exists():
            raise record.Unusable(f"--out {out}: holds an earlier call's record; to go on with it: --continue {out}")
        kept = Record(out, gpu, sources, {})
    else:
        kept = record.read(options.earlier)
        if kept.gpu != gpu:
            raise record.Unusable(f"--continue {options.earlier}: measured on {kept.gpu}, this is {gpu}; start anew")
        if kept.sources != sources:
            notes.append(f"the sources changed from {kept.sources} to {sources}: earlier steps checked other code")
        kept.folder, kept.sources = options.out or options.earlier, sources
        for outcome in kept.outcomes.values():
            if outcome.state == RUNNING:  # that call did not come to its end
                outcome.state = FAILED
                outcome.lines.append("the machine or the process went away in the middle of it")
    kept.machine = machine.facts(device)
    kept.calls.append({"begun": f"{now:%Y-%m-%d %H:%M:%S}", "budget": options.budget, "notes": notes})
    kept.save()
    return kept


def run(kept: Record, names: list[str], bench: Bench, budget: float) -> None:
    """Run what is left of the steps, in order, within the budget; every outcome is printed and kept at once.

    The budget counts from the start of this process: importing torch takes seconds.
    """
    begun = time.monotonic() - machine.age()
    patience = _PATIENCE if bench.rehearsal else 1
    process: worker.Process | None = None
    queue = schedule.order(kept, names)
    builds = "build" in queue and not bench.rehearsal
    try:
        while queue:
            name, step = queue[0], schedule.STEPS[queue[0]]
            left = budget - _SPARE - (time.monotonic() - begun)
            if left < (0 if bench.rehearsal else step.least):
                print(f"- {name}: left for another call, {left:.0f} s of the budget remain", flush=True)
                if process is not None:  # it would begin with this step
                    process.end()
                process, queue = None, queue[1:]
                continue
            if process is None:
                process = worker.Process(_together(queue, bench), bench)
            kept.note(name, Outcome(RUNNING))
            outcome, goes_on = process.step(min(patience * step.most, left), kept.add)
            kept.note(name, outcome)
            print("\n".join(record.said_of(name, outcome)), flush=True)
            queue = queue[1:]
            if not goes_on or not queue or len(_together([name, queue[0]], bench)) == 1:
                process.end()
                process = None
    finally:
        if process is not None:
            process.end()
    kept.machine = (machine.facts_anew if builds else machine.facts)(bench.device)


def _together(queue: list[str], bench: Bench) -> list[str]:
    """The steps that one process runs, from the first of the queue on."""
    if bench.rehearsal:  # nothing is built
        return queue
    if schedule.STEPS[queue[0]].own_process:
        return queue[:1]
    alone = next((i for i, name in enumerate(queue) if schedule.STEPS[name].own_process), len(queue))
    return queue[:alone]


if __name__ == "__main__":
    sys.exit(main())
