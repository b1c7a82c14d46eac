"""Runs cases, and shrinks those that fail to small ones that fail in the same way."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fuzz import calls, wrong_calls
from fuzz.generate import draw
from fuzz.setup import DEFAULTS, Case, Mismatch


@dataclass
class Failure:
    """A case that failed.

    kind: what failed, without numbers: cases that share it count as the same defect while shrinking.
    """

    case: Case
    kind: str
    message: str

    def line(self, backend: str) -> str:
        """The command that runs it again."""
        return f"python -m tests.fuzz --backend {backend} --case '{json.dumps(self.case)}'"


def run(case: Case, backend: str) -> Failure | None:
    """Run one case; None if all is as it should be."""
    try:
        if case["call"] == "wrong_call":
            wrong_calls.run(case, backend)
        else:
            calls.run(case, backend)
    except Mismatch as error:
        return Failure(case, f"{case['call']}: {error.what}", str(error))
    except Exception as error:
        return Failure(case, f"{case['call']}: raised {type(error).__name__}", f"{type(error).__name__}: {error}")
    return None


def _smaller(value: Any, default: Any) -> Iterator[Any]:
    """Simpler values than this one, the simplest first."""
    if isinstance(value, (bool, str)) or value is None:
        return
    if isinstance(value, int):
        for candidate in (default if isinstance(default, int) else 1, 1, value // 2, value - 1):
            if 1 <= candidate < value:
                yield candidate
    elif isinstance(value, float):
        yield 1.0
    elif isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
    elif isinstance(value, list):
        for i in range(len(value)):
            if len(value) > 1:
                yield value[:i] + value[i + 1 :]
            if isinstance(value[i], int):
                for candidate in {1, value[i] // 2, value[i] - 1} - {value[i]}:
                    if candidate >= 0:
                        yield [*value[:i], candidate, *value[i + 1 :]]


def shrink(failure: Failure, backend: str, seconds: float = 20.0) -> Failure:
    """A case as small as can be found in that time that fails in the same way."""
    end = time.monotonic() + seconds
    improved = True
    while improved:
        improved = False
        for key in list(failure.case):
            for candidate in _simpler(failure.case, key):
                if time.monotonic() > end:
                    return failure
                again = run(candidate, backend)
                if again is not None and again.kind == failure.kind:
                    failure, improved = again, True
                    break
    return failure


def _simpler(case: Case, key: str) -> Iterator[Case]:
    """The case without that key, then with smaller values of it."""
    if key == "call" or key not in case:
        return
    if key != "seed":
        yield {k: v for k, v in case.items() if k != key}
    for candidate in _smaller(case[key], DEFAULTS.get(key)):
        if candidate != case[key]:
            yield {**case, key: candidate}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other in busy loops: small cases run several times faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fuzz(
    cases: int,
    seed: int,
    backend: str,
    *,
    start: int = 0,
    stop_after: int = 10,
    seconds: float | None = None,
    only: str | None = None,
    report: Callable[[int, Failure], None] | None = None,
) -> tuple[int, list[Failure]]:
    """Run a number of random cases; how many ran, and the failures, shrunk.

    start: number of the first case. stop_after: failures after which no more cases are run.
    seconds: no case begins after so many. only: name of the one function to call.
    """
    failures: list[Failure] = []
    begin = time.monotonic()
    ran = 0
    with one_thread():
        for number in range(start, start + cases):
            if len(failures) >= stop_after or (seconds is not None and time.monotonic() - begin > seconds):
                break
            case = draw(seed, number, backend)
            if only is not None and case["call"] != only:
                continue
            ran += 1
            failure = run(case, backend)
            if failure is not None:
                failure = shrink(failure, backend)
                failures.append(failure)
                if report is not None:
                    report(number, failure)
    return ran, failures
