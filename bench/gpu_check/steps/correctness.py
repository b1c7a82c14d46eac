"""Is it right: the build, values against float64, the core of the test suite, memory checks, waits and graphs."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qkernels.backends import cuda

from ... import measure
from .. import machine
from ..commands import run, tool
from ..step import IGNORE, ROOT, Bench, Missing
from .figures import WholeLoss


def build(bench: Bench) -> list[str]:
    """Build the extension in place, for this GPU alone; nothing to do where one is newer than its sources."""
    if bench.rehearsal:
        return ["nothing is built in a rehearsal"]
    major, minor = torch.cuda.get_device_capability(bench.device)
    if _built_for(f"{major}{minor}"):
        return [f"the extension at hand is newer than its sources, or made of them, and for sm_{major}{minor}"]
    how = {"QKERNELS_CUDA": "1", "QKERNELS_CUDA_ARCHS": f"{major}{minor}"}
    said = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", **how)
    _SOURCES_OF_BUILD.parent.mkdir(parents=True, exist_ok=True)
    _SOURCES_OF_BUILD.write_text(machine.sources(), encoding="utf-8")
    return said


# Digest of the sources that were built here. A tree that is copied again has new times, and may be the same.
_SOURCES_OF_BUILD = ROOT / "build" / "gpu_check" / "sources-of-build.txt"


def _built_for(architecture: str) -> bool:
    package = ROOT / "qkernels"
    built = [*package.glob("_C*.so"), *package.glob("_C*.pyd")]
    about = package / "_build.json"
    if not built or not about.exists():
        return False
    targets = (json.loads(about.read_text(encoding="utf-8")).get("cuda") or {}).get("architectures") or []
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    same = _SOURCES_OF_BUILD.exists() and _SOURCES_OF_BUILD.read_text(encoding="utf-8") == machine.sources()
    fresh = same or built[0].stat().st_mtime >= newest
    return fresh and architecture in {name.removesuffix("-real") for name in targets}


def runnable(bench: Bench) -> list[str]:
    """Both backends for GPUs run here; else what is missing: a build, a newer driver, an architecture."""
    if bench.rehearsal:
        return [f"in a rehearsal: {', '.join(bench.backends())}"]
    missing = machine.why_not(bench.device)
    if torch.version.hip is not None:
        missing.pop("cuda", None)
    if missing:
        raise RuntimeError("; ".join(f"{name} cannot run here: {reason}" for name, reason in missing.items()))
    return [f"cuda (compiled for {', '.join(cuda.architectures())}) and triton run here"]


# The folders of tests whose cases name a backend, and their files that run no kernel on a GPU or compile for minutes.
CORE = ("backends", "functional", "objectives", "head")
NOT_CORE = (
    "test_cuda_emulation.py", "test_cuda_aot.py", "test_triton.py", "test_triton_aot.py", "test_instruction_sets.py",
    "test_linear_compile.py",
)  # fmt: skip


def core(bench: Bench) -> list[str]:
    """The tests that run kernels on the GPU, files side by side."""
    if bench.rehearsal:
        return _pytest([ROOT / "tests" / "core" / "test_fields.py"])
    files = [path for folder in CORE for path in (ROOT / "tests" / folder).glob("test_*.py")]
    return _pytest([path for path in files if path.name not in NOT_CORE], "-k", "cuda or triton", "-m", "not nightly")


def tests(bench: Bench) -> list[str]:
    """The whole test suite, files side by side; every test that takes a backend runs on the GPU's as well."""
    if bench.rehearsal:
        return ["in a rehearsal this is the step core"]
    return _pytest(list((ROOT / "tests").rglob("test_*.py")), "-m", "not nightly")


def _pytest(files: list[Path], *options: str) -> list[str]:
    """Run test files in a process each, as many at a time as there are cores to feed one GPU; how many tests passed."""
    files = sorted(files, key=lambda path: -path.stat().st_size)  # the long ones first
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options)
    failed: list[str] = []
    counts: Counter[str] = Counter()

    def one(path: Path) -> None:
        try:
            # 5: not a test was collected, because none runs on a GPU
            last = run(*pytest, str(path), keep=5, allowed=(0, 5), quiet=True, OMP_NUM_THREADS="1")
        except RuntimeError as error:
            failed.append(str(error).replace(f"{' '.join(pytest)} ", ""))
            print(f"{path.name}: FAILED", flush=True)
        else:
            counts.update({what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", last[-1])})
            print(f"{path.name}: {last[-1]}", flush=True)

    with ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 1) - 2))) as pool:
        list(pool.map(one, files))
    lines = [f"{len(files)} files: " + ", ".join(f"{number} {what}" for what, number in counts.items())]
    if failed:
        raise RuntimeError("; ".join([*lines, *failed]))
    return lines


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


def exercise(bench: Bench) -> list[str]:
    """Each kernel once on small tensors of awkward shapes; what the memory checks run."""
    from qkernels import backends
    from qkernels.backends import ops
    from qkernels.core.fields import FIELDS, REFERENCE_SOFTMAX, SOFTMAX

    for name in bench.backends():
        for vocab, dtype, shift in ((1, torch.float32, 1), (2053, torch.bfloat16, 3), (20011, torch.float16, 5)):
            logits = bench.logits(1, 3 * vocab + shift, dtype)[:, shift:].view(1, 3, vocab)
            other = bench.logits(1, 3 * vocab, torch.float32, 1).view(1, 3, vocab)
            labels = torch.tensor([[0, IGNORE, vocab - 1]], device=bench.device)
            for reference in (logits.clone(), other):
                how = (1.0, IGNORE, name)
                stats = ops.row_stats.op(logits, labels, reference, (1 << len(FIELDS)) - 1, *how)
                softmax = ops.row_stats.op(logits, labels, reference, SOFTMAX | REFERENCE_SOFTMAX, *how)
                for k in (1, 5):
                    coefficients = torch.ones(k, 1, 3, device=bench.device)
                    upstream = torch.ones((), device=bench.device)
                    given = (reference, stats[:3], softmax[3:], coefficients)
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
    inner = [sys.executable, "-m", "bench.gpu_check", "--device", bench.device.type, "--worker", "exercise"]
    if bench.rehearsal:
        return [*exercise(bench), "without compute-sanitizer"]
    program = tool("compute-sanitizer")

    def check(kind: str) -> list[str]:
        how = ("--tool", kind, "--error-exitcode", "9")
        # Many lines, because what the tool cannot do it says long before the program ends.
        found = run(program, *how, *inner, keep=40, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return [f"{kind}: {line}" for line in found[-1:]]

    try:
        with ThreadPoolExecutor(2) as pool:
            return [line for lines in pool.map(check, ("memcheck", "racecheck")) for line in lines]
    except RuntimeError as error:
        if "Device not supported" in str(error):  # as in a sandbox that hides the debugging interface
            raise Missing(f"compute-sanitizer cannot be used on this machine: {error}") from None
        raise


def waits(bench: Bench) -> list[str]:
    """How often the host waits for the GPU in a step: never from logits; from hidden states once, to count the rows,
    unless it is told their numbers."""
    import qkernels

    whole = WholeLoss(bench, "auto", 4, 16, 64)
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
    for name, (work, allowed) in works.items():
        work()
        if bench.rehearsal:
            lines.append(f"{name}: ran without a GPU to wait for")
            continue
        torch.cuda.synchronize(bench.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                work()
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
        whole = WholeLoss(bench, backend, 4, 16 if bench.rehearsal else 256, bench.vocab)
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
