"""The check of the checks of the hidden-states path: 1 % wrong in one place must fail the comparison made for it.

As in `test_mutations.py`, each test first runs unharmed, so that it cannot fail for another reason. What is perturbed
here lies between the row operations and the public functions: GEMMs, chunks, scales, plans.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from cases import make_head_batch
from linear_comparisons import check_linear_preference, check_linear_stats
from mutations import SLIGHTLY, expect_failure, perturb_field
from qkernels.autograd import head as autograd
from qkernels.functional import hidden_loss
from qkernels.functional.pair_chunks import PairChunks
from qkernels.head import chunks
from qkernels.head.products import Head, WeightGrad

PLAIN = (torch.float32, torch.bfloat16)
PLANS = ("frozen_head", "pair_chunks", "recompute")


def check_plan(backend, dtype, plan: str, **options):
    """A comparison in which this plan runs, in several chunks."""
    batch = make_head_batch(2, 7, 20, 41, dtype, backend.device)
    trains = "h" if plan == "frozen_head" else "hwb"

    def run():
        out, _ = check_linear_preference(backend, batch, plan=plan, trains=trains, chunk_rows=14, **options)
        assert out.plan.name == plan and out.plan.chunks > 1

    return run


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_every_gradient_is_checked(backend, dtype, plan, which, monkeypatch):
    """Each of the three, scaled by 1.01 as it leaves the passes."""
    name = {"pair_chunks": "known_gradients", "recompute": "gradients"}[plan]
    real = getattr(chunks, name)

    def perturbed(gradients):
        return tuple(
            g if g is None or part != which else g * SLIGHTLY
            for part, g in zip(("hidden", "weight", "bias"), gradients, strict=True)
        )

    def wrong(*args):
        result = real(*args)
        return (result[0], perturbed(result[1])) if plan == "pair_chunks" else perturbed(result)

    expect_failure(check_plan(backend, dtype, plan), lambda: monkeypatch.setattr(chunks, name, wrong))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("which", ["stats", "unit"])
def test_the_frozen_heads_pass_is_checked(backend, dtype, which, monkeypatch):
    real = chunks.unit_gradient

    def wrong(*args):
        stats, unit = real(*args)
        return (stats * SLIGHTLY, unit) if which == "stats" else (stats, unit * SLIGHTLY)

    perturb = lambda: monkeypatch.setattr(chunks, "unit_gradient", wrong)  # noqa: E731
    expect_failure(check_plan(backend, dtype, "frozen_head"), perturb)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_of_single_places_are_checked(backend, dtype, plan, monkeypatch):
    """One row of the hidden states wrong by 5 %, the first chunk left out, a chunk counted twice."""
    run = check_plan(backend, dtype, plan)
    real = Head.input_grad

    def one_row(self, g):
        dx = real(self, g).clone()
        dx[0] *= 1.05
        return dx

    with monkeypatch.context() as patch:
        expect_failure(run, lambda: patch.setattr(Head, "input_grad", one_row))
    if plan == "frozen_head":
        return
    for times in (0, 2):

        def some(self, g, x, *rest, _real=WeightGrad.add, _times=times):
            first = not hasattr(self, "seen")
            self.seen = True
            for _ in range(_times if first else 1):
                _real(self, g, x, *rest)

        with monkeypatch.context() as patch:
            expect_failure(run, lambda patch=patch, some=some: patch.setattr(WeightGrad, "add", some))


@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)
def test_rounded_logits_are_seen(backend, dtype, monkeypatch):
    """Logits rounded to 16 bits, or wrong by 1e-4: in values alone, without any gradient."""
    batch = make_head_batch(2, 6, 24, 61, dtype, backend.device)
    real = Head.logits

    def perturbed(change):
        def wrong(self, x, out):
            real(self, x, out)
            out.copy_(change(out))

        return wrong

    def run():
        check_linear_stats(backend, batch, ("logps",), trains="")

    narrow = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for change in (lambda z: z.to(narrow).to(z.dtype), lambda z: z * (1 + 1e-4), lambda z: z.roll(1, 0)):
        with monkeypatch.context() as patch:
            expect_failure(run, lambda patch=patch, c=change: patch.setattr(Head, "logits", perturbed(c)))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", oracle.STATS)
def test_every_output_is_checked(backend, dtype, name, monkeypatch):
    batch = make_head_batch(1, 6, 16, 40, dtype, backend.device)
    of_rows = name.removeprefix("reference_")  # the reference's rows are read by a call of their own
    expect_failure(
        lambda: check_linear_stats(backend, batch, (name,), trains=""), perturb_field(monkeypatch, backend, of_rows)
    )


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("what", ["softcap", "logit_scale", "temperature", "bias"])
@pytest.mark.parametrize("plan", PLANS)
def test_what_shapes_the_logits_is_checked(backend, dtype, plan, what, monkeypatch):
    """Each option of the head, off by 1 %, shows in values."""
    run = check_plan(backend, dtype, plan, softcap=3.0, logit_scale=0.8, temperature=1.4)
    real = chunks.Pass.__init__

    def wrong(self, call):
        if what == "bias":
            call = call._replace(policy=call.policy._replace(bias=call.policy.bias * 1.05))
        else:
            config = call.config._replace(**{what: getattr(call.config, what) * SLIGHTLY})
            call = call._replace(config=config)
        real(self, call)

    expect_failure(run, lambda: monkeypatch.setattr(chunks.Pass, "__init__", wrong))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
def test_the_slope_of_the_softcap_is_checked(backend, dtype, plan, monkeypatch):
    run = check_plan(backend, dtype, plan, softcap=3.0, logit_scale=0.8)
    real = Head.uncap

    def wrong(self, capped, grad, out):
        real(self._replace(softcap=self.softcap * 1.02), capped, grad, out)

    expect_failure(run, lambda: monkeypatch.setattr(Head, "uncap", wrong))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
def test_a_lost_upstream_gradient_is_seen(backend, dtype, plan, monkeypatch):
    run = check_plan(backend, dtype, plan, upstream=1.02)
    if plan == "recompute":
        real = chunks.gradients

        def wrong(call, softmax, coefficients, needs):
            return real(call, softmax, coefficients / 1.02, needs)

        perturb = lambda: monkeypatch.setattr(chunks, "gradients", wrong)  # noqa: E731
    elif plan == "frozen_head":
        real_scaled = autograd.scaled
        perturb = lambda: monkeypatch.setattr(  # noqa: E731
            autograd, "scaled", lambda values, factor, dtype: real_scaled(values, factor / 1.02, dtype)
        )
    else:

        class Forgetful(autograd.KnownGradient):
            @staticmethod
            def backward(ctx, grad):
                return autograd.KnownGradient.backward(ctx, torch.ones_like(grad))

        perturb = lambda: monkeypatch.setattr(hidden_loss, "KnownGradient", Forgetful)  # noqa: E731
    expect_failure(run, perturb)


@pytest.mark.dtypes(torch.float32)
def test_pairs_put_together_wrong_are_seen(backend, dtype, monkeypatch):
    """A chunk's chosen and rejected rows exchanged, a share of 1/B forgotten, weights of the wrong rows."""
    run = check_plan(backend, dtype, "pair_chunks", token_weights=None)
    real = PairChunks.__init__

    def exchanged(self, *args, **options):
        real(self, *args, **options)
        self.selections = [s.flip(0) if isinstance(s, Tensor) else s for s in self.selections]

    def summed(self, *args, **options):
        real(self, *args, **options)
        self.share = 1.0

    for wrong in (exchanged, summed):
        with monkeypatch.context() as patch:
            expect_failure(run, lambda p=patch, w=wrong: p.setattr(PairChunks, "__init__", w))
