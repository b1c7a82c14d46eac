"""Host time of a step on a tiny input: what Python, torch and the calls into the kernels cost, in CPU time.

    python -m bench.host_time [INSTALLATION ...] [--rounds N] [--steps N] [--only TEXT]

An installation is a Python interpreter with qkernels installed, or a source tree with the extension built in place; by
default it is the tree of this file. Several are measured in turns, round by round, each round in a process of its own,
so that what else the machine does falls on all of them alike. CPU time and not wall-clock time is reported: it does not
count the time in which the process waits for a core. (Caches that other processes empty still count.) The smallest
round stands for a quiet machine; the median says how far the others were from it.

The input has 4 sequences of 8 rows of 64 entries, in fp32; one thread, backend `cpu`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], Any]

# Steps per reading of the clock: few, so that some readings fall between the interruptions of a busy machine.
_WINDOW = 25

# What the package costs beyond torch, once in each round's process.
IMPORT = "import qkernels, where torch is imported"


class _Identity(torch.autograd.Function):
    """One node that computes nothing."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def steps(qk: Any) -> dict[str, Step]:
    """The calls that are timed, by name, beside the import; those with a gradient run forward and backward."""
    torch.manual_seed(0)
    logits, reference = torch.randn(4, 8, 64, requires_grad=True), torch.randn(4, 8, 64)
    labels, ignored = torch.randint(0, 64, (4, 8)), torch.full((4, 8), -100)
    cached = qk.token_logps(reference, labels)
    hidden, weight = torch.randn(4, 8, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    constant, loss = logits.detach(), torch.zeros(())

    def forward_and_backward(call: Step) -> Step:
        def step() -> None:
            logits.grad = hidden.grad = weight.grad = None
            call().backward()

        return step

    return {
        "floor: one autograd node that computes nothing": forward_and_backward(lambda: _Identity.apply(logits, loss)),
        "token_logps, forward": lambda: qk.token_logps(constant, labels, backend="cpu"),
        "token_logps, sum": forward_and_backward(lambda: qk.token_logps(logits, labels, backend="cpu").sum()),
        "fused_token_dpo, forward": lambda: qk.fused_token_dpo(constant, labels, reference_logps=cached, backend="cpu"),
        "fused_token_dpo, cached reference": forward_and_backward(
            lambda: qk.fused_token_dpo(logits, labels, reference_logps=cached, backend="cpu").loss
        ),
        "the same with every row ignored: the host alone": forward_and_backward(
            lambda: qk.fused_token_dpo(logits, ignored, reference_logps=cached, backend="cpu").loss
        ),
        "fused_token_dpo, reference logits": forward_and_backward(
            lambda: qk.fused_token_dpo(logits, labels, reference_logits=reference, backend="cpu").loss
        ),
        "fused_token_dpo, loss_type=ipo": forward_and_backward(
            lambda: qk.fused_token_dpo(logits, labels, reference_logps=cached, loss_type="ipo", backend="cpu").loss
        ),
        "fused_linear_token_dpo, cached reference": forward_and_backward(
            lambda: qk.fused_linear_token_dpo(hidden, weight, labels, reference_logps=cached, backend="cpu").loss
        ),
    }


def measure(steps_per_round: int, only: str) -> None:
    """One round in this process: a line for each step, microseconds of CPU time and its name."""
    start = time.process_time()
    import qkernels

    if only in IMPORT:
        print(f"{(time.process_time() - start) * 1e6:.3f} {IMPORT}", flush=True)
    torch.set_num_threads(1)
    for name, step in steps(qkernels).items():
        if only not in name:
            continue
        for _ in range(_WINDOW * 2):
            step()
        best = float("inf")
        for _ in range(max(1, steps_per_round // _WINDOW)):
            start = time.process_time()
            for _ in range(_WINDOW):
                step()
            best = min(best, (time.process_time() - start) / _WINDOW)
        print(f"{best * 1e6:.3f} {name}", flush=True)


def round_of(installation: str, steps_per_round: int, only: str) -> dict[str, float]:
    """`measure` in the given interpreter, or in this one with the given source tree before everything else."""
    place = Path(installation)
    python, environment = installation, {**os.environ, "OMP_NUM_THREADS": "1"}
    if place.is_dir():
        python = sys.executable
        environment["PYTHONPATH"] = os.pathsep.join([str(place.resolve()), environment.get("PYTHONPATH", "")])
    else:
        environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).resolve()), "--measure", "--steps", str(steps_per_round), "--only", only]
    # From an empty folder, so that no source tree is imported that was not asked for.
    with tempfile.TemporaryDirectory() as empty:
        printed = subprocess.run(command, env=environment, cwd=empty, check=True, capture_output=True, text=True).stdout
    return {name: float(number) for number, name in (line.split(" ", 1) for line in printed.splitlines())}


def main() -> int:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("installations", nargs="*", default=[str(Path(__file__).parents[1])], metavar="INSTALLATION")
    parser.add_argument("--rounds", type=int, default=5, help="processes per installation (default: 5)")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each kind per round (default: 2000)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the steps whose name holds this text")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.steps, options.only)
        return 0
    found: dict[str, list[dict[str, float]]] = {place: [] for place in options.installations}
    for _ in range(options.rounds):
        for place, rounds in found.items():
            rounds.append(round_of(place, options.steps, options.only))
    for number, place in enumerate(found):
        print(f"[{number}] {place}")
    print(f"CPU time per step, us: smallest and median of {options.rounds} rounds")
    for name in next(iter(found.values()))[0]:
        times = [[one[name] for one in rounds] for rounds in found.values()]
        shown = "   ".join(f"{min(t):7.1f} {statistics.median(t):7.1f}" for t in times)
        print(f"{name:50s} {shown}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
