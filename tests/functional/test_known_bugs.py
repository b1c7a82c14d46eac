"""Bugs that public loss-head kernels have shipped, one test each, named after what must hold.

Numbers are those of the project's list of known bugs; the threads named beside them are where they were reported.
Entries about the matrix product with the head (11, 16, 29) belong to the tests of that path.
"""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn

import oracle
from assertions import ROW_BOUNDS, assert_gradient, assert_row_output, assert_within
from cases import IGNORE, PairBatch, Rows, make_pairs, make_rows, normal, pack
from comparisons import check_gradient, check_logps, check_outputs, check_preference, random_upstream, row_gradient
from qkernels import fused_token_dpo, shift_labels, token_logps, token_mdp, token_stats

PLAIN = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("vocab", [1, 3, 31, 63, 65, 257, 1023, 1025, 2047, 2049, 3000, 50257])
def test_columns_past_the_vocabulary_do_not_count(backend, dtype, vocab):
    """known bug 1: V not a multiple of the block (verl#2656, #2899, #5349).

    All logits are far below 0, so that one padded column of 0 would be the whole softmax; the memory behind each row
    holds huge values.
    """
    memory = torch.full((4, vocab + 64), 300.0, dtype=dtype, device=backend.device)
    reference = torch.full((4, vocab + 64), 300.0, dtype=dtype, device=backend.device)
    memory[:, :vocab] = (normal(4, vocab) - 200).to(memory)
    reference[:, :vocab] = (normal(4, vocab, key=(1,)) - 200).to(memory)
    labels = torch.tensor([0, vocab - 1, vocab // 2, 0], device=backend.device)
    rows = Rows(memory[:, :vocab], labels, reference[:, :vocab])
    check_outputs(backend, rows)
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.parametrize("masked", [1, 16, 1024, 2048, 4096, 5000])
def test_a_row_may_begin_with_minus_infinity(backend, dtype, masked):
    """known bug 2: the first block of a row is all -inf (flash-attention#1930)."""
    rows = make_rows((3,), 5003, dtype, backend.device)
    rows.labels = torch.tensor([5002, 5001, 5000], device=backend.device)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[:, :masked] = -torch.inf
    reference[:, :masked] = -torch.inf
    both = Rows(logits, rows.labels, reference)
    check_outputs(backend, both)
    grad = check_gradient(backend, both, random_upstream(both, oracle.WITH_GRADIENT))
    assert bool((grad[:, :masked] == 0).all())


def test_isolated_minus_infinities_have_no_probability_and_no_gradient(backend, dtype):
    """known bug 2: -inf anywhere else: alone, in the middle, as the last block."""
    rows = make_rows((4,), 4500, dtype, backend.device)
    rows.labels = torch.tensor([7, 100, 2000, 9], device=backend.device)
    logits = rows.logits.clone()
    logits[0, 3::2] = -torch.inf
    logits[0, 7] = 1.0
    logits[1, 2048:] = -torch.inf
    logits[2, 2040:2060] = -torch.inf
    logits[3, :9] = -torch.inf
    logits[3, 10:] = -torch.inf  # a single legal token: certain
    reference = torch.where(logits == -torch.inf, -torch.inf, rows.reference)
    both = Rows(logits, rows.labels, reference)
    check_outputs(backend, both)
    grad = check_gradient(backend, both, random_upstream(both, oracle.WITH_GRADIENT))
    assert bool((grad[logits == -torch.inf] == 0).all())
    assert token_logps(logits, rows.labels, backend=backend.name)[3] == 0


def test_divergence_is_infinite_where_the_other_model_forbids_a_token(backend, dtype):
    """known bug 2: supports that differ make one KL infinite, the other stays finite, and no NaN appears."""
    rows = make_rows((3,), 300, dtype, backend.device)
    rows.labels = torch.tensor([5, 6, 7], device=backend.device)
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[:, 200:] = -torch.inf
    check_outputs(backend, Rows(logits, rows.labels, reference))  # KL(ref || pi) = inf
    reference[:, 100:] = -torch.inf
    check_outputs(backend, Rows(rows.logits, rows.labels, reference))  # KL(pi || ref) = inf
    unused = Rows(logits, rows.labels, rows.reference)
    check_gradient(backend, unused, random_upstream(unused, ("logps", "kl_policy_reference")))


@pytest.mark.parametrize("level", [-90.0, -1000.0, -30000.0])
def test_logits_may_all_lie_far_below_zero(backend, dtype, level):
    """known bug 3: a running max that starts at 0 underflows."""
    logits = (normal(3, 700) + level).to(backend.device, dtype)
    reference = (normal(3, 700, key=(1,)) + level).to(backend.device, dtype)
    rows = Rows(logits, torch.tensor([0, 699, 350], device=backend.device), reference)
    check_outputs(backend, rows)
    check_gradient(backend, rows, random_upstream(rows, oracle.WITH_GRADIENT))


@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("layout", ["row stride", "batch stride", "storage offset"])
def test_offsets_may_pass_two_to_the_31(backend, dtype, layout):
    """known bug 4: 32-bit offsets (flash-attention#714, pytorch#85786). Only the touched pages take memory."""
    if backend.device.type != "cpu" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("12 GiB of free GPU memory are missing")
    elements = 2**32 + 2**14
    try:
        memory = torch.empty(elements, dtype=dtype, device=backend.device)
    except RuntimeError:
        pytest.skip("the system does not give out 8 GiB of address space")
    vocab, far = 1003, 2**31 + 8
    shape, stride, offset = {
        "row stride": ((1, 2, vocab), (0, far, 1), 0),
        "batch stride": ((2, 2, vocab), (far, vocab + 1, 1), 3),
        "storage offset": ((1, 2, vocab), (0, vocab, 1), 2**32 - 5),
    }[layout]
    small = make_rows(shape[:2], vocab, dtype, backend.device)
    small.labels.fill_(17)
    logits = memory.as_strided(shape, stride, offset)
    logits.copy_(small.logits)
    rows = Rows(logits, small.labels, small.reference)
    check_outputs(backend, rows)
    upstream = random_upstream(rows, ("logps", "kl_reference_policy"))
    grad = check_gradient(backend, rows, upstream)
    row_gradient(backend, rows, upstream, inplace_backward=True)
    assert torch.equal(logits, grad), "the in-place gradient is not where the logits were"


def test_more_rows_than_a_grid_dimension(backend):
    """known bug 5: more than 65,535 rows (Liger#1294)."""
    logits = normal(70_000, 3).to(backend.device)
    labels = torch.arange(70_000, device=backend.device) % 4 - 1  # -1 is ignored below
    leaf = logits.clone().requires_grad_()
    logps = token_logps(leaf, labels, ignore_index=-1, backend=backend.name)
    truth = oracle.token_stats(oracle.exact(logits), labels.cpu(), ignore_index=-1)["logps"]
    assert_row_output("logps", logps, truth, torch.float32)
    upstream = {"logps": normal(70_000, key=(1,)).to(backend.device)}
    logps.backward(upstream["logps"])
    expected = oracle.gradient(logits, labels, upstream, ignore_index=-1)
    assert_gradient(leaf.grad, expected, oracle.gradient_terms(logits, labels, upstream, ignore_index=-1))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("gap", [10.0, 16.0, 20.0, 40.0, 80.0])
def test_the_label_keeps_its_gradient_when_the_model_is_almost_certain(backend, dtype, gap):
    """known bug 6: p_y -> 1 (Liger#1329). 1 - p_y is 1e-9 here, far below an ulp of 1."""
    logits = torch.zeros(2, 50, device=backend.device)
    logits[:, 7] = gap
    leaf = logits.to(dtype).requires_grad_()
    labels = torch.tensor([7, 8], device=backend.device)
    logps = token_logps(leaf, labels, backend=backend.name)
    logps.sum().backward()
    # In closed form: float64 autograd has lost 1 - p itself at a gap of 40.
    other = math.exp(-gap) / (1 + 49 * math.exp(-gap))
    relative = 1e-5 if dtype == torch.float32 else 2**-8
    assert leaf.grad[0, 7].item() == pytest.approx(49 * other, rel=relative, abs=0)
    assert leaf.grad[0, 8].item() == pytest.approx(-other, rel=relative, abs=0)
    assert leaf.grad[1, 8].item() == pytest.approx(1 - other, rel=relative, abs=0)
    assert leaf.grad[1, 7].item() == pytest.approx(-1 / (1 + 49 * math.exp(-gap)), rel=relative, abs=0)
    assert logps[0].item() == pytest.approx(-math.log1p(49 * math.exp(-gap)), rel=2e-6, abs=0)
    assert logps[1].item() == pytest.approx(-gap - math.log1p(49 * math.exp(-gap)), rel=2e-6, abs=0)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("upstream", [0.0, 0.37, -2.5, 1024.0])
def test_any_upstream_gradient_is_honoured(backend, dtype, upstream):
    """known bug 7: an upstream gradient other than 1 wrong or ignored (TE#2139, unsloth GRPO)."""
    batch = make_pairs(2, 6, 40, dtype, backend.device)
    for reduction in ("mean", "sum"):
        check_preference(backend, batch, upstream=upstream, reduction=reduction)
        check_preference(backend, batch, upstream=upstream, reduction=reduction, inplace_backward=True)
        batch = make_pairs(2, 6, 40, dtype, backend.device)
    check_preference(backend, batch, "ipo", upstream=upstream)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sppo_hard"])
def test_unreduced_losses_have_a_gradient_each(backend, dtype, loss_type):
    """known bug 8: reduction="none" gradients wrong (Liger#968)."""
    batch = make_pairs(3, 7, 33, dtype, backend.device)
    check_preference(backend, batch, loss_type, reduction="none", upstream=torch.tensor([1.0, -0.25, 3.0]))


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("offset", [2.0**10, 2.0**17, -(2.0**20), 2.0**22])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_large_common_offset_of_the_logits_does_not_cancel(backend, dtype, offset, temperature):
    """known bug 9: m + log s loses log s (pytorch#195829). The truth is that of the shifted fp32 logits."""
    rows = make_rows((4,), 1003, dtype, "cpu")
    shifted = Rows(
        (rows.logits + offset).to(backend.device), rows.labels.to(backend.device),
        (rows.reference - offset).to(backend.device), temperature,
    )  # fmt: skip
    check_outputs(backend, shifted)
    check_gradient(backend, shifted, random_upstream(shifted, oracle.WITH_GRADIENT))


@pytest.mark.dtypes(torch.bfloat16, torch.float16)
def test_sixteen_bit_logits_are_exact_inputs(backend, dtype):
    """known bug 10: arithmetic in 16 bits although fp32 was at hand (Liger#1432): same results as for fp32 copies."""
    rows = make_rows((6,), 2051, dtype, backend.device, scale=8.0)
    stats = [
        token_stats(
            x, rows.labels, reference_logits=y, outputs=("logps", "entropy", "kl_policy_reference", "reference_logps"),
            temperature=1.7, backend=backend.name,
        )
        for x, y in ((rows.logits, rows.reference), (rows.logits.float(), rows.reference.float()))
    ]  # fmt: skip
    for name in ("logps", "entropy", "kl_policy_reference", "reference_logps"):
        narrow, wide = getattr(stats[0], name), getattr(stats[1], name)
        assert narrow.dtype == torch.float32
        assert_within(narrow, wide, 2 * ROW_BOUNDS[name] * wide.double().abs().clamp_min(1).cpu(), name)


@pytest.mark.parametrize("outputs", [("logps",), oracle.WITH_GRADIENT])
def test_ignored_rows_are_not_read(backend, dtype, outputs):
    """known bug 12: ignored rows computed, or read. They hold NaN here, in both models."""
    rows = make_rows((3, 7), 515, dtype, backend.device)
    ignored = rows.labels == IGNORE
    assert bool(ignored.any())
    logits, reference = rows.logits.clone(), rows.reference.clone()
    logits[ignored] = torch.nan
    reference[ignored] = torch.nan
    poisoned = Rows(logits, rows.labels, reference)
    names = oracle.STATS if len(outputs) > 1 else outputs
    check_outputs(backend, poisoned, names)
    grad = check_gradient(backend, poisoned, random_upstream(poisoned, outputs))
    assert bool((grad[ignored] == 0).all())
    row_gradient(backend, poisoned, random_upstream(poisoned, outputs), inplace_backward=True)
    assert torch.equal(logits, grad)


@pytest.mark.dtypes(*PLAIN)
def test_rows_of_zero_weight_are_not_read(backend, dtype):
    """known bug 12: a zero token weight is an ignored row."""
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    weights = torch.ones(4, 6, device=backend.device)
    weights[:, 2] = 0
    weights[1, 3:] = 0
    batch.logits[weights == 0] = torch.nan
    batch.reference[weights == 0] = torch.nan
    labels = batch.labels.masked_fill(weights == 0, IGNORE)
    for loss_type in ("sigmoid", "ipo", "tdpo1"):
        expected = fused_token_dpo(
            batch.logits, labels, reference_logits=batch.reference, loss_type=loss_type, backend=backend.name
        )
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, token_weights=weights, loss_type=loss_type,
            backend=backend.name,
        )  # fmt: skip
        assert torch.isfinite(out.loss) and torch.equal(out.loss, expected.loss)
        assert torch.equal(out.token_rewards, expected.token_rewards)
        out.loss.backward()
        assert bool((leaf.grad[weights == 0] == 0).all()) and bool(leaf.grad.isfinite().all())


OBJECTIVES_FOR_EMPTY = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sft", "aot", "aot_unpaired", "tdpo1", "tdpo2", "simpo",
)  # fmt: skip


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("loss_type", OBJECTIVES_FOR_EMPTY)
def test_a_sequence_without_valid_tokens_has_log_ratio_zero(backend, dtype, loss_type):
    """known bug 13: NaN loss (Liger DPO). One rejected sequence is empty."""
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    batch.labels[3] = IGNORE
    out, _ = check_preference(backend, batch, loss_type)
    assert out.rejected_rewards[1] == 0
    packed = pack(batch, keep_ignored=False)
    assert packed.cu_seqlens[4] == packed.cu_seqlens[3]
    check_preference(backend, packed, loss_type)


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("loss_type", OBJECTIVES_FOR_EMPTY)
def test_a_batch_without_valid_tokens_has_a_finite_loss_and_zero_gradients(backend, dtype, loss_type):
    """known bug 13: NaN loss when nothing is left after masking."""
    logits = torch.full((4, 5, 30), torch.nan, dtype=dtype, device=backend.device).requires_grad_()
    labels = torch.full((4, 5), IGNORE, device=backend.device)
    for options in ({}, {"use_weighting": True}):
        out = fused_token_dpo(
            logits, labels, reference_logits=logits.detach(), loss_type=loss_type, loss_kwargs=options,
            backend=backend.name,
        )  # fmt: skip
        assert torch.isfinite(out.loss)
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert bool((grad == 0).all())
    if loss_type == "sigmoid":
        assert out.loss.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_odd_number_of_sequences_is_refused(backend, count):
    """known bug 14: accepted and broadcast (Liger DPO)."""
    logits = normal(count, 4, 9).to(backend.device)
    labels = torch.zeros(count, 4, dtype=torch.int64, device=backend.device)
    with pytest.raises(ValueError, match=rf"{count} sequences.*even"):
        fused_token_dpo(logits, labels, reference_logps=0.0, backend=backend.name)
    ends = torch.arange(count + 1, dtype=torch.int32, device=backend.device) * 4
    with pytest.raises(ValueError, match=rf"{count} sequences.*even"):
        fused_token_dpo(logits.view(-1, 9), labels.view(-1), reference_logps=0.0, cu_seqlens=ends, backend=backend.name)


def test_every_option_changes_the_result(backend):
    """known bug 15: options dropped silently (TRL#7062, Liger#974, verl#7991, TRL#7084)."""
    batch = make_pairs(3, 8, 30, torch.float32, backend.device)

    def loss(loss_type="sigmoid", **options):
        return fused_token_dpo(
            batch.logits, batch.labels, reference_logits=batch.reference, loss_type=loss_type, backend=backend.name,
            **options,
        ).loss.item()  # fmt: skip

    base = {name: loss(name) for name in ("sigmoid", "robust", "discopop", "simpo", "tdpo2", "aot", "aot_unpaired")}
    weights = torch.rand(batch.labels.shape, device=backend.device)
    changed = {
        "beta": loss(beta=0.3),
        "label_smoothing": loss(label_smoothing=0.1),
        "temperature": loss(temperature=2.0),
        "token_weights": loss(token_weights=weights),
        "ld_alpha": loss(loss_kwargs={"ld_alpha": 0.1}),
        "use_weighting": loss(loss_kwargs={"use_weighting": True}),
        "forward_kl": loss(loss_kwargs={"f_divergence": "forward_kl"}),
        "js": loss(loss_kwargs={"f_divergence": "js"}),
        "alpha": loss(loss_kwargs={"f_divergence": "alpha"}),
        "f_alpha_divergence_coef": loss(loss_kwargs={"f_divergence": "alpha", "f_alpha_divergence_coef": 0.2}),
        "reduction": loss(reduction="sum"),
        "loss_weights": loss(["sigmoid"], loss_weights=[0.5]),
    }
    assert all(value != base["sigmoid"] for value in changed.values()), changed
    assert len(set(changed.values())) == len(changed), "two options that should differ give one result"
    for name, options in (
        ("robust", {"label_smoothing": 0.1}),
        ("aot", {"label_smoothing": 0.1}),
        ("aot_unpaired", {"label_smoothing": 0.1}),
        ("discopop", {"loss_kwargs": {"discopop_tau": 0.5}}),
        ("simpo", {"loss_kwargs": {"gamma": 0.1}}),
        ("tdpo2", {"loss_kwargs": {"alpha": 0.9}}),
    ):
        assert loss(name, **options) != base[name], (name, options)


def test_an_in_place_backward_cannot_destroy_logits_that_are_still_used(backend):
    """known bug 17 (unsloth#5002, Megatron#1594): whoever needs the logits afterwards is told, or still gets them."""
    rows = make_rows((4,), 19, torch.float32, backend.device)
    logits = rows.logits.clone().requires_grad_()
    other_user = (logits * logits).sum()
    loss = token_logps(logits, rows.labels, inplace_backward=True, backend=backend.name).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other_user + loss).backward()
    with pytest.raises(RuntimeError, match="no longer holds logits"):
        token_logps(logits, rows.labels, backend=backend.name)


@pytest.mark.parametrize("bad", [-1, 11, 12, 10**12, -(2**62), 2**31])
def test_a_label_outside_the_vocabulary_is_an_error_not_a_read(backend, bad):
    """known bug 18 (CCE#59, verl): IndexError on the CPU; NaN in that row alone on a GPU."""
    wide = normal(2, 3, 16).to(backend.device)
    labels = torch.tensor([[0, 1, 10], [4, bad, 2]], device=backend.device)
    logits = wide[..., :11]  # columns 11 and 12 exist in memory
    if backend.device.type == "cpu":
        for call in (
            lambda: token_logps(logits, labels, backend=backend.name),
            lambda: token_stats(logits, labels, reference_logits=logits, outputs=oracle.STATS, backend=backend.name),
        ):
            with pytest.raises(IndexError, match=rf"labels\[1, 1\] = {bad} is outside \[0, 11\)"):
                call()
    else:
        logps = token_logps(logits, labels, backend=backend.name)
        assert logps.isnan().tolist() == [[False, False, False], [False, True, False]]


def test_without_gradients_none_are_computed(backend, monkeypatch):
    """known bug 19 (Liger DPO in evaluation, fla#1253)."""
    calls = []
    for name in ("row_grad", "row_grad_"):
        run = getattr(backend.module, name)
        monkeypatch.setattr(backend.module, name, lambda *a, _run=run, _name=name: (calls.append(_name), _run(*a))[1])
    batch = make_pairs(1, 4, 9, torch.float32, backend.device)
    with torch.no_grad():
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend=backend.name)
    assert not out.loss.requires_grad
    frozen = fused_token_dpo(batch.logits, batch.labels, reference_logits=batch.reference, backend=backend.name)
    assert not frozen.loss.requires_grad
    with torch.inference_mode():
        assert not token_logps(batch.logits, batch.labels, backend=backend.name).requires_grad
    assert calls == []
    leaf = batch.logits.clone().requires_grad_()
    fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend=backend.name).loss.backward()
    assert calls == ["row_grad"]


@pytest.mark.dtypes(*PLAIN)
def test_autocast_changes_nothing(backend, dtype):
    """known bug 20 (TRL#6988, Liger#305): logits are used in the precision they come in, gradients keep their dtype."""
    batch = make_pairs(2, 5, 40, dtype, backend.device)

    def run():
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, loss_type=["sigmoid", "ipo"], backend=backend.name
        )
        stats = token_stats(leaf, batch.labels, outputs=("entropy",), backend=backend.name)
        (out.loss + stats.entropy.mean()).backward()
        return out.loss.detach(), out.token_logps, leaf.grad

    plain = run()
    with torch.autocast(backend.device.type, torch.bfloat16):
        cast = run()
    for before, within in zip(plain, cast, strict=True):
        assert before.dtype == within.dtype and torch.equal(before, within)


def test_data_parallel_training_synchronises_gradients(backend, tmp_path):
    """known bug 21 (TRL#7245-7247): inside DistributedDataParallel, forward and backward work as outside."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is missing")
    batch = make_pairs(1, 4, 9, torch.float32, backend.device)
    hidden = normal(2, 4, 6).to(backend.device)

    def weight_grad(model, weight):
        out = fused_token_dpo(
            model(hidden), batch.labels, reference_logits=batch.reference, inplace_backward=True, backend=backend.name
        )
        out.loss.backward()
        return weight.grad

    torch.manual_seed(0)
    plain = nn.Linear(6, 9, bias=False).to(backend.device)
    parallel = nn.Linear(6, 9, bias=False).to(backend.device)
    parallel.load_state_dict(plain.state_dict())
    expected = weight_grad(plain, plain.weight)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrapped = None
    try:
        reduced = []

        def count_and_reduce(_, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped = nn.parallel.DistributedDataParallel(parallel)
        wrapped.register_comm_hook(None, count_and_reduce)
        assert torch.equal(weight_grad(wrapped, parallel.weight), expected)
        assert reduced == [54]
    finally:
        # Before the group: if its reducer were the last to hold the group, its destructor could wait, with the GIL, for
        # a thread of the group that waits for the GIL (torch 2.13).
        del wrapped
        gc.collect()
        torch.distributed.destroy_process_group()


@pytest.mark.dtypes(*PLAIN)
def test_packed_and_dense_batches_agree_and_the_first_loss_is_ln_2(backend, dtype):
    """known bug 23 (open-instruct#1900): boundaries off by one, first loss 6 x ln 2.

    Neighbouring sequences have very different log-ratios, so one token on the wrong side would show. Rows of 32
    elements have the same alignment modulo 16 bytes wherever they stand, without which bits may differ on a GPU.
    """
    batch = make_pairs(4, 9, 32, dtype, backend.device)
    batch.logits = (batch.logits * torch.linspace(0.1, 3, 8, device=backend.device)[:, None, None]).to(dtype)
    for loss_type in ("sigmoid", "ipo", "simpo"):
        dense, dense_grad = check_preference(backend, batch, loss_type)
        packed_batch = pack(batch, keep_ignored=False)
        packed, packed_grad = check_preference(backend, packed_batch, loss_type)
        keep = batch.labels != IGNORE
        assert_within(packed.loss, dense.loss, 1e-6 * (1 + dense.loss.double().abs().cpu()), "packed loss")
        assert torch.equal(packed.token_logps, dense.token_logps[keep])
        same = 1e-5 * dense_grad[keep].double().abs().amax().cpu() if dtype == torch.float32 else 2.0**-8
        assert_within(packed_grad, dense_grad[keep], same, "packed gradient")
    equal = PairBatch(packed_batch.logits, packed_batch.labels, packed_batch.logits.clone(), packed_batch.cu_seqlens)
    out, _ = check_preference(backend, equal)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("vocab", [30, 4097])
@pytest.mark.parametrize("packed", [False, True])
def test_with_equal_models_the_loss_is_ln_2_and_every_reward_is_exactly_zero(backend, dtype, packed, vocab):
    """known bug 24 (NeMo-Aligner#227): log-probs of policy and reference differ at step 0."""
    batch = make_pairs(2, 6, vocab, dtype, backend.device)
    batch.reference = batch.logits.clone()
    batch = pack(batch) if packed else batch
    for loss_type in ("sigmoid", "tdpo1", "robust"):
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, loss_type=loss_type, cu_seqlens=batch.cu_seqlens,
            temperature=0.7, backend=backend.name,
        )  # fmt: skip
        assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert bool((out.token_rewards == 0).all())
        assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0, 0.0]
        out.loss.backward()
        assert bool((leaf.grad[batch.labels != IGNORE].float().abs().amax(-1) > 0).all())


def test_cached_reference_logps_equal_live_ones(backend, dtype):
    """known bug 25 (TRL#7084): whichever function made the cache; from the same path, rewards are exactly 0."""
    for vocab in (30, 2049, 4097):
        batch = make_pairs(2, 6, vocab, dtype, backend.device)
        shared = {"temperature": 0.7, "backend": backend.name}
        live = fused_token_dpo(batch.logits, batch.labels, reference_logits=batch.reference, **shared)
        caches = {
            "token_logps": token_logps(batch.reference, batch.labels, **shared),
            "token_stats": token_stats(batch.reference, batch.labels, outputs=("logps", "entropy"), **shared).logps,
            "token_stats as reference": token_stats(
                batch.logits, batch.labels, reference_logits=batch.reference,
                outputs=("logps", "kl_reference_policy", "reference_logps"), **shared,
            ).reference_logps,
            "the training call": live.reference_token_logps,
            "the training call, other side": fused_token_dpo(
                batch.reference, batch.labels, reference_logits=batch.logits, **shared
            ).token_logps,
        }  # fmt: skip
        for name, cache in caches.items():
            out = fused_token_dpo(batch.logits, batch.labels, reference_logps=cache, **shared)
            allowed = 4e-6 * live.reference_token_logps.double().abs().clamp_min(1).cpu()
            assert_within(out.token_rewards * 10, live.token_rewards * 10, allowed, name)
            same = fused_token_dpo(batch.reference, batch.labels, reference_logps=cache, **shared)
            assert_within(same.token_rewards * 10, 0 * allowed, allowed, f"step 0 with {name}")
        same = fused_token_dpo(batch.reference, batch.labels, reference_logps=caches["token_logps"], **shared)
        assert bool((same.token_rewards == 0).all()), "the same path twice must give the same bits"


def test_a_label_of_minus_infinity_stays_in_its_row(backend, dtype):
    """known bug 26: a forbidden label poisons its whole batch."""
    rows = make_rows((5,), 40, dtype, backend.device)
    rows.labels = torch.tensor([1, 2, 3, 4, 5], device=backend.device)
    rows.logits[2, 3] = -torch.inf
    check_logps(backend, rows)
    logps = token_logps(rows.logits, rows.labels, backend=backend.name)
    assert logps[2] == -torch.inf and bool(logps[[0, 1, 3, 4]].isfinite().all())
    grad = row_gradient(backend, rows, {"logps": torch.ones(5, device=backend.device)})
    assert bool(grad[[0, 1, 3, 4]].isfinite().all())
    assert grad[2, [0, 1, 2]].isfinite().all()


@pytest.mark.dtypes(*PLAIN)
def test_a_token_that_both_models_forbid_has_no_reward(backend, dtype):
    """known bug 26: -inf - (-inf) must not turn the loss into NaN."""
    batch = make_pairs(2, 5, 40, dtype, backend.device)
    row = (0, 2)
    label = int(batch.labels[row])
    assert label != IGNORE
    batch.logits[0, 2, label] = -torch.inf
    batch.reference[0, 2, label] = -torch.inf
    for options in ({}, {"reduction": "sum"}, {"loss_type": "ipo"}):
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend=backend.name, **options)
        assert torch.isfinite(out.loss) and out.token_rewards[row] == 0
        out.loss.backward()
        others = torch.ones(4, 5, dtype=torch.bool)
        others[row] = False
        assert bool(leaf.grad.cpu()[others].isfinite().all())


@pytest.mark.parametrize("broken", ["nan", "all -inf", "+inf"])
@pytest.mark.parametrize("place", [0, 700, 2047, 2048, 4098])
def test_a_broken_row_is_nan_alone(backend, dtype, broken, place):
    """known bug 26: a NaN, a +inf or nothing but -inf gives NaN in that row alone."""
    rows = make_rows((5,), 4099, dtype, backend.device)
    rows.labels = torch.tensor([1, 2, 3, 4, 5], device=backend.device)
    clean = token_stats(
        rows.logits, rows.labels, reference_logits=rows.reference, outputs=oracle.STATS, backend=backend.name
    )
    bad = rows.logits.clone()
    bad[2] = -torch.inf if broken == "all -inf" else bad[2]
    if broken != "all -inf":
        bad[2, place] = torch.nan if broken == "nan" else torch.inf
    stats = token_stats(bad, rows.labels, reference_logits=rows.reference, outputs=oracle.STATS, backend=backend.name)
    others = [0, 1, 3, 4]
    for name, value in stats._asdict().items():
        if name not in ("reference_logps", "reference_logsumexp", "is_top1"):
            assert bool(value[2].isnan()), name
        assert torch.equal(value[others], getattr(clean, name)[others]), name
    for names in (("logps",), oracle.WITH_GRADIENT):
        grad = row_gradient(
            backend, Rows(bad, rows.labels, rows.reference), {n: torch.ones(5, device=backend.device) for n in names}
        )
        assert bool(grad[others].isfinite().all())
        assert bool(grad[2].isnan().any())
    alone = token_logps(bad, rows.labels, backend=backend.name)
    assert bool(alone[2].isnan()) and torch.equal(alone[others], clean.logps[others])


@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
def test_every_extra_output_brings_its_gradient(backend, dtype, name):
    """known bug 27: the gradient of the entropy ignored (TRL#6625)."""
    rows = make_rows((4,), 33, dtype, backend.device)
    upstream = random_upstream(rows, ("logps", name) if name != "logps" else ("logps",))
    with_extra = check_gradient(backend, rows, upstream)
    upstream[name] = 2 * upstream[name]
    assert not torch.equal(check_gradient(backend, rows, upstream), with_extra)


def test_masks_shift_with_their_labels(backend):
    """known bug 28: mask shifted by one against the labels (TRL#3346)."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]], device=backend.device)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], device=backend.device)  # prompt, padding
    # Row t predicts token t + 1: the completion's first token is predicted by the prompt's last row.
    expected = [[IGNORE, 7, 8, 9, IGNORE], [2, 3, 4, IGNORE, IGNORE]]
    assert shift_labels(ids, mask=mask).tolist() == expected
    assert shift_labels(ids, mask=mask.bool()).tolist() == expected
    assert shift_labels(ids.masked_fill(mask == 0, IGNORE)).tolist() == expected
    flat, flat_mask = ids.view(-1), mask.view(-1)
    ends = torch.tensor([0, 5, 10], dtype=torch.int32, device=backend.device)
    assert shift_labels(flat, mask=flat_mask, cu_seqlens=ends).tolist() == expected[0] + expected[1]
    # Whole path: summed log-probs of the completion equal the hand-made sum.
    logits = normal(2, 5, 10).to(backend.device)
    logps = token_logps(logits, shift_labels(ids, mask=mask), backend=backend.name)
    by_hand = logits.double().cpu().log_softmax(-1)
    assert logps[0].sum().item() == pytest.approx((by_hand[0, 1, 7] + by_hand[0, 2, 8] + by_hand[0, 3, 9]).item())
    assert logps[1].sum().item() == pytest.approx((by_hand[1, 0, 2] + by_hand[1, 1, 3] + by_hand[1, 2, 4]).item())


def test_no_sequence_is_predicted_by_its_neighbour(backend):
    """known bug 28, packed: the last row of a sequence has no label, empty sequences included."""
    ids = torch.arange(10, 18, device=backend.device)
    ends = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32, device=backend.device)
    assert shift_labels(ids, cu_seqlens=ends).tolist() == [11, 12, IGNORE, IGNORE, 15, 16, 17, IGNORE]
    assert shift_labels(ids, cu_seqlens=ends, ignore_index=-1).tolist() == [11, 12, -1, -1, 15, 16, 17, -1]


def test_bellman_rewards_step_over_masked_rows(backend):
    """known bug 28, in the MDP: V of the next state is that of the next valid row, never of a masked one."""
    logits = normal(2, 4, 6).to(backend.device)
    labels = torch.tensor([[1, IGNORE, 2, IGNORE], [IGNORE, 3, 4, 5]], device=backend.device)
    beta = 0.3
    mdp = token_mdp(logits, labels, reference_logps=0.0, beta=beta, backend=backend.name)
    z = logits.double().cpu()
    value = beta * z.logsumexp(-1)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for (i, t), following in {(0, 0): 2, (0, 2): None, (1, 1): 2, (1, 2): 3, (1, 3): None}.items():
        expected[i, t] = beta * z[i, t, labels[i, t]] - (0 if following is None else value[i, following])
    assert_within(mdp.bellman_rewards, expected, 1e-6 * (1 + expected.abs()), "Bellman rewards")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torch_default_dtype_does_not_change_results(backend, default):
    """Not on the list: buffers allocated in torch's default dtype (loading a model in bf16 sets it) are too small."""
    batch = make_pairs(2, 5, 40, torch.float32, backend.device)

    def run():
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend=backend.name)
        none = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, reduction="none", loss_type="ipo",
            loss_kwargs={"ld_alpha": 0.5}, backend=backend.name,
        )  # fmt: skip
        out.loss.backward()
        return out.loss, out.chosen_rewards, out.rejected_rewards, leaf.grad, none.loss

    plain = run()
    torch.set_default_dtype(default)
    try:
        other = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for before, after in zip(plain, other, strict=True):
        assert after.dtype == torch.float32
        assert torch.equal(before, after)
