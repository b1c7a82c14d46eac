"""How results print: on one line, by shapes and types."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PRINTED = 4  # entries of a tensor that is shown by its values


def summarised(result: Any) -> str:
    """The representation of a named tuple of tensors: shapes and types, values of the smallest; nothing of None."""
    fields = [f"{name}={_in_short(value)}" for name, value in result._asdict().items() if value is not None]
    return f"{type(result).__name__}({', '.join(fields)})"


def _in_short(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = str(value.dtype).removeprefix("torch.")
    place = "" if value.device.type == "cpu" else f" on {value.device}"
    if type(value) is Tensor and value.device.type != "meta" and value.dim() < 2 and value.numel() <= _PRINTED:
        values = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in value.reshape(-1).tolist()]
        return (f"[{', '.join(values)}]" if value.dim() else values[0]) + place
    return f"<{kind} {list(value.shape)}{place}>"
