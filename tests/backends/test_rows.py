"""Per-row results and their gradients against the float64 oracle: every shape, stride, offset, dtype and output."""

from __future__ import annotations

from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import oracle
from assertions import ROW_BOUNDS, assert_gradient, assert_within
from cases import IGNORE, Rows, generator, make_labels, make_rows, normal
from comparisons import (
    check_gradient,
    check_gradient_into,
    check_layout,
    check_logps,
    check_outputs,
    random_upstream,
    row_gradient,
    strided,
)
from qkernels import token_logps, token_stats

pytestmark = pytest.mark.every_dtype

VOCABS = (1, 2, 7, 17, 1003, 2048, 2049, 4097, 32001)
ROWS = (2, 4)
# The torch backend has neither blocks nor vectors: of sweeps over sizes and places it takes few but in the nightly run.
torch_takes_few = pytest.mark.nightly_cases(backend=("torch",), vocab=tuple(v for v in VOCABS if v not in (17, 2049)))


def rows_for(vocab: int, temperature: float) -> tuple[int, ...]:
    return (5,) if vocab > 4097 else ROWS if temperature == 1.0 else (6,)


# --- values and gradients over vocabulary, dtype, temperature ---------------------------------------------------------


@torch_takes_few
@pytest.mark.quick_cases(vocab=(7, 2049, 4097), temperature=(0.7,))
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("vocab", VOCABS)
def test_logps_match_the_truth(backend, dtype, vocab, temperature):
    check_logps(backend, make_rows(rows_for(vocab, temperature), vocab, dtype, backend.device, temperature=temperature))


@torch_takes_few
@pytest.mark.quick_cases(vocab=(17, 2049), temperature=(0.7,))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", VOCABS)
def test_all_outputs_in_one_pass_match_the_truth(backend, dtype, vocab, temperature):
    check_outputs(
        backend, make_rows(rows_for(vocab, temperature), vocab, dtype, backend.device, temperature=temperature)
    )


@pytest.mark.nightly_cases(backend=("torch",), vocab=(1003, 2049))
@pytest.mark.parametrize("name", oracle.STATS)
@pytest.mark.parametrize("vocab", [3, 1003, 2049])
def test_each_output_alone_matches_the_truth(backend, dtype, name, vocab):
    check_outputs(backend, make_rows((5,), vocab, dtype, backend.device, temperature=1.3), (name,))


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_every_pair_of_outputs_matches_the_truth(backend, dtype):
    rows = make_rows((3,), 131, dtype, backend.device)
    for names in combinations(oracle.STATS, 2):
        check_outputs(backend, rows, names)
        check_outputs(backend, rows, names[::-1])


@torch_takes_few
@pytest.mark.quick_cases(vocab=(7, 2049, 4097), temperature=(0.7,))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", VOCABS)
def test_gradient_of_logps_matches_the_truth(backend, dtype, vocab, temperature):
    rows = make_rows(rows_for(vocab, temperature), vocab, dtype, backend.device, temperature=temperature)
    check_gradient(backend, rows, random_upstream(rows, ("logps",)))


@torch_takes_few
@pytest.mark.quick_cases(vocab=(17, 2049), temperature=(0.7,))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", VOCABS)
def test_gradients_of_all_outputs_combined_match_the_truth(backend, dtype, vocab, temperature):
    rows = make_rows(rows_for(vocab, temperature), vocab, dtype, backend.device, temperature=temperature)
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.nightly_cases(backend=("torch",), vocab=(1, 2, 2049))
@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
@pytest.mark.parametrize("vocab", [1, 2, 17, 2049])
def test_gradient_of_each_output_alone_matches_the_truth(backend, dtype, name, vocab):
    rows = make_rows((5,), vocab, dtype, backend.device, temperature=1.3)
    check_gradient(backend, rows, random_upstream(rows, (name,)))


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_gradients_of_every_pair_of_outputs_match_the_truth(backend, dtype):
    rows = make_rows((4,), 131, dtype, backend.device)
    for names in combinations(oracle.WITH_GRADIENT, 2):
        check_gradient(backend, rows, random_upstream(rows, names))


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_vocabulary_of_a_large_model_plus_one_token(backend, dtype):
    rows = make_rows((3,), 128257, dtype, backend.device, scale=2.0)
    rows.labels[1] = 128256
    check_outputs(backend, rows)
    check_gradient(backend, rows, random_upstream(rows, ("logps",)))
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_flat_and_peaked_rows(backend, dtype, scale):
    rows = make_rows((6,), 517, dtype, backend.device, scale=scale)
    check_outputs(backend, rows)
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.nightly_cases(backend=("torch",), step=(8.0, 25.0, 34.0, 36.0, 60.0))
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("step", [0.5, 8.0, 25.0, 34.0, 36.0, 60.0, 300.0])
@pytest.mark.parametrize("falling", [False, True])
def test_rows_that_rise_or_fall_from_block_to_block(backend, dtype, step, falling):
    """Running maxima that move at every block, by more and less than a running sum can hold."""
    vocab = 6200
    stairs = step * (torch.arange(vocab) // 620)
    rows = make_rows((3,), vocab, dtype, backend.device, scale=2.0)
    logits = rows.logits.cpu().float() + (-stairs if falling else stairs)
    reference = rows.reference.cpu().float() + (stairs if falling else -0.5 * stairs)
    labels = torch.tensor([0, vocab - 1, vocab // 2], device=backend.device)
    rows = Rows(logits.to(backend.device, dtype), labels, reference.to(backend.device, dtype))
    check_outputs(backend, rows)
    check_outputs(backend, rows, ("entropy", "log_sum_sq_probs", "mean_logits", "reference_logps"))
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("place", [100, 3000])
def test_a_maximum_that_comes_late(backend, dtype, place, temperature):
    """Confident rows, the usual case: the entropy is small and the sums are dominated by two entries.

    If these are summed relative to an earlier, much lower maximum, the rest of the row is rounded away.
    """
    tops = torch.arange(5.0, 36.0, 1.0) * temperature
    logits = 0.5 * normal(len(tops), 4100)
    logits[:, place] = tops
    logits[:, place + 1] = tops - 2 * temperature
    labels = torch.full((len(tops),), 3, device=backend.device)
    labels[::3] = place + 1
    rows = Rows(logits.to(backend.device, dtype), labels, logits.flip(0).to(backend.device, dtype), temperature)
    check_outputs(backend, rows, ("logps", "logsumexp", "entropy", "log_sum_sq_probs", "mean_logits"))
    check_outputs(backend, rows)
    check_gradient(backend, rows, random_upstream(rows, ("logps", "entropy")))


@pytest.mark.nightly_cases(backend=("torch",), place=(1, 15, 16, 63, 64, 2047, 2048, 2049, 4095, 4096))
@pytest.mark.dtypes(torch.float32, torch.float16)
@pytest.mark.parametrize("place", [0, 1, 15, 16, 63, 64, 2047, 2048, 2049, 4095, 4096, 4098])
def test_the_largest_entry_may_stand_anywhere(backend, dtype, place):
    rows = make_rows((4,), 4099, dtype, backend.device)
    rows.labels = torch.tensor([place, 0, 4098, min(place + 1, 4098)], device=backend.device)
    for height in (12.0, 90.0):
        logits, reference = rows.logits.clone(), rows.reference.clone()
        logits[:, place] = height
        reference[:, place // 2] = height
        spiked = Rows(logits, rows.labels, reference)
        check_outputs(backend, spiked)
        check_outputs(backend, spiked, ("logps", "entropy", "is_top1"))
        check_gradient(backend, spiked, random_upstream(spiked, oracle.WITH_GRADIENT))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                    (torch.float16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("vocab", [7, 2049])
def test_reference_logits_of_another_dtype(backend, dtypes, vocab):
    policy, reference = dtypes
    rows = make_rows((2, 3), vocab, policy, backend.device, temperature=0.9)
    other = make_rows((2, 3), vocab, reference, backend.device, key=(5,)).logits
    rows = Rows(rows.logits, rows.labels, other, 0.9)
    check_outputs(backend, rows)
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 25.0, 1000.0])
def test_extreme_temperatures(backend, dtype, temperature):
    rows = make_rows((6,), 517, dtype, backend.device, temperature=temperature)
    check_outputs(backend, rows)
    check_outputs(backend, rows, ("logps", "entropy", "mean_logits"))
    check_gradient(backend, rows, random_upstream(rows, ("logps", "logsumexp")))
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.quick
def test_huge_logits_do_not_overflow(backend, dtype):
    """Differences of logits beyond any exponent: probabilities 0 and 1, divergences as large as the logits."""
    huge = 60000.0 if dtype == torch.float16 else 1e30
    rows = make_rows((6,), 300, dtype, backend.device)
    rows.labels = torch.tensor([7, 7, 8, 0, 299, 20], device=backend.device)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[:3, 7] = huge
    logits[3:, 20:] = -huge
    reference[0] = logits[0]
    reference[1, 8] = huge
    reference[3:, 20:] = -huge
    reference[5] = 0
    extreme = Rows(logits, rows.labels, reference)
    check_outputs(backend, extreme)
    check_outputs(backend, extreme, ("logps", "logsumexp", "entropy", "log_sum_sq_probs"))
    grad = check_gradient(backend, extreme, random_upstream(extreme, ("logps", "entropy", "kl_reference_policy")))
    assert bool(grad.isfinite().all())


@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)  # in fp64 the truth itself overflows
@pytest.mark.parametrize("vocab", [517, 6200])
def test_the_mean_of_logits_that_are_masked_with_the_lowest_number_is_finite(backend, dtype, vocab):
    """Their sum is outside of the type's range, their mean is not."""
    rows = make_rows((4,), vocab, dtype, backend.device)
    rows.labels = torch.tensor([0, 1, vocab - 1, vocab // 2], device=backend.device)
    rows.logits[0, 1::3] = torch.finfo(dtype).min / 2
    rows.logits[1, 2:] = torch.finfo(dtype).min / 2
    rows.logits[2, : vocab // 2] = torch.finfo(dtype).min / 2
    check_outputs(backend, rows, ("mean_logits",))
    check_outputs(backend, rows, ("logps", "mean_logits", "kl_policy_reference"))


def test_entropy_of_a_uniform_row_is_log_vocab_and_divergences_of_equal_rows_are_zero(backend, dtype):
    logits = torch.full((2, 1003), 1.5, dtype=dtype, device=backend.device)
    labels = torch.zeros(2, dtype=torch.int64, device=backend.device)
    stats = token_stats(
        logits, labels, reference_logits=logits.clone(), backend=backend.name,
        outputs=("entropy", "kl_reference_policy", "kl_policy_reference", "is_top1"),
    )  # fmt: skip
    assert_within(stats.entropy, torch.full((2,), 1003.0).double().log(), 5e-6, "entropy")
    assert stats.kl_reference_policy.tolist() == [0.0, 0.0]
    assert stats.kl_policy_reference.tolist() == [0.0, 0.0]
    assert stats.is_top1.tolist() == [True, True]


def test_first_of_equal_logits_is_top1(backend, dtype):
    logits = torch.zeros(4, 600, dtype=dtype, device=backend.device)
    logits[:, [3, 300, 599]] = 2.0
    labels = torch.tensor([3, 300, 599, 0], device=backend.device)
    assert token_stats(logits, labels, outputs=["is_top1"], backend=backend.name).is_top1.tolist() == [
        True, False, False, False
    ]  # fmt: skip


# --- memory layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 515])
@pytest.mark.parametrize("extra", [1, 9])
def test_row_stride_above_vocabulary(backend, dtype, vocab, extra):
    rows = make_rows((3, 2), vocab, dtype, backend.device)
    pitch = vocab + extra
    rows.logits = strided(rows.logits, (2 * pitch + 3, pitch, 1), 0)
    rows.reference = strided(rows.reference, (2 * vocab, vocab, 1), 0)
    check_layout(backend, rows)


@pytest.mark.nightly_cases(backend=("torch",), offset=(1, 2, 4, 5, 6, 7))
@pytest.mark.quick_cases(offset=(3,))
@pytest.mark.parametrize("offset", range(1, 8))
def test_any_base_alignment(backend, dtype, offset):
    rows = make_rows((2, 2), 259, dtype, backend.device)
    rows.logits = strided(rows.logits, (518, 259, 1), offset)
    rows.reference = strided(rows.reference, (518, 259, 1), 8 - offset)
    check_layout(backend, rows)


@pytest.mark.quick
def test_slices_of_a_batch(backend, dtype):
    big = make_rows((4, 6), 133, dtype, backend.device)
    for part in (
        (slice(None), slice(None, -1)),
        (slice(None), slice(1, None)),
        (slice(1, 3), slice(2, 5)),
        (slice(None, None, 2), slice(None, None, 3)),
        (slice(2, 3), slice(4, 5)),
    ):
        rows = Rows(big.logits[part], big.labels[part], big.reference[part])
        check_layout(backend, rows)


def test_slice_of_the_vocabulary(backend, dtype):
    big = make_rows((2, 3), 140, dtype, backend.device)
    labels = make_labels((2, 3), 97).to(backend.device)
    check_layout(backend, Rows(big.logits[..., 5:102], labels, big.reference[..., :97]))


def test_transposed_leading_dimensions(backend, dtype):
    rows = make_rows((3, 5), 61, dtype, backend.device)
    time_first = rows.logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert time_first.stride() == (61, 3 * 61, 1)
    check_layout(backend, Rows(time_first, rows.labels, rows.reference))
    check_layout(backend, Rows(rows.logits, rows.labels, time_first.clone()))


def test_expanded_rows(backend, dtype):
    rows = make_rows((1, 4), 33, dtype, backend.device)
    labels = make_labels((3, 4), 33).to(backend.device)
    expanded = Rows(rows.logits.expand(3, 4, 33), labels, rows.reference.expand(3, 4, 33))
    check_outputs(backend, expanded)
    check_gradient(backend, expanded, random_upstream(expanded, ("logps", "entropy")))


def test_packed_rows_and_more_than_three_dimensions(backend, dtype):
    for shape in ((7,), (2, 3, 2), (2, 1, 2, 2), (1,), (1, 1, 1)):
        rows = make_rows(shape, 37, dtype, backend.device)
        rows.labels.view(-1)[0] = 5
        check_outputs(backend, rows)
        check_logps(backend, rows)
        check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


def test_labels_of_any_stride(backend, dtype):
    rows = make_rows((3, 4), 29, dtype, backend.device)
    expected = token_logps(rows.logits, rows.labels, backend=backend.name)
    wide = torch.full((4, 9), 3, device=backend.device)
    view = wide[:, 1:7:2].T  # neither dimension contiguous
    view.copy_(rows.labels)
    assert not view.is_contiguous()
    assert torch.equal(token_logps(rows.logits, view, backend=backend.name), expected)


def test_no_rows(backend, dtype):
    logits = torch.empty(2, 0, 11, dtype=dtype, device=backend.device).requires_grad_()
    labels = torch.empty(2, 0, dtype=torch.int64, device=backend.device)
    logps = token_logps(logits, labels, backend=backend.name)
    assert logps.shape == (2, 0)
    logps.sum().backward()
    assert logits.grad.shape == (2, 0, 11)


@pytest.mark.quick_cases(vocab=(515,))
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 515, 2049, 4100])
def test_gradient_into_a_given_tensor(backend, dtype, vocab, narrow):
    """What the path from hidden states does with its fp32 logits: the gradient in the dtype of the products."""
    rows = make_rows((5,), vocab, dtype, backend.device, temperature=0.8)
    for outputs in (("logps",), oracle.WITH_GRADIENT):
        for gap in (0, 3):
            check_gradient_into(backend, rows, narrow, outputs, gap)


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_another_ignore_index(backend, dtype):
    rows = make_rows((9,), 23, dtype, backend.device)
    rows.labels = torch.tensor([0, 1, 2, 0, 22, 0, 5, 6, 7], device=backend.device)
    upstream = random_upstream(rows, ("logps", "entropy"))
    leaf = rows.logits.clone().requires_grad_()
    stats = token_stats(leaf, rows.labels, outputs=("logps", "entropy"), ignore_index=0, backend=backend.name)
    truth = oracle.token_stats(oracle.exact(rows.logits), rows.labels.cpu(), ignore_index=0)
    for name in upstream:
        assert_within(getattr(stats, name), truth[name], 1e-5, name)
        assert getattr(stats, name)[[0, 3, 5]].tolist() == [0.0, 0.0, 0.0]
    torch.autograd.backward([stats.logps, stats.entropy], [upstream["logps"], upstream["entropy"]])
    expected = oracle.gradient(rows.logits, rows.labels, upstream, ignore_index=0)
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, ignore_index=0)
    assert_gradient(leaf.grad, expected, terms)
    assert bool((leaf.grad[[0, 3, 5]] == 0).all())


# --- properties -------------------------------------------------------------------------------------------------------

LAYOUTS = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        "vocab": st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 257, 511, 1025])),
        "pad": st.integers(0, 5),
        "offset": st.integers(0, 15),
        "temperature": st.sampled_from([1.0, 0.5, 0.8, 2.5]),
        "scale": st.sampled_from([0.1, 3.0, 20.0]),
        "seed": st.integers(0, 1000),
    }
)


@given(layout=LAYOUTS)
def test_any_layout_matches_the_truth(backend, dtype, layout):
    shape, vocab = layout["shape"], layout["vocab"]
    rows = make_rows(
        shape, vocab, dtype, backend.device, key=(layout["seed"],), scale=layout["scale"],
        temperature=layout["temperature"],
    )  # fmt: skip
    pitch = vocab + layout["pad"]
    strides = [1, pitch]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    # Only the outermost stride can have a gap of its own if the inner ones are to merge.
    strides[-1] += layout["pad"] if len(shape) > 1 else 0
    rows.logits = strided(rows.logits, tuple(reversed(strides)), layout["offset"])
    check_layout(backend, rows)


@given(shift=st.floats(-2000, 2000), seed=st.integers(0, 1000), vocab=st.integers(2, 300))
@pytest.mark.dtypes(torch.float32)
def test_adding_a_constant_to_a_row_leaves_logps(backend, dtype, shift, seed, vocab):
    # Multiples of 2^-8 up to 2^12 stay exact in fp32, so both calls see the same softmax and nothing else.
    exact = (make_rows((3,), vocab, dtype, key=(seed,)).logits * 256).round() / 256
    shift = round(shift * 256) / 256
    labels = make_labels((3,), vocab, key=(seed,), ignored=0.0).to(backend.device)
    plain = token_logps(exact.to(backend.device), labels, backend=backend.name)
    shifted = token_logps((exact + shift).to(backend.device), labels, backend=backend.name)
    assert_within(shifted, plain, 2 * ROW_BOUNDS["logps"] * plain.double().abs().clamp_min(1).cpu(), "shifted logps")


@given(seed=st.integers(0, 1000), vocab=st.integers(2, 700))
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_permuting_the_vocabulary_permutes_the_gradient(backend, dtype, seed, vocab):
    rows = make_rows((4,), vocab, dtype, backend.device, key=(seed,))
    order = torch.randperm(vocab, generator=generator(seed, vocab)).to(backend.device)
    place = order.argsort()  # place[old id] = new id
    labels = torch.where(rows.labels == IGNORE, IGNORE, place[rows.labels.clamp_min(0)])
    moved = Rows(rows.logits[:, order].contiguous(), labels, rows.reference[:, order].contiguous())
    check_outputs(backend, rows)
    check_outputs(backend, moved)
    upstream = random_upstream(rows, ("logps", "entropy", "kl_policy_reference"))
    expected = oracle.gradient(rows.logits, rows.labels, upstream, rows.reference)[:, order.cpu()]
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, rows.reference)
    terms = oracle.Terms(*(part[:, order.cpu()] for part in terms))
    assert_gradient(row_gradient(backend, moved, upstream), expected, terms)


@given(exponent=st.integers(-6, 6), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_scaling_the_upstream_gradient_scales_the_gradient(backend, dtype, exponent, seed):
    rows = make_rows((3,), 77, dtype, backend.device, key=(seed,), scale=1.0)
    upstream = random_upstream(rows, ("logps", "logsumexp", "entropy"))
    factor = 2.0**exponent
    grad = row_gradient(backend, rows, upstream)
    scaled = row_gradient(backend, rows, {name: factor * weight for name, weight in upstream.items()})
    if dtype == torch.float16:  # its small entries lose bits below 2^-14
        expected = factor * oracle.gradient(rows.logits, rows.labels, upstream)
        terms = oracle.gradient_terms(rows.logits, rows.labels, upstream)
        assert_gradient(scaled, expected, oracle.Terms(*(factor * part for part in terms)))
    else:  # a power of two goes through every rounding unchanged
        assert torch.equal(scaled, factor * grad)


@given(seed=st.integers(0, 1000), vocab=st.integers(1, 400))
def test_identities_between_outputs(backend, seed, vocab):
    """Entries of a gradient sum to 0 for logps and to 1 for logsumexp; the entropy lies in [0, log V]; KL >= 0."""
    rows = make_rows((4,), vocab, torch.float32, backend.device, key=(seed,))
    stats = token_stats(
        rows.logits, rows.labels, reference_logits=rows.reference, outputs=oracle.STATS, backend=backend.name
    )
    assert bool((stats.kl_reference_policy >= 0).all()) and bool((stats.kl_policy_reference >= 0).all())
    assert bool((stats.entropy >= -2e-6).all())
    assert bool((stats.entropy <= torch.tensor(float(vocab)).log().item() + 1e-5).all())
    assert bool((stats.logps <= 0).all())
    valid = (rows.labels != IGNORE).double().cpu()
    ones = torch.ones(4, device=backend.device)
    of_logps = row_gradient(backend, rows, {"logps": ones}).double().sum(-1)
    of_logsumexp = row_gradient(backend, rows, {"logsumexp": ones}).double().sum(-1)
    assert_within(of_logps, 0 * valid, 2e-6, "row sum of dlogps")
    assert_within(of_logsumexp, valid, 2e-6, "row sum of dlogsumexp")


def test_sums_over_many_columns_do_not_drift(backend):
    """131,072 equal entries: a running fp32 sum would stop growing or drift long before the end."""
    vocab = 131072
    logits = torch.zeros(1, vocab, device=backend.device)
    logits[0, 0] = 3.0
    labels = torch.tensor([vocab - 1], device=backend.device)
    check_outputs(backend, Rows(logits, labels, normal(1, vocab).to(backend.device) * 0.01))
