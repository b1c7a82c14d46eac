"""torch.compile around the hidden-states path: whole graphs, the same results, one compilation for all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from assertions import assert_within
from cases import HeadBatch, make_head_batch
from linear_comparisons import bytes_for, leaves
from native_modules import HAS_COMPILER
from qkernels import fused_linear_token_dpo, linear_token_logps, linear_token_stats

# Compilers take seconds, and the graph holds no more of a backend than its name: one with kernels will do.
pytestmark = pytest.mark.not_backends("torch")

no_recompilation = torch._dynamo.config.patch(error_on_recompile=True)

LOSSES = {
    "default": {},
    "smoothed": {"label_smoothing": 0.1, "reduction": "sum"},
    "softcap": {"softcap": 4.0, "logit_scale": 0.7, "temperature": 1.2},
    "tdpo2": {"loss_type": "tdpo2"},
    "aot": {"loss_type": "aot"},
    "several": {
        "loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [1.0, 0.5, 0.2],
        "loss_kwargs": {"use_weighting": True, "ld_alpha": 0.5},
    },
}  # fmt: skip


def loss_function(backend, live=True, **options):
    """Loss and outputs as one function of tensors only."""

    def run(hidden, weight, bias, labels, reference_hidden, reference_weight, cu_seqlens):
        reference = {"reference_hidden": reference_hidden, "reference_weight": reference_weight}
        out = fused_linear_token_dpo(
            hidden, weight, labels, lm_head_bias=bias, cu_seqlens=cu_seqlens, backend=backend.name,
            **(reference if live else {"reference_logps": 0.0}), **options,
        )  # fmt: skip
        return out.loss, out.token_rewards, out.chosen_rewards, out.logsumexp

    return run


def inputs(batch: HeadBatch, models) -> tuple:
    return (*models.values(), batch.labels, batch.reference_hidden, batch.reference_weight, batch.cu_seqlens)


def assert_same(compiled, eager, batch: HeadBatch, trains: str, unit: float = 1e-6) -> None:
    """Values and gradients of a compiled function and of the function itself."""
    found = []
    for function in (eager, compiled):
        models = leaves(batch, trains)
        values = function(*inputs(batch, models))
        if trains:
            (1.5 * values[0]).backward()
        grads = [leaf.grad for leaf in models.values() if leaf is not None and leaf.requires_grad]
        found.append([*(value.detach() for value in values), *grads])
    for expected, actual in zip(*found, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        largest = expected.double().abs().max().clamp_min(1e-3).cpu()
        # pair_chunks becomes recompute: of a gradient in 16 bits two roundings are in another order.
        rounding = 2.0**-6 if expected.dtype == torch.bfloat16 else unit
        assert_within(actual, expected.double(), rounding * largest, "compiled")


# A compilation takes seconds: by day one of each way through the passes, at night every option.
@pytest.mark.nightly_except(options=("default", "smoothed", "softcap"))
@pytest.mark.nightly_cases(options=("default",), trains=("h", "w"))
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize(
    "options, trains",
    [("default", "h"), ("default", "w"), ("default", ""), ("smoothed", "hwb"), ("softcap", "h"), ("tdpo2", "hwb"),
     ("aot", "hwb"), ("several", "h")],
)  # fmt: skip
def test_compiled_losses(backend, dtype, options, trains):
    torch._dynamo.reset()
    batch = make_head_batch(2, 5, 8, 20, dtype, backend.device)
    run = loss_function(backend, **LOSSES[options])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same(compiled, run, batch.pack() if options == "smoothed" else batch, trains)


@pytest.mark.nightly_except(trains=("hwb",))
@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_compiled_stats(backend, dtype, trains):
    torch._dynamo.reset()
    batch = make_head_batch(2, 5, 8, 20, dtype, backend.device)

    def run(hidden, weight, bias, labels, reference_hidden, reference_weight, _):
        logps = linear_token_logps(hidden, weight, labels, bias=bias, backend=backend.name)
        stats = linear_token_stats(
            hidden, weight, labels, bias=bias, reference_hidden=reference_hidden, reference_weight=reference_weight,
            outputs=("logps", "entropy", "kl_policy_reference", "is_top1"), backend=backend.name,
        )  # fmt: skip
        total = (logps * stats.logps.detach()).sum() + stats.entropy.sum() - stats.kl_policy_reference.sum()
        return total, stats.entropy, stats.is_top1.float()

    assert_same(torch.compile(run, backend="aot_eager", fullgraph=True), run, batch, trains)


@pytest.mark.nightly  # test_ops.py has a step on inductor
@pytest.mark.skipif(not HAS_COMPILER, reason="a C++ compiler, which inductor needs, is missing")
@pytest.mark.dtypes(torch.bfloat16)
def test_compiled_with_inductor(backend, dtype):
    """A layer, its norm and the loss in one graph."""
    torch._dynamo.reset()
    batch = make_head_batch(2, 5, 8, 20, dtype, backend.device)
    loss = loss_function(backend, loss_type=["sigmoid", "ipo"])

    def run(hidden, *rest):
        return loss(torch.nn.functional.rms_norm(torch.tanh(hidden), (8,)), *rest)

    compiled = torch.compile(run, backend="inductor", fullgraph=True)
    assert_same(compiled, run, batch, "hwb", unit=2e-2)  # inductor keeps fp32 between layer and norm


@pytest.mark.nightly_except(trains=("hwb",))
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_compiled_under_autocast(backend, dtype, trains):
    torch._dynamo.reset()
    batch = make_head_batch(2, 5, 8, 20, dtype, backend.device)
    loss = loss_function(backend)

    def run(*args):
        with torch.autocast(backend.device.type, torch.bfloat16):
            return loss(*args)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same(compiled, run, batch, trains, unit=2.0**-6)


@pytest.mark.nightly_except(packed=(False,))
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("packed, trains", [(False, "hw"), (True, "h")])
def test_one_compilation_serves_all_lengths(backend, dtype, packed, trains):
    """known bug 22: recompilation for each length (Liger#1362). Counted: one graph, no break, whatever the batch."""
    torch._dynamo.reset()
    counters.clear()
    run = loss_function(backend, live=False)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for pairs, length in ((3, 5), (2, 9), (4, 13)):
        batch = make_head_batch(pairs, length, 8, 40, dtype, backend.device, bias=False)
        batch = batch.pack() if packed else batch
        with no_recompilation:
            assert_same(compiled, run, batch, trains)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.nightly  # of the paths from logits it is tested by day
@pytest.mark.dtypes(torch.float32)
def test_the_default_mode_generalises_at_the_second_length(backend, dtype):
    """Without dynamic=True torch compiles once more at the second length; never again."""
    torch._dynamo.reset()
    run = loss_function(backend, live=False)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for i, length in enumerate((5, 6, 9)):
        batch = make_head_batch(3, length, 8, 20, dtype, backend.device)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            assert_same(compiled, run, batch, "hwb")


@pytest.mark.dtypes(torch.float32)
def test_a_compiled_call_cuts_chunks_too(backend, dtype):
    torch._dynamo.reset()
    batch = make_head_batch(2, 6, 8, 20, dtype, backend.device)
    budget = bytes_for(5, batch)
    run = loss_function(backend, max_chunk_bytes=budget)
    assert_same(torch.compile(run, backend="aot_eager", fullgraph=True), run, batch, "hwb")


@pytest.mark.nightly_except(where=("before",))
@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_graph_break_changes_nothing(backend, where):
    """Without fullgraph, Dynamo runs what it cannot trace and compiles the pieces around it one by one."""
    if where == "inside" and torch.__version__ < "2.13":
        pytest.skip("Dynamo of torch 2.11 fails on a named tuple that lives across a graph break")
    torch._dynamo.reset()
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)

    def own(scores, beta):
        if where == "inside":
            torch._dynamo.graph_break()
        return torch.relu(1 - beta * scores.margins)

    loss = loss_function(backend, loss_type=own)

    def run(hidden, *rest):
        hidden = 2 * hidden
        if where == "before":
            torch._dynamo.graph_break()
        return loss(hidden, *rest)

    assert_same(torch.compile(run, backend="aot_eager"), run, batch, "hwb")


@pytest.mark.dtypes(torch.float32)
def test_a_compiled_call_raises_as_an_eager_one(backend, dtype):
    torch._dynamo.reset()
    batch = make_head_batch(2, 5, 8, 20, dtype, backend.device)
    models = leaves(batch, "hw")
    run = loss_function(backend, plan="pair_chunks")
    with pytest.raises(Exception, match=r"inside torch\.compile"):
        torch.compile(run, backend="eager")(*inputs(batch, models))
    torch._dynamo.reset()
    batch.labels[1, 2] = 20
    run = loss_function(backend)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    if backend.device.type == "cpu":
        with pytest.raises(IndexError, match=r"labels\[7\] = 20 is outside \[0, 20\)"):  # row 7 of the batch
            compiled(*inputs(batch, models))
