"""The CPU kernels are compiled once per instruction set; a machine picks the best, the tests go through all it has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

import oracle
import qkernels
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


@pytest.mark.skipif("QKERNELS_TEST_INSTRUCTION_SET" in os.environ, reason="another instruction set was asked for")
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


# --- permission for AMX -----------------------------------------------------------------------------------------------


def test_info_says_whether_amx_can_be_used():
    reason = _C.amx_unavailable()
    assert qkernels.info()["native_extension"]["amx"] == (reason or "available")
    assert ("amx_bf16" in _C.instruction_sets()) == (reason == "")
    assert reason == "" or any(word in reason for word in ("processor", "system", "build", "x86-64")), reason


# A seccomp filter, as containers have them: arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails with EPERM.
_REFUSE = """
import ctypes, struct
code = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (0x06, 0, 0, 0x00050001),
        (0x06, 0, 0, 0x7fff0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program):
    print("no seccomp")
    raise SystemExit
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="AMX needs x86-64 and Linux"
)
def test_a_system_that_refuses_amx():
    """The next kernel in line takes over, with results within the same bounds, and `info()` says why."""
    script = (
        _REFUSE
        + """
import torch, qkernels
facts = qkernels.info()
print(facts["native_extension"]["instruction_set"])
print(facts["native_extension"]["amx"])
print(facts["hidden_states"]["cpu bf16 logits"])
print(facts["hidden_states"]["cpu bf16 because"])
torch.manual_seed(0)
h, w, y = torch.randn(2, 9, 70).bfloat16(), torch.randn(50, 70).bfloat16(), torch.randint(50, (2, 9))
logps = qkernels.linear_token_logps(h, w, y)
exact = (h.double() @ w.double().T).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
print(float((logps - exact).abs().max()))
"""
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    if run.stdout.startswith("no seccomp"):
        pytest.skip("this system has no seccomp filters")
    name, amx, kernel, why, error = run.stdout.splitlines()
    assert name == [other for other in _C.instruction_sets() if other != "amx_bf16"][-1]
    assert "AMX" not in kernel
    if not _C.amx_unavailable() and "amx_instructions" not in sys.modules:  # which the new process does not have
        assert amx == "the operating system refuses it (arch_prctl: Operation not permitted)"
        assert amx in why
    assert float(error) < 5e-5  # logits of 30: eps32 of a few hundred
