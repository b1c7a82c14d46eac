"""The row operations as torch.library ops: what torch.compile sees, and the one place that calls a backend.

Contracts of the three operations stand at their arguments, in `qkernels.core.calls`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.calls import PairLoss, RowGrad, RowStats
from ..core.fields import stats_dtype
from ..core.operations import NAMESPACE, Operation, Traits
from . import get

_library = torch.library.Library(NAMESPACE, "DEF")


def _row_stats(call: RowStats) -> Tensor:
    result: Tensor = get(call.backend).row_stats(call)
    return result


def _row_stats_fake(call: RowStats) -> Tensor:
    return call.logits.new_empty((call.fields.bit_count(), *call.labels.shape), dtype=stats_dtype(call.logits.dtype))


def _row_grad(call: RowGrad) -> Tensor:
    result: Tensor = get(call.backend).row_grad(call)
    return result


def _row_grad_fake(call: RowGrad) -> Tensor:
    return torch.empty_like(call.logits, memory_format=torch.contiguous_format)


def _row_grad_(call: RowGrad) -> None:
    get(call.backend).row_grad_(call)


def _pair_loss(call: PairLoss) -> tuple[Any, ...]:
    results: tuple[Any, ...] = get(call.backend).pair_loss(call)
    return results


row_stats = Operation(_library, "row_stats", RowStats, "Tensor", run=_row_stats, fake=_row_stats_fake)
row_grad = Operation(_library, "row_grad", RowGrad, "Tensor", run=_row_grad, fake=_row_grad_fake)
row_grad_ = Operation(
    _library, "row_grad_", RowGrad, "()", run=_row_grad_, fake=lambda call: None, traits=Traits(mutates="logits")
)
pair_loss = Operation(
    _library, "pair_loss", PairLoss, "(Tensor, Tensor, Tensor, Tensor)", run=_pair_loss, fake=PairLoss.outputs
)
