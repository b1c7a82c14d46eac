"""Default DPO stands twice: as the objective `sigmoid`, and in one launch as the backends' `pair_loss`. They agree.

The Triton kernel is compared the same way in `tests/support/triton_checks.py`, which `test_triton.py` runs.
"""

from __future__ import annotations

import pytest
import torch

from fused_default import CASES, Case, check_fused_default
from mutations import SLIGHTLY, expect_failure
from qkernels import objectives

BOTH = (torch.float32, torch.float64)
FULL = Case("packed", "per token", weighted=True, label_smoothing=0.2)


@pytest.mark.quick
@pytest.mark.dtypes(*BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pair_loss_is_the_objective(backend, dtype, case):
    check_fused_default(backend, dtype, case)


def test_the_objective_says_that_it_is_fused():
    fused = {name: term.fused for name, term in objectives.OBJECTIVES.items() if term.fused}
    assert fused == {"sigmoid": "pair_loss"}
    assert objectives.resolve("sigmoid").is_default and objectives.resolve("sigmoid", label_smoothing=0.2).is_default


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("output", ["loss", "rewards", "grad", "tokens"])
def test_a_fused_result_off_by_one_percent_is_found(backend, dtype, output, monkeypatch):
    real, place = backend.module.pair_loss, ("loss", "rewards", "grad", "tokens").index(output)

    def wrong(*args):
        results = list(real(*args))
        results[place] = results[place] * SLIGHTLY
        return tuple(results)

    expect_failure(
        lambda: check_fused_default(backend, dtype, FULL),
        lambda: monkeypatch.setattr(backend.module, "pair_loss", wrong),
    )


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("change", ["loss", "beta", "label_smoothing"])
def test_an_objective_off_by_one_percent_is_found(backend, dtype, change):
    def wrong(scores, beta, label_smoothing):
        how = {"beta": beta, "label_smoothing": label_smoothing}
        factor = SLIGHTLY if change == "loss" else 1.0
        if change != "loss":
            how[change] *= SLIGHTLY
        return factor * objectives.sigmoid(scores, **how)

    check_fused_default(backend, dtype, FULL)
    with pytest.raises(AssertionError):
        check_fused_default(backend, dtype, FULL, wrong)
