"""`valid_rows`: numbers that the caller has counted already. Nothing else changes, and nobody waits for a device.

A GPU is stood in for by CPU tensors at whose values the host does not look (`unread`): the same code runs, and the
results can be compared.
"""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels.functional.hidden
from assertions import refuses
from cases import IGNORE, HeadBatch, make_head_batch
from linear_comparisons import bytes_for, leaves
from qkernels import fused_linear_token_dpo, linear_token_logps, linear_token_stats, plan_linear
from qkernels.backends import reference
from qkernels.core import checks
from qkernels.functional.hidden import linear_token_dpo
from qkernels.head import chunks

PLANS = {"frozen_head": "h", "pair_chunks": "hwb", "recompute": "hwb", "forward_only": ""}
PAIRS, LENGTH, SIZE, VOCAB = 3, 6, 8, 20

# What may change which rows count, or how sequences are summed.
OPTIONS = {
    "default": {},
    "weights": {"token_weights": True},
    "ld_dpo": {"loss_kwargs": {"ld_alpha": 0.5}, "loss_type": "ipo"},
    "shared length": {"loss_kwargs": {"ld_alpha": 0.0}, "token_weights": True},
    "shared length, weighed": {"loss_kwargs": {"ld_alpha": 0.0, "use_weighting": True}},
    "live": {"live": True, "reduction": "sum"},
    "tdpo2": {"live": True, "loss_type": "tdpo2"},
    "cached sums": {"reference_logps": torch.arange(6.0)},
}


@pytest.fixture
def unread(monkeypatch):
    """Tensors stand for such on a GPU: the host looks at no value to check an argument."""
    monkeypatch.setattr(checks, "readable", lambda value: False)


def small(dtype=torch.float32, device="cpu", packed=False) -> HeadBatch:
    batch = make_head_batch(PAIRS, LENGTH, SIZE, VOCAB, dtype, device)
    return batch.pack() if packed else batch


def weights_of(batch: HeadBatch) -> torch.Tensor:
    weights = torch.linspace(0.5, 1.5, batch.labels.numel(), device=batch.labels.device).view(batch.labels.shape)
    weights.view(-1)[2::7] = 0.0
    return weights


def counted(batch: HeadBatch, token_weights=None, loss_kwargs=None, **_) -> list[int]:
    """What the docstring says, from the tensors: a loop over the rows of each sequence."""
    labels = batch.labels.view(2 * PAIRS, LENGTH)
    weights = torch.ones_like(labels) if token_weights is None else token_weights.view(labels.shape)
    found = [
        sum(int(label) != IGNORE and float(weight) != 0 for label, weight in zip(*sequence, strict=True))
        for sequence in zip(labels, weights, strict=True)
    ]
    kwargs = loss_kwargs or {}
    if kwargs.get("ld_alpha") == 0 and not kwargs.get("use_weighting"):
        found = [min(found[i], found[(i + PAIRS) % (2 * PAIRS)]) for i in range(2 * PAIRS)]
    return found


def call_of(batch: HeadBatch, options: dict, plan: str = "auto", chunk_rows: int | None = 2 * LENGTH) -> dict:
    """Keywords of the loss."""
    how = {"reference_logps": 0.0, **options}
    if how.pop("token_weights", False):
        how["token_weights"] = weights_of(batch)
    if how.pop("live", False):
        how |= {
            "reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight,
            "reference_bias": batch.reference_bias, "reference_logps": None,
        }  # fmt: skip
    if isinstance(how["reference_logps"], torch.Tensor):
        how["reference_logps"] = how["reference_logps"].to(batch.hidden.device)
    if chunk_rows is not None:
        how["max_chunk_bytes"] = bytes_for(
            chunk_rows, batch, live_reference="reference_hidden" in how, divergence="tdpo" in str(how.get("loss_type"))
        )
    return {**how, "plan": "auto" if plan == "forward_only" else plan, "cu_seqlens": batch.cu_seqlens}


def results(batch: HeadBatch, plan: str, how: dict, backend: str = "auto", function=fused_linear_token_dpo):
    """All that a loss returns, and the gradients."""
    models = leaves(batch, PLANS[plan])
    out = function(
        models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], backend=backend, **how
    )
    if PLANS[plan]:
        (1.5 * out.loss.sum()).backward()
    gradients = [leaf.grad for leaf in models.values() if leaf is not None and leaf.requires_grad]
    return out, gradients


def assert_equal(found, expected) -> None:
    """Bit for bit."""
    (out, gradients), (want, want_gradients) = found, expected
    assert out.plan == want.plan if hasattr(want, "plan") else True
    for actual, value in zip((*out, *gradients), (*want, *want_gradients), strict=True):
        assert (actual is None and value is None) or torch.equal(actual, value)


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("plan", PLANS)
def test_results_are_the_same_bit_for_bit(backend, dtype, plan, packed, request):
    """Looked at or not: with numbers that the host checks, and with numbers that it takes on trust."""
    batch = small(dtype, backend.device, packed)
    expected = {}
    for name, options in OPTIONS.items():
        if plan == "frozen_head" and name == "tdpo2":
            continue
        how = call_of(batch, options, plan)
        expected[name] = (how, results(batch, plan, how, backend.name))
        assert_equal(
            results(batch, plan, {**how, "valid_rows": counted(batch, **how)}, backend.name), expected[name][1]
        )
        assert expected[name][1][0].plan.name == plan
    request.getfixturevalue("unread")
    for how, without in expected.values():
        assert_equal(results(batch, plan, {**how, "valid_rows": counted(batch, **how)}, backend.name), without)


@pytest.mark.dtypes(torch.float32)
def test_batches_where_all_or_no_rows_count(backend, dtype, unread):
    for rows_, ids in (("all", 1), ("none", IGNORE)):
        batch = small(dtype, backend.device)
        batch.labels[:] = ids
        for plan in PLANS:
            how = call_of(batch, {}, plan, chunk_rows=None)
            numbers = [LENGTH if rows_ == "all" else 0] * (2 * PAIRS)
            found = results(batch, plan, {**how, "valid_rows": numbers}, backend.name)
            assert_equal(found, results(batch, plan, how, backend.name))
            assert found[0].loss.isfinite()


@pytest.mark.parametrize("trains", ["", "h", "hwb"])
def test_per_token_functions_are_the_same(trains, request):
    def run(batch, valid_rows):
        models = leaves(batch, trains)
        args = (models["hidden"], models["weight"], batch.labels)
        how = {"bias": models["bias"], "valid_rows": valid_rows}
        stats = linear_token_stats(*args, outputs=("logps", "entropy", "is_top1"), **how)
        found = [linear_token_logps(*args, **how), stats.logps, stats.entropy, stats.is_top1]
        if trains:
            (found[0].sum() + (stats.entropy * stats.logps).sum()).backward()
        return found + [leaf.grad for leaf in models.values() if leaf.requires_grad]

    batch = small()
    expected = run(batch, None)
    for looks in (True, False):
        if not looks:
            request.getfixturevalue("unread")
        for number in (batch.valid, torch.tensor(batch.valid)):
            assert all(torch.equal(a, b) for a, b in zip(run(batch, number), expected, strict=True))


def test_further_outputs_and_all_kinds_of_integers():
    numpy = pytest.importorskip("numpy")
    batch = small()
    how = call_of(batch, {})
    numbers = counted(batch)

    def run(**given):
        return linear_token_dpo(batch.hidden, batch.weight, batch.labels, outputs=("entropy",), **how, **given)

    (want, stats) = run()
    for given in (
        numbers,
        tuple(numbers),
        torch.tensor(numbers),
        numpy.array(numbers),
        [numpy.int32(n) for n in numbers],
    ):
        out, found = run(valid_rows=given)
        assert torch.equal(out.loss, want.loss) and torch.equal(found.entropy, stats.entropy)


def test_plans_of_meta_tensors_know_the_rows():
    batch = small()
    numbers = counted(batch)
    how = call_of(batch, {}, chunk_rows=None) | {"max_chunk_bytes": LENGTH * 2 * VOCAB * 4}
    meta = [t.to("meta").requires_grad_(t.is_floating_point()) for t in (batch.hidden, batch.weight, batch.labels)]
    plan = plan_linear(*meta, **how, valid_rows=numbers)
    real = plan_linear(batch.hidden.requires_grad_(), batch.weight.requires_grad_(), batch.labels, **how)
    # Which GEMM runs, and what it packs, is known of a device only.
    real = real._replace(logits=plan.logits, peak_bytes=plan.peak_bytes)
    assert plan == real and plan.rows == batch.valid < plan_linear(*meta, **how).rows == batch.labels.numel()


# --- nobody waits -----------------------------------------------------------------------------------------------------


class NoRead(contextlib.ExitStack):
    """Fails on what would make the host wait for a GPU: values that it reads, sizes that depend on values, and tensors
    made of its own numbers, which would have to be copied."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "_unique2")
    INDEXES = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")
    # Not all of these are operations.
    METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.watching = True

    def __enter__(self):
        super().__enter__()
        watch = self

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name.removeprefix("aten::")
                masks = name in watch.INDEXES and any(i is not None and i.dtype == torch.bool for i in args[1])
                if watch.watching and (name in watch.OPERATIONS or masks):
                    raise AssertionError(f"the host would wait: {func}")
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if watch.watching and getattr(func, "__name__", "") in watch.METHODS:
                    raise AssertionError(f"the host would wait: {func.__name__}")
                return func(*args, **(kwargs or {}))

        self.enter_context(Operations())
        self.enter_context(Methods())
        return self

    def exempt(self, function):
        """The function, unwatched."""

        def run(*args):
            self.watching = False
            try:
                return function(*args)
            finally:
                self.watching = True

        return run


@pytest.fixture
def no_read(unread, monkeypatch):
    """`NoRead`, but for what is read of CPU tensors alone: `KnownGradient` asks whether its factor is 1, and the
    reference backend whether a label is out of range."""
    watch, known = NoRead(), qkernels.autograd.head.KnownGradient
    monkeypatch.setattr(known, "backward", staticmethod(watch.exempt(known.backward)))
    monkeypatch.setattr(reference, "_safe_labels", watch.exempt(reference._safe_labels))
    return watch


@pytest.mark.nightly_cases(packed=(True,), dtype=(torch.bfloat16,))
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_in_forward_or_backward(no_read, plan, packed, dtype):
    batch = small(dtype, packed=packed)
    for name, options in OPTIONS.items():
        if plan == "frozen_head" and name == "tdpo2":
            continue
        how = call_of(batch, options, plan)
        numbers = counted(batch, **how)
        with no_read:
            results(batch, plan, {**how, "valid_rows": numbers}, "torch")
        with pytest.raises(AssertionError, match="would wait: tolist"), no_read:
            results(batch, plan, how, "torch")  # so the mode sees the wait that is left out


@pytest.mark.parametrize("trains", ["", "h", "hwb"])
def test_nothing_is_read_by_the_per_token_functions(no_read, trains):
    batch = small()

    def run(**how):
        models = leaves(batch, trains)
        args = (models["hidden"], models["weight"], batch.labels)
        stats = linear_token_stats(*args, outputs=("logps", "entropy"), bias=models["bias"], backend="torch", **how)
        logps = linear_token_logps(*args, bias=models["bias"], backend="torch", **how)
        if trains:
            (stats.entropy + logps).sum().backward()

    number = batch.valid
    with no_read:
        run(valid_rows=number)
    with pytest.raises(AssertionError, match="nonzero"), no_read:
        run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is present")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_gpu_is_not_waited_for(plan, packed):
    """torch's own watch."""
    batch = small(torch.bfloat16, "cuda", packed)
    for options in ({}, {"token_weights": True}, {"live": True, "loss_type": "ipo"}):
        how = call_of(batch, options, plan)
        how["valid_rows"] = counted(batch, **how)
        results(batch, plan, how)  # compiles kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(batch, plan, how)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- wrong numbers ----------------------------------------------------------------------------------------------------


def wrong(numbers: list[int]) -> dict[str, tuple[list[int], int]]:
    """Wrong numbers, and the first sequence that differs."""
    more, fewer = list(numbers), list(numbers)
    more[1] += 1
    fewer[-1] -= 1
    moved, swapped = list(numbers), list(numbers)
    moved[0], moved[4] = moved[0] - 1, moved[4] + 1
    a, b = next((i, j) for i in range(6) for j in range(i) if numbers[i] != numbers[j])
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return {
        "one more": (more, 1), "one fewer": (fewer, 5), "moved": (moved, 0), "swapped": (swapped, b),
        "none": ([0] * 6, 0), "all": ([LENGTH] * 6, 0),
    }  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_host_names_the_first_sequence_that_differs(packed):
    batch = small(packed=packed)
    batch.labels.view(6, -1)[:, -1] = IGNORE  # room for one more
    how = call_of(batch, {"token_weights": True})
    numbers = counted(batch, **how)
    for said, first in wrong(numbers).values():
        for function in (fused_linear_token_dpo, plan_linear, linear_token_dpo):
            with pytest.raises(
                ValueError,
                match=rf"valid_rows\[{first}\] is {said[first]}, but {numbers[first]} rows of sequence {first}",
            ):
                function(batch.hidden, batch.weight, batch.labels, valid_rows=said, **how)
    for function in (linear_token_logps, linear_token_stats):
        for number in (batch.valid - 1, batch.valid + 1, 0):
            with pytest.raises(ValueError, match=f"valid_rows is {number}, but {batch.valid} labels"):
                function(batch.hidden, batch.weight, batch.labels, valid_rows=number)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.dtypes(torch.float32)
def test_what_the_host_does_not_see_becomes_nan(backend, dtype, plan, packed, unread):
    """Loss, rewards, per-token results and gradients; whatever the loss makes of the rows."""
    batch = small(dtype, backend.device, packed)
    batch.labels.view(6, -1)[:, -1] = IGNORE
    for options in ({}, {"token_weights": True}, {"loss_type": "hinge", "live": True}, {"loss_type": "ipo"}):
        how = call_of(batch, options, plan)
        for said, _ in wrong(counted(batch, **how)).values():
            out, gradients = results(batch, plan, {**how, "valid_rows": said}, backend.name)
            assert out.loss.isnan()
            for value in (out.chosen_rewards, out.rejected_rewards, out.token_logps, out.token_rewards, out.logsumexp):
                assert value.isnan().all()
            if sum(said) and plan != "forward_only":
                assert all(gradient.isnan().any() for gradient in gradients)


def test_further_outputs_become_nan(unread):
    batch = small()
    for plan in PLANS:
        models = leaves(batch, PLANS[plan])
        how = call_of(batch, {}, plan) | {"valid_rows": wrong(counted(batch))["swapped"][0]}
        _, stats = linear_token_dpo(models["hidden"], models["weight"], batch.labels, outputs=("entropy",), **how)
        assert stats.entropy.isnan().all()


@pytest.mark.parametrize("trains", ["", "h", "hwb"])
def test_per_token_results_become_nan(unread, trains):
    batch = small()
    for number in (batch.valid - 1, batch.valid + 1, 1, batch.labels.numel()):
        models = leaves(batch, trains)
        args = (models["hidden"], models["weight"], batch.labels)
        outputs = ("logps", "logsumexp", "entropy", "is_top1")
        stats = linear_token_stats(*args, outputs=outputs, bias=models["bias"], valid_rows=number)
        logps = linear_token_logps(*args, bias=models["bias"], valid_rows=number)
        for value in (logps, stats.logps, stats.logsumexp, stats.entropy):
            assert value.isnan().all()
        assert not stats.is_top1.any()
        if trains:
            (logps.sum() + stats.entropy.sum()).backward()
            assert all(leaf.grad.isnan().any() for leaf in models.values() if leaf.requires_grad)


def test_rows_stay_inside_the_batch_whatever_the_number(monkeypatch):
    """A row number outside would be an assertion on a GPU, or someone else's memory."""
    labels = torch.tensor([IGNORE, 3, IGNORE, 4, 5])
    for number, expected in ((3, [1, 3, 4]), (2, [1, 3]), (0, []), (5, [1, 3, 4, 0, 0])):
        assert chunks.valid_rows(labels, IGNORE, number).tolist() == expected


def test_pairs_are_cut_as_the_caller_said(unread, monkeypatch):
    """In a chunk of pairs the boundaries of the sequences have to lie inside of the chunk's rows."""
    batch = small()
    batch.labels[:, -1] = IGNORE
    seen = []
    own = qkernels.functional.preference.loss_gradient
    monkeypatch.setattr(
        qkernels.functional.preference, "loss_gradient",
        lambda stats, part, *rest: (seen.append((part.labels.shape[1], part.cu_seqlens)), own(stats, part, *rest))[1],
    )  # fmt: skip
    how = call_of(batch, {}, "pair_chunks", chunk_rows=2 * LENGTH)
    for said, _ in wrong(counted(batch)).values():
        results(batch, "pair_chunks", {**how, "valid_rows": said})
    assert len(seen) > 6
    for length, ends in seen:
        assert int(ends[0]) == 0 and int(ends[-1]) == length and bool((ends.diff() >= 0).all())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fused_linear_token_dpo, plan_linear, linear_token_dpo])
def test_numbers_must_fit_the_batch(function):
    batch = small()
    packed = batch.pack()

    def run(given, of=batch):
        return function(
            of.hidden, of.weight, of.labels, reference_logps=0.0, cu_seqlens=of.cu_seqlens, valid_rows=given
        )

    n = counted(batch)
    for given, got in ((3, "int 3"), ("345", "str '345'"), ({1: 2}, "dict"), (torch.tensor(3), "Tensor of shape")):
        refuses(TypeError, "valid_rows", "sequence of ints", "2B", got, call=lambda g=given: run(g))
    for bad, got in ((1.0, "float"), (True, "bool"), (None, "NoneType"), ("1", "str"), (torch.tensor(True), "Tensor")):
        refuses(TypeError, r"valid_rows\[2\]", "int", got, call=lambda b=bad: run([*n[:2], b, *n[3:]]))
    refuses(TypeError, r"valid_rows\[0\]", "int", "float", call=lambda: run(torch.tensor(n).float()))
    refuses(TypeError, r"valid_rows\[0\]", "int", "bool", call=lambda: run(torch.ones(6, dtype=torch.bool)))
    refuses(TypeError, r"valid_rows\[0\]", "int", "list", call=lambda: run(torch.tensor([n])))
    device = torch.tensor(n, device="meta")  # stands for a GPU's
    refuses(TypeError, "valid_rows", "meta", "wait", "on the CPU", call=lambda: run(device))
    refuses(TypeError, r"valid_rows\[0\]", "meta", "wait", call=lambda: run(list(device)))
    refuses(ValueError, r"valid_rows\[1\]", "0 or more", "-1", call=lambda: run([n[0], -1, *n[2:]]))
    for given in (n[:-1], [*n, 0], []):
        refuses(ValueError, "valid_rows", "6 sequences", f"got {len(given)}", call=lambda g=given: run(g))
    refuses(ValueError, r"valid_rows\[5\]", "is 7", "6 rows", call=lambda: run([*n[:5], 7]))
    refuses(ValueError, r"valid_rows\[0\]", "is 37", "36 rows", call=lambda: run([37, *n[1:]], packed))


def test_sizes_are_checked_where_the_values_are_not(unread):
    batch = small().pack()
    refuses(
        ValueError, "valid_rows", "40 rows in all", "has 36",
        call=lambda: fused_linear_token_dpo(
            batch.hidden, batch.weight, batch.labels, reference_logps=0.0, cu_seqlens=batch.cu_seqlens,
            valid_rows=[10, 10, 10, 10, 0, 0],
        ),
    )  # fmt: skip


@pytest.mark.parametrize("function", [linear_token_logps, linear_token_stats])
def test_one_number_must_fit_the_batch(function):
    batch = small()

    def run(given):
        return function(batch.hidden, batch.weight, batch.labels, valid_rows=given)

    for bad, got in ((1.0, "float"), (True, "bool"), ("1", "str"), ([1], "list"), (torch.tensor([1, 2]), "Tensor")):
        refuses(TypeError, "valid_rows", "int", got, call=lambda b=bad: run(b))
    refuses(TypeError, "valid_rows", "meta", "wait", call=lambda: run(torch.tensor(1, device="meta")))
    refuses(ValueError, "valid_rows", "0 or more", "-3", call=lambda: run(-3))
    refuses(ValueError, "valid_rows", "37", "36 rows", call=lambda: run(37))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled_loss(hidden, weight, labels, valid_rows, **how):
    return fused_linear_token_dpo(hidden, weight, labels, reference_logps=0.0, valid_rows=valid_rows, **how).loss


@pytest.mark.nightly_except(trains=("hw",))
@pytest.mark.parametrize("trains", ["h", "hw"])
def test_one_compilation_serves_all_numbers(monkeypatch, trains):
    """With dynamic=True the numbers are symbols from the start, 0 and 1 too; the operations get their sum."""
    torch._dynamo.reset()
    counters.clear()
    seen = []
    own = chunks.valid_rows
    monkeypatch.setattr(chunks, "valid_rows", lambda labels, i, n=None: (seen.append(n), own(labels, i, n))[1])
    compiled = torch.compile(compiled_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for step in range(5):
        batch = make_head_batch(PAIRS, LENGTH, SIZE, VOCAB, torch.float32, key=(step,))
        batch.labels[:, step:] = torch.where(batch.labels[:, step:] == IGNORE, 1, batch.labels[:, step:])
        if step == 1:  # what a symbol would not stand for, if it were a size
            batch.labels[0], batch.labels[1, 1:], batch.labels[2] = IGNORE, IGNORE, 1
        numbers = counted(batch)
        models = [leaves(batch, trains) for _ in range(2)]
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(models[0]["hidden"], models[0]["weight"], batch.labels, numbers)
            seen.clear()
            loss.backward()
            assert seen in ([], [sum(numbers)])  # a frozen head has its gradient already
        fused_linear_token_dpo(
            models[1]["hidden"], models[1]["weight"], batch.labels, reference_logps=0.0,
            plan="auto" if trains == "h" else "recompute",
        ).loss.backward()  # fmt: skip
        for name in ("hidden", "weight"):
            if models[0][name].requires_grad:
                torch.testing.assert_close(models[0][name].grad, models[1][name].grad, rtol=1e-5, atol=1e-7)
    assert not counters["graph_break"]


@pytest.mark.nightly
def test_the_default_mode_compiles_twice_where_all_numbers_change():
    torch._dynamo.reset()
    batch = small()
    compiled = torch.compile(compiled_loss, backend="aot_eager", fullgraph=True)
    for step, number in enumerate((LENGTH, LENGTH - 1, 2, 0, 1)):
        batch.labels[:] = 1
        batch.labels[:, number:] = IGNORE
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            loss = compiled(batch.hidden, batch.weight, batch.labels, [number] * (2 * PAIRS))
        assert loss.isfinite()


@pytest.mark.nightly_except(trains=("hw",))
@pytest.mark.parametrize("trains", ["h", "hw"])
def test_compiled_calls_answer_wrong_numbers_with_nan(trains):
    torch._dynamo.reset()
    batch = small()
    batch.labels[:, -1] = IGNORE
    compiled = torch.compile(compiled_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for said, _ in [(counted(batch), None), *wrong(counted(batch)).values()]:
        models = leaves(batch, trains)
        loss = compiled(models["hidden"], models["weight"], batch.labels, said)
        loss.backward()
        right = said == counted(batch)
        assert bool(loss.isnan()) is not right
        if sum(said):
            assert models["hidden"].grad.isfinite().all() == right


@pytest.mark.nightly
def test_compiled_per_token_functions_take_the_number():
    torch._dynamo.reset()
    batch = small()

    def run(hidden, weight, labels, number):
        stats = linear_token_stats(hidden, weight, labels, outputs=("logps", "entropy"), valid_rows=number)
        return stats.entropy, linear_token_logps(hidden, weight, labels, valid_rows=number)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = run(batch.hidden, batch.weight, batch.labels, batch.valid)
    for number in (batch.valid, batch.valid + 1, batch.valid - 1, batch.valid):
        found = compiled(batch.hidden, batch.weight, batch.labels, number)
        for actual, value in zip(found, expected, strict=True):
            assert torch.equal(actual, value) if number == batch.valid else actual.isnan().all()


def test_messages_have_no_tensors():
    """Numbers of a CPU tensor are told as numbers."""
    batch = small()
    numbers = torch.tensor(counted(batch))
    numbers[0] += 1
    with pytest.raises(ValueError, match=re.escape(f"valid_rows[0] is {int(numbers[0])}, but {int(numbers[0]) - 1} ")):
        fused_linear_token_dpo(batch.hidden, batch.weight, batch.labels, reference_logps=0.0, valid_rows=numbers)
