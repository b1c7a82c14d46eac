"""The arguments of the row operations, each declared once: backends take them whole, and op schemas are made of them.

Shapes: `logits` is `[S, T, V]` with a contiguous last dimension and any strides before it (a packed batch is
`[1, N, V]`); `labels` is a contiguous int64 `[S, T]`; per-row buffers are `[K, S, T]`, fp32 (fp64 for fp64 logits).
The order of every per-row buffer is in `qkernels.core.fields`. `csrc/core/calls.h` has the same structures in C++.

Build them by keyword: two neighbours of one type then cannot change places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """`row_stats`: the requested fields of each row, `[K, S, T]`. One read of each logit.

    A row with an ignored label is not read; it is 0 in every field. IndexError for a label outside [0, V) on the CPU,
    NaN in that row elsewhere.

    reference: `[S, T, V]`, the other model's logits, of any floating dtype; None where no field reads them.
    fields: bit mask of the requested ones.
    backend: name of the one that runs.
    """

    logits: Tensor
    labels: Tensor
    reference: Tensor | None
    fields: int
    temperature: float
    ignore_index: int
    backend: str = ""


class RowGrad(NamedTuple):
    """`row_grad`: dL/dlogits into a new tensor; `row_grad_`: the same over the logits' own storage.

    One read and one write of each logit. Rows that are ignored, or whose coefficients are all 0, are set to 0 without
    being read.

    softmax: `[3 or more, S, T]`, softmax statistics from `row_stats`; its first three, those of `SOFTMAX`, are read.
    reference_softmax: `[3, S, T]`, those of `REFERENCE_SOFTMAX`.
    coefficients: `[1 or 5, S, T]`, see `qkernels.core.coefficients`. The reference is read only by five of them.
    upstream: `[]`, multiplies all coefficients; on the device, in the dtype of the results. None stands for 1.
    """

    logits: Tensor
    labels: Tensor
    reference: Tensor | None
    softmax: Tensor
    reference_softmax: Tensor | None
    coefficients: Tensor
    upstream: Tensor | None
    temperature: float
    ignore_index: int
    backend: str = ""


class PairLoss(NamedTuple):
    """`pair_loss`: DPO with label smoothing from per-row log-probs, averaged over the pairs.

    Returns `(loss [], rewards [2B], dloss/dlogps [S, T], tokens [2, S, T])`: rewards are beta times the weighted sums
    of log-ratios; tokens are beta times the log-ratio of each row, and the reference's log-prob. Rows of weight 0 do
    not count, are not read, and are 0 in all results.

    logps: `[S, T]`, log pi(label).
    reference_logps: per token, `[S, T]`; per sequence, `[2B]` (tokens are `[0, S, T]` then); or None for 0.
    weights: `[S, T]`, 0 where the label is ignored; None stands for 1 elsewhere.
    cu_seqlens: int32 `[2B + 1]`, boundaries of a packed batch; None for a dense one.
    """

    logps: Tensor
    reference_logps: Tensor | None
    labels: Tensor
    weights: Tensor | None
    cu_seqlens: Tensor | None
    beta: float
    label_smoothing: float
    ignore_index: int
    backend: str = ""

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Empty tensors for the four results."""
        logps, cu_seqlens, reference = self.logps, self.cu_seqlens, self.reference_logps
        sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        per_sequence = reference is not None and reference.dim() == 1
        return (
            logps.new_empty(()),
            logps.new_empty(sequences),
            torch.empty_like(logps, memory_format=torch.contiguous_format),
            logps.new_empty(0 if per_sequence else 2, *logps.shape),
        )
