"""The steps in order of worth, how long each may take, and which of them a call runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .record import MISSING, OK, Record
from .step import Bench
from .steps import correctness, figures, peers, profiles, tuning


@dataclass(frozen=True)
class Step:
    """A step of the check.

    run: what it does.
    most: seconds that it may take.
    least: seconds below which it is not worth beginning.
    own_process: whether it needs a process to itself: one that builds what the others import.
    """

    run: Callable[[Bench], list[str]]
    most: int
    least: int
    own_process: bool = False


# In order of worth; the first part fits 240 seconds from a bare checkout on a machine with 16 cores, the rest 300.
STEPS: dict[str, Step] = {
    # Is it right?
    "build": Step(correctness.build, 130, 20, own_process=True),
    "runnable": Step(correctness.runnable, 30, 5),
    "values": Step(correctness.values, 60, 10),
    "core": Step(correctness.core, 120, 30, own_process=True),
    "sanitizer": Step(correctness.sanitizer, 90, 30),
    "waits": Step(correctness.waits, 20, 5),
    "graph": Step(correctness.graph, 30, 5),
    "products": Step(correctness.products, 30, 5),
    # How fast?
    "stats": Step(figures.stats, 40, 10),
    "backward": Step(figures.backward, 20, 5),
    "loss": Step(figures.loss, 20, 5),
    "linear": Step(figures.linear, 60, 15),
    "launch": Step(figures.launch, 20, 5),
    "linear_rows": Step(figures.linear_rows, 60, 15),
    # ... beside what people would use instead?
    "wheels": Step(peers.wheels, 20, 5),
    "peers": Step(peers.peers, 60, 15),
    "linear_peers": Step(peers.linear_peers, 60, 15),
    # Where does the time go, and could a constant be better?
    "profiles": Step(profiles.profiles, 60, 20),
    "backend_choice": Step(tuning.backend_choice, 40, 10),
    "splits": Step(tuning.splits, 40, 10),
    "triton_threads": Step(tuning.triton_threads, 40, 10),
    "chunk_bytes": Step(tuning.chunk_bytes, 40, 10),
    "cuda_threads": Step(tuning.cuda_threads, 150, 60),
    "tests": Step(correctness.tests, 600, 60, own_process=True),
}
# What steps run in processes of their own.
PARTS: dict[str, Callable[[Bench], list[str]]] = {
    "exercise": correctness.exercise,
    "profiled": profiles.profiled,
    "step_times": tuning.step_times,
}
_EACH_CALL = ("build", "runnable")  # cheap where there is nothing to do, and wanted on every machine


def order(record: Record, wanted: Iterable[str]) -> list[str]:
    """The steps that are left, in the order of a call: what was tried and did not end well comes last.

    A step during which the machine went away must not keep the others from being run by the next call.
    """
    left = [name for name in STEPS if name in set(wanted)]
    done = {name for name, outcome in record.outcomes.items() if outcome.state in (OK, MISSING)}
    tried = record.outcomes.keys() - done - set(_EACH_CALL)
    left = [name for name in left if name not in done or name in _EACH_CALL]
    return [name for name in left if name not in tried] + [name for name in left if name in tried]
