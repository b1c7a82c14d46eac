"""From hidden states: every output, loss, option and plan against float64, and against the path from logits."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import oracle
from assertions import assert_within
from cases import IGNORE, HeadBatch, make_head_batch, normal
from linear_comparisons import bytes_for, check_linear_preference, check_linear_stats, leaves
from oracle import Options
from qkernels import (
    fused_linear_token_dpo,
    fused_token_dpo,
    linear_token_logps,
    linear_token_stats,
    objectives,
    token_stats,
)

pytestmark = pytest.mark.every_dtype

EXACT = torch.float64
PLAIN = (torch.float32, torch.bfloat16)
# What trains, and the plan that belongs to it: hidden states alone, the head alone, both, the bias alone.
TRAINS = ("h", "w", "hwb", "b", "")
SHAPES = {
    "plain": {},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
    "scaled": {"logit_scale": 0.3},
}


# --- per-token numbers ------------------------------------------------------------------------------------------------


@pytest.mark.quick_cases(trains=("hwb",), shape=("softcap",))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trains", ["h", "hwb"])
@pytest.mark.parametrize("outputs", [("logps",), ("entropy", "is_top1"), oracle.STATS], ids=["logps", "entropy", "all"])
def test_stats_match_the_truth(backend, dtype, outputs, trains, shape):
    batch = make_head_batch(2, 7, 24, 97, dtype, backend.device)
    for chunk_rows in (None, 5):
        check_linear_stats(backend, batch, outputs, trains=trains, chunk_rows=chunk_rows, **SHAPES[shape])


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", oracle.STATS)
def test_each_output_alone(backend, dtype, name):
    batch = make_head_batch(1, 6, 16, 33, dtype, backend.device, bias=False)
    for trains in TRAINS:
        check_linear_stats(backend, batch, (name,), trains=trains.replace("b", ""), chunk_rows=4)


@pytest.mark.dtypes(torch.float32)
def test_any_number_of_row_dimensions(backend, dtype):
    """`[H]` rows in a batch of any shape; results have the shape of the labels."""
    batch = make_head_batch(2, 6, 12, 31, dtype, backend.device)
    flat = linear_token_logps(batch.hidden, batch.weight, batch.labels, bias=batch.bias, backend=backend.name)
    for shape in ((24,), (2, 2, 6), (1, 4, 6)):
        hidden, labels = batch.hidden.reshape(*shape, 12), batch.labels.reshape(shape)
        logps = linear_token_logps(hidden, batch.weight, labels, bias=batch.bias, backend=backend.name)
        assert logps.shape == labels.shape and torch.equal(logps.flatten(), flat.flatten())


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("layout", ["time first", "slice of rows", "slice of columns", "expanded"])
def test_any_stride_of_the_hidden_states(backend, dtype, layout):
    batch = make_head_batch(2, 5, 12, 31, dtype, backend.device)
    hidden = batch.hidden
    if layout == "time first":
        batch.hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "slice of rows":
        batch.hidden = torch.cat([hidden, hidden + 1], 1)[:, :5]
    elif layout == "slice of columns":
        batch.hidden = torch.cat([hidden, hidden + 1], -1)[..., :12]
    else:
        batch.hidden = hidden[:1].expand(4, 5, 12)
    assert not batch.hidden.is_contiguous()
    # `leaves` clones with these strides, except for the expanded one.
    check_linear_preference(backend, batch)
    logps = linear_token_logps(batch.hidden, batch.weight, batch.labels, backend=backend.name)
    again = linear_token_logps(batch.hidden.contiguous(), batch.weight, batch.labels, backend=backend.name)
    assert_within(logps, again.double(), 1e-5, "log-probs of a view")


@pytest.mark.parametrize("layout", ["transposed", "slice of rows", "slice of columns", "bias slice"])
def test_any_stride_of_the_weight(backend, dtype, layout):
    """A head that is a view: of a transposed parameter, of a padded vocabulary."""
    batch = make_head_batch(1, 5, 12, 31, dtype, backend.device)
    if layout == "transposed":
        batch.weight = batch.weight.T.contiguous().T
    elif layout == "slice of rows":
        batch.weight = torch.cat([batch.weight, batch.weight])[:31]
    elif layout == "slice of columns":
        batch.weight = torch.cat([batch.weight, batch.weight], 1)[:, :12]
    else:
        batch.bias = torch.stack([batch.bias, batch.bias], 1)[:, 0]
    expected = linear_token_logps(
        batch.hidden, batch.weight.contiguous(), batch.labels, bias=batch.bias.contiguous(), backend=backend.name
    )
    actual = linear_token_logps(batch.hidden, batch.weight, batch.labels, bias=batch.bias, backend=backend.name)
    assert_within(actual, expected.double(), 1e-5, "log-probs with a view of the head")
    check_linear_preference(backend, batch)


# --- preference losses ------------------------------------------------------------------------------------------------


def options_for(name: str) -> Options:
    return Options(beta=0.3, label_smoothing=0.1 if objectives.OBJECTIVES[name].smoothing else 0.0)


# One that is fused, one that reads divergences, one that couples pairs: with every backend and dtype.
OTHERS = tuple(objectives.OBJECTIVES.keys() - {"sigmoid", "tdpo2", "rspo"})


@pytest.mark.nightly_cases(name=OTHERS, backend=("torch",))
@pytest.mark.nightly_cases(name=OTHERS, dtype=(torch.bfloat16,))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective(backend, dtype, name):
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device, scale=1.0)
    separable = objectives.OBJECTIVES[name].separable
    for trains, chunk_rows in (("h", None), ("hwb", 12), ("hwb", 3)):
        out, _ = check_linear_preference(
            backend, batch, name, trains=trains, chunk_rows=chunk_rows, options=options_for(name)
        )
        if trains == "hwb":
            assert out.plan.name == ("pair_chunks" if separable and chunk_rows == 12 else "recompute")
    check_linear_preference(backend, batch.pack(), name, options=options_for(name), reduction="sum")


PLANS = ["frozen_head", "pair_chunks", "recompute"]
WAYS = {
    "smoothed, any upstream": {"options": Options(beta=0.5, label_smoothing=0.2), "upstream": -2.5},
    "temperature": {"temperature": 0.7, "upstream": 3.0},
    "softcap": {"softcap": 4.0},
    "softcap, scale, temperature": {"softcap": 4.0, "logit_scale": 0.6, "temperature": 1.4},
    "logit scale": {"logit_scale": 2.0},
    "sum": {"reduction": "sum", "upstream": 0.5},
    "LD-DPO": {"ld_alpha": 0.3},
    "WPO": {"use_weighting": True},
    "f-divergence": {"options": Options(f_divergence="js"), "loss_kwargs": {"f_divergence": "js"}},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.3, 0.1]},
    "reference-free": {"live_reference": False, "reference_logps": 0.0},
}


QUICK = ("smoothed, any upstream", "softcap, scale, temperature", "MPO")


# What the options do is the same for every backend and for both 16-bit dtypes.
@pytest.mark.nightly_cases(backend=("torch",), way=tuple(WAYS.keys() - set(QUICK)))
@pytest.mark.nightly_cases(dtype=(torch.float16,), way=tuple(WAYS.keys() - set(QUICK)))
@pytest.mark.quick_cases(way=QUICK)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_with_every_option(backend, dtype, plan, way):
    batch = make_head_batch(2, 7, 20, 41, dtype, backend.device, scale=1.0)
    trains = "h" if plan == "frozen_head" else "hwb"
    for data in (batch, batch.pack()):
        out, _ = check_linear_preference(backend, data, trains=trains, plan=plan, chunk_rows=14, **WAYS[way])
        assert out.plan.name == plan and out.plan.chunks > 1


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.dtypes(*PLAIN)
def test_every_plan_with_weights_and_cached_references(backend, dtype, plan):
    batch = make_head_batch(2, 7, 20, 41, dtype, backend.device)
    trains = "h" if plan == "frozen_head" else "hwb"
    weights = torch.rand(4, 7, device=backend.device)
    weights[:, 3] = 0
    how = {"trains": trains, "plan": plan, "chunk_rows": 14}
    check_linear_preference(backend, batch, token_weights=weights, **how)
    check_linear_preference(backend, batch, token_weights=weights, ld_alpha=0.5, use_weighting=True, **how)
    packed = batch.pack()
    check_linear_preference(backend, packed, "ipo", token_weights=weights.flatten(), **how)
    tokens = -3 * normal(4, 7).abs().to(backend.device)
    for cache in (tokens, tokens.sum(1)):
        check_linear_preference(backend, batch, live_reference=False, reference_logps=cache, **how)
    check_linear_preference(backend, packed, live_reference=False, reference_logps=tokens.flatten(), **how)


@pytest.mark.nightly_cases(trains=tuple(set(TRAINS) - {"w", "b"}), backend=("torch",))
@pytest.mark.nightly_cases(trains=tuple(set(TRAINS) - {"w", "b"}), dtype=(torch.bfloat16,))
@pytest.mark.quick_cases(trains=("w", "b"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("trains", TRAINS)
def test_whatever_trains(backend, dtype, trains):
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device)
    for chunk_rows in (None, 12, 5):
        for options in ({}, {"loss_type": "aot"}, {"loss_type": "tdpo2"}, {"softcap": 3.0}):
            check_linear_preference(backend, batch, trains=trains, chunk_rows=chunk_rows, **options)
    per_pair = torch.tensor([1.0, -0.5])
    out, _ = check_linear_preference(backend, batch, trains=trains, reduction="none", upstream=per_pair)
    assert out.plan.name == {"": "forward_only", "h": "frozen_head"}.get(trains, "recompute")


def test_a_loss_of_ones_own(backend, dtype):
    batch = make_head_batch(3, 6, 16, 30, dtype, backend.device)

    def hinge(scores, beta):
        return torch.relu(1 - beta * scores.margins)

    for chunk_rows in (12, 4):  # pair_chunks, recompute
        named, of_named = check_linear_preference(backend, batch, "hinge", chunk_rows=chunk_rows)
        models = leaves(batch, "hwb")
        own = fused_linear_token_dpo(
            models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], loss_type=hinge,
            reference_hidden=batch.reference_hidden, reference_weight=batch.reference_weight,
            reference_bias=batch.reference_bias, backend=backend.name,
            max_chunk_bytes=bytes_for(chunk_rows, batch),
        )  # fmt: skip
        own.loss.backward()
        assert own.plan.name == "recompute", "whether an unknown function couples the pairs cannot be known"
        assert_within(own.loss, named.loss.double(), 1e-5, "loss")
        for name, leaf in models.items():
            largest = of_named[name].grad.double().abs().max().cpu()
            unit = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
            assert_within(leaf.grad, of_named[name].grad, unit * largest, f"gradient of the {name}")


def test_a_reference_of_another_size_and_dtype(backend, dtype):
    """A reference with an H of its own, in another precision, without a bias."""
    batch = make_head_batch(2, 5, 16, 30, dtype, backend.device, reference_size=9)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32 if dtype != EXACT else EXACT
    batch.reference_hidden, batch.reference_weight = batch.reference_hidden.to(other), batch.reference_weight.to(other)
    batch.reference_bias = None
    for loss_type in ("sigmoid", "tdpo1"):
        for chunk_rows in (10, 3):
            check_linear_preference(backend, batch, loss_type, chunk_rows=chunk_rows)


def test_no_reference_is_needed_by_simpo(backend, dtype):
    batch = make_head_batch(2, 5, 16, 30, dtype, backend.device)
    check_linear_preference(backend, batch, "simpo", live_reference=False)


# --- equality with the path from logits, and of chunks with each other ------------------------------------------------


@pytest.mark.dtypes(torch.float32, EXACT)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "tdpo2", "aot"])
def test_the_same_results_as_from_logits(backend, dtype, loss_type):
    batch = make_head_batch(3, 8, 24, 61, dtype, backend.device)

    def linear(models, **options):
        return fused_linear_token_dpo(
            models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"],
            reference_hidden=batch.reference_hidden, reference_weight=batch.reference_weight,
            reference_bias=batch.reference_bias, loss_type=loss_type, backend=backend.name, **options,
        )  # fmt: skip

    def logits(models):
        return fused_token_dpo(
            torch.nn.functional.linear(models["hidden"], models["weight"], models["bias"]), batch.labels,
            reference_logits=torch.nn.functional.linear(
                batch.reference_hidden, batch.reference_weight, batch.reference_bias
            ),
            loss_type=loss_type, backend=backend.name,
        )  # fmt: skip

    expected_models = leaves(batch, "hwb")
    expected = logits(expected_models)
    expected.loss.backward()
    unit = 1e-12 if dtype == EXACT else 2e-5
    divergence = loss_type.startswith("tdpo")
    for budget in (None, *(bytes_for(rows, batch, divergence=divergence) for rows in (16, 1))):
        models = leaves(batch, "hwb")
        out = linear(models, max_chunk_bytes=budget)
        out.loss.backward()
        for name, value in out._asdict().items():
            assert_within(value, getattr(expected, name).double(), 10 * unit, name)
        for name, leaf in models.items():
            grad = expected_models[name].grad.double()
            assert_within(leaf.grad, grad, unit * grad.abs().max().cpu(), f"gradient of the {name}")


def test_stats_equal_those_of_the_logits(backend):
    """In float32, exactly the function of the product's result that the path from logits computes."""
    batch = make_head_batch(2, 6, 24, 61, torch.float32, backend.device)
    logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
    reference = torch.nn.functional.linear(batch.reference_hidden, batch.reference_weight, batch.reference_bias)
    expected = token_stats(
        logits, batch.labels, reference_logits=reference, outputs=oracle.STATS, temperature=0.8, backend=backend.name
    )
    actual = linear_token_stats(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, reference_hidden=batch.reference_hidden,
        reference_weight=batch.reference_weight, reference_bias=batch.reference_bias, outputs=oracle.STATS,
        temperature=0.8, backend=backend.name,
    )  # fmt: skip
    for name, value in actual._asdict().items():
        assert value.shape == batch.labels.shape and value.dtype == getattr(expected, name).dtype
        assert_within(value, getattr(expected, name).double(), 2e-5, name)


CHUNKS = (1, 2, 3, 7, 16, 1000)


@pytest.mark.nightly_cases(backend=("torch",), plan=("pair_chunks", "frozen_head"))
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
def test_the_chunk_size_does_not_show(backend, dtype, plan):
    """One row, a boundary inside a sequence, inside a pair, between pairs, everything at once."""
    batch = make_head_batch(4, 8, 24, 61, dtype, backend.device)
    trains = "h" if plan == "frozen_head" else "hwb"
    seen = set()
    for chunk_rows in CHUNKS:
        if plan == "pair_chunks" and chunk_rows < 16:
            continue  # no pair fits
        out, _ = check_linear_preference(backend, batch, plan=plan, trains=trains, chunk_rows=chunk_rows, upstream=1.7)
        seen.add(out.plan.chunks)
    assert len(seen) >= (2 if plan == "pair_chunks" else 5) and 1 in seen


@st.composite
def work(draw):
    """A batch in float64 with any shape and mask, and chunks whose boundaries fall anywhere."""
    pairs, length = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    size, vocab = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    batch = make_head_batch(pairs, max(length, 1), size, vocab, EXACT, bias=draw(st.booleans()))
    mask = draw(st.lists(st.booleans(), min_size=2 * pairs * length, max_size=2 * pairs * length))
    shape = (2 * pairs, length)
    labels = torch.randint(0, vocab, shape).masked_fill(torch.tensor(mask, dtype=torch.bool).reshape(shape), IGNORE)
    cut = {"hidden": batch.hidden[:, :length], "reference_hidden": batch.reference_hidden[:, :length]}
    batch = HeadBatch(**{**vars(batch), **cut, "labels": labels})
    if draw(st.booleans()):
        batch = batch.pack() if length else batch
    return batch, draw(st.integers(1, 2 * pairs * max(length, 1) + 1))


@hypothesis.given(
    work(),
    st.sampled_from(["h", "w", "hw", "hwb", "b"]),
    st.sampled_from(["auto", "pair_chunks", "recompute"]),
    st.sampled_from(["sigmoid", "ipo", "tdpo1", "aot", ["sigmoid", "sft"]]),
    st.sampled_from(list(SHAPES)),
    st.booleans(),
)
@hypothesis.settings(max_examples=120)
def test_any_shape_and_any_chunk_boundary(drawn, trains, plan, loss_type, shape, live):
    batch, chunk_rows = drawn
    live = live or loss_type == "tdpo1"
    torch.manual_seed(0)
    models = leaves(batch, trains if batch.bias is not None or trains != "b" else "hw")
    how = {"loss_type": loss_type, "beta": 0.4, "cu_seqlens": batch.cu_seqlens}
    reference = {}
    if live:
        reference = {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}
        reference["reference_bias"] = batch.reference_bias
    else:
        how["reference_logps"] = 0.0
    options = SHAPES[shape]
    capped = options.get("softcap")
    try:
        out = fused_linear_token_dpo(
            models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], plan=plan, **how,
            **reference, **options, backend="torch",
            max_chunk_bytes=bytes_for(chunk_rows, batch, "hwb", capped, live, loss_type == "tdpo1"),
        )  # fmt: skip
    except ValueError as error:
        assert plan == "pair_chunks" and "is not possible" in str(error)
        return
    exact = leaves(batch, trains if batch.bias is not None or trains != "b" else "hw")
    scaled = {k: v for k, v in options.items() if k != "temperature"}
    z = oracle.head_logits(exact["hidden"], exact["weight"], exact["bias"], **scaled)
    z_ref = oracle.head_logits(*reference.values(), **scaled) if live else None
    truth = fused_token_dpo(
        z, batch.labels, reference_logits=z_ref, temperature=options.get("temperature", 1.0), backend="torch", **how
    )
    for name, value in out._asdict().items():
        assert_within(value, getattr(truth, name), 1e-11, name)
    out.loss.backward()
    truth.loss.backward()
    for name, leaf in models.items():
        if leaf is not None and leaf.requires_grad:
            assert_within(leaf.grad, exact[name].grad, 1e-11, f"gradient of the {name}")
