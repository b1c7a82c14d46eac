"""Scratch buffers that stay from call to call: contents of earlier calls are never seen, and no two calls share one."""

from __future__ import annotations

import mmap
import sys
import threading

import pytest
import torch

import qkernels
from qkernels.core import memory

CPU = torch.device("cpu")
ELEMENTS = memory._LARGE // 4


def call(hidden, weight, labels):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = qkernels.fused_linear_token_dpo(hidden, weight, labels, reference_logps=0.0)
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad


def batch(rows: int):
    vocab = ELEMENTS // 256
    labels = torch.randint(vocab, (2, rows))
    return torch.randn(2, rows, 4), torch.randn(vocab, 4), labels


def test_a_buffer_is_used_again_and_shared_by_nobody():
    memory._scratch.clear()
    first = memory.take_scratch((4, ELEMENTS), torch.float32, CPU)
    address = first.data_ptr()
    memory.give_back_scratch([first])
    again = memory.take_scratch((2, ELEMENTS), torch.bfloat16, CPU)
    assert again.data_ptr() == address and again.shape == (2, ELEMENTS) and again.dtype == torch.bfloat16
    other = memory.take_scratch((4, ELEMENTS), torch.float32, CPU)
    assert other.data_ptr() != address
    memory.give_back_scratch([again])
    assert memory.take_scratch((4, ELEMENTS), torch.float32, CPU).data_ptr() == address


def test_the_gradient_of_a_tied_weight_is_added_to_where_it_is(monkeypatch):
    """Autograd adds the embedding's gradient to the head's in its own memory: two tensors of the weight's size, not
    three."""
    made, real, seen = [], memory.fresh_zeros, []

    def fresh_zeros(shape, *others):
        made.append((tuple(shape), real(shape, *others)))
        return made[-1][1]

    monkeypatch.setattr(memory, "fresh_zeros", fresh_zeros)
    weight = torch.randn(ELEMENTS // 256, 256, requires_grad=True)
    ids = torch.arange(8).view(2, 4)
    weight.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    out = qkernels.fused_linear_token_dpo(torch.nn.functional.embedding(ids, weight), weight, ids, reference_logps=0.0)
    of_the_head = [zeros.data_ptr() for shape, zeros in made if shape == weight.shape]
    made.clear()
    out.loss.backward()
    assert len(of_the_head) == 1 and seen == of_the_head


def test_small_and_very_large_buffers_are_not_kept():
    memory._scratch.clear()
    memory.give_back_scratch([memory.take_scratch((10,), torch.float32, CPU)])
    memory.give_back_scratch([memory.take_scratch((memory._SCRATCH_BYTES + 1,), torch.uint8, CPU)])
    assert not memory._scratch


def test_calls_of_other_sizes_come_to_reuse_all_their_buffers():
    memory._scratch.clear()
    large, small = (5 * ELEMENTS,), (2 * ELEMENTS,)
    memory.give_back_scratch([memory.take_scratch((4 * ELEMENTS,), torch.float32, CPU)])
    for _ in range(2):
        buffers = [memory.take_scratch(shape, torch.float32, CPU) for shape in (large, small)]
        addresses = [buffer.data_ptr() for buffer in buffers]
        memory.give_back_scratch(buffers)
        del buffers
        assert 0 < sum(kept.nbytes() for kept in memory._scratch.values()) <= memory._SCRATCH_BYTES
    assert addresses == [memory.take_scratch(shape, torch.float32, CPU).data_ptr() for shape in (large, small)]


def test_what_earlier_calls_have_left_is_not_seen():
    memory._scratch.clear()
    work = batch(256)
    expected = call(*work)
    assert memory._scratch, "the call has used no scratch buffer"
    for kept in memory._scratch.values():
        torch.empty(0, dtype=torch.uint8).set_(kept).fill_(255)  # NaN in every dtype
    for actual, wanted in zip(call(*work), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_calls_at_the_same_time():
    works = [batch(256) for _ in range(3)]
    expected = [call(*work) for work in works]
    failures: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(3):
            results = call(*works[number])
            if not all(torch.equal(a, b) for a, b in zip(results, expected[number], strict=True)):
                failures.append(number)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_call_in_inference_mode_leaves_buffers_that_training_can_write():
    memory._scratch.clear()
    hidden, weight, labels = batch(256)
    with torch.inference_mode():
        qkernels.linear_token_logps(hidden, weight, labels)
    assert memory._scratch, "the call has used no scratch buffer"
    call(hidden, weight, labels)


def test_a_buffer_is_kept_unless_the_backward_of_a_body_follows():
    """Also those that an earlier call without gradients, such as a reference's, has left."""
    hidden, weight, labels = batch(128)
    memory._scratch.clear()
    call(hidden, weight, labels)
    assert memory._scratch
    body = torch.nn.Linear(hidden.shape[-1], hidden.shape[-1])
    out = qkernels.fused_linear_token_dpo(body(hidden), weight, labels, reference_logps=0.0)
    assert not memory._scratch
    out.loss.backward()
    assert body.weight.grad is not None and not memory._scratch


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTNEED") or sys.platform != "linux", reason="the system takes nothing back"
)
def test_the_end_of_a_buffer_is_given_back():
    """What is kept stays as it is, to the byte; whole pages behind it are zeros, and can be written again."""
    size = 2**20
    buffer = torch.ones(size, dtype=torch.uint8)
    for kept in (size, size - 1, 300_001, 1, 0):
        memory.give_back_end(buffer, kept)
        assert buffer[:kept].all()
        zeros = size - int(buffer.sum())  # the first and the last page may be shared with something else
        assert size - kept - 2 * mmap.PAGESIZE < zeros <= size - kept
        buffer.fill_(1)
    memory.give_back_end(torch.ones(3), 4)  # less than a page


def test_no_scratch_stays_where_a_body_follows():
    """Its backward is where the memory of a step is at its peak."""
    memory._scratch.clear()
    hidden, weight, labels = batch(300)
    call(hidden, weight, labels)
    assert memory._scratch
    body = torch.ones((), requires_grad=True)
    out = qkernels.fused_linear_token_dpo(hidden * body, weight, labels, reference_logps=0.0)
    assert not memory._scratch
    out.loss.backward()
    assert not memory._scratch
