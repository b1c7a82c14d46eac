"""The check of the checks: a backend that is wrong by 1 % in one place must fail the comparison made for that place.

Each test wraps one operation of a backend's module, so that everything above it (functional, autograd, objectives) and
the comparison itself are those of the real tests. Each first runs unharmed, so that it cannot fail for another reason.
"""

from __future__ import annotations

import pytest
import torch

import oracle
from cases import IGNORE, make_pairs, make_rows, pack
from comparisons import check_gradient, check_logps, check_outputs, check_preference, random_upstream
from mutations import SLIGHTLY, expect_failure, perturb_field
from oracle import Options
from qkernels import objectives
from qkernels.backends import takes
from qkernels.core.calls import RowGrad
from qkernels.core.coefficients import COEFFICIENTS

PLAIN = (torch.float32, torch.bfloat16)


def rows_for(backend, dtype):
    rows = make_rows((3, 4), 67, dtype, backend.device, temperature=0.8)
    assert bool((rows.labels == IGNORE).any())
    return rows


def perturb_gradient(monkeypatch, backend, change) -> object:
    """Make `row_grad` and `row_grad_` write `change(gradient, labels)`."""
    real, real_ = backend.module.row_grad, backend.module.row_grad_

    @takes(RowGrad)
    def wrong(call):
        return change(real(call), call.labels)

    @takes(RowGrad)
    def wrong_(call):
        real_(call)
        call.logits.copy_(change(call.logits.clone(), call.labels))

    def perturb():
        monkeypatch.setattr(backend.module, "row_grad", wrong)
        monkeypatch.setattr(backend.module, "row_grad_", wrong_)

    return perturb


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", oracle.STATS)
def test_every_output_is_checked(backend, dtype, name, monkeypatch):
    rows = rows_for(backend, dtype)
    expect_failure(lambda: check_outputs(backend, rows, (name,)), perturb_field(monkeypatch, backend, name))
    with pytest.raises(AssertionError):
        check_outputs(backend, rows)
    if name == "logps":
        with pytest.raises(AssertionError):
            check_logps(backend, rows)


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("name", [name for name in oracle.STATS if name != "is_top1"])
def test_output_bounds_are_tight(backend, dtype, name, monkeypatch):
    """An error in the fifth digit is seen, too."""
    rows = rows_for(backend, dtype)
    perturb = perturb_field(monkeypatch, backend, name, 1 + 2e-5)
    expect_failure(lambda: check_outputs(backend, rows, (name,)), perturb)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize(
    "field, output",
    [("row_max", "logps"), ("log_sum", "logps"), ("logps", "logps"), ("row_max", "entropy"), ("log_sum", "entropy"),
     ("entropy", "entropy"), ("kl_policy_reference", "kl_policy_reference"),
     ("reference_row_max", "kl_reference_policy"), ("reference_log_sum", "kl_reference_policy"),
     ("reference_row_max", "kl_policy_reference"), ("reference_log_sum", "kl_policy_reference")],
)  # fmt: skip
def test_the_state_of_the_backward_is_checked(backend, dtype, field, output, monkeypatch):
    """What the forward saves for the backward shows in the gradient only."""
    rows = rows_for(backend, dtype)
    upstream = random_upstream(rows, (output,))
    # A row maximum close to 0 hardly changes by 1 %: shift all logits.
    rows.logits, rows.reference = rows.logits + 4, rows.reference + 4
    # Of the softmax statistics, `logps` reaches only the label's own entry, as exp(logp) - 1.
    factor = 1.05 if field == "logps" else SLIGHTLY
    expect_failure(lambda: check_gradient(backend, rows, upstream), perturb_field(monkeypatch, backend, field, factor))


def scaled_everywhere(grad, labels):
    return grad * SLIGHTLY


def scaled_at_the_label(grad, labels):
    at = labels.clamp_min(0).unsqueeze(-1)
    return grad.scatter(-1, at, grad.gather(-1, at) * SLIGHTLY)


def scaled_in_the_last_column(grad, labels):
    grad = grad.clone()
    grad[..., -1] *= SLIGHTLY
    return grad


def scaled_in_one_row(grad, labels):
    grad = grad.clone()
    grad.view(-1, grad.shape[-1])[3] *= SLIGHTLY
    return grad


def nonzero_in_ignored_rows(grad, labels):
    return torch.where((labels == IGNORE).unsqueeze(-1), torch.full_like(grad, 1e-6), grad)


def smallest_entries_dropped(grad, labels):
    """A cut-off far below the row's largest entry: what a bound relative to the row alone would not see."""
    return torch.where(grad.abs() < 1e-6 * grad.abs().amax(-1, keepdim=True), torch.zeros_like(grad), grad)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
def test_every_gradient_is_checked(backend, dtype, name, inplace, monkeypatch):
    rows = rows_for(backend, dtype)
    upstream = random_upstream(rows, (name,))

    def check():
        fresh = make_rows((3, 4), 67, dtype, backend.device, temperature=0.8)  # the in-place gradient overwrites it
        check_gradient(backend, fresh, upstream, inplace_backward=inplace)

    expect_failure(check, perturb_gradient(monkeypatch, backend, scaled_everywhere))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize(
    "change",
    [scaled_at_the_label, scaled_in_the_last_column, scaled_in_one_row, nonzero_in_ignored_rows,
     smallest_entries_dropped],
)  # fmt: skip
def test_every_place_of_a_gradient_is_checked(backend, dtype, change, monkeypatch):
    rows = make_rows((3, 4), 67, dtype, backend.device, temperature=0.8, scale=6.0)
    for outputs in (("logps",), oracle.WITH_GRADIENT):
        upstream = random_upstream(rows, outputs)
        with monkeypatch.context() as patch:
            perturb = perturb_gradient(patch, backend, change)
            expect_failure(lambda u=upstream: check_gradient(backend, rows, u), perturb)


@pytest.mark.dtypes(torch.float32)
def test_gradient_bounds_are_tight(backend, dtype, monkeypatch):
    """Section 6 of the design: relative 1e-5; 3e-5 is too much."""
    rows = rows_for(backend, dtype)
    upstream = random_upstream(rows, ("logps",))
    perturb = perturb_gradient(monkeypatch, backend, lambda grad, labels: grad * (1 + 3e-5))
    expect_failure(lambda: check_gradient(backend, rows, upstream), perturb)


@pytest.mark.dtypes(torch.bfloat16, torch.float16)
def test_two_ulps_are_too_many(backend, dtype, monkeypatch):
    rows = rows_for(backend, dtype)
    upstream = random_upstream(rows, ("logps",))

    def two_more(grad, labels):
        return (grad.view(torch.int16) + 2).view(dtype)

    expect_failure(lambda: check_gradient(backend, rows, upstream), perturb_gradient(monkeypatch, backend, two_more))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("which", COEFFICIENTS)
def test_every_coefficient_is_checked(backend, dtype, which, monkeypatch):
    """The five numbers per row that the backward kernel is given."""
    rows = rows_for(backend, dtype)
    upstream = random_upstream(rows, oracle.WITH_GRADIENT)
    real = backend.module.row_grad

    @takes(RowGrad)
    def wrong(call):
        coefficients = call.coefficients.clone()
        coefficients[COEFFICIENTS.index(which)] *= 1.02
        return real(call._replace(coefficients=coefficients))

    expect_failure(
        lambda: check_gradient(backend, rows, upstream),
        lambda: monkeypatch.setattr(backend.module, "row_grad", wrong),
    )


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "which", ["loss", "rewards", "gradient", "gradient of one token", "token rewards", "reference of tokens"]
)
def test_the_default_loss_is_checked(backend, dtype, which, packed, monkeypatch):
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    batch = pack(batch) if packed else batch
    real = backend.module.pair_loss

    def wrong(*args):
        results = dict(zip(("loss", "rewards", "gradient", "tokens"), real(*args), strict=True))
        if which in results:
            results[which] = results[which] * SLIGHTLY
        elif which == "gradient of one token":
            place = int(results["gradient"].abs().argmax())
            results["gradient"].view(-1)[place] *= SLIGHTLY
        else:
            results["tokens"][int(which == "reference of tokens")] *= SLIGHTLY
        return tuple(results.values())

    expect_failure(
        lambda: check_preference(backend, batch), lambda: monkeypatch.setattr(backend.module, "pair_loss", wrong)
    )


@pytest.mark.dtypes(*PLAIN)
def test_the_upstream_gradient_is_checked(backend, dtype, monkeypatch):
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    real = backend.module.row_grad

    def wrong(call):
        return real(call._replace(upstream=call.upstream * SLIGHTLY))

    expect_failure(
        lambda: check_preference(backend, batch, upstream=-2.5),
        lambda: monkeypatch.setattr(backend.module, "row_grad", wrong),
    )


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_is_checked(backend, dtype, name, monkeypatch):
    """Loss and gradient of each formula, through the path that does not use `pair_loss`."""
    batch = make_pairs(2, 6, 30, dtype, backend.device, scale=1.5)
    options = Options(beta=0.3, label_smoothing=0.1 if objectives.OBJECTIVES[name].smoothing else 0.0)
    real = objectives.LossSpec.losses

    def run():
        check_preference(backend, batch, name, options=options, reduction="sum")

    expect_failure(
        run, lambda: monkeypatch.setattr(objectives.LossSpec, "losses", lambda *args: real(*args) * SLIGHTLY)
    )
    # The value alone, with the right gradient, and the gradient alone, with the right value.
    for perturb in (
        lambda loss: loss + 0.01 * loss.detach(),
        lambda loss: loss * SLIGHTLY - 0.01 * loss.detach(),
    ):
        monkeypatch.setattr(objectives.LossSpec, "losses", lambda *args, _perturb=perturb: _perturb(real(*args)))
        with pytest.raises(AssertionError):
            run()


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("field", ["logps", "reference_logps", "kl_reference_policy", "log_sum_sq_probs"])
def test_what_objectives_read_is_checked(backend, dtype, field, monkeypatch):
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    name = "tdpo1" if field == "kl_reference_policy" else "ipo"
    expect_failure(
        lambda: check_preference(backend, batch, name, use_weighting=True), perturb_field(monkeypatch, backend, field)
    )
