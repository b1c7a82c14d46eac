"""Measuring: copy bandwidth, peak memory, and the machine a figure belongs to."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What times are read off; `--benchmark-timer=time.process_time` asks for the processor's, on one thread.
clock: Callable[[], float] = time.perf_counter


def median_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """Median wall time of a call after one warm-up, in seconds."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


_HEAD_START = 50_000_000  # clock cycles of a GPU, 25 to 35 ms


def device_seconds(
    call: Callable[[], object], device: torch.device, rounds: int, setup: Callable[[], object] | None = None
) -> list[float]:
    """Time of each round after one warm-up, without `setup`: on a GPU between two events, elsewhere by the wall clock.

    On a GPU all rounds are queued before the first is waited for, and while they are, it is kept busy: what the host
    takes for a launch does not count, also where the work is shorter than that.
    """
    marks = []
    for i in range(rounds + 1):
        if setup is not None:
            setup()
        if device.type == "cuda":
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            marks.append(lambda pair=pair: pair[0].elapsed_time(pair[1]) / 1e3)
        else:
            start = clock()
            call()
            passed = clock() - start
            marks.append(lambda passed=passed: passed)
        if i == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda._sleep(_HEAD_START)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [mark() for mark in marks[1:]]


def copy_bandwidth(like: torch.Tensor, rounds: int = 5) -> float:
    """Bytes per second of `torch.Tensor.copy_` on a tensor of this size, read and write both counted."""
    target = torch.empty_like(like)
    seconds = statistics.median(device_seconds(lambda: target.copy_(like), like.device, rounds))
    return 2 * like.numel() * like.element_size() / seconds


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> int | None:
    """Resident bytes now, from which `_rise` counts; None where the system cannot tell a peak."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    try:
        clear.write_text("5")  # resets the high-water mark
    except OSError:
        return None
    return _status("VmRSS")


def _rise(before: int | None) -> int | None:
    return None if before is None else max(0, _status("VmHWM") - before)


def peak_memory(call: Callable[[], object]) -> int | None:
    """By how many bytes the process' resident memory rises at most during a call; None where it cannot be told."""
    before = _reset_peak()
    call()
    return _rise(before)


def benchmarked(
    benchmark: Any,
    call: Callable[[], object],
    rounds: int,
    setup: Callable[[], object] | None = None,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Time a call with pytest-benchmark, after one that warms up and whose result is checked.

    Of calls longer than half a second 3 rounds will do, of those longer than 1.5 seconds 2. Peak memory is that of the
    last round: a first call also takes what stays for good.
    """
    if setup is not None:
        setup()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    enough = 2 if seconds > 1.5 else 3 if seconds > 0.5 else rounds
    if check is not None:
        check(result)
    del result
    before = None

    def prepare() -> None:
        nonlocal before
        if setup is not None:
            setup()
        before = _reset_peak()

    benchmark.pedantic(call, setup=prepare, rounds=min(rounds, enough))
    benchmark.extra_info["peak_bytes"] = _rise(before)


def device_peak(call: Callable[[], object], device: torch.device) -> int | None:
    """By how many bytes the memory that a call takes on its device rises at most."""
    if device.type != "cuda":
        return peak_memory(call)
    call()  # what stays for good, like workspaces
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def available_memory() -> int:
    """Bytes of memory that can be had without swapping (half of it all where the system does not say)."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def machine() -> dict[str, str]:
    """The machine and software a measurement belongs to."""
    import qkernels

    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    facts = qkernels.info()
    return {
        "processor": f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "instruction set": str(facts["native_extension"].get("instruction_set", "none")),
        "software": ", ".join(
            [f"qkernels {facts['qkernels']}", f"torch {torch.__version__}", f"python {platform.python_version()}"]
            + [f"{name} {v}" for name in ("triton", "trl", "liger-kernel") if (v := _version(name))]
        ),
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
