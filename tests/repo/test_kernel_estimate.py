"""`bench.kernel_estimate`: the model by hand, its limits, and the counts that it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

model = pytest.importorskip("bench.kernel_estimate", reason="bench/ lies in the source tree only")
kernel_report = pytest.importorskip("bench.kernel_report")

# 4 blocks per SM of 256 threads with four 16-byte loads each: 8192 entries of bf16 per iteration of a block.
KERNEL = model.Kernel(256, 64, 2080, 64, 6.4, ptx_per_entry=0.4, ptx_per_row=7000, ptx_longest=900, ptx_combine=300)
# Twice for the memory, once for the caches, and the instructions besides, half as many in machine code as in PTX.
OUTSIDE = 2 * 0.8e-6 + 0.3e-6 + 0.5 * 900 * 4 / 1.8e9
ITERATION = 32 * 6.4 * 2 / 1.8e9  # the instructions of one, one after the other


def test_many_rows_take_what_moving_their_bytes_takes():
    found = model.estimate(KERNEL, model.Work(132 * 64, 128000, 2, 2))
    assert found.floor == pytest.approx(132 * 64 * 256000 / 4.3e12, rel=1e-12)
    assert found.seconds == pytest.approx(found.floor + OUTSIDE, rel=1e-12)
    assert found.bound == "memory" and found.at_the_floor


def test_rows_of_one_sm_more_than_others_count():
    even, odd = (model.estimate(KERNEL, model.Work(rows, 128000, 2, 2)) for rows in (1320, 1321))
    assert odd.seconds - even.seconds == pytest.approx(4 * 64000 * 132 / 4.3e12, rel=1e-9)


def test_a_few_rows_wait_for_the_memory():
    """One block per SM: 15 iterations and a part of one, of which all but the first wait once more."""
    found = model.estimate(KERNEL, model.Work(132, 128000, 2, 2))
    assert found.seconds == pytest.approx(OUTSIDE + 15 * ITERATION + 15 * 0.8e-6, rel=1e-12)
    assert found.bound == "latency" and found.ratio > 2


def test_blocks_that_find_no_room_wait_for_the_others():
    """An SM has room for 4. One load per thread and iteration: the memory is idle most of the time."""
    narrow = replace(KERNEL, loads=16)
    four, five = (model.estimate(narrow, model.Work(rows, 131072, 2, 2)).seconds for rows in (4 * 132, 5 * 132))
    assert four == pytest.approx(OUTSIDE + 16 * ITERATION + 63 * 0.8e-6, rel=1e-12)
    assert five == pytest.approx(2 * four, rel=1e-12)


def test_a_part_of_an_iteration_waits_as_long_as_a_whole_one():
    """What `qkernels.backends.pieces` avoids."""
    work = model.Work(16, 131072, 2, 2, splits=2, combined=False)
    whole, more = (model.estimate(KERNEL, replace(work, span=span)).seconds for span in (65536, 65544))
    assert more - whole == pytest.approx(0.8e-6, rel=1e-9)


def test_only_what_finishes_a_rows_sums_waits_for_the_labels_logit():
    """Not the first kernel of split rows, and not a gradient's."""
    work = model.Work(132, 128000, 2, 2)
    sums, gradient = (model.estimate(KERNEL, replace(work, combined=c)).seconds for c in (True, False))
    assert sums - gradient == pytest.approx(0.3e-6, rel=1e-9)


def test_split_rows_wait_for_the_kernel_that_combines_them():
    one = model.Work(16, 128000, 2, 2, splits=33)
    combined, alone = (model.estimate(KERNEL, replace(one, combined=c)).seconds for c in (True, False))
    assert combined - alone == pytest.approx(1e-6 + 2 * 0.3e-6 + 0.5 * 300 * 4 / 1.8e9, rel=1e-9)


def test_many_instructions_bound_what_the_memory_does_not():
    slow = replace(KERNEL, per_entry=64.0, ptx_per_entry=4.0)
    found = model.estimate(slow, model.Work(132 * 64, 128000, 2, 2))
    slots = 64 * (128000 * 2 + 0.5 * 7000)
    assert found.seconds == pytest.approx(slots / (4 * 1.8e9) + OUTSIDE, rel=1e-12)
    assert found.bound == "issue"


def test_two_models_are_two_blocks():
    both, one = (model.estimate(KERNEL, model.Work(1320, 128000, 2, 2, models=m)) for m in (2, 1))
    assert both.floor == 2 * one.floor and both.seconds > 1.9 * one.seconds


@pytest.mark.parametrize(
    "plan, threads", [(kernel_report.CUDA_PLAN, kernel_report.CUDA_THREADS), (kernel_report.PLAN, 128)]
)
def test_occupancy_is_that_of_the_plans(plan, threads):
    for registers, blocks in plan.items():
        kernel = replace(KERNEL, threads=threads, registers=registers, shared=0)
        assert kernel.blocks == blocks
        assert kernel.in_flight == kernel.blocks * threads * 32
    assert replace(KERNEL, threads=1024, registers=32).blocks == 2, "2048 threads per SM"
    assert replace(KERNEL, threads=32, registers=16).blocks == 32
    assert replace(KERNEL, shared=100 << 10).blocks == 2


def test_every_count_is_of_a_kernel_of_the_report():
    """As many machine instructions as PTX, more or less: a kernel that changed is to be counted again."""
    for compiler, counted in model.counts().items():
        named = kernel_report._named(compiler)
        assert counted.keys() & named.keys() and "log-probs, split rows" in counted
        for name, counts in counted.items():
            assert 0.15 < counts["slots_per_entry"] < 3, name
            assert 0 < counts["longest_warp_per_row"] < counts["slots_per_row"], name
