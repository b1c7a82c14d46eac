"""Row operations from hidden states: chunk by chunk, logits come into being, are used and are overwritten.

Four passes over the valid rows of a batch. Rows with an ignored label are dropped before the first product. With
g = onehot - p and c the coefficient dL/dlogp of a row, dX_i = c_i (g_i W) and dW = sum_i g_i^T (c_i x_i):

    stats           per-row results                                                  1 product
    unit_gradient   the same and (g W), which a row's coefficient scales later       2 products
    pair_gradients  the same and dX, dW of a loss that is known pair by pair         3 products
    gradients       dX, dW for given coefficients, logits made again                 3 products

A chunk holds fp32 logits and, where products take 16 bits, the gradient rounded once to them; otherwise the gradient is
written over the logits. fp16 has too few exponents for a gradient times a small coefficient: there rows of g are formed
for coefficients scaled to 1, and the scale is applied to the `[n, H]` sides of the products. What waits for an upstream
gradient (a loss scaler's, as a rule) waits in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..core.coefficients import coefficients as coefficients_of
from ..core.columns import BIT, STATE, column_index, column_names, stats_dtype
from ..core.memory import empty
from ..distributed.vocab_parallel import IGNORED, Shard
from .products import Head, WeightGrad, block_bytes, gradient_dtype


class Model(NamedTuple):
    """Hidden states `[N, H]` and the head that makes logits of them: weight `[V, H]`, bias `[V]` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class LinearConfig(NamedTuple):
    """What the passes do besides reading their tensors.

    columns: bit mask of the per-row results (`qkernels.core.columns`).
    dtype, reference_dtype: of the products (autocast's, or the inputs' own).
    chunk_rows: rows of logits that exist at a time.
    valid_rows: how many rows count, where the caller has said so.
    shard: this rank's part of the vocabulary, whose columns the heads hold; None where they hold all. All ranks walk
        the same chunks: two small all-reduces make their per-row results those of whole rows, and dX is summed.
    """

    columns: int
    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    dtype: torch.dtype
    reference_dtype: torch.dtype
    chunk_rows: int
    backend: str
    valid_rows: int | None = None
    shard: Shard | None = None

    def for_op(self) -> tuple:
        """As the arguments of an op: ops are for torch.compile, which never sees a shard."""
        return self[:-1]

    @property
    def row_temperature(self) -> float:
        """What divides the logits that `Head.logits` makes: the logit scale is folded in unless a softcap follows."""
        return self.temperature if self.softcap is not None else self.temperature / self.logit_scale


Selection = Tensor | slice  # rows of a batch: their numbers, or a range where all of them are meant


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for its upstream factor: fp16 would have lost what loss scaling saves."""
    return torch.float32 if dtype == torch.float16 else dtype


def bytes_per_row(
    vocab: int, device: torch.device, dtype: torch.dtype, reference_dtype: torch.dtype | None, grad: bool, capped: bool
) -> int:
    """Bytes that one row of a chunk takes: its logits (both models') and its gradient."""
    wide = stats_dtype(dtype).itemsize
    size = wide + (0 if reference_dtype is None else stats_dtype(reference_dtype).itemsize)
    if grad:
        narrow = gradient_dtype(device, dtype).itemsize
        size += (narrow if narrow < wide else 0) + (wide if capped else 0)
    return vocab * size


def bytes_besides(
    policy: Model,
    reference: Model | None,
    dtype: torch.dtype,
    reference_dtype: torch.dtype | None,
    plan: str,
    needs: Sequence[bool],
    rows_: int,
    chunks: int,
) -> int:
    """Bytes that a plan takes besides the chunk's buffers and the gradients themselves, some numbers per row left out.

    Args:
        plan: its name.
        needs: whether hidden states, weight and bias need a gradient.
        rows_: rows of a chunk.
        chunks: how many there are.
    """
    vocab, hidden = policy.weight.shape
    device = policy.hidden.device
    products = gradient_dtype(device, dtype)
    # A chunk's hidden states as they come and as the product packs them, their gradient, and the part of the head that
    # is at work at a time.
    size = rows_ * hidden * (2 * dtype.itemsize + products.itemsize)
    size += block_bytes(device, dtype, vocab, hidden, rows_, plan != "frozen_head" and needs[1] and chunks > 1)
    if reference is not None and reference_dtype is not None:
        size += rows_ * reference.hidden.shape[1] * reference_dtype.itemsize
    # Heads that are not in the products' dtype (autocast) are cast once.
    for model, of_model in ((policy, dtype), (reference, reference_dtype)):
        if model is not None and of_model is not None and model.weight.dtype != of_model:
            size += model.weight.numel() * of_model.itemsize
    if plan == "frozen_head":
        size += policy.hidden.numel() * kept_dtype(dtype).itemsize
    elif needs[1]:
        summed = products if chunks <= 1 else stats_dtype(dtype)
        if summed != policy.weight.dtype:
            size += policy.weight.numel() * summed.itemsize
    if plan == "pair_chunks" and needs[0] and kept_dtype(policy.hidden.dtype) != policy.hidden.dtype:
        size += policy.hidden.numel() * kept_dtype(policy.hidden.dtype).itemsize
    return size


def valid_rows(labels: Tensor, ignore_index: int, number: int | None = None) -> Tensor:
    """Numbers of the rows whose label counts, `[M]`. On a GPU the host waits for M here unless it passes `number`.

    Of a `number` too small the last rows are missing, of one too large the first row of all follows the others: wrong,
    but no number is outside of the batch.
    """
    counts = labels != ignore_index
    return (counts.nonzero() if number is None else counts.nonzero_static(size=number, fill_value=0)).squeeze(1)


class _Chunk(NamedTuple):
    """Rows under work: their hidden states in the products' dtype, labels `[1, n]`, logits `[1, n, V]`."""

    where: Selection
    x: Tensor
    labels: Tensor
    logits: Tensor
    reference: Tensor | None


class Pass:
    """One walk over the valid rows of a batch, with the buffers that all its chunks share."""

    def __init__(
        self, policy: Model, reference: Model | None, labels: Tensor, config: LinearConfig, valid: Tensor | None = None
    ):
        self.policy, self.reference, self.labels, self.config = policy, reference, labels, config
        self.valid = valid
        self.backend = backends.get(config.backend)
        self.head = Head(
            policy.weight.to(config.dtype),
            None if policy.bias is None else policy.bias.to(stats_dtype(config.dtype)),
            config.softcap,
            config.logit_scale,
        )
        self.reference_head = None
        if reference is not None:
            self.reference_head = Head(
                reference.weight.to(config.reference_dtype),
                None if reference.bias is None else reference.bias.to(stats_dtype(config.reference_dtype)),
                config.softcap,
                config.logit_scale,
            )
        self.wide = stats_dtype(config.dtype)
        self.narrow = gradient_dtype(labels.device, config.dtype)
        self._buffers: dict[str, Tensor] = {}
        self._largest = 0

    def selections(self) -> list[Selection]:
        """The valid rows in chunks, in order."""
        config = self.config
        index = self.valid
        if index is None:
            index = valid_rows(self.labels, config.ignore_index, config.valid_rows)
        n, size = index.shape[0], config.chunk_rows
        if n == self.labels.shape[0]:
            return [slice(start, min(n, start + size)) for start in range(0, n, size)]
        return list(index.split(size)) if n else []

    def _buffer(self, name: str, rows_: int, dtype: torch.dtype) -> Tensor:
        """`[rows, V]`, the same memory for every chunk: made once, for the largest of them."""
        if name not in self._buffers:
            self._buffers[name] = empty((self._largest, self.head.vocab), dtype, self.labels.device)
        return self._buffers[name][:rows_]

    def chunks(self, selections: Sequence[Selection]) -> Iterator[_Chunk]:
        """Make the logits of one selection of rows after the other."""
        self._largest = max((_length(s) for s in selections), default=0)
        for where in selections:
            x = _rows(self.policy.hidden, where).to(self.config.dtype)
            logits = self._buffer("logits", x.shape[0], self.wide)
            self.head.logits(x, logits)
            reference = None
            if self.reference is not None and self.reference_head is not None:
                dtype = stats_dtype(self.config.reference_dtype)
                reference = self._buffer("reference", x.shape[0], dtype)
                self.reference_head.logits(
                    _rows(self.reference.hidden, where).to(self.config.reference_dtype), reference
                )
                reference = reference.unsqueeze(0)
            yield _Chunk(where, x, _rows(self.labels, where).unsqueeze(0), logits.unsqueeze(0), reference)

    def stats(self, chunk: _Chunk, columns: int) -> Tensor:
        """`[K, 1, n]`: the per-row results of a chunk."""
        config = self.config
        args = (chunk.logits, chunk.labels, chunk.reference, columns, config.row_temperature, config.ignore_index)
        result: Tensor = (
            self.backend.row_stats(*args) if config.shard is None else config.shard.row_stats(*args, self.backend)
        )
        return result

    def gradient(self, chunk: _Chunk, stats: Tensor, coefficients: Tensor) -> Tensor:
        """dL/dl of a chunk's own logits, `[n, V]`, in the dtype of the products; the logits are gone afterwards.

        Args:
            chunk: with its logits.
            stats: `[3 or 6, 1, n]`, the states of the models.
            coefficients: `[1 or 5, 1, n]`, see `qkernels.core.coefficients`.
        """
        config, n = self.config, chunk.labels.shape[1]
        reference_state = stats[3:6] if coefficients.shape[0] > 1 and stats.shape[0] >= 6 else None
        reference = chunk.reference if reference_state is not None else None
        labels, state, ignore_index = chunk.labels, stats[:3], config.ignore_index
        if config.shard is not None:
            labels, state, coefficients = config.shard.gradient_inputs(
                chunk.logits, labels, state, coefficients, config.row_temperature, ignore_index
            )
            ignore_index = IGNORED
        args = (labels, reference, state, reference_state, coefficients, None)
        how = (config.row_temperature, ignore_index)
        if config.softcap is not None:
            grad = self._buffer("capped", n, self.wide)
            self.backend.row_grad_into(grad.unsqueeze(0), chunk.logits, *args, *how)
            out = grad if self.narrow == self.wide else self._buffer("grad", n, self.narrow)
            self.head.uncap(chunk.logits[0], grad, out)
            return out
        if self.narrow == self.wide:
            self.backend.row_grad_(chunk.logits, *args, *how)
            return chunk.logits[0]
        out = self._buffer("grad", n, self.narrow)
        self.backend.row_grad_into(out.unsqueeze(0), chunk.logits, *args, *how)
        return out


def _length(where: Selection) -> int:
    return where.stop - where.start if isinstance(where, slice) else where.shape[0]


def _rows(tensor: Tensor, where: Selection) -> Tensor:
    return tensor[where] if isinstance(where, slice) else tensor.index_select(0, where)


def _put(target: Tensor, where: Selection, values: Tensor, dim: int = 0) -> None:
    """target[where] = values along `dim`."""
    if isinstance(where, slice):
        target.narrow(dim, where.start, where.stop - where.start).copy_(values)
    else:
        target.index_copy_(dim, where, values.to(target.dtype))


def _without_autocast(function: Callable) -> Callable:
    """Run without gradients and without autocast: the dtypes of the products have been chosen."""

    def run(policy: Model, reference: Model | None, labels: Tensor, *args):
        with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
            return function(policy, reference, labels, *args)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


@_without_autocast
def stats(
    policy: Model, reference: Model | None, labels: Tensor, config: LinearConfig, valid: Tensor | None = None
) -> Tensor:
    """The columns of `config` for each row, `[K, N]`; 0 at ignored rows. One product per model.

    Args (of all passes):
        valid: `valid_rows` of the labels, where they are known already.
    """
    work = Pass(policy, reference, labels, config, valid)
    result = torch.zeros(config.columns.bit_count(), labels.shape[0], dtype=work.wide, device=labels.device)
    for chunk in work.chunks(work.selections()):
        _put(result, chunk.where, work.stats(chunk, config.columns)[:, 0], 1)
    return result


@_without_autocast
def unit_gradient(
    policy: Model, reference: Model | None, labels: Tensor, config: LinearConfig, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The columns and d logp / d hidden, `[K, N]` and `[N, H]` in `kept_dtype` of the products. Two products."""
    work = Pass(policy, reference, labels, config, valid)
    result = torch.zeros(config.columns.bit_count(), labels.shape[0], dtype=work.wide, device=labels.device)
    unit = torch.zeros(policy.hidden.shape, dtype=kept_dtype(config.dtype), device=labels.device)
    for chunk in work.chunks(work.selections()):
        values = work.stats(chunk, config.columns | STATE)
        _put(result, chunk.where, _only(values, config.columns | STATE, config.columns)[:, 0], 1)
        ones = torch.ones_like(values[:1])
        _put(unit, chunk.where, work.head.input_grad(work.gradient(chunk, values[:3], ones)))
    return result, unit


def _only(stats_: Tensor, have: int, want: int) -> Tensor:
    """The wanted columns of a buffer that has more."""
    if have == want:
        return stats_
    return stats_[[column_index(have, name) for name in column_names(want)]]


class _Gradients:
    """dX, dW and db of a pass, from coefficients, in `dtypes` of hidden states, weight and bias."""

    def __init__(self, work: Pass, needs: Sequence[bool], dtypes: Sequence[torch.dtype | None], chunks: int):
        self.work, self.dtypes = work, dtypes
        hidden = work.policy.hidden
        self.hidden = torch.zeros(hidden.shape, dtype=dtypes[0], device=hidden.device) if needs[0] else None
        self.weight = WeightGrad(work.head, needs[1], needs[2], chunks)

    def add(self, chunk: _Chunk, states: Tensor, coefficients: Tensor) -> None:
        scale, x = None, chunk.x
        if self.work.narrow == torch.float16:
            scale = coefficients.abs().amax(0, keepdim=True)
            scale = torch.where(scale > 0, torch.exp2(scale.log2().ceil()), 1.0)
            coefficients = coefficients / scale
            scale = scale.view(-1, 1)
        g = self.work.gradient(chunk, states, coefficients)
        dx = None
        if self.hidden is not None:
            dx = self.work.head.input_grad(g)
            dx = dx if scale is None else dx.float() * scale
        shard = self.work.config.shard
        summed = None if dx is None or shard is None else shard.sum_(dx)  # while the product of dW runs
        if scale is not None:
            # The rows' own scales, relative to the largest, ride on x; the largest on the sum.
            top = scale.amax()
            self.weight.add(g, (x.float() * (scale / top)).to(x.dtype), scale.view(-1), top)
        else:
            self.weight.add(g, x)
        if self.hidden is not None and dx is not None:
            _put(self.hidden, chunk.where, dx if summed is None else summed())

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, bias = self.weight.result(self.dtypes[1], self.dtypes[2])
        return self.hidden, weight, bias


@_without_autocast
def gradients(
    policy: Model,
    reference: Model | None,
    labels: Tensor,
    states: Tensor,
    coefficients: Tensor,
    needs: Sequence[bool],
    config: LinearConfig,
    valid: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/dhidden, dL/dweight, dL/dbias (None where not needed) from coefficients; the logits are made again.

    Args:
        states: `[3 or 6, N]`, the states of the models from `stats`.
        coefficients: `[1 or 5, N]`, see `qkernels.core.coefficients`; a reference is read only by five.
        needs: which of the three are wanted.
    """
    work = Pass(policy, reference if coefficients.shape[0] > 1 else None, labels, config, valid)
    selections = work.selections()
    total = _Gradients(work, needs, [None if x is None else x.dtype for x in policy], len(selections))
    for chunk in work.chunks(selections):
        at = (slice(None), chunk.where)
        total.add(chunk, states[at].unsqueeze(1), coefficients[at].unsqueeze(1))
    return total.result()


@_without_autocast
def pair_gradients(
    policy: Model,
    reference: Model | None,
    labels: Tensor,
    selections: Sequence[Selection],
    objective: Callable[[int, Tensor], Mapping[str, Tensor]],
    needs: Sequence[bool],
    config: LinearConfig,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The columns and the gradients of a loss whose coefficients are known once a chunk's columns are. Three products.

    The gradients are in `kept_dtype` of the inputs: an upstream gradient is still to come.

    Args:
        selections: the rows of each chunk: whole pairs.
        objective: number of the chunk, its columns `[K, 1, n]` -> dL/dcolumn `[1, n]` by name.
        needs: which of hidden, weight, bias need a gradient.
    """
    work = Pass(policy, reference, labels, config)
    columns = config.columns
    result = torch.zeros(columns.bit_count(), labels.shape[0], dtype=work.wide, device=labels.device)
    total = _Gradients(work, needs, [None if x is None else kept_dtype(x.dtype) for x in policy], len(selections))
    for number, chunk in enumerate(work.chunks(selections)):
        values = work.stats(chunk, columns)
        _put(result, chunk.where, values[:, 0], 1)
        coefficients = coefficients_of(values, objective(number, values), columns)
        states = values[:6] if columns & BIT["reference_row_max"] else values[:3]
        total.add(chunk, states, coefficients)
    return result, total.result()
