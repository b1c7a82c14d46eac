"""The few constants that only a GPU can settle. Each keeps its default unless another value is 3 % better.

Nothing is changed: a line says what was measured, and where to change the constant if there is something to gain.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import kernel_report
from ...linear_contenders import qkernels_by
from ...linear_work import PLANS, step
from ..commands import environment
from ..step import IGNORE, RESULT, ROOT, Bench, Missing
from .figures import WholeLoss, linear_work_of

MARGIN = 0.03
T = TypeVar("T")


def settled(name: str, default: T, seconds: Mapping[T, float], where: str) -> str:
    """A line about a constant: which value was fastest, and whether that is worth a change.

    name: what the constant is; `where`: the place of it in the sources.
    seconds: value -> time, the default's among them.
    """
    listed = ", ".join(f"{value}: {1e3 * time:.3f} ms" for value, time in seconds.items())
    best = min(seconds, key=lambda value: seconds[value])
    gain = 1 - seconds[best] / seconds[default]
    if best == default or gain < MARGIN:
        return f"{name}: keep {default} ({listed})"
    return f"{name}: {best} takes {100 * gain:.1f} % less time than {default}: change {where} ({listed})"


def in_turns(bench: Bench, calls: Mapping[T, Callable[[], object]]) -> dict[T, float]:
    """The time of each call, the smaller of two medians: all calls are timed, then all again."""
    best = {key: bench.seconds(call) for key, call in calls.items()}
    return {key: min(time, bench.seconds(calls[key])) for key, time in best.items()}


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Other values for names of a module, for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _with(module: Any, values: dict[str, Any], call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with replaced(module, **values):
            return call()

    return run


def _of_a_step(bench: Bench, backend: str) -> dict[str, Callable[[], object]]:
    """The kernels of a training step, the one with the most to do, and one on short rows, by name."""
    import qkernels
    from qkernels.backends import ops
    from qkernels.core.fields import SOFTMAX

    logits, reference = (bench.logits(bench.rows, bench.vocab, torch.bfloat16, seed) for seed in (0, 2))
    labels = bench.labels(bench.rows, bench.vocab)
    how = (1.0, IGNORE, backend)
    one, label_rows = logits.unsqueeze(0), labels.unsqueeze(0)
    softmax = ops.row_stats.op(one, label_rows, None, SOFTMAX, *how)
    ones = torch.ones(1, 1, bench.rows, device=bench.device)
    stats = functools.partial(qkernels.token_stats, logits, labels, backend=backend)
    short = logits[:, : bench.vocab // 4]
    short_labels = labels % short.shape[1]
    return {
        "log-probs": functools.partial(stats, outputs=("logps",)),
        "log-probs of short rows": functools.partial(qkernels.token_logps, short, short_labels, backend=backend),
        "with KLs": functools.partial(stats, outputs=("logps", "kl_policy_reference"), reference_logits=reference),
        "gradient": functools.partial(ops.row_grad.op, one, label_rows, None, softmax, None, ones, None, *how),
    }


def backend_choice(bench: Bench) -> list[str]:
    """What "auto" takes, and how the backends compare on log-probs, KLs, gradients, a whole loss and a few rows."""
    from qkernels import backends, token_logps

    names = bench.backends()
    picked = backends.resolve("auto", bench.logits(1, 8, torch.bfloat16))
    works: dict[str, dict[str, Callable[[], object]]] = {}
    few, few_labels = bench.logits(16, bench.vocab, torch.bfloat16), bench.labels(16, bench.vocab)
    for name in names:
        for work, call in _of_a_step(bench, name).items():
            works.setdefault(work, {})[name] = call
        whole = WholeLoss(bench, name, 8, bench.rows, bench.vocab)
        whole.leaf = whole.storage.detach().requires_grad_()
        works.setdefault("whole loss", {})[name] = functools.partial(whole.run, inplace=False)
        works.setdefault("16 rows", {})[name] = functools.partial(token_logps, few, few_labels, backend=name)
        bench.free()
    where = "the order of the lines in qkernels/backends/__init__.py"
    lines = []
    for work, calls in works.items():
        times = in_turns(bench, calls)
        lines.append(settled(f"backend, {work}", picked if picked in times else names[0], times, where))
    return lines


# Blocks per SM up to which rows are split, and how small a piece may be, in entries.
_CUDA_SPLITS = {"_BLOCKS_PER_SM": (2, 4, 8), "_SMALLEST_PIECE": (2048, 4096, 8192)}
_TRITON_SPLITS = {"PROGRAMS_PER_SM": (2, 4, 8), "SMALLEST_PIECE": (2048, 4096, 8192)}


def splits(bench: Bench) -> list[str]:
    """When a row is split over blocks: log-probs of few rows, from 1 to 8 per SM."""
    from qkernels import token_logps
    from qkernels.backends import cuda

    lines = []
    counts = (1, 4) if bench.rehearsal else (1, 16, 128, 256, 512, 1024)
    batches = [(bench.logits(n, bench.vocab, torch.bfloat16), bench.labels(n, bench.vocab)) for n in counts]
    for backend in bench.backends():
        if backend == "cuda":
            module, constants, file = cuda, _CUDA_SPLITS, "qkernels/backends/cuda.py"
        elif backend == "triton":
            from qkernels.backends.triton import common

            module, constants, file = common, _TRITON_SPLITS, "qkernels/backends/triton/common.py"
        else:
            continue

        def all_counts(backend: str = backend) -> None:
            for logits, labels in batches:
                token_logps(logits, labels, backend=backend)

        for constant, values in constants.items():
            default = getattr(module, constant)
            calls = {value: _with(module, {constant: value}, all_counts) for value in values}
            name = f"{backend}, {constant.strip('_').lower()}"
            lines.append(settled(name, default, in_turns(bench, calls), f"{constant} in {file}"))
    return lines or ["no backend that splits rows runs here"]


def chunk_bytes(bench: Bench) -> list[str]:
    """How much memory a chunk of the path from hidden states may take."""
    import qkernels

    work = linear_work_of(bench, bench.rows)
    sizes = (1 << 16, 1 << 18) if bench.rehearsal else tuple(2**k for k in range(27, 33))
    lines = []
    for plan in ("pair_chunks", "frozen_head"):
        trains_head = PLANS[plan][0]
        planned = qkernels.plan_linear(
            work.hidden.detach().requires_grad_(), work.weight.detach().requires_grad_(trains_head), work.labels,
            reference_logps=0.0, plan=plan,
        )  # fmt: skip
        calls: dict[str, Callable[[], object]] = {}
        by_default = f"default ({planned.chunks} chunks)"
        for name, size in [(by_default, None), *((f"{size >> 10} KiB", size) for size in sizes)]:
            call = step(qkernels_by(plan, size), work, work.labels, trains_head)
            try:
                call()
            except (ValueError, torch.OutOfMemoryError) as error:  # a chunk must hold a pair; the device may be small
                lines.append(f"{plan}, {name}: {str(error).splitlines()[0]}")
                bench.free()
            else:
                calls[name] = call
        where = "_DEFAULT_BYTES_ELSEWHERE in qkernels/head/plan.py"
        lines.append(settled(f"chunk of {plan}", by_default, in_turns(bench, calls), where))
    return lines


def triton_threads(bench: Bench) -> list[str]:
    """Threads per row of the Triton kernels: warps of a program."""
    if "triton" not in bench.backends():
        raise Missing("triton does not run here")
    from qkernels.backends.triton import common

    lines = []
    works = _of_a_step(bench, "triton")
    for work, call in works.items():
        calls = {}
        for warps in (2, common.WARPS, 8):
            values = {"LANES": warps * common.WARP_SIZE, "OPTIONS": {**common.OPTIONS, "num_warps": warps}}
            calls[warps * common.WARP_SIZE] = _with(common, values, call)
        where = "WARPS in qkernels/backends/triton/common.py"
        lines.append(settled(f"triton, threads per row, {work}", common.LANES, in_turns(bench, calls), where))
    return lines


CUDA_THREADS = (128, 256, 512)


def cuda_threads(bench: Bench) -> list[str]:
    """Threads per row of the CUDA kernels, a constant of the compiled code: built once for each value, and timed."""
    if bench.rehearsal or "cuda" not in bench.backends():
        raise Missing("needs the CUDA kernels on a GPU")
    major, minor = torch.cuda.get_device_capability(bench.device)
    default = kernel_report.CUDA_THREADS

    def built(threads: int) -> Path:
        folder = ROOT / "build" / "gpu_check" / f"threads-{threads}"
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "tmp")]
        command += ["--build-lib", str(folder / "lib")]
        how = {"QKERNELS_CUDA": "1", "QKERNELS_CUDA_ARCHS": f"{major}{minor}"}
        flags = f"-DQK_CUDA_THREADS={threads} {os.environ.get('NVCC_APPEND_FLAGS', '')}"
        done = subprocess.run(
            command, cwd=ROOT, env=environment(NVCC_APPEND_FLAGS=flags, **how), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{threads} threads do not build: {(done.stderr or done.stdout)[-500:]}")
        return folder / "lib"

    with ThreadPoolExecutor(len(CUDA_THREADS)) as pool:
        packages = dict(zip(CUDA_THREADS, pool.map(built, CUDA_THREADS), strict=True))
    found: dict[int, dict[str, float]] = {}
    for threads, package in packages.items():
        told = timed_package(package, bench, threads)
        found[threads] = told
        print(f"{threads} threads: {told}", flush=True)
    where = "kThreads in csrc/cuda/vector_io.h"
    return [
        settled(f"cuda, threads per row, {work}", default, {n: times[work] for n, times in found.items()}, where)
        for work in found[default]
    ]


def timed_package(package: Path, bench: Bench, threads: int) -> dict[str, float]:
    """Seconds of each kernel with the package in a folder, in a process that imports it from there."""
    command = [sys.executable, "-m", "bench.gpu_check", "--device", bench.device.type, "--worker", "step_times"]
    command += ["--quick"] if bench.quick else []
    path = os.pathsep.join([str(package), str(ROOT)])
    # In the package's folder, which `python -m` searches first.
    done = subprocess.run(
        command, cwd=package, env=environment(PYTHONPATH=path), capture_output=True, text=True, check=False
    )
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not results:
        raise RuntimeError(f"{threads} threads: {(done.stderr or done.stdout)[-500:]}")
    return dict(json.loads(line) for line in json.loads(results[-1]))


def step_times(bench: Bench) -> list[str]:
    """Each kernel of the CUDA backend timed, in this process; lines of JSON, name and seconds."""
    backend = "cuda" if "cuda" in bench.backends() else "cpu"
    return [json.dumps([name, time]) for name, time in in_turns(bench, _of_a_step(bench, backend)).items()]
