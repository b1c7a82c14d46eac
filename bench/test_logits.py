"""The paths from logits: each piece of work, this package beside its peers, on the same tensors in one run.

Before anything is timed, its results are compared with this package's: a fast wrong answer fails.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qkernels

from . import measure
from .conftest import DTYPES, Data, Size
from .contenders import CONTENDERS, IGNORE, installed

# A peer may differ by what it rounds. Log-probs rounded to bf16 err by about 3e-2 per token, hence by about half a nat
# over an answer; times beta, that moves the loss and the sigmoid in front of every gradient by some percent.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 3e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 3e-2}


def record(benchmark, work: str, contender: str, dtype: str, size: Size, data: Data, passes: float) -> None:
    """What the report needs to know about a benchmark. `passes`: reads and writes of one tensor of logits."""
    benchmark.group = f"{work} {dtype}"
    benchmark.extra_info.update(
        work=work,
        contender=contender,
        dtype=dtype,
        shape=f"{size.rows} rows x {size.vocab}",
        amount=passes * data.logits_bytes / 1e9,
        unit="GB",
        floor="copy of the same bytes",
        floor_seconds=passes * data.logits_bytes / data.copy_bandwidth,
        logits_bytes=data.logits_bytes,
        peak_bytes=None,
    )


class Step:
    """Forward and backward of a contender on a leaf that holds the policy's logits.

    The leaf is refilled before each round, outside the timing: in place, its storage has become the gradient. What that
    leaves unwritten in the caches is not to be paid for in the timing either: other memory is read after it.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], data: Data, labels: Tensor):
        self.loss, self.data, self.labels = loss, data, labels
        self.leaf = data.policy.clone()

    def refill(self) -> None:
        self.leaf = self.leaf.detach()
        self.leaf.grad = None
        self.leaf.copy_(self.data.policy)
        self.data.reference.amax()
        self.leaf.requires_grad_()

    def run(self) -> Tensor:
        loss = self.loss(self.leaf, self.data.reference, self.labels)
        loss.backward()
        return loss.detach()


def sampled_gradient(step: Step) -> Tensor:
    """Some rows of the gradient, fp32: enough to catch a wrong one without a second tensor of logits."""
    gradient = step.leaf.grad
    assert gradient is not None
    return gradient[:, :: max(1, gradient.shape[1] // 4)].float().clone()


@pytest.fixture(scope="session")
def truth(data: Data, dtype_name: str) -> tuple[Tensor, Tensor]:
    """Loss and sampled gradient of this package's in-place path (which the tests hold against float64)."""
    step = Step(CONTENDERS["qkernels, in place"][0], data, data.labels)
    step.refill()
    return step.run(), sampled_gradient(step)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_dpo(benchmark, contender: str, data: Data, dtype_name: str, size: Size, truth, pytestconfig) -> None:
    """Forward of policy and reference, loss, backward: each logit read once, the policy's read again and written."""
    loss, package = CONTENDERS[contender]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    step = Step(loss, data, data.labels)
    step.refill()
    got, gradient = step.run(), sampled_gradient(step)
    torch.testing.assert_close(got.float(), truth[0].float(), rtol=0, atol=LOSS_TOLERANCE[dtype_name])
    largest = truth[1].abs().amax()
    assert (gradient - truth[1]).abs().amax() <= GRADIENT_TOLERANCE[dtype_name] * largest, "gradients differ"
    record(benchmark, "DPO loss and gradient", contender, dtype_name, size, data, passes=4)
    measure.benchmarked(benchmark, step.run, pytestconfig.getoption("--rounds"), step.refill)
    step.leaf.grad = None


@pytest.mark.parametrize("mode", ["in place", "new gradient"])
def test_ignored_rows(benchmark, mode: str, data: Data, dtype_name: str, size: Size, pytestconfig) -> None:
    """Prompt and padding: half of the rows ignored. In place, their gradient rows still have to be zeroed.

    In turn with no row ignored, which is the floor here: what fresh memory costs depends on what was freed before.
    """
    labels = data.labels.clone()
    labels[:, : size.length // 2] = IGNORE
    loss = CONTENDERS[f"qkernels, {mode}"][0]
    half, whole, seconds = Step(loss, data, labels), Step(loss, data, data.labels), []

    def setup() -> None:
        half.leaf.grad = None
        whole.refill()
        start = time.perf_counter()
        whole.run()
        seconds.append(time.perf_counter() - start)
        whole.leaf.grad = None
        half.refill()

    record(benchmark, f"Ignored rows, {mode}", "qkernels, 50 % ignored", dtype_name, size, data, passes=4)
    measure.benchmarked(benchmark, half.run, 2 * pytestconfig.getoption("--rounds"), setup)
    benchmark.extra_info.update(floor="none ignored, in turn", floor_seconds=statistics.median(seconds[1:]))
    half.leaf.grad = None


STATS = {
    "qkernels, logps": ("logps", "reference_logps"),
    "qkernels, + entropy": ("logps", "reference_logps", "entropy"),
    "qkernels, + entropy, both KLs": (
        "logps",
        "reference_logps",
        "entropy",
        "kl_reference_policy",
        "kl_policy_reference",
    ),
}


@pytest.mark.parametrize("asked", STATS)
def test_stats(benchmark, asked: str, data: Data, dtype_name: str, size: Size, pytestconfig) -> None:
    """One pass over policy and reference, no gradient."""

    def run() -> qkernels.TokenStats:
        return qkernels.token_stats(data.policy, data.labels, reference_logits=data.reference, outputs=STATS[asked])

    record(benchmark, "Token statistics", asked, dtype_name, size, data, passes=2)
    measure.benchmarked(benchmark, run, pytestconfig.getoption("--rounds"))


def test_one_row(benchmark, data: Data, dtype_name: str, size: Size) -> None:
    """A single token, as in decoding: everything included."""
    row, label = data.policy[0, :1].clone(), data.labels[0, :1]
    record(benchmark, "One token", "qkernels.token_logps", dtype_name, size, data, passes=1 / size.rows)
    benchmark.extra_info["shape"] = f"1 row x {size.vocab}"
    benchmark.pedantic(lambda: qkernels.token_logps(row, label), rounds=200, iterations=5, warmup_rounds=5)


def test_one_row_eager(benchmark, data: Data, dtype_name: str, size: Size) -> None:
    """The same in eager torch."""
    row, label = data.policy[0, :1].clone(), data.labels[0, :1]
    record(benchmark, "One token", "eager torch", dtype_name, size, data, passes=1 / size.rows)
    benchmark.extra_info["shape"] = f"1 row x {size.vocab}"
    benchmark.pedantic(
        lambda: row.log_softmax(-1).gather(-1, label[:, None]), rounds=200, iterations=5, warmup_rounds=5
    )


def test_tiny_step(benchmark, dtype_name: str) -> None:
    """Loss and gradient of 32 tokens of 64 entries, beside eager torch: what is timed is the host's work."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, 8, 64, generator=generator).to(DTYPES[dtype_name])
    labels = torch.randint(0, 64, (4, 8), generator=generator)
    leaf = policy.clone().requires_grad_()

    def run(contender: str) -> None:
        leaf.grad = None
        CONTENDERS[contender][0](leaf, reference, labels).backward()

    tiny = Data(policy, reference, labels, measure.copy_bandwidth(policy))
    record(benchmark, "Tiny step", "qkernels, new gradient", dtype_name, Size(4, 8, 64), tiny, passes=4)
    eager = measure.median_seconds(lambda: run("eager torch"), 500)
    benchmark.extra_info.update(floor="eager torch", floor_seconds=eager)
    benchmark.pedantic(lambda: run("qkernels, new gradient"), rounds=200, iterations=5, warmup_rounds=5)
