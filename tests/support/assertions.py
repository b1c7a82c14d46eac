"""How far a result may be from the float64 truth: every bound of the test suite, with its reason, in one place.

Those of per-row results stand beside their definitions (`oracle.ROW_BOUNDS`). eps32 = 6e-8 is half an ulp of fp32
relative to the number.

Gradients:

fp32    1e-5 of the row's largest entry (the design's number) and, stricter for all the small entries of a row, 2e-5 of
        the entry's own terms: x_j carries three roundings (subtraction, temperature, log of the sum) and p_j = exp(x_j)
        turns them into a relative error of 3 |x_j| eps32, with |x_j| at most 104 before it underflows. The terms' sum
        of absolute values replaces the entry itself where terms cancel: for nearly equal models p_j - q_j is as small
        as one likes but keeps the rounding of p_j and q_j, so 2e-6 of the terms is allowed whatever the row's largest
        entry is.
16 bit  one ulp of the output dtype (half for the final rounding, half for everything before it); with cancelling terms
        half an ulp plus 2e-6 of the terms.

        A bf16 result below the smallest normal number may be 0: AVX512-BF16's conversion instruction flushes there.

In either, the terms that belong to a probability below the smallest normal fp32 number may be missing: exp is allowed
to end there, and no fp32 result could tell.

float64 results (reference backend only): 1e-12 in place of all of these.

From hidden states, logits carry the rounding of an fp32 sum of H terms: partial sums are smaller than the terms' sum of
absolute values and their roundings differ in sign, so a quarter of that sum (`head_size`, at least 1) stands for them,
and the bounds above are taken relative to it. Gradients of hidden states, weight and bias are sums of products of an
entry of dL/dlogits; `size` is the sum of their absolute values. With u half an ulp of the products' dtype, relative:

16 bit  u of `size` for the rounding of dL/dlogits, once more for dW where chunks are rounded before they are summed;
        u of the result for each time it is rounded itself: by the product, and by the scale of an upstream gradient.
any     HEAD_GRADIENT of `size` and `head_size`, for the rounding of the logits and of the sums in fp32.

That is a worst case, which an error of 1 % can pass in 16 bit. Roundings are independent and average out over all
entries, an error of scale does not: the projection of the whole gradient on the true one must be 1 within HEAD_SCALE.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from oracle import ROW_BOUNDS, Terms

GRADIENT_OF_ROW = 1e-5
GRADIENT_OF_TERMS = 2e-5
CANCELLATION = 2e-6
FLOAT64 = 1e-12
EPS32 = 2.0**-24
HEAD_GRADIENT = 1e-6
HEAD_SCALE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}
# Steps of denormal fp32 numbers.
SMALLEST = 2.0**-148
BF16_SMALLEST_NORMAL = 2.0**-126


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at each of the float64 `values` (the smallest subnormal near 0)."""
    info = torch.finfo(dtype)
    smallest_normal = info.smallest_normal
    exponent = torch.floor(torch.log2(values.double().abs().clamp_min(smallest_normal)))
    return torch.exp2(exponent) * info.eps


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor | float, what: str) -> None:
    """|actual - expected| <= allowed everywhere; infinities and NaNs must be the same ones."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = torch.as_tensor(allowed, dtype=torch.float64).cpu().expand(expected.shape)
    finite = expected.isfinite()
    same = torch.where(finite, (actual - expected).abs() <= allowed, actual == expected)
    same = same | (expected.isnan() & actual.isnan())
    if bool(same.all()):
        return
    error = torch.where(same, 0.0, ((actual - expected).abs() / allowed.clamp_min(1e-300)).nan_to_num(torch.inf))
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    raise AssertionError(
        f"{what}: {int((~same).sum())} of {same.numel()} values are wrong; worst at {index}:"
        f" got {actual.reshape(-1)[worst].item():.9g}, expected {expected.reshape(-1)[worst].item():.9g},"
        f" allowed error {allowed.reshape(-1)[worst].item():.3g}"
    )


def assert_row_output(
    name: str, actual: Tensor, expected: Tensor, logits_dtype: torch.dtype, size: Tensor | float = 1.0
) -> None:
    """One field of per-row results.

    size: the magnitude that the bound is relative to where it is more than the result itself (see above).
    """
    wanted = torch.float64 if logits_dtype == torch.float64 else torch.float32
    wanted = torch.bool if name == "is_top1" else wanted
    assert actual.dtype == wanted, f"{name} is {actual.dtype}, expected {wanted}"
    scale = torch.maximum(expected.detach().abs(), torch.as_tensor(size, dtype=torch.float64)).clamp_min(1)
    bound = FLOAT64 if logits_dtype == torch.float64 else ROW_BOUNDS[name]
    assert_within(actual, expected, (bound * scale).nan_to_num(posinf=0.0) if bound else 0.0, name)


def gradient_allowance(expected: Tensor, terms: Terms, dtype: torch.dtype) -> Tensor:
    """How far each entry of a gradient of this dtype may be from the float64 gradient.

    expected: the float64 gradient, `[..., V]`.
    terms: per entry, the terms it is the sum of (`oracle.gradient_terms`).
    """
    size = torch.maximum(terms.size, expected.abs())
    largest = expected.abs().amax(-1, keepdim=True)
    if dtype == torch.float64:
        return FLOAT64 * torch.maximum(size, largest)
    if dtype == torch.float32:
        of_row = torch.maximum(GRADIENT_OF_ROW * largest, CANCELLATION * size)
        return torch.minimum(GRADIENT_OF_TERMS * size, of_row) + terms.unsure + SMALLEST
    one = ulp(expected, dtype)
    may_be_zero = (expected.abs() < BF16_SMALLEST_NORMAL + terms.unsure + one) & (dtype == torch.bfloat16)
    flushed = torch.where(may_be_zero, expected.abs(), 0.0)
    return torch.maximum(one, one / 2 + CANCELLATION * size) + terms.unsure + flushed


def assert_gradient(actual: Tensor, expected: Tensor, terms: Terms, what: str = "gradient") -> None:
    """A gradient with respect to logits, in the logits' dtype."""
    assert_within(actual, expected, gradient_allowance(expected, terms, actual.dtype), what)


def loss_allowance(expected: Tensor, sensitivity: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of a preference loss: the log-probs' own bound carried through the formula, and a few roundings.

    sensitivity: change of the loss when every log-prob moves by max(1, |itself|) (`oracle.Loss`).
    """
    if dtype == torch.float64:
        return FLOAT64 * (1 + expected.abs() + sensitivity)
    return ROW_BOUNDS["logps"] * sensitivity + 4 * EPS32 * expected.abs().clamp_min(1)


def assert_head_gradient(
    actual: Tensor, expected: Tensor, size: Tensor, head_size: float, products: torch.dtype, what: str
) -> None:
    """A gradient with respect to hidden states, weight or bias, in their dtype.

    expected: the float64 gradient.
    size: the sum of the absolute values of each entry's terms (`oracle.HeadGradient.sizes`).
    head_size: what the rounding of the logits goes by.
    products: the dtype that the products take.
    """
    expected, size = expected.double(), torch.maximum(size, expected.abs()).double()
    if products == torch.float64:
        assert_within(actual, expected, FLOAT64 * head_size * (size + 1e-3), what)
        return
    widest = max((products, actual.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    allowed = HEAD_GRADIENT * (1 + head_size) * size + SMALLEST
    if widest != torch.float32:
        unit = torch.finfo(widest).eps / 2
        allowed = allowed + unit * (2 * size + 3 * expected.abs()) + torch.finfo(widest).smallest_normal * unit
    assert_within(actual, expected, allowed, what)
    norm = expected.square().sum()
    if norm > 0:
        scale = ((actual.detach().cpu().double() * expected.cpu()).sum() / norm.cpu()).item()
        few = 1 + 10 / expected.numel()  # roundings of a few entries do not average out
        assert abs(scale - 1) <= few * HEAD_SCALE[widest], f"{what}: too large by {scale - 1:.2g}"


def refuses(error, *words, call):
    """`call` raises this type with all these words in its message."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type is error, f"{caught.type.__name__} instead of {error.__name__}: {message}"
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
