"""The paths from hidden states: this package's plans and its peers beside the bare matrix products, in one run.

Before anything is timed, losses and gradients are compared with this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from . import measure
from .conftest import DTYPES
from .contenders import IGNORE, installed
from .linear_contenders import LINEAR_CONTENDERS, Loss, qkernels_by

# What a peer may differ by: logits rounded to bf16 err by 3e-2 per token, sums of 16-bit chunks by more.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 3e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 3e-2}


@dataclass(frozen=True)
class Work:
    """Hidden states, weight and labels, and what the bare products of them take, in seconds."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    products: dict[str, float]

    @property
    def rows(self) -> int:
        return self.labels.numel()

    @property
    def shape(self) -> str:
        return f"{self.rows} rows, H = {self.hidden.shape[-1]}, V = {self.weight.shape[0]}"

    def floor(self, names: tuple[str, ...], share: float = 1.0) -> float:
        """Time of these products for a share of the rows."""
        return share * sum(self.products[name] for name in names)


def _products(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Median times of the three products of a head, in the dtype of the inputs, as torch runs them."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = torch.mm(flat, weight.t())
    return {
        "logits": measure.median_seconds(lambda: torch.mm(flat, weight.t(), out=logits)),
        "dX": measure.median_seconds(lambda: torch.mm(logits, weight)),
        "dW": measure.median_seconds(lambda: torch.mm(logits.t(), flat)),
    }


@pytest.fixture(scope="session")
def work(dtype_name: str, pytestconfig: pytest.Config) -> Iterator[Work]:
    rows = pytestconfig.getoption("--rows") or 1024
    hidden_size, vocab = pytestconfig.getoption("--hidden"), pytestconfig.getoption("--linear-vocab")
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[dtype_name]
    hidden = torch.randn(8, rows // 8, hidden_size, generator=generator).to(dtype)
    weight = (3 * hidden_size**-0.5 * torch.randn(vocab, hidden_size, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, hidden.shape[:2], generator=generator)
    yield Work(hidden, weight, labels, _products(hidden, weight))


def step(loss: Loss, work: Work, labels: Tensor, trains_head: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward; returns the loss and dX."""

    def run() -> tuple[Tensor, Tensor]:
        hidden = work.hidden.detach().requires_grad_()
        weight = work.weight.detach().requires_grad_(trains_head)
        value = loss(hidden, weight, labels)
        value.backward()
        assert hidden.grad is not None
        return value.detach(), hidden.grad

    return run


def record(
    benchmark, name: str, contender: str, dtype: str, work: Work, products: tuple[str, ...], share: float = 1.0
) -> None:
    """What the report needs to know. `products`: those that the work takes; `share`: of the rows, the valid ones."""
    benchmark.group = f"{name} {dtype}"
    flops = len(products) * share * 2 * work.rows * work.hidden.shape[-1] * work.weight.shape[0]
    benchmark.extra_info.update(
        work=name,
        contender=contender,
        dtype=dtype,
        shape=work.shape,
        amount=flops / 1e9,
        unit="GFLOP",
        floor={1: "bare product", 2: "two bare products", 3: "three bare products", 4: "four bare products"}[
            len(products)
        ],
        floor_seconds=work.floor(products, share),
        logits_bytes=work.rows * work.weight.shape[0] * work.hidden.element_size(),
        peak_bytes=None,
    )


def time(benchmark, run: Callable[[], object], rounds: int) -> None:
    benchmark.extra_info["peak_bytes"] = measure.peak_memory(run)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("contender", LINEAR_CONTENDERS)
def test_linear_dpo(benchmark, contender: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Head and hidden states trained: logits, loss, dX and dW."""
    loss, package = LINEAR_CONTENDERS[contender]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    if contender == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy came with torch 2.13")
    value, gradient = step(loss, work, work.labels, True)()
    truth, expected = step(qkernels_by("auto"), work, work.labels, True)()
    torch.testing.assert_close(value.float(), truth.float(), rtol=0, atol=LOSS_TOLERANCE[dtype_name])
    error = (gradient.float() - expected.float()).abs().amax()
    assert error <= GRADIENT_TOLERANCE[dtype_name] * expected.float().abs().amax(), "gradients differ"
    record(benchmark, "DPO from hidden states", contender, dtype_name, work, ("logits", "dX", "dW"))
    time(benchmark, step(loss, work, work.labels, True), pytestconfig.getoption("--rounds"))


PLANS = {
    "pair_chunks": (True, ("logits", "dX", "dW")),
    "frozen_head": (False, ("logits", "dX")),
    "recompute": (True, ("logits", "logits", "dX", "dW")),
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans(benchmark, plan: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Each plan against the bare products that it is made of."""
    trains_head, products = PLANS[plan]
    record(benchmark, f"Plan {plan}", f"qkernels, {plan}", dtype_name, work, products)
    time(benchmark, step(qkernels_by(plan), work, work.labels, trains_head), pytestconfig.getoption("--rounds"))


def test_forward_only(benchmark, work: Work, dtype_name: str, pytestconfig) -> None:
    """Log-probs without gradients: one product."""
    record(benchmark, "Log-probs only", "qkernels.linear_token_logps", dtype_name, work, ("logits",))
    time(
        benchmark,
        lambda: qkernels.linear_token_logps(work.hidden, work.weight, work.labels),
        pytestconfig.getoption("--rounds"),
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_prompt(benchmark, share: float, work: Work, dtype_name: str, pytestconfig) -> None:
    """Prompt tokens: rows that are dropped before the first product."""
    labels = work.labels.clone()
    labels[:, : int(share * labels.shape[1])] = IGNORE
    valid = float((labels != IGNORE).float().mean())
    products = ("logits", "dX", "dW")
    record(benchmark, "Prompt tokens", f"qkernels, {100 * share:.0f} % prompt", dtype_name, work, products, valid)
    time(benchmark, step(qkernels_by("auto"), work, labels, True), pytestconfig.getoption("--rounds"))


def test_one_long_pair(benchmark, work: Work, dtype_name: str, pytestconfig) -> None:
    """All rows in one pair, which does not fit a chunk of a tenth of its logits: logits are made twice."""
    hidden_size, vocab = work.hidden.shape[-1], work.weight.shape[0]
    pair = Work(work.hidden.reshape(2, -1, hidden_size), work.weight, work.labels.reshape(2, -1), work.products)
    budget = max(work.rows // 10, 1) * vocab * 8

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return qkernels.fused_linear_token_dpo(hidden, weight, labels, reference_logps=0.0, max_chunk_bytes=budget).loss

    products = ("logits", "logits", "dX", "dW")
    record(benchmark, "One long pair in small chunks", "qkernels, recompute", dtype_name, pair, products)
    time(benchmark, step(loss, pair, pair.labels, True), pytestconfig.getoption("--rounds"))


def test_log_prob_error(benchmark, work: Work, dtype_name: str, capsys) -> None:
    """Error of a token's log-prob against float64, ours and that of logits rounded to the inputs' dtype (TRL's, where
    installed)."""
    hidden, labels = work.hidden[:1, :64], work.labels[:1, :64]
    logits = hidden.double() @ work.weight.double().t()
    truth = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def error(logps: Tensor) -> float:
        return float((logps.double() - truth).abs().max())

    ours = error(benchmark.pedantic(lambda: qkernels.linear_token_logps(hidden, work.weight, labels)))
    rounded = F.linear(hidden, work.weight).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    lines = [f"largest error of a log-prob, {dtype_name}: qkernels {ours:.1e}, rounded logits {error(rounded):.1e}"]
    if installed("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        flat = hidden.reshape(-1, hidden.shape[-1])
        theirs = ChunkedLogProbFunction.apply(flat, work.weight, None, labels.reshape(-1), 1.0, 32768, None, 1.0, ())[0]
        lines.append(f"TRL {error(theirs.view(labels.shape)):.1e}")
    with capsys.disabled():
        print("\n" + ", ".join(lines))
    assert ours < 2e-5
