"""Everything that needs a GPU, in one go: build, tests, memory checks, values, and measurements beside a copy.

    python -m bench.gpu_check                       all steps; results go to bench/results/<gpu>-<date>.{md,json}
    python -m bench.gpu_check --steps values stats  only these
    python -m bench.gpu_check --device cpu          a rehearsal: the same code on tiny tensors, nothing is kept

Each step runs in a process of its own under a time limit. One that fails is reported, the others run all the same, and
the exit status is 1. To add a step, write a function `(Bench) -> list[str]` and enter it in `STEPS`: what it measures
goes to `bench.add`, the lines it returns are printed under its name.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import measure, report

ROOT = Path(__file__).resolve().parents[1]
IGNORE = -100
# What the lines begin with by which a step tells its measurements and its result.
ENTRY, RESULT = "gpu_check entry: ", "gpu_check result: "


@dataclass
class Bench:
    """One step's view of the run: where, how large, and what was measured so far."""

    device: torch.device
    quick: bool
    entries: list[report.Entry] = field(default_factory=list)
    copies: dict[tuple[torch.dtype, int], float] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    @property
    def rounds(self) -> int:
        return 3 if self.rehearsal else 10 if self.quick else 30

    @property
    def rows(self) -> int:
        return 8 if self.rehearsal else 2048 if self.quick else 8192

    @property
    def vocab(self) -> int:
        return 515 if self.rehearsal else 128256

    def backends(self) -> list[str]:
        """The backends with kernels that run here."""
        from qkernels import backends

        return [n for n in ("cuda", "triton", "cpu") if backends.unavailable(n, self.device, torch.float32) is None]

    def logits(self, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        out = torch.empty(rows, vocab, dtype=dtype, device=self.device)
        for part in out.split(1024):  # the fp32 originals are not kept
            part.copy_(3 * torch.randn(part.shape, generator=generator, device=self.device))
        return out

    def labels(self, rows: int, vocab: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randint(0, vocab, (rows,), generator=generator, device=self.device)

    def add(
        self,
        work: str,
        contender: str,
        logits: Tensor,
        passes: float,
        call: Callable[[], object],
        setup: Callable[[], object] | None = None,
        peak: int | None = None,
    ) -> float:
        """Time a call that reads or writes `passes` times the bytes of `logits`, beside a copy of as many; seconds."""
        size = logits.numel() * logits.element_size()
        key = (logits.dtype, size)
        if key not in self.copies:
            self.copies[key] = measure.copy_bandwidth(logits, self.rounds)
        facts = {
            "dtype": str(logits.dtype).removeprefix("torch."),
            "shape": f"{logits.numel() // logits.shape[-1]} rows x {logits.shape[-1]}",
            "amount": passes * size / 1e9,
            "unit": "GB",
            "floor": "copy of the same bytes",
            "floor_seconds": passes * size / self.copies[key],
            "logits_bytes": size,
        }
        return self.record(work, contender, facts, peak, measure.device_seconds(call, self.device, self.rounds, setup))

    def record(self, work: str, contender: str, facts: dict[str, Any], peak: int | None, seconds: list[float]) -> float:
        """Note the times of all rounds; their median. `facts`: the rest of a `report.Entry`.

        Printed at once, so that what was measured counts even if the step does not come to its end.
        """
        median = statistics.median(seconds)
        described = {key: value for key, value in facts.items() if key != "floor_seconds"}
        entry = report.Entry(
            work=work,
            contender=contender,
            milliseconds=median * 1e3,
            fastest=min(seconds) * 1e3,
            slowest=max(seconds) * 1e3,
            floor_ratio=median / facts["floor_seconds"],
            peak_bytes=peak,
            **described,
        )
        self.entries.append(entry)
        print(ENTRY + json.dumps(asdict(entry)), flush=True)
        return median


# --- steps ------------------------------------------------------------------------------------------------------------


def _run(*command: str, keep: int = 2, allowed: tuple[int, ...] = (0,), **environment: str) -> list[str]:
    """Run a command; its output is passed on, so that a step that is stopped shows how far it came. Its last lines."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    last = [line for line in lines if line][-keep:]
    if process.wait() not in allowed:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: " + " | ".join(last))
    return last


def build(bench: Bench) -> list[str]:
    """Build the extension in place, for this GPU alone."""
    if bench.rehearsal:
        return _run(sys.executable, "setup.py", "--version")
    major, minor = torch.cuda.get_device_capability(bench.device)
    how = {"QKERNELS_CUDA": "1", "QKERNELS_CUDA_ARCHS": f"{major}{minor}"}
    return _run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", **how)


def tests(bench: Bench) -> list[str]:
    """The whole test suite, files side by side; every test that takes a backend runs on the GPU's as well."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: -path.stat().st_size)
    files = [path for path in files if path.name == "test_import.py"] if bench.rehearsal else files
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    failed: list[str] = []
    counts: Counter[str] = Counter()

    def one(path: Path) -> None:
        try:
            last = _run(*pytest, str(path), keep=5, allowed=(0, 5))  # 5: not a test could be collected here
        except RuntimeError as error:
            failed.append(str(error))
        else:
            counts.update({what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", last[-1])})

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        list(pool.map(one, files))
    lines = [f"{len(files)} files: " + ", ".join(f"{number} {what}" for what, number in counts.items())]
    if failed:
        raise RuntimeError("; ".join([*lines, *failed]))
    return lines


def exercise(bench: Bench) -> list[str]:
    """Each kernel once on small tensors of awkward shapes; what the memory checks run."""
    from qkernels import backends
    from qkernels.backends import ops
    from qkernels.core.columns import COLUMNS, REFERENCE_STATE, STATE

    for name in bench.backends():
        for vocab, dtype, shift in ((1, torch.float32, 1), (2053, torch.bfloat16, 3), (20011, torch.float16, 5)):
            logits = bench.logits(1, 3 * vocab + shift, dtype)[:, shift:].view(1, 3, vocab)
            other = bench.logits(1, 3 * vocab, torch.float32, 1).view(1, 3, vocab)
            labels = torch.tensor([[0, IGNORE, vocab - 1]], device=bench.device)
            for reference in (logits.clone(), other):
                how = (1.0, IGNORE, name)
                stats = ops.row_stats.op(logits, labels, reference, (1 << len(COLUMNS)) - 1, *how)
                state = ops.row_stats.op(logits, labels, reference, STATE | REFERENCE_STATE, *how)
                for k in (1, 5):
                    coefficients = torch.ones(k, 1, 3, device=bench.device)
                    upstream = torch.ones((), device=bench.device)
                    given = (reference, stats[:3], state[3:], coefficients)
                    ops.row_grad.op(logits, labels, *given, upstream, *how)
                    ops.row_grad_.op(logits.clone(), labels, *given, None, *how)
                    if reference is not other:  # enough for Triton to compile
                        continue
                    # As the path from hidden states wants it: fp32 logits, narrow gradients that lie elsewhere.
                    narrow = torch.float16 if dtype == torch.float16 else torch.bfloat16
                    for gap in (0, 3):
                        out = torch.empty(1, 3, vocab + gap, dtype=narrow, device=bench.device)[..., :vocab]
                        backends.get(name).row_grad_into(out, logits.float(), labels, *given, None, 1.0, IGNORE)
        logps = -torch.rand(6, 50, device=bench.device)
        ends = torch.tensor([0, 7, 7, 90, 200, 201, 300], dtype=torch.int32, device=bench.device)
        for rows, offsets in ((logps, None), (logps.view(1, -1), ends)):
            labels = torch.arange(300, device=bench.device).view(rows.shape)
            for reference in (None, rows - 0.1, torch.zeros(6, device=bench.device)):  # none, per token, per sequence
                for weights in (None, torch.ones_like(rows)):
                    ops.pair_loss.op(rows, reference, labels, weights, offsets, 0.1, 0.1, 5, name)
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return [f"ran {', '.join(bench.backends())}"]


def sanitizer(bench: Bench) -> list[str]:
    """compute-sanitizer over `exercise`: memory out of bounds, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    inner = [sys.executable, "-m", "bench.gpu_check", "--device", bench.device.type, "--child", "exercise"]
    if bench.rehearsal:
        _run(*inner)
        return ["ran without compute-sanitizer"]
    if tool is None:
        return ["not installed: compute-sanitizer"]
    found = []
    for kind in ("memcheck", "racecheck"):
        last = _run(tool, "--tool", kind, "--error-exitcode", "9", *inner, keep=1, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found += [f"{kind}: {line}" for line in last]
    return found


def values(bench: Bench) -> list[str]:
    """Log-probs, entropy, KL and gradients against float64, at the size that is measured and at awkward ones."""
    from qkernels import token_stats

    lines = []
    names = ("logps", "entropy", "kl_policy_reference", "reference_logps")
    shapes = [(5, 515), (3, 1)] if bench.rehearsal else [(64, 128256), (33, 128257), (600, 32003), (1, 128257), (7, 1)]
    for backend in bench.backends():
        worst, worst_gradient = 0.0, 0.0
        for rows, vocab in shapes:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                z = bench.logits(rows, vocab, dtype).requires_grad_()
                exact = z.detach().double().requires_grad_()
                reference = bench.logits(rows, vocab, dtype, 2)
                labels = bench.labels(rows, vocab)
                got = token_stats(z, labels, reference_logits=reference, outputs=names, backend=backend)
                want = token_stats(exact, labels, reference_logits=reference.double(), outputs=names, backend="torch")
                for name in names:
                    a, b = getattr(got, name).double(), getattr(want, name)
                    worst = max(worst, ((a - b).abs() / b.abs().clamp_min(1)).max().item())
                (got.logps.sum() + got.entropy.sum()).backward()
                (want.logps.sum() + want.entropy.sum()).backward()
                assert z.grad is not None and exact.grad is not None
                error = (z.grad.double() - exact.grad).abs().amax(-1) / exact.grad.abs().amax(-1).clamp_min(1e-30)
                rounding = 1.0 if dtype == torch.float32 else 1e-5 / (torch.finfo(dtype).eps / 2 + 1e-5)
                worst_gradient = max(worst_gradient, error[exact.grad.abs().amax(-1) > 1e-9].max().item() * rounding
                                     if bool((exact.grad.abs().amax(-1) > 1e-9).any()) else 0.0)  # fmt: skip
        lines.append(f"{backend}: log-probs, entropy and KL within {worst:.1e}, gradients within {worst_gradient:.1e}")
        if worst > 1e-5 or worst_gradient > 2e-5:
            raise RuntimeError(lines[-1] + " of float64: too far")
    return lines


def stats(bench: Bench) -> list[str]:
    """Per-token numbers, no gradient: one read of the logits."""
    import qkernels

    n, v = bench.rows, bench.vocab
    cases = [(n, v, torch.bfloat16), (n, v + 1, torch.bfloat16), (n // 2, v, torch.float32), (16, v, torch.bfloat16)]
    for rows, vocab, dtype in cases:
        logits, reference = bench.logits(rows, vocab, dtype), bench.logits(rows, vocab, dtype, 2)
        labels = bench.labels(rows, vocab)
        for backend in bench.backends():
            for work, outputs, passes in (
                ("log-probs", ("logps",), 1),
                ("log-probs and entropy", ("logps", "entropy"), 1),
                ("log-probs of both models", ("logps", "reference_logps"), 2),
                ("both models with KLs", ("logps", "kl_reference_policy", "kl_policy_reference"), 2),
            ):
                bench.add(
                    work, f"qkernels, {backend}", logits, passes,
                    functools.partial(
                        qkernels.token_stats, logits, labels, outputs=outputs, backend=backend,
                        reference_logits=reference if passes == 2 else None,
                    ),
                )  # fmt: skip
    return []


def backward(bench: Bench) -> list[str]:
    """The gradient kernel by itself, in place: one read, one write. Refilled before each round, which is not timed."""
    from qkernels.backends import ops
    from qkernels.core.columns import STATE

    for vocab in (bench.vocab, bench.vocab + 1):
        logits = bench.logits(bench.rows, vocab, torch.bfloat16)
        labels = bench.labels(bench.rows, vocab).unsqueeze(0)
        work = logits.clone().unsqueeze(0)
        coefficients = torch.ones(1, 1, bench.rows, device=bench.device)
        for backend in bench.backends():
            how = (1.0, IGNORE, backend)
            state = ops.row_stats.op(logits.unsqueeze(0), labels, None, STATE, *how)
            bench.add(
                "gradient in place", f"qkernels, {backend}", logits, 2,
                functools.partial(ops.row_grad_.op, work, labels, None, state, None, coefficients, None, *how),
                functools.partial(work.copy_, logits),
            )  # fmt: skip
    return []


class _Loss:
    """The whole default loss with cached reference log-probs, forward and backward, in place."""

    def __init__(self, bench: Bench, backend: str, sequences: int, rows: int, vocab: int):
        self.backend, self.source = backend, bench.logits(rows, vocab, torch.bfloat16).view(sequences, -1, vocab)
        self.labels = bench.labels(rows, vocab).view(sequences, -1)
        self.reference = -5 * torch.rand(self.labels.shape, device=bench.device)
        self.storage = self.source.clone()
        self.leaf = self.storage

    def refill(self) -> None:
        self.storage.copy_(self.source)
        self.leaf = self.storage.detach().requires_grad_()

    def run(self, inplace: bool = True) -> Tensor:
        import qkernels

        out = qkernels.fused_token_dpo(
            self.leaf, self.labels, reference_logps=self.reference, inplace_backward=inplace, backend=self.backend
        )
        out.loss.backward()
        return out.loss.detach()


def loss(bench: Bench) -> list[str]:
    """The default loss, forward and backward, cached reference: three passes are the floor."""
    for backend in bench.backends():
        whole = _Loss(bench, backend, 8, bench.rows, bench.vocab)

        def step(whole: _Loss = whole) -> None:
            whole.refill()
            whole.run()

        bench.add(
            "loss and gradient, cached reference", f"qkernels, {backend}", whole.source, 3, whole.run, whole.refill,
            measure.device_peak(step, bench.device),
        )  # fmt: skip
    return []


def peers(bench: Bench) -> list[str]:
    """The loss from both models' logits by what people would use instead; and log-probs with entropy."""
    from . import contenders

    lines = []
    rows, vocab = bench.rows // (1 if bench.rehearsal else 2), bench.vocab
    policy = bench.logits(rows, vocab, torch.bfloat16).view(8, -1, vocab)
    reference = bench.logits(rows, vocab, torch.bfloat16, 2).view(8, -1, vocab)
    labels = bench.labels(rows, vocab).view(8, -1)
    storage = policy.clone()
    holder: dict[str, Tensor] = {}

    def refill() -> None:
        storage.copy_(policy)
        holder["leaf"] = storage.detach().requires_grad_()

    def attempt(name: str, work: str, passes: float, call: Callable[[], object], setup: Any = None) -> None:
        try:
            bench.add(work, name, policy, passes, call, setup)
        except Exception as error:  # a peer that fails is a line, not the end
            lines.append(f"{name}: {_first_line(error)}")
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()

    for name, (function, package) in contenders.CONTENDERS.items():
        if not contenders.installed(package):
            lines.append(f"{name}: not installed")
        elif not (bench.rehearsal and name == "torch.compile"):  # compiling takes longer than the whole rehearsal
            attempt(
                name, "loss and gradient, reference logits", 4,
                lambda f=function: f(holder["leaf"], reference, labels).backward(), refill,
            )  # fmt: skip
    for name, entropy in contenders.ENTROPY.items():
        try:
            call = entropy()
        except ImportError:
            lines.append(f"{name}: not installed")
            continue
        attempt(name, "log-probs and entropy, beside peers", 1, lambda c=call: c(policy, labels))
    return lines


def products(bench: Bench) -> list[str]:
    """The head's products against float64: fp32 logits of 16-bit inputs, fp32 sums of dW; log-probs from them."""
    from qkernels import linear_token_logps
    from qkernels.head.products import Head, WeightGrad

    lines = []
    shapes = [(5, 24, 515)] if bench.rehearsal else [(64, 4096, 128256), (33, 1000, 128257), (1, 64, 7), (700, 8, 1001)]
    for dtype in (torch.bfloat16, torch.float16):
        worst = {"logits": 0.0, "sums of dW": 0.0, "log-probs": 0.0}
        for n, h, v in shapes:
            x, w = bench.logits(n, h, dtype) / 3, bench.logits(v, h, dtype, 2) / (3 * h**0.5)
            g, exact = bench.logits(n, v, dtype, 3), x.double() @ w.double().t()
            logits = torch.empty(n, v, dtype=torch.float32, device=bench.device)
            head = Head(w, None, None, 1.0)
            head.logits(x, logits)
            # As a share of the sum of the terms' sizes, which fp32 sums err by.
            sizes = x.abs().double() @ w.abs().double().t()
            worst["logits"] = max(worst["logits"], ((logits - exact).abs() / sizes.clamp_min(1e-30)).max().item())
            if bench.device.type == "cuda":  # on a CPU each chunk's product is rounded once
                total = WeightGrad(head, True, False, 2)
                total.add(g, x)
                total.add(g, x)
                want = 2 * (g.double().t() @ x.double())
                sizes = 2 * (g.abs().double().t() @ x.abs().double())
                got = total.result(torch.float32, None)[0]
                assert got is not None
                worst["sums of dW"] = max(
                    worst["sums of dW"], ((got - want).abs() / sizes.clamp_min(1e-30)).max().item()
                )
            labels = bench.labels(n, v)
            truth = exact.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            error = (linear_token_logps(x, w, labels).double() - truth).abs()
            worst["log-probs"] = max(worst["log-probs"], error.max().item())
        lines.append(f"{dtype}: " + ", ".join(f"{name} within {error:.1e}" for name, error in worst.items()))
        if max(worst["logits"], worst["sums of dW"]) > 2e-6 or worst["log-probs"] > 2e-5:
            raise RuntimeError(lines[-1] + " of float64: too far, rounded to 16 bits on the way?")
    return lines


def _linear_work(bench: Bench, rows: int) -> Any:
    """Hidden states, a head and labels for the default loss, and the bare products of these; smaller on a small GPU."""
    from .linear_work import Work

    hidden_size, vocab = (24, 515) if bench.rehearsal else (4096, 128256)
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0]

        def needed() -> int:  # a peer's stored logits with gradient and fp32 copies; weight, dW and its fp32 sum
            return 16 * rows * vocab + 12 * vocab * hidden_size

        while needed() > free and rows > 1024:
            rows //= 2
        while needed() > free and hidden_size > 512:
            hidden_size //= 2
    sequences = max(2, rows // 1024)
    hidden = bench.logits(rows, hidden_size, torch.bfloat16).view(sequences, -1, hidden_size).div_(3)
    weight = bench.logits(vocab, hidden_size, torch.bfloat16, 2).div_(hidden_size**0.5)
    return Work.of(hidden, weight, bench.labels(rows, vocab).view(sequences, -1), bench.rounds)


def _record_step(
    bench: Bench, name: str, contender: str, work: Any, call: Callable[[], object], products: tuple[str, ...],
    gradients: int, share: float = 1.0,
) -> str:  # fmt: skip
    """Time a call that takes these products; a line with its peak memory beyond inputs and `gradients` bytes."""
    peak = measure.device_peak(call, bench.device)
    seconds = measure.device_seconds(call, bench.device, bench.rounds)
    facts = {"dtype": "bfloat16", **work.facts(products, share)}
    median = bench.record(name, contender, facts, peak, seconds)
    beyond = "not measured" if peak is None else f"{max(0, peak - gradients) / 2**20:.0f} MiB"
    return (
        f"{contender}, {work.shape}: {1e3 * median:.2f} ms, {median / facts['floor_seconds']:.2f} x {facts['floor']},"
        f" peak beyond inputs and gradients {beyond}"
    )


def linear(bench: Bench) -> list[str]:
    """Each plan from hidden states, and log-probs alone, against the bare products; half of the rows a prompt."""
    import qkernels

    from .linear_contenders import qkernels_by
    from .linear_work import PLANS, step

    work = _linear_work(bench, bench.rows)
    lines = [f"bare products, {work.shape}: " + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in work.products.items())]
    of_hidden, of_weight = work.hidden.numel() * 2, work.weight.numel() * 2
    for plan, (trains_head, taken) in PLANS.items():
        gradients = of_hidden + of_weight * trains_head
        for percent in (0, 50):
            labels = work.labels.clone()
            labels[:, : labels.shape[1] * percent // 100] = IGNORE
            share = (labels != IGNORE).double().mean().item()
            call = step(qkernels_by(plan), work, labels, trains_head)
            contender = f"qkernels, {plan}, {percent} % prompt"
            lines.append(_record_step(bench, f"plan {plan}", contender, work, call, taken, gradients, share))
        planned = qkernels.plan_linear(
            work.hidden.detach().requires_grad_(), work.weight.detach().requires_grad_(trains_head), work.labels,
            reference_logps=0.0, plan=plan,
        )  # fmt: skip
        lines.append(f"  planned: {planned.chunks} chunks, at most {planned.peak_bytes / 2**20:.0f} MiB")

    def forward() -> Tensor:
        return qkernels.linear_token_logps(work.hidden, work.weight, work.labels)

    lines.append(_record_step(bench, "log-probs from hidden states", "qkernels", work, forward, ("logits",), 0))
    return lines


def linear_rows(bench: Bench) -> list[str]:
    """Cost per row of the default loss from hidden states, from few rows to many: does it stay the same?"""
    from .linear_contenders import qkernels_by
    from .linear_work import PLANS, step

    lines, costs = [], []
    for rows in (16, 32) if bench.rehearsal else [2**k for k in range(10, 14 if bench.quick else 16)]:
        work = _linear_work(bench, rows)
        if work.rows < rows:
            lines.append(f"no memory for {rows} rows")
            break
        gradients = 2 * (work.hidden.numel() + work.weight.numel())
        call = step(qkernels_by("pair_chunks"), work, work.labels, True)
        lines.append(
            _record_step(bench, "loss from hidden states", "qkernels", work, call, PLANS["pair_chunks"][1], gradients)
        )
        costs.append((rows, 1e3 * bench.entries[-1].milliseconds / rows))
    lines.append("per row: " + ", ".join(f"{rows}: {cost:.2f} us" for rows, cost in costs))
    return lines


def linear_peers(bench: Bench) -> list[str]:
    """The default loss from hidden states by what people would use instead."""
    from .contenders import installed
    from .linear_contenders import LINEAR_CONTENDERS
    from .linear_work import PLANS, step

    lines = []
    work = _linear_work(bench, bench.rows)
    gradients = 2 * (work.hidden.numel() + work.weight.numel())
    for name, (function, package) in LINEAR_CONTENDERS.items():
        if not installed(package):
            lines.append(f"{name}: not installed")
            continue
        if name == "F.linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            lines.append(f"{name}: not in this torch")
            continue
        call = step(function, work, work.labels, True)
        try:
            lines.append(
                _record_step(
                    bench, "loss from hidden states, beside peers", name, work, call, PLANS["pair_chunks"][1], gradients
                )
            )
        except Exception as error:  # a peer that fails is a line, not the end
            lines.append(f"{name}: {_first_line(error)}")
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    return lines


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def launch(bench: Bench) -> list[str]:
    """Host time of the whole loss on a tiny input: what Python, torch and the launches cost."""
    lines = []
    for backend in bench.backends():
        tiny = _Loss(bench, backend, 4, 16, 64)
        tiny.leaf = tiny.storage.detach().requires_grad_()
        times = []
        for i in range(20 if bench.rehearsal else 500):
            tiny.leaf.grad = None
            start = time.perf_counter()
            tiny.run(inplace=False)
            times.append(time.perf_counter() - start)
            if i % 50 == 0 and bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)
        lines.append(f"{backend}: {1e6 * statistics.median(times):.0f} us per forward and backward")
    return lines


def waits(bench: Bench) -> list[str]:
    """How often the host waits for the GPU in a step: never from logits; from hidden states once, to count the rows,
    unless it is told their numbers."""
    import warnings

    import qkernels

    whole = _Loss(bench, "auto", 4, 16, 64)
    whole.leaf = whole.storage.detach().requires_grad_()
    hidden = bench.logits(64, 32, torch.bfloat16).view(4, 16, 32).requires_grad_()
    weight = bench.logits(515, 32, torch.bfloat16, 2).requires_grad_()
    labels = bench.labels(64, 515).view(4, 16)
    labels[:, :5] = IGNORE

    counts = (labels != IGNORE).sum(1).tolist()

    dense = (hidden, labels, None)
    spans = torch.arange(0, 65, 16, dtype=torch.int32, device=bench.device)
    one_row = (hidden.detach().view(64, 32).requires_grad_(), labels.view(-1), spans)

    def by(plan: str, told: bool, batch: tuple = dense) -> Callable[[], object]:
        def run() -> None:
            x, y, ends = batch
            given = weight.detach() if plan == "frozen_head" else weight
            few = 3 * 515 * 8 if plan == "recompute" else 1 << 20
            qkernels.fused_linear_token_dpo(
                x, given, y, reference_logps=0.0, cu_seqlens=ends, plan=plan, max_chunk_bytes=few,
                valid_rows=counts if told else None,
            ).loss.backward()  # fmt: skip

        return run

    def run_logps() -> None:
        for given in (weight, weight.detach()):
            qkernels.linear_token_logps(hidden, given, labels, valid_rows=sum(counts)).sum().backward()

    packed = bench.logits(64, 515, torch.bfloat16, 3).requires_grad_()
    ends = torch.tensor([0, 10, 30, 44, 64], dtype=torch.int32, device=bench.device)

    def run_packed() -> None:
        for loss_type in ("sigmoid", "ipo"):
            qkernels.fused_token_dpo(
                packed, labels.view(-1), reference_logps=0.0, cu_seqlens=ends, loss_type=loss_type
            ).loss.backward()

    def run_stats() -> None:
        numbers = qkernels.token_stats(packed, labels.view(-1), outputs=("logps", "entropy", "is_top1"))
        assert numbers.entropy is not None
        numbers.entropy.sum().backward()

    works: dict[str, tuple[Callable[[], object], int]] = {
        "from logits": (lambda: whole.run(inplace=False), 0),
        "from packed logits": (run_packed, 0),
        "token_stats": (run_stats, 0),
    }
    for plan in ("frozen_head", "pair_chunks", "recompute"):
        works[f"from hidden states, {plan}"] = (by(plan, False), 1)
        works[f"from hidden states, {plan}, valid_rows given"] = (by(plan, True), 0)
        works[f"from packed hidden states, {plan}, valid_rows given"] = (by(plan, True, one_row), 0)
    works["linear_token_logps, valid_rows given"] = (run_logps, 0)
    lines = []
    for name, (run, allowed) in works.items():
        run()
        if bench.rehearsal:
            lines.append(f"{name}: ran without a GPU to wait for")
            continue
        torch.cuda.synchronize(bench.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        number = sum("synchronizing" in str(warning.message) for warning in seen)
        lines.append(f"{name}: {number}")
        if number > allowed:
            raise RuntimeError(f"{name}: the host waits {number} times, expected {allowed}: {seen[0].message}")
    return lines


def graph(bench: Bench) -> list[str]:
    """The whole loss captured in a CUDA graph gives the loss and the gradient of an ordinary call."""
    lines = []
    for backend in bench.backends():
        whole = _Loss(bench, backend, 4, 16 if bench.rehearsal else 256, bench.vocab)
        whole.leaf = whole.storage.detach().requires_grad_()
        expected = whole.run(inplace=False)
        assert whole.leaf.grad is not None
        gradient = whole.leaf.grad.clone()
        if bench.rehearsal:
            lines.append(f"{backend}: ran without a graph")
            continue
        side = torch.cuda.Stream(bench.device)
        side.wait_stream(torch.cuda.current_stream(bench.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                whole.leaf.grad = None
                whole.run(inplace=False)
        torch.cuda.current_stream(bench.device).wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        whole.leaf.grad = None
        with torch.cuda.graph(captured):
            result = whole.run(inplace=False)
        result.zero_()
        whole.leaf.grad.zero_()
        captured.replay()
        torch.cuda.synchronize(bench.device)
        if not (torch.equal(result, expected) and torch.equal(whole.leaf.grad, gradient)):
            raise RuntimeError(
                f"{backend}: a replay gives {result.item()}, expected {expected.item()}, or other gradients"
            )
        seconds = statistics.median(measure.device_seconds(captured.replay, bench.device, bench.rounds))
        lines.append(f"{backend}: the same bits; {1e6 * seconds:.0f} us per replay of 256 rows")
    return lines


def auto(bench: Bench) -> list[str]:
    """What "auto" takes here, and how the backends compare on the work of a training step."""
    from qkernels import backends, token_logps

    logits = bench.logits(bench.rows, bench.vocab, torch.bfloat16)
    labels = bench.labels(bench.rows, bench.vocab)
    picked = backends.resolve("auto", logits)
    times = {
        name: statistics.median(
            measure.device_seconds(lambda n=name: token_logps(logits, labels, backend=n), bench.device, bench.rounds)
        )
        for name in bench.backends()
    }
    best = min(times, key=lambda name: times[name])
    listed = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times.items())
    verdict = (
        "the fastest" if picked == best else f"{best} is faster: change the order in qkernels/backends/__init__.py"
    )
    return [f"auto takes {picked} ({listed}): {verdict}"]


# Name -> (step, most seconds it may take). In this order; more steps go here. The test suite comes last: it may use up
# what is left of the time.
STEPS: dict[str, tuple[Callable[[Bench], list[str]], int]] = {
    "build": (build, 120),
    "values": (values, 90),
    "stats": (stats, 90),
    "backward": (backward, 30),
    "loss": (loss, 30),
    "peers": (peers, 90),
    "products": (products, 30),
    "linear": (linear, 60),
    "linear_rows": (linear_rows, 60),
    "linear_peers": (linear_peers, 60),
    "launch": (launch, 20),
    "waits": (waits, 20),
    "graph": (graph, 30),
    "auto": (auto, 30),
    "sanitizer": (sanitizer, 120),
    "tests": (tests, 360),
}
CHILDREN = {**{name: step for name, (step, _) in STEPS.items()}, "exercise": exercise}
TOTAL_SECONDS = 470  # for all steps


# --- the run ----------------------------------------------------------------------------------------------------------


def child(name: str, bench: Bench) -> int:
    """One step in this process; it prints its measurements and its result, each on a line of its own."""
    lines = CHILDREN[name](bench)
    print("\n" + RESULT + json.dumps(lines), flush=True)
    return 0


def machine(device: torch.device) -> dict[str, str]:
    """The machine and software that the figures belong to, and which backends could run."""
    import qkernels

    facts = measure.machine()
    facts["backends"] = "; ".join(f"{name}: {state}" for name, state in qkernels.info()["backends"].items())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        gpu = f"{properties.name}, {properties.multi_processor_count} processors, {memory}"
        built = qkernels.info()["native_extension"]["cuda"].get("version", "none")
        facts = {"GPU": gpu, "CUDA": f"{torch.version.cuda} of torch, {built} of the extension", **facts}
    else:
        facts = {"rehearsal": "tiny tensors on the CPU; the figures mean nothing", **facts}
    return facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="only these steps")
    parser.add_argument("--no-build", action="store_true", help="take the extension that is there")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, a third of the rounds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on tiny tensors")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: bench/results)")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU; --device cpu is a rehearsal without one", file=sys.stderr)
        return 2
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.child:
        return child(options.child, Bench(device, options.quick))
    names = [name for name in options.steps if not (options.no_build and name == "build")]
    out = options.out or (None if device.type == "cpu" else ROOT / "bench" / "results")
    return 1 if run_steps(names, options, device, out) else 0


def run_steps(names: list[str], options: argparse.Namespace, device: torch.device, out: Path | None) -> list[str]:
    """Run steps one after the other; names of failed ones. Each is printed, and kept in `out`, as soon as it ends."""
    entries: list[report.Entry] = []
    failed: list[str] = []
    notes: list[str] = []
    begun = time.perf_counter()
    for name in names:
        patience = 1 if device.type == "cuda" else 10  # a rehearsal may share its processor with anything
        left = patience * TOTAL_SECONDS - (time.perf_counter() - begun)
        start = time.perf_counter()
        lines, ok = one_step(name, options, min(patience * STEPS[name][1], max(1.0, left)), entries)
        if not ok:
            failed.append(name)
        said = [f"- {name}: {'ok' if ok else 'FAILED'}, {time.perf_counter() - start:.0f} s"]
        said += [f"  - {line}" for line in lines]
        print("\n".join(said), flush=True)
        notes += said
        if out is not None:
            keep(out, notes, entries, device)
    print("\n" + report.markdown(entries, machine(device)))
    if out is not None:
        print(f"written to {keep(out, notes, entries, device)}.md and .json")
    return failed


def one_step(
    name: str, options: argparse.Namespace, limit: float, entries: list[report.Entry]
) -> tuple[list[str], bool]:
    """A step in a process of its own; what it measured is added to `entries`, also if it fails or is stopped."""
    command = [sys.executable, "-m", "bench.gpu_check", "--device", options.device, "--child", name]
    command += ["--quick"] if options.quick else []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the step and what it started
            process.wait()
        output.seek(0)
        printed = output.read().strip().splitlines()
    entries += [report.Entry(**json.loads(line.removeprefix(ENTRY))) for line in printed if line.startswith(ENTRY)]
    results = [json.loads(line.removeprefix(RESULT)) for line in printed if line.startswith(RESULT)]
    tail = [line for line in printed if not line.startswith((ENTRY, RESULT))][-20:]
    if status is None:
        return [*tail, f"stopped after {limit:.0f} s"], False
    if status != 0 or not results:
        return [*tail, f"ended with {status}"], False
    return results[-1], True


def keep(out: Path, notes: list[str], entries: list[report.Entry], device: torch.device) -> Path:
    """Write `<gpu>-<date>.md` and `.json`; their path without the ending."""
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "rehearsal"
    path = out / f"{'-'.join(gpu.lower().replace('/', ' ').split())}-{datetime.date.today().isoformat()}"
    facts = machine(device)
    path.with_name(path.name + ".md").write_text(
        "\n".join([*notes, "", report.markdown(entries, facts)]) + "\n", encoding="utf-8"
    )
    document = {"machine": facts, "steps": notes, "results": [asdict(entry) for entry in entries]}
    path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
