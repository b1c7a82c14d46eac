"""Every misuse of the functions on hidden states is an error: the argument, what came, what was expected."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import qkernels
from assertions import refuses
from cases import IGNORE, normal
from qkernels import fused_linear_token_dpo, linear_token_logps, linear_token_stats, plan_linear

pytestmark = pytest.mark.quick

V, H, T, S = 11, 6, 5, 4


def hidden(*shape, dtype=torch.float32):
    return normal(*(shape or (S, T, H))).to(dtype)


def weight(*shape, dtype=torch.float32):
    return normal(*(shape or (V, H))).to(dtype)


def labels(*shape):
    return torch.ones(shape or (S, T), dtype=torch.int64)


# Each function with its names for hidden states, weight and bias.
FUNCTIONS = {
    "linear_token_logps": (linear_token_logps, "hidden", "weight", "bias"),
    "linear_token_stats": (linear_token_stats, "hidden", "weight", "bias"),
    "fused_linear_token_dpo": (
        lambda *args, **o: fused_linear_token_dpo(*args, **{"reference_logps": 0.0, **o}),
        "policy_hidden", "lm_head_weight", "lm_head_bias",
    ),
    "plan_linear": (
        lambda *args, **o: plan_linear(*args, **{"reference_logps": 0.0, **o}),
        "policy_hidden", "lm_head_weight", "lm_head_bias",
    ),
}  # fmt: skip


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def test_hidden_states_must_be_floating_point_tensors(function):
    run, name, *_ = function
    refuses(TypeError, name, "torch.Tensor", "list", call=lambda: run([[[1.0]]], weight(), labels()))
    refuses(TypeError, name, "torch.Tensor", "NoneType", call=lambda: run(None, weight(), labels()))
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn):
        refuses(
            TypeError, name, "float32", str(dtype),
            call=lambda dtype=dtype: run(torch.zeros(S, T, H).to(dtype), weight(), labels()),
        )  # fmt: skip


def test_hidden_states_must_have_rows_and_a_contiguous_last_dimension(function):
    run, name, *_ = function
    refuses(ValueError, name, "shape", r"\(6,\)", call=lambda: run(hidden(H), weight(), labels(1)))
    refuses(ValueError, name, r"\(4, 5, 0\)", call=lambda: run(torch.zeros(S, T, 0), torch.zeros(V, 0), labels()))
    every_other = hidden(S, T, 2 * H)[..., ::2]
    refuses(ValueError, name, "contiguous", r"\(60, 12, 2\)", call=lambda: run(every_other, weight(), labels()))


def test_the_weight_must_be_a_matrix_of_the_same_size(function):
    run, name, weight_name, _ = function
    refuses(TypeError, weight_name, "torch.Tensor", "list", call=lambda: run(hidden(), [1.0], labels()))
    refuses(
        TypeError, weight_name, "torch.Tensor", "Linear", call=lambda: run(hidden(), torch.nn.Linear(H, V), labels())
    )
    refuses(TypeError, weight_name, "floating point", "int64", call=lambda: run(hidden(), weight().long(), labels()))
    for shape in ((V, H + 1), (H, V), (V,), (1, V, H), (0, H)):
        refuses(
            ValueError, weight_name, r"\[V, H\]", "H = 6", name, re.escape(str(shape)),
            call=lambda shape=shape: run(hidden(), torch.zeros(shape), labels()),
        )  # fmt: skip


def test_dtypes_must_agree_unless_autocast_chooses(function):
    run, name, weight_name, _ = function
    for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)):
        refuses(
            TypeError, name, weight_name, str(a), str(b), "autocast",
            call=lambda a=a, b=b: run(hidden(dtype=a), weight(dtype=b), labels()),
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            if a == torch.float64:
                refuses(
                    TypeError, name, "float64", call=lambda a=a, b=b: run(hidden(dtype=a), weight(dtype=b), labels())
                )
            else:
                run(hidden(dtype=a), weight(dtype=b), labels())
    with torch.autocast("cpu", enabled=False):
        refuses(TypeError, "autocast", call=lambda: run(hidden(dtype=torch.bfloat16), weight(), labels()))


def test_the_bias_must_have_an_entry_for_each_token(function):
    run, _, _, name = function
    for shape in ((V + 1,), (H,), (1, V), (V, 1), ()):
        refuses(
            ValueError, name, re.escape(f"({V},)"), re.escape(str(shape)),
            call=lambda shape=shape: run(hidden(), weight(), labels(), **{name: torch.zeros(shape)}),
        )  # fmt: skip
    refuses(TypeError, name, "list", call=lambda: run(hidden(), weight(), labels(), **{name: [0.0] * V}))
    refuses(TypeError, name, "floating", call=lambda: run(hidden(), weight(), labels(), **{name: torch.ones(V).long()}))
    refuses(
        ValueError, name, "meta", call=lambda: run(hidden(), weight(), labels(), **{name: torch.ones(V).to("meta")})
    )


def test_labels_must_fit_the_rows(function):
    run, name, *_ = function
    refuses(TypeError, "labels", "int64", "int32", call=lambda: run(hidden(), weight(), labels().int()))
    for shape in ((S, T - 1), (S, T, 1), (S * T,)):
        refuses(
            ValueError, "labels", name, re.escape(str((S, T))), re.escape(str(shape)),
            call=lambda shape=shape: run(hidden(), weight(), labels(*shape)),
        )  # fmt: skip


@pytest.mark.parametrize("bad", [V, V + 100, -1, -99, 2**40])
def test_labels_out_of_range_are_named_with_their_position(function, bad):
    """In the batch as the caller knows it, although ignored rows are dropped before anything is computed."""
    run, *_ = function
    ids = labels()
    ids[0] = IGNORE
    ids[2, 3] = bad
    refuses(
        IndexError, r"labels\[2, 3\]", re.escape(str(bad)), r"\[0, 11\)", "ignore_index",
        call=lambda: run(hidden(), weight(), ids),
    )  # fmt: skip
    ids[0] = bad
    run(hidden(), weight(), ids, ignore_index=bad)  # an ignored label is never out of range


def test_labels_out_of_range_in_a_packed_batch():
    ids = labels(20)
    ids[13] = V
    ends = torch.tensor([0, 10, 20], dtype=torch.int32)
    for run in (fused_linear_token_dpo, plan_linear):
        refuses(
            IndexError, r"labels\[13\] = 11",
            call=lambda run=run: run(hidden(20, H), weight(), ids, reference_logps=0.0, cu_seqlens=ends),
        )  # fmt: skip


def test_tensors_must_share_a_device(function):
    """A meta tensor stands for one on another device."""
    run, name, weight_name, _ = function
    refuses(ValueError, weight_name, "meta", name, "cpu", call=lambda: run(hidden(), weight().to("meta"), labels()))
    refuses(ValueError, "labels", "meta", "cpu", call=lambda: run(hidden(), weight(), labels().to("meta")))
    refuses(ValueError, weight_name, "cpu", "meta", call=lambda: run(hidden().to("meta"), weight(), labels()))


def test_meta_tensors_are_for_planning_only():
    args = (hidden().to("meta"), weight().to("meta"), labels().to("meta"))
    assert plan_linear(*args, reference_logps=0.0).rows == S * T
    for call in (
        lambda: fused_linear_token_dpo(*args, reference_logps=0.0),
        lambda: linear_token_logps(*args),
        lambda: linear_token_stats(*args),
    ):
        refuses(ValueError, "hidden", "meta", "plan_linear", call=call)


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is missing")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh

        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_a_tensor_sharded_the_wrong_way_is_refused_with_what_to_do(mesh):
    """A head may be sharded by the vocabulary (docs/scaling.md); hidden states and labels have none."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(value, dim=0):
        return distribute_tensor(value, mesh, [Shard(dim)])

    for run, name, weight_name, _ in FUNCTIONS.values():
        advice = ("DTensor", "replicated", "Redistribute")
        refuses(TypeError, weight_name, *advice, call=lambda r=run: r(hidden(), sharded(weight(), 1), labels()))
        refuses(TypeError, name, *advice, call=lambda r=run: r(sharded(hidden()), weight(), labels()))
        refuses(TypeError, "labels", *advice, call=lambda r=run: r(hidden(), weight(), sharded(labels())))
    refuses(
        TypeError, "reference_weight", *advice,
        call=lambda: fused_linear_token_dpo(
            hidden(), weight(), labels(), reference_hidden=hidden(), reference_weight=sharded(weight(), 1)
        ),
    )  # fmt: skip
    # A gathered head works, and the gradient arrives at the shards.
    head = sharded(weight()).requires_grad_()
    out = fused_linear_token_dpo(hidden(), head.full_tensor(), labels(), reference_logps=0.0)
    out.loss.backward()
    plain = weight().requires_grad_()
    fused_linear_token_dpo(hidden(), plain, labels(), reference_logps=0.0).loss.backward()
    assert torch.equal(head.grad.full_tensor(), plain.grad)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_numbers_must_be_positive(function, value):
    run, *_ = function
    for name in ("temperature", "softcap", "logit_scale"):
        refuses(
            ValueError, name, "above 0", str(value),
            call=lambda name=name: run(hidden(), weight(), labels(), **{name: value}),
        )  # fmt: skip


def test_numbers_must_be_numbers(function):
    run, *_ = function
    for value in ("1.0", True, torch.tensor(1.0)):
        for name in ("temperature", "softcap", "logit_scale"):
            refuses(
                TypeError, name, "number",
                call=lambda name=name, v=value: run(hidden(), weight(), labels(), **{name: v}),
            )  # fmt: skip
    for value in (1.5, "x", True):
        refuses(
            TypeError, "max_chunk_bytes", "int", type(value).__name__,
            call=lambda v=value: run(hidden(), weight(), labels(), max_chunk_bytes=v),
        )  # fmt: skip
    refuses(TypeError, "ignore_index", "int", call=lambda: run(hidden(), weight(), labels(), ignore_index=1.5))


@pytest.mark.parametrize("budget", [0, -1, 1, V * 4 - 1])
def test_a_budget_too_small_for_a_row_says_what_would_do(function, budget):
    run, *_ = function
    with pytest.raises(ValueError, match=rf"max_chunk_bytes={budget} .*not even one row.*works is (\d+)") as caught:
        run(hidden(), weight(), labels(), max_chunk_bytes=budget)
    smallest = int(re.search(r"works is (\d+)", str(caught.value)).group(1))
    assert smallest == V * 4
    run(hidden(), weight(), labels(), max_chunk_bytes=smallest)
    refuses(
        ValueError, f"works is {smallest}",
        call=lambda: run(hidden(), weight(), labels(), max_chunk_bytes=smallest - 1),
    )  # fmt: skip


def test_the_smallest_budget_counts_gradient_reference_and_softcap():
    """fp32 logits, which the gradient is written over; those of the reference, where a divergence reads both models' at
    once; the capped gradient in fp32."""
    for dtype, options, trains, row in (
        (torch.float32, {}, True, 4), (torch.bfloat16, {}, False, 4), (torch.bfloat16, {}, True, 4),
        (torch.float16, {}, True, 4), (torch.float64, {}, True, 8), (torch.bfloat16, {"softcap": 3.0}, True, 8),
        (torch.float32, {"softcap": 3.0}, True, 8), (torch.bfloat16, {"live": True}, True, 4),
        (torch.bfloat16, {"live": True, "loss_type": "tdpo1"}, True, 8),
    ):  # fmt: skip
        options = dict(options)
        live = options.pop("live", False)
        reference = (
            {"reference_hidden": hidden(dtype=dtype), "reference_weight": weight(dtype=dtype)}
            if live
            else {"reference_logps": 0.0}
        )
        x, w = hidden(dtype=dtype).requires_grad_(trains), weight(dtype=dtype)
        call = {**reference, **options, "backend": "torch"}
        refuses(
            ValueError, f"works is {row * V} ",
            call=lambda x=x, w=w, c=call, r=row: fused_linear_token_dpo(x, w, labels(), max_chunk_bytes=r * V - 1, **c),
        )  # fmt: skip
        out = fused_linear_token_dpo(x, w, labels(), max_chunk_bytes=row * V, **call)
        assert out.plan.chunk_rows == 1 and out.plan.chunks == S * T


def test_backend_must_exist_and_run(function):
    run, *_ = function
    refuses(ValueError, "backend", "'turbo'", call=lambda: run(hidden(), weight(), labels(), backend="turbo"))
    refuses(
        ValueError, "backend 'cpu' cannot run", "float64",
        call=lambda: run(hidden(dtype=torch.float64), weight(dtype=torch.float64), labels(), backend="cpu"),
    )  # fmt: skip


def test_a_named_backend_is_the_one_that_runs(backend, monkeypatch):
    called = []
    run = backend.module.row_stats
    monkeypatch.setattr(backend.module, "row_stats", lambda *a: (called.append(backend.name), run(*a))[1])
    device = backend.device
    linear_token_logps(hidden().to(device), weight().to(device), labels().to(device), backend=backend.name)
    assert called == [backend.name]


# --- plans ------------------------------------------------------------------------------------------------------------


def dpo(trains="", run=fused_linear_token_dpo, **options):
    x, w = hidden().requires_grad_("h" in trains), weight().requires_grad_("w" in trains)
    return run(x, w, labels(), **{"reference_logps": 0.0, **options})


@pytest.mark.parametrize("run", [fused_linear_token_dpo, plan_linear])
def test_plans_must_exist(run):
    for name in ("fast", "forward_only", None, "", 3):
        refuses(
            ValueError, "plan", re.escape(repr(name)), "'frozen_head'", "'pair_chunks'", "'recompute'", "'auto'",
            call=lambda n=name: dpo("hw", run, plan=n),
        )  # fmt: skip


@pytest.mark.parametrize("run", [fused_linear_token_dpo, plan_linear])
def test_plans_that_cannot_do_the_work_say_why(run):
    refuses(ValueError, "'frozen_head'", "head needs a gradient", call=lambda: dpo("hw", run, plan="frozen_head"))
    refuses(ValueError, "'frozen_head'", "head needs a gradient", call=lambda: dpo("w", run, plan="frozen_head"))
    live = {"reference_hidden": hidden(), "reference_weight": weight(), "reference_logps": None}
    refuses(
        ValueError, "'frozen_head'", "log-probs",
        call=lambda: dpo("h", run, plan="frozen_head", loss_type="tdpo1", **live),
    )  # fmt: skip
    for options, why in (
        ({"loss_type": "aot"}, "couples the pairs"),
        ({"loss_type": ["sigmoid", "sft"]}, "couples the pairs"),
        ({"loss_type": lambda scores: scores.margins}, "couples|not known"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"max_chunk_bytes": 9 * V * 4}, "largest pair has 10 valid rows and a chunk holds 9"),
    ):
        refuses(ValueError, "'pair_chunks'", why, call=lambda o=options: dpo("hw", run, plan="pair_chunks", **o))


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_reference_is_hidden_states_and_a_weight():
    x, w, y = hidden(), weight(), labels()

    def run(**options):
        return fused_linear_token_dpo(x, w, y, **options)

    refuses(ValueError, "no reference", "reference_hidden", "reference_logps", "0.0", call=lambda: run())
    refuses(ValueError, "reference_hidden", "reference_weight", "lm_head_weight", call=lambda: run(reference_hidden=x))
    refuses(
        ValueError, "reference_weight", "reference_hidden", call=lambda: run(reference_weight=w, reference_logps=0.0)
    )
    refuses(
        ValueError, "reference_bias", "reference_hidden", call=lambda: run(reference_bias=w[:, 0], reference_logps=0.0)
    )
    refuses(
        ValueError, "reference_hidden", "reference_logps", "not both",
        call=lambda: run(reference_hidden=x, reference_weight=w, reference_logps=0.0),
    )  # fmt: skip
    refuses(
        ValueError, "reference_hidden", r"\(4, 5\)", r"\(4, 4, 6\)",
        call=lambda: run(reference_hidden=hidden(S, 4, H), reference_weight=w),
    )  # fmt: skip
    refuses(
        ValueError, "reference_weight", "H = 7", r"\(11, 6\)",
        call=lambda: run(reference_hidden=hidden(S, T, 7), reference_weight=w),
    )  # fmt: skip
    refuses(
        ValueError, "reference_weight", "V = 12", "V = 11", "vocabulary",
        call=lambda: run(reference_hidden=x, reference_weight=weight(12, H)),
    )  # fmt: skip
    refuses(
        ValueError, "reference_bias", r"\(11,\)", r"\(6,\)",
        call=lambda: run(reference_hidden=x, reference_weight=w, reference_bias=torch.zeros(H)),
    )  # fmt: skip
    refuses(
        ValueError, "reference_hidden", "meta", "cpu",
        call=lambda: run(reference_hidden=x.to("meta"), reference_weight=w.to("meta")),
    )  # fmt: skip
    refuses(
        TypeError, "reference_hidden", "float64",
        call=lambda: run(reference_hidden=x.double(), reference_weight=w.double()),
    )  # fmt: skip
    refuses(
        TypeError, "reference_hidden", "reference_weight", "bfloat16",
        call=lambda: run(reference_hidden=x.bfloat16(), reference_weight=w),
    )  # fmt: skip
    refuses(ValueError, "KL", "reference_hidden", call=lambda: run(loss_type="tdpo1", reference_logps=0.0))


def test_stats_need_and_use_a_reference():
    x, w, y = hidden(), weight(), labels()
    for name in ("kl_reference_policy", "kl_policy_reference", "reference_logps", "reference_logsumexp"):
        refuses(ValueError, name, "reference_hidden", call=lambda n=name: linear_token_stats(x, w, y, outputs=[n]))
    refuses(
        ValueError, "reference_hidden", "outputs",
        call=lambda: linear_token_stats(x, w, y, reference_hidden=x, reference_weight=w, outputs=["entropy"]),
    )  # fmt: skip
    refuses(ValueError, "outputs", "'perplexity'", call=lambda: linear_token_stats(x, w, y, outputs=["perplexity"]))
    refuses(TypeError, "outputs", "'logps'", call=lambda: linear_token_stats(x, w, y, outputs="logps"))


def test_hidden_states_of_the_loss_are_sequences():
    def run(x, y, **options):
        return fused_linear_token_dpo(x, weight(), y, reference_logps=0.0, **options)

    refuses(
        ValueError,
        "policy_hidden",
        r"\[2B, T, H\]",
        "cu_seqlens",
        r"\(20, 6\)",
        call=lambda: run(hidden(20, H), labels(20)),
    )
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    refuses(
        ValueError, "policy_hidden", r"\[N, H\]", "cu_seqlens", call=lambda: run(hidden(), labels(), cu_seqlens=ends)
    )
    for count in (1, 3):
        refuses(ValueError, f"{count} sequences", "even", call=lambda c=count: run(hidden(c, T, H), labels(c, T)))
    refuses(ValueError, "empty batch", call=lambda: run(hidden(0, T, H), labels(0, T)))
    refuses(
        ValueError, "cu_seqlens", "end at N = 20",
        call=lambda: run(hidden(20, H), labels(20), cu_seqlens=torch.tensor([0, 10, 19], dtype=torch.int32)),
    )  # fmt: skip


def test_options_of_losses_are_checked_as_from_logits():
    refuses(ValueError, "loss_type", "'dpo'", call=lambda: dpo(loss_type="dpo"))
    refuses(ValueError, "loss_kwargs", "gamma", call=lambda: dpo(loss_kwargs={"gamma": 1.0}))
    refuses(ValueError, "reduction", "'avg'", call=lambda: dpo(reduction="avg"))
    refuses(ValueError, "beta", "above 0", call=lambda: dpo(beta=0.0))
    refuses(ValueError, "label_smoothing", "no meaning", call=lambda: dpo(loss_type="ipo", label_smoothing=0.1))
    refuses(ValueError, "loss_weights", "2 entries", call=lambda: dpo(loss_weights=[1.0, 2.0]))
    refuses(ValueError, "token_weights", r"\(4, 5\)", call=lambda: dpo(token_weights=torch.ones(4)))
    refuses(ValueError, "reference_logps", r"\(4, 5\)", r"\(4,\)", call=lambda: dpo(reference_logps=torch.zeros(3)))


def test_unknown_keywords_are_not_swallowed():
    for name in FUNCTIONS:
        function = getattr(qkernels, name)
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        with pytest.raises(TypeError, match="inplace_backward"):
            function(hidden(), weight(), labels(), inplace_backward=True)


def test_a_plan_takes_every_argument_of_the_loss():
    """`plan_linear(...)` is what one writes before `fused_linear_token_dpo(...)`."""
    ours, theirs = (inspect.signature(f).parameters for f in (plan_linear, fused_linear_token_dpo))
    assert list(ours) == list(theirs)
    assert all(ours[name].default == theirs[name].default and ours[name].kind == theirs[name].kind for name in ours)


def test_checks_come_before_work(monkeypatch):
    """An argument error must not cost a product."""
    from qkernels.head.products import Head

    monkeypatch.setattr(Head, "logits", lambda *a: pytest.fail("logits were computed"))
    for call in (
        lambda: dpo("hw", plan="frozen_head"),
        lambda: dpo(reduction="avg"),
        lambda: dpo(loss_kwargs={"nonsense": 1}),
        lambda: dpo(reference_logps=torch.zeros(7)),
        lambda: dpo(token_weights=torch.ones(7)),
        lambda: dpo(max_chunk_bytes=3),
        lambda: dpo(softcap=-1.0),
        lambda: fused_linear_token_dpo(hidden(), weight(), labels()),
        lambda: linear_token_stats(hidden(), weight(), labels(), outputs=["nothing"]),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
