"""The bits that docs/numerics.md promises: the same row gives the same numbers in any batch, padding, packing, chunk
and number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkernels import linear_token_stats, token_stats
from qkernels.backends import cpu
from qkernels.head.products import own_kernel as own_kernel_of

needs_kernels = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu"), torch.float32) is not None, reason="the compiled extension is missing"
)


def own_kernel(dtype: torch.dtype) -> str | None:
    """The kernel of this package that makes logits from hidden states of this dtype."""
    return own_kernel_of("logits", torch.device("cpu"), dtype)


OUTPUTS = ("logps", "logsumexp", "entropy", "kl_policy_reference", "kl_reference_policy")


def results(logits, labels, reference, upstream, **options):
    """Per-row results and dL/dlogits for given dL/dlogps and dL/dentropy."""
    leaf = logits.clone().requires_grad_()
    stats = token_stats(leaf, labels, reference_logits=reference, outputs=OUTPUTS, backend="cpu", **options)
    loss = (stats.logps * upstream).sum() + (stats.entropy * upstream.flip(-1)).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return [*(getattr(stats, name).detach() for name in OUTPUTS), gradient]


def one_case(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows, vocab = number(1, 9), number(2, 400)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number(0, 3)]
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    reference = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    # dL/dentropy is read backwards above: one value for all rows keeps it the row's own in any order.
    upstream = torch.full_like(upstream, float(upstream[0]))
    whole = results(logits, labels, reference, upstream)
    order = torch.randperm(rows, generator=generator)[: number(1, rows + 1)]
    part = results(logits[order], labels[order], reference[order], upstream[order])
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[order], other), f"seed {seed}: another batch"
    # Padded: rows between them whose label is ignored, as a second dimension; and other threads.
    wide = torch.full((rows, 3, vocab), float("nan"), dtype=dtype)
    wide_reference, wide_labels, wide_upstream = wide.clone(), torch.full((rows, 3), -100), torch.zeros(rows, 3)
    column = number(0, 3)
    wide[:, column], wide_reference[:, column] = logits, reference
    wide_labels[:, column] = labels
    wide_upstream[:] = upstream[:, None]
    threads = torch.get_num_threads()
    torch.set_num_threads(number(1, 4))
    try:
        padded = results(wide, wide_labels, wide_reference, wide_upstream)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(whole, padded, strict=True):
        assert torch.equal(one, other[:, column]), f"seed {seed}: padding or threads"


@needs_kernels
@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 10))])
def test_rows_of_logits(block):
    """1000 random cases, of which 100 before a merge."""
    for seed in range(100 * block, 100 * block + 100):
        one_case(seed)


@pytest.mark.skipif(not own_kernel(torch.bfloat16), reason="bf16 GEMMs of this package need AMX or AVX-512 BF16")
def test_rows_of_bf16_hidden_states():
    """The package's own GEMM: one row's results do not depend on the batch, the chunk or the threads."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rows, hidden = 1 + seed % 37, 8 + 5 * (seed % 11)
        vocab = 17 + 13 * seed
        x = torch.randn(rows, hidden, generator=generator).bfloat16()
        w = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).bfloat16()
        labels = torch.randint(0, vocab, (rows,), generator=generator)
        names = ("logps", "logsumexp", "entropy")
        whole = linear_token_stats(x, w, labels, outputs=names)
        order = torch.randperm(rows, generator=generator)[: 1 + rows // 2]
        for options in ({}, {"max_chunk_bytes": 6 * vocab * (1 + seed % 5)}):
            part = linear_token_stats(x[order], w, labels[order], outputs=names, **options)
            for name in names:
                assert torch.equal(getattr(whole, name)[order], getattr(part, name)), (seed, name, options)


def _flags() -> str:
    """The vendor and the instruction sets of the processor, as Linux prints them; "" elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


# torch's own product: its bits are MKL's, which looks at the processor itself, whatever torch was told to use.
# Elsewhere than measured it may have other kernels for other numbers of rows.
MKL_AS_MEASURED = (
    torch.backends.mkl.is_available()
    and "AuthenticAMD" in _flags()
    and "avx2" in _flags()
    and "avx512f" not in _flags()
)


# fp16 is widened to fp32, and so is bf16 without a kernel of its own.
PROMISED = [
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if MKL_AS_MEASURED or own_kernel(torch.float32) or (dtype == torch.bfloat16 and own_kernel(dtype))
]


def one_case_of_hidden_states(seed: int) -> None:
    """Any rows of a batch, in any chunks, padded, and with another number of threads."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows, hidden, vocab = number(1, 70), number(8, 200), number(500, 1100)
    dtype = PROMISED[number(0, len(PROMISED))]
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    w = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype) if seed % 3 == 0 else None
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    names = ("logps", "logsumexp", "entropy")
    options = {"outputs": names, "bias": bias, "softcap": 5.0 if seed % 4 == 0 else None}
    whole = linear_token_stats(x, w, labels, **options)
    order = torch.randperm(rows, generator=generator)[: number(1, rows + 1)]
    some = torch.full((rows, 2), -100)
    some[order, number(0, 2)] = labels[order]
    chunks = 6 * vocab * number(1, 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(number(1, 4))
    try:
        part = linear_token_stats(x[order], w, labels[order], max_chunk_bytes=chunks, **options)
        padded = linear_token_stats(x[:, None].expand(-1, 2, -1), w, some, **options)
    finally:
        torch.set_num_threads(threads)
    for name in names:
        expected = getattr(whole, name)[order]
        assert torch.equal(expected, getattr(part, name)), f"seed {seed}: {name}, another batch or chunk"
        others = getattr(padded, name).sum(1)  # of a row and of one that is ignored, which is 0
        assert torch.equal(expected, others[order]), f"seed {seed}: {name}, padding"


@pytest.mark.skipif(
    not PROMISED, reason="the bits of GEMMs are known of this package's own, and of MKL's on AMD processors with AVX2"
)
@needs_kernels
@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 10))])
def test_rows_of_hidden_states(block):
    """1000 random cases, of which 100 before a merge."""
    for seed in range(100 * block, 100 * block + 100):
        one_case_of_hidden_states(seed)


@pytest.mark.skipif(
    not MKL_AS_MEASURED or own_kernel(torch.float32) is not None, reason="measured of MKL's GEMM with AVX2"
)
@needs_kernels
def test_few_rows_would_differ(monkeypatch):
    """What the cases above can see: the same without the least number of rows of a product."""
    monkeypatch.setattr("qkernels.head.products._FEWEST_ROWS", 0)
    with pytest.raises(AssertionError, match=r"^seed"):
        for seed in range(40):
            one_case_of_hidden_states(seed)
