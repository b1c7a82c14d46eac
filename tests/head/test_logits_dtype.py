"""logits_dtype="input": logits rounded to the inputs' dtype, as a head with a 16-bit result rounds them."""

from __future__ import annotations

import pytest
import torch

from qkernels import fused_linear_token_dpo, linear_token_logps, linear_token_stats

pytestmark = pytest.mark.quick


def exact(dtype: torch.dtype, rows: int = 6, hidden: int = 24, vocab: int = 67):
    """Inputs whose products and sums are exact in fp32, whatever their order, and inexact in 16 bits."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (rows, hidden), generator=generator) / 64
    w = torch.randint(-127, 128, (vocab, hidden), generator=generator) / 128
    return x.to(dtype), w.to(dtype), torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 2 * 67 * 4])
def test_logits_are_rounded_once(dtype, chunk):
    x, w, labels = exact(dtype)
    logits = x.double() @ w.double().T
    rounded = logits.to(dtype).double()
    assert (rounded != logits).any()
    for option, truth in (("float32", logits), ("input", rounded)):
        logps = linear_token_logps(x, w, labels, logits_dtype=option, max_chunk_bytes=chunk)
        expected = truth.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        # fp32 log-probs and logsumexp of a few tens, from exact logits
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=4e-6)


def test_a_softcap_is_rounded_too():
    x, w, labels = exact(torch.bfloat16)
    first = (x.float() @ w.float().T).bfloat16()
    capped = (5 * torch.tanh(first.float() / 5)).bfloat16().double()
    stats = linear_token_stats(x, w, labels, softcap=5.0, logits_dtype="input")
    # tanh of fp32 may fall on the other side of a tie: one unit of bf16 in one logit.
    torch.testing.assert_close(stats.logsumexp.double(), capped.logsumexp(-1), rtol=0, atol=2**-6)
    unrounded = linear_token_stats(x, w, labels, softcap=5.0)
    assert not torch.equal(stats.logsumexp, unrounded.logsumexp)


def test_the_gradient_passes_through():
    """dL/dx = (1[y] - p) W with the probabilities of the rounded logits."""
    x, w, labels = exact(torch.bfloat16)
    x.requires_grad_()
    linear_token_logps(x, w, labels, logits_dtype="input").sum().backward()
    rounded = (x.detach().float() @ w.float().T).bfloat16().double()
    g = torch.nn.functional.one_hot(labels, w.shape[0]) - rounded.softmax(-1)
    expected = g @ w.double()
    # dL/dlogits and the result are rounded to bf16
    assert (x.grad.double() - expected).norm() <= 3 * 2**-9 * (g.abs() @ w.double().abs()).norm()


def test_both_models_of_a_loss_are_rounded():
    x, w, labels = (
        value.reshape(2, 3, *value.shape[1:]) if i != 1 else value for i, value in enumerate(exact(torch.bfloat16))
    )
    reference = x.roll(1, -1)
    out = fused_linear_token_dpo(
        x, w, labels, reference_hidden=reference, reference_weight=w, logits_dtype="input", beta=0.1
    )
    for ours, hidden in ((out.token_logps, x), (out.reference_token_logps, reference)):
        rounded = (hidden.float() @ w.float().T).bfloat16().double().log_softmax(-1)
        expected = rounded.gather(-1, labels[..., None])[..., 0]
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=4e-6)


def test_fp32_inputs_have_nothing_to_round():
    x, w, labels = exact(torch.float32)
    assert torch.equal(linear_token_logps(x, w, labels, logits_dtype="input"), linear_token_logps(x, w, labels))


def test_compiled_code_rounds_too():
    x, w, labels = exact(torch.bfloat16)
    compiled = torch.compile(linear_token_logps, backend="aot_eager", fullgraph=True)
    assert torch.equal(
        compiled(x, w, labels, logits_dtype="input"), linear_token_logps(x, w, labels, logits_dtype="input")
    )


def test_another_name_is_refused():
    x, w, labels = exact(torch.float32)
    with pytest.raises(ValueError, match=r"logits_dtype.*float32.*input.*bfloat16"):
        linear_token_logps(x, w, labels, logits_dtype="bfloat16")
