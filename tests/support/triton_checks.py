"""The Triton kernels against the float64 oracle: on a GPU if there is one, else in Triton's interpreter.

`test_triton.py` runs this file in a process of its own, because TRITON_INTERPRET=1 has to be set before Triton is
imported. The interpreter takes about 50 ms per row, so batches are of a few rows here; what does not depend on the
kernels' own cases is left to the tests over all backends, which include this one where a GPU is there.

The interpreter truncates where a GPU rounds to bf16. That is within the one ulp that `assertions` allows 16-bit
gradients, except in the rare case that truncation and the error of the fp32 result add up; none is met here.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import fast_interpreter  # noqa: F401
import fused_default
import oracle
from assertions import assert_gradient, assert_within
from cases import IGNORE, PairBatch, Rows, make_head_batch, make_pairs, make_rows, normal, pack
from comparisons import (
    check_gradient,
    check_gradient_into,
    check_layout,
    check_logps,
    check_outputs,
    check_preference,
    random_upstream,
    strided,
)
from linear_comparisons import check_linear_preference
from qkernels import backends, fused_token_dpo, token_logps, token_stats
from qkernels.backends import ops
from qkernels.backends import reference as truth
from qkernels.backends.triton import common, pair_loss_kernel, row_grad_kernel, row_stats_kernel
from qkernels.core.fields import BIT, REFERENCE_SOFTMAX, SOFTMAX

DEVICE = torch.device("cpu" if common.INTERPRETED else "cuda")
BACKEND = SimpleNamespace(name="triton", device=DEVICE)
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def splits(request, monkeypatch):
    """Over how many programs each row is spread."""
    monkeypatch.setattr(common, "splits_for", lambda *_: request.param)
    return request.param


def rows_of(vocab, dtype, count=3, **options):
    rows = make_rows((count,), vocab, dtype, DEVICE, **options)
    rows.labels[min(1, count - 1)] = vocab // 2
    return rows


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.nightly_except(vocab=(1, 515, 2049))
@pytest.mark.parametrize(
    "vocab, dtype", [(1, FLOAT), (7, BF16), (515, HALF), (1025, FLOAT), (2049, BF16), (4097, HALF)]
)
def test_everything_in_one_pass(splits, vocab, dtype):
    rows = rows_of(vocab, dtype, temperature=0.7)
    check_outputs(BACKEND, rows)
    check_gradient(BACKEND, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.nightly_cases(
    splits=(3,),
    outputs=(("logps", "entropy"), ("is_top1", "mean_logits", "log_sum_sq_probs"), ("entropy", "reference_logsumexp"),
             ("kl_reference_policy",), ("kl_policy_reference", "entropy")),
)  # fmt: skip
@pytest.mark.parametrize(
    "outputs",
    [("logps",), ("logps", "entropy"), ("logps", "reference_logps"), ("is_top1", "mean_logits", "log_sum_sq_probs"),
     ("entropy", "reference_logsumexp"), ("kl_reference_policy",), ("kl_policy_reference", "entropy")],
)  # fmt: skip
def test_each_way_to_walk_a_row(splits, outputs):
    rows = rows_of(1303, BF16, temperature=1.3)
    check_outputs(BACKEND, rows, outputs)
    upstream = random_upstream(rows, tuple(name for name in outputs if name in oracle.WITH_GRADIENT))
    if upstream:
        check_gradient(BACKEND, rows, upstream)


@pytest.mark.parametrize("dtypes", [(BF16, FLOAT), (FLOAT, BF16), (HALF, BF16)])
def test_models_of_different_dtypes(dtypes):
    rows = rows_of(1100, dtypes[0])
    rows.reference = rows_of(1100, dtypes[1], key=(5,)).logits
    check_outputs(BACKEND, rows)
    check_outputs(BACKEND, rows, ("logps", "reference_logps"))
    check_gradient(BACKEND, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.nightly_cases(splits=(3,), place=(5, 512, 1023, 2048))
@pytest.mark.parametrize("place", [0, 5, 512, 1023, 1100, 2048, 2052])
def test_the_label_may_stand_in_any_part_of_a_row(splits, place):
    """Head, first, middle and last whole tile, tail; rows begin 3 elements past a 16-byte line."""
    vocab = 2053
    rows = rows_of(vocab, FLOAT, count=1)
    rows.logits[0, place] += 8
    rows.labels[:] = place
    rows.logits = strided(rows.logits, (vocab, 1), 3)
    check_outputs(BACKEND, rows)
    check_gradient(BACKEND, rows, random_upstream(rows, ("logps",)))


def test_first_of_equal_logits_is_top1(splits):
    logits = torch.zeros(4, 1300, device=DEVICE)
    logits[:, [3, 700, 1299]] = 2.0
    labels = torch.tensor([3, 700, 1299, 0], device=DEVICE)
    top1 = token_stats(logits, labels, outputs=["is_top1"], backend="triton").is_top1
    assert top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("offset", [2.0**10, -(2.0**20)])
def test_a_large_common_offset_does_not_cancel(offset):
    rows = rows_of(1003, FLOAT, temperature=0.7)
    rows = Rows(rows.logits + offset, rows.labels, rows.reference - offset, 0.7)
    check_outputs(BACKEND, rows)
    check_gradient(BACKEND, rows, random_upstream(rows, oracle.WITH_GRADIENT))


def test_rows_that_rise_from_tile_to_tile(splits):
    stairs = 34.0 * (torch.arange(3000, device=DEVICE) // 300)
    rows = rows_of(3000, FLOAT, scale=2.0)
    rows = Rows(rows.logits + stairs, rows.labels, rows.reference - 0.5 * stairs)
    check_outputs(BACKEND, rows)
    check_gradient(BACKEND, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.parametrize("gap", [10.0, 40.0, 80.0])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_the_label_keeps_its_gradient_when_the_model_is_almost_certain(dtype, gap):
    logits = torch.zeros(2, 50, device=DEVICE)
    logits[:, 7] = gap
    leaf = logits.to(dtype).requires_grad_()
    logps = token_logps(leaf, torch.tensor([7, 8], device=DEVICE), backend="triton")
    logps.sum().backward()
    other = math.exp(-gap) / (1 + 49 * math.exp(-gap))
    # One ulp of bf16 is 2^-7 of the smallest number of its binade: the interpreter truncates.
    relative = 1e-5 if dtype == FLOAT else 2**-7
    assert leaf.grad[0, 7].item() == pytest.approx(49 * other, rel=relative, abs=0)
    assert leaf.grad[0, 8].item() == pytest.approx(-other, rel=relative, abs=0)
    assert leaf.grad[1, 8].item() == pytest.approx(1 - other, rel=relative, abs=0)
    assert logps[0].item() == pytest.approx(-math.log1p(49 * math.exp(-gap)), rel=2e-6, abs=0)


# --- infinities and NaN -----------------------------------------------------------------------------------------------


@pytest.mark.nightly_except(masked=(1100,))
@pytest.mark.parametrize("masked", [1, 512, 1100])
def test_a_row_may_begin_with_minus_infinity(splits, masked):
    rows = rows_of(1303, BF16)
    rows.labels[:] = torch.tensor([1302, 1301, 1300], device=DEVICE)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[:, :masked] = -torch.inf
    reference[:, :masked] = -torch.inf
    both = Rows(logits, rows.labels, reference)
    check_outputs(BACKEND, both)
    grad = check_gradient(BACKEND, both, random_upstream(both, oracle.WITH_GRADIENT))
    assert bool((grad[:, :masked] == 0).all())


@pytest.mark.nightly_cases(mask=(-3e38,), splits=(3,))
@pytest.mark.nightly_except(mask=(-3e38, -torch.inf))
@pytest.mark.parametrize("mask", [-1e9, -3e38, -torch.inf])
def test_masked_vocabulary(splits, mask):
    """Forbidden tokens are written as -inf, as -1e9 or as the smallest number: also whole tiles of them."""
    rows = rows_of(1303, FLOAT)
    rows.labels[:] = torch.tensor([3, 7, 1302], device=DEVICE)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    for values in (logits, reference):
        values[0, 8:] = mask
        values[0, :3] = mask
        values[0, 4:8] = mask  # a single legal token: certain
        values[1, 9::2] = mask
        values[2, 300:1200] = mask
    both = Rows(logits, rows.labels, reference)
    # The oracle's own log-probs of -3e38 are far from everything else; what a mask means is looked at.
    names = tuple(name for name in oracle.STATS if name != "log_sum_sq_probs")
    check_outputs(BACKEND, both, names)
    grad = check_gradient(BACKEND, both, random_upstream(both, oracle.WITH_GRADIENT))
    assert (grad[0] != 0).nonzero().tolist() == [[3]] and bool((grad[2, 300:1200] == 0).all())
    assert token_logps(logits, rows.labels, backend="triton")[0] == 0


def test_divergence_is_infinite_where_the_other_model_forbids_a_token(splits):
    rows = rows_of(1300, FLOAT)
    rows.labels[:] = torch.tensor([5, 6, 7], device=DEVICE)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[:, 600:] = -torch.inf
    check_outputs(BACKEND, Rows(logits, rows.labels, reference))
    reference[:, 100:] = -torch.inf
    check_outputs(BACKEND, Rows(rows.logits, rows.labels, reference))
    unused = Rows(logits, rows.labels, rows.reference)
    check_gradient(BACKEND, unused, random_upstream(unused, ("logps", "kl_policy_reference")))


@pytest.mark.nightly_except(broken=("nan", "all -inf"))
@pytest.mark.nightly_cases(broken=("nan",), splits=(3,))
@pytest.mark.parametrize("broken", ["nan", "nan label", "all -inf", "+inf", "+inf label"])
def test_a_broken_row_is_nan_alone(splits, broken):
    rows = rows_of(1300, FLOAT)
    rows.labels[:] = torch.tensor([1, 2, 3], device=DEVICE)
    how = {"reference_logits": rows.reference, "outputs": oracle.STATS, "backend": "triton"}
    clean = token_stats(rows.logits, rows.labels, **how)
    bad = rows.logits.clone()
    if broken == "all -inf":
        bad[1] = -torch.inf
    else:
        bad[1, 2 if "label" in broken else 900] = torch.nan if "nan" in broken else torch.inf
    stats = token_stats(bad, rows.labels, **how)
    for name, value in stats._asdict().items():
        if name not in ("reference_logps", "reference_logsumexp", "is_top1"):
            assert bool(value[1].isnan()), name
        assert torch.equal(value[[0, 2]], getattr(clean, name)[[0, 2]]), name
    leaf = bad.clone().requires_grad_()
    token_logps(leaf, rows.labels, backend="triton").sum().backward()
    assert bool(leaf.grad[1].isnan().all()) and bool(leaf.grad[[0, 2]].isfinite().all())


@pytest.mark.nightly_except(splits=(1,))
def test_a_forbidden_label(splits):
    rows = rows_of(1300, BF16)
    rows.labels[:] = torch.tensor([5, 6, 7], device=DEVICE)
    rows.logits[1, 6] = -torch.inf
    check_logps(BACKEND, rows)
    check_gradient(BACKEND, rows, random_upstream(rows, ("logps",)))


# --- rows that are not read -------------------------------------------------------------------------------------------


@pytest.mark.nightly_cases(splits=(1,), outputs=(("logps",),))
@pytest.mark.nightly_cases(splits=(3,), outputs=(oracle.WITH_GRADIENT,))
@pytest.mark.parametrize("outputs", [("logps",), oracle.WITH_GRADIENT], ids=["plain", "full"])
def test_ignored_rows_and_rows_without_gradient_are_not_read(splits, outputs):
    rows = rows_of(1300, BF16, count=4)
    rows.labels[:] = torch.tensor([3, IGNORE, 5, 6], device=DEVICE)
    how = {"outputs": oracle.STATS, "backend": "triton"}
    stats = token_stats(rows.logits, rows.labels, reference_logits=rows.reference, **how)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[1], reference[1] = torch.nan, torch.nan
    again = token_stats(logits, rows.labels, reference_logits=reference, **how)
    for name, value in again._asdict().items():
        assert torch.equal(value, getattr(stats, name)), name
        assert value[1] == 0

    full = len(outputs) > 1
    fields = SOFTMAX | REFERENCE_SOFTMAX
    softmax = ops.row_stats.op(*batched(logits, rows.labels, reference), fields, 1.0, IGNORE, "triton")
    coefficients = normal(5 if full else 1, 1, 4).to(DEVICE)
    coefficients[:, 0, 3] = 0
    logits[3], reference[3] = torch.nan, torch.nan
    saved = (softmax[:3], softmax[3:])
    args = (*batched(logits, rows.labels, reference), *saved, coefficients, None, 1.0, IGNORE, "triton")
    grad = ops.row_grad.op(*args)[0]
    assert bool((grad[[1, 3]] == 0).all()) and bool(grad[[0, 2]].isfinite().all()) and bool((grad[0] != 0).any())
    ops.row_grad_.op(*args)
    assert torch.equal(logits, grad)


def batched(*tensors):
    return tuple(tensor.unsqueeze(0) for tensor in tensors)


@pytest.mark.nightly_except(splits=(1,))
def test_labels_outside_the_vocabulary(splits, monkeypatch):
    rows = rows_of(1300, FLOAT, count=4)
    rows.labels[:] = torch.tensor([3, 1300, -1, 2**40], device=DEVICE)
    args = batched(rows.logits, rows.labels, rows.reference)
    with monkeypatch.context() as patch:
        patch.setenv("QKERNELS_CHECK", "1")
        with pytest.raises(IndexError, match=r"labels\[1\] = 1300 is outside \[0, 1300\)"):
            ops.row_stats.op(*args, SOFTMAX, 1.0, IGNORE, "triton")
    monkeypatch.setattr(common, "check_labels", lambda *_: None)  # what a GPU does without that variable
    for fields in (SOFTMAX, SOFTMAX | REFERENCE_SOFTMAX | BIT["kl_reference_policy"]):
        stats = ops.row_stats.op(*args, fields, 1.0, IGNORE, "triton")
        assert bool(stats[:, 0, 1:].isnan().all()) and bool(stats[:, 0, 0].isfinite().all())
    softmax = ops.row_stats.op(*args, SOFTMAX, 1.0, IGNORE, "triton")
    ones = torch.ones(1, 1, 4, device=DEVICE)
    grad = ops.row_grad.op(args[0], args[1], None, softmax, None, ones, None, 1.0, IGNORE, "triton")
    assert bool(grad[0, 1:].isnan().all()) and bool(grad[0, 0].isfinite().all())


# --- memory layout ----------------------------------------------------------------------------------------------------


@pytest.mark.nightly_cases(offset=(1,), dtype=(FLOAT,))
@pytest.mark.nightly_cases(offset=(4,), dtype=(BF16,))
@pytest.mark.nightly_except(offset=(1, 4))
@pytest.mark.parametrize("offset", [1, 4, 7])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_any_base_alignment(dtype, offset):
    """Policy and reference aligned differently; nothing is written outside the rows."""
    rows = make_rows((1, 3), 1203, dtype, DEVICE)
    rows.logits = strided(rows.logits, (3609, 1203, 1), offset)
    rows.reference = strided(rows.reference, (3609, 1203, 1), 8 - offset)
    check_layout(BACKEND, rows)


@pytest.mark.nightly_except(splits=(1,))
def test_any_stride_of_the_leading_dimensions(splits):
    rows = make_rows((2, 2), 1100, BF16, DEVICE)
    time_first = rows.logits.transpose(0, 1).contiguous().transpose(0, 1)
    check_layout(BACKEND, Rows(time_first, rows.labels, strided(rows.reference, (2300, 1109, 1), 0)))


def test_packed_rows_and_a_slice_of_the_vocabulary():
    big = make_rows((3,), 1200, HALF, DEVICE)
    labels = big.labels.clamp_max(1090)
    check_layout(BACKEND, Rows(big.logits[..., 5:1100], labels, big.reference[..., :1095]))


@pytest.mark.nightly_except(splits=(1,))
def test_gradient_in_a_new_tensor_has_the_bits_of_the_one_in_place(splits):
    rows = make_rows((1, 3), 1203, BF16, DEVICE)
    args = (rows.logits, rows.labels, rows.reference)
    softmax = ops.row_stats.op(*args, SOFTMAX | REFERENCE_SOFTMAX, 0.9, IGNORE, "triton")
    for full in (False, True):
        logits = strided(rows.logits, (4000, 1205, 1), 3)
        coefficients = normal(5 if full else 1, 1, 3).to(DEVICE)
        saved = (softmax[:3], softmax[3:])
        args = (logits, rows.labels, rows.reference, *saved, coefficients, None, 0.9, IGNORE, "triton")
        expected = ops.row_grad.op(*args)
        ops.row_grad_.op(*args)
        assert expected.is_contiguous() and torch.equal(logits, expected)


@pytest.mark.nightly_except(narrow=(BF16,), vocab=(7, 1203), splits=(1,))
@pytest.mark.parametrize("narrow", [BF16, HALF])
@pytest.mark.parametrize("vocab, gap, offset", [(7, 0, 0), (515, 1, 0), (1203, 5, 3), (1200, 8, 8)])
def test_gradient_of_fp32_logits_into_sixteen_bits(splits, vocab, gap, offset, narrow):
    """As the path from hidden states wants it: another width, another alignment of every row."""
    rows = make_rows((4,), vocab, FLOAT, DEVICE, temperature=0.8)
    backend = SimpleNamespace(name="triton", device=DEVICE, module=backends.get("triton"))
    for outputs in (("logps",), oracle.WITH_GRADIENT):
        check_gradient_into(backend, rows, narrow, outputs, gap, offset)


@pytest.mark.nightly_except(dtype=(BF16,))
@pytest.mark.parametrize("plan", ["frozen_head", "pair_chunks", "recompute"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_from_hidden_states(plan, dtype):
    batch = make_head_batch(1, 3, 8, 70, dtype, DEVICE)
    check_linear_preference(
        BACKEND, batch, plan=plan, trains="h" if plan == "frozen_head" else "hwb", softcap=3.0, upstream=-1.5
    )


def test_divergence_from_hidden_states():
    # In fp32: of a 16-bit gradient that is truncated (see above) the whole comes out 0.4 % too small.
    batch = make_head_batch(1, 3, 8, 70, FLOAT, DEVICE)
    check_linear_preference(BACKEND, batch, "tdpo1", chunk_rows=3)


@pytest.mark.nightly_except(splits=(3,))
def test_cached_and_live_log_probs_have_the_same_bits(splits):
    """Whatever else is gathered on the way, and whichever of the two models it is."""
    rows = rows_of(2600, BF16)
    single = token_logps(rows.logits, rows.labels, backend="triton")
    for outputs in (("logps", "entropy"), ("logps", "mean_logits"), ("logps", "reference_logps"), oracle.STATS):
        with_reference = any(name in oracle.WITH_REFERENCE for name in outputs)
        ref = rows.reference if with_reference else None
        how = {"outputs": outputs, "backend": "triton"}
        stats = token_stats(rows.logits, rows.labels, reference_logits=ref, **how)
        assert torch.equal(stats.logps, single), outputs
        if with_reference:
            swapped = token_stats(rows.reference, rows.labels, reference_logits=rows.logits, **how)
            assert torch.equal(swapped.reference_logps, single), outputs


# --- pair loss --------------------------------------------------------------------------------------------------------


@pytest.mark.nightly_cases(packed=(False,), given=("per sequence",))
@pytest.mark.nightly_cases(packed=(True,), given=("none",))
@pytest.mark.parametrize("given", ["none", "per token", "per sequence"])
@pytest.mark.parametrize("packed", [False, True])
def test_pair_loss(packed, given):
    pairs, length = 9, 1100  # more pairs than are summed at once, sequences longer than a block
    shape = (1, 2 * pairs * length) if packed else (2 * pairs, length)
    logps = -5 * normal(*shape).abs().to(DEVICE)
    reference = -5 * normal(*shape, key=(1,)).abs().to(DEVICE)
    weights = normal(*shape, key=(2,)).abs().clamp_max(1).to(DEVICE)
    weights[weights < 0.3] = 0
    ends = None
    if packed:
        ends = torch.arange(0, 2 * pairs + 1, device=DEVICE, dtype=torch.int32) * length
        ends[3] = ends[4]  # an empty sequence, and one of twice the length
    logps.view(-1)[5] = reference.view(-1)[5] = -torch.inf
    weights.view(-1)[5] = 1.0
    if given != "per token":
        logps.view(-1)[5] = -1.0
        reference = truth.Sequences.of(logps, ends).sums(logps * weights) + normal(2 * pairs).to(DEVICE)
    if given == "none":
        reference = None
    labels = torch.where(weights == 0, 7, 0)
    for smoothing, weighted in ((0.0, True), (0.1, False)):
        weights = weights if weighted else (weights != 0).float()
        how = (labels, weights.double(), ends, 0.1, smoothing, 7)
        expected = truth.pair_loss(logps.double(), None if reference is None else reference.double(), *how)
        poisoned = torch.where(weights == 0, torch.nan, logps)
        how = (labels, weights if weighted else None, ends, 0.1, smoothing, 7)
        actual = ops.pair_loss.op(poisoned, reference, *how, "triton")
        for name, value, exact in zip(("loss", "rewards", "grad", "tokens"), actual, expected, strict=True):
            assert value.dtype == FLOAT and value.shape == exact.shape
            # All sums are fp64 here, so one rounding is left; per-token ratios of the reference are exact in fp64 too.
            assert_within(value, exact, 1e-6 * exact.abs().clamp_min(1e-3).cpu(), name)


@pytest.mark.parametrize("case", fused_default.CASES, ids=str)
def test_pair_loss_is_the_objective(case):
    fused_default.check_fused_default(BACKEND, FLOAT, case)


def test_whole_path_dense_and_packed():
    batch = make_pairs(1, 4, 300, BF16, DEVICE)
    check_preference(BACKEND, batch)
    check_preference(BACKEND, pack(batch), options=oracle.Options(beta=0.3, label_smoothing=0.1), upstream=-2.5)
    check_preference(BACKEND, batch, "tdpo2", inplace_backward=True)


def test_equal_models_have_loss_ln_2_and_rewards_of_exactly_zero():
    batch = make_pairs(1, 3, 300, BF16, DEVICE)
    equal = PairBatch(batch.logits, batch.labels, batch.logits.clone())
    out, _ = check_preference(BACKEND, equal)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7) and bool((out.token_rewards == 0).all())


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces, forward", [(1, ["row_stats", "pair_loss"]), (2, ["row_stats", "combine", "pair_loss"])]
)
def test_launches_per_step(monkeypatch, pieces, forward):
    """At most three for the forward, one for the backward."""
    launched = []

    def count(module, name):
        kernel = getattr(module, name + "_kernel")

        class Counted:
            def __getitem__(self, grid):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name + "_kernel", Counted())

    for module, name in (
        (row_stats_kernel, "row_stats"), (row_stats_kernel, "combine"), (row_grad_kernel, "row_grad"),
        (pair_loss_kernel, "pair_loss"),
    ):  # fmt: skip
        count(module, name)
    monkeypatch.setattr(common, "splits_for", lambda *_: pieces)
    batch = make_pairs(1, 2, 40, FLOAT, DEVICE)
    leaf = batch.logits.clone().requires_grad_()
    loss = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend="triton").loss
    assert launched == forward
    loss.backward()
    assert launched == [*forward, "row_grad"]


@pytest.mark.parametrize("options, full", [({}, False), ({"loss_type": "ipo"}, False), ({"loss_type": "tdpo2"}, True)])
def test_five_coefficients_only_where_a_divergence_is_differentiated(monkeypatch, options, full):
    """The default loss takes the plain kernel: fewer loads, instructions and registers."""
    kernel, seen = row_grad_kernel.row_grad_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **flags):
                seen.append((flags["FULL"], flags["WITH_REFERENCE"]))
                return kernel[grid](*args, **flags)

            return launch

    monkeypatch.setattr(row_grad_kernel, "row_grad_kernel", Watched())
    batch = make_pairs(1, 2, 40, FLOAT, DEVICE)
    leaf = batch.logits.clone().requires_grad_()
    how = {"reference_logits": batch.reference, "backend": "triton", **options}
    fused_token_dpo(leaf, batch.labels, **how).loss.backward()
    assert seen == [(full, full)]


def test_nothing_is_made_on_torchs_default_device():
    """Where that is a GPU, a number that travels by way of a tensor makes the host wait."""
    batch = make_pairs(1, 2, 40, FLOAT, DEVICE)
    found = []
    for default in (DEVICE, torch.device("meta")):
        leaf = batch.logits.clone().requires_grad_()
        with default:
            out = fused_token_dpo(
                leaf, batch.labels, reference_logits=batch.reference, temperature=0.7, label_smoothing=0.1,
                backend="triton",
            )  # fmt: skip
            out.loss.backward()
        found.append((out.loss, leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_rows_that_are_too_long_for_32_bit_positions_are_refused():
    logits = torch.zeros(1, device=DEVICE).expand(1, 1, 2**30 + 1)
    labels = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="more than 2\\^30 entries"):
        ops.row_stats.op(logits, labels, None, SOFTMAX, 1.0, IGNORE, "triton")


def test_auto_takes_the_interpreter_for_nothing():
    assert backends.resolve("auto", torch.zeros(1)) != "triton"
    assert backends.resolve("triton", torch.zeros(1, device=DEVICE)) == "triton"


@pytest.mark.nightly_except(splits=(1,))
def test_gradient_of_one_row_against_the_oracle_term_by_term(splits):
    """Five coefficients given directly, not through the chain rule of the outputs."""
    rows = rows_of(1300, FLOAT, count=2)
    rows.labels[:] = torch.tensor([2, 1299], device=DEVICE)
    upstream = random_upstream(rows, oracle.WITH_GRADIENT, key=3)
    expected = oracle.gradient(rows.logits, rows.labels, upstream, rows.reference)
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, rows.reference)
    grad = check_gradient(BACKEND, rows, upstream)
    assert_gradient(grad, expected, terms)
    with pytest.raises(AssertionError, match="values are wrong"):
        assert_gradient(grad + 1e-4 * grad.abs().max(), expected, terms)
