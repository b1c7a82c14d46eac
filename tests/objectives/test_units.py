"""Units of losses: what a user's function declares, the plan it gets, and the check that it keeps its word."""

from __future__ import annotations

import pytest
import torch

from cases import make_head_batch
from qkernels import fused_linear_token_dpo, fused_token_dpo, objectives
from qkernels.objectives import declare_unit

pytestmark = pytest.mark.quick


def cauchy(scores, beta, width=1.0):
    return torch.log1p(((1 - beta * scores.margins) / width) ** 2)


def call(loss_type, pairs=3, chunk_rows=None, **options):
    batch = make_head_batch(pairs, 6, 12, 31, torch.float64, bias=False)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    budget = None if chunk_rows is None else chunk_rows * 31 * 8
    how = {"loss_type": loss_type, "reference_logps": 0.0, "max_chunk_bytes": budget, **options}
    out = fused_linear_token_dpo(hidden, weight, batch.labels, **how)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def fresh(function, unit):
    """A new function object with a declared unit, which has not been checked yet."""
    return declare_unit(unit)(lambda scores, beta: function(scores, beta))


@pytest.mark.parametrize("chunk_rows", [None, 13])
def test_a_declared_pair_takes_three_products(chunk_rows):
    plain, *expected = call(cauchy, chunk_rows=chunk_rows)
    declared, *found = call(fresh(cauchy, "pair"), chunk_rows=chunk_rows)
    assert (plain.plan.name, plain.plan.products) == ("recompute", 4)
    assert (declared.plan.name, declared.plan.products) == ("pair_chunks", 3)
    assert declared.plan.chunks == (1 if chunk_rows is None else 3)
    torch.testing.assert_close(declared.loss, plain.loss)
    torch.testing.assert_close(found, expected)
    assert call(fresh(cauchy, "batch"))[0].plan.name == "recompute"


BROKEN = {
    "compares with the others": lambda scores, beta: (scores.margins - scores.margins.mean()) ** 2,
    "divides by the number of pairs": lambda scores, beta: cauchy(scores, beta) / len(scores.margins),
    "by the longest answer": lambda scores, beta: cauchy(scores, beta) / scores.chosen_counts.max(),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_unit_that_is_not_kept_is_found(broken):
    assert call(fresh(broken, "batch"))[0].plan.name == "recompute"
    with pytest.raises(ValueError, match=r"declares unit='pair', but the loss of pair \d+ depends on other pairs"):
        call(fresh(broken, "pair"))
    with pytest.raises(ValueError, match="declares unit='pair'"):
        fused_token_dpo(torch.randn(6, 4, 9), torch.zeros(6, 4, dtype=torch.long), reference_logps=0.0,
                        loss_type=fresh(broken, "pair"))  # fmt: skip


def test_the_check_runs_once(monkeypatch):
    seen = []
    loss = declare_unit("pair")(lambda scores, beta: seen.append(len(scores.margins)) or cauchy(scores, beta))
    call(loss)
    first = len(seen)
    call(loss)
    assert len(seen) - first == first - 2
    monkeypatch.setenv("QKERNELS_CHECK", "1")
    call(loss)
    assert len(seen) - first > first


def test_units_are_refused_by_name():
    with pytest.raises(ValueError, match="unit must be one of 'token', 'sequence', 'pair', 'batch', got 'row'"):
        declare_unit("row")
    with pytest.raises(ValueError, match=r"declares the unit 'token'.*'pair', 'batch'"):
        call(fresh(cauchy, "token"))
    with pytest.raises(ValueError, match="unit must be one of"):
        objectives.objective(unit="sequence")


@pytest.mark.parametrize("how", ["auto", "recompute", "logits", "none"])
def test_a_callers_likelihood_term_is_a_pairs_own(how):
    """Whatever computes the loss, and in whatever order: its mean over the batch does not count as other pairs."""

    def likelihood(scores, beta):
        return scores.chosen_nll - beta * scores.margins

    loss = fresh(likelihood, "pair")
    if how == "logits":
        fused_token_dpo(torch.randn(6, 4, 9), torch.ones(6, 4, dtype=torch.long), reference_logps=0.0, loss_type=loss)
    elif how == "none":
        batch = make_head_batch(3, 6, 12, 31, torch.float64, bias=False)
        options = {"reference_logps": 0.0, "loss_type": loss, "reduction": "none"}
        fused_linear_token_dpo(batch.hidden, batch.weight, batch.labels, **options)
    else:
        call(loss, plan=how)
    with pytest.raises(ValueError, match="depends on other pairs"):
        call(fresh(lambda scores, beta: likelihood(scores, beta) + scores.chosen_counts.sum(), "pair"))


def test_a_constant_of_a_pair_has_no_gradient():
    out, *gradients = call(fresh(lambda scores, beta: scores.chosen_counts * 0 + 1.0, "pair"))
    assert out.loss.item() == 1 and not any(gradient.any() for gradient in gradients)


def test_likelihood_terms_are_known_pair_by_pair():
    """Tokens of the batch are counted before: ORPO and CPO take three GEMMs, over several chunks too."""
    for name in ("orpo", "cpo", "alphapo"):
        small, *found = call(name, chunk_rows=13)
        large, *expected = call(name, plan="recompute")
        assert (small.plan.name, small.plan.chunks, small.plan.products) == ("pair_chunks", 3, 3)
        torch.testing.assert_close(small.loss, large.loss)
        torch.testing.assert_close(found, expected)
