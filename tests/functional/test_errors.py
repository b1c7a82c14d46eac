"""Every misuse is an error that names the argument, what came and what was expected; nothing is silently ignored."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import qkernels
from assertions import refuses
from cases import IGNORE, normal
from qkernels import fused_token_dpo, objectives, shift_labels, token_logps, token_mdp, token_stats

pytestmark = pytest.mark.quick

V, T, S = 11, 5, 4


def logits(*shape, dtype=torch.float32):
    return normal(*(shape or (S, T, V))).to(dtype)


def labels(*shape):
    return torch.ones(shape or (S, T), dtype=torch.int64)


# Each function with its name for the logits, reduced to (logits, labels, **options).
FUNCTIONS = {
    "token_logps": (lambda x, y, **o: token_logps(x, y, **o), "logits"),
    "token_stats": (lambda x, y, **o: token_stats(x, y, **o), "logits"),
    "token_mdp": (lambda x, y, **o: token_mdp(x, y, reference_logps=0.0, **o), "logits"),
    "fused_token_dpo": (lambda x, y, **o: fused_token_dpo(x, y, reference_logps=0.0, **o), "policy_logits"),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def test_logits_must_be_a_floating_point_tensor(function):
    run, name = function
    refuses(TypeError, name, "torch.Tensor", "list", call=lambda: run([[[1.0]]], labels()))
    refuses(TypeError, name, "torch.Tensor", "NoneType", call=lambda: run(None, labels()))
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        refuses(
            TypeError, name, "float32", str(dtype),
            call=lambda dtype=dtype: run(torch.zeros(S, T, V).to(dtype), labels()),
        )  # fmt: skip


def test_logits_must_have_rows_and_columns(function):
    run, name = function
    refuses(ValueError, name, r"shape", r"\(11,\)", call=lambda: run(logits(V), labels(1)))
    refuses(ValueError, name, "vocabulary", r"\(4, 5, 0\)", call=lambda: run(torch.zeros(S, T, 0), labels()))


def test_the_last_dimension_must_be_contiguous(function):
    run, name = function
    every_other = logits(S, T, 2 * V)[..., ::2]
    refuses(ValueError, name, "contiguous", "strides", r"\(110, 22, 2\)", call=lambda: run(every_other, labels()))
    swapped = logits(S, V, T).transpose(1, 2)
    refuses(ValueError, name, "contiguous", call=lambda: run(swapped, labels()))
    with_one_column = torch.zeros(S, T, 4)[..., ::4]
    run(with_one_column, torch.zeros(S, T, dtype=torch.int64))  # with V = 1 any stride is contiguous


def test_labels_must_be_int64(function):
    run, _ = function
    for dtype in (torch.int32, torch.float32, torch.bool):
        refuses(TypeError, "labels", "int64", str(dtype), call=lambda dtype=dtype: run(logits(), labels().to(dtype)))
    refuses(TypeError, "labels", "torch.Tensor", "list", call=lambda: run(logits(), [[1]]))


def test_labels_must_have_the_shape_of_the_rows(function):
    run, name = function
    for shape in ((S, T - 1), (S, T, 1), (S * T,), (T, S)):
        refuses(
            ValueError, "labels", name, re.escape(str((S, T))), re.escape(str(shape)),
            call=lambda shape=shape: run(logits(), labels(*shape)),
        )  # fmt: skip


def test_tensors_must_share_a_device(function):
    """A meta tensor stands for one on another device."""
    run, name = function
    refuses(ValueError, "labels", "meta", "cpu", name, call=lambda: run(logits(), labels().to("meta")))
    refuses(ValueError, "meta", "cpu", call=lambda: run(logits().to("meta"), labels()))


def test_labels_out_of_range_are_named_with_their_position(function):
    run, _ = function
    for bad in (V, V + 100, -1, -99, 2**40):
        ids = labels()
        ids[2, 3] = bad
        refuses(
            IndexError, r"labels\[2, 3\]", re.escape(str(bad)), r"\[0, 11\)", "ignore_index",
            call=lambda ids=ids: run(logits(), ids),
        )  # fmt: skip


def test_the_first_bad_label_is_named(backend):
    ids = torch.ones(2, 3, dtype=torch.int64)
    ids[0, 2] = 50
    ids[1, 0] = 60
    x = normal(2, 3, V).to(backend.device)
    if backend.device.type == "cpu":
        how = {"backend": backend.name}
        refuses(IndexError, r"labels\[0, 2\] = 50", call=lambda: token_logps(x, ids, **how))
        packed = x.view(6, V)
        refuses(IndexError, r"labels\[2\] = 50", call=lambda: token_logps(packed, ids.view(6), **how))
        refuses(
            IndexError, r"labels\[2\] = 50", call=lambda: fused_token_dpo(
                packed, ids.view(6), reference_logps=0.0, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32), **how
            ),
        )  # fmt: skip
    else:
        assert token_logps(x, ids.to(x.device), backend=backend.name).isnan().sum() == 2


def test_an_ignored_label_is_never_out_of_range(backend):
    ids = torch.tensor([[99, 1], [99, 2]], device=backend.device)
    x = normal(2, 2, V).to(backend.device)
    assert bool((token_logps(x, ids, ignore_index=99, backend=backend.name)[:, 0] == 0).all())
    if backend.device.type == "cpu":
        refuses(IndexError, "99", call=lambda: token_logps(x, ids, backend=backend.name))


def test_row_dimensions_must_merge():
    x = logits(2, 3, 4, V).transpose(0, 1)
    refuses(ValueError, "logits", "strides", "contiguous", call=lambda: token_logps(x.transpose(1, 2), labels(3, 4, 2)))


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(value):
    for name in ("token_logps", "token_stats", "fused_token_dpo"):
        run, _ = FUNCTIONS[name]
        refuses(
            ValueError, "temperature", "above 0", str(value),
            call=lambda run=run: run(logits(), labels(), temperature=value),
        )  # fmt: skip


def test_numbers_must_be_numbers():
    for value in ("1.0", None, True, torch.tensor(1.0)):
        refuses(TypeError, "temperature", "number", call=lambda v=value: token_logps(logits(), labels(), temperature=v))
        refuses(
            TypeError, "beta", "number",
            call=lambda v=value: fused_token_dpo(logits(), labels(), reference_logps=0.0, beta=v),
        )  # fmt: skip
    for value in (1.5, "x", None, False):
        refuses(TypeError, "ignore_index", "int", call=lambda v=value: token_logps(logits(), labels(), ignore_index=v))
    for value in (1, "yes", None):
        refuses(
            TypeError, "inplace_backward", "True or False",
            call=lambda v=value: token_logps(logits(), labels(), inplace_backward=v),
        )  # fmt: skip


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf")])
def test_beta_must_be_positive(value):
    for run in (fused_token_dpo, token_mdp):
        refuses(
            ValueError, "beta", "above 0", str(value),
            call=lambda run=run: run(logits(), labels(), reference_logps=0.0, beta=value),
        )  # fmt: skip


def test_backend_must_exist_and_run(function):
    run, _ = function
    refuses(ValueError, "backend", "'turbo'", "cuda", "torch", call=lambda: run(logits(), labels(), backend="turbo"))
    if not torch.cuda.is_available():
        for name in ("cuda", "triton"):
            refuses(ValueError, "backend", name, "cannot run", call=lambda n=name: run(logits(), labels(), backend=n))
    refuses(
        ValueError, "backend 'cpu' cannot run", call=lambda: run(logits(dtype=torch.float64), labels(), backend="cpu")
    )


def test_a_named_backend_is_the_one_that_runs(backend, monkeypatch):
    """Never a quiet fallback."""
    called = []
    run = backend.module.row_stats
    monkeypatch.setattr(backend.module, "row_stats", lambda *a: (called.append(backend.name), run(*a))[1])
    token_logps(normal(2, V).to(backend.device), labels(2).to(backend.device), backend=backend.name)
    assert called == [backend.name]


# --- token_stats ------------------------------------------------------------------------------------------------------


def test_outputs():
    x, y = logits(), labels()
    refuses(TypeError, "outputs", "'logps'", call=lambda: token_stats(x, y, outputs="logps"))
    refuses(ValueError, "outputs", "'perplexity'", "entropy", call=lambda: token_stats(x, y, outputs=["perplexity"]))
    refuses(ValueError, "outputs", "row_max", call=lambda: token_stats(x, y, outputs=["logps", "row_max"]))
    refuses(ValueError, "outputs", call=lambda: token_stats(x, y, outputs=[]))
    for name in ("kl_reference_policy", "kl_policy_reference", "reference_logps", "reference_logsumexp"):
        refuses(ValueError, name, "reference_logits", call=lambda n=name: token_stats(x, y, outputs=[n, "logps"]))
    refuses(
        ValueError, "reference_logits", "outputs", "entropy",
        call=lambda: token_stats(x, y, reference_logits=x, outputs=["logps", "entropy"]),
    )  # fmt: skip
    same = token_stats(x, y, outputs=("logps", "logps"))
    assert same.logps is not None


def test_reference_logits():
    x, y = logits(), labels()

    def run(reference):
        return fused_token_dpo(x, y, reference_logits=reference)

    refuses(TypeError, "reference_logits", "torch.Tensor", "list", call=lambda: run([1.0]))
    refuses(TypeError, "reference_logits", "int64", call=lambda: run(torch.zeros(S, T, V).long()))
    for shape in ((S, T, V + 1), (S, T + 1, V), (1, T, V), (S * T, V)):
        refuses(
            ValueError, "reference_logits", re.escape(str(shape)), re.escape(str((S, T, V))), "policy_logits",
            call=lambda shape=shape: run(torch.zeros(shape)),
        )  # fmt: skip
    refuses(ValueError, "reference_logits", "meta", "cpu", call=lambda: run(x.to("meta")))
    refuses(ValueError, "reference_logits", "contiguous", call=lambda: run(logits(S, V, T).transpose(1, 2)))
    refuses(TypeError, "reference_logits", "float64", "float32", call=lambda: run(x.double()))
    refuses(TypeError, "reference_logits", "float64", call=lambda: fused_token_dpo(x.double(), y, reference_logits=x))


# --- fused_token_dpo --------------------------------------------------------------------------------------------------


def dpo(**options):
    options = {"reference_logps": 0.0, **options}
    return fused_token_dpo(logits(), labels(), **options)


def test_policy_logits_are_sequences():
    refuses(
        ValueError, "policy_logits", r"\[2B, T, V\]", "cu_seqlens", r"\(20, 11\)",
        call=lambda: fused_token_dpo(logits(20, V), labels(20), reference_logps=0.0),
    )  # fmt: skip
    refuses(
        ValueError, "policy_logits", r"\[2B, T, V\]", r"\(2, 2, 5, 11\)",
        call=lambda: fused_token_dpo(logits(2, 2, T, V), labels(2, 2, T), reference_logps=0.0),
    )  # fmt: skip
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    refuses(ValueError, "policy_logits", r"\[N, V\]", "cu_seqlens", call=lambda: dpo(cu_seqlens=ends))


def test_sequences_come_in_pairs():
    for count in (1, 3):
        refuses(
            ValueError, f"{count} sequences", "even", "chosen",
            call=lambda c=count: fused_token_dpo(logits(c, T, V), labels(c, T), reference_logps=0.0),
        )  # fmt: skip


def test_an_empty_batch_is_refused():
    refuses(ValueError, "empty batch", call=lambda: fused_token_dpo(logits(0, T, V), labels(0, T), reference_logps=0.0))
    refuses(
        ValueError, "empty batch", call=lambda: fused_token_dpo(
            logits(0, V), labels(0), reference_logps=0.0, cu_seqlens=torch.zeros(1, dtype=torch.int32)
        ),
    )  # fmt: skip


def test_sequences_of_length_zero_are_legal(backend):
    """No rows at all is a batch without valid tokens: ln 2."""
    how = {"reference_logps": 0.0, "backend": backend.name}
    x = torch.zeros(2, 0, V, device=backend.device, requires_grad=True)
    out = fused_token_dpo(x, labels(2, 0).to(backend.device), **how)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-6) and x.grad.shape == (2, 0, V)
    ends = torch.zeros(3, dtype=torch.int32, device=backend.device)
    out = fused_token_dpo(x.detach()[0], labels(0).to(backend.device), cu_seqlens=ends, **how)
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-6)


def test_one_reference_and_no_more():
    refuses(
        ValueError, "reference_logits", "reference_logps", "not both",
        call=lambda: dpo(reference_logits=logits(), reference_logps=torch.zeros(S, T)),
    )  # fmt: skip
    refuses(ValueError, "reference_logits", "reference_logps", "not both", call=lambda: dpo(reference_logits=logits()))
    refuses(ValueError, "reference_logits", "reference_logps", "0.0", call=lambda: fused_token_dpo(logits(), labels()))
    for name in ("ipo", "sigmoid", "aot"):
        refuses(ValueError, "no reference", call=lambda n=name: fused_token_dpo(logits(), labels(), loss_type=n))
    refuses(
        ValueError, "no reference",
        call=lambda: fused_token_dpo(logits(), labels(), loss_type=["simpo", "sigmoid"]),
    )  # fmt: skip


def test_reference_logps():
    for value in (1.0, "0.0", True, [0.0]):
        refuses(
            ValueError, "reference_logps", "tensor or 0.0", re.escape(repr(value)),
            call=lambda v=value: dpo(reference_logps=v),
        )  # fmt: skip
    for shape in ((S, T + 1), (S - 1,), (S * T,), (S, T, 1), ()):
        refuses(
            ValueError, "reference_logps", re.escape(str((S, T))), r"\(4,\)", re.escape(str(shape)),
            call=lambda shape=shape: dpo(reference_logps=torch.zeros(shape)),
        )  # fmt: skip
    for shape in ((S, T), (S,)):
        refuses(
            TypeError, "reference_logps", "floating point", "int64",
            call=lambda shape=shape: dpo(reference_logps=torch.zeros(shape).long()),
        )  # fmt: skip
        refuses(
            ValueError, "reference_logps", "meta",
            call=lambda shape=shape: dpo(reference_logps=torch.zeros(shape, device="meta")),
        )  # fmt: skip


def test_divergence_losses_need_live_reference_logits():
    for name in ("tdpo1", "tdpo2"):
        for reference in (0.0, torch.zeros(S, T), torch.zeros(S)):
            refuses(
                ValueError, "KL", "reference_logits",
                call=lambda n=name, r=reference: dpo(loss_type=n, reference_logps=r),
            )  # fmt: skip


def test_loss_type():
    refuses(ValueError, "loss_type", "'dpo'", "sigmoid", "ipo", "callable", call=lambda: dpo(loss_type="dpo"))
    refuses(ValueError, "loss_type", "'kto'", call=lambda: dpo(loss_type=["sigmoid", "kto"]))
    refuses(ValueError, "loss_type", "empty", call=lambda: dpo(loss_type=[]))
    refuses(TypeError, "loss_type", "int", call=lambda: dpo(loss_type=3))
    refuses(TypeError, "loss_type", "NoneType", call=lambda: dpo(loss_type=None))


def test_callables_must_return_one_loss_per_pair():
    def mean(scores):
        return scores.margins.mean()

    refuses(ValueError, "mean", "one loss per pair", r"\(2,\)", r"\(\)", call=lambda: dpo(loss_type=mean))


def test_loss_weights():
    refuses(ValueError, "loss_weights", "2 entries", "1 loss", call=lambda: dpo(loss_weights=[1.0, 2.0]))
    refuses(ValueError, "loss_weights", "1 entries", "2 loss", call=lambda: dpo(loss_type=["ipo", "sft"],
                                                                                loss_weights=[1.0]))  # fmt: skip
    for bad in (float("nan"), float("inf")):
        refuses(ValueError, "loss_weights", "finite", call=lambda b=bad: dpo(loss_weights=[b]))


def test_label_smoothing_has_its_range():
    for name, bad in (
        ("sigmoid", -0.1), ("sigmoid", 0.5), ("sigmoid", 0.7), ("sigmoid", float("nan")), ("robust", 0.5),
        ("robust", 0.7), ("exo_pair", 0.0), ("exo_pair", 0.5), ("aot", 2.0),
    ):  # fmt: skip
        refuses(
            ValueError, "label_smoothing", name, str(bad),
            call=lambda n=name, b=bad: dpo(loss_type=n, label_smoothing=b),
        )  # fmt: skip
    dpo(loss_type="robust", label_smoothing=0.49)


@pytest.mark.parametrize(
    "name",
    ["sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft",
     "simpo"],
)  # fmt: skip
def test_label_smoothing_where_it_has_no_meaning(name):
    refuses(ValueError, "label_smoothing", "no meaning", name, call=lambda: dpo(loss_type=name, label_smoothing=0.1))


def test_token_weights_are_numbers_of_0_or_more():
    for bad in (-1.0, float("nan"), float("inf")):
        weights = torch.ones(labels().shape)
        weights[1, 2] = bad
        for reduction in ("mean", "none"):
            refuses(
                ValueError, "token_weights", str(bad), r"\[1, 2\]",
                call=lambda w=weights, r=reduction: dpo(token_weights=w, reduction=r),
            )  # fmt: skip
        ignored = labels().clone()
        ignored[1, 2] = -100
        assert fused_token_dpo(logits(), ignored, reference_logps=0.0, token_weights=weights).loss.isfinite()


def test_an_unknown_loss_is_told_what_may_be_meant():
    for name, meant in (("dpo", "sigmoid"), ("sigmod", "sigmoid"), ("TDPO2", "tdpo2")):
        refuses(ValueError, repr(name), meant, "expected one of", call=lambda n=name: dpo(loss_type=n))
    refuses(ValueError, "'tdpo1'", "KL", "reference_logits", call=lambda: dpo(loss_type="tdpo1"))


def test_results_print_on_one_line():
    out = dpo()
    assert len(repr(out).splitlines()) == 1 and f"loss={out.loss.item():.6g}" in repr(out)
    assert "token_logps=<float32 [" in repr(out) and "reference_logps=" not in repr(out)


def test_loss_kwargs():
    for name, key in (
        ("sigmoid", "discopop_tau"), ("sigmoid", "gamma"), ("ipo", "alpha"), ("simpo", "discopop_tau"),
        ("sigmoid", "label_smoothing"), ("sigmoid", "beta"), ("sigmoid", "f_alpha"), ("tdpo1", "alpha"),
    ):  # fmt: skip
        refuses(
            ValueError, "loss_kwargs", key, name, "known",
            call=lambda n=name, k=key: dpo(loss_type=n, loss_kwargs={k: 0.5}),
        )  # fmt: skip
    for name in sorted(n for n, objective in objectives.OBJECTIVES.items() if not objective.scored):
        smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        refuses(
            ValueError, "loss_kwargs", "f_divergence",
            call=lambda n=name, s=smoothing: dpo(loss_type=n, loss_kwargs={"f_divergence": "js"}, **s),
        )  # fmt: skip
    refuses(
        ValueError, "f_divergence", "'hellinger'", "forward_kl",
        call=lambda: dpo(loss_kwargs={"f_divergence": "hellinger"}),
    )  # fmt: skip
    refuses(
        ValueError, "f_alpha_divergence_coef", "no meaning",
        call=lambda: dpo(loss_kwargs={"f_divergence": "js", "f_alpha_divergence_coef": 0.3}),
    )  # fmt: skip
    refuses(ValueError, "f_alpha_divergence_coef", call=lambda: dpo(loss_kwargs={"f_alpha_divergence_coef": 0.3}))
    for bad in (-0.1, 1.5, float("nan")):
        refuses(ValueError, "ld_alpha", r"\[0, 1\]", str(bad), call=lambda b=bad: dpo(loss_kwargs={"ld_alpha": b}))
    for bad in (0.0, -1.0):
        refuses(
            ValueError, "discopop_tau", "positive",
            call=lambda b=bad: dpo(loss_type="discopop", loss_kwargs={"discopop_tau": b}),
        )  # fmt: skip
    refuses(TypeError, "use_weighting", "bool", call=lambda: dpo(loss_kwargs={"use_weighting": 1}))


def test_options_that_a_callable_needs():
    def with_margin(scores, beta, margin):
        return beta * scores.margins - margin

    refuses(ValueError, "margin", "needs", call=lambda: dpo(loss_type=with_margin))
    refuses(ValueError, "loss_kwargs", "other", call=lambda: dpo(loss_type=with_margin, loss_kwargs={"other": 1}))
    dpo(loss_type=with_margin, loss_kwargs={"margin": 1.0})


def test_reduction():
    refuses(ValueError, "reduction", "'mean'", "'none'", "'avg'", call=lambda: dpo(reduction="avg"))
    refuses(ValueError, "reduction", "None", call=lambda: dpo(reduction=None))


def test_cu_seqlens():
    x, y = logits(20, V), labels(20)

    def run(ends):
        return fused_token_dpo(x, y, reference_logps=0.0, cu_seqlens=ends)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    refuses(TypeError, "cu_seqlens", "torch.Tensor", "list", call=lambda: run([0, 10, 20]))
    refuses(TypeError, "cu_seqlens", "int32", "float32", call=lambda: run(torch.tensor([0.0, 10.0, 20.0])))
    refuses(ValueError, "cu_seqlens", r"\[2B \+ 1\]", call=lambda: run(ints(0, 10, 20).view(1, 3)))
    refuses(ValueError, "cu_seqlens", "3 sequences", "even", call=lambda: run(ints(0, 5, 10, 20)))
    refuses(ValueError, "cu_seqlens", "empty batch", call=lambda: run(ints(0)))
    refuses(ValueError, "cu_seqlens", call=lambda: run(torch.zeros(0, dtype=torch.int32)))
    refuses(ValueError, "cu_seqlens", "start at 0", "20", call=lambda: run(ints(1, 10, 20)))
    refuses(ValueError, "cu_seqlens", "end at N = 20", "19", call=lambda: run(ints(0, 10, 19)))
    refuses(ValueError, "cu_seqlens", "end at N = 20", call=lambda: run(ints(0, 10, 21)))
    refuses(ValueError, "cu_seqlens", "never decrease", call=lambda: run(ints(0, 12, 10, 15, 20)))
    refuses(ValueError, "cu_seqlens", "meta", "cpu", call=lambda: run(ints(0, 10, 20).to("meta")))
    assert torch.equal(run(ints(0, 10, 20)).loss, run(torch.tensor([0, 10, 20])).loss)
    # The other users of cu_seqlens check alike.
    refuses(ValueError, "cu_seqlens", "end at N", call=lambda: shift_labels(y, cu_seqlens=ints(0, 10, 19)))
    refuses(
        ValueError, "cu_seqlens", "end at N",
        call=lambda: token_mdp(x, y, reference_logps=0.0, cu_seqlens=ints(0, 10, 19)),
    )  # fmt: skip
    refuses(
        ValueError, "cu_seqlens", "packed",
        call=lambda: token_mdp(logits(), labels(), reference_logps=0.0, cu_seqlens=ints(0, 10, 20)),
    )  # fmt: skip


def test_token_weights():
    refuses(TypeError, "token_weights", "torch.Tensor", "list", call=lambda: dpo(token_weights=[1.0]))
    refuses(TypeError, "token_weights", "floating point", "int64", call=lambda: dpo(token_weights=labels()))
    for shape in ((S,), (S, T + 1), (S, T, 1), (1, T), (S * T,)):
        refuses(
            ValueError, "token_weights", re.escape(str((S, T))), re.escape(str(shape)),
            call=lambda shape=shape: dpo(token_weights=torch.ones(shape)),
        )  # fmt: skip
    refuses(ValueError, "token_weights", "meta", call=lambda: dpo(token_weights=torch.ones(S, T, device="meta")))
    refuses(
        ValueError, "token_weights", "gradient",
        call=lambda: dpo(token_weights=torch.ones(S, T, requires_grad=True)),
    )  # fmt: skip


def test_mdp_takes_one_reference():
    refuses(ValueError, "reference_logits", "reference_logps", call=lambda: token_mdp(logits(), labels()))
    refuses(
        ValueError, "reference_logits", "reference_logps",
        call=lambda: token_mdp(logits(), labels(), reference_logits=logits(), reference_logps=0.0),
    )  # fmt: skip
    refuses(ValueError, "reference_logps", "1.0", call=lambda: token_mdp(logits(), labels(), reference_logps=1.0))
    refuses(
        ValueError, "reference_logps", r"\(4,\)",
        call=lambda: token_mdp(logits(), labels(), reference_logps=torch.zeros(S)),
    )  # fmt: skip


def test_shift_labels():
    ids = labels(2, 6)
    refuses(TypeError, "labels", "int64", "float32", call=lambda: shift_labels(ids.float()))
    refuses(TypeError, "labels", "torch.Tensor", call=lambda: shift_labels([1, 2]))
    refuses(ValueError, "labels", "scalar", call=lambda: shift_labels(torch.tensor(1)))
    refuses(ValueError, "mask", r"\(2, 6\)", r"\(2, 5\)", call=lambda: shift_labels(ids, mask=labels(2, 5)))
    refuses(TypeError, "mask", "torch.Tensor", call=lambda: shift_labels(ids, mask=[1]))
    refuses(ValueError, "mask", "meta", call=lambda: shift_labels(ids, mask=ids.to("meta")))
    refuses(TypeError, "ignore_index", call=lambda: shift_labels(ids, ignore_index=1.0))
    refuses(
        ValueError, "packed", call=lambda: shift_labels(ids, cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32))
    )
    assert shift_labels(labels(3, 1)).tolist() == [[IGNORE]] * 3


def test_unknown_keywords_are_not_swallowed():
    for name in ("token_logps", "token_stats", "token_mdp", "fused_token_dpo"):
        function = getattr(qkernels, name)
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        with pytest.raises(TypeError, match="softcap"):
            function(logits(), labels(), softcap=30.0)


def test_checks_come_before_work(monkeypatch):
    """An argument error must not cost a pass over the logits."""
    from qkernels import backends

    monkeypatch.setattr(backends.get("torch"), "row_stats", lambda *a: pytest.fail("rows were read"))
    for call in (
        lambda: dpo(reduction="avg", backend="torch"),
        lambda: dpo(loss_type="dpo", backend="torch"),
        lambda: dpo(loss_kwargs={"nonsense": 1}, backend="torch"),
        lambda: dpo(reference_logps=torch.zeros(7), backend="torch"),
        lambda: dpo(token_weights=torch.ones(7), backend="torch"),
        lambda: fused_token_dpo(logits(), labels(), backend="torch"),
        lambda: token_mdp(logits(), labels(), reference_logps=1.0, backend="torch"),
        lambda: token_mdp(
            logits(20, V), labels(20), reference_logps=0.0, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32),
            backend="torch",
        ),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            call()
