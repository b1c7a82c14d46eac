"""Columns and coefficients: one order, in Python and in the compiled code."""

from __future__ import annotations

import pytest

from qkernels.core.coefficients import COEFFICIENTS
from qkernels.core.columns import BIT, COLUMNS


@pytest.mark.quick
def test_columns_have_one_order_in_python_and_cpp():
    """csrc/core/columns.h repeats the order of qkernels/core/columns.py."""
    compiled = pytest.importorskip("qkernels._C", reason="the compiled extension is missing")
    assert tuple(compiled.column_names()) == COLUMNS
    assert tuple(compiled.coefficient_names()) == COEFFICIENTS
    assert list(BIT) == list(COLUMNS) and list(BIT.values()) == [1 << i for i in range(len(COLUMNS))]
