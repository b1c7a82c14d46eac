"""Autograd: numerical gradient checks, in-place backward, and what the graph promises to its other users."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import oracle
from assertions import assert_gradient, assert_within
from cases import IGNORE, make_pairs, make_rows, normal, pack
from comparisons import check_preference, random_upstream
from oracle import Options
from qkernels import fused_token_dpo, token_logps, token_mdp, token_stats
from qkernels.autograd.sequence_sums import Summed, sequence_sums
from qkernels.core.sequences import Sequences

EXACT = torch.float64
PLAIN = (torch.float32, torch.bfloat16)


def gradcheck(function, logits) -> None:
    """First derivatives of a function of the logits against finite differences; float64 on the reference backend."""
    leaf = logits.detach().clone().requires_grad_()
    torch.autograd.gradcheck(function, (leaf,), eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0)


# --- numerical checks (float64: the reference backend) ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck_of_logps(shape, temperature):
    rows = make_rows(shape, 5, EXACT, scale=1.0)
    gradcheck(lambda x: token_logps(x, rows.labels, temperature=temperature, backend="torch"), rows.logits)


@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
def test_gradcheck_of_each_output(name):
    rows = make_rows((4,), 5, EXACT, scale=1.0)
    reference = rows.reference if name in oracle.WITH_REFERENCE else None

    def run(x):
        stats = token_stats(
            x, rows.labels, reference_logits=reference, outputs=(name,), temperature=1.4, backend="torch"
        )
        return getattr(stats, name)

    gradcheck(run, rows.logits)


def test_gradcheck_of_all_outputs_together():
    rows = make_rows((2, 3), 5, EXACT, scale=1.0)

    def run(x):
        stats = token_stats(
            x, rows.labels, reference_logits=rows.reference, outputs=oracle.WITH_GRADIENT, backend="torch"
        )
        return tuple(getattr(stats, name) for name in oracle.WITH_GRADIENT)

    gradcheck(run, rows.logits)


# hinge has a kink and sorting has ties, neither of them near these numbers.
@pytest.mark.nightly_except(loss_type=("sigmoid", "aot", "tdpo1"))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "loss_type",
    ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
     "apo_down", "discopop", "sft", "aot", "aot_unpaired", "tdpo1", "simpo"],
)  # fmt: skip
def test_gradcheck_of_preference_losses(loss_type, packed):
    batch = make_pairs(2, 4, 4, EXACT, scale=1.0)
    batch = pack(batch) if packed else batch
    smoothing = 0.1 if loss_type in ("sigmoid", "robust", "exo_pair", "aot") else 0.0

    def run(x, reduction="mean"):
        return fused_token_dpo(
            x, batch.labels, reference_logits=batch.reference, loss_type=loss_type, label_smoothing=smoothing,
            beta=0.3, cu_seqlens=batch.cu_seqlens, reduction=reduction, backend="torch",
        ).loss  # fmt: skip

    gradcheck(run, batch.logits)
    gradcheck(lambda x: run(x, "none"), batch.logits)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"f_divergence": "js"}, {"f_divergence": "alpha"},
                                     {"f_divergence": "forward_kl"}])  # fmt: skip
def test_gradcheck_with_options(options):
    batch = make_pairs(2, 4, 4, EXACT, scale=1.0)

    def run(x):
        return fused_token_dpo(
            x, batch.labels, reference_logits=batch.reference, loss_kwargs=options, temperature=1.3, backend="torch"
        ).loss

    gradcheck(run, batch.logits)


@pytest.mark.parametrize("packed", [False, True])
def test_stop_gradient_of_tdpo2(backend, dtype, packed):
    """Finite differences would see through the stop-gradient; the oracle's autograd does not."""
    batch = make_pairs(2, 6, 20, dtype, backend.device)
    batch = pack(batch) if packed else batch
    options = Options(beta=0.7, alpha=0.9)
    check_preference(backend, batch, "tdpo2", options=options, loss_kwargs={"alpha": 0.9})
    # The chosen half gets no gradient from its own divergence: with alpha 0 the gradient is the same there.
    grads = {}
    for alpha in (0.0, 0.9):
        leaf = batch.logits.detach().clone().requires_grad_()
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, beta=1e-3, loss_type="tdpo2",
            loss_kwargs={"alpha": alpha}, cu_seqlens=batch.cu_seqlens, backend=backend.name,
        )  # fmt: skip
        out.loss.backward()
        grads[alpha] = leaf.grad.double().view(4, 6, -1)
    close = (grads[0.0] - grads[0.9]).abs().amax((1, 2))
    assert bool((close[:2] < 0.02 * grads[0.0][:2].abs().amax((1, 2))).all())
    assert bool((close[2:] > 0.02 * grads[0.0][2:].abs().amax((1, 2))).all())


def summed_plainly(logps, kl, summed: Summed) -> dict[str, torch.Tensor]:
    """The sums of `sequence_sums` by their formulas, sequence by sequence."""
    sequences, of = summed.sequences, {"logps": summed.weights * logps, "counts": summed.base_weights}
    of |= {"kl": summed.weights * kl, "full_logps": summed.base_weights * logps}
    if summed.reference_tokens is not None:
        of |= {"reference": summed.weights * summed.reference_tokens}
        of |= {"ratios": summed.weights * (logps - summed.reference_tokens)}
    length = sequences.length
    ends = range(0, logps.numel() + 1, length) if sequences.offsets is None else sequences.offsets.tolist()
    spans = list(itertools.pairwise(ends))
    sums = {name: torch.stack([rows.reshape(-1)[a:b].sum() for a, b in spans]) for name, rows in of.items()}
    if summed.reference_tokens is None:
        sums |= {"reference": summed.reference_sums, "ratios": sums["logps"] - summed.reference_sums}
    return sums


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_sums_over_sequences_and_their_gradient(per_token, packed, counted):
    shape = (1, 20) if packed else (4, 5)
    logps, kl, weights, base, tokens = (normal(*shape, key=(i,)).double() for i in range(5))
    logps.requires_grad_(), kl.requires_grad_()
    summed = Summed(
        sequences=Sequences.of(logps, torch.tensor([0, 7, 7, 12, 20]) if packed else None),
        weights=weights,
        base_weights=base,
        reference_tokens=tokens if per_token else None,
        reference_sums=None if per_token else tokens.reshape(-1)[:4],
        counts=normal(4).double() if counted else None,
        with_full_logps=True,
    )
    totals = sequence_sums(logps, kl, summed)
    expected = summed_plainly(logps, kl, summed)
    expected |= {"counts": summed.counts} if counted else {}
    assert totals.parts.keys() == expected.keys()
    upstream = {name: normal(4, key=(9, i)).double() for i, name in enumerate(expected)}
    with_gradient = [name for name in expected if name not in ("reference", "counts")]
    for name, parts in totals.parts.items():
        assert torch.allclose(torch.cat(parts), expected[name], rtol=1e-12, atol=1e-12), name
        assert all(part.requires_grad == (name in with_gradient) for part in parts), name
    assert torch.equal(totals.ratios, torch.cat(totals.parts["ratios"]))
    for names in (*([name] for name in with_gradient), with_gradient):
        own, plain = (
            torch.autograd.grad(
                sum((sums[name] * upstream[name]).sum() for name in names), (logps, kl), retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )
            for sums in ({name: torch.cat(parts) for name, parts in totals.parts.items()}, expected)
        )  # fmt: skip
        for a, b in zip(own, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), names


def test_a_token_that_both_models_forbid_has_no_part_in_the_ratios():
    logps, tokens, ones = normal(2, 3), normal(2, 3, key=(1,)), torch.ones(2, 3)
    logps[0, 1] = tokens[0, 1] = -torch.inf
    logps.requires_grad_()
    totals = sequence_sums(logps, None, Summed(Sequences.of(logps, None), ones, ones, tokens, None))
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in totals.parts["ratios"]), logps)
    assert totals.row_ratios[0, 1] == 0 and totals.ratios.isfinite().all()
    assert gradient.tolist() == [[1, 0, 1], [1, 1, 1]]


# --- in-place backward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 515, 4099])
def test_in_place_gradient_aliases_the_logits_and_has_the_same_bits(backend, dtype, vocab):
    rows = make_rows((2, 3), vocab, dtype, backend.device, temperature=0.8)
    for outputs in (("logps",), ("logps", "entropy"), oracle.WITH_GRADIENT):
        upstream = random_upstream(rows, outputs)
        grads = []
        for inplace in (False, True):
            logits = rows.logits.clone().requires_grad_()
            stats = token_stats(
                logits, rows.labels, outputs=outputs, temperature=0.8, inplace_backward=inplace, backend=backend.name,
                reference_logits=rows.reference if outputs is oracle.WITH_GRADIENT else None,
            )  # fmt: skip
            torch.autograd.backward([getattr(stats, n) for n in outputs], list(upstream.values()))
            assert (logits.grad.data_ptr() == logits.data_ptr()) == inplace
            grads.append(logits.grad.clone())
        assert torch.equal(*grads)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_in_place_gradient_of_the_loss_aliases_the_logits(backend, dtype, loss_type):
    batch = make_pairs(2, 5, 30, dtype, backend.device)
    for packed in (False, True):
        data = pack(batch) if packed else batch
        leaf = data.logits.clone().requires_grad_()
        out = fused_token_dpo(
            leaf, data.labels, reference_logits=data.reference, loss_type=loss_type, cu_seqlens=data.cu_seqlens,
            inplace_backward=True, backend=backend.name,
        )  # fmt: skip
        out.loss.backward()
        assert leaf.grad.data_ptr() == leaf.data_ptr()


def test_forward_with_inplace_backward_leaves_the_logits(backend):
    rows = make_rows((4,), 30, torch.float32, backend.device)
    logits = rows.logits.clone().requires_grad_()
    first = token_logps(logits, rows.labels, inplace_backward=True, backend=backend.name)
    assert torch.equal(logits, rows.logits)
    assert torch.equal(token_logps(logits, rows.labels, backend=backend.name), first)


def test_a_second_backward_raises(backend):
    rows = make_rows((4,), 30, torch.float32, backend.device)
    logits = rows.logits.clone().requires_grad_()
    loss = token_logps(logits, rows.labels, inplace_backward=True, backend=backend.name).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = rows.logits.clone().requires_grad_()
    loss = token_logps(logits, rows.labels, inplace_backward=True, backend=backend.name).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_calls_on_the_same_logits_cannot_both_go_backward(backend):
    """The second one would read the first one's gradient as logits."""
    rows = make_rows((4,), 30, torch.float32, backend.device)
    for first, second in ((True, True), (True, False), (False, True)):
        logits = rows.logits.clone().requires_grad_()
        a = token_logps(logits, rows.labels, inplace_backward=first, backend=backend.name).sum()
        b = token_logps(logits, rows.labels, inplace_backward=second, backend=backend.name).sum()
        if first:
            a.backward()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                b.backward()
        else:
            a.backward()
            b.backward()  # the in-place one came last: nobody needs the logits any more


@pytest.mark.parametrize("inplace_first", [True, False])
def test_another_user_of_the_logits_raises_or_is_right(backend, inplace_first):
    rows = make_rows((4,), 30, torch.float32, backend.device)
    hidden = normal(4, 6).to(backend.device)
    weight = normal(6, 30).to(backend.device).requires_grad_()
    logits = hidden @ weight
    if inplace_first:  # created later, so its backward runs first
        penalty = logits.pow(2).sum()
        loss = token_logps(logits, rows.labels, inplace_backward=True, backend=backend.name).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + penalty).backward()
        return
    loss = token_logps(logits, rows.labels, inplace_backward=True, backend=backend.name).sum()
    penalty = logits.pow(2).sum()
    (loss + penalty).backward()
    plain = weight.detach().clone().requires_grad_()
    z = hidden @ plain
    (token_logps(z, rows.labels, backend=backend.name).sum() + z.pow(2).sum()).backward()
    assert_within(weight.grad, plain.grad.double(), 1e-4, "weight gradient")


def overwritten(backend, shape=(2, 3, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that a backward has turned into their gradient, and labels."""
    logits = normal(*shape).to(backend.device).requires_grad_()
    labels = torch.ones(shape[:-1], dtype=torch.int64, device=backend.device)
    token_logps(logits, labels, inplace_backward=True, backend=backend.name).sum().backward()
    return logits, labels


def test_overwritten_logits_are_refused_by_every_function(backend):
    logits, labels = overwritten(backend, (2, 3, 30))
    fresh = normal(2, 3, 30).to(backend.device)
    how = {"backend": backend.name}
    for call in (
        lambda: token_logps(logits, labels, **how),
        lambda: token_stats(logits, labels, **how),
        lambda: token_mdp(logits, labels, reference_logps=0.0, **how),
        lambda: fused_token_dpo(logits, labels, reference_logps=0.0, **how),
        lambda: token_logps(logits[:, :-1], labels[:, :-1], **how),
        lambda: token_logps(logits.detach(), labels, **how),
        lambda: token_logps(logits.view(6, 30), labels.view(6), **how),
        lambda: token_logps(logits[0], labels[0], **how),
    ):
        with pytest.raises(RuntimeError, match="no longer holds logits"):
            call()
    with pytest.raises(RuntimeError, match="reference_logits no longer holds logits"):
        fused_token_dpo(fresh, labels, reference_logits=logits, **how)
    with pytest.raises(RuntimeError, match="no longer holds logits"), torch.no_grad():
        token_logps(logits, labels, **how)


def test_refilled_logits_are_welcome_again(backend):
    logits, labels = overwritten(backend)
    new = normal(2, 3, 30, key=(8,)).to(backend.device)
    with torch.no_grad():
        logits.copy_(new)
    logits.grad = None
    expected = token_logps(new, labels, backend=backend.name)
    logps = token_logps(logits, labels, inplace_backward=True, backend=backend.name)
    assert torch.equal(logps, expected)
    logps.sum().backward()
    with pytest.raises(RuntimeError, match="no longer holds logits"):
        token_logps(logits, labels, backend=backend.name)


def test_copies_of_overwritten_logits_are_other_tensors(backend):
    """A clone of the gradient is a tensor of its own: whoever makes one knows what is in it."""
    logits, labels = overwritten(backend)
    token_logps(logits.detach().clone(), labels, backend=backend.name)


@pytest.mark.parametrize("view", ["whole", "slice", "reshape"])
def test_non_leaf_logits_give_right_weight_gradients(backend, dtype, view):
    torch.manual_seed(0)
    layer = nn.Linear(8, 21, bias=True).to(backend.device, dtype)
    hidden = normal(4, 6, 8).to(backend.device, dtype)
    labels = make_rows((4, 6), 21, dtype, backend.device).labels

    def run(inplace):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        logits, ids = layer(x), labels
        if view == "slice":
            logits, ids = logits[:, :-1], labels[:, :-1]
        elif view == "reshape":
            logits, ids = logits.view(24, 21), labels.reshape(24)
        logps = token_logps(logits, ids, inplace_backward=inplace, backend=backend.name)
        (logps * torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)).sum().backward()
        return layer.weight.grad.clone(), layer.bias.grad.clone(), x.grad

    for plain, inplace in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, inplace)
        assert bool((plain != 0).any())


def test_a_sliced_leaf_is_marked_as_a_whole(backend):
    """Half of `big` holds gradients afterwards, so `big` and every view of it are refused."""
    big = normal(2, 4, 30).to(backend.device).requires_grad_()
    labels = torch.ones(2, 4, dtype=torch.int64, device=backend.device)
    before = big.detach().clone()
    token_logps(big[:, :-1], labels[:, :-1], inplace_backward=True, backend=backend.name).sum().backward()
    truth = oracle.gradient(before[:, :-1], labels[:, :-1], {"logps": torch.ones(2, 3)})
    assert_within(big.grad[:, :-1], truth, 1e-5, "gradient of a slice")
    assert bool((big.grad[:, -1] == 0).all())
    for again in (big, big[:, :-1], big[:, 1:]):
        with pytest.raises(RuntimeError, match="no longer holds logits"):
            token_logps(again, labels[:, : again.shape[1]], backend=backend.name)


def test_shared_storage_with_the_reference_is_refused(backend):
    both = normal(4, 5, 30).to(backend.device)
    labels = torch.ones(2, 5, dtype=torch.int64, device=backend.device)
    logits = both[:2].requires_grad_()
    how = {"inplace_backward": True, "backend": backend.name}
    for reference in (logits, logits.detach(), both[2:]):
        with pytest.raises(ValueError, match="shares its storage"):
            fused_token_dpo(logits, labels, reference_logits=reference, **how)
        with pytest.raises(ValueError, match="reference_logits"):
            token_stats(logits, labels, reference_logits=reference, outputs=("kl_policy_reference",), **how)
    fused_token_dpo(logits, labels, reference_logits=both[2:].clone(), **how)
    fused_token_dpo(logits, labels, reference_logits=both[2:], backend=backend.name)


def test_expanded_logits_are_refused(backend):
    logits = normal(1, 5, 30).to(backend.device).expand(2, 5, 30).requires_grad_()
    labels = torch.ones(2, 5, dtype=torch.int64, device=backend.device)
    with pytest.raises(ValueError, match="expanded"):
        token_logps(logits, labels, inplace_backward=True, backend=backend.name)


def test_overlapping_rows_are_refused(backend):
    """A sliding window: every row has its own start, but rows share memory."""
    memory = normal(100).to(backend.device)
    logits = memory.as_strided((5, 30), (10, 1)).requires_grad_()
    labels = torch.ones(5, dtype=torch.int64, device=backend.device)
    with pytest.raises(ValueError, match="inplace_backward"):
        token_logps(logits, labels, inplace_backward=True, backend=backend.name)


# --- the graph --------------------------------------------------------------------------------------------------------


def test_only_the_loss_requires_grad(backend):
    batch = make_pairs(2, 5, 30, torch.float32, backend.device)
    for options in ({}, {"loss_type": "ipo"}, {"loss_type": "tdpo1"}, {"reduction": "none"},
                    {"loss_kwargs": {"use_weighting": True}}):  # fmt: skip
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend=backend.name, **options)
        assert {name for name, value in out._asdict().items() if value.requires_grad} == {"loss"}


def test_which_outputs_of_token_stats_require_grad(backend):
    rows = make_rows((4,), 30, torch.float32, backend.device)
    leaf = rows.logits.clone().requires_grad_()
    stats = token_stats(leaf, rows.labels, reference_logits=rows.reference, outputs=oracle.STATS, backend=backend.name)
    with_grad = {name for name, value in stats._asdict().items() if value.requires_grad}
    assert with_grad == set(oracle.WITH_GRADIENT)


def test_the_reference_gets_no_gradient(backend):
    batch = make_pairs(1, 5, 30, torch.float32, backend.device)
    reference = batch.reference.clone().requires_grad_()
    leaf = batch.logits.clone().requires_grad_()
    out = fused_token_dpo(leaf, batch.labels, reference_logits=reference, loss_type="tdpo1", backend=backend.name)
    out.loss.backward()
    assert reference.grad is None and leaf.grad is not None
    alone = fused_token_dpo(batch.logits, batch.labels, reference_logits=reference, backend=backend.name)
    assert not alone.loss.requires_grad
    cached = torch.zeros(2, 5, device=backend.device, requires_grad=True)
    out = fused_token_dpo(leaf, batch.labels, reference_logps=cached, backend=backend.name)
    out.loss.backward()
    assert cached.grad is None


def test_logits_of_inference_mode_are_taken(backend):
    """They have no version counter, which the guard against overwritten logits looks at."""
    batch = make_pairs(2, 6, 30, torch.float32, backend.device)
    expected = token_logps(batch.logits, batch.labels, backend=backend.name)
    loss = fused_token_dpo(batch.logits, batch.labels, reference_logits=batch.reference, backend=backend.name).loss
    with torch.inference_mode():
        logits, reference = batch.logits.clone(), batch.reference.clone()
        assert torch.equal(token_logps(logits, batch.labels, backend=backend.name), expected)
        inside = fused_token_dpo(logits, batch.labels, reference_logits=reference, backend=backend.name).loss
    assert torch.equal(inside, loss)
    # A reference scored in inference mode serves a policy in training, also where the backward reads it.
    for loss_type in ("sigmoid", "tdpo1"):
        grads = []
        for constant in (reference, batch.reference):
            leaf = batch.logits.clone().requires_grad_()
            fused_token_dpo(
                leaf, batch.labels, reference_logits=constant, loss_type=loss_type, backend=backend.name
            ).loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_no_grad_builds_no_graph(backend):
    batch = make_pairs(1, 5, 30, torch.float32, backend.device)
    leaf = batch.logits.clone().requires_grad_()
    with torch.no_grad():
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, inplace_backward=True, backend=backend.name
        )
        stats = token_stats(leaf, batch.labels, outputs=("logps", "entropy"), backend=backend.name)
    assert all(v is None or v.grad_fn is None for v in (*out, *stats))
    with_graph = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend=backend.name)
    assert torch.equal(out.loss, with_graph.loss.detach())


@pytest.mark.dtypes(*PLAIN)
def test_retain_graph_and_accumulation(backend, dtype):
    """Two backwards through one graph, and two graphs on one leaf, add up."""
    batch = make_pairs(2, 5, 30, dtype, backend.device)

    def loss_of(leaf, loss_type="sigmoid"):
        return fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, loss_type=loss_type, beta=2.0, backend=backend.name
        ).loss

    once = batch.logits.clone().requires_grad_()
    loss_of(once).backward()
    twice = batch.logits.clone().requires_grad_()
    loss = loss_of(twice)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(twice.grad, 2 * once.grad)
    other = batch.logits.clone().requires_grad_()
    loss_of(other, "ipo").backward()
    both = batch.logits.clone().requires_grad_()
    loss_of(both).backward()
    loss_of(both, "ipo").backward()
    assert torch.equal(both.grad, once.grad + other.grad)


def test_in_place_gradients_accumulate_into_weights(backend):
    """Micro-batches through one layer: the usual training step with gradient accumulation."""
    torch.manual_seed(1)
    layer = nn.Linear(6, 30, bias=False).to(backend.device)
    batch = make_pairs(2, 5, 30, torch.float32, backend.device)
    hidden = normal(4, 5, 6).to(backend.device)

    def grads(inplace):
        layer.zero_grad()
        for half in (0, 1):
            index = torch.tensor([half, 2 + half], device=backend.device)
            logits = layer(hidden[index])
            fused_token_dpo(
                logits, batch.labels[index], reference_logits=batch.reference[index], inplace_backward=inplace,
                backend=backend.name,
            ).loss.div(2).backward()  # fmt: skip
        return layer.weight.grad.clone()

    whole = layer(hidden)
    (expected,) = torch.autograd.grad(
        fused_token_dpo(whole, batch.labels, reference_logits=batch.reference, backend=backend.name).loss, layer.weight
    )
    assert torch.equal(grads(True), grads(False))
    assert_within(grads(True), expected.double(), 1e-6, "accumulated gradient")


def test_logps_in_a_loss_of_ones_own(backend, dtype):
    """GRPO-like: ratios, clipping, an entropy bonus and a KL penalty, against the same in float64."""
    rows = make_rows((3, 5), 40, dtype, backend.device)
    old = (normal(3, 5) * 0.1).to(backend.device)

    def objective(logps, entropy, kl, old, valid):
        ratio = torch.exp(0.1 * logps - old)
        return -(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * valid).sum() - (0.3 * entropy - 0.7 * kl).sum()

    valid = rows.labels != IGNORE
    leaf = rows.logits.clone().requires_grad_()
    stats = token_stats(
        leaf, rows.labels, reference_logits=rows.reference, backend=backend.name,
        outputs=("logps", "entropy", "kl_policy_reference"),
    )  # fmt: skip
    objective(stats.logps, stats.entropy, stats.kl_policy_reference, old, valid).backward()

    exact = oracle.exact(rows.logits).requires_grad_()
    truth = oracle.token_stats(exact, rows.labels.cpu(), oracle.exact(rows.reference))
    values = [truth[name] for name in ("logps", "entropy", "kl_policy_reference")]
    objective(*values, old.cpu().double(), valid.cpu()).backward()
    upstream = dict(
        zip(
            ("logps", "entropy", "kl_policy_reference"),
            torch.autograd.grad(
                objective(*(leaves := [v.detach().requires_grad_() for v in values]), old.cpu().double(), valid.cpu()),
                leaves,
            ),
            strict=True,
        )
    )
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, rows.reference)
    assert_gradient(leaf.grad, exact.grad, terms, "gradient of a loss of one's own")


def test_upstream_gradients_of_any_layout(backend):
    """Expanded, transposed and sliced upstream gradients, as sums and means produce them."""
    rows = make_rows((3, 4), 30, torch.float32, backend.device)
    weights = torch.randn(4, 9, device=backend.device)[:, 2:8:2].T
    assert not weights.is_contiguous()
    for upstream in (torch.ones(1, 1, device=backend.device).expand(3, 4), weights):
        leaf = rows.logits.clone().requires_grad_()
        token_logps(leaf, rows.labels, backend=backend.name).backward(upstream)
        truth = oracle.gradient(rows.logits, rows.labels, {"logps": upstream})
        assert_gradient(leaf.grad, truth, oracle.gradient_terms(rows.logits, rows.labels, {"logps": upstream}))


def test_saved_logits_that_change_before_the_backward_raise(backend):
    """Without the in-place option, too: a modified input is told, not used."""
    rows = make_rows((4,), 30, torch.float32, backend.device)
    weight = torch.ones((), device=backend.device, requires_grad=True)
    logits = rows.logits * weight
    loss = token_logps(logits, rows.labels, backend=backend.name).sum()
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused_not_wrong(backend):
    rows = make_rows((4,), 30, torch.float32, backend.device)
    leaf = rows.logits.clone().requires_grad_()
    logps = token_logps(leaf, rows.labels, backend=backend.name)
    (grad,) = torch.autograd.grad(logps.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.pow(2).sum().backward()


def test_gradients_need_no_memory_of_the_logits_size_between_passes(backend):
    """What the graph saves beyond its inputs: per-row numbers only."""
    batch = make_pairs(2, 6, 1000, torch.float32, backend.device)
    leaf = batch.logits.clone().requires_grad_()
    inputs = {t.untyped_storage().data_ptr() for t in (leaf, batch.reference, batch.labels)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        for loss_type in ("sigmoid", "tdpo1"):
            fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, loss_type=loss_type,
                            backend=backend.name)  # fmt: skip
    own = [t for t in saved if t.untyped_storage().data_ptr() not in inputs]
    assert saved and sum(t.numel() for t in own) < batch.logits.numel() / 10
