"""Processes for tests, forked so that they need not import torch again, which takes seconds.

`Ranks` stay, are joined by gloo, and run a function of the test's file together. Started once per module: a process
that joins takes half a second, a test on it milliseconds. A rank that hangs fails the test, and the pool is not used
again. `Command` is one run of the command line.

Where torch sees a GPU, autograd has threads for it that a fork does not take along, and a backward in the fork fails:
there ranks are spawned, without a GPU in sight, and commands are not run.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_SECONDS = 60


def _serve(rank: int, ranks: int, store: str, backend: str, connection, inherited) -> None:
    import torch.distributed as dist

    for end in inherited:  # the parent's: with a copy of them here, no rank would learn that the parent is gone
        end.close()
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=_SECONDS),
    )  # fmt: skip
    connection.send((True, None))
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent was killed
            os._exit(1)
        if task is None:
            break
        function, arguments = task
        try:
            torch.manual_seed(17)
            answer = (True, function(*arguments))
        except BaseException:  # whatever it is, the parent has to hear of it
            answer = (False, traceback.format_exc())
        connection.send(answer)
    dist.destroy_process_group()


def as_launched(ranks: int) -> None:
    """On a rank: let accelerate find what a launcher would have told it, and forget what it found before."""
    from accelerate.state import AcceleratorState, GradientState

    rank = torch.distributed.get_rank()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def hidden_gpus() -> Iterator[None]:
    """What is started within it sees none."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


class Ranks:
    """`ranks` processes in one default process group.

    Use it as a context. `run(f, *arguments)` calls f on every rank and returns what each returned.
    """

    def __init__(self, ranks: int, backend: str = "gloo"):
        self._folder = tempfile.TemporaryDirectory()
        method = "spawn" if backend == "nccl" or torch.cuda.is_available() else "fork"
        context = multiprocessing.get_context(method)
        self._connections, self._processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            self._connections.append(here)
            inherited = self._connections if method == "fork" else ()
            process = context.Process(
                target=_serve, args=(rank, ranks, store, backend, there, tuple(inherited)), daemon=True
            )
            with hidden_gpus() if backend == "gloo" else contextlib.nullcontext():
                process.start()
            there.close()
            self._processes.append(process)
        self._collect("start")

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank. A failure on any rank fails the test with its traceback."""
        assert self._processes, "an earlier test left these ranks hanging"
        for connection in self._connections:
            connection.send((function, arguments))
        return self._collect(function.__name__)

    def _collect(self, what: str) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(_SECONDS + 10):
                self.stop()
                raise AssertionError(f"{what}: rank {rank} hangs")
            answers.append(connection.recv())
        for rank, (fine, result) in enumerate(answers):
            assert fine, f"{what} failed on rank {rank}:\n{result}"
        return [result for _, result in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        self._processes = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections if self._processes else []:
            connection.send(None)
        for process in self._processes:
            process.join(_SECONDS)
        self.stop()
        self._folder.cleanup()


def _run_command(arguments: list[str], code: str, cwd: str, errors: int) -> None:
    from qkernels.cli import main

    os.chdir(cwd)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    exec(code, {})
    sys.exit(main(arguments))


class Command:
    """`qkernels ARGUMENTS` in a process of its own, after `code`; `errors` reads its standard error.

    pid: of the process. `wait` returns its exit code, negative if a signal has ended it.
    """

    def __init__(self, arguments: list[str], cwd: Path, code: str = ""):
        if torch.cuda.is_available():
            pytest.skip("a forked process cannot train where the process before it has seen a GPU")
        reading, writing = os.pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=_run_command, args=(arguments, code, str(cwd), writing), daemon=True
        )
        self._process.start()
        os.close(writing)
        self.errors = os.fdopen(reading)
        self.pid = self._process.pid

    def runs(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = 120) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it has not ended in {seconds} seconds"
        return self._process.exitcode

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(_SECONDS)
        self.errors.close()
