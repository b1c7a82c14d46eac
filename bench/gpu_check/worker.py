"""Steps in a process of their own, one after the other: the process starts torch once, and each has a time limit.

The process ends with the first step that fails: an error on a GPU leaves nothing behind that could be trusted. Whoever
asked starts another one for the steps that are left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import report
from . import schedule, wheels
from .commands import environment
from .record import FAILED, MISSING, OK, STOPPED, Outcome
from .step import BEGIN, ENTRY, RESULT, ROOT, Bench, Missing

_KEPT = 20  # lines of output that are kept of a step that failed


def work(names: Sequence[str], bench: Bench) -> int:
    """Run steps in this process; each prints that it begins, its measurements and its result, on lines of their own."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch:
        if bench.wheels is not None:
            try:
                bench.unpacked = wheels.use(bench.wheels, Path(scratch))
            except OSError as error:
                bench.unpacked = [f"{bench.wheels} cannot be unpacked: {error}"]
        for name in names:
            print(BEGIN + name, flush=True)
            step = schedule.PARTS.get(name) or schedule.STEPS[name].run
            try:
                told = {"state": OK, "lines": step(bench)}
            except Missing as error:
                told = {"state": MISSING, "lines": [str(error)]}
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                print("\n" + RESULT + json.dumps({"state": FAILED, "lines": [_message(error)]}), flush=True)
                return 1
            print("\n" + RESULT + json.dumps(told), flush=True)
            bench.copies.clear()
            gc.collect()
            bench.free()
    return 0


def end_with(parent: int, every: float = 1.0) -> None:
    """End this process and what it started once its parent is gone: nobody reads any more what it prints."""
    while os.getppid() == parent:
        time.sleep(every)
    os.killpg(0, signal.SIGKILL)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)


def command(names: Sequence[str], bench: Bench) -> list[str]:
    """The process that runs these steps."""
    found = [sys.executable, "-m", "bench.gpu_check", "--device", bench.device.type]
    found += ["--quick"] if bench.quick else []
    found += ["--wheels", str(bench.wheels)] if bench.wheels else []
    return [*found, "--worker", *names]


class Process:
    """A process that runs steps, and what it prints."""

    def __init__(self, names: Sequence[str], bench: Bench):
        self.process = subprocess.Popen(
            command(names, bench), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def end(self) -> None:
        """Stop it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def step(self, limit: float, measured: Callable[[report.Entry], None]) -> tuple[Outcome, bool]:
        """Wait for the next step's result; and whether the process goes on.

        limit: seconds; the process is ended where the step takes longer.
        measured: is told each figure as it comes.
        """
        begun = time.monotonic()
        printed: list[str] = []
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, begun + limit - time.monotonic()))
            except queue.Empty:
                self.end()
                return Outcome(STOPPED, time.monotonic() - begun, [*printed, f"stopped after {limit:.0f} s"]), False
            if line is None:
                status = self.process.wait()
                return Outcome(FAILED, time.monotonic() - begun, [*printed, _how_it_ended(status)]), False
            if line.startswith(ENTRY):
                measured(report.Entry(**json.loads(line.removeprefix(ENTRY))))
            elif line.startswith(RESULT):
                told = json.loads(line.removeprefix(RESULT))
                lines = [*printed, *told["lines"]] if told["state"] == FAILED else told["lines"]
                return Outcome(told["state"], time.monotonic() - begun, lines), told["state"] != FAILED
            elif line and not line.startswith(BEGIN):
                printed = [*printed, line][-_KEPT:]


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"its process was ended by signal {-status} ({signal.Signals(-status).name})"
    return f"its process ended with {status} before the step did"
