"""The CPU's own GEMMs of bf16 and fp32 matrices with fp32 sums, and what takes their place on other instruction sets.

An entry is a sum of k exact products (of bf16, or within a fused multiply-add), and each addition rounds a partial sum:
the error may be k eps32 of the sum of absolute values, and as a rule it is a few eps32, for roundings differ in sign.
The bound is 16 of them. A result that had been rounded to bf16 would err by up to 2^-8 of itself, thousands of eps32.

Each test runs with every kernel that this processor has, and with the AMX kernel on plain code in place of the tile
instructions, which runs everywhere.
"""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from assertions import EPS32, assert_within
from cases import generator, make_head_batch
from linear_comparisons import check_linear_preference, check_linear_stats
from qkernels.backends import cpu as native
from qkernels.head.products import Head, WeightGrad, gradient_products, logits_product
from runnable import CPU, Backend

_C = pytest.importorskip("qkernels._C", reason="the compiled extension is missing")
BF16 = torch.bfloat16


def served(name: str) -> list[tuple[torch.dtype, str]]:
    """Dtypes and instruction sets whose kernel runs this GEMM, the emulated tiles among them; each kernel once."""
    before, found = _C.instruction_set(), {}
    for instruction_set in [*_C.instruction_sets(), "amx_emulated"]:
        _C.use_instruction_set(instruction_set)
        for dtype in (BF16, torch.float32):
            if (kernel := native.gemm_kernel(name, dtype)) is not None:
                found.setdefault((dtype, kernel), instruction_set)
    _C.use_instruction_set(before)
    return [(dtype, instruction_set) for (dtype, _), instruction_set in found.items()]


# The dtype of the matrices of the kernel under test.
dtype_under_test = BF16


@pytest.fixture
def kernel(request, monkeypatch):
    """Run with this dtype and instruction set, then with those that were in use."""
    before = _C.instruction_set()
    dtype, instruction_set = request.param
    assert _C.use_instruction_set(instruction_set)
    monkeypatch.setattr(f"{__name__}.dtype_under_test", dtype)
    yield request.param
    _C.use_instruction_set(before)


def with_kernels(name: str, *dtypes: torch.dtype):
    """Run a test with each kernel of a GEMM, or with those that take these dtypes."""
    chosen = [kernel for kernel in served(name) if not dtypes or kernel[0] in dtypes]
    kernels = [pytest.param(kernel, id=f"{kernel[1]} {str(kernel[0])[6:]}") for kernel in chosen]
    return pytest.mark.parametrize("kernel", kernels, indirect=True)


needs_product = with_kernels("logits")
needs_sum = with_kernels("dW of a chunk")
# The kernel is the same for all examples of a test.
per_example_state = hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


def matrix(rows: int, columns: int, key: int, stride: int = 0, offset: int = 0) -> torch.Tensor:
    """`stride` elements more from row to row and `offset` before the first; NaN in between."""
    memory = torch.full((offset + rows * (columns + stride) + 8,), torch.nan, dtype=dtype_under_test)
    view = memory.as_strided((rows, columns), (columns + stride, 1), offset)
    view.copy_(torch.randn(rows, columns, generator=generator(rows, columns, key)))
    return view


def product(left, right, bias=None, *, stride: int = 0) -> torch.Tensor:
    """The result, in a buffer whose surroundings are checked."""
    rows, columns = left.shape[0], right.shape[0]
    memory = torch.full((rows + 1, columns + stride), 777.0)
    native.gemm("logits", left, right.t(), memory[:rows, :columns], bias)
    assert bool((memory[rows] == 777).all()) and bool((memory[:, columns:] == 777).all()), "written outside"
    return memory[:rows, :columns]


def check(left, right, bias=None, stride: int = 0) -> torch.Tensor:
    actual = product(left, right, bias, stride=stride)
    exact = left.double() @ right.double().T
    size = left.double().abs() @ right.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    depth = left.shape[1]
    assert_within(actual, exact, EPS32 * min(1 + depth, 16) * size + 1e-38, "product")
    return actual


# --- values -----------------------------------------------------------------------------------------------------------

# Around the blocks of 12 x 32 and 32 x 32, those of 512, 320, 640 and 1536 along k, pairs along k, and a single row,
# column or entry.
ROWS = (1, 2, 11, 12, 13, 24, 37, 65)
COLUMNS = (1, 5, 15, 16, 17, 31, 32, 33, 100, 530)
DEPTHS = (1, 2, 3, 31, 32, 33, 63, 64, 319, 321, 511, 512, 513, 1024, 1537, 2001)


@needs_product
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth(kernel, depth):
    check(matrix(13, depth, 1), matrix(33, depth, 2), torch.randn(33))


@needs_product
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_size_of_the_result(kernel, rows, columns):
    left, right = matrix(rows, 37, 1), matrix(columns, 37, 2)
    check(left, right)
    check(left, right, 10 * torch.randn(columns), stride=3)


@needs_product
@pytest.mark.parametrize("offset", [0, 1, 3, 16])
@pytest.mark.parametrize("stride", [0, 1, 5, 32])
def test_any_stride_and_alignment(kernel, stride, offset):
    for depth in (40, 41, 514):
        left, right = matrix(14, depth, 1, stride, offset), matrix(35, depth, 2, 3 * stride, 7 - offset % 8)
        expected = product(left.contiguous(), right.contiguous())
        assert torch.equal(check(left, right, stride=stride), expected)


@needs_product
def test_broadcast_and_transposed_rows(kernel):
    right = matrix(20, 16, 2)
    row = matrix(1, 16, 1)
    assert torch.equal(product(row.expand(5, 16), right), product(row.repeat(5, 1), right))
    left = matrix(16, 9, 3).T  # its last dimension is not contiguous: copied
    check(left, right)


@needs_product
@per_example_state
@hypothesis.given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.integers(0, 3), st.booleans())
def test_any_size(kernel, rows, columns, depth, stride, with_bias):
    bias = torch.linspace(-3, 3, columns) if with_bias else None
    check(matrix(rows, depth, 1, stride), matrix(columns, depth, 2, stride), bias, stride)


@needs_product
def test_nothing_to_do(kernel):
    assert product(matrix(0, 8, 1), matrix(5, 8, 2)).shape == (0, 5)
    assert torch.equal(product(torch.zeros(3, 4, dtype=dtype_under_test), matrix(5, 4, 2)), torch.zeros(3, 5))


@needs_product
def test_magnitudes(kernel):
    """Large and tiny entries, in one sum and apart; infinities and NaN stay in their row or column."""
    left, right = matrix(4, 20, 1), matrix(6, 20, 2)
    for scale in (1e-15, 1e15, 1e-30):
        check((left.float() * scale).to(dtype_under_test), right)
    mixed = (left.float() * torch.logspace(-12, 12, 20)).to(dtype_under_test)
    check(mixed, right)
    left[1, 3], right[2, 5] = torch.inf, torch.nan
    actual = product(left, right)
    assert bool(actual[:, 2].isnan().all()) and bool((actual[1].isinf() | actual[1].isnan()).all())
    keep = actual[[0, 2, 3]][:, [0, 1, 3, 4, 5]]
    assert bool(keep.isfinite().all())
    assert bool((product(matrix(3, 8, 1), matrix(4, 8, 2), torch.full((4,), -torch.inf)) == -torch.inf).all())


@with_kernels("logits", BF16)
def test_results_are_not_rounded_to_sixteen_bits(kernel):
    left, right = matrix(64, 256, 1), matrix(64, 256, 2)
    ours = check(left, right)
    exact = left.double() @ right.double().T
    theirs = (left @ right.T).double()
    assert 1000 * (ours - exact).abs().max() < (theirs - exact).abs().max()


# --- sums over rows ---------------------------------------------------------------------------------------------------


def check_sum(left, right, start, stride: int = 0) -> torch.Tensor:
    """start + left^T right, in a buffer whose surroundings are checked, against float64."""
    rows, columns = start.shape
    memory = torch.full((rows + 1, columns + stride), 777.0)
    out = memory[:rows, :columns].copy_(start)
    native.gemm("dW of a chunk", left.t(), right, out)
    assert bool((memory[rows] == 777).all()) and bool((memory[:, columns:] == 777).all()), "written outside"
    exact = start.double() + left.double().T @ right.double()
    size = start.double().abs() + left.double().abs().T @ right.double().abs()
    assert_within(out, exact, EPS32 * min(1 + left.shape[0], 16) * size + 1e-38, "sum over rows")
    return out


@needs_sum
@pytest.mark.parametrize("depth", (0, *DEPTHS))
def test_sum_over_any_number_of_rows(kernel, depth):
    check_sum(matrix(depth, 29, 1), matrix(depth, 45, 2), torch.randn(29, 45))


@needs_sum
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_sum_of_every_size(kernel, rows, columns):
    check_sum(matrix(37, rows, 1, 3, 1), matrix(37, columns, 2, 5, 2), torch.randn(rows, columns), stride=3)


@needs_sum
@per_example_state
@hypothesis.given(st.integers(1, 500), st.integers(1, 70), st.integers(1, 70), st.integers(0, 3), st.integers(1, 8))
def test_a_sum_of_any_size(kernel, rows, columns, depth, stride, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = matrix(depth, rows, 1, stride), matrix(depth, columns, 2, stride)
    result = check_sum(left, right, torch.randn(rows, columns, generator=generator(rows)), stride)
    torch.set_num_threads(1)
    assert torch.equal(result, check_sum(left, right, torch.randn(rows, columns, generator=generator(rows)), stride))
    torch.set_num_threads(before)


@needs_sum
def test_a_sum_does_not_tell_in_how_many_chunks_it_came(kernel):
    """As long as no chunk's end divides terms that the kernel adds to one another before they meet the sum."""
    left, right = matrix(700, 90, 1), matrix(700, 50, 2)
    whole = check_sum(left, right, torch.zeros(90, 50))
    group = _C.gemm_depth_group(native.CODES[dtype_under_test])
    for size in (1, 7, 16, 17):
        size *= group
        total = torch.zeros(90, 50)
        for start in range(0, 700, size):
            native.gemm("dW of a chunk", left[start : start + size].t(), right[start : start + size], total)
        assert torch.equal(total, whole)


@needs_sum
@pytest.mark.parametrize("perturbed", ["scale", "one entry", "overwritten", "rounded"])
def test_errors_of_sums_are_seen(kernel, monkeypatch, perturbed):
    left, right, start = matrix(37, 14, 1), matrix(37, 35, 2), torch.randn(14, 35)
    real = native.gemm

    def wrong(name, left, right, out):
        if perturbed == "overwritten":
            out.zero_()
        real(name, left, right, out)
        if perturbed == "scale":
            out.mul_(1 + 1e-4)
        elif perturbed == "one entry":
            out[7, 3] += 1e-3
        elif perturbed == "rounded":
            out.copy_(out.to(BF16))

    check_sum(left, right, start)
    monkeypatch.setattr(native, "gemm", wrong)
    with pytest.raises(AssertionError):
        check_sum(left, right, start)


# --- gradients of the inputs and of the weight from one chunk, rounded once to bf16 -----------------------------------


def within_one_rounding(out, left, right, name: str) -> None:
    """`out` is left right, summed in fp32 and, if it is bf16, rounded once."""
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    error = EPS32 * min(1 + left.shape[1], 16) * size
    rounding = 2**-8 if out.dtype == BF16 else 0
    assert_within(out, exact, error + rounding * (exact.abs() + error) + 1e-38, name)


def check_rounded(name: str, left, right, stride: int = 0) -> torch.Tensor:
    """left right in its own dtype against float64, in a buffer whose surroundings are checked."""
    rows, columns = left.shape[0], right.shape[1]
    memory = torch.full((rows + 1, columns + stride), 777.0, dtype=dtype_under_test)
    out = memory[:rows, :columns]
    native.gemm(name, left, right, out)
    edge = torch.tensor(777.0, dtype=dtype_under_test)
    assert bool((memory[rows] == edge).all()) and bool((memory[:, columns:] == edge).all()), "written outside"
    within_one_rounding(out, left, right, name)
    return out


@with_kernels("dX")
@pytest.mark.parametrize("depth", (0, *DEPTHS))
def test_input_gradient_over_any_vocabulary(kernel, depth):
    check_rounded("dX", matrix(40, depth, 1), matrix(depth, 45, 2))


@with_kernels("dX")
def test_input_gradient_over_a_large_vocabulary(kernel):
    check_rounded("dX", matrix(2, 270000, 1), matrix(270000, 3, 2))
    check_rounded("dX", matrix(70, 9000, 1), matrix(9000, 600, 2))


@with_kernels("dX")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_input_gradient_of_every_size(kernel, rows, columns):
    check_rounded("dX", matrix(rows, 37, 1, 3, 1), matrix(37, columns, 2, 5, 2), stride=3)
    check_rounded("dX", matrix(rows, 1600, 1, 3, 1), matrix(1600, columns, 2, 5, 2), stride=1)


@with_kernels("dW")
@pytest.mark.parametrize("depth", (0, *DEPTHS))
def test_weight_gradient_over_any_number_of_rows(kernel, depth):
    check_rounded("dW", matrix(depth, 40, 1).t(), matrix(depth, 45, 2))


@with_kernels("dW")
@pytest.mark.parametrize("rows", COLUMNS)
@pytest.mark.parametrize("columns", ROWS)
def test_weight_gradient_of_every_size(kernel, rows, columns):
    check_rounded("dW", matrix(37, rows, 1, 3, 1).t(), matrix(37, columns, 2, 5, 2), stride=3)


@with_kernels("dW")
def test_a_large_weight_gradient(kernel):
    """Beyond the size from which results bypass the caches, at any alignment."""
    for stride in (0, 32, 3):
        check_rounded("dW", matrix(33, 2100, 1).t(), matrix(33, 1030 - stride, 2), stride)


@pytest.mark.parametrize("multiplies", [False, True], ids=["widened", "torch's own"])
@pytest.mark.parametrize("block", [7, 4096])
def test_gradients_without_a_kernel_of_the_extension(multiplies, block, monkeypatch):
    """On processors without bf16 instructions inputs are widened block by block, on others torch multiplies bf16."""
    products = "qkernels.head.products."
    monkeypatch.setattr(products + "_own_gemm", lambda name, operand: False)
    monkeypatch.setattr(products + "_torch_multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr(products + "_BLOCK", block)
    g, x, w = matrix(37, 45, 1, 3), matrix(37, 20, 2), matrix(45, 20, 3)
    head = Head(w, None, None, 1.0)
    result = head.input_grad(g)
    assert result.dtype == BF16
    within_one_rounding(result, g, w, "dX")
    total = WeightGrad(head, True, False, 1)
    total.add(g, x)
    weight, _ = total.result(BF16, None)
    within_one_rounding(weight, g.t(), x, "dW")
    total = WeightGrad(head, True, False, 2)
    total.add(g[:20], x[:20])
    total.add(g[20:], x[20:])
    weight, _ = total.result(BF16, None)
    within_one_rounding(weight, g.t(), x, "dW of two chunks")


@with_kernels("dX")
@pytest.mark.parametrize("perturbed", ["scale", "one entry", "transposed"])
def test_errors_of_rounded_results_are_seen(kernel, monkeypatch, perturbed):
    left, right = matrix(37, 37, 1), matrix(37, 37, 2)
    real = native.gemm

    def wrong(name, left, right, out):
        real(name, left, right.t() if perturbed == "transposed" else right, out)
        if perturbed == "scale":
            out.mul_(1.01)
        elif perturbed == "one entry":
            out[7, 3] += 0.1

    check_rounded("dX", left, right)
    monkeypatch.setattr(native, "gemm", wrong)
    with pytest.raises(AssertionError):
        check_rounded("dX", left, right)


@with_kernels("dX")
def test_rounded_results_have_the_same_bits_in_any_company(kernel):
    left, right = matrix(70, 1700, 1), matrix(1700, 130, 2)
    together = check_rounded("dX", left, right)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for rows in ([0], [69], list(range(5, 40)), list(reversed(range(70)))):
            assert torch.equal(check_rounded("dX", left[rows], right), together[rows])
        for columns in ([129], list(range(7, 60))):
            assert torch.equal(check_rounded("dX", left, right[:, columns]), together[:, columns])


@pytest.mark.skipif("amx_bf16" not in _C.instruction_sets(), reason=f"AMX: {_C.amx_unavailable()}")
@pytest.mark.parametrize("name", ["logits", "dX", "dW", "dW of a chunk"])
def test_emulated_tiles_have_the_bits_of_the_instructions(name):
    """Subnormal numbers, infinities and NaN included: what other machines test is what this one does."""
    for rows, columns, depth in ((5, 7, 3), (33, 65, 70), (100, 40, 1601), (600, 20, 330)):
        left, right = matrix(rows, depth, 1), matrix(depth, columns, 2)
        for scale in (1.0, 1e-19, 1e-38, 1e19):
            left[0, -1], right[-1, 1] = torch.inf, torch.nan
            results = []
            for instruction_set in ("amx_bf16", "amx_emulated"):
                _C.use_instruction_set(instruction_set)
                out = torch.ones(rows, columns, dtype=BF16 if name in ("dX", "dW") else torch.float32)
                native.gemm(name, (left * scale).to(BF16), (right * min(scale, 1)).to(BF16), out)
                results.append(out)
            _C.use_instruction_set(_C.instruction_sets()[-1])
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


# --- bits -------------------------------------------------------------------------------------------------------------


@needs_product
def test_a_row_has_the_same_bits_in_any_company(kernel):
    """Alone, among others, in another place of the tile: what cached reference log-probs rely on."""
    left, right, bias = matrix(40, 700, 1), matrix(130, 700, 2), torch.randn(130)
    together = product(left, right, bias)
    for rows in ([0], [39], [12, 13], list(range(5, 40)), list(reversed(range(40)))):
        assert torch.equal(product(left[rows], right, bias), together[rows])
    for columns in ([0], [129], list(range(7, 60)), list(reversed(range(130)))):
        assert torch.equal(product(left, right[columns], bias[columns]), together[:, columns])


@needs_product
@pytest.mark.parametrize("columns", [65536, 65523])
@pytest.mark.parametrize("stride", [0, 16, 13])
def test_a_large_result_has_the_bits_of_its_parts(kernel, columns, stride):
    """From 32 MiB on it bypasses the caches where the addresses allow it; also with ragged panels."""
    left, right, bias = matrix(130, 6, 1), matrix(columns, 6, 2), torch.randn(columns)
    whole = product(left, right, bias, stride=stride)
    parts = [product(left[first : first + 65], right, bias) for first in (0, 65)]
    assert whole.numel() * 4 >= 32 * 2**20 > parts[0].numel() * 4
    assert torch.equal(whole, torch.cat(parts))


@needs_product
def test_the_same_bits_for_any_number_of_threads(kernel):
    left, right, bias = matrix(50, 600, 1), matrix(2000, 600, 2), torch.randn(2000)
    results = []
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        results.append(product(left, right, bias))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(product(left, right, bias), results[0])


@needs_product
@pytest.mark.parametrize("perturbed", ["scale", "one entry", "last column", "rounded", "no bias"])
def test_errors_are_seen(kernel, monkeypatch, perturbed):
    """The check of this file's own check."""
    left, right, bias = matrix(14, 37, 1), matrix(35, 37, 2), torch.randn(35)
    check(left, right, bias)
    real = native.gemm

    def wrong(name, left, right, out, bias):
        real(name, left, right, out, None if perturbed == "no bias" else bias)
        if perturbed == "scale":
            out.mul_(1 + 1e-4)
        elif perturbed == "one entry":
            out[7, 3] += 1e-3
        elif perturbed == "last column":
            out[:, -1] = 0
        elif perturbed == "rounded":
            out.copy_(out.to(BF16))

    monkeypatch.setattr(native, "gemm", wrong)
    with pytest.raises(AssertionError):
        check(left, right, bias)


# --- in the head, and without it --------------------------------------------------------------------------------------


@pytest.fixture(params=[*_C.instruction_sets(), "amx_emulated"])
def instruction_set(request):
    """Run with this instruction set, then with the one that was in use."""
    before = _C.instruction_set()
    assert _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


def test_which_product_makes_the_logits(instruction_set, monkeypatch):
    words = logits_product(CPU.device, BF16)
    expected = {"avx512_bf16": "AVX-512 BF16 kernel", "amx_bf16": "AMX BF16 kernel", "amx_emulated": "emulated AMX"}
    assert expected.get(instruction_set, "widened") in words
    assert "widened" in logits_product(CPU.device, torch.float16)
    monkeypatch.setattr("qkernels.head.products._torch_multiplies_bf16", lambda: False)
    backward = gradient_products(CPU.device, BF16)
    assert ("kernel" if instruction_set.startswith("amx") else "widened") in backward
    amx = instruction_set.startswith("amx")
    vectors = instruction_set == "avx512_bf16"
    served = {"logits": amx or vectors, "dX": amx or vectors, "dW": amx}
    assert {name: native.gemm_kernel(name, BF16) == instruction_set for name in served} == served


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", ""])
def test_fp32_is_multiplied_by_torch_where_that_is_fast(instruction_set, maker, monkeypatch):
    """MKL's GEMM is kept on Intel's processors, and where nothing is known of the processor."""
    monkeypatch.setattr(native, "vendor", maker)
    ours = native.gemm_kernel("logits", torch.float32) is not None and maker == "AuthenticAMD"
    assert ours <= torch.backends.mkl.is_available()
    for words in (logits_product, gradient_products):
        assert ("AVX-512 kernel" in words(CPU.device, torch.float32)) == ours
        assert ("AVX-512 kernel" in words(CPU.device, torch.float16)) == ours
        assert words(CPU.device, torch.float64) == "torch, float64"
    x, w = torch.randn(3, 40), torch.randn(50, 40)
    head, calls = Head(w, None, None, 1.0), []
    real = native.gemm
    monkeypatch.setattr(native, "gemm", lambda name, *rest: (calls.append(name), real(name, *rest)))
    head.logits(x, out := torch.empty(3, 50))
    torch.testing.assert_close(out, x @ w.t())
    head.input_grad(out)
    total = WeightGrad(head, True, False, 2)
    total.add(out, x)
    total.add(out, x)
    torch.testing.assert_close(total.weight, 2 * out.t() @ x)
    assert calls == (["logits", "dX", "dW", "dW of a chunk"] if ours else [])


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [7, 4096])
def test_every_instruction_set_gives_exact_logits(instruction_set, dtype, block, monkeypatch):
    """Widened in blocks of the vocabulary that do not divide it."""
    monkeypatch.setattr("qkernels.head.products._BLOCK", block)
    batch = make_head_batch(2, 6, 33, 50, dtype)
    for trains in ("h", "hwb"):
        for chunk_rows in (None, 12):
            check_linear_preference(CPU, batch, trains=trains, chunk_rows=chunk_rows, softcap=5.0)
        check_linear_preference(CPU, batch, "aot", trains=trains, chunk_rows=5)
    check_linear_stats(CPU, batch, ("logps", "entropy", "kl_policy_reference"))


def test_the_reference_backend_takes_the_same_products(instruction_set):
    """Backends differ in what they do with rows; products belong to the head."""
    batch = make_head_batch(2, 6, 33, 50, BF16)
    check_linear_preference(Backend("torch", torch.device("cpu")), batch)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64], ids=str)
def test_logits_of_a_head(dtype):
    """`Head.logits` writes into a part of a larger buffer and nowhere else."""
    x, w = torch.randn(5, 16).to(dtype), torch.randn(40, 16).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(40, dtype=wide)
    for weight in (w, w.T.contiguous().T):
        memory = torch.full((7, 40), 777.0, dtype=wide)
        Head(weight, bias, None, 1.0).logits(x, memory[:5])
        assert_within(memory[:5], x.double() @ w.double().T + bias.double(), 1e-5, "logits")
        assert bool((memory[5:] == 777).all())
