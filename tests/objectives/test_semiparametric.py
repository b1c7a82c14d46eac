"""Losses with a learned link: against definitions written out without pooling, interpolation or log space."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assertions import assert_within
from cases import generator, make_pairs
from qkernels import PairScores, fused_linear_token_dpo, fused_token_dpo, objectives
from qkernels.objectives.learned_link import OSPO, PSPO, isotonic_fit


def scores_of(margins: torch.Tensor) -> PairScores:
    """Pair scores with these D, in which nothing else matters."""
    zeros = torch.zeros_like(margins)
    return PairScores(margins, zeros, zeros, zeros, zeros, zeros, zeros + 1, zeros + 1)


def normal(n: int, seed: int, shift: float = 0.5) -> torch.Tensor:
    return torch.randn(n, generator=generator(seed), dtype=torch.float64) + shift


def train(loss, batches, beta=1.0):
    """Show batches of margins to a loss, as training steps."""
    return [loss(scores_of(m.clone().requires_grad_()), beta) for m in batches]


# --- the isotonic fit -------------------------------------------------------------------------------------------------


def by_min_max(values, weights):
    """The isotonic regression as max over starts of the min over ends of weighted means: no pooling."""

    def mean(a, b):
        return sum(v * w for v, w in zip(values[a:b], weights[a:b], strict=True)) / sum(weights[a:b])

    n = len(values)
    return [max(min(mean(a, b) for b in range(i + 1, n + 1)) for a in range(i + 1)) for i in range(n)]


@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=12), seed=st.integers(0, 9)
)
def test_isotonic_fit(values, seed):
    weights = [random.Random(seed + i).choice([0.5, 1.0, 2.0]) for i in range(len(values))]
    fitted = isotonic_fit(values, weights)
    assert fitted == pytest.approx(by_min_max(values, weights), abs=1e-12)
    assert fitted == sorted(fitted)
    assert isotonic_fit(values) == pytest.approx(by_min_max(values, [1.0] * len(values)), abs=1e-12)


def test_isotonic_fit_refuses_weights():
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="2 numbers above 0"):
            isotonic_fit([1.0, 2.0], weights)


# --- OSPO -------------------------------------------------------------------------------------------------------------


def kernel_regression(t: float, past: list[float], bandwidth: float) -> float:
    """Nadaraya-Watson on (t_m, 1) and (-t_m, 0)."""
    points = [(p, 1.0) for p in past] + [(-p, 0.0) for p in past]
    spread = math.sqrt(sum(p * p for p, _ in points) / len(points))
    h = bandwidth * spread * len(points) ** -0.2
    kernel = [math.exp(-((t - p) ** 2) / (2 * h * h)) for p, _ in points]
    return sum(k * z for k, (_, z) in zip(kernel, points, strict=True)) / sum(kernel)


@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_ospo_is_a_kernel_regression_over_the_memory(bandwidth, beta):
    past, now = normal(20, 1), normal(6, 2).requires_grad_()
    loss = OSPO(memory=50, warm_up=20, bandwidth=bandwidth)
    train(loss, past.split(5), beta)
    values = loss(scores_of(now), beta)
    remembered = (beta * past).tolist()
    expected = [-math.log(kernel_regression(beta * t, remembered, bandwidth)) for t in now.tolist()]
    assert_within(values, torch.tensor(expected, dtype=torch.float64), 1e-10, "loss")
    (slope,) = torch.autograd.grad(values.sum(), now)
    step = 1e-6
    for i, t in enumerate(now.tolist()):
        up, down = (-math.log(kernel_regression(beta * x, remembered, bandwidth)) for x in (t + step, t - step))
        assert slope[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-7)


def test_ospo_keeps_its_slope_far_from_the_memory():
    """A plain sum of kernels is 0 / 0 there."""
    loss = OSPO(warm_up=10)
    train(loss, [normal(10, 3)])
    far = torch.tensor([-300.0, 300.0], dtype=torch.float64, requires_grad=True)
    values = loss(scores_of(far), 1.0)
    assert values.isfinite().all() and values[0] > 100 and values[1] < 1e-6
    (slope,) = torch.autograd.grad(values.sum(), far)
    assert slope[0] < -0.1


# --- PSPO -------------------------------------------------------------------------------------------------------------


def profiled_link(t: float, past: list[float], floor: float) -> float:
    """The isotonic fit of (t_m, 1), (-t_m, 0) by the min-max formula, pools at their means, linear between."""
    points = sorted([(p, 1.0) for p in past] + [(-p, 0.0) for p in past])
    fitted = by_min_max([z for _, z in points], [1.0] * len(points))
    pools: dict[float, list[float]] = {}
    for (place, _), height in zip(points, fitted, strict=True):
        pools.setdefault(round(height, 12), []).append(place)
    knots = [(sum(p) / len(p), min(max(h, floor), 1 - floor)) for h, p in sorted(pools.items())]
    if t <= knots[0][0]:
        return knots[0][1]
    for (a, low), (b, high) in itertools.pairwise(knots):
        if t <= b:
            return low + (high - low) * (t - a) / (b - a)
    return knots[-1][1]


def test_pspo_is_the_likelihood_under_the_profiled_link():
    past, now = normal(18, 4, 0.3), normal(7, 5, 0.3).requires_grad_()
    loss = PSPO(memory=50, warm_up=18, logistic_share=0.05, floor=1e-3)
    train(loss, past.split(6))
    values = loss(scores_of(now), 1.0)

    def truth(t: float) -> float:
        mixed = 0.95 * profiled_link(t, past.tolist(), 1e-3) + 0.05 / (1 + math.exp(-t))
        return -math.log(min(max(mixed, 1e-3), 1 - 1e-3))

    assert_within(values, torch.tensor([truth(t) for t in now.tolist()], dtype=torch.float64), 1e-10, "loss")
    (slope,) = torch.autograd.grad(values.sum(), now)
    expected = [(truth(t + 1e-6) - truth(t - 1e-6)) / 2e-6 for t in now.tolist()]
    assert_within(slope, torch.tensor(expected, dtype=torch.float64), 1e-5, "slope")
    assert bool((slope != 0).all())
    for t in (-9.0, -0.2, 0.0, 0.4, 9.0):
        assert loss.link(t) == pytest.approx(profiled_link(t, past.tolist(), 1e-3), abs=1e-12)
        assert loss.link(t) + loss.link(-t) == pytest.approx(1.0, abs=1e-12)


def test_pspo_fits_again_after_so_many_steps():
    loss = PSPO(warm_up=8, refit=3)
    batches = [normal(8, seed) for seed in range(10)]
    fits = []
    for batch in batches:
        train(loss, [batch])
        fits.append(loss.knots)
    changes = [i for i in range(1, 10) if fits[i] is not fits[i - 1]]
    assert changes == [1, 4, 7]


def test_equal_margins_have_one_knot():
    """Ties, in which the order of the points must not decide: t = 0 says nothing, whichever side comes first."""
    where, levels = PSPO().fit([0.0, 0.0, 1.0, 1.0])
    assert where == [-1.0, 0.0, 1.0]
    assert levels == pytest.approx([1e-4, 0.5, 1 - 1e-4])


# --- both -------------------------------------------------------------------------------------------------------------


def test_pspo_on_the_data_waits_for_its_fits():
    """Plain DPO until the first fit; the link of the fit, and no other, until the next one."""
    loss = PSPO(warm_up=8, refit=2, refit_on="data", logistic_share=0.0)
    batches = [normal(8, seed) for seed in range(4)]
    data = normal(50, 9)
    assert not loss.refit_due
    (before,) = train(loss, batches[:1])
    assert loss.refit_due and torch.equal(before, -torch.nn.functional.logsigmoid(batches[0]))
    (late,) = train(loss, batches[1:2])
    assert torch.equal(late, -torch.nn.functional.logsigmoid(batches[1])), "nobody has passed the data"
    with pytest.raises(ValueError, match="t must hold a finite number other than 0"):
        loss.fit_to(torch.tensor([0.0, float("nan")]))
    loss.fit_to(torch.cat([data, torch.tensor([float("inf")], dtype=torch.float64)]))
    knots = loss.knots
    assert knots == loss.fit(data.tolist()) and not loss.refit_due
    twin = PSPO(warm_up=8, refit=2, refit_on="data", logistic_share=0.0)
    (after,) = train(loss, batches[2:3])
    assert after.tolist() == pytest.approx([-math.log(loss.link(t)) for t in batches[2].tolist()], rel=1e-6)
    twin.load_state_dict(loss.state_dict())
    for one in (loss, twin):
        assert one.knots == knots and not one.refit_due
        train(one, batches[3:])
        assert one.refit_due and one.knots == knots
    with pytest.raises(ValueError, match='refit_on must be "memory" or "data"'):
        PSPO(refit_on="everything")


@pytest.mark.parametrize("kind", [OSPO, PSPO])
def test_the_sign_is_that_of_the_covariance_with_the_label(kind):
    for shift, sign in ((0.5, 1.0), (-0.5, -1.0)):
        loss = kind(warm_up=16)
        assert loss.sign == 1.0
        t = normal(200, 3, shift)
        train(loss, [t])
        mirrored, labels = torch.cat([t, -t]), torch.cat([torch.ones(200), torch.zeros(200)]).double()
        assert loss.sign == sign == math.copysign(1, torch.cov(torch.stack([mirrored, labels]))[0, 1])
        with loss.collecting() as seen, torch.no_grad():
            loss(scores_of(t), 2.0)
        assert torch.equal(torch.cat(seen), 2.0 * t) and len(loss.past) == 200


@pytest.mark.parametrize("kind", [OSPO, PSPO])
def test_until_warm_and_without_spread_it_is_dpo(kind):
    loss = kind(warm_up=12)
    first = torch.zeros(6, dtype=torch.float64)
    for batch in [first, first, first, normal(6, 1)]:
        (value,) = train(loss, [batch], beta=0.3)
        assert_within(value, -torch.nn.functional.logsigmoid(0.3 * batch), 1e-12, "DPO")
    (value,) = train(loss, [normal(6, 2)], beta=0.3)
    assert (value + torch.nn.functional.logsigmoid(0.3 * normal(6, 2))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [OSPO, PSPO])
def test_only_training_enters_the_memory_and_the_latest_pairs_stay(kind):
    loss = kind(memory=7, warm_up=3)
    batches = [normal(4, seed) for seed in range(3)]
    train(loss, batches, beta=0.5)
    assert loss.past.tolist() == pytest.approx((0.5 * torch.cat(batches))[-7:].tolist())
    before = loss.state_dict()
    loss(scores_of(normal(4, 9)), 0.5)
    with torch.no_grad():
        loss(scores_of(normal(4, 9).requires_grad_()), 0.5)
    assert torch.equal(loss.past, before["past"]) and loss.seen == before["seen"] == 12
    train(loss, [torch.tensor([torch.inf, 1.0], dtype=torch.float64)])
    assert loss.past.isfinite().all()


@pytest.mark.parametrize("kind", [OSPO, PSPO])
def test_a_checkpoint_goes_on_where_it_stopped(kind):
    batches = [normal(8, seed) for seed in range(6)]
    whole, first = kind(warm_up=8), kind(warm_up=8)
    expected = train(whole, batches)
    train(first, batches[:3])
    second = kind(warm_up=8)
    second.load_state_dict(first.state_dict())
    for a, b in zip(train(second, batches[3:]), expected[3:], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="seen"):
        second.load_state_dict({"past": torch.zeros(1)})


@pytest.mark.parametrize("kind", [OSPO, PSPO])
def test_they_are_loss_types(kind):
    """Through logits and through hidden states: the same losses and gradients, reported by name when misused."""
    batch = make_pairs(4, 6, 20, torch.float64, key=(1,))
    weight = torch.randn(20, 5, generator=generator(1), dtype=torch.float64)
    hidden = torch.randn(8, 6, 5, generator=generator(2), dtype=torch.float64)
    by_logits, by_hidden = kind(warm_up=4), kind(warm_up=4)
    for step in range(3):
        moved = (hidden * (1 + 0.1 * step)).requires_grad_()
        also = moved.detach().clone().requires_grad_()
        shared = {"reference_logps": 0.0, "beta": 0.5}
        a = fused_token_dpo(moved @ weight.T, batch.labels, loss_type=by_logits, **shared)
        b = fused_linear_token_dpo(also, weight, batch.labels, loss_type=by_hidden, **shared)
        assert_within(b.loss, a.loss, 1e-10, "loss")
        a.loss.backward()
        b.loss.backward()
        assert_within(also.grad, moved.grad, 1e-10, "gradient")
        assert moved.grad.abs().max() > 0
    assert by_logits.seen == by_hidden.seen == 12
    plan = objectives.resolve([kind(), "sft"], [1.0, 0.5])
    assert not plan.separable
    with pytest.raises(ValueError, match=kind.__name__):
        objectives.resolve(kind(), label_smoothing=0.1)


def test_losses_of_a_run():
    """Names become objects with their options, and only they."""
    losses, rest = objectives.for_run(["ospo", "simpo", "pspo"], {"memory": 9, "bandwidth": 2.0, "gamma": 1.0})
    ospo, simpo, pspo = losses
    assert (ospo.memory, ospo.bandwidth, simpo, pspo.memory, rest) == (9, 2.0, "simpo", 9, {"gamma": 1.0})
    assert objectives.for_run(ospo, {"bandwidth": 1.0}) == ([ospo], {"bandwidth": 1.0})
    assert objectives.for_run("sigmoid") == (["sigmoid"], {})
    with pytest.raises(ValueError, match=r"\['bandwidth'\] unknown to loss_type OSPO; .* is made, .*: \['bandwidth'"):
        objectives.resolve(ospo, loss_kwargs={"bandwidth": 1.0})


def test_names_with_a_memory_say_how_they_are_had():
    for name in objectives.STATEFUL:
        with pytest.raises(ValueError, match="make an object"):
            objectives.resolve(name)
        assert callable(objectives.create(name)) and objectives.create(name) is not objectives.create(name)
    assert objectives.create("ospo", bandwidth=2.0).bandwidth == 2.0
    assert objectives.create("sigmoid") == "sigmoid"
    with pytest.raises(ValueError, match="unknown objective 'nope'"):
        objectives.create("nope")
    with pytest.raises(TypeError, match="loss_kwargs"):
        objectives.create("simpo", gamma=1.0)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (OSPO, {"memory": 0}, ValueError, "memory must be 1 or more"),
        (OSPO, {"memory": 2.5}, TypeError, "memory must be an int"),
        (OSPO, {"warm_up": 0}, ValueError, "warm_up must be 1 or more"),
        (OSPO, {"bandwidth": 0.0}, ValueError, "bandwidth must be finite and above 0"),
        (PSPO, {"refit": 0}, ValueError, "refit must be 1 or more"),
        (PSPO, {"refit": True}, TypeError, "refit must be an int"),
        (PSPO, {"logistic_share": 1.5}, ValueError, r"logistic_share must lie in \[0, 1\]"),
        (PSPO, {"floor": 0.5}, ValueError, "floor must lie in"),
    ],
)
def test_options_are_checked(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**options)
    with pytest.raises(ValueError, match="not fitted yet"):
        PSPO().link(0.0)


@pytest.mark.parametrize("name", ["ospo", "pspo", "rspo"])
def test_a_wrong_link_does_not_mislead_them(name):
    """A one-parameter policy whose preferences follow a link that is steep and saturates at 80 %: training on it
    raises the share of pairs ranked as the noiseless truth would, as DPO's does."""
    g = generator(31)
    features = torch.randn(1500, 3, generator=g, dtype=torch.float64)
    truth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    wins = torch.rand(1500, generator=g, dtype=torch.float64) < 0.2 + 0.6 * torch.sigmoid(20 * (features @ truth))
    x = torch.where(wins[:, None], features, -features)
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = objectives.create(name) if name == "rspo" else objectives.create(name, memory=1000)
    plan = objectives.resolve(loss)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for start in [i % 12 * 125 for i in range(72)]:
        optimizer.zero_grad()
        plan.losses(scores_of(x[start : start + 125] @ weights), 1.0).mean().backward()
        optimizer.step()
    direction = torch.nn.functional.cosine_similarity(weights.detach(), truth, dim=0)
    assert direction > 0.97
