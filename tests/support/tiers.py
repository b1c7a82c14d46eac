"""When a case runs: on every change (`make quick`), before a merge (`make test`), or every night (`make nightly`).

A test that is marked `nightly` or `quick` is so with all its cases. Of a test with parameters,

    @pytest.mark.nightly_except(name=("sigmoid", "rspo"), dtype=(torch.float32,))
    @pytest.mark.nightly_cases(name=("rspo",), packed=(True,))
    @pytest.mark.quick_cases(name=("sigmoid",))

leaves to the nightly run the cases with another name or another dtype, and those that have both the name "rspo" and are
packed; it takes those with the name "sigmoid" that are not left to it into the quick one. A backend is given by its
name. What is left to the nightly run repeats lines that other cases run: products of objectives, backends and dtypes,
longer sweeps. `make coverage` prints the lines of the package for which that is not so.

The torch backend casts 16-bit logits to fp32 and goes on as with fp32, so its 16-bit cases are left to the nightly run
but in tests marked `every_dtype`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _name(value: Any) -> Any:
    return getattr(value, "name", value)


def _among(item: pytest.Item, marker: pytest.Mark, values: dict[str, Any]) -> bool:
    """Whether each parameter that the marker names has one of the marker's values."""
    unknown = marker.kwargs.keys() - values.keys()
    if unknown or marker.args:
        raise pytest.UsageError(f"{item.nodeid}: {marker.name} names {sorted(unknown) or marker.args}, no parameter")
    return all(_name(values[name]) in allowed for name, allowed in marker.kwargs.items())


def is_nightly(item: pytest.Item, values: dict[str, Any]) -> bool:
    """Whether this case, with these values of its parameters, is left to the nightly run."""
    if item.get_closest_marker("nightly"):
        return True
    if not all(_among(item, marker, values) for marker in item.iter_markers("nightly_except")):
        return True
    if any(_among(item, marker, values) for marker in item.iter_markers("nightly_cases")):
        return True
    cast = _name(values.get("backend")) == "torch" and values.get("dtype") in SIXTEEN_BIT
    return cast and item.get_closest_marker("every_dtype") is None


def is_quick(item: pytest.Item, values: dict[str, Any]) -> bool:
    """Whether this case runs in the quick tier; `is_nightly` comes first."""
    return any(_among(item, marker, values) for marker in item.iter_markers("quick_cases"))
