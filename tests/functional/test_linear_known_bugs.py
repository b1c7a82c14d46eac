"""Bugs that public loss heads on hidden states have shipped, one test each, named after what must hold.

Numbers are those of the project's list of known bugs (`test_known_bugs.py` has those of the path from logits); the
threads named beside them are where they were reported.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import oracle
from assertions import ROW_BOUNDS, assert_within
from cases import IGNORE, make_head_batch
from linear_comparisons import (
    bytes_for,
    check_linear_preference,
    check_linear_stats,
    head_size,
    leaves,
    truth_logits,
)
from oracle import Options
from qkernels import fused_linear_token_dpo, linear_token_logps, linear_token_stats, objectives

PLAIN = (torch.float32, torch.bfloat16)
NARROW = (torch.bfloat16, torch.float16)
PLANS = ("frozen_head", "pair_chunks", "recompute")


def trains(plan: str) -> str:
    return "h" if plan == "frozen_head" else "hwb"


@pytest.mark.parametrize("vocab", [1, 3, 31, 33, 65, 257, 1025])
def test_columns_past_the_vocabulary_do_not_count(backend, dtype, vocab):
    """known bug 1: V not a multiple of the block. All logits are far below 0; the memory behind the weight is huge."""
    batch = make_head_batch(1, 4, 9, vocab, dtype, backend.device)
    batch.bias = (batch.bias.float() - 60).to(dtype)
    weight = torch.full((vocab + 40, 9), 300.0, dtype=dtype, device=backend.device)
    weight[:vocab] = batch.weight
    batch.weight = weight[:vocab]
    check_linear_stats(backend, batch, oracle.STATS)


@pytest.mark.nightly_cases(backend=("torch",), plan=("pair_chunks", "recompute"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("upstream", [0.0, 0.37, -2.5, 1024.0])
def test_any_upstream_gradient_is_honoured(backend, dtype, plan, upstream):
    """known bug 7: an upstream gradient other than 1 wrong or ignored (TE#2139, unsloth GRPO)."""
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device)
    for reduction in ("mean", "sum"):
        for chunk_rows in (None, 12):
            check_linear_preference(
                backend, batch, plan=plan, trains=trains(plan), upstream=upstream, reduction=reduction,
                chunk_rows=chunk_rows,
            )  # fmt: skip


@pytest.mark.dtypes(*PLAIN)
def test_unreduced_losses_have_a_gradient_each(backend, dtype):
    """known bug 8: reduction="none" gradients wrong (Liger#968)."""
    batch = make_head_batch(3, 6, 16, 30, dtype, backend.device)
    for who in ("h", "hwb"):
        check_linear_preference(
            backend, batch, "hinge", trains=who, reduction="none", upstream=torch.tensor([1.0, -0.25, 3.0])
        )


@pytest.mark.dtypes(*NARROW)
def test_logits_are_never_rounded_to_sixteen_bits(backend, dtype):
    """known bug 10 (Liger#1432): rounded logits err by 1e-2 and more; here it is the rounding of an fp32 sum."""
    batch = make_head_batch(2, 8, 64, 503, dtype, backend.device, scale=6.0)
    z, z_ref = truth_logits(batch, None, 1.0)
    truth = oracle.token_stats(z, batch.labels.cpu(), z_ref)
    bound = ROW_BOUNDS["logps"] * head_size(batch)
    stats = linear_token_stats(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, reference_hidden=batch.reference_hidden,
        reference_weight=batch.reference_weight, reference_bias=batch.reference_bias,
        outputs=("logps", "reference_logps", "entropy"), backend=backend.name,
    )  # fmt: skip
    assert_within(stats.logps, truth["logps"], bound * truth["logps"].abs().clamp_min(1), "logps")
    assert_within(stats.reference_logps, truth["reference_logps"], bound * 20, "reference_logps")
    rounded = (batch.hidden @ batch.weight.T + batch.bias).double().cpu()
    ours = (stats.logps.double().cpu() - truth["logps"]).abs().max()
    theirs = (oracle.token_stats(rounded, batch.labels.cpu())["logps"] - truth["logps"]).abs().max()
    assert 100 * ours < theirs


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("way", ["pair_chunks", "recompute", "weight in fp32"])
def test_the_weights_gradient_does_not_lose_digits_to_the_number_of_chunks(backend, dtype, way):
    """known bug 11: dW accumulated over chunks in bf16 (Liger#512, axolotl#1601)."""
    batch = make_head_batch(64, 8, 32, 101, dtype, backend.device)
    batch.labels[batch.labels == IGNORE] = 5
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in leaves(batch, "hw").items()}
    options = {"reference_logps": 0.0, "plan": "recompute" if way == "recompute" else "auto"}
    fused_linear_token_dpo(
        exact["hidden"], exact["weight"], batch.labels, lm_head_bias=exact["bias"], backend="torch", **options
    ).loss.backward()
    truth = exact["weight"].grad

    def error(grad):
        return float((grad.double() - truth).norm() / truth.norm())

    errors, partial_sums = {}, torch.zeros_like(batch.weight)
    for chunks in (1, 64):
        models = leaves(batch, "hw")
        if way == "weight in fp32":
            models["weight"] = batch.weight.float().clone().requires_grad_()
        with torch.autocast(backend.device.type, dtype, enabled=way == "weight in fp32" and dtype != torch.float32):
            out = fused_linear_token_dpo(
                models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], backend=backend.name,
                max_chunk_bytes=bytes_for(1024 // chunks, batch, live_reference=False), **options,
            )  # fmt: skip
        assert out.plan.chunks == chunks and (way == "recompute") == (out.plan.name == "recompute")
        out.loss.backward()
        errors[chunks] = error(models["weight"].grad)
    # The same roundings, of dL/dlogits and of the result; 1 % is room for how they fall.
    assert errors[64] <= 1.01 * errors[1], errors
    if dtype == torch.bfloat16:
        for i in range(64):  # what the bug looks like: each pair's gradient added in bf16
            rows = [i, 64 + i]
            x = batch.hidden[rows].double().requires_grad_()
            w = batch.weight.double().requires_grad_()
            fused_linear_token_dpo(
                x, w, batch.labels[rows], lm_head_bias=batch.bias.double(), backend="torch", **options
            ).loss.div(64).backward()
            partial_sums += w.grad.to(dtype)
        assert errors[64] < 0.5 * error(partial_sums)


@pytest.mark.parametrize("plan", ["forward_only", *PLANS])
def test_ignored_rows_are_not_read(backend, dtype, plan):
    """known bug 12: ignored rows computed, or read. They hold NaN here, in both models."""
    batch = make_head_batch(2, 7, 16, 30, dtype, backend.device)
    ignored = batch.labels == IGNORE
    assert bool(ignored.any())
    batch.hidden[ignored] = torch.nan
    batch.reference_hidden[ignored] = torch.nan
    who = "" if plan == "forward_only" else trains(plan)
    for chunk_rows in (None, 14):
        _, models = check_linear_preference(
            backend, batch, plan="auto" if plan == "forward_only" else plan, trains=who, chunk_rows=chunk_rows
        )
        if who:
            assert bool((models["hidden"].grad[ignored] == 0).all())


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.usefixtures("bare_products")
def test_work_is_proportional_to_the_rows_that_count(backend, dtype):
    """known bug 12 (Liger DPO: the same time at 0 % and 95 % ignored); zero weights are ignored rows."""
    batch = make_head_batch(2, 20, 16, 30, dtype, backend.device, bias=False)
    batch.labels[:] = 1
    weights = torch.ones(4, 20, device=backend.device)
    flops = []
    for ignored in (0, 10, 19):
        weights[:, :ignored] = 0
        models = leaves(batch, "hw")
        with FlopCounterMode(display=False) as counter:
            fused_linear_token_dpo(
                models["hidden"], models["weight"], batch.labels, reference_logps=0.0, token_weights=weights,
                backend=backend.name,
            ).loss.backward()  # fmt: skip
        flops.append(counter.get_total_flops())
    assert flops == [3 * 2 * 80 * 16 * 30, 3 * 2 * 40 * 16 * 30, 3 * 2 * 4 * 16 * 30]


# One that is fused, one that reads divergences, two that couple pairs or count tokens: with every backend and dtype.
OTHERS = tuple(objectives.OBJECTIVES.keys() - {"sigmoid", "tdpo2", "rspo", "sigmoid_norm"})


@pytest.mark.nightly_cases(loss_type=OTHERS, backend=("torch",))
@pytest.mark.nightly_cases(loss_type=OTHERS, dtype=(torch.bfloat16,))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("loss_type", sorted(set(objectives.OBJECTIVES) - {"exo_pair"}))
def test_a_sequence_or_a_batch_without_valid_tokens(backend, dtype, loss_type):
    """known bug 13: NaN loss (Liger DPO)."""
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device)
    batch.labels[3] = IGNORE
    for who, chunk_rows in (("h", None), ("hwb", None), ("hwb", 12), ("hwb", 3)):
        out, _ = check_linear_preference(backend, batch, loss_type, trains=who, chunk_rows=chunk_rows)
        assert out.rejected_rewards[1] == 0
    batch.labels[1] = IGNORE  # a whole pair
    check_linear_preference(backend, batch, loss_type, chunk_rows=12)
    batch.labels[:] = IGNORE
    batch.hidden[:] = torch.nan
    for who in ("", "h", "w", "hwb"):
        models = leaves(batch, who)
        for options in ({}, {"use_weighting": True}):
            out = fused_linear_token_dpo(
                models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], loss_type=loss_type,
                reference_hidden=batch.reference_hidden, reference_weight=batch.reference_weight, loss_kwargs=options,
                backend=backend.name,
            )  # fmt: skip
            assert torch.isfinite(out.loss) and out.plan.rows == out.plan.chunks == 0
            if who:
                out.loss.backward()
        if loss_type == "sigmoid":
            assert out.loss.item() == pytest.approx(math.log(2), rel=1e-6)
        for leaf in models.values():
            assert leaf.grad is None or bool((leaf.grad == 0).all())


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_number_of_sequences_is_refused(backend, count):
    """known bug 14: accepted and broadcast (Liger DPO)."""
    batch = make_head_batch(2, 4, 8, 9, torch.float32, backend.device)
    with pytest.raises(ValueError, match=rf"{count} sequences.*even"):
        fused_linear_token_dpo(
            batch.hidden[:count], batch.weight, batch.labels[:count], reference_logps=0.0, backend=backend.name
        )


def test_every_option_changes_the_result(backend):
    """known bug 15: options dropped silently (TRL#7062, Liger#974, verl#7991, TRL#7084)."""
    batch = make_head_batch(3, 8, 16, 30, torch.float32, backend.device)

    def loss(loss_type="sigmoid", hidden=batch.hidden, **options):
        reference = {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}
        return fused_linear_token_dpo(
            hidden, batch.weight, batch.labels, loss_type=loss_type, backend=backend.name, **{**reference, **options}
        ).loss.item()

    base = {name: loss(name) for name in ("sigmoid", "robust", "discopop", "simpo", "tdpo2", "aot", "aot_unpaired")}
    changed = {
        "beta": loss(beta=0.3),
        "label_smoothing": loss(label_smoothing=0.1),
        "temperature": loss(temperature=2.0),
        "softcap": loss(softcap=3.0),
        "logit_scale": loss(logit_scale=0.6),
        "softcap and logit_scale": loss(softcap=3.0, logit_scale=0.5),
        "softcap and temperature": loss(softcap=3.0, temperature=2.0),
        "bias": loss(lm_head_bias=batch.bias),
        "reference_bias": loss(reference_bias=batch.reference_bias),
        "token_weights": loss(token_weights=torch.rand(batch.labels.shape, device=backend.device)),
        "ld_alpha": loss(loss_kwargs={"ld_alpha": 0.1}),
        "use_weighting": loss(loss_kwargs={"use_weighting": True}),
        "f_divergence": loss(loss_kwargs={"f_divergence": "js"}),
        "reduction": loss(reduction="sum"),
        "loss_weights": loss(["sigmoid"], loss_weights=[0.5]),
    }
    assert all(value != base["sigmoid"] for value in changed.values()), changed
    assert len(set(changed.values())) == len(changed), "two options that should differ give one result"
    for name, options in (
        ("robust", {"label_smoothing": 0.1}),
        ("aot", {"label_smoothing": 0.1}),
        ("discopop", {"loss_kwargs": {"discopop_tau": 0.5}}),
        ("simpo", {"loss_kwargs": {"gamma": 0.1}}),
        ("tdpo2", {"loss_kwargs": {"alpha": 0.9}}),
    ):
        assert loss(name, **options) != base[name], (name, options)
    # Options that change nothing in the value and must not: how it is computed.
    assert loss(max_chunk_bytes=bytes_for(5, batch, "", None)) == pytest.approx(base["sigmoid"], rel=1e-5)


@pytest.mark.nightly_cases(backend=("torch",), plan=("pair_chunks", "recompute"))
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("plan", PLANS)
def test_softcap_is_the_formula_of_the_models_that_have_it(backend, dtype, plan, temperature, logit_scale):
    """known bug 16 (unsloth-zoo#593, unsloth#10616): cap * tanh(scale * l / cap), then the temperature; large logits,
    where the cap bends them, and a vocabulary that fills no block."""
    batch = make_head_batch(2, 6, 16, 37, dtype, backend.device, scale=6.0)
    check_linear_preference(
        backend, batch, plan=plan, trains=trains(plan), softcap=3.0, temperature=temperature, logit_scale=logit_scale
    )
    z = 3.0 * torch.tanh(logit_scale * (batch.hidden.double() @ batch.weight.double().T + batch.bias.double()) / 3.0)
    expected = oracle.token_stats(z.cpu(), batch.labels.cpu(), temperature=temperature)["logps"]
    logps = linear_token_logps(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, softcap=3.0, logit_scale=logit_scale,
        temperature=temperature, backend=backend.name,
    )  # fmt: skip
    assert_within(logps, expected, 2e-6 * head_size(batch), "capped log-probs")


def test_without_gradients_none_are_computed(backend, monkeypatch):
    """known bug 19 (Liger DPO in evaluation, fla#1253): one product per model, whatever requires grad elsewhere."""
    for name in ("row_grad", "row_grad_", "row_grad_into"):
        monkeypatch.setattr(backend.module, name, lambda *a: pytest.fail("a gradient was computed"))
    batch = make_head_batch(2, 6, 16, 30, torch.float32, backend.device, bias=False)
    reference = {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}

    def flops(models, **options):
        with FlopCounterMode(display=False) as counter:
            out = fused_linear_token_dpo(
                models["hidden"], models["weight"], batch.labels, backend=backend.name, **reference, **options
            )
        assert not out.loss.requires_grad and out.plan.name == "forward_only"
        return counter.get_total_flops()

    one = 2 * batch.valid * 16 * 30
    assert flops(leaves(batch, "")) == 2 * one
    with torch.no_grad():
        assert flops(leaves(batch, "hw")) == flops(leaves(batch, "hw"), loss_type="tdpo1") == 2 * one
        assert flops(leaves(batch, "hw"), plan="recompute") == 2 * one
    with torch.inference_mode():
        assert flops(leaves(batch, "hw")) == 2 * one


def test_a_frozen_part_gets_no_gradient(backend):
    """known bug 19: dW computed for a frozen head, dX for frozen hidden states."""
    batch = make_head_batch(2, 6, 16, 30, torch.float32, backend.device, bias=False)
    unit = 2 * batch.valid * 16 * 30
    for who, plan, products in (
        ("h", "auto", 2), ("w", "auto", 2), ("w", "recompute", 3), ("h", "recompute", 3), ("h", "pair_chunks", 2),
    ):  # fmt: skip
        models = leaves(batch, who)
        with FlopCounterMode(display=False) as counter:
            fused_linear_token_dpo(
                models["hidden"], models["weight"], batch.labels, reference_logps=0.0, plan=plan, backend=backend.name
            ).loss.backward()
        assert counter.get_total_flops() == products * unit, (who, plan)
        assert (models["hidden"].grad is None) == (who == "w") and (models["weight"].grad is None) == (who == "h")


@pytest.mark.nightly_cases(backend=("torch",), plan=("pair_chunks", "recompute"))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_with_equal_models_the_loss_is_ln_2_and_every_reward_is_exactly_zero(backend, dtype, plan, packed):
    """known bug 24 (NeMo-Aligner#227): log-probs of policy and reference differ at step 0."""
    batch = make_head_batch(2, 7, 33, 130, dtype, backend.device)
    batch.reference_hidden, batch.reference_weight = batch.hidden.clone(), batch.weight.clone()
    batch.reference_bias = batch.bias.clone()
    batch = batch.pack() if packed else batch
    for softcap in (None, 5.0):
        for chunk_rows in (None, 14):
            if dtype == torch.float32 and chunk_rows:
                continue  # of a library's products of other shapes the last bits may differ
            for loss_type in ("sigmoid", "tdpo1"):
                models = leaves(batch, trains(plan) if loss_type == "sigmoid" or plan != "frozen_head" else "hwb")
                out = fused_linear_token_dpo(
                    models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"],
                    reference_hidden=batch.reference_hidden, reference_weight=batch.reference_weight,
                    reference_bias=batch.reference_bias, cu_seqlens=batch.cu_seqlens, temperature=0.7,
                    softcap=softcap, loss_type=loss_type, backend=backend.name,
                    max_chunk_bytes=chunk_rows and bytes_for(chunk_rows, batch, softcap=softcap),
                )  # fmt: skip
                assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)
                assert bool((out.token_rewards == 0).all())
                assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0, 0.0]
                out.loss.backward()
                assert bool((models["hidden"].grad[batch.labels != IGNORE].float().abs().amax(-1) > 0).all())


def test_cached_reference_logps_equal_live_ones(backend, dtype):
    """known bug 25 (TRL#7084): whichever function made the cache, in chunks of whatever size."""
    batch = make_head_batch(2, 6, 33, 130, dtype, backend.device)
    shared = {"temperature": 0.7, "softcap": 20.0, "backend": backend.name}
    reference = {
        "reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight,
        "reference_bias": batch.reference_bias,
    }  # fmt: skip

    def loss(**options):
        return fused_linear_token_dpo(
            batch.hidden, batch.weight, batch.labels, lm_head_bias=batch.bias, **shared, **options
        )

    live = loss(**reference)
    args = (batch.reference_hidden, batch.reference_weight, batch.labels)
    caches = {
        "linear_token_logps": linear_token_logps(*args, bias=batch.reference_bias, **shared),
        "in small chunks": linear_token_logps(
            *args, bias=batch.reference_bias, max_chunk_bytes=bytes_for(5, batch, "", 20.0), **shared
        ),
        "linear_token_stats": linear_token_stats(
            *args, bias=batch.reference_bias, outputs=("logps", "entropy"), **shared
        ).logps,
        "as reference": linear_token_stats(
            batch.hidden, batch.weight, batch.labels, outputs=("reference_logps",), **reference, **shared
        ).reference_logps,
        "the training call": live.reference_token_logps,
    }
    allowed = 2e-6 * head_size(batch) * live.reference_token_logps.double().abs().clamp_min(1).cpu()
    for name, cache in caches.items():
        out = loss(reference_logps=cache)
        assert_within(10 * out.token_rewards, 10 * live.token_rewards, allowed, name)
        # The sums are what many trainers cache.
        sums = loss(reference_logps=cache.sum(1))
        assert_within(10 * sums.chosen_rewards, 10 * live.chosen_rewards, allowed.sum(1)[:2], name + ", sums")
    assert torch.equal(caches["the training call"], caches["as reference"])
    if dtype == torch.bfloat16 and backend.device.type == "cpu":
        # Our own product promises the bits: no other row of a call enters a row.
        from qkernels.backends import cpu as native

        if native.gemm_kernel("logits", torch.bfloat16) and backend.name == "cpu":
            assert all(torch.equal(cache, live.reference_token_logps) for cache in caches.values())


@pytest.mark.nightly_cases(backend=("torch",), plan=("pair_chunks", "recompute"))
@pytest.mark.nightly_cases(dtype=(torch.float16,), plan=("pair_chunks", "recompute"))
@pytest.mark.parametrize("loss_type", ["sigmoid", "tdpo1"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_bias_enters_values_and_gradients(backend, dtype, plan, loss_type):
    """known bug 29 (CCE#52): the bias path wrong because no test used a bias. It is large and trains alone, too."""
    if plan == "frozen_head" and loss_type == "tdpo1":
        plan = "pair_chunks"
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device)
    batch.bias, batch.reference_bias = 3 * batch.bias, 2 * batch.reference_bias
    for who in ("h",) if plan == "frozen_head" else ("h", "b", "hwb"):
        for chunk_rows in (None, 12):
            check_linear_preference(
                backend, batch, loss_type, plan=plan, trains=who, chunk_rows=chunk_rows, options=Options(beta=0.4)
            )
    batch.bias = None
    check_linear_preference(backend, batch, loss_type, trains="hw")
    batch.bias, batch.reference_bias = batch.reference_bias, None
    check_linear_preference(backend, batch, loss_type)


def test_a_masked_vocabulary(backend, dtype):
    """known bugs 2, 26: a bias of -inf forbids tokens: no probability, no gradient, nothing else harmed."""
    batch = make_head_batch(2, 6, 16, 40, dtype, backend.device)
    batch.labels[batch.labels >= 30] = 3
    batch.bias[30:] = -torch.inf
    batch.reference_bias[30:] = -torch.inf
    narrow = make_head_batch(2, 6, 16, 40, dtype, backend.device)
    narrow.labels = batch.labels
    for name in ("weight", "bias", "reference_weight", "reference_bias"):
        setattr(narrow, name, getattr(batch, name)[:30].contiguous())
    for options in ({}, {"loss_type": "tdpo1"}):
        _, expected = check_linear_preference(backend, narrow, **options)
        models = leaves(batch, "hwb")
        out = fused_linear_token_dpo(
            models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"],
            reference_hidden=batch.reference_hidden, reference_weight=batch.reference_weight,
            reference_bias=batch.reference_bias, backend=backend.name, **options,
        )  # fmt: skip
        out.loss.backward()
        unit = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        for name, leaf in models.items():
            grad = leaf.grad if name == "hidden" else leaf.grad[:30]
            assert_within(grad, expected[name].grad, unit * expected[name].grad.double().abs().max().cpu(), name)
        assert bool((models["weight"].grad[30:] == 0).all()) and bool((models["bias"].grad[30:] == 0).all())


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
def test_a_broken_row_is_nan_alone(backend, dtype, plan):
    """known bug 26: hidden states of NaN or inf give NaN in that row, and in the head's gradient, a sum over all."""
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device)
    batch.labels[:] = 4
    clean = linear_token_logps(batch.hidden, batch.weight, batch.labels, backend=backend.name)
    for broken in (torch.nan, torch.inf):
        batch.hidden[1, 2, 3] = broken
        logps = linear_token_logps(batch.hidden, batch.weight, batch.labels, backend=backend.name)
        assert logps.isnan().nonzero().tolist() == [[1, 2]]
        others = ~logps.isnan()
        assert torch.equal(logps[others], clean[others])
        models = leaves(batch, trains(plan))
        out = fused_linear_token_dpo(
            models["hidden"], models["weight"], batch.labels, reference_logps=0.0, plan=plan, backend=backend.name
        )
        out.loss.backward()
        # Its pair's loss is NaN; the other pair's gradients are not.
        assert out.loss.isnan() and bool(models["hidden"].grad[[0, 2]].isfinite().all())
        assert bool(models["hidden"].grad[1, 2].isnan().all())


@pytest.mark.parametrize("bad", [-1, 11, 12, 10**12, -(2**62), 2**31])
@pytest.mark.parametrize("plan", ["forward_only", *PLANS])
def test_a_label_outside_the_vocabulary_is_an_error_not_a_read(backend, bad, plan):
    """known bug 18 (CCE#59, verl): IndexError with the place in the batch, although rows are dropped before."""
    batch = make_head_batch(1, 3, 8, 16, torch.float32, backend.device)
    batch.weight, batch.bias = batch.weight[:11], batch.bias[:11]  # rows 11 and 12 exist in memory
    batch.labels = torch.tensor([[IGNORE, 1, 10], [4, bad, 2]], device=backend.device)
    models = leaves(batch, "" if plan == "forward_only" else trains(plan))
    for call in (
        lambda: fused_linear_token_dpo(
            models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], reference_logps=0.0,
            plan="auto" if plan == "forward_only" else plan, backend=backend.name,
        ),
        lambda: linear_token_logps(models["hidden"], models["weight"], batch.labels, backend=backend.name),
    ):  # fmt: skip
        if backend.device.type == "cpu":
            with pytest.raises(IndexError, match=rf"labels\[1, 1\] = {bad} is outside \[0, 11\)"):
                call()
        else:
            result = call()
            logps = result if isinstance(result, torch.Tensor) else result.token_logps
            assert logps.isnan().tolist() == [[False, False, False], [False, True, False]]
