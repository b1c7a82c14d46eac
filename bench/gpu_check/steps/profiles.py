"""Where the time goes inside a kernel: hardware counters by Nsight Compute, where they can be read."""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable, Iterator

import torch

from ..commands import run, tool
from ..step import IGNORE, Bench, Missing

# Counter of ncu -> what it is called here.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of its peak",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots, % used",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of the most",
    "launch__registers_per_thread": "registers",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors per load",
}
KERNELS = "regex:row_stats|row_grad|pair_loss|combine"


def _calls(bench: Bench) -> Iterator[tuple[str, Callable[[], object]]]:
    """The kernels of a training step, and the ones with the most to do; a few rows per SM are enough for a profile."""
    import qkernels
    from qkernels.backends import ops
    from qkernels.core.fields import REFERENCE_SOFTMAX, SOFTMAX

    rows = bench.rows if bench.rehearsal else 1056
    logits, reference = (bench.logits(rows, bench.vocab, torch.bfloat16, seed) for seed in (0, 2))
    labels = bench.labels(rows, bench.vocab)
    one, two = logits.unsqueeze(0), reference.unsqueeze(0)
    for backend in bench.backends():
        stats = functools.partial(qkernels.token_stats, logits, labels, backend=backend)
        yield f"log-probs, {backend}", functools.partial(stats, outputs=("logps",))
        kls = ("logps", "entropy", "kl_policy_reference")
        yield f"with KLs, {backend}", functools.partial(stats, outputs=kls, reference_logits=reference)
        few = functools.partial(qkernels.token_stats, logits[:16], labels[:16], backend=backend, outputs=("logps",))
        yield f"log-probs of 16 rows, {backend}", few
        how = (1.0, IGNORE, backend)
        softmax = ops.row_stats.op(one, labels.unsqueeze(0), two, SOFTMAX | REFERENCE_SOFTMAX, *how)
        k = torch.ones(1, 1, rows, device=bench.device)
        plain = (one, labels.unsqueeze(0), None, softmax[:3], None, k, None, *how)
        yield f"gradient of log-probs, {backend}", functools.partial(ops.row_grad.op, *plain)
        five = torch.ones(5, 1, rows, device=bench.device)
        pair = (one, labels.unsqueeze(0), two, softmax[:3], softmax[3:], five, None, *how)
        yield f"gradient with KLs, {backend}", functools.partial(ops.row_grad.op, *pair)


def profiled(bench: Bench) -> list[str]:
    """Each kernel once: the program that ncu runs."""
    names = []
    for name, call in _calls(bench):
        call()
        names.append(name)
    bench.synchronize()
    return [f"ran {', '.join(names)}"]


def rows_of(output: str) -> list[dict[str, str]]:
    """The table in what `ncu --csv --page raw` prints: a row per kernel, the one with units left out."""
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    return [row for row in csv.DictReader(lines[begin:]) if row.get("Kernel Name")]


def described(row: dict[str, str]) -> str:
    """A line about a profiled kernel."""
    counters = ", ".join(f"{told} {row[name]}" for name, told in METRICS.items() if row.get(name))
    name = row["Kernel Name"].split("(")[0]
    return f"{name[:60]}, grid {row.get('Grid Size', '?')}: {counters}"


def profiles(bench: Bench) -> list[str]:
    """ncu over `profiled`: time, bandwidth, issue slots and occupancy of each kernel."""
    program = tool("ncu")
    inner = [sys.executable, "-m", "bench.gpu_check", "--device", bench.device.type, "--worker", "profiled"]
    # --clock-control none: the card is measured as it is found.
    how = ["--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", KERNELS]
    how += ["--metrics", ",".join(METRICS)]
    try:
        output = run(program, *how, *inner, keep=1000, quiet=True)
    except RuntimeError as error:
        raise Missing(f"ncu cannot be used on this machine: {str(error)[-300:]}") from None
    table = rows_of("\n".join(output))
    if not table:
        said = [line for line in output if line.startswith("==")]
        raise Missing(f"ncu read no counters: {said[-1] if said else output[-1] if output else 'it printed nothing'}")
    return [described(row) for row in table]
