"""What the path from hidden states does on GPUs alone, on a CPU that is taken for one (`like_a_gpu`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import like_a_gpu
import qkernels
from assertions import assert_within
from cases import IGNORE, generator, make_head_batch
from qkernels import linear_token_logps
from qkernels.head import products
from qkernels.head.products import Head, WeightGrad

TESTS = next(folder for folder in Path(__file__).resolve().parents if (folder / "conftest.py").exists())
BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")

# Tests of gradients, plans and known bugs; not those of what only a CPU does: it widens fp16 and looks at coefficients.
FILES = ("functional/test_linear_autograd.py", "functional/test_linear_known_bugs.py", "head/test_plans.py")
MORE = ("functional/test_linear.py", "functional/test_policy_loss.py", "functional/test_sequence_loss.py")
ALL = "cpu- and not autocast and not peak and not leave_the_products"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's GEMMs on CPU tensors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        like_a_gpu.register(library)
        like_a_gpu.patch(monkeypatch.setattr)
        tried = products._adds_wide
        tried.cache_clear()
        yield
    tried.cache_clear()


def run_tests(files: tuple[str, ...], expression: str, *options: str) -> int:
    """How many tests of these files passed in a process of their own, with the plugin."""
    path = [str(TESTS / "support"), str(Path(qkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    found = [str(TESTS / name) for name in files if (TESTS / name).exists()]
    how = ["-m", "pytest", "-q", "-p", "like_a_gpu", "-p", "no:cacheprovider", "-r", "fE", "--maxfail", "5"]
    done = subprocess.run(
        [sys.executable, *how, "-k", expression, *options, *found],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, cwd=TESTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    return int(passed[1])


def test_gradients_plans_and_known_bugs():
    assert run_tests(FILES, f"{ALL} and not float32", "-m", "not nightly") > 150


@pytest.mark.nightly
def test_everything_from_hidden_states():
    assert run_tests(FILES + MORE, ALL) > 500


def matrices(rows: int, depth: int, columns: int, dtype: torch.dtype, device: torch.device | str = CPU):
    seeds = generator(rows, depth, columns)
    left, right = (torch.randn(*size, generator=seeds) for size in ((rows, depth), (depth, columns)))
    return left.to(device, dtype), right.to(device, dtype)


@pytest.mark.parametrize("add", [False, True])
def test_the_flop_counter_sees_products_with_an_fp32_result(add):
    left, right = matrices(7, 5, 6, BF16, "meta")
    with FlopCounterMode(display=False) as flops:
        products._multiply_wide(left, right, torch.empty(7, 6, device="meta"), add=add)
    assert flops.get_total_flops() == 2 * 7 * 5 * 6


@pytest.mark.parametrize("how", ["addmm", "without addmm", "watched"])
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_sums_in_fp32_that_nothing_has_rounded(gpu, monkeypatch, dtype, how):
    """With torch's own sum, with a release that sums in 16 bits only, and beneath a flop counter."""
    monkeypatch.setattr(products, "_BLOCK", 3)
    if how == "without addmm":
        monkeypatch.setattr(products, "_adds_wide", lambda device: False)
    left, right = matrices(7, 5, 6, dtype)
    sums = torch.full((7, 6), 0.1)
    expected = sums.double() + left.double() @ right.double()
    with FlopCounterMode(display=False, depth=0) if how == "watched" else torch.no_grad():
        products._multiply_wide(left, right, sums, add=True)
    assert_within(sums, expected, 1e-6 * (1 + left.double().abs() @ right.double().abs()), how)


def test_whether_torch_sums_in_fp32_is_tried(gpu):
    assert products._adds_wide(CPU)


def test_a_torch_that_does_not_is_found_out():
    """A CPU's has no such GEMM at all."""
    products._adds_wide.cache_clear()
    assert not products._adds_wide(CPU)
    products._adds_wide.cache_clear()


def test_products_of_fp16_are_rounded_after_their_scale(gpu):
    """Both are small enough to be subnormal, and large enough to overflow, without it."""
    g, x = (torch.rand(6, size, generator=generator(size)).to(HALF) + 0.5 for size in (50, 16))
    head = Head(torch.ones(50, 16, dtype=HALF), None, None, 1.0)
    assert head.input_grad(g * 2000).dtype == FLOAT and bool(head.input_grad(g * 2000).isfinite().all())
    for scale in (2.0**-20, 2.0**10):
        total = WeightGrad(head, True, False, 1)
        total.add(g, x, weight_scale=torch.tensor(scale))
        expected = (g.double().T @ x.double()) * scale
        assert total.weight is not None and total.weight.dtype == FLOAT
        assert_within(total.weight, expected, 1e-6 * expected.abs(), f"scale {scale}")


@pytest.mark.parametrize("temperature, softcap, scale", [(1.0, None, 1.0), (1e-3, None, 1.0), (1e-3, 30.0, 4.0)])
def test_gradients_of_fp16_neither_overflow_nor_lose_small_probabilities(gpu, temperature, softcap, scale):
    """In fp16 a probability below 6e-5 has lost digits, and one below 3e-8 is 0."""
    batch = make_head_batch(1, 4, 16, 50, HALF, scale=temperature)
    weight = batch.weight.clone()
    weight[7] = -14 * temperature / scale  # hidden states of 1: this token is less likely by e^-14
    hidden = torch.ones(2, 4, 16, dtype=HALF) / 16
    leaf = weight.clone().requires_grad_()
    how, upstream = {"softcap": softcap, "logit_scale": scale, "temperature": temperature}, 2.0**10 * temperature
    labels = torch.where(batch.labels == 7, 8, batch.labels)
    logps = linear_token_logps(hidden, leaf, labels, **how, backend="cpu")
    logps.sum().backward(torch.tensor(upstream))
    exact = weight.double().requires_grad_()
    z = scale * (hidden.double() @ exact.T)
    z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
    picked = z.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    (picked * (labels != IGNORE)).sum().backward(torch.tensor(upstream))
    assert leaf.grad is not None and exact.grad is not None and bool(leaf.grad.isfinite().all())
    # What fp16 can hold of the result itself: half an ulp, and half of the least number.
    bound = 2e-3 * exact.grad[7].abs() + 2.0**-25
    assert_within(leaf.grad[7].float(), exact.grad[7], bound, "gradient of an unlikely token's weight")


def test_a_plan_says_that_torch_rounds_fp32_inputs():
    """Where a caller has asked torch for TF32."""
    gpu, before = torch.device("cuda", 0), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert products.logits_product(gpu, FLOAT) == "torch, float32 inputs rounded to TF32"
        assert "TF32" not in products.logits_product(gpu, BF16) + products.logits_product(CPU, FLOAT)
        assert products.logits_product(gpu, torch.float64) == "torch, float64"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert products.logits_product(gpu, FLOAT) == "torch, float32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
