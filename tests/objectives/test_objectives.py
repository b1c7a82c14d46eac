"""Preference losses from logits against formulas written out a second time: values, rewards and logit gradients."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from assertions import assert_within
from cases import IGNORE, PairBatch, generator, make_labels, make_pairs, normal, pack
from comparisons import check_preference
from oracle import Options
from qkernels import PairScores, fused_token_dpo, objectives, token_logps

PLAIN = (torch.float32, torch.bfloat16)

# Each objective with options under which it has a meaning.
CASES = {
    "sigmoid": Options(),
    "sigmoid_norm": Options(beta=1.5),
    "hinge": Options(beta=0.05),
    "ipo": Options(beta=0.4),
    "robust": Options(label_smoothing=0.2),
    "exo_pair": Options(label_smoothing=1e-3),
    "nca_pair": Options(),
    "bco_pair": Options(),
    "sppo_hard": Options(beta=0.5),
    "apo_zero": Options(),
    "apo_down": Options(),
    "discopop": Options(beta=0.05),
    "sft": Options(),
    "aot": Options(label_smoothing=0.1),
    "aot_unpaired": Options(label_smoothing=0.1),
    "tdpo1": Options(),
    "tdpo2": Options(),
    "simpo": Options(beta=2.0),
    "rspo": Options(),
    "orpo": Options(),
    "cpo": Options(label_smoothing=0.1),
    "alphapo": Options(beta=2.0),
}
# One that is fused, one that reads divergences, one that couples pairs: what runs with every backend in every dtype.
# `test_formulas.py` has each formula by itself.
END_TO_END = ("sigmoid", "tdpo2", "rspo")
# Functions of scores s = f(r), for which an f-divergence has a meaning.
SCORED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "tdpo1", "tdpo2", "rspo")


def batch_for(dtype, device, *, pairs=3, length=8, vocab=40, key=()) -> PairBatch:
    return make_pairs(pairs, length, vocab, dtype, device, key=key, scale=1.5)


def kwargs_of(name: str, options: Options) -> dict:
    """The `loss_kwargs` that say the same as the oracle's options."""
    own = {"discopop": {"discopop_tau": options.discopop_tau}, "tdpo2": {"alpha": options.alpha},
           "simpo": {"gamma": options.gamma}, "alphapo": {"gamma": options.gamma}}  # fmt: skip
    return own.get(name, {})


def test_every_objective_has_a_case_here():
    assert set(objectives.OBJECTIVES) == set(CASES)


@pytest.mark.nightly_except(dtype=PLAIN)
@pytest.mark.quick_cases(name=END_TO_END, dtype=(torch.float32,))
@pytest.mark.parametrize("name", CASES)
def test_objective_matches_its_formula(backend, dtype, name):
    check_preference(backend, batch_for(dtype, backend.device), name, options=CASES[name])


@pytest.mark.nightly_except(name=END_TO_END)
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_reductions(backend, dtype, name, reduction):
    upstream = torch.tensor([1.0, -2.0, 0.5]) if reduction == "none" else -1.5
    check_preference(
        backend, batch_for(dtype, backend.device), name, options=CASES[name], reduction=reduction, upstream=upstream
    )


@pytest.mark.nightly_except(name=END_TO_END)
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", CASES)
def test_dense_and_packed_are_the_same_data(backend, dtype, name):
    batch = batch_for(dtype, backend.device)
    dense, dense_grad = check_preference(backend, batch, name, options=CASES[name])
    for keep_ignored in (True, False):
        packed = pack(batch, keep_ignored=keep_ignored)
        out, grad = check_preference(backend, packed, name, options=CASES[name])
        keep = batch.labels == batch.labels if keep_ignored else batch.labels != IGNORE
        assert torch.equal(out.token_rewards, dense.token_rewards[keep])
        assert_within(out.loss, dense.loss, 1e-6 * (1 + dense.loss.double().abs().cpu()), "packed loss")
        allowed = 1e-5 * dense_grad.double().abs().amax().cpu() if dtype == torch.float32 else 2.0**-8
        assert_within(grad, dense_grad[keep], allowed, "packed gradient")


@pytest.mark.nightly_except(dtype=(torch.float32,))
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_label_smoothing_is_cdpo(backend, dtype, eps, reduction):
    batch = batch_for(dtype, backend.device)
    check_preference(backend, batch, "sigmoid", options=Options(beta=0.3, label_smoothing=eps), reduction=reduction)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", ["robust", "exo_pair", "aot", "aot_unpaired"])
@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_label_smoothing_of_the_other_objectives(backend, dtype, name, eps):
    check_preference(backend, batch_for(dtype, backend.device), name, options=Options(label_smoothing=eps))


@pytest.mark.nightly_except(name=("sigmoid", "nca_pair"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("beta", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "apo_down", "nca_pair", "tdpo1"])
def test_any_beta(backend, dtype, name, beta):
    check_preference(backend, batch_for(dtype, backend.device), name, options=Options(beta=beta))


@pytest.mark.quick
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "nca_pair", "bco_pair", "apo_zero", "apo_down",
                                  "aot", "tdpo1", "simpo", "rspo"])  # fmt: skip
def test_huge_margins_do_not_overflow(backend, name, sign):
    """beta * margin of about +-1500: the loss is the margin or 0, never inf or NaN."""
    logits = torch.zeros(2, 3, 5, device=backend.device)
    logits[0, :, 1] = 50.0 * sign
    logits[1, :, 1] = -50.0 * sign
    labels = torch.ones(2, 3, dtype=torch.int64, device=backend.device)
    batch = PairBatch(logits, labels, torch.zeros_like(logits))
    check_preference(backend, batch, name, options=Options(beta=5.0))


@pytest.mark.nightly_except(name=("sigmoid", "ipo"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "js_divergence", "alpha", "alpha_divergence"])
@pytest.mark.parametrize("name", SCORED)
def test_f_divergences(backend, dtype, divergence, name):
    options = Options(beta=0.2, f_divergence=divergence, label_smoothing=0.1 if name in ("robust", "exo_pair") else 0.0)
    batch = make_pairs(2, 6, 30, dtype, backend.device, scale=0.5)
    kwargs = {"f_divergence": divergence}
    if divergence.startswith("alpha"):
        for coefficient in (0.3, 2.0):
            options.f_alpha_divergence_coef = coefficient
            kwargs["f_alpha_divergence_coef"] = coefficient
            check_preference(backend, batch, name, options=options, loss_kwargs=kwargs)
    else:
        check_preference(backend, batch, name, options=options, loss_kwargs=kwargs)


def test_alpha_divergence_near_one_is_reverse_kl(backend):
    """(u^(a-1) - 1)/(a - 1) -> log u: no division by zero, no cancellation close to it."""
    batch = make_pairs(2, 6, 30, torch.float32, backend.device, scale=0.5)

    def loss(**kwargs):
        return fused_token_dpo(
            batch.logits, batch.labels, reference_logits=batch.reference, loss_kwargs=kwargs, backend=backend.name
        ).loss

    plain = loss()
    for coefficient in (1.0, 1 + 1e-9, 1 - 1e-7, 1 + 1e-5):
        near = loss(f_divergence="alpha", f_alpha_divergence_coef=coefficient)
        assert_within(near, plain.double(), 1e-4, f"alpha {coefficient}")


@pytest.mark.nightly_except(name=("sigmoid", "sigmoid_norm", "aot", "sft"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm", "aot", "tdpo1", "simpo", "sft"])
@pytest.mark.parametrize("packed", [False, True])
def test_ld_dpo_discounts_the_tokens_past_the_shorter_answer(backend, dtype, name, alpha, packed):
    batch = batch_for(dtype, backend.device, length=12)
    lengths = (batch.labels != IGNORE).sum(1)
    assert bool((lengths[:3] != lengths[3:]).any())
    if alpha == 0:  # the discounted rows count for nothing, so they are rows of zero weight: only the sums are compared
        weights = ld_weights(batch.labels, 0.0)
        expected = oracle.preference(
            batch.logits, batch.labels, batch.reference, loss_type=name, options=CASES[name], ld_alpha=0.0
        )
        batch = pack(batch) if packed else batch
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, beta=CASES[name].beta, loss_type=name,
            label_smoothing=CASES[name].label_smoothing, loss_kwargs={"ld_alpha": 0.0}, cu_seqlens=batch.cu_seqlens,
            backend=backend.name,
        )  # fmt: skip
        assert_within(out.loss, expected.loss, 1e-5 * (1 + expected.loss.abs()), "loss")
        out.loss.backward()
        if name != "sft":  # which LD-DPO leaves alone
            assert bool((leaf.grad.view(6, 12, -1)[weights == 0] == 0).all())
        return
    batch = pack(batch) if packed else batch
    check_preference(backend, batch, name, options=CASES[name], ld_alpha=alpha)


def ld_weights(labels, alpha):
    """Weights of LD-DPO, sequence by sequence."""
    valid = labels != IGNORE
    shared = torch.minimum(*valid.sum(1).chunk(2)).repeat(2)
    weights = torch.zeros(labels.shape)
    for i, row in enumerate(valid.tolist()):
        seen = 0
        for t, keep in enumerate(row):
            seen += keep
            weights[i, t] = 0.0 if not keep else 1.0 if seen <= shared[i] else alpha
    return weights


def test_ld_dpo_is_a_choice_of_token_weights(backend):
    batch = batch_for(torch.float32, backend.device, length=12)
    shared = {"reference_logits": batch.reference, "backend": backend.name}
    by_option = fused_token_dpo(batch.logits, batch.labels, loss_kwargs={"ld_alpha": 0.3}, **shared)
    by_weights = fused_token_dpo(
        batch.logits, batch.labels, token_weights=ld_weights(batch.labels.cpu(), 0.3).to(backend.device), **shared
    )
    assert torch.equal(by_option.loss, by_weights.loss)
    assert torch.equal(by_option.chosen_rewards, by_weights.chosen_rewards)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "bco_pair", "tdpo2", "simpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_wpo_weighs_pairs_by_likelihood_without_gradient(backend, dtype, name, packed):
    batch = batch_for(dtype, backend.device)
    batch = pack(batch) if packed else batch
    for reduction in ("mean", "sum"):
        check_preference(backend, batch, name, options=CASES[name], use_weighting=True, reduction=reduction)


@pytest.mark.dtypes(*PLAIN)
def test_wpo_with_discounted_tails(backend, dtype):
    batch = batch_for(dtype, backend.device, length=12)
    check_preference(backend, batch, "sigmoid", use_weighting=True, ld_alpha=0.4)


def test_wpo_does_not_depend_on_the_last_bit_of_ld_alpha(backend):
    """The WPO factor is a mean over all tokens of a sequence; discounting the tail to nothing does not change it."""
    batch = batch_for(torch.float32, backend.device, length=12)
    losses = [
        fused_token_dpo(
            batch.logits, batch.labels, reference_logits=batch.reference, backend=backend.name,
            loss_kwargs={"ld_alpha": alpha, "use_weighting": True},
        ).loss.item()
        for alpha in (0.0, 1e-6)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.quick_cases(weights=(None,))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("weights", [None, [0.8, 0.2, 1.0], [1.0, 0.0, -0.5]])
@pytest.mark.parametrize("packed", [False, True])
def test_several_objectives_at_once(backend, dtype, weights, packed):
    """MPO: sigmoid + bco_pair + sft, as its paper combines them."""
    batch = batch_for(dtype, backend.device)
    batch = pack(batch) if packed else batch
    for reduction in ("mean", "sum"):
        check_preference(backend, batch, ["sigmoid", "bco_pair", "sft"], loss_weights=weights, reduction=reduction)


def test_options_reach_the_objective_that_knows_them(backend):
    batch = batch_for(torch.float32, backend.device)
    options = Options(discopop_tau=0.3, alpha=0.8, gamma=0.1, label_smoothing=0.2, f_divergence="js")
    check_preference(
        backend, batch, ["sigmoid", "discopop", "tdpo2", "simpo"], loss_weights=[1.0, 0.5, 2.0, 0.1], options=options,
        loss_kwargs={"discopop_tau": 0.3, "alpha": 0.8, "gamma": 0.1, "f_divergence": "js"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["discopop", "tdpo2", "simpo"])
@pytest.mark.dtypes(*PLAIN)
def test_options_of_one_objective(backend, dtype, name):
    options = Options(beta=0.3, discopop_tau=0.7, alpha=0.1, gamma=1.2)
    batch = batch_for(dtype, backend.device)
    check_preference(backend, batch, name, options=options, loss_kwargs=kwargs_of(name, options))


def test_a_callable_on_pair_scores(backend):
    batch = batch_for(torch.float32, backend.device)

    def squared(scores: PairScores, beta: float) -> torch.Tensor:
        chosen = (scores.chosen_log_ratios - 1 / (2 * beta)) ** 2
        return chosen + (scores.rejected_log_ratios + 1 / (2 * beta)) ** 2

    check_preference(backend, batch, squared, truth_name="sppo_hard", options=Options(beta=0.5))
    check_preference(
        backend, batch, [squared, "ipo"], truth_name=["sppo_hard", "ipo"], loss_weights=[0.5, 2.0],
        options=Options(beta=0.5),
    )  # fmt: skip

    def without_beta(scores: PairScores, target: float = 3.0) -> torch.Tensor:
        return (scores.margins - target) ** 2

    out = fused_token_dpo(
        batch.logits, batch.labels, reference_logits=batch.reference, loss_type=without_beta, backend=backend.name,
        loss_kwargs={"target": 2.0}, reduction="none",
    )  # fmt: skip
    margins = (out.chosen_rewards - out.rejected_rewards) / 0.1
    assert_within(out.loss, (margins.double() - 2.0) ** 2, 1e-4, "callable without beta")

    def smoothed(scores: PairScores, label_smoothing: float) -> torch.Tensor:
        return scores.margins * 0 + label_smoothing

    smoothing = fused_token_dpo(
        batch.logits, batch.labels, reference_logits=batch.reference, loss_type=smoothed, backend=backend.name,
        label_smoothing=0.25,
    )  # fmt: skip
    assert smoothing.loss.item() == pytest.approx(0.25)


def test_pair_scores_are_sums_over_sequences(backend):
    """What a callable sees: every field, with weights, against sums written out."""
    batch = batch_for(torch.float32, backend.device)
    weights = torch.rand(batch.labels.shape, generator=generator(3)).to(backend.device)
    seen = {}

    def spy(scores):
        seen["scores"] = scores
        return scores.chosen_logps

    fused_token_dpo(
        batch.logits, batch.labels, reference_logits=batch.reference, loss_type=spy, token_weights=weights,
        backend=backend.name,
    )  # fmt: skip
    stats = oracle.token_stats(oracle.exact(batch.logits), batch.labels.cpu(), oracle.exact(batch.reference))
    truth = oracle.pairs(stats, batch.labels, token_weights=weights)
    scores = seen["scores"]
    for field, name in (
        ("chosen_log_ratios", "r_w"), ("rejected_log_ratios", "r_l"), ("chosen_logps", "logp_w"),
        ("rejected_logps", "logp_l"), ("reference_chosen_logps", "ref_w"), ("reference_rejected_logps", "ref_l"),
        ("chosen_counts", "n_w"), ("rejected_counts", "n_l"),
    ):  # fmt: skip
        expected = torch.tensor([float(getattr(pair, name)) for pair in truth], dtype=torch.float64)
        assert_within(getattr(scores, field), expected, 2e-5, field)
    assert scores.chosen_kl is None and scores.rejected_kl is None


@pytest.mark.nightly_except(packed=(False,))
@pytest.mark.parametrize("name", sorted(set(CASES) - {"hinge"}))
@pytest.mark.parametrize("packed", [False, True])
def test_training_can_start_from_the_reference(backend, name, packed):
    """At step 0 policy and reference are equal, and the gradient is that of the formula and not 0."""
    batch = batch_for(torch.float32, backend.device)
    batch.reference = batch.logits.clone()
    batch = pack(batch) if packed else batch
    _, grad = check_preference(backend, batch, name, options=CASES[name])
    touched = grad[batch.labels != IGNORE].abs().amax(-1) > 0
    # sft reads only the chosen half; in apo_down the two pulls on the chosen half cancel at step 0.
    assert bool(touched.any() if name in ("sft", "apo_down") else touched.all())


def test_hinge_at_step_zero(backend):
    batch = batch_for(torch.float32, backend.device)
    batch.reference = batch.logits.clone()
    _, grad = check_preference(backend, batch, "hinge")
    assert bool((grad[batch.labels != IGNORE].abs().amax(-1) > 0).all())


def test_a_gradient_step_raises_the_margin(backend):
    """The sign of everything at once: after one step downhill chosen gains on rejected."""
    batch = batch_for(torch.float32, backend.device)
    for name in ("sigmoid", "hinge", "ipo", "bco_pair", "simpo", "aot_unpaired", "tdpo1", "nca_pair"):
        leaf = batch.logits.clone().requires_grad_()
        how = {"reference_logits": batch.reference, "loss_type": name, "beta": 0.5, "backend": backend.name}
        out = fused_token_dpo(leaf, batch.labels, **how)
        out.loss.backward()
        after = fused_token_dpo(leaf.detach() - 1e-3 * leaf.grad, batch.labels, **how)
        assert after.loss < out.loss
        if name != "ipo":
            before = (out.chosen_rewards - out.rejected_rewards).mean()
            assert (after.chosen_rewards - after.rejected_rewards).mean() > before


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly_except(dtype=PLAIN)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot", "bco_pair", "sft"])
def test_per_token_reference_logps(backend, dtype, name, packed):
    batch = batch_for(dtype, backend.device)
    batch = pack(batch) if packed else batch
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cached = (normal(*batch.labels.shape) - 4).to(backend.device, wide)
    check_preference(backend, batch, name, options=CASES[name], live_reference=False, reference_logps=cached)


@pytest.mark.nightly_except(dtype=PLAIN)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot", "bco_pair", "sft"])
def test_per_sequence_reference_logps(backend, dtype, name, packed):
    batch = batch_for(dtype, backend.device)
    batch = pack(batch) if packed else batch
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cached = (4 * normal(6) - 25).to(backend.device, wide)
    check_preference(backend, batch, name, options=CASES[name], live_reference=False, reference_logps=cached)
    check_preference(
        backend, batch, name, options=CASES[name], live_reference=False, reference_logps=cached, reduction="sum"
    )


@pytest.mark.nightly_except(name=("sigmoid", "ipo", "aot", "simpo", "sft"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"tdpo1", "tdpo2"}))
def test_reference_free(backend, dtype, name, packed):
    batch = batch_for(dtype, backend.device)
    batch = pack(batch) if packed else batch
    out, _ = check_preference(backend, batch, name, options=CASES[name], live_reference=False, reference_logps=0.0)
    assert bool((out.reference_token_logps == 0).all())


@pytest.mark.parametrize("name", ["simpo", "sft"])
def test_objectives_that_do_without_a_reference(backend, name):
    batch = batch_for(torch.float32, backend.device)
    without, _ = check_preference(backend, batch, name, options=CASES[name], live_reference=False)
    with_one, _ = check_preference(backend, batch, name, options=CASES[name])
    assert torch.equal(without.loss, with_one.loss)


def test_cached_sums_and_cached_tokens_agree(backend):
    batch = batch_for(torch.float32, backend.device)
    tokens = token_logps(batch.reference, batch.labels, backend=backend.name)
    for name in ("sigmoid", "ipo", "aot"):
        live, by_token, by_sequence = (
            fused_token_dpo(batch.logits, batch.labels, loss_type=name, backend=backend.name, **reference)
            for reference in (
                {"reference_logits": batch.reference}, {"reference_logps": tokens},
                {"reference_logps": tokens.double().sum(1).float()},
            )
        )  # fmt: skip
        assert_within(by_token.loss, live.loss, 1e-6 * (1 + live.loss.double().abs().cpu()), "per token")
        assert_within(by_sequence.loss, live.loss, 1e-4 * (1 + live.loss.double().abs().cpu()), "per sequence")
        assert by_sequence.token_rewards is None and by_sequence.reference_token_logps is None


def test_reference_logps_at_ignored_rows_are_not_read(backend):
    batch = batch_for(torch.float32, backend.device)
    cached = normal(*batch.labels.shape).to(backend.device)
    poisoned = torch.where(batch.labels == IGNORE, torch.nan, cached)
    shared = {"backend": backend.name}
    for name in ("sigmoid", "ipo"):
        plain = fused_token_dpo(batch.logits, batch.labels, reference_logps=cached, loss_type=name, **shared)
        nan = fused_token_dpo(batch.logits, batch.labels, reference_logps=poisoned, loss_type=name, **shared)
        assert torch.equal(plain.loss, nan.loss) and torch.equal(plain.token_rewards, nan.token_rewards)


@pytest.mark.dtypes(torch.bfloat16, torch.float16)
def test_cached_logps_keep_their_precision(backend, dtype):
    """fp32 or fp64 caches beside 16-bit logits are not rounded to the logits' dtype."""
    batch = batch_for(dtype, backend.device)
    cached = token_logps(batch.logits, batch.labels, backend=backend.name)
    for cache in (cached, cached.double()):
        out = fused_token_dpo(batch.logits, batch.labels, reference_logps=cache, backend=backend.name)
        assert bool((out.token_rewards == 0).all()) and out.loss.item() == pytest.approx(math.log(2), abs=1e-6)


# --- token weights ----------------------------------------------------------------------------------------------------


def fractional_weights(labels: torch.Tensor) -> torch.Tensor:
    weights = torch.rand(labels.shape, generator=generator(*labels.shape)) * 2
    weights[torch.rand(labels.shape, generator=generator(*labels.shape, 1)) < 0.25] = 0.0
    return weights.to(labels.device)


@pytest.mark.quick_cases(name=("sigmoid", "aot"))
@pytest.mark.nightly_except(name=("sigmoid", "sigmoid_norm", "aot", "tdpo2", "sft"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_token_weights(backend, dtype, name, packed):
    batch = batch_for(dtype, backend.device)
    batch = pack(batch) if packed else batch
    weights = fractional_weights(batch.labels)
    check_preference(backend, batch, name, options=CASES[name], token_weights=weights)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_boolean_and_16_bit_token_weights(backend, name):
    batch = batch_for(torch.float32, backend.device)
    keep = fractional_weights(batch.labels) > 0.5
    expected, grad = check_preference(backend, batch, name, token_weights=keep.float())
    for weights in (keep, keep.half(), keep.double()):
        out = fused_token_dpo(
            batch.logits, batch.labels, reference_logits=batch.reference, loss_type=name, token_weights=weights,
            backend=backend.name,
        )  # fmt: skip
        assert torch.equal(out.loss, expected.loss)
    masked = PairBatch(batch.logits, batch.labels.masked_fill(~keep, IGNORE), batch.reference)
    same, same_grad = check_preference(backend, masked, name)
    assert torch.equal(same.loss, expected.loss) and torch.equal(same_grad, grad)


def test_weights_at_ignored_rows_do_not_count(backend):
    batch = batch_for(torch.float32, backend.device)
    weights = torch.where(batch.labels == IGNORE, torch.nan, 1.0)
    for name in ("sigmoid", "sigmoid_norm"):
        plain, with_nan = (
            fused_token_dpo(
                batch.logits, batch.labels, reference_logits=batch.reference, loss_type=name, backend=backend.name, **w
            ).loss
            for w in ({}, {"token_weights": weights})
        )
        assert torch.equal(plain, with_nan)


@pytest.mark.dtypes(*PLAIN)
def test_temperature_divides_both_models(backend, dtype):
    batch = batch_for(dtype, backend.device)
    for name, temperature in product(("sigmoid", "tdpo2"), (0.5, 1.3)):
        check_preference(backend, batch, name, temperature=temperature)
        check_preference(backend, batch, "sigmoid", temperature=temperature, live_reference=False, reference_logps=0.0)


@pytest.mark.quick_cases(packed=(False,))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "tdpo1", "ipo"])
def test_in_place_gradient_is_the_same(backend, dtype, name, packed):
    batch = batch_for(dtype, backend.device, vocab=300)
    batch = pack(batch) if packed else batch
    out, grad = check_preference(backend, batch, name)
    inplace = PairBatch(batch.logits.clone(), batch.labels, batch.reference, batch.cu_seqlens)
    again, same = check_preference(backend, inplace, name, inplace_backward=True)
    assert torch.equal(again.loss, out.loss) and torch.equal(grad, same)
    assert torch.equal(inplace.logits, grad)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4),
    name=st.sampled_from(["sigmoid", "ipo", "hinge", "bco_pair", "aot", "tdpo2", "simpo"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ld_alpha=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25)
@pytest.mark.dtypes(*PLAIN)
def test_any_packed_batch_matches_the_truth(backend, dtype, lengths, name, reduction, ld_alpha, seed):
    """Sequences of any length, empty ones too."""
    ends = [0]
    for length in [a for a, _ in lengths] + [b for _, b in lengths]:
        ends.append(ends[-1] + length)
    rows = ends[-1]
    if rows == 0:
        return
    logits = (1.5 * normal(rows, 21, key=(seed,))).to(backend.device, dtype)
    reference = (1.5 * normal(rows, 21, key=(seed, 1))).to(backend.device, dtype)
    labels = make_labels((rows,), 21, key=(seed,)).to(backend.device)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=backend.device)
    upstream = torch.linspace(-1, 2, len(lengths)) if reduction == "none" else 0.7
    check_preference(
        backend, PairBatch(logits, labels, reference, cu_seqlens), name, reduction=reduction, ld_alpha=ld_alpha,
        upstream=upstream, options=Options(beta=0.3),
    )  # fmt: skip
