"""Argument checks shared by the public functions. Each names the argument, what came and what was expected."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(value: Any, name: str) -> Tensor:
    """`value`, if it is a tensor with strides (not a sparse one)."""
    if not isinstance(value, Tensor):
        hint = f"; pass its .weight ({name} is a tensor)" if isinstance(value, torch.nn.Linear) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hint}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    return value


def logits(value: Any, name: str, last: str = "V") -> Tensor:
    """Logits, or hidden states: floating point, `[..., V]` or `[..., H]`, last dimension contiguous."""
    value = tensor(value, name)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dim() < 2:
        raise ValueError(f"{name} must have shape [..., {last}] with at least one row dimension, got {_shape(value)}")
    size = value.shape[-1]
    if size == 0:
        raise ValueError(
            f"{name} has an empty {'vocabulary' if last == 'V' else 'last dimension'}: shape {_shape(value)}"
        )
    if size > 1 and value.stride(-1) != 1:
        swapped = value.stride(-2) == 1 and value.shape[-2] > 1
        hint = f"; {last} has to be last: if it is dimension -2 here, pass {name}.transpose(-1, -2)" if swapped else ""
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got shape {_shape(value)} with strides"
            f" {tuple(value.stride())}; use {name}.contiguous(){hint}"
        )
    return value


def dense_or_packed(value: Any, name: str, last: str, packed: bool, paired: bool = True) -> Tensor:
    """Rows of whole sequences: `[2B, T, last]`, or `[N, last]` of a packed batch.

    paired: whether the sequences are the 2B of B pairs.
    """
    value = tensor(value, name)
    if value.dim() != (2 if packed else 3):
        expected = f"[N, {last}] with cu_seqlens"
        if not packed:
            expected = f"[{'2B' if paired else 'S'}, T, {last}], or {expected}"
        raise ValueError(f"{name} must have shape {expected}; got {_shape(value)}")
    return value


# Attribute set on the storage that an in-place backward has turned into a gradient: the version of its tensors at that
# moment, so that logits refilled since then are accepted again. All views share both, the storage and the version.
_OVERWRITTEN = "_qkernels_overwritten"


def not_overwritten(logits: Tensor, name: str) -> None:
    """RuntimeError for logits that an in-place backward has overwritten."""
    if torch.compiler.is_compiling():  # traced tensors have no storage; the compiler tracks mutations itself
        return
    mark = getattr(logits.untyped_storage(), _OVERWRITTEN, None)
    # The mark first: tensors of inference mode have no version, and no backward can have overwritten them.
    if mark is not None and mark == logits._version:
        raise RuntimeError(
            f"{name} no longer holds logits: a backward with inplace_backward=True wrote the gradient over them"
        )


def mark_overwritten(logits: Tensor) -> None:
    """Let `not_overwritten` refuse these logits as they are now."""
    setattr(logits.untyped_storage(), _OVERWRITTEN, logits._version)


def labels(value: Any, of: Tensor, of_name: str) -> Tensor:
    """Labels aligned with the rows of the logits: int64, `[...]`, same device."""
    value = tensor(value, "labels")
    if value.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {value.dtype}")
    if value.shape != of.shape[:-1]:
        raise ValueError(
            f"labels must have shape {_shape(of)[:-1]}, one for each row of {of_name} {_shape(of)}, got {_shape(value)}"
        )
    same_device(value, "labels", of, of_name)
    return value


def like(value: Any, name: str, shape: torch.Size, of: Tensor, of_name: str) -> Tensor:
    """A floating-point tensor of that shape on the device of another."""
    value = tensor(value, name)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {_shape(value)}")
    same_device(value, name, of, of_name)
    return value


def same_device(value: Tensor, name: str, of: Tensor, of_name: str) -> None:
    """Two arguments on one device."""
    if value.device != of.device:
        raise ValueError(f"{name} is on {value.device}, but {of_name} is on {of.device}")


def reference_logits(value: Any, of: Tensor, of_name: str) -> Tensor:
    """Reference logits: same shape and device as the policy's; any floating dtype."""
    value = logits(value, "reference_logits")
    if value.shape != of.shape:
        raise ValueError(f"reference_logits must have the shape of {of_name}, {_shape(of)}, got {_shape(value)}")
    same_device(value, "reference_logits", of, of_name)
    # A reference is a constant. (A fp64 reference of a 16-bit policy would be rounded without a word.)
    if (value.dtype == torch.float64) != (of.dtype == torch.float64):
        raise TypeError(f"reference_logits is {value.dtype} and {of_name} {of.dtype}: use float64 for both or neither")
    return value.detach()


def positive(value: Any, name: str) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return float(value)


def integer(value: Any, name: str, least: int) -> int:
    """An int of at least that."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return value


def row_count(value: Any, name: str) -> int:
    """A number of rows, on the host: an int (or what can stand for one), 0 or more."""
    _on_the_host(value, name)
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if number < 0:
        raise ValueError(f"{name} must be 0 or more, got {number}")
    return number


def row_counts(value: Any, name: str) -> list[int]:
    """Numbers of rows, on the host: a sequence of ints, one for each sequence of a batch."""
    _on_the_host(value, name)
    listed = value if isinstance(value, (list, tuple)) else value.tolist() if hasattr(value, "tolist") else None
    if not isinstance(listed, (list, tuple)):
        raise TypeError(f"{name} must be a sequence of ints, one for each of the 2B sequences, got {_described(value)}")
    return [row_count(n, f"{name}[{i}]") for i, n in enumerate(listed)]


def _on_the_host(value: Any, name: str) -> None:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(
            f"{name} is a tensor on {value.device}, where the host would have to wait for it; pass ints, counted while"
            " the labels are on the CPU"
        )


def _described(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of shape {_shape(value)}" if isinstance(value, Tensor) else f"{name} {value!r}"


def names(value: Any, name: str) -> tuple[Any, ...]:
    """A sequence of names, and not one string, whose letters would be taken for them."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of names, got {_described(value)}")
    return tuple(value)


def ignore_index(value: Any) -> int:
    """An integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    return value


def flag(value: Any, name: str) -> bool:
    """A bool, given as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def cu_seqlens(value: Any, labels: Tensor, paired: bool = True) -> Tensor:
    """Sequence boundaries of a packed batch: int32, `[S + 1]`, from 0 to N without going back.

    paired: whether they are `[2B + 1]` of B pairs.
    """
    expected = "[2B + 1]" if paired else "[S + 1]"
    value = tensor(value, "cu_seqlens")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape {expected}, got {_shape(value)}")
    if labels.dim() != 1:
        raise ValueError(f"with cu_seqlens, labels must be packed, shape [N], got {_shape(labels)}")
    same_device(value, "cu_seqlens", labels, "labels")
    if paired:
        pairs(value.shape[0] - 1, "cu_seqlens describes")
    elif value.shape[0] == 1:
        raise ValueError("empty batch: cu_seqlens describes no sequences")
    if readable(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != labels.shape[0] or any(b < a for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"cu_seqlens must start at 0, never decrease and end at N = {labels.shape[0]}, got {_short(ends)}"
            )
    return value.contiguous()


def readable(value: Tensor) -> bool:
    """Whether the host may look at values: those of a CUDA tensor would make it wait, a traced one has none."""
    if torch.compiler.is_compiling() or value.device.type == "meta":
        return False
    return value.device.type == "cpu" or asked_to_check()


def asked_to_check() -> bool:
    """Whether the user wants checks that make the host wait for the device."""
    return os.environ.get("QKERNELS_CHECK") == "1"


def label_error(labels: Tensor, flat_index: int, vocab: int) -> IndexError:
    """The error for a label outside [0, vocab): its position in `labels` and its value."""
    position, rest = [], flat_index
    for size in reversed(labels.shape):
        position.append(rest % size)
        rest //= size
    value = labels.reshape(-1)[flat_index].item()
    if len(labels.shape) == 2 and labels.shape[0] == 1:  # a flat or packed batch: one number says where
        position = position[:1]
    where = ", ".join(str(i) for i in reversed(position))
    return IndexError(f"labels[{where}] = {value} is outside [0, {vocab}) and is not ignore_index")


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError for a label outside [0, V), where the host can look."""
    if readable(labels):
        known = labels.masked_fill(labels == ignore_index, 0)
        if known.numel() == 0:
            return
        least, most = (int(label) for label in torch.aminmax(known))
        if least < 0 or most >= vocab:
            bad = (known < 0) | (known >= vocab)
            raise label_error(labels, int(bad.reshape(-1).nonzero()[0]), vocab)


def pairs(sequences: int, what: str) -> None:
    """An even, nonzero number of sequences."""
    if sequences == 0:
        raise ValueError(f"empty batch: {what} no sequences")
    if sequences % 2:
        raise ValueError(
            f"{what} {sequences} sequences; expected an even number, the first half chosen and the second half rejected"
        )


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of a few names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def inplace(flagged: Any, target: Tensor, name: str, others: dict[str, Tensor | None]) -> bool:
    """Whether the backward may write over `target`: no element twice in memory, nothing else in its storage."""
    if not flag(flagged, "inplace_backward"):
        return False
    if torch.compiler.is_compiling() or target.numel() == 0:
        return True
    reach = 1  # elements spanned by the dimensions looked at so far; the next stride has to step over them
    for stride, size in sorted((s, n) for s, n in zip(target.stride(), target.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(
                f"inplace_backward needs {name} with memory of its own for each row; got an expanded or overlapping"
                f" view, shape {_shape(target)} with strides {tuple(target.stride())}"
            )
        reach += (size - 1) * stride
    storage = target.untyped_storage().data_ptr()
    for other_name, other in others.items():
        if other is not None and other.untyped_storage().data_ptr() == storage and storage:
            raise ValueError(
                f"inplace_backward would overwrite {other_name}, which shares its storage with {name};"
                f" clone it or leave inplace_backward out"
            )
    return True


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"
