"""Makes a backend wrong by 1 % in one place, and expects the comparison made for that place to fail."""

from __future__ import annotations

import pytest

from qkernels.backends import takes
from qkernels.core.calls import RowStats
from qkernels.core.fields import BIT, field_index

SLIGHTLY = 1.01


def expect_failure(check, perturb) -> None:
    """`check` passes, and raises AssertionError once `perturb` has been called."""
    check()
    perturb()
    with pytest.raises(AssertionError):
        check()


def perturb_field(monkeypatch, backend, name: str, factor: float = SLIGHTLY):
    """Make `row_stats` return one field scaled (0 and 1 exchanged for is_top1)."""
    real = backend.module.row_stats

    @takes(RowStats)
    def wrong(call):
        stats = real(call).clone()
        if call.fields & BIT[name]:
            field = stats[field_index(call.fields, name)]
            field.copy_(1 - field if name == "is_top1" else field * factor)
        return stats

    return lambda: monkeypatch.setattr(backend.module, "row_stats", wrong)
