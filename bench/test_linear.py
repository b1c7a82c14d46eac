"""The paths from hidden states: this package's plans and its peers beside the bare matrix products, in one run.

Before anything is timed, losses and gradients are compared with this package's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from . import measure
from .conftest import DTYPES
from .contenders import IGNORE, installed
from .linear_contenders import LINEAR_CONTENDERS, qkernels_by
from .linear_work import PLANS, Work, step

# What a peer may differ by: logits rounded to bf16 err by 3e-2 per token, sums of 16-bit chunks by more.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 3e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 3e-2}


@pytest.fixture(scope="session")
def work(dtype_name: str, pytestconfig: pytest.Config) -> Iterator[Work]:
    rows = pytestconfig.getoption("--rows") or 1024
    hidden_size, vocab = pytestconfig.getoption("--hidden"), pytestconfig.getoption("--linear-vocab")
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[dtype_name]
    hidden = torch.randn(8, rows // 8, hidden_size, generator=generator).to(dtype)
    weight = (3 * hidden_size**-0.5 * torch.randn(vocab, hidden_size, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, hidden.shape[:2], generator=generator)
    yield Work.of(hidden, weight, labels, rounds=min(5, pytestconfig.getoption("--rounds")))


def record(
    benchmark, name: str, contender: str, dtype: str, work: Work, products: tuple[str, ...], share: float = 1.0
) -> None:
    """What the report needs to know. `products`: those that the work takes; `share`: of the rows, the valid ones."""
    benchmark.group = f"{name} {dtype}"
    benchmark.extra_info.update(
        work=name, contender=contender, dtype=dtype, peak_bytes=None, **work.facts(products, share)
    )


@functools.lru_cache(maxsize=1)
def ours(work: Work) -> tuple[Tensor, Tensor]:
    """Loss and dX by this package."""
    return step(qkernels_by("auto"), work, work.labels, True)()


@functools.lru_cache(maxsize=1)
def with_prompt(work: Work, percent: int) -> Work:
    """The first `percent` of each sequence are a prompt."""
    labels = work.labels.clone()
    labels[:, : labels.shape[1] * percent // 100] = IGNORE
    return replace(work, labels=labels)


@functools.lru_cache(maxsize=1)
def as_one_pair(work: Work) -> Work:
    return replace(work, hidden=work.hidden.reshape(2, -1, work.hidden.shape[-1]), labels=work.labels.reshape(2, -1))


def compare(benchmark, contender: str, work: Work, dtype_name: str, rounds: int) -> None:
    """Time a contender's step, once its loss and dX are seen to be those of this package."""
    loss, package = LINEAR_CONTENDERS[contender]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    if contender == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy came with torch 2.13")

    def check(result: tuple[Tensor, Tensor]) -> None:
        (value, gradient), (truth, expected) = result, ours(work)
        torch.testing.assert_close(value.float(), truth.float(), rtol=0, atol=LOSS_TOLERANCE[dtype_name])
        error = (gradient.float() - expected.float()).abs().amax()
        assert error <= GRADIENT_TOLERANCE[dtype_name] * expected.float().abs().amax(), "gradients differ"

    measure.benchmarked(benchmark, step(loss, work, work.labels, True), rounds, check=check)


TRAINED = PLANS["pair_chunks"][1]


@pytest.mark.parametrize("contender", LINEAR_CONTENDERS)
def test_linear_dpo(benchmark, contender: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Head and hidden states trained: logits, loss, dX and dW."""
    record(benchmark, "DPO from hidden states", contender, dtype_name, work, TRAINED)
    compare(benchmark, contender, work, dtype_name, pytestconfig.getoption("--rounds"))


@pytest.mark.parametrize("plan", PLANS)
def test_plans(benchmark, plan: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Each plan against the bare products that it is made of."""
    trains_head, products = PLANS[plan]
    work = work.timed_again()
    record(benchmark, f"Plan {plan}", f"qkernels, {plan}", dtype_name, work, products)
    measure.benchmarked(
        benchmark, step(qkernels_by(plan), work, work.labels, trains_head), pytestconfig.getoption("--rounds")
    )


def test_forward_only(benchmark, work: Work, dtype_name: str, pytestconfig) -> None:
    """Log-probs without gradients: one product."""
    work = work.timed_again()
    record(benchmark, "Log-probs only", "qkernels.linear_token_logps", dtype_name, work, ("logits",))
    measure.benchmarked(
        benchmark,
        lambda: qkernels.linear_token_logps(work.hidden, work.weight, work.labels),
        pytestconfig.getoption("--rounds"),
    )


@pytest.mark.parametrize("contender", LINEAR_CONTENDERS)
@pytest.mark.parametrize("percent", [50, 90])
def test_prompt(benchmark, percent: int, contender: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Prompt tokens: this package drops their rows before the first product. The floor is that of the other rows."""
    work = with_prompt(work, percent)
    valid = float((work.labels != IGNORE).double().mean())
    record(benchmark, f"DPO from hidden states, {percent} % prompt", contender, dtype_name, work, TRAINED, valid)
    compare(benchmark, contender, work, dtype_name, pytestconfig.getoption("--rounds"))


IN_CHUNKS = "qkernels, chunks of a tenth"


@pytest.mark.parametrize("contender", [*LINEAR_CONTENDERS, IN_CHUNKS])
def test_one_long_pair(benchmark, contender: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """All rows in one pair; once more where its logits do not fit the budget, so that they have to be made twice."""
    pair, rounds = as_one_pair(work), pytestconfig.getoption("--rounds")
    record(benchmark, "One long pair, from hidden states", contender, dtype_name, pair, TRAINED)
    if contender == IN_CHUNKS:
        budget = max(work.rows // 10, 1) * work.weight.shape[0] * 8
        measure.benchmarked(benchmark, step(qkernels_by("auto", budget), pair, pair.labels, True), rounds)
    else:
        compare(benchmark, contender, pair, dtype_name, rounds)


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
