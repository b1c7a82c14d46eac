"""The machine code of the CUDA kernels, compiled without a GPU: spills, stack, registers, narrow loads (known bug 30).

What the kernels compute is tested in `csrc/tests/test_cuda.cpp` (by `test_sanitizers.py`) and `test_cuda_emulation.py`,
and on a GPU by every test that takes a backend.
"""

from __future__ import annotations

import pytest

kernel_report = pytest.importorskip("bench.kernel_report", reason="bench/ lies in the source tree only")

REASON = kernel_report.unavailable("CUDA")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no CUDA kernels can be compiled and read here: {REASON}")

VARIANTS = {variant.name: variant for variant in kernel_report.CUDA_VARIANTS}
TARGETS = [sm for sm in (*kernel_report.ARCHITECTURES, *kernel_report.NEWER) if REASON is None and
           kernel_report.unknown("CUDA", sm) is None]  # fmt: skip
CASES = [(name, architecture) for architecture in TARGETS for name in VARIANTS]
STREAMS = [(name, sm) for name, sm in CASES if VARIANTS[name].kernel in ("row_stats", "row_grad")]
IN_STEP = [name for name in VARIANTS if "any types" not in name]


# nvcc takes half a minute for each target.
@pytest.mark.nightly_except(architecture=("sm_90",))
@pytest.mark.parametrize("name, architecture", CASES)
def test_no_spills_and_registers_within_the_planned_occupancy(name, architecture):
    """`__launch_bounds__` in the kernels and `kernel_report.CUDA_PLAN` state the same plan."""
    variant = VARIANTS[name]
    facts = kernel_report.facts(variant, architecture)
    assert facts.spills == 0 and facts.stack == 0
    assert facts.registers <= variant.registers
    if (name, architecture) in STREAMS:
        blocks = kernel_report.CUDA_PLAN[variant.registers]
        assert blocks * kernel_report.CUDA_THREADS * variant.registers <= 65536
        assert blocks * facts.shared <= 100 << 10
        # Four 16-byte loads of each stream are under way per thread, half of that on average.
        streams = 2 if "KLs" in name or name == "all fields" else 1
        if "any types" not in name:
            assert blocks * kernel_report.CUDA_THREADS * 32 * streams >= 26 << 10, "too few bytes under way"


@pytest.mark.nightly_except(architecture=("sm_90",))
@pytest.mark.parametrize("name, architecture", STREAMS)
def test_main_loops_load_and_store_16_bytes(name, architecture):
    """Nothing is known of V, strides or addresses when these are compiled, so this holds for V = 128257 too."""
    variant = VARIANTS[name]
    loop = kernel_report.facts(variant, architecture).loop
    assert loop.instructions and loop.exponentials
    assert set(loop.loads) == {16} and loop.loads[16] >= 4
    assert set(loop.stores) == ({16} if variant.kernel == "row_grad" else set())


@pytest.mark.parametrize("name", [name for name, sm in STREAMS if sm == "sm_90" and name in IN_STEP])
def test_instructions_per_element_leave_room_for_the_memory(name):
    """At 4.3 TB/s an H200's processor meets 18 bytes per clock and issues 128 lane-instructions: 6.9 per byte."""
    variant = VARIANTS[name]
    loop = kernel_report.facts(variant, "sm_90").loop
    assert loop.per_element < 6.9 * variant.bytes_per_logit
    # One exponential per element of each model, and in the sums one per trip.
    models = 2 if variant.reference else 1
    per_trip = models if variant.kernel == "row_stats" else 0
    assert loop.exponentials == models * loop.elements + per_trip


def test_estimates_are_within_the_aims():
    """Not a measurement: from the machine code nothing stands in the way."""
    for work, aim, names, rows, vocab in kernel_report.AIMS:
        if aim.endswith(" ms"):
            assert kernel_report.estimated("CUDA", names, rows, vocab)[0] <= float(aim.removesuffix(" ms")), work


def test_a_target_that_nvcc_does_not_know_is_told():
    assert kernel_report.unknown("CUDA", "sm_90") is None
    assert "compiles for" in kernel_report.unknown("CUDA", "sm_77")


def test_the_build_compiles_for_what_is_tested():
    """The module at hand holds machine code for the architectures it says."""
    from qkernels.backends import cuda

    about = cuda.describe()
    if not about["built"]:
        pytest.skip(about["reason"])
    assert about["compiled_for"] and about["version"]
