"""Plans of the hidden-states path: which one is chosen, what it says before anything runs, and that it keeps its word.

Products are counted by torch's flop counter. Memory is what torch's CPU allocator has handed out, by the profiler's
records of every allocation: the same numbers on each run, unlike resident memory.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cases import IGNORE, HeadBatch, make_head_batch
from linear_comparisons import bytes_for, leaves
from qkernels import LinearPlan, fused_linear_token_dpo, linear_token_stats, objectives, plan_linear
from qkernels.core.memory import block_elements, free_memory
from qkernels.head import chunks, products, waiting
from qkernels.head.products import block_bytes, logits_product

PLAIN = (torch.float32, torch.bfloat16)
PLANS = ("frozen_head", "pair_chunks", "recompute")
PAIRS, LENGTH, SIZE, VOCAB = 3, 6, 16, 40


def small(dtype=torch.float32, device="cpu", **options) -> HeadBatch:
    return make_head_batch(PAIRS, LENGTH, SIZE, VOCAB, dtype, device, **options)


def arguments(batch: HeadBatch, trains: str, live: bool = False, **options):
    """Positional and keyword arguments of `plan_linear` and of the loss."""
    models = leaves(batch, trains)
    reference = (
        {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}
        if live
        else {"reference_logps": 0.0}
    )
    keywords = {"lm_head_bias": models["bias"], "cu_seqlens": batch.cu_seqlens, **reference, **options}
    return (models["hidden"], models["weight"], batch.labels), keywords


def plan_of(batch: HeadBatch, trains: str, **options) -> LinearPlan:
    args, keywords = arguments(batch, trains, **options)
    return plan_linear(*args, **keywords)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "trains, options, name, products",
    [
        ("", {}, "forward_only", 1),
        ("h", {}, "frozen_head", 2),
        ("w", {}, "pair_chunks", 2),
        ("b", {}, "pair_chunks", 1),
        ("hw", {}, "pair_chunks", 3),
        ("hwb", {}, "pair_chunks", 3),
        ("hwb", {"reduction": "sum"}, "pair_chunks", 3),
        ("hwb", {"reduction": "none"}, "recompute", 4),
        ("h", {"reduction": "none"}, "frozen_head", 2),
        ("hwb", {"loss_type": "aot"}, "recompute", 4),
        ("h", {"loss_type": "aot"}, "frozen_head", 2),
        ("w", {"loss_type": "aot"}, "recompute", 3),
        ("h", {"loss_type": "tdpo1", "live": True}, "pair_chunks", 2),
        ("hwb", {"loss_type": "tdpo1", "live": True}, "pair_chunks", 3),
        ("hwb", {"loss_type": ["sigmoid", "ipo"]}, "pair_chunks", 3),
        ("hwb", {"loss_type": ["sigmoid", "aot"]}, "recompute", 4),
        ("hwb", {"loss_type": lambda scores: scores.margins}, "recompute", 4),
        ("hwb", {"plan": "recompute"}, "recompute", 4),
        ("h", {"plan": "recompute"}, "recompute", 3),
        ("h", {"plan": "pair_chunks"}, "pair_chunks", 2),
        ("", {"plan": "pair_chunks"}, "forward_only", 1),
    ],
)
def test_the_plan_follows_what_trains_and_what_the_loss_needs(trains, options, name, products):
    plan = plan_of(small(), trains, **options)
    assert (plan.name, plan.products) == (name, products)
    assert plan.reference_products == (1 if options.get("live") else 0)
    with torch.no_grad():
        assert plan_of(small(), trains, **options)[:1] == ("forward_only",)


def test_whether_pairs_separate_is_known_of_every_objective():
    coupled = {name for name, objective in objectives.OBJECTIVES.items() if not objective.separable}
    assert coupled == {"aot", "aot_unpaired", "rspo", "sft"}
    for name, objective in objectives.OBJECTIVES.items():
        smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        plan = plan_of(small(), "hwb", loss_type=name, live=True, **smoothing)
        assert plan.name == ("recompute" if name in coupled else "pair_chunks")
        assert plan.reference_products == (2 if name in coupled and objective.needs_kl else 1)


def test_a_pair_that_fits_no_chunk_is_recomputed():
    batch = small()
    batch.labels[:] = 1
    batch.labels[0, 0] = IGNORE  # pairs of 11, 12 and 12 rows
    for rows, name, number in (
        (12, "pair_chunks", 3),
        (11, "recompute", 4),
        (24, "pair_chunks", 2),
        (1, "recompute", 35),
    ):
        plan = plan_of(batch, "hwb", max_chunk_bytes=bytes_for(rows, batch, live_reference=False))
        assert (plan.name, plan.chunks, plan.chunk_rows) == (name, number, rows)
    assert (
        "largest pair has 12 valid rows and a chunk holds 11"
        in plan_of(batch, "hwb", max_chunk_bytes=bytes_for(11, batch, live_reference=False)).reason
    )


@pytest.mark.quick
def test_the_reason_is_told():
    for options, words in (
        ({}, "every pair fits"),
        ({"loss_type": "aot"}, "couples the pairs"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"plan": "recompute"}, "by name"),
    ):
        assert words in plan_of(small(), "hwb", **options).reason
    assert "nothing needs a gradient" in plan_of(small(), "").reason
    text = str(plan_of(small(), "hwb"))
    assert text.startswith("pair_chunks: ") and "3 GEMMs of 2 N V H" in text and "MiB" in text


def test_chunks_are_counted_as_they_run(monkeypatch):
    """Rows of a chunk, number of chunks: what the plan says is what the passes do."""
    seen = []
    real = chunks.Pass.chunks

    def counted(self, selections):
        seen.append([chunks._length(s) for s in selections])
        return real(self, selections)

    monkeypatch.setattr(chunks.Pass, "chunks", counted)
    for batch in (small(), small().pack()):
        for rows in (1, 5, 12, 17, 100):
            for trains, options in (("", {}), ("h", {}), ("hwb", {}), ("hwb", {"loss_type": "aot"})):
                seen.clear()
                args, keywords = arguments(batch, trains, **options)
                budget = bytes_for(rows, batch, trains, live_reference=False)
                out = fused_linear_token_dpo(*args, **keywords, max_chunk_bytes=budget)
                plan = out.plan
                assert sum(seen[0]) == plan.rows == batch.valid
                assert len(seen[0]) == plan.chunks and max(seen[0]) <= plan.chunk_rows <= rows
                if trains:
                    out.loss.backward()
                    assert all(s == seen[0] for s in seen)


# Where bf16 GEMMs run in fp32 on widened inputs, dW is summed in fp32 as well.
gradients_wait = pytest.mark.skipif(
    products.widens_backward(torch.device("cpu"), torch.bfloat16), reason="no GEMM of bf16 matrices on this processor"
)


@pytest.mark.quick
@gradients_wait
@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
def test_few_rows_in_bf16_wait_for_one_gemm_of_dw(monkeypatch, plan):
    """Up to 2 H rows in several chunks; more are summed in fp32, and so are those of a weight that autocast rounds."""
    seen, real = [], products.WeightGrad.add

    def add(self, g, x, *others):
        seen.append(g.shape[0])
        return real(self, g, x, *others)

    monkeypatch.setattr(products.WeightGrad, "add", add)

    def rows_of_dw(batch):
        seen.clear()
        args, keywords = arguments(batch, "hwb", plan=plan)
        out = fused_linear_token_dpo(*args, **keywords, max_chunk_bytes=bytes_for(12, batch, "hwb", None, False))
        out.loss.backward()
        assert out.plan.chunks > 1
        return list(seen)

    few, many = small(torch.bfloat16), make_head_batch(PAIRS, LENGTH, SIZE // 8, VOCAB, torch.bfloat16)
    assert few.valid <= 2 * SIZE and rows_of_dw(few) == [few.valid]
    assert len(rows_of_dw(many)) > 1 and sum(seen) == many.valid
    assert len(rows_of_dw(small())) > 1
    few.weight, few.bias = few.weight.float(), few.bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(rows_of_dw(few)) > 1


def test_chunks_take_their_share_of_the_free_memory(monkeypatch):
    """By default 256 MiB on a CPU, an eighth of what is free if that is less, a quarter for a pair that has to fit."""
    meta = make_head_batch(1, 8, 4, 16, torch.float32)
    big = {
        "hidden": torch.empty(2, 8192, 1024, dtype=torch.bfloat16, device="meta"),
        "weight": torch.empty(128256, 1024, dtype=torch.bfloat16, device="meta"),
    }
    batch = dataclasses.replace(meta, **big, bias=None, labels=torch.empty(2, 8192, dtype=torch.int64, device="meta"))
    per_row = 128256 * 4  # the gradient is written over the logits
    for free, trains, plan, rows in (
        (2**40, "hw", "auto", 2**14),  # room for the pair: all of it
        (2**40, "hw", "recompute", 2**28 // per_row),
        (2**40, "h", "auto", 2**28 // per_row),
        (2**30, "hw", "auto", 2**27 // per_row),  # the pair does not fit into a quarter
        (2**30, "h", "auto", 2**27 // per_row),
        (2**20, "h", "auto", 1),  # never less than a row
    ):
        monkeypatch.setattr("qkernels.head.plan.free_memory", lambda device, free=free: free)
        monkeypatch.setattr("qkernels.head.plan._DEFAULT_BYTES", {"cpu": 2**28, "meta": 2**28})
        plan = plan_of(batch, trains, plan=plan)
        assert plan.chunk_rows == rows, (free, trains)
        assert plan.chunk_bytes == rows * per_row


def test_free_memory_is_a_number_of_bytes():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_free_memory_of_a_gpu_counts_what_its_allocator_keeps(monkeypatch):
    """In a training loop the allocator holds nearly all of the device, most of it free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert free_memory(torch.device("cuda", 0)) == 40


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_plans_of_meta_tensors(dtype):
    """A plan for sizes that do not fit here: all rows count, nothing is allocated."""
    batch = small(dtype)
    real = plan_of(batch, "hwb")
    for name in ("hidden", "weight", "bias", "labels"):
        setattr(batch, name, getattr(batch, name).to("meta"))
    plan = plan_of(batch, "hwb")
    assert plan.name == real.name and plan.products == real.products
    assert plan.rows == 2 * PAIRS * LENGTH


def test_planning_runs_nothing(backend, monkeypatch):
    for name in ("row_stats", "row_grad", "row_grad_", "row_grad_into", "pair_loss"):
        monkeypatch.setattr(backend.module, name, lambda *a: pytest.fail("rows were read"))
    batch = small(device=backend.device)
    with FlopCounterMode(display=False) as flops:
        plan_of(batch, "hwb", backend=backend.name)
        plan_of(batch, "h", backend=backend.name, loss_type="tdpo1", live=True)
    assert flops.get_total_flops() == 0


# --- products ---------------------------------------------------------------------------------------------------------


# The plan knows the dtype by its size, and of the backend whether it has products of its own.
@pytest.mark.nightly_except(share=(0.0, 0.9), dtype=(torch.float32, torch.bfloat16))
@pytest.mark.nightly_cases(backend=("torch",), share=(0.0,))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    "trains, options, products, reference",
    [
        ("", {}, 1, 0),
        ("", {"live": True}, 1, 1),
        ("h", {}, 2, 0),
        ("h", {"live": True}, 2, 1),
        ("w", {}, 2, 0),
        ("hw", {}, 3, 0),
        ("hw", {"live": True}, 3, 1),
        ("hw", {"plan": "recompute"}, 4, 0),
        ("hw", {"loss_type": "aot", "live": True}, 4, 1),
        ("hw", {"loss_type": "tdpo1", "live": True}, 3, 1),
        ("hw", {"loss_type": "tdpo1", "live": True, "plan": "recompute"}, 4, 2),
    ],
)
@pytest.mark.usefixtures("bare_products")
def test_products_are_counted(backend, dtype, trains, options, products, reference, share):
    """Work is proportional to the rows that count, whichever way it is cut; nothing is computed twice in silence."""
    batch = small(dtype, backend.device, bias=False, reference_size=5)
    batch.labels[:] = 1
    batch.labels[:, : int(share * LENGTH)] = IGNORE
    for rows in (None, 12, 5):
        budget = (
            None
            if rows is None
            else bytes_for(
                rows, batch, trains, live_reference="live" in options, divergence=options.get("loss_type") == "tdpo1"
            )
        )
        separable = "plan" not in options and options.get("loss_type") != "aot" and "w" in trains
        if rows is not None and separable and batch.valid > PAIRS * rows:
            continue  # pairs do not fit: another plan
        args, keywords = arguments(batch, trains, **options, max_chunk_bytes=budget, backend=backend.name)
        with FlopCounterMode(display=False) as flops:
            out = fused_linear_token_dpo(*args, **keywords)
            if trains:
                out.loss.backward()
        assert (out.plan.products, out.plan.reference_products) == (products, reference)
        unit = 2 * batch.valid * VOCAB
        assert flops.get_total_flops() == unit * (products * SIZE + reference * 5)


@pytest.mark.parametrize(
    "outputs, trains, products, reference",
    [
        (("logps",), "", 1, 0),
        (("logps",), "h", 2, 0),
        (("logps",), "hw", 4, 0),
        (("logps", "is_top1", "reference_logps"), "h", 2, 1),
        (("entropy",), "h", 3, 0),
        (("logps", "entropy"), "hw", 4, 0),
        (("kl_policy_reference",), "hw", 4, 2),
        (("is_top1", "mean_logits"), "hw", 1, 0),
        (("reference_logps",), "hw", 1, 1),
    ],
)
@pytest.mark.usefixtures("bare_products")
def test_products_of_stats_are_counted(backend, outputs, trains, products, reference):
    batch = small(device=backend.device, bias=False, reference_size=5)
    models = leaves(batch, trains)
    models_of_reference = {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}
    with FlopCounterMode(display=False) as flops:
        stats = linear_token_stats(
            models["hidden"], models["weight"], batch.labels, outputs=outputs, backend=backend.name,
            max_chunk_bytes=bytes_for(7, batch), **(models_of_reference if reference else {}),
        )  # fmt: skip
        total = sum(value.sum() for value in stats if value is not None and value.requires_grad)
        if isinstance(total, torch.Tensor):
            total.backward()
    assert flops.get_total_flops() == 2 * batch.valid * VOCAB * (products * SIZE + reference * 5)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_and_rest(call) -> tuple[int, int]:
    """Bytes that torch's CPU allocator hands out during a call, at most and at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held


def memory_of_step(batch: HeadBatch, trains: str, run=None, **options) -> tuple[int, LinearPlan | None]:
    """Peak of forward and backward beyond inputs and gradients, and the plan."""
    args, keywords = arguments(batch, trains, **options)
    plans = []

    def step():
        out = (run or fused_linear_token_dpo)(*args, **keywords)
        plans.append(out.plan)
        if trains:
            (out.loss / 3).backward()  # as with three micro-batches
        return out

    step()  # whatever is made once
    leaves_ = [t for t in (*args[:2], keywords["lm_head_bias"]) if t is not None and t.requires_grad]
    for leaf in leaves_:
        leaf.grad = None
    peak, _ = peak_and_rest(step)
    return peak - sum(leaf.grad.numel() * leaf.grad.itemsize for leaf in leaves_), plans[-1]


def scratch(batch: HeadBatch, rows: int, dtype: torch.dtype) -> int:
    """Memory that torch's own products of a chunk take besides their results: its library's, of which no plan knows."""
    vocab, size = batch.weight.shape
    block = min(vocab, 4096)
    x, w, g = (torch.ones(shape, dtype=dtype) for shape in ((rows, size), (vocab, size), (rows, vocab)))
    products = [(x, w.t()), (g, w), (g.t(), x), (g[:, :block].t(), x), (g[:, block:].t(), x)]
    return max(
        peak_and_rest(lambda a=a, b=b: torch.mm(a, b))[0] - a.shape[0] * b.shape[1] * dtype.itemsize
        for a, b in products
        if a.numel()
    )


def check_peak(peak: int, plan: LinearPlan, batch: HeadBatch, dtype: torch.dtype) -> None:
    """Never more than the plan says, and not much less: one that overstates would keep people from what fits."""
    allowed = plan.peak_bytes + PER_ROW * batch.labels.numel() + 8 * block_elements(batch.labels.device)
    allowed += scratch(batch, plan.chunk_rows, dtype)
    # What the extension's GEMMs pack is no memory of torch's, so that the profiler does not see it.
    packed = 0
    if logits_product(torch.device("cpu"), dtype).endswith("kernel, fp32 result"):
        how = {"rows": plan.chunk_rows, "sums": True, "trains": True}
        packed = block_bytes(torch.device("cpu"), dtype, *batch.weight.shape, **how)
    assert 0.8 * (plan.peak_bytes - packed) <= peak <= allowed, f"{peak}, allowed {allowed}, {plan}"


# Numbers per row that all plans keep: labels, weights, stats, coefficients, some of them in float64.
PER_ROW = 300
WAYS = {
    "forward_only": ("", {}),
    "frozen_head": ("h", {}),
    "pair_chunks": ("hwb", {}),
    "recompute": ("hwb", {"plan": "recompute"}),
    "frozen_head, softcap": ("h", {"softcap": 5.0}),
    "pair_chunks, softcap": ("hwb", {"softcap": 5.0, "logit_scale": 0.5}),
    "pair_chunks, reference apart": ("hwb", {"live": True}),
    "pair_chunks, reference": ("hwb", {"live": True, "loss_type": "tdpo1"}),
    "recompute, reference": ("hwb", {"live": True, "loss_type": "tdpo1", "plan": "recompute"}),
}


@pytest.mark.nightly_except(dtype=(torch.float32, torch.bfloat16))
@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("way", WAYS)
def test_peak_memory_is_what_the_plan_says(backend, dtype, way):
    trains, options = WAYS[way]
    batch = make_head_batch(4, 32, 32, 5000, dtype)
    batch.labels[:] = 1
    for rows in (64, 1000):
        shape = (options.get("softcap"), "live" in options, "loss_type" in options)
        budget = bytes_for(rows, batch, trains, *shape)
        peak, plan = memory_of_step(batch, trains, **options, max_chunk_bytes=budget)
        assert plan.chunks == (4 if rows == 64 else 1)
        check_peak(peak, plan, batch, dtype)
        assert plan.chunk_bytes == plan.chunk_rows * bytes_for(1, batch, trains, *shape)


@gradients_wait
@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("way", [way for way in WAYS if "frozen" not in way and "only" not in way])
def test_peak_memory_of_few_rows_in_chunks(backend, dtype, way):
    """Their gradients wait in 16 bits, and take less than the fp32 sums of dW would."""
    trains, options = WAYS[way]
    batch = make_head_batch(3, 6, 32, 5000, dtype)
    batch.labels[:] = 1
    shape = (options.get("softcap"), "live" in options, "loss_type" in options)
    peak, plan = memory_of_step(batch, trains, **options, max_chunk_bytes=bytes_for(12, batch, trains, *shape))
    assert plan.chunks == 3
    check_peak(peak, plan, batch, dtype)
    how = {"rows": plan.chunk_rows, "sums": True, "trains": True}
    widened = block_bytes(torch.device("cpu"), dtype, *batch.weight.shape, **how)
    assert plan.peak_bytes < plan.chunk_bytes + batch.weight.numel() * 4 + widened


@gradients_wait
@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
def test_logits_are_gone_before_dw_is_made_where_a_body_follows(monkeypatch, plan):
    """Where they lie behind the gradients that wait, their end is given back; where they have a buffer of their own, as
    on a GPU, nothing holds it when the one GEMM begins. Both ways make the same bits."""
    batch = small(torch.bfloat16)
    rows, vocab = int((batch.labels != -100).sum()), batch.weight.shape[0]
    stored, happened, found = [], [], []
    reserve, add = chunks.Pass._reserve, products.WeightGrad.add

    def reserving(self, name, *others):
        buffer = reserve(self, name, *others)
        if name == "logits":
            stored.append(StorageWeakRef(buffer.untyped_storage()))
        return buffer

    def giving_back(buffer, kept):
        assert kept == rows * vocab * 2 < buffer.numel()
        happened.append("given back")

    def adding(self, g, *others):
        assert g.shape == (rows, vocab)
        happened.append("dW" if behind else "dW, logits gone" if stored[-1].expired() else "dW, logits kept")
        return add(self, g, *others)

    monkeypatch.setattr(chunks.Pass, "_reserve", reserving)
    monkeypatch.setattr(products.WeightGrad, "add", adding)
    monkeypatch.setattr(waiting, "give_back_end", giving_back)
    for behind, body, expected in (
        (True, False, ["dW"]), (True, True, ["given back", "dW"]),
        (False, False, ["dW, logits kept"]), (False, True, ["dW, logits gone"]),
    ):  # fmt: skip
        monkeypatch.setattr(chunks, "logits_lie_behind", lambda device, behind=behind: behind)
        args, keywords = arguments(batch, "hwb", plan=plan)
        keywords["max_chunk_bytes"] = bytes_for(12, batch, "hwb", None, False)
        happened.clear()
        fused_linear_token_dpo(1.0 * args[0] if body else args[0], *args[1:], **keywords).loss.backward()
        assert happened == expected
        found.append([x.grad for x in args if isinstance(x, torch.Tensor) and x.requires_grad])
    for other in found[1:]:
        assert len(other) >= 2 and all(map(torch.equal, found[0], other))


@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("chunk_rows", [40, 1000])
def test_no_call_writes_over_logits_that_it_reads(backend, dtype, chunk_rows, monkeypatch):
    """The gradient takes the place of the logits, in several calls: threads of one call come in any order."""
    seen, real = [], backend.module.row_grad_into

    def checked(out, call):
        logits = call.logits
        begin, end = out.data_ptr(), out.data_ptr() + out.numel() * out.element_size()
        first, last = logits.data_ptr(), logits.data_ptr() + logits.numel() * logits.element_size()
        assert end <= first or last <= begin, (out.shape, begin, end, first, last)
        seen.append(out.shape[1])
        return real(out, call)

    monkeypatch.setattr(backend.module, "row_grad_into", checked)
    batch = make_head_batch(2, 60, 64, 99, dtype)
    batch.labels[:] = 1
    for plan in ("pair_chunks", "recompute"):
        seen.clear()
        args, keywords = arguments(batch, "hwb", plan=plan)
        rows = max(chunk_rows, 2 * 60) if plan == "pair_chunks" else chunk_rows  # a pair has 120
        keywords["max_chunk_bytes"] = bytes_for(rows, batch, "hwb", None, False)
        fused_linear_token_dpo(*args, **keywords).loss.backward()
        assert sum(seen) == batch.labels.numel()


@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(*PLAIN)
def test_peak_memory_under_autocast(backend, dtype):
    """The head is cast once; the fp32 weight's gradient is summed where it ends up."""
    batch = make_head_batch(4, 32, 32, 5000, dtype)
    batch.weight, batch.bias = batch.weight.float(), None
    batch.labels[:] = 1
    with torch.autocast("cpu", torch.bfloat16):
        for trains, options in (("h", {}), ("hw", {}), ("hw", {"plan": "recompute"})):
            for rows in (64, 1000):
                budget = bytes_for(rows, batch, trains, live_reference=False)
                peak, plan = memory_of_step(batch, trains, **options, max_chunk_bytes=budget)
                check_peak(peak, plan, batch, torch.bfloat16)


@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("way", ["forward_only", "frozen_head", "pair_chunks", "recompute"])
@pytest.mark.parametrize("grows", ["B", "T", "one long pair"])
def test_peak_memory_is_flat(backend, dtype, way, grows):
    """With a budget, more pairs, longer ones, or one very long pair add some numbers per row and no logits."""
    trains, options = WAYS[way]
    vocab, size = 3000, 16
    shapes = {"B": [(4, 16), (32, 16)], "T": [(2, 32), (2, 256)], "one long pair": [(1, 64), (1, 512)]}[grows]
    peaks = []
    for pairs, length in shapes:
        batch = make_head_batch(pairs, length, size, vocab, dtype)
        batch.labels[:] = 1
        # A pair of the shortest batch fits; longer ones are recomputed, which is pair_chunks' way out.
        budget = bytes_for(64, batch, trains, live_reference=False)
        wanted = options if way != "pair_chunks" or grows == "B" else {}
        peak, plan = memory_of_step(batch, trains, **wanted, max_chunk_bytes=budget)
        assert plan.chunk_rows == 64
        peaks.append(peak)
    more_rows = 2 * (shapes[1][0] * shapes[1][1] - shapes[0][0] * shapes[0][1])
    kept = size * dtype.itemsize if way == "frozen_head" else 0
    sums = vocab * size * 4  # fp32 sums of dW begin with the second chunk
    assert peaks[1] - peaks[0] <= more_rows * (PER_ROW + kept) + (sums if "w" in trains else 0)
    assert peaks[1] - peaks[0] < more_rows * vocab  # a quarter of fp32 logits would be more


@pytest.mark.only_backends("cpu")
def test_memory_of_stored_logits_would_be_seen(backend):
    """The measure itself: the plain way holds logits, their log-softmax and a gradient."""
    batch = make_head_batch(4, 32, 16, 3000, torch.float32)
    batch.labels[:] = 1

    class Out:
        plan = None

    def plain(hidden, weight, labels, lm_head_bias, **_):
        out = Out()
        logps = torch.nn.functional.linear(hidden, weight, lm_head_bias).log_softmax(-1)
        out.loss = logps.gather(-1, labels.unsqueeze(-1)).sum()
        return out

    peak, _ = memory_of_step(batch, "hwb", plain)
    assert peak >= 2 * batch.labels.numel() * 3000 * 4


@pytest.mark.only_backends("cpu")
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_is_left_behind(backend, plan):
    """After the step only results and gradients are held, after their end nothing."""
    batch = make_head_batch(2, 32, 16, 3000, torch.float32)
    args, keywords = arguments(batch, "h" if plan == "frozen_head" else "hwb", plan=plan)

    def step():
        out = fused_linear_token_dpo(*args, **keywords)
        out.loss.backward()
        for leaf in (*args[:2], keywords["lm_head_bias"]):
            leaf.grad = None

    step()
    assert peak_and_rest(step)[1] == 0


def test_ignored_rows_take_no_memory():
    batch = make_head_batch(4, 64, 16, 3000, torch.float32)
    batch.labels[:] = 1
    everything, _ = memory_of_step(batch, "hwb")
    batch.labels[:, :58] = IGNORE
    few, plan = memory_of_step(batch, "hwb")
    assert plan.rows == 48 and few < 0.2 * everything
