"""What the passes over hidden states work on, each fact declared once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.fields import DIVERGENCES, stats_dtype
from ..distributed.vocab_parallel import Shard


def apart(fields: int, dtype: torch.dtype, reference_dtype: torch.dtype, shard: Shard | None) -> bool:
    """Whether the logits of the reference make room for the policy's, in the same memory.

    They do where no field reads both, and no exchange between ranks would become two.

    Args:
        fields: bit mask of the per-row results.
        dtype, reference_dtype: of the GEMMs.
        shard: this rank's shard of the vocabulary, or None.
    """
    return not fields & DIVERGENCES and shard is None and stats_dtype(dtype) == stats_dtype(reference_dtype)


class Model(NamedTuple):
    """Hidden states `[N, H]` and the head that makes logits of them: weight `[V, H]`, bias `[V]` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class HeadConfig(NamedTuple):
    """What the passes do besides reading their tensors.

    fields: bit mask of the per-row results (`qkernels.core.fields`).
    temperature, softcap, logit_scale: logits are softcap * tanh(logit_scale * l / softcap) / temperature.
    ignore_index: the label of rows that are left out.
    dtype, reference_dtype: of the GEMMs (autocast's, or the inputs' own).
    chunk_rows: rows of logits that exist at a time.
    backend: name of the one that runs the row operations.
    rounded: whether logits are rounded to the dtype of the GEMMs, as a head with a 16-bit result rounds them.
    valid_rows: the number of valid rows, where the caller has given it.
    shard: this rank's shard of the vocabulary, whose columns the heads hold; None where they hold all. All ranks go
        through the same chunks: two small all-reduces make their per-row results those of whole rows, and dX is summed.
    """

    fields: int
    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    dtype: torch.dtype
    reference_dtype: torch.dtype
    chunk_rows: int
    backend: str
    rounded: bool
    valid_rows: int | None = None
    shard: Shard | None = None

    @property
    def row_temperature(self) -> float:
        """What divides the logits that `Head.logits` makes: the logit scale is folded in unless a softcap follows."""
        return self.temperature if self.softcap is not None else self.temperature / self.logit_scale


class HeadCall(NamedTuple):
    """The arguments of a pass.

    reference: the reference model, a constant; None where nothing reads it.
    labels: contiguous int64 `[N]`.
    valid: `[M]`, the indices of the valid rows; None where the host does not know how many there are, or compiles.
    temperatures: `[N]`, in the dtype of the results, divide the logits of each row besides `config.temperature`; None
        for 1.
    """

    policy: Model
    reference: Model | None
    labels: Tensor
    config: HeadConfig
    valid: Tensor | None = None
    temperatures: Tensor | None = None
