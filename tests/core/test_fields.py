"""Fields and coefficients: one order, in Python and in the compiled code."""

from __future__ import annotations

import pytest

from qkernels.core.coefficients import COEFFICIENTS
from qkernels.core.fields import BIT, FIELDS


@pytest.mark.quick
def test_fields_have_one_order_in_python_and_cpp():
    """csrc/core/fields.h repeats the order of qkernels/core/fields.py."""
    compiled = pytest.importorskip("qkernels._C", reason="the compiled extension is missing")
    assert tuple(compiled.field_names()) == FIELDS
    assert tuple(compiled.coefficient_names()) == COEFFICIENTS
    assert list(BIT) == list(FIELDS) and list(BIT.values()) == [1 << i for i in range(len(FIELDS))]
