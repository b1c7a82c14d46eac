"""The torch.library ops and torch.compile: schemas, fake results, whole graphs, one compilation for all lengths."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from assertions import assert_within
from cases import make_head_batch, make_pairs, make_rows, normal, pack
from native_modules import HAS_COMPILER
from qkernels import (
    fused_token_dpo,
    linear_token_logps,
    linear_token_stats,
    shift_labels,
    token_logps,
    token_mdp,
    token_stats,
)
from qkernels.backends import ops
from qkernels.core.coefficients import COEFFICIENTS
from qkernels.core.fields import BIT, REFERENCE_SOFTMAX, SOFTMAX
from qkernels.head import ops as head_ops

PLAIN = (torch.float32, torch.bfloat16)
# What opcheck and torch.compile make of an operation does not depend on the backend, which is an argument of it: the
# torch backend is looked at in the nightly run.
KERNELS = ("cpu", "cuda", "triton")


# --- ops --------------------------------------------------------------------------------------------------------------


def row_inputs(backend, dtype, strided=False):
    rows = make_rows((2, 3), 17, dtype, backend.device)
    logits, reference = rows.logits, rows.reference
    if strided:
        wide = torch.zeros(2, 5, 20, dtype=dtype, device=backend.device)
        wide[:, :3, :17] = logits
        logits = wide[:, :3, :17]
    return logits, rows.labels, reference


def stats_fields():
    return SOFTMAX | REFERENCE_SOFTMAX | BIT["kl_reference_policy"] | BIT["is_top1"]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_what_looks_on_sees_the_ops():
    """Plain eager code calls the implementations themselves."""
    batch = make_pairs(1, 2, 17, torch.float32, torch.device("cpu"))

    def step():
        leaf = batch.logits.clone().requires_grad_()
        fused_token_dpo(leaf, batch.labels, reference_logps=0.0).loss.backward()
        leaf = batch.logits.clone().requires_grad_()
        token_logps(leaf.clone(), batch.labels, inplace_backward=True).sum().backward()

    expected = {f"qkernels::{name}" for name in ("row_stats", "row_grad", "row_grad_", "pair_loss")}
    with Seen() as seen:
        step()
    assert {name.removesuffix(".default") for name in seen.names} >= expected
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert {event.key for event in profile.key_averages()} >= expected


@pytest.mark.parametrize("watched", [False, True])
def test_only_the_loss_has_a_graph(watched):
    """Also where torch sees the ops, which have no gradient of their own, among tensors that require one."""
    batch = make_pairs(1, 2, 17, torch.float32, torch.device("cpu"))
    leaf = batch.logits.clone().requires_grad_()
    with Seen() if watched else contextlib.nullcontext():
        result = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference)
    assert [name for name, value in result._asdict().items() if value.requires_grad] == ["loss"]


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("fields, strided", [(BIT["logps"], True), (SOFTMAX | BIT["entropy"], False)])
def test_row_stats_without_reference(backend, dtype, fields, strided):
    logits, labels, _ = row_inputs(backend, dtype, strided)
    torch.library.opcheck(ops.row_stats.op, (logits, labels, None, fields, 1.0, -100, backend.name))


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(*PLAIN)
def test_row_stats_with_reference(backend, dtype):
    logits, labels, reference = row_inputs(backend, dtype)
    torch.library.opcheck(ops.row_stats.op, (logits, labels, reference, stats_fields(), 0.7, -100, backend.name))


def grad_args(backend, dtype, full, strided=False):
    logits, labels, reference = row_inputs(backend, dtype, strided)
    fields = SOFTMAX | REFERENCE_SOFTMAX
    stats = ops.row_stats.op(logits, labels, reference, fields, 0.7, -100, backend.name)
    coefficients = normal(len(COEFFICIENTS) if full else 1, 2, 3).to(stats)
    if full:
        return (logits, labels, reference, stats[:3], stats[3:6], coefficients, None, 0.7, -100, backend.name)
    upstream = torch.tensor(-0.5).to(stats)
    return (logits, labels, None, stats[:3], None, coefficients, upstream, 0.7, -100, backend.name)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("full, strided", [(False, True), (True, False)])
def test_row_grad(backend, dtype, full, strided):
    args = grad_args(backend, dtype, full, strided)
    torch.library.opcheck(ops.row_grad.op, args)
    torch.library.opcheck(ops.row_grad_.op, args)


def test_row_grad_in_place_equals_out_of_place(backend, dtype):
    args = grad_args(backend, dtype, True, strided=True)
    expected = ops.row_grad.op(*args)
    assert expected.is_contiguous() and expected.data_ptr() != args[0].data_ptr()
    assert ops.row_grad_.op(*args) is None
    assert torch.equal(args[0], expected)


VIEWS = {"detach", "select", "split", "unbind", "unsqueeze", "squeeze", "slice", "view"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reference", ["logits", "per token", "per sequence", "none"])
def test_the_default_loss_is_its_operations_and_nothing_else(backend, reference, packed):
    """On a GPU: two kernels in the forward, one in the backward, none of torch's between them."""
    batch = make_pairs(2, 4, 9, torch.float32, backend.device)
    batch = pack(batch) if packed else batch
    sequences = 4 if packed else len(batch.labels)
    given = {
        "logits": {"reference_logits": batch.reference},
        "per token": {"reference_logps": -torch.ones(batch.labels.shape, device=backend.device)},
        "per sequence": {"reference_logps": -torch.ones(sequences, device=backend.device)},
        "none": {"reference_logps": 0.0},
    }[reference]
    leaf = batch.logits.clone().requires_grad_()
    with Seen() as seen:
        loss = fused_token_dpo(leaf, batch.labels, cu_seqlens=batch.cu_seqlens, backend=backend.name, **given).loss
    assert without_views(seen) == ["qkernels::row_stats", "qkernels::pair_loss"]
    upstream = torch.tensor(-2.0, device=backend.device)
    with Seen() as seen:
        torch.autograd.grad(loss, leaf, upstream)
    assert without_views(seen) == ["qkernels::row_grad"]


def without_views(seen):
    names = [name.removesuffix(".default") for name in seen.names]
    return [name for name in names if name.startswith("qkernels") or name.split("::")[1].split(".")[0] not in VIEWS]


@pytest.mark.parametrize("full", [False, True])
def test_upstream_multiplies_all_coefficients(backend, dtype, full):
    logits, labels, reference, *softmax, coefficients, _, temperature, ignore, name = grad_args(backend, dtype, full)
    how = (temperature, ignore, name)
    given = ops.row_grad.op(logits, labels, reference, *softmax, 4 * coefficients, coefficients.new_tensor(0.25), *how)
    assert torch.equal(given, ops.row_grad.op(logits, labels, reference, *softmax, coefficients, None, *how))
    silent = ops.row_grad.op(
        logits * torch.nan, labels, reference, *softmax, coefficients, coefficients.new_zeros(()), *how
    )
    assert bool((silent == 0).all()), "an upstream gradient of 0 leaves nothing to be read"


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.parametrize("reference", ["none", "per token", "per sequence"])
@pytest.mark.parametrize("packed", [False, True])
def test_pair_loss(backend, packed, reference):
    shape = (1, 12) if packed else (4, 3)
    ends = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32, device=backend.device) if packed else None
    logps = normal(*shape).to(backend.device)
    given = None
    if reference != "none":
        given = (normal(4) if reference == "per sequence" else normal(*shape, key=(1,))).to(backend.device)
    labels = torch.arange(12, device=backend.device).view(shape) % 5
    both = []
    for weights in (None, (labels != 2).float()):
        args = (logps, given, labels, weights, ends, 0.1, 0.05, 2, backend.name)
        torch.library.opcheck(ops.pair_loss.op, args)
        both.append(ops.pair_loss.op(*args))
        tokens = both[-1][3]
        assert tokens.shape == (0 if reference == "per sequence" else 2, *shape)
        for value in (both[-1][2], *tokens):
            assert bool((value[labels == 2] == 0).all()) and bool(value.isfinite().all())
    for by_labels, by_weights in zip(*both, strict=True):
        assert torch.equal(by_labels, by_weights)


def linear_args(backend, dtype, fields, live=False, bias=True, softcap=None, strided=False):
    """Arguments of the ops on hidden states: two models, labels, and how."""
    batch = make_head_batch(1, 4, 6, 11, dtype, backend.device, bias=bias)
    hidden = batch.hidden.flatten(0, 1)
    if strided:
        hidden = torch.cat([hidden, hidden], 1)[:, :6]
    reference = (None,) * 3
    if live:
        reference = (batch.reference_hidden.flatten(0, 1), batch.reference_weight, batch.reference_bias)
    how = (fields, 0.7, softcap, 1.3, -100, dtype, dtype, 3, backend.name, False)
    return (hidden, batch.weight, batch.bias, *reference, batch.labels.flatten()), how


@pytest.mark.nightly_except(backend=KERNELS, dtype=(torch.bfloat16,))
@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize(
    "fields, options",
    [(BIT["logps"], {"bias": False, "strided": True}), (SOFTMAX | BIT["entropy"], {"softcap": 2.0}),
     (SOFTMAX | REFERENCE_SOFTMAX | BIT["kl_reference_policy"], {"live": True})],
)  # fmt: skip
def test_linear_stats(backend, dtype, fields, options):
    models, how = linear_args(backend, dtype, fields, **options)
    torch.library.opcheck(head_ops.linear_stats.op, (*models, *how))


@pytest.mark.nightly_except(backend=KERNELS, dtype=(torch.bfloat16,))
@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("options", [{"bias": False, "strided": True}, {"softcap": 2.0}, {"live": True}])
def test_linear_unit_gradient(backend, dtype, options):
    fields = SOFTMAX | (BIT["reference_logps"] if options.get("live") else 0)
    models, how = linear_args(backend, dtype, fields, **options)
    torch.library.opcheck(head_ops.linear_unit_gradient.op, (*models, *how))


@pytest.mark.nightly_except(backend=KERNELS, dtype=(torch.bfloat16,))
@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("live", [False, True])
def test_linear_gradients(backend, dtype, needs, live):
    fields = SOFTMAX | (REFERENCE_SOFTMAX | BIT["kl_policy_reference"] if live else 0)
    models, how = linear_args(backend, dtype, fields, live, strided=True)
    stats = head_ops.linear_stats.op(*models, *how)
    coefficients = normal(len(COEFFICIENTS) if live else 1, 8).to(stats)
    args = (stats[: 6 if live else 3].contiguous(), coefficients, list(needs), *models, *how)
    torch.library.opcheck(head_ops.linear_gradients.op, args)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_linear_ops_take_the_number_of_rows(backend, dtype):
    models, how = linear_args(backend, dtype, SOFTMAX)
    number = int((models[6] != -100).sum())
    assert 0 < number < 8
    stats = head_ops.linear_stats.op(*models, *how)
    gradients = (stats, normal(1, 8).to(stats), [True] * 3, *models)
    passes = (head_ops.linear_stats.op, head_ops.linear_unit_gradient.op, head_ops.linear_gradients.op)
    for op, args in zip(passes, (models, models, gradients), strict=True):
        torch.library.opcheck(op, (*args, *how, number))
        without, given, fewer = (op(*args, *how, *rest) for rest in ((), (number,), (number - 1,)))
        if op is head_ops.linear_stats.op:
            without, given, fewer = [without], [given], [fewer]
        assert all(torch.equal(a, b) for a, b in zip(without, given, strict=True))
        assert not torch.equal(without[0], fewer[0])  # it is the number that goes


@pytest.mark.dtypes(torch.float32)
def test_linear_ops_name_a_bad_label_by_its_row(backend, dtype):
    models, how = linear_args(backend, dtype, SOFTMAX)
    models[6][5] = 11
    if backend.device.type != "cpu":
        pytest.skip("a GPU answers with NaN")
    for op in (head_ops.linear_stats.op, head_ops.linear_unit_gradient.op):
        with pytest.raises(IndexError, match=r"labels\[5\] = 11"):
            op(*models, *how)


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_fake_results_have_the_real_shapes_and_dtypes(dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for fields in (BIT["logps"], SOFTMAX | BIT["entropy"], stats_fields()):
        with FakeTensorMode() as mode:
            logits = mode.from_tensor(torch.zeros(2, 3, 17, dtype=dtype))
            labels = mode.from_tensor(torch.zeros(2, 3, dtype=torch.int64))
            fake = ops.row_stats.op(logits, labels, logits, fields, 1.0, -100, "torch")
        assert fake.shape == (fields.bit_count(), 2, 3) and fake.dtype == torch.float32


# --- torch.compile ----------------------------------------------------------------------------------------------------

LOSS_OPTIONS = {
    "default": {},
    "smoothed": {"label_smoothing": 0.1},
    "own": {"loss_type": lambda scores, beta: torch.relu(1 - beta * scores.margins)},
    "tdpo2": {"loss_type": "tdpo2", "reduction": "sum"},
    "several": {
        "loss_type": ["sigmoid", "bco_pair", "sft", "ipo"],
        "loss_weights": [1.0, 0.5, 0.1, 0.2],
        "loss_kwargs": {"use_weighting": True, "ld_alpha": 0.5},
    },
}


def loss_function(backend, batch, inplace=False, **options):
    """The loss, a token output and the gradient, as one function of the logits."""

    def run(logits):
        out = fused_token_dpo(
            logits, batch.labels, reference_logits=batch.reference, cu_seqlens=batch.cu_seqlens,
            inplace_backward=inplace, backend=backend.name, **options,
        )  # fmt: skip
        return out.loss, out.token_rewards, out.chosen_rewards

    return run


def assert_same(compiled, eager, logits, exact=True):
    """Values and gradients of a compiled function and of the function itself."""
    results = []
    for function in (eager, compiled):
        leaf = logits.clone().requires_grad_()
        values = function(leaf)
        values = values if isinstance(values, tuple) else (values,)
        values[0].sum().backward()
        results.append((*(v.detach() for v in values), leaf.grad))
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        if exact:
            assert torch.equal(actual, expected)
        else:
            unit = 2.0**-7 if expected.dtype == torch.bfloat16 else 1e-6
            assert_within(actual, expected.double(), unit * (1 + expected.double().abs().cpu()), "compiled")


@pytest.mark.dtypes(torch.bfloat16)
def test_compiled_logps(backend, dtype):
    torch._dynamo.reset()
    rows = make_rows((2, 5), 40, dtype, backend.device)

    def run(logits):
        return token_logps(logits, rows.labels, temperature=0.9, backend=backend.name)

    assert_same(torch.compile(run, backend="aot_eager", fullgraph=True), run, rows.logits)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_compiled_stats(backend, dtype):
    torch._dynamo.reset()
    rows = make_rows((2, 5), 40, dtype, backend.device)

    def run(logits):
        stats = token_stats(
            logits, rows.labels, reference_logits=rows.reference, backend=backend.name,
            outputs=("logps", "entropy", "kl_policy_reference", "is_top1", "logsumexp"),
        )  # fmt: skip
        return stats.logps + stats.entropy - stats.kl_policy_reference, stats.is_top1, stats.logsumexp

    assert_same(torch.compile(run, backend="aot_eager", fullgraph=True), run, rows.logits)


@pytest.mark.parametrize(
    "options, packed",
    [("default", False), ("default", True), ("smoothed", True), ("own", False), ("tdpo2", True), ("several", False)],
)
@pytest.mark.nightly_except(backend=KERNELS, options=("tdpo2", "several"))
@pytest.mark.dtypes(torch.float32)
def test_compiled_losses(backend, dtype, options, packed):
    torch._dynamo.reset()
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    batch = pack(batch) if packed else batch
    run = loss_function(backend, batch, **LOSS_OPTIONS[options])
    assert_same(torch.compile(run, backend="aot_eager", fullgraph=True), run, batch.logits)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_compiled_in_place_backward(backend, dtype):
    torch._dynamo.reset()
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    weight = (0.3 * normal(8, 30)).to(backend.device, dtype)
    hidden = normal(4, 6, 8).to(backend.device, dtype)

    def run(w, inplace=True):
        return loss_function(backend, batch, inplace)(hidden @ w)[:2]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same(compiled, lambda w: run(w, False), weight, exact=False)


@pytest.mark.skipif(not HAS_COMPILER, reason="a C++ compiler, which inductor needs, is missing")
@pytest.mark.dtypes(torch.bfloat16)
def test_compiled_with_inductor(backend, dtype):
    """A training step in one graph: the head's product, two losses, an entropy bonus, the in-place backward."""
    torch._dynamo.reset()
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    weight = (0.3 * normal(8, 30)).to(backend.device, dtype)
    hidden = normal(4, 6, 8).to(backend.device, dtype)

    def run(w, inplace=True):
        out = loss_function(backend, batch, inplace, loss_type=["sigmoid", "ipo"])(hidden @ w)
        stats = token_stats(
            hidden @ (2 * w), batch.labels, outputs=("logps", "entropy"), temperature=0.9, backend=backend.name
        )
        return out[0] - 0.1 * stats.entropy.mean() + 0.2 * stats.logps.sum(), out[1]

    compiled = torch.compile(run, backend="inductor", fullgraph=True)
    assert_same(compiled, lambda w: run(w, False), weight, exact=False)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_compiled_without_gradients(backend, dtype):
    torch._dynamo.reset()
    batch = make_pairs(2, 6, 30, dtype, backend.device)

    def run(logits):
        mdp = token_mdp(logits, batch.labels, reference_logits=batch.reference, backend=backend.name)
        return mdp.Q, mdp.V, mdp.A, mdp.implicit_rewards, mdp.bellman_rewards

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for actual, expected in zip(compiled(batch.logits), run(batch.logits), strict=True):
            assert torch.equal(actual, expected)


no_recompilation = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.mark.nightly_except(backend=KERNELS, options=("default",))  # the other takes 10 s
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("options, packed", [("default", True), ("tdpo2", False)])
def test_one_compilation_serves_all_lengths(backend, dtype, packed, options):
    """known bug 22: recompilation for each length (Liger#1362)."""
    torch._dynamo.reset()
    options = LOSS_OPTIONS[options]

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def run(logits, labels, reference, ends):
        return fused_token_dpo(
            logits, labels, reference_logits=reference, cu_seqlens=ends, backend=backend.name, **options
        ).loss

    for length in (5, 6, 9):
        batch = make_pairs(3, length, 101, dtype, backend.device)
        batch = pack(batch) if packed else batch
        leaf = batch.logits.clone().requires_grad_()
        with no_recompilation:
            loss = run(leaf, batch.labels, batch.reference, batch.cu_seqlens)
            loss.backward()
        again = batch.logits.clone().requires_grad_()
        eager = fused_token_dpo(
            again, batch.labels, reference_logits=batch.reference, cu_seqlens=batch.cu_seqlens,
            backend=backend.name, **options,
        )  # fmt: skip
        eager.loss.backward()
        assert torch.equal(loss, eager.loss) and torch.equal(leaf.grad, again.grad)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_one_compilation_of_logps_serves_all_lengths_and_vocabularies(backend, dtype):
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def run(logits, labels):
        return token_logps(logits, labels, backend=backend.name)

    for length, vocab in ((5, 30), (6, 31), (9, 40), (13, 7)):
        rows = make_rows((3, length), vocab, dtype, backend.device)
        with no_recompilation:
            logps = run(rows.logits.clone().requires_grad_(), rows.labels)
            logps.sum().backward()
        assert torch.equal(logps, token_logps(rows.logits, rows.labels, backend=backend.name))


def _public_functions(backend):
    """The other public functions of tensors, as functions of a batch, a reference, hidden states and two heads."""
    names, how = ("logps", "entropy", "kl_reference_policy", "is_top1"), {"backend": backend.name}
    return {
        "shift_labels": lambda x, y, r, h, w: shift_labels(y),
        "token_stats": lambda x, y, r, h, w: token_stats(x, y, reference_logits=r, outputs=names, **how)[:4],
        "token_mdp": lambda x, y, r, h, w: token_mdp(x, y, reference_logits=r, **how)[1:],
        "linear_token_logps": lambda x, y, r, h, w: linear_token_logps(h, w, y, **how),
        "linear_token_stats": lambda x, y, r, h, w: linear_token_stats(
            h, w, y, reference_hidden=h.detach(), reference_weight=w.detach() + 0.1, outputs=names, **how
        )[:4],
    }


# The others are compiled for one length above and in test_linear_compile.py.
@pytest.mark.nightly_except(name=("shift_labels", "linear_token_stats"))
@pytest.mark.not_backends("torch")
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("name", ["shift_labels", "token_stats", "token_mdp", "linear_token_logps",
                                  "linear_token_stats"])  # fmt: skip
def test_one_compilation_of_every_other_function(backend, dtype, name):
    torch._dynamo.reset()
    function = _public_functions(backend)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 9):
        rows = make_rows((3, length), 30, dtype, backend.device)
        hidden = normal(3, length, 8).to(backend.device, dtype).requires_grad_()
        weight = normal(30, 8).to(backend.device, dtype).requires_grad_()
        with torch.set_grad_enabled(name != "token_mdp"):
            given = (rows.logits.clone().requires_grad_(), rows.labels, rows.reference, hidden, weight)
            expected = function(*given)
            with no_recompilation:
                found = compiled(*given)
        found, expected = ([v for v in tree_leaves(values) if v is not None] for values in (found, expected))
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_the_default_mode_generalises_at_the_second_length(backend, dtype):
    """Without dynamic=True torch specialises on the first length and compiles once more at the second; never again."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(logits, labels):
        return token_logps(logits, labels, backend=backend.name)

    for i, length in enumerate((5, 6, 9, 13, 17)):
        rows = make_rows((3, length), 30, dtype, backend.device)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            run(rows.logits.clone().requires_grad_(), rows.labels).sum().backward()


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_compiled_call_still_refuses_a_label_outside_the_vocabulary(backend, dtype):
    torch._dynamo.reset()
    rows = make_rows((2, 5), 30, dtype, backend.device)
    rows.labels[1, 2] = 30
    compiled = torch.compile(lambda x, y: token_logps(x, y, backend=backend.name), backend="aot_eager", fullgraph=True)
    if backend.device.type == "cpu":
        with pytest.raises(IndexError, match=r"labels\[1, 2\] = 30"):
            compiled(rows.logits, rows.labels)
    else:
        assert bool(compiled(rows.logits, rows.labels)[1, 2].isnan())


@pytest.mark.nightly_except(backend=KERNELS)
@pytest.mark.dtypes(torch.float32)
def test_compiled_call_still_raises_argument_errors(backend, dtype):
    torch._dynamo.reset()
    rows = make_rows((3, 5), 30, dtype, backend.device)
    compiled = torch.compile(
        lambda x, y: fused_token_dpo(x, y, reference_logps=0.0, backend=backend.name).loss, backend="eager"
    )
    with pytest.raises(Exception, match="even number"):
        compiled(rows.logits, rows.labels)
