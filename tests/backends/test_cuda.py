"""The Python side of the CUDA backend without a GPU: reasons, split rows, streams; and how errors come back."""

from __future__ import annotations

import types

import pytest
import torch

import qkernels
from cases import IGNORE
from qkernels import backends
from qkernels.backends import cpu as native
from qkernels.backends import cuda
from qkernels.backends.pieces import span_of
from qkernels.core.fields import SOFTMAX

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


@pytest.fixture
def asked_anew():
    """What "auto" picks is looked up again, and what it picked meanwhile is forgotten."""
    backends._lookup.cache_clear()
    yield
    backends._lookup.cache_clear()


@pytest.mark.parametrize(
    "capability, reason, told",
    [
        ((7, 5), "", "8.0 or higher, cuda:0 has 7.5"),
        ((12, 1), "no kernel image", r"no kernel image \(cuda:0; compiled for sm_90, compute_90\)"),
        (
            (9, 0),
            "the driver supports CUDA 12.4, the extension was built with CUDA 13.0",
            "the driver supports CUDA 12.4",
        ),
    ],
)
def test_a_gpu_that_the_kernels_were_not_built_for_is_told_once(pretended, asked_anew, capability, reason, told):
    pretended.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    pretended.setattr(cuda, "_cannot_run", lambda index: reason)
    pretended.setattr(backends.get("triton"), "unavailable", lambda device, dtype: None)
    message = f"'cuda' is installed and cannot run here: .*{told}.* Backend 'triton' is used"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        chosen = [backends.resolve_for("auto", GPU, dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
    assert chosen == ["triton"] * 3 and len({str(one.message) for one in warned}) == 1
    with pytest.raises(ValueError, match=told):
        backends.resolve_for("cuda", GPU, torch.float32)


def test_nothing_is_told_where_the_kernels_run_or_are_left_out_on_purpose(pretended, asked_anew, recwarn):
    pretended.setattr(backends.get("triton"), "unavailable", lambda device, dtype: None)
    assert backends.resolve_for("auto", GPU, torch.float32) == "cuda"
    assert backends.resolve_for("auto", GPU, torch.float64) == "triton"
    backends._lookup.cache_clear()
    pretended.setattr(cuda, "extension", types.SimpleNamespace(HAS_CUDA=False))
    assert backends.resolve_for("auto", GPU, torch.float32) == "triton"
    pretended.setattr(native, "_C", None)
    pretended.setattr(native, "build_info", lambda: {"native": False, "reason": "no C++ compiler"})
    assert backends.resolve_for("auto", CPU, torch.float32) == "torch"
    assert [str(one.message) for one in recwarn] == []


def test_an_extension_that_does_not_load_here_is_told_by_the_first_call(monkeypatch, asked_anew):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_missing", "version `GLIBC_2.28' not found")
    monkeypatch.setattr(native, "build_info", lambda: {"native": True, "reason": None})
    logits, labels = torch.randn(1, 2, 5), torch.tensor([[1, 4]])
    told = "'cpu' .*does not load: .*GLIBC_2.28' not found.* Backend 'torch' is used on cpu"
    with pytest.warns(RuntimeWarning, match=told):
        logps = qkernels.token_logps(logits, labels)
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0])
    info = qkernels.info()
    assert "GLIBC_2.28' not found" in info["backends"]["cpu"] and info["auto"]["cpu"] == "torch"


def test_asking_by_name_for_what_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here"):
        backends.resolve("cuda", torch.zeros(1))


@pytest.mark.parametrize(
    "rows, vocab, splits", [(265, 128256, 1), (8192, 128256, 1), (264, 128256, 2), (128, 128256, 4), (32, 128256, 16),
                            (1, 128256, 32), (1, 4096, 1), (1, 4097, 2), (1, 2**20, 64), (0, 128256, 32)]
)  # fmt: skip
def test_few_rows_are_spread_over_the_processors(rows, vocab, splits):
    assert cuda.splits_for(rows, vocab, 132, 64) == splits


@pytest.mark.parametrize(
    "vocab, pieces, span", [(128256, 32, 4096), (128256, 17, 8192), (128256, 2, 65536), (33003, 64, 520), (7, 64, 8),
                            (16384, 8, 2048), (16385, 8, 4096), (128256, 1, 131072)]
)  # fmt: skip
def test_pieces_are_whole_iterations_where_they_are_long(vocab, pieces, span):
    """(csrc/tests/test_cuda.cpp has the same cases.)"""
    assert span_of(vocab, pieces) == span and span * pieces >= vocab


def test_launches_go_to_the_current_stream(monkeypatch):
    """The rest of what reaches the extension is tested by running the kernels (test_cuda_emulation.py)."""
    seen = []

    def launch(where, **_):
        seen.append(where)

    operations = dict.fromkeys(("cuda_row_stats", "cuda_row_grad", "cuda_pair_loss"), launch)
    fake = types.SimpleNamespace(HAS_CUDA=True, CUDA_MAX_SPLITS=64, CUDA_PARTIAL_BYTES=120, **operations)
    monkeypatch.setattr(cuda, "extension", fake)
    monkeypatch.setattr(cuda, "_processors", lambda index: 132)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    logits, labels = torch.zeros(1, 2, 8192), torch.zeros(1, 2, dtype=torch.int64)
    softmax = cuda.row_stats(logits, labels, None, SOFTMAX, 1.0, IGNORE)
    cuda.row_grad(logits, labels, None, softmax, None, softmax[:1], None, 1.0, IGNORE)
    cuda.pair_loss(torch.zeros(2, 3), None, torch.zeros(2, 3, dtype=torch.int64), None, None, 0.1, 0.0, IGNORE)
    assert [where[:3] for where in seen] == [(None, 77, 2), (None, 77, 2), (None, 77, 1)]
    assert seen[0][3] != 0 and seen[1][3] == seen[2][3] == 0  # scratch memory of split rows, for their sums only


@pytest.mark.parametrize("name", ["row_stats", "row_grad", "pair_loss", "gemm"])
def test_positional_arguments_are_refused(name):
    """Two numbers that change places would be a valid call and corrupt memory."""
    assert f"{name}(*, " in getattr(extension, name).__doc__


def test_labels_are_checked_when_asked_for(monkeypatch):
    labels = torch.tensor([[3, 9]])
    monkeypatch.setenv("QKERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"labels\[1\] = 9 is outside \[0, 9\)"):
        cuda.row_stats(torch.zeros(1, 2, 9), labels, None, SOFTMAX, 1.0, IGNORE)


@pytest.mark.skipif(extension is None or not extension.HAS_CUDA, reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_errors_of_the_runtime_are_raised():
    assert extension.cuda_unavailable(0)
    zero = (0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="qkernels: cuda"):
        extension.cuda_row_stats(
            shape=(1, 1, 8), policy=zero, reference=zero, labels=0, ignore_index=IGNORE, temperature=1.0,
            fields=SOFTMAX, out=0, where=(0, 0, 1, 0),
        )  # fmt: skip
