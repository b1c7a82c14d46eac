"""A scoring run on many processes: who takes which window, who is still there, and what to say when one is not.

The processes (ranks) are those of `torchrun` or any other launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. They share the output folder and a key-value store (the TCP store of `torch.distributed`); no tensor goes
between them. A window of neighbouring pairs is scored by one rank as a single process would score it, in the same
batches, so that results do not depend on the number of ranks. Windows are handed out one after the other to whoever
asks.

Each rank shows every few seconds that it is there. What is written to the store by each:

    checked/R           rank R has tokenised its share of the pairs, and nothing is wrong with them
    settings            of rank 0's run, which the others compare with their own
    done                bitmap of the pairs that earlier runs have scored
    next                the number of windows that have been handed out
    scored              pairs that have been scored by now
    alive/R             a counter
    end/R               tokens that rank R has scored, when it has written them all
    failed              what stopped a rank
    told/R              rank R has read it, or has stopped
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ..text.characters import PrintableError, first_line
from .options import ScoreError

_BEAT_SECONDS = 2.0
_LOST_SECONDS = 60.0  # without a sign of life
_START_SECONDS = 300.0  # for all ranks to appear
_TELL_SECONDS = 5.0  # for others to read why rank 0 stops, before its store goes with it
_POLL_SECONDS = 0.2
_Result = TypeVar("_Result")


class Ranks:
    """The ranks of a run, seen from one of them; a context, which ends the signs of life.

    Attributes:
        rank, size: which one this is, of how many.
        local: this rank's number on its machine: LOCAL_RANK, or SLURM_LOCALID, or the rank itself.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or self.rank)
        # torchrun has a store of its own, to which all ranks connect; otherwise rank 0 opens one.
        self._is_host = self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(
                host, port, is_master=self._is_host, wait_for_workers=False,
                timeout=timedelta(seconds=_START_SECONDS),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise ScoreError(f"rank {self.rank}: no store at {host}:{port} ({first_line(error)})") from error
        self._store = dist.PrefixStore(f"qkernels/score/{attempt}", store)
        self._beats = dist.PrefixStore(f"qkernels/score/{attempt}", store.clone())  # type: ignore[attr-defined]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._seen: dict[int, tuple[bytes, float]] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which opens the folder, speaks, and puts the parts together."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        self._ask(lambda: self._store.set(f"host/{self.rank}", f"process {os.getpid()} on {os.uname().nodename}"))
        self._thread.start()
        if self.is_first:
            for rank in range(self.size):
                self._wait(f"host/{rank}", range(0), seconds=_START_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(_BEAT_SECONDS if count else 0):
            count += 1
            try:
                self._beats.set(f"alive/{self.rank}", str(count))
            except RuntimeError:  # the store is gone; who needs it will say so
                return

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        try:
            return question()
        except (RuntimeError, ValueError) as error:  # torch's errors of the network
            raise ScoreError(
                f"rank 0, or the launcher, is lost: its store does not answer rank {self.rank} ({first_line(error)})"
            ) from error

    # --- beginning --------------------------------------------------------------------------------------------------

    def checked(self) -> None:
        """Say that this rank's share of the pairs can be scored; rank 0 waits for all."""
        self._ask(lambda: self._store.set(f"checked/{self.rank}", "1"))
        if self.is_first:
            for rank in range(self.size):
                self._wait(f"checked/{rank}", range(1, self.size))

    def publish(self, settings: dict[str, Any], done: bytes) -> None:
        """Rank 0: say that the folder is open."""
        self._ask(lambda: self._store.set("done", done))  # type: ignore[arg-type]
        self._ask(lambda: self._store.set("settings", json.dumps(settings, sort_keys=True)))

    def await_folder(self, settings: dict[str, Any]) -> bytes:
        """The others: wait for rank 0, and compare settings; the bitmap of the pairs that are scored.

        Raises:
            ScoreError: rank 0 has stopped, or sees other models or data.
        """
        self._wait("settings", range(1))
        theirs, ours = json.loads(self._ask(lambda: self._store.get("settings"))), json.loads(json.dumps(settings))
        other = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        if other:
            raise ScoreError(
                f"rank {self.rank} and rank 0 differ in {', '.join(other)}: all ranks need the same files and options"
            )
        return bytes(self._ask(lambda: self._store.get("done")))

    # --- sharing ----------------------------------------------------------------------------------------------------

    def tickets(self) -> Iterator[int]:
        """Numbers of windows for this rank, ascending; each number goes to one rank. Ends when a rank has failed."""
        while True:
            self.raise_if_one_failed()
            yield self._ask(lambda: self._store.add("next", 1)) - 1

    def scored(self, pairs: int) -> int:
        """Count pairs that this rank has scored; how many all have."""
        return self._ask(lambda: self._store.add("scored", pairs))

    # --- ending -----------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank stops; they stop too."""
        text = str(error) if isinstance(error, PrintableError) else f"{type(error).__name__}: {first_line(error)}"
        try:
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps([self.rank, text]))
            self._store.set(f"told/{self.rank}", "1")
            end = time.monotonic() + _TELL_SECONDS
            while self._is_host and time.monotonic() < end and not all(map(self._knows, range(1, self.size))):
                time.sleep(_POLL_SECONDS)
        except RuntimeError:
            pass

    def _knows(self, rank: int) -> bool:
        """Whether a rank needs the store no more."""
        return self._store.check([f"told/{rank}"]) or self._store.check([f"end/{rank}"])

    def raise_if_one_failed(self) -> None:
        """ScoreError with what stopped another rank."""
        if self._ask(lambda: self._store.check(["failed"])):
            rank, text = json.loads(self._ask(lambda: self._store.get("failed")))
            self._ask(lambda: self._store.set(f"told/{self.rank}", "1"))
            if rank != self.rank:
                raise ScoreError(f"rank {rank} stopped: {text}")

    def end(self, tokens: int) -> None:
        """Say that all that this rank has scored is in its folder."""
        self._ask(lambda: self._store.set(f"end/{self.rank}", str(tokens)))

    def await_all(self, say: Callable[[], None]) -> int:
        """Rank 0: wait until all have ended; the tokens that they have scored.

        Args:
            say: called while it waits.

        Raises:
            ScoreError: a rank has stopped, or shows no sign of life.
        """
        for rank in range(self.size):
            self._wait(f"end/{rank}", range(1, self.size), say)
        return sum(int(self._ask(functools.partial(self._store.get, f"end/{rank}"))) for rank in range(self.size))

    def _wait(
        self, key: str, watched: range, say: Callable[[], None] | None = None, seconds: float = float("inf")
    ) -> None:
        """Wait for a key as long as the ranks that should be at work are there."""
        began = time.monotonic()
        while not self._ask(lambda: self._store.check([key])):
            self.raise_if_one_failed()
            if time.monotonic() - began > seconds:
                raise ScoreError(
                    f"rank {key.rpartition('/')[2]} of {self.size} has not appeared for {seconds:.0f} seconds"
                )
            for rank in watched:
                self._check_alive(rank)
            if say is not None:
                say()
            time.sleep(_POLL_SECONDS)

    def _check_alive(self, rank: int) -> None:
        now = time.monotonic()
        if rank == self.rank or self._ask(lambda: self._store.check([f"end/{rank}"])):
            return
        known = self._ask(lambda: self._store.check([f"alive/{rank}"]))
        beat = bytes(self._ask(lambda: self._store.get(f"alive/{rank}"))) if known else b""
        if rank not in self._seen or self._seen[rank][0] != beat:
            self._seen[rank] = (beat, now)
            return
        silence = now - self._seen[rank][1]
        if silence > _LOST_SECONDS:
            who = self._ask(lambda: self._store.get(f"host/{rank}")).decode()
            raise ScoreError(f"rank {rank} ({who}) is lost: no sign of life for {silence:.0f} seconds")


def launched() -> bool:
    """Whether a launcher has started more than one process of this command."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1"


def bitmap(numbers: Any) -> bytes:
    """Which numbers are in a set, a bit each."""
    bits = bytearray(max(numbers, default=-1) // 8 + 1)
    for number in numbers:
        bits[number // 8] |= 1 << number % 8
    return bytes(bits) or b"\0"


def in_bitmap(bits: bytes, number: int) -> bool:
    """Whether a number is in the set."""
    return number // 8 < len(bits) and bool(bits[number // 8] >> number % 8 & 1)
