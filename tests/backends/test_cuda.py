"""The Python side of the CUDA backend without a GPU: reasons, split rows, arguments; and how errors come back."""

from __future__ import annotations

import types

import pytest
import torch

from cases import IGNORE, make_rows
from qkernels import backends
from qkernels.backends import cpu as native
from qkernels.backends import cuda, ops
from qkernels.core.columns import COLUMNS, REFERENCE_STATE, STATE

extension = native.extension
pytestmark = pytest.mark.skipif(extension is None, reason="the compiled extension is missing")

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def pretended(monkeypatch):
    """A GPU of capability 9.0 that the extension has kernels for."""
    monkeypatch.setattr(cuda, "extension", types.SimpleNamespace(HAS_CUDA=True, CUDA_ARCHITECTURES="90"))
    monkeypatch.setattr(cuda, "_cannot_run", lambda index: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


def test_why_it_cannot_run(pretended):
    assert cuda.unavailable(GPU, torch.bfloat16) is None
    assert "got torch.float64" in cuda.unavailable(GPU, torch.float64)
    assert "the tensor is on cpu" in cuda.unavailable(CPU, torch.float32)
    pretended.setattr(cuda, "_cannot_run", lambda index: "no kernel image")
    assert "no kernel image (cuda:0; compiled for sm_90, compute_90)" in cuda.unavailable(GPU, torch.float32)
    pretended.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0 or higher, cuda:0 has 7.5" in cuda.unavailable(GPU, torch.float32)
    pretended.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in cuda.unavailable(GPU, torch.float32)
    pretended.setattr(cuda, "extension", types.SimpleNamespace(HAS_CUDA=False))
    assert "has no CUDA kernels" in cuda.unavailable(GPU, torch.float32)
    assert cuda.describe()["built"] is False
    pretended.setattr(cuda, "extension", None)
    pretended.setattr(native, "build_info", lambda: {"native": False, "reason": "no C++ compiler"})
    assert "extension is missing" in cuda.unavailable(GPU, torch.float32)


def test_asking_by_name_for_what_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here"):
        backends.resolve("cuda", torch.zeros(1))


@pytest.mark.parametrize(
    "rows, vocab, splits", [(528, 128256, 1), (8192, 128256, 1), (527, 128256, 2), (16, 128256, 33), (1, 128256, 62),
                            (1, 1000, 1), (1, 2**20, 64), (0, 128256, 62)]
)  # fmt: skip
def test_few_rows_are_spread_over_the_processors(rows, vocab, splits):
    assert cuda.splits_for(rows, vocab, 132, 64) == splits


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The extension's CUDA entry points, played by those for the CPU: arguments in the wrong place show."""
    calls = []

    def play(run, *more):
        def call(*args):
            calls.append(args[-1])
            return run(*args[:-1], *more)

        return call

    fake = types.SimpleNamespace(
        HAS_CUDA=True, CUDA_MAX_SPLITS=64, CUDA_PARTIAL_BYTES=120,
        cuda_row_stats=play(extension.row_stats, 1), cuda_row_grad=play(extension.row_grad, False, 1),
        cuda_pair_loss=play(extension.pair_loss),
    )  # fmt: skip
    monkeypatch.setattr(cuda, "extension", fake)
    monkeypatch.setattr(cuda, "_processors", lambda index: 132)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    return calls


def test_arguments_reach_the_extension(on_the_cpu):
    rows = make_rows((2, 3), 2049, torch.bfloat16)
    args = (rows.logits, rows.labels, rows.reference)
    for columns in (STATE, STATE | REFERENCE_STATE, (1 << len(COLUMNS)) - 1):
        got = cuda.row_stats(*args, columns, 0.7, IGNORE)
        assert torch.equal(got, ops.row_stats.op(*args, columns, 0.7, IGNORE, "cpu"))
    state = ops.row_stats.op(*args, STATE | REFERENCE_STATE, 0.7, IGNORE, "cpu")
    for k in (1, 5):
        how = (state[:3], state[3:], torch.randn(k, 2, 3), None if k == 1 else torch.tensor(-2.0), 0.7, IGNORE)
        expected = ops.row_grad.op(*args, *how, "cpu")
        assert torch.equal(cuda.row_grad(*args, *how), expected)
        logits = rows.logits.clone()
        cuda.row_grad_(logits, *args[1:], *how)
        assert torch.equal(logits, expected)
    logps = -torch.rand(4, 5)
    for ends in (None, torch.tensor([0, 3, 9, 10, 20])):
        batch = logps if ends is None else logps.view(1, 20)
        labels = torch.arange(20).view(batch.shape) % 7
        for weights in (None, torch.rand_like(batch) * (labels != 3)):
            for reference in (None, batch - 0.3, torch.zeros(4)):
                pair = (batch, reference, labels, weights, ends, 0.1, 0.2, 3)
                for got, expected in zip(cuda.pair_loss(*pair), ops.pair_loss.op(*pair, "cpu"), strict=True):
                    assert torch.equal(got, expected)
    assert {where[1] for where in on_the_cpu} == {77}


def test_labels_are_checked_when_asked_for(monkeypatch):
    labels = torch.tensor([[3, 9]])
    monkeypatch.setenv("QKERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"labels\[1\] = 9 is outside \[0, 9\)"):
        cuda.row_stats(torch.zeros(1, 2, 9), labels, None, STATE, 1.0, IGNORE)


@pytest.mark.skipif(extension is None or not extension.HAS_CUDA, reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_errors_of_the_runtime_are_raised():
    assert extension.cuda_unavailable(0)
    zero = (0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="qkernels: cuda"):
        extension.cuda_row_stats((1, 1, 8), zero, zero, 0, IGNORE, 1.0, STATE, 0, (0, 0, 1, 0))
