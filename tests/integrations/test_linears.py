"""Linear layers of a body by this package's fp32 GEMM: values, gradients, and which layers are left to torch.

A bound between two GEMMs is what each may err: `EPS32` of the sum of absolute products, 16 times (see
tests/head/test_product.py).
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from assertions import EPS32, assert_within
from cases import generator
from qkernels.backends import cpu
from qkernels.integrations import linears
from qkernels.integrations.linears import faster_linears

kernel_here = cpu.gemm_kernel("logits", torch.float32) is not None
needs_kernel = pytest.mark.skipif(not kernel_here, reason="the fp32 GEMM needs AVX-512")


@pytest.fixture
def calls(monkeypatch):
    """GEMMs of the extension that were run, on a processor where they are taken for the faster ones."""
    monkeypatch.setattr(cpu, "vendor", "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    names, real = [], cpu.gemm
    monkeypatch.setattr(cpu, "gemm", lambda name, *rest: (names.append(name), real(name, *rest)))
    return names


def layer_and_input(*shape: int, bias: bool = True):
    made = generator(*shape)
    layer = nn.Linear(40, 50, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=made))
    return layer, torch.randn(*shape, 40, generator=made, requires_grad=True)


def within_rounding(actual, left, right, added=0.0) -> None:
    exact = left.double() @ right.double() + added
    assert_within(actual, exact, 16 * EPS32 * (left.double().abs() @ right.double().abs() + abs(added)) + 1e-30, "GEMM")


@needs_kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 7), (2, 3, 5)])
def test_values_and_gradients(calls, shape, bias):
    layer, x = layer_and_input(*shape, bias=bias)
    with faster_linears(layer):
        out = layer(x)
        upstream = torch.randn(out.shape, generator=generator(7))
        out.backward(upstream)
    assert calls == ["logits", "dX", "dW"] and out.shape == (*shape, 50)
    rows, grads, weight = x.detach().reshape(-1, 40), upstream.reshape(-1, 50), layer.weight.detach()
    within_rounding(out.detach().reshape(-1, 50), rows, weight.t(), layer.bias.detach().double() if bias else 0.0)
    within_rounding(x.grad.reshape(-1, 40), grads, weight)
    within_rounding(layer.weight.grad, grads.t(), rows)
    if bias:
        within_rounding(layer.bias.grad[None], torch.ones(1, len(grads)), grads)


@needs_kernel
def test_an_error_of_one_percent_is_seen(calls, monkeypatch):
    real = linears.multiply
    monkeypatch.setattr(linears, "multiply", lambda *given: real(*given).mul_(1.01))
    with pytest.raises(AssertionError, match="GEMM"):
        test_values_and_gradients(calls, (12,), False)


@needs_kernel
def test_a_frozen_layer_keeps_no_input(calls):
    """As torch's: what LoRA does not train takes no memory for a gradient."""
    layer, x = layer_and_input(12, bias=False)
    with faster_linears(layer):
        first = layer(x.detach())
        layer.requires_grad_(False)
        frozen = layer(x)
    assert [t is None for t in first.grad_fn.saved_tensors] == [False, True]
    assert [t is None for t in frozen.grad_fn.saved_tensors] == [True, False]
    layer.requires_grad_()
    first.sum().backward()
    frozen.sum().backward()
    assert calls == ["logits", "logits", "dW", "dX"] and x.grad is not None and layer.weight.grad is not None


@needs_kernel
def test_second_derivatives(calls):
    layer, x = layer_and_input(12)

    def penalty(layer, x):
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, layer.weight))

    with faster_linears(layer):
        actual = penalty(layer, x)
    assert "logits" in calls
    expected = penalty(layer.double(), x.detach().double().requires_grad_())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@needs_kernel
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(calls, reentrant):
    model = nn.Sequential(nn.Linear(8, 20), nn.SiLU(), nn.Linear(20, 5))
    x = torch.randn(13, 8, requires_grad=True)
    with faster_linears(model):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert calls.count("logits") == 4
    actual = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for one, parameter in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-5)


class Subclass(torch.Tensor):
    pass


@needs_kernel
def test_what_is_left_to_torch(calls):
    layer, x = layer_and_input(12)
    x = x.detach()
    with faster_linears(layer), torch.inference_mode():
        layer(x[:11])  # fewer rows than a tile
        layer(x.as_subclass(Subclass))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.vmap(lambda row: layer(row.expand(12, -1)))(x)
        with pytest.raises(RuntimeError):
            layer(x[:, 1:])
        with pytest.raises(RuntimeError):
            layer(x.double())
    for dtype in (torch.float64, torch.bfloat16):
        other = nn.Linear(40, 50, dtype=dtype)
        with faster_linears(other):
            assert other(x.to(dtype)).dtype == dtype
    assert calls == []
    with faster_linears(layer):
        layer(x.t().contiguous().t())
    layer(x)
    assert calls == ["logits"] and "forward" not in vars(layer)


@needs_kernel
def test_layers_of_others_and_other_processors_are_left_alone(calls, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(12, 4)
    wrapped = nn.Sequential(model)
    wrapped.register_module("_orig_mod", model)  # what torch.compile leaves
    with faster_linears(wrapped):
        model(x)
    model[0].forward = mine = functools.partial(nn.Linear.forward, model[0])
    with faster_linears(model):
        model(x)
    assert model[0].forward is mine
    del model[0].forward
    model.__class__ = type("Causal", (nn.Sequential,), {"get_output_embeddings": lambda self: self[0]})
    with faster_linears(nn.Sequential(model)):
        model(x)
    monkeypatch.setattr(cpu, "vendor", "GenuineIntel")
    with faster_linears(model):
        model(x)
    assert calls == []


def test_a_model_elsewhere_is_left_alone():
    """Its layers would go through Python in every call, for nothing."""
    model = nn.Sequential(nn.Linear(3, 3)).to("meta")
    with faster_linears(model):
        assert "forward" not in vars(model[0])
