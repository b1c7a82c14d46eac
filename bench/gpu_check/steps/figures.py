"""How fast: log-probs, gradients and whole losses, from logits and from hidden states, beside copies and bare GEMMs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import kernel_report, measure
from ...linear_contenders import qkernels_by
from ...linear_work import PLANS, Work, step
from ..step import IGNORE, Bench

# From hidden states, M = 8192, H = 4096, V = 128256, bf16, on an H200; from logits see `kernel_report.AIMS`.
PLAN_AIMS = {"pair_chunks": "37 ms", "frozen_head": "24 ms", "recompute": "50 ms"}


def beside_aim(work: str, contender: str, seconds: float, aim: str) -> str:
    """A line about a figure that the kernels were written to reach."""
    reached = "reached" if 1e3 * seconds <= float(aim.removesuffix(" ms")) else "NOT reached"
    return f"{work}, {contender}: {1e3 * seconds:.3f} ms; aim on an H200 at full size {aim}: {reached}"


def _aim(work: str) -> str:
    return next(aim for name, aim, *_ in kernel_report.AIMS if name == work)


def stats(bench: Bench) -> list[str]:
    """Per-token numbers, no gradient: one read of the logits."""
    import qkernels

    n, v = bench.rows, bench.vocab
    aims = {"log-probs": "forward, cached reference", "log-probs of both models": "forward with reference logits"}
    lines = []
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
                seconds = bench.add(
                    work, f"qkernels, {backend}", logits, passes,
                    functools.partial(
                        qkernels.token_stats, logits, labels, outputs=outputs, backend=backend,
                        reference_logits=reference if passes == 2 else None,
                    ),
                )  # fmt: skip
                if work in aims and (rows, vocab, dtype) == cases[0]:
                    lines.append(beside_aim(aims[work], backend, seconds, _aim(aims[work])))
    return lines


def backward(bench: Bench) -> list[str]:
    """The gradient kernel by itself, in place: one read, one write. Refilled before each round, which is not timed."""
    from qkernels.backends import ops
    from qkernels.core.fields import SOFTMAX

    lines = []
    for vocab in (bench.vocab, bench.vocab + 1):
        logits = bench.logits(bench.rows, vocab, torch.bfloat16)
        labels = bench.labels(bench.rows, vocab).unsqueeze(0)
        work = logits.clone().unsqueeze(0)
        coefficients = torch.ones(1, 1, bench.rows, device=bench.device)
        for backend in bench.backends():
            how = (1.0, IGNORE, backend)
            softmax = ops.row_stats.op(logits.unsqueeze(0), labels, None, SOFTMAX, *how)
            seconds = bench.add(
                "gradient in place", f"qkernels, {backend}", logits, 2,
                functools.partial(ops.row_grad_.op, work, labels, None, softmax, None, coefficients, None, *how),
                functools.partial(work.copy_, logits),
            )  # fmt: skip
            if vocab == bench.vocab:
                lines.append(beside_aim("backward in place", backend, seconds, _aim("backward in place")))
    return lines


class WholeLoss:
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
    lines, name = [], "loss and gradient, cached reference"
    for backend in bench.backends():
        whole = WholeLoss(bench, backend, 8, bench.rows, bench.vocab)

        def step(whole: WholeLoss = whole) -> None:
            whole.refill()
            whole.run()

        seconds = bench.add(
            name, f"qkernels, {backend}", whole.source, 3, whole.run, whole.refill,
            measure.device_peak(step, bench.device),
        )  # fmt: skip
        lines.append(beside_aim(name, backend, seconds, _aim(name)))
    return lines


def linear_work_of(bench: Bench, rows: int) -> Any:
    """Hidden states, a head and labels for the default loss, and the bare products of these; smaller on a small GPU."""

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


def record_step(
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

    work = linear_work_of(bench, bench.rows)
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
            lines.append(record_step(bench, f"plan {plan}", contender, work, call, taken, gradients, share))
            if percent == 0:
                median = bench.entries[-1].milliseconds / 1e3
                lines.append(beside_aim("loss from hidden states", plan, median, PLAN_AIMS[plan]))
        planned = qkernels.plan_linear(
            work.hidden.detach().requires_grad_(), work.weight.detach().requires_grad_(trains_head), work.labels,
            reference_logps=0.0, plan=plan,
        )  # fmt: skip
        lines.append(f"  planned: {planned.chunks} chunks, at most {planned.peak_bytes / 2**20:.0f} MiB")

    def forward() -> Tensor:
        return qkernels.linear_token_logps(work.hidden, work.weight, work.labels)

    lines.append(record_step(bench, "log-probs from hidden states", "qkernels", work, forward, ("logits",), 0))
    return lines


def linear_rows(bench: Bench) -> list[str]:
    """Cost per row of the default loss from hidden states, from few rows to many: does it stay the same?"""
    lines, costs = [], []
    for rows in (16, 32) if bench.rehearsal else [2**k for k in range(10, 14 if bench.quick else 16)]:
        work = linear_work_of(bench, rows)
        if work.rows < rows:
            lines.append(f"no memory for {rows} rows")
            break
        gradients = 2 * (work.hidden.numel() + work.weight.numel())
        call = step(qkernels_by("pair_chunks"), work, work.labels, True)
        lines.append(
            record_step(bench, "loss from hidden states", "qkernels", work, call, PLANS["pair_chunks"][1], gradients)
        )
        costs.append((rows, 1e3 * bench.entries[-1].milliseconds / rows))
    lines.append("per row: " + ", ".join(f"{rows}: {cost:.2f} us" for rows, cost in costs))
    return lines


def launch(bench: Bench) -> list[str]:
    """Host time of the whole loss on a tiny input: what Python, torch and the launches cost."""
    lines = []
    for backend in bench.backends():
        tiny = WholeLoss(bench, backend, 4, 16, 64)
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
