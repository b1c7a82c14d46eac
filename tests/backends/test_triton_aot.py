"""The machine code of the Triton kernels, compiled ahead of time without a GPU: what a slow kernel would show first.

Spills, stack, narrow loads (known bug 30) and recompilation (known bug 22) are visible here before anything is timed.
"""

from __future__ import annotations

import re

import pytest
import torch

kernel_report = pytest.importorskip("bench.kernel_report", reason="bench/ lies in the source tree only")

REASON = kernel_report.unavailable("Triton")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no kernels can be compiled here: {REASON}")

VARIANTS = {variant.name: variant for variant in kernel_report.VARIANTS}
TRAINING = (
    "log-probs",
    "log-probs of both models",
    "with KLs",
    "gradient of log-probs",
    "gradient with KLs",
    "pair loss",
)
KNOWN = [sm for sm in ("sm_80", "sm_100", *kernel_report.NEWER, kernel_report.NEWER_AMD) if REASON is None and
         kernel_report.unknown("Triton", sm) is None]  # fmt: skip
OTHERS = [sm for sm in KNOWN if sm.startswith("sm_")]
# Every variant for the architecture that matters most, the ones of a training step for the others: these at night, but
# for one each.
CASES = [(name, "sm_90") for name in VARIANTS] + [
    pytest.param(name, sm, marks=[pytest.mark.nightly] if name != "log-probs" else [])
    for sm in OTHERS
    for name in TRAINING
]
UNALIGNED = "aligned otherwise"


def _values(case):
    return getattr(case, "values", case)


@pytest.mark.parametrize("name, architecture", CASES)
def test_no_spills_and_registers_within_the_planned_occupancy(name, architecture):
    """`kernel_report.PLAN` says what occupancy a number of registers leaves and why it is enough."""
    variant = VARIANTS[name]
    facts = kernel_report.facts(variant, architecture)
    assert facts.spills == 0 and facts.stack == 0
    planned = kernel_report.planned_registers(variant, architecture)
    assert facts.registers <= planned
    if variant.kernel in ("row_stats", "row_grad"):
        programs = kernel_report.PLAN[planned]
        assert programs * 128 * planned <= 65536 and programs * facts.shared <= 100 << 10
        # What is bound by its instructions or by narrow loads does not need all of the memory's speed.
        needed = 13 if architecture == "sm_80" or ("KLs" in name and UNALIGNED in name) else 26
        needed = 22 if name.startswith("all fields") and variant.reference else needed
        assert programs * 128 * 32 >= needed << 10, "the loads under way no longer cover the memory's latency"


@pytest.mark.parametrize(
    "name, architecture", [case for case in CASES if not {"pair loss", "combine split rows"} & set(_values(case))]
)
def test_main_loops_load_and_store_16_bytes(name, architecture):
    """known bug 30. No launch passes a hint about V, strides or addresses, so this holds for V = 128257 too (below)."""
    variant = VARIANTS[name]
    loop = kernel_report.facts(variant, architecture).loop
    assert loop.instructions and loop.exponentials
    if variant.kernel == "row_grad":
        assert set(loop.stores) == {16}
    if UNALIGNED not in name:
        assert set(loop.loads) == {16}
        assert loop.loads[16] >= 4, "too few loads under way"
    else:
        assert variant.kernel == "row_grad" or loop.loads[16] == 2  # the policy's stay wide


def test_instructions_per_element_leave_room_for_the_memory():
    """At 4.3 TB/s an H200's processor meets 9.3 bf16 elements per clock and issues 128 lane-instructions: 13.7 each."""
    for name in ("log-probs", "with entropy", "all fields without reference", "log-probs of both models"):
        assert kernel_report.facts(VARIANTS[name], "sm_90").loop.per_element < 13.7
    # Two bytes more per element for each further stream.
    assert kernel_report.facts(VARIANTS["with KLs"], "sm_90").loop.per_element < 2 * 13.7
    assert kernel_report.facts(VARIANTS["gradient of log-probs"], "sm_90").loop.per_element < 2 * 13.7
    assert kernel_report.facts(VARIANTS["gradient with KLs"], "sm_90").loop.per_element < 3 * 13.7
    # One exponential per element and one per tile of a lane.
    loop = kernel_report.facts(VARIANTS["log-probs"], "sm_90").loop
    assert loop.exponentials == loop.elements * 9 / 8


def test_estimates_are_within_the_aims():
    """Not a measurement: from the machine code nothing stands in the way."""
    for work, aim, names, rows, vocab in kernel_report.AIMS:
        if aim.endswith(" ms"):
            assert kernel_report.estimated("Triton", names, rows, vocab)[0] <= float(aim.removesuffix(" ms")), work


@pytest.mark.nightly_except(architecture=("sm_90",))
@pytest.mark.parametrize("architecture", ["sm_90", *OTHERS])
@pytest.mark.parametrize("reference", [0, 1, 2])
@pytest.mark.parametrize("packed, weighted", [(False, True), (True, False)])
def test_every_form_of_the_pair_loss_compiles(packed, weighted, reference, architecture):
    flags = (("PACKED", packed), ("WEIGHTED", weighted), ("REFERENCE", reference))
    facts = kernel_report.facts(kernel_report.Variant("", "pair_loss", "fp32", flags=flags), architecture)
    assert facts.spills == 0 and facts.stack == 0


def test_the_loop_reader_sees_narrow_loads():
    """The check above can fail: with the alignment unknown, the same reader finds 2-byte loads."""
    loop = kernel_report.facts(VARIANTS["gradient of log-probs, input " + UNALIGNED], "sm_90").loop
    assert loop.loads.get(2, 0) == 32 and 16 not in loop.loads


@pytest.mark.nightly_except(name=("log-probs", "gradient of log-probs"))
@pytest.mark.parametrize("name", ["log-probs", "with KLs", "gradient of log-probs", "gradient with KLs"])
@pytest.mark.parametrize("architecture", [sm for sm in (kernel_report.AMD, *KNOWN) if sm.startswith("gfx")])
def test_amd_compiles(name, architecture):
    facts = kernel_report.facts(VARIANTS[name], architecture)
    assert facts.spills == 0 and facts.registers <= 128
    assert set(facts.loop.loads) == {16}


# --- reductions -------------------------------------------------------------------------------------------------------

# What makes one value of the two halves that a 64-bit shuffle consists of, and changes none.
_MOVES = ("mov.", "cvt.u64.u32", "cvt.u32.u64", "shl.b64", "or.b64")


def reduction_steps(ptx: str) -> list[str]:
    """The instructions that combine what came from another lane of the warp with a lane's own value."""
    shuffled, steps = set(), []
    for line in ptx.splitlines():
        statement = line.split("//")[0].strip()
        registers = re.findall(r"%\w+", statement)
        if statement.startswith("shfl.sync"):
            shuffled.add(registers[0])
        elif shuffled.intersection(registers[1:]):
            if statement.startswith(_MOVES):
                shuffled.add(registers[0])
            else:
                steps.append(statement)
    return steps


@pytest.mark.nightly_except(architecture=("sm_90",))  # PTX is nearly the same for all
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_all_lanes_of_a_reduction_hold_the_same_bits(name, architecture):
    """Every lane stores the result to one shared word, and PTX does not say whose value stays.

    x_i + x_j has the same bits in lanes i and j, and so has their maximum. A product that is contracted with the
    addition, a_i s_i + round(a_j s_j), has not.
    """
    steps = reduction_steps(kernel_report.compiled(VARIANTS[name], architecture).asm["ptx"])
    assert VARIANTS[name].kernel == "row_grad" or len(steps) >= 14, "no reduction was found"
    assert [step for step in steps if not step.startswith(("add.", "max."))] == []


# --- compile keys -----------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel; keeps what it is launched with."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((args, options))


def keys_of(kernel, calls):
    """What triton compiles anew for: types and specialisation of the arguments, and the options."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = kernel_report._target("sm_90")
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    found = set()
    for args, options in calls:
        _, specialization, rest = bind(*args, **options)
        found.add(repr((specialization, sorted(rest.items()))))
    return found


def recorded(monkeypatch, module, name):
    kernel, recorder = getattr(module, name), Recorder()
    monkeypatch.setattr(module, name, recorder)
    return kernel, recorder


def logits_of(sequences, rows, vocab, *, stride=None, offset=0):
    """Logits that are never read: a long stride takes no memory."""
    memory = torch.empty(1, dtype=torch.bfloat16)
    stride = stride or vocab
    view = memory.as_strided((1, 1, 1), (1, 1, 1))
    view = torch.as_strided(view, (1, 1, 1), (1, 1, 1)).expand(sequences, rows, vocab)
    return Described(view, (rows * stride, stride, 1), offset)


class Described:
    """What the launch code reads of a tensor, without its memory."""

    def __init__(self, tensor, strides, offset):
        self.shape, self.dtype, self.device, self._strides = tensor.shape, tensor.dtype, tensor.device, strides
        self._address = (1 << 40) + 2 * offset

    def stride(self, dim=None):
        return tuple(self._strides) if dim is None else self._strides[dim]

    def element_size(self):
        return 2

    def data_ptr(self):
        return self._address

    def new_empty(self, shape, dtype):
        return torch.empty(shape, dtype=dtype)


SHAPES = [
    {"sequences": 1, "rows": 1, "vocab": 1},
    {"sequences": 2, "rows": 16, "vocab": 16},
    {"sequences": 3, "rows": 5, "vocab": 128257},
    {"sequences": 2, "rows": 1, "vocab": 128256, "offset": 3},
    {"sequences": 2, "rows": 7, "vocab": 1000, "stride": 2**31 + 5},
]


def test_one_compilation_serves_all_shapes(monkeypatch):
    """known bug 22: no length, stride, address or size is part of the key; whether rows are split is."""
    from qkernels.backends import triton as triton_backend
    from qkernels.backends.triton import common, row_grad_kernel, row_stats_kernel
    from qkernels.core.fields import SOFTMAX

    monkeypatch.setattr(common, "splits_for", lambda *_: 1)
    stats, stats_calls = recorded(monkeypatch, row_stats_kernel, "row_stats_kernel")
    grad, grad_calls = recorded(monkeypatch, row_grad_kernel, "row_grad_kernel")
    for i, shape in enumerate(SHAPES):
        logits = logits_of(**shape)
        labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
        softmax = torch.zeros(3, *labels.shape)
        for temperature in (1.0, 0.7):
            triton_backend.row_stats(logits, labels, None, SOFTMAX, temperature, -100 - i * 2**33)
            triton_backend.row_grad_into(logits, logits, labels, None, softmax, None, softmax[:1], None, temperature, 0)
    assert len(stats_calls.calls) == len(grad_calls.calls) == 2 * len(SHAPES)
    assert len(keys_of(stats, stats_calls.calls)) == 1
    assert len(keys_of(grad, grad_calls.calls)) == 1
    # Other fields of the same sums are a run-time value as well; other sums are another kernel.
    logits = logits_of(1, 1, 16)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    for fields in (1, 2, 4, 64, 64 | SOFTMAX):
        triton_backend.row_stats(logits, labels, None, fields, 1.0, -100)
    assert len(keys_of(stats, stats_calls.calls)) == 1
    triton_backend.row_stats(logits, labels, None, SOFTMAX | 1 << 8, 1.0, -100)
    assert len(keys_of(stats, stats_calls.calls)) == 2


def test_one_compilation_of_the_pair_loss_serves_all_lengths(monkeypatch):
    from qkernels.backends import triton as triton_backend
    from qkernels.backends.triton import pair_loss_kernel

    kernel, recorder = recorded(monkeypatch, pair_loss_kernel, "pair_loss_kernel")
    for sequences, length in ((2, 1), (2, 16), (6, 17), (64, 1000)):
        logps = torch.zeros(sequences, length)
        for beta, smoothing in ((0.1, 0.0), (1.0, 0.25)):
            labels = torch.zeros(logps.shape, dtype=torch.int64)
            triton_backend.pair_loss(logps, logps, labels, None, None, beta, smoothing, -sequences)
    assert len(keys_of(kernel, recorder.calls)) == 1


def test_what_is_compiled_here_is_what_is_launched(monkeypatch):
    """The report's signatures and compile-time values are those of a launch."""
    from qkernels.backends import triton as triton_backend
    from qkernels.backends.triton import common, row_stats_kernel
    from qkernels.core.fields import SOFTMAX

    monkeypatch.setattr(common, "splits_for", lambda *_: 1)
    reported = kernel_report.source_of(VARIANTS["log-probs"], "sm_90")
    kernel, recorder = recorded(monkeypatch, row_stats_kernel, "row_stats_kernel")
    logits = logits_of(2, 3, 128257)
    triton_backend.row_stats(logits, torch.zeros(2, 3, dtype=torch.int64), None, SOFTMAX, 1.0, -100)
    _, options = recorder.calls[0]
    assert reported[0] is kernel
    assert {**reported[2], **reported[3]} == options
