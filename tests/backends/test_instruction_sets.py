"""The CPU kernels are compiled once per instruction set; a machine picks the best, the tests go through all it has."""

from __future__ import annotations

import pytest
import torch

import oracle
from cases import Rows, make_rows
from comparisons import check_gradient, check_logps, check_outputs, random_upstream, row_gradient
from runnable import CPU

_C = pytest.importorskip("qkernels._C", reason="the compiled extension is missing")


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    """Run with this instruction set, then with the one that was in use."""
    before = _C.instruction_set()
    assert _C.use_instruction_set(request.param)
    assert _C.instruction_set() == request.param
    yield request.param
    _C.use_instruction_set(before)


def test_the_best_set_is_in_use_and_unknown_ones_are_refused():
    assert _C.instruction_set() == _C.instruction_sets()[-1]
    before = _C.instruction_set()
    assert not _C.use_instruction_set("abacus")
    assert _C.instruction_set() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 1003, 2048, 4099])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_match_the_truth(instruction_set, dtype, vocab, temperature):
    rows = make_rows((2, 3), vocab, dtype, temperature=temperature)
    check_outputs(CPU, rows)
    check_outputs(CPU, rows, ("entropy", "is_top1", "mean_logits"))
    check_logps(CPU, rows)
    for outputs in (("logps",), oracle.WITH_GRADIENT):
        upstream = random_upstream(rows, outputs)
        grad = check_gradient(CPU, rows, upstream)
        clone = Rows(rows.logits.clone(), rows.labels, rows.reference, temperature)
        assert torch.equal(row_gradient(CPU, clone, upstream, inplace_backward=True), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_sixteen_bit_pattern_is_read_and_written_right(instruction_set, dtype):
    """All finite 16-bit numbers as logits: conversions in both directions, subnormals included."""
    narrow = torch.float16 if dtype == torch.float32 else dtype
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(narrow)
    finite = patterns[patterns.isfinite() & (patterns.float().abs() < 100)]
    finite = finite[torch.randperm(finite.numel())].to(dtype)[None]
    rows = Rows(finite, torch.tensor([finite.shape[1] // 2]), finite.flip(1).contiguous())
    check_outputs(CPU, rows)
    check_gradient(CPU, rows, {"logps": torch.tensor([3.0])})
    check_gradient(CPU, rows, random_upstream(rows, oracle.WITH_GRADIENT))
