"""Every tensor argument of every public function in every memory layout: the bits of its contiguous copy, or an error.

The table of arguments is compared with the signatures, so that a new argument without a row fails. Each is passed alone
in a layout of `LAYOUTS`, all others contiguous, and outputs and gradients are compared with those of a contiguous copy.
An error has to name the argument and to say what is allowed. Products of matrices are torch's, whose order of summation
depends on the layout of the weight: gradients and outputs are compared to the bit all the same for every layout but
those of `OTHER_PRODUCT`, where they agree within the rounding of the product.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import qkernels as qk
from fuzz import wrong_calls

FUNCTIONS = wrong_calls.FUNCTIONS
# What is not a tensor, or cannot be one where there is one process. (A temperature can be one in the losses by unit.)
PLAIN = {
    "temperature", "ignore_index", "inplace_backward", "backend", "outputs", "detached", "beta", "loss_type",
    "loss_weights", "label_smoothing", "loss_kwargs", "reduction", "softcap", "logit_scale", "plan", "max_chunk_bytes",
    "tp_group", "sp_group", "logits_dtype", "on_policy", "epsilon", "epsilon_high", "delta",
    "importance_sampling_level", "importance_correction", "correction_min", "correction_max", "entropy_coef",
    "max_completion_length",
}  # fmt: skip
HIDDEN = ("reference_hidden", "reference_weight", "reference_bias")
HEAD = ("hidden", "weight", "labels", "bias", *HIDDEN, "cu_seqlens", "valid_rows", "temperature")
LOGITS = ("logits", "labels", "reference_logits", "cu_seqlens", "temperature")
POLICY = ("advantages", "old_logps", "reference_logps", "sampling_logps", "num_items_in_batch")
SEQUENCE = ("desirable", "reference_logps", "kl", "kl_logps", "kl_reference_logps", "token_weights")
# function -> its tensor arguments.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "token_logps": ("logits", "labels"),
    "token_stats": ("logits", "labels", "reference_logits"),
    "fused_token_dpo": (
        "policy_logits", "labels", "reference_logits", "reference_logps", "token_weights", "cu_seqlens",
    ),
    "linear_token_logps": ("hidden", "weight", "labels", "bias", "valid_rows"),
    "linear_token_stats": ("hidden", "weight", "labels", "bias", *HIDDEN, "valid_rows"),
    "fused_linear_token_dpo": (
        "policy_hidden", "lm_head_weight", "labels", "lm_head_bias", *HIDDEN, "reference_logps", "token_weights",
        "cu_seqlens", "valid_rows",
    ),
    "plan_linear": (
        "policy_hidden", "lm_head_weight", "labels", "lm_head_bias", *HIDDEN, "reference_logps", "token_weights",
        "cu_seqlens", "valid_rows",
    ),
    "token_mdp": ("logits", "labels", "reference_logits", "reference_logps", "cu_seqlens"),
    "shift_labels": ("labels", "mask", "cu_seqlens"),
    "fused_policy_loss": (*LOGITS, *POLICY),
    "fused_linear_policy_loss": (*HEAD, *POLICY),
    "plan_linear_policy": (*HEAD, *POLICY),
    "fused_sequence_loss": (*LOGITS, *SEQUENCE),
    "fused_linear_sequence_loss": (*HEAD, *SEQUENCE),
    "plan_linear_sequences": (*HEAD, *SEQUENCE),
}  # fmt: skip
VOCAB = 131
TRAINED = ("logits", "policy_logits", "hidden", "weight", "bias", "policy_hidden", "lm_head_weight", "lm_head_bias")
ROWS = ("logits", "policy_logits", "reference_logits", "hidden", "policy_hidden", "reference_hidden")
WEIGHTS = ("weight", "lm_head_weight", "reference_weight")


def test_the_table_has_every_argument():
    public = {name for name in qk.__all__ if inspect.isfunction(getattr(qk, name))}
    assert public == {*FUNCTIONS, "info"} == {*ARGUMENTS, "info"}
    for function in FUNCTIONS:
        named = {*ARGUMENTS[function]}
        assert {*wrong_calls.parameters(function)} - (PLAIN - named) == named, function
    assert not inspect.signature(qk.info).parameters


class Subclass(Tensor):
    """A tensor of another class, as other packages have them."""


def _memory(values: Tensor, lead: int = 0) -> bytearray:
    """The bytes of a tensor after so many others."""
    raw = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return bytearray(b"\xff" * lead + raw)


def _from_buffer(values: Tensor, lead: int) -> Tensor:
    if not values.numel():
        return values.clone()
    return torch.frombuffer(_memory(values, lead), dtype=values.dtype, offset=lead).view(values.shape)


def _mapped(values: Tensor) -> Tensor:
    if not values.numel():
        return values.clone()
    memory = mmap.mmap(-1, max(1, values.numel() * values.element_size()))
    memory.write(bytes(_memory(values)))
    return torch.frombuffer(memory, dtype=values.dtype, count=values.numel()).view(values.shape)


def _file(values: Tensor, folder: Any) -> Tensor:
    path = folder / "tensor"
    path.write_bytes(_memory(values))
    return torch.from_file(str(path), size=values.numel(), dtype=values.dtype).view(values.shape)


def _numpy_memmap(values: Tensor, folder: Any) -> Tensor:
    if values.dtype == torch.bfloat16:
        return _file(values, folder)
    path = folder / "array"
    path.write_bytes(_memory(values, 64))
    array = numpy.memmap(path, dtype=values.numpy().dtype, mode="r+", offset=64, shape=tuple(values.shape))
    return torch.from_numpy(array)


def _spread(values: Tensor, shape: tuple[int, ...], index: Any) -> Tensor:
    """`values` at some places of a larger tensor; what lies between is no legal value."""
    fill = torch.nan if values.dtype.is_floating_point else True if values.dtype == torch.bool else 2**30
    return values.new_full(shape, fill)[index].copy_(values)


def _constant(values: Tensor, dims: int) -> Tensor:
    """The first entry of the first dimension, or of all but the last, for all of them, with stride 0."""
    if not values.dim():
        return values.clone()
    index = tuple(slice(0, 1) for _ in range(dims))
    return values[index].clone().expand(values.shape)


LAYOUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "transposed": lambda t, _: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t.clone(),
    "last first": lambda t, _: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced rows": lambda t, _: _spread(t, (2 * t.shape[0] + 1, *t.shape[1:]), slice(1, None, 2)),
    "sliced columns": lambda t, _: _spread(t, (*t.shape[:-1], t.shape[-1] + 5), (..., slice(2, 2 + t.shape[-1]))),
    "one column of three": lambda t, _: _spread(t, (*t.shape, 3), (..., 1)),
    "every second column": lambda t, _: _spread(t, (*t.shape[:-1], 2 * t.shape[-1]), (..., slice(0, None, 2))),
    "expanded": lambda t, _: _constant(t, 1),
    "stride 0": lambda t, _: _constant(t, max(1, t.dim() - 1)),
    "offset": lambda t, _: _spread(t.reshape(-1), (t.numel() + 9,), slice(1, 1 + t.numel())).view(t.shape),
    "odd address": lambda t, _: _from_buffer(t, 1),
    "from a buffer": lambda t, _: _from_buffer(t, 8),
    "of a memory map": lambda t, _: _mapped(t),
    "from a file": _file,
    "of numpy's memmap": _numpy_memmap,
    "subclass": lambda t, _: t.clone().as_subclass(Subclass),
    "view of a subclass": lambda t, _: torch.cat([t, t]).as_subclass(Subclass)[: t.shape[0]],
}
# Layouts in which torch takes another product of matrices, or one that sums in another order.
OTHER_PRODUCT = {
    "transposed", "last first", "one column of three", "every second column", "expanded", "stride 0", "sliced columns",
    "odd address", "offset",
}  # fmt: skip


def arguments(function: str, argument: str, dtype: torch.dtype) -> dict[str, Any]:
    """A call in which this argument has a meaning; contiguous tensors."""
    given = wrong_calls.base(function, argument == "cu_seqlens", VOCAB, 72)
    g = torch.Generator().manual_seed(5)
    rows = given["labels"].shape
    if argument == "reference_logps":
        for name in (*HIDDEN, "reference_logits"):
            given.pop(name, None)
        given["reference_logps"] = -torch.rand(rows, generator=g) * 3
    if argument == "token_weights":
        given["token_weights"] = torch.rand(rows, generator=g) + 0.1
    if argument.endswith("bias"):
        given[argument] = torch.randn(VOCAB, generator=g)
    if argument == "mask":
        given["mask"] = torch.rand(rows, generator=g) < 0.6
    if argument == "valid_rows":
        of_sequences = function in ("fused_linear_token_dpo", "plan_linear", *wrong_calls.FROM_HIDDEN)
        given["valid_rows"] = torch.tensor([4, 4]) if of_sequences else torch.tensor(8)
    if argument == "temperature":
        given["temperature"] = torch.rand(rows, generator=g) + 0.5
    if argument == "advantages":
        given["advantages"] = torch.randn(rows, generator=g)
    if argument == "num_items_in_batch":
        given |= {"reduction": "items", "num_items_in_batch": torch.tensor(6.0)}
    if argument == "kl":
        given["kl"] = torch.tensor(0.25)
    if argument in ("kl_logps", "kl_reference_logps"):
        del given["kl"]
        given["kl_logps"], given["kl_reference_logps"] = torch.rand(2, 3, generator=g)
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def results(function: str, given: dict[str, Any]) -> dict[str, Tensor]:
    """All outputs, and the gradients of all that trains."""
    leaves = {
        name: value.detach().requires_grad_() if name in TRAINED and isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    out = FUNCTIONS[function](**leaves)
    if isinstance(out, qk.LinearPlan):
        return {"plan": out._replace(peak_bytes=0)}  # type: ignore[dict-item]
    fields = out._asdict() if hasattr(out, "_asdict") else {"result": out}
    for name in ("metrics", "stats"):
        if (several := fields.pop(name, None)) is not None:
            fields |= {f"{name}.{key}": value for key, value in several._asdict().items()}
    found = {name: value for name, value in fields.items() if value is not None}
    total = [value.double().sum() for value in found.values() if value.requires_grad]
    if total:
        torch.stack(total).sum().backward()
    found = {name: value.detach() for name, value in found.items()}
    for name, leaf in leaves.items():
        if name in TRAINED and isinstance(leaf, Tensor) and leaf.grad is not None:
            found[f"gradient of {name}"] = leaf.grad
    return found


def compare(actual: dict[str, Any], expected: dict[str, Any], layout: str, bits: bool) -> None:
    """Two calls' results: to the bit, or within a few roundings of the largest entry."""
    assert actual.keys() == expected.keys(), layout
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert actual[name] == value, f"{layout}: {name}"
            continue
        got = actual[name].as_subclass(Tensor)
        assert got.dtype == value.dtype and got.shape == value.shape, f"{layout}: {name}"
        if bits or not value.is_floating_point():
            assert torch.equal(got, value), f"{layout}: {name} differs by {(got - value).abs().max().item():.3g}"
        else:
            eps = torch.finfo(value.dtype).eps
            torch.testing.assert_close(
                got,
                value,
                rtol=8 * eps,
                atol=8 * eps * value.abs().max().clamp_min(1).item(),
                msg=f"{layout}: {name} differs by {(got - value).abs().max().item():.3g}",
            )


CASES = [(function, argument) for function, names in ARGUMENTS.items() for argument in names]


# Strides are torch's affair in the torch backend; what runs no backend runs once, by this name.
KERNELS = tuple(name for name in FUNCTIONS if not name.startswith("plan_linear") and name != "shift_labels")


@pytest.mark.nightly_cases(backend=("torch",), function=KERNELS)
@pytest.mark.nightly_cases(dtype=(torch.bfloat16,), function=tuple(name for name in KERNELS if "linear" in name))
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, argument", CASES)
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_layouts(backend, function, argument, dtype, tmp_path):
    if (function.startswith("plan_linear") or function == "shift_labels") and (backend.name, dtype) != (
        "torch",
        torch.float32,
    ):
        pytest.skip("runs no backend")
    given = arguments(function, argument, dtype)
    if "backend" in wrong_calls.parameters(function):
        given["backend"] = backend.name
    given = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in given.items()}
    for layout, lay in LAYOUTS.items():
        if argument in ("cu_seqlens", "valid_rows") and layout in ("expanded", "stride 0"):
            continue  # equal numbers are no boundaries
        laid = (
            given[argument] if given[argument].dim() == 0 else lay(given[argument].cpu(), tmp_path).to(backend.device)
        )
        copy = torch.empty(laid.shape, dtype=laid.dtype, device=laid.device)
        copy.copy_(laid.as_subclass(Tensor))
        expected = results(function, {**given, argument: copy})
        try:
            actual = results(function, {**given, argument: laid})
        except (ValueError, TypeError) as error:
            assert argument in str(error) and "contiguous" in str(error), f"{layout}: {error}"
            assert argument in ROWS and laid.stride(-1) != 1, f"{layout} is refused: {error}"
            continue
        of_product = argument in (*WEIGHTS, *ROWS) and "hidden" in _signature(function)
        compare(actual, expected, layout, bits=not (of_product and layout in OTHER_PRODUCT))


def _signature(function: str) -> str:
    return " ".join(wrong_calls.parameters(function))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows(backend, function, shape):
    """Zero-size tensors: empty results and zero gradients, or an error that says the batch is empty."""
    given = wrong_calls.base(function)
    for name, value in given.items():
        if name in (*ROWS, "labels"):
            last = value.shape[2:]
            given[name] = value.new_zeros((*shape, *last)).to(backend.device)
        elif isinstance(value, Tensor):
            per_token = value.shape == (2, 4)
            given[name] = (value.new_zeros(shape) if per_token else value).to(backend.device)
    if "backend" in wrong_calls.parameters(function):
        given["backend"] = backend.name
    by_unit = function in (*wrong_calls.POLICY, *wrong_calls.SEQUENCE)
    if shape[0] == 0 and (by_unit or "policy_logits" in given or "policy_hidden" in given):
        with pytest.raises(ValueError, match="empty batch"):
            FUNCTIONS[function](**given)
        return
    found = results(function, given)
    for name, value in found.items():
        if name in ("plan", "loss", "kl") or name.startswith("metrics."):
            continue
        if name.startswith("gradient"):
            assert bool((value == 0).all()), name
        elif name.endswith("_rewards") and name != "token_rewards" and "policy" in _signature(function):
            assert value.tolist() == [0.0]
        elif by_unit and name == "rewards":
            assert value.tolist() == [0.0, 0.0]
        else:
            assert value.shape == shape, name
    if "loss" in found:
        assert bool(found["loss"].isfinite())
