"""Policy losses, KTO, ORPO and SimPO from hidden states: this package beside the bare GEMMs and its peers, in one run.

Before a peer is timed, its loss and gradients are compared with this package's (Liger's KTO takes no cached reference,
and its value is another one).
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from . import measure
from .contenders import installed
from .linear_work import PLANS, Work, step
from .loss_contenders import FORMULAS, LOSS_CONTENDERS, Batch, ours
from .test_linear import GRADIENT_TOLERANCE, LOSS_TOLERANCE, record, work

__all__ = ["work"]  # a fixture

TRAINED, FROZEN = PLANS["pair_chunks"][1], PLANS["frozen_head"][1]
IDLE = ("grpo", "cispo")


@functools.lru_cache(maxsize=1)
def batch_of(work: Work) -> Batch:
    return Batch.of(work.hidden, work.weight, work.labels)


@functools.lru_cache(maxsize=1)
def expected(name: str, work: Work) -> tuple[Tensor, Tensor]:
    """Loss and dX by this package."""
    return step(ours(name, batch_of(work)), work, work.labels, True)()


@pytest.mark.parametrize("contender", LOSS_CONTENDERS)
@pytest.mark.parametrize("name", FORMULAS)
def test_trained_head(benchmark, name: str, contender: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Head and hidden states trained: logits, loss, dX and dW."""
    make, package = LOSS_CONTENDERS[contender]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    record(benchmark, f"{name} from hidden states", contender, dtype_name, work, TRAINED)
    loss = step(make(name, batch_of(work)), work, work.labels, True)

    def check(result: tuple[Tensor, Tensor]) -> None:
        (value, gradient), (truth, exact) = result, expected(name, work)
        torch.testing.assert_close(value.float(), truth.float(), rtol=0, atol=LOSS_TOLERANCE[dtype_name])
        error = (gradient.float() - exact.float()).abs().amax()
        assert error <= GRADIENT_TOLERANCE[dtype_name] * exact.float().abs().amax(), "gradients differ"

    comparable = (name, contender) != ("kto", "Liger")
    measure.benchmarked(benchmark, loss, pytestconfig.getoption("--rounds"), check=check if comparable else None)


@pytest.mark.parametrize("name", FORMULAS)
def test_frozen_head(benchmark, name: str, work: Work, dtype_name: str, pytestconfig) -> None:
    """Hidden states trained: two GEMMs."""
    record(benchmark, f"{name}, frozen head", "qkernels", dtype_name, work, FROZEN)
    loss = step(ours(name, batch_of(work)), work, work.labels, False)
    measure.benchmarked(benchmark, loss, pytestconfig.getoption("--rounds"))


@pytest.mark.parametrize("trains_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", IDLE)
def test_half_of_the_advantages_zero(
    benchmark, name: str, trains_head: bool, work: Work, dtype_name: str, pytestconfig
) -> None:
    """Rows of advantage 0 leave the GEMMs of the backward. The floor is that of all rows."""
    head = "trained" if trains_head else "frozen"
    title = f"{name}, {head} head, half of the advantages 0"
    record(benchmark, title, "qkernels", dtype_name, work, TRAINED if trains_head else FROZEN)
    loss = step(ours(name, batch_of(work).half_idle()), work, work.labels, trains_head)
    measure.benchmarked(benchmark, loss, pytestconfig.getoption("--rounds"))
