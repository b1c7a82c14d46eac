"""Vocabulary and positions split over real processes: results and gradients are those of one process.

The checks themselves run on the ranks: `distributed_checks.py`.
"""

from __future__ import annotations

import pytest
import torch

import distributed_checks as checks
from processes import Ranks

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(params=[2, 4])
def ranks(request, two, four):
    return two if request.param == 2 else four


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the vocabulary, from logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("vocab", [13, 67])
def test_rows_of_logits(ranks, dtype, vocab):
    ranks.run(checks.rows_of_logits, dtype, "auto", vocab)


def test_rows_of_logits_on_each_backend(two, backend):
    two.run(checks.rows_of_logits, torch.float32, backend.name, 67)


def test_rows_of_logits_in_place(two):
    two.run(checks.rows_of_logits, torch.bfloat16, "auto", 67, True)


# others and label of each model, entropy, sum of squares, mean, top-1, both divergences; then what the backward takes
@pytest.mark.parametrize("column", [*map(str, (0, 1, 2, 3, 4, 5, 6, 8, 9)), "state", "coefficients"])
def test_every_sum_is_checked(two, column):
    for error in two.run(checks.spoiled_rows, column):
        assert "values are wrong" in error


def test_hard_rows(ranks, backend):
    ranks.run(checks.hard_rows, backend.name)


LOSSES = [
    ("sigmoid", False, "live", {}, {}),
    ("sigmoid", True, "token", {}, {"label_smoothing": 0.1, "token_weights": True}),
    ("ipo", False, "sequence", {}, {"reduction": "none"}),
    ("tdpo2", False, "live", {}, {"temperature": 0.7, "reduction": "sum"}),
    ("simpo", True, "none", {}, {}),
    (["sigmoid", "sft"], False, "token", {"ld_alpha": 0.4, "use_weighting": True}, {"loss_weights": [1.0, 0.5]}),
    ("sigmoid_norm", True, "token", {"ld_alpha": 0.4}, {"token_weights": True}),
    ("aot", False, "live", {}, {}),
]  # fmt: skip


def named(loss) -> str:
    loss_type, packed, reference, kwargs, options = loss
    return "-".join(map(str, (loss_type, "packed" if packed else "dense", reference, *kwargs, *options)))


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_losses_from_logits(two, loss):
    two.run(checks.losses_from_logits, *loss)


# --- the vocabulary, from hidden states ------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["frozen_head", "pair_chunks", "recompute"])
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("chunks", [False, True], ids=["one chunk", "chunks"])
def test_losses_from_hidden(ranks, plan, dtype, chunks):
    ranks.run(checks.losses_from_hidden, dtype, plan, {"temperature": 0.8}, {}, True, chunks)


@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
def test_losses_from_hidden_with_everything(two, plan):
    options = {"softcap": 5.0, "logit_scale": 1.2, "temperature": 0.8}
    two.run(checks.losses_from_hidden, torch.float32, plan, options, {"loss_type": "tdpo1"}, True, True)


def test_losses_from_hidden_without_a_live_reference(two):
    loss = {"loss_type": "aot_unpaired", "reduction": "sum"}
    two.run(checks.losses_from_hidden, torch.float32, "recompute", {}, loss, False, False)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("chunks", [False, True], ids=["one chunk", "chunks"])
def test_stats_from_hidden(ranks, dtype, chunks):
    ranks.run(checks.stats_from_hidden, dtype, chunks)
