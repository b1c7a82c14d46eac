"""The bits that docs/numerics.md promises: the same row gives the same numbers in any batch, padding, packing, chunk
and number of threads."""

from __future__ import annotations

import pytest
import torch

from qkernels import linear_token_stats, token_stats
from qkernels.backends import cpu

needs_kernels = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu"), torch.float32) is not None, reason="the compiled extension is missing"
)
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


@pytest.mark.skipif(not cpu.has_product(), reason="bf16 GEMMs of this package need AMX or AVX-512 BF16")
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
