"""Row operations from hidden states: chunk by chunk, logits are computed, used and overwritten.

Four passes over the valid rows of a batch. Rows with an ignored label are dropped before the first GEMM. With
g = onehot - p and c the coefficient dL/dlogp of a row, dX_i = c_i (g_i W) and dW = sum_i g_i^T (c_i x_i):

    stats            per-row results                                                          1 GEMM
    unit_gradient    the same and (g W), which a row's coefficient scales later               2 GEMMs
    known_gradients  the same and dX, dW of a loss whose coefficients a chunk's rows tell     3 GEMMs
    gradients        dX, dW for given coefficients, logits recomputed                         3 GEMMs

A chunk holds fp32 logits, and the gradient is written over them; where GEMMs take 16 bits, it is rounded once to them
and takes the first half of that memory. fp16 has too few exponents for a gradient times a small coefficient: there rows
of g are formed for coefficients that are scaled up, so that small probabilities keep their digits, and the scale comes
off the fp32 results of the GEMMs. What waits for an upstream gradient (a loss scaler's, as a rule) waits in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from .. import backends
from ..core import devices
from ..core.calls import RowGrad, RowStats
from ..core.coefficients import coefficients as coefficients_of
from ..core.fields import BIT, NEEDS_REFERENCE, SOFTMAX, field_index, field_names, of_policy, stats_dtype
from ..core.memory import drop_scratch, give_back_scratch, take_scratch
from .call import HeadCall, Model, apart
from .products import Head, WeightGrad, gradient_dtype
from .waiting import Waiting, logits_lie_behind, waits

P = ParamSpec("P")
R = TypeVar("R")
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

Selection = Tensor | slice  # rows of a batch: their indices, or a range where all of them are meant


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for its upstream factor: fp16 would lose what loss scaling saves."""
    return torch.float32 if dtype == torch.float16 else dtype


def valid_rows(labels: Tensor, ignore_index: int, number: int | None = None) -> Tensor:
    """Indices of the valid rows, `[M]`. On a GPU the host synchronises here to learn M unless `number` is given.

    With a `number` too small the last rows are missing, with one too large the first row of all follows the others:
    wrong, but no index is outside of the batch.
    """
    counts = labels != ignore_index
    return (counts.nonzero() if number is None else counts.nonzero_static(size=number, fill_value=0)).squeeze(1)


class _Chunk(NamedTuple):
    """The rows of one chunk: their hidden states in the products' dtype, labels `[1, n]`, logits `[1, n, V]`.

    reference: its logits; None where there is none, or where they are gone.
    reference_stats: `[K', 1, n]`, the fields of the reference alone, where its logits are gone.
    temperatures: `[n, 1]`, by which the logits have been divided; None for 1.
    """

    where: Selection
    x: Tensor
    labels: Tensor
    logits: Tensor
    reference: Tensor | None
    temperatures: Tensor | None
    reference_stats: Tensor | None = None

    def first(self, rows: int) -> _Chunk:
        """The first rows of the chunk."""
        where, reference, temperatures = self.where, self.reference, self.temperatures
        return _Chunk(
            where=slice(where.start, where.start + rows) if isinstance(where, slice) else where[:rows],
            x=self.x[:rows],
            labels=self.labels[:, :rows],
            logits=self.logits[:, :rows],
            reference=None if reference is None else reference[:, :rows],
            temperatures=None if temperatures is None else temperatures[:rows],
        )


class Pass:
    """One iteration over the valid rows of a batch, with the buffers that all its chunks share."""

    def __init__(self, call: HeadCall):
        self._buffers: dict[str, Tensor] = {}  # first: `__del__` reads it also if what follows fails
        self._keep = not _follows_a_body(call.policy.hidden)
        self.call, config = call, call.config
        self.backend = backends.get(config.backend)
        self.head = self._head(call.policy, config.dtype)
        self.reference_head = None if call.reference is None else self._head(call.reference, config.reference_dtype)
        self.wide = stats_dtype(config.dtype)
        self.apart = apart(config.fields, config.dtype, config.reference_dtype, config.shard)
        self.narrow = gradient_dtype(call.labels.device, config.dtype)
        self.waiting: Waiting | None = None
        self._largest = 0

    def _head(self, model: Model, dtype: torch.dtype) -> Head:
        config = self.call.config
        bias = None if model.bias is None else model.bias.to(stats_dtype(dtype))
        return Head(model.weight.to(dtype), bias, config.softcap, config.logit_scale, config.rounded)

    def selections(self) -> list[Selection]:
        """The valid rows in chunks, in order."""
        config, labels, index = self.call.config, self.call.labels, self.call.valid
        if index is None:
            index = valid_rows(labels, config.ignore_index, config.valid_rows)
        n, size = index.shape[0], config.chunk_rows
        if n == labels.shape[0]:
            return [slice(start, min(n, start + size)) for start in range(0, n, size)]
        return list(index.split(size)) if n else []

    def result(self) -> Tensor:
        """A buffer for the fields of all rows, `[K, N]`; 0 where nothing is written."""
        labels = self.call.labels
        return torch.zeros(self.call.config.fields.bit_count(), labels.shape[0], dtype=self.wide, device=labels.device)

    def __del__(self) -> None:
        if self._keep:
            give_back_scratch(self._buffers.values())

    def _buffer(self, name: str, rows: int, dtype: torch.dtype, most: int | None = None) -> Tensor:
        """`[rows, V]`, the same memory for every chunk: allocated once, for `most` rows or those of the largest."""
        if name == "logits" and self.waiting is not None and self.waiting.behind:
            return self.waiting.logits(rows, dtype)
        if name not in self._buffers:
            self._reserve(name, (self._largest if most is None else most, self.head.vocab), dtype)
        return self._buffers[name][:rows]

    def _reserve(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer for the whole pass."""
        self._buffers[name] = take_scratch(shape, dtype, self.call.labels.device)
        if not self._keep and len(self._buffers) == 1 and devices.on_cpu(self.call.labels.device):
            drop_scratch(freed=self.narrow == torch.float32)
        return self._buffers[name]

    def wait(self, rows: Sequence[int], leading: Sequence[int]) -> Waiting:
        """Let the gradients of all chunks wait, of which these are the rows and, of them, those with a gradient."""
        vocab, width = self.head.weight.shape
        behind = logits_lie_behind(self.call.labels.device)
        size = sum(leading) * vocab * self.narrow.itemsize
        if behind:
            size = Waiting.bytes_with_logits(rows, leading, vocab, self.narrow, self.wide)
        memory = self._reserve("waiting", (size,), torch.uint8)
        x = torch.empty(sum(leading), width, dtype=self.narrow, device=memory.device)
        self.waiting = Waiting(memory, x, vocab, behind)
        return self.waiting

    def release_logits(self) -> None:
        """Once the last chunk is done let go of all but the gradients that wait, unless the next call is to have it."""
        assert self.waiting is not None
        if self._keep:
            return
        self._buffers = {"waiting": self._buffers["waiting"]}
        if self.waiting.behind:
            self.waiting.give_back_end()

    def chunks(self, selections: Sequence[Selection]) -> Iterator[_Chunk]:
        """Compute the logits of one selection of rows after the other."""
        call, config = self.call, self.call.config
        self._largest = max((_length(s) for s in selections), default=0)
        for where in selections:
            labels = _rows(call.labels, where).unsqueeze(0)
            temperatures = None if call.temperatures is None else _rows(call.temperatures, where).unsqueeze(1)
            reference = reference_stats = None
            if call.reference is not None and self.reference_head is not None:
                y = _rows(call.reference.hidden, where).to(config.reference_dtype)
                logits = self._logits(self.reference_head, y, temperatures, "logits" if self.apart else "reference")
                if self.apart:
                    own = of_policy(config.fields & NEEDS_REFERENCE)
                    reference_stats = self._row_stats(logits, labels, None, own)
                else:
                    reference = logits
            x = _rows(call.policy.hidden, where).to(config.dtype)
            yield _Chunk(
                where=where,
                x=x,
                labels=labels,
                logits=self._logits(self.head, x, temperatures, "logits"),
                reference=reference,
                temperatures=temperatures,
                reference_stats=reference_stats,
            )

    def _logits(self, head: Head, x: Tensor, temperatures: Tensor | None, name: str) -> Tensor:
        """`[1, n, V]`: the logits of rows `x` in the buffer of that name."""
        logits = self._buffer(name, x.shape[0], stats_dtype(x.dtype))
        head.logits(x, logits)
        if temperatures is not None:
            logits.div_(temperatures)
        return logits.unsqueeze(0)

    def stats(self, chunk: _Chunk, fields: int) -> Tensor:
        """`[K, 1, n]`: the per-row results of a chunk; those of the reference among them are those of the config."""
        if chunk.reference_stats is None:
            return self._row_stats(chunk.logits, chunk.labels, chunk.reference, fields)
        if not fields & ~NEEDS_REFERENCE:
            return chunk.reference_stats
        own = self._row_stats(chunk.logits, chunk.labels, None, fields & ~NEEDS_REFERENCE)
        policys, references = iter(own.split(1)), iter(chunk.reference_stats.split(1))
        each = (next(references if BIT[name] & NEEDS_REFERENCE else policys) for name in field_names(fields))
        return torch.cat(tuple(each))

    def _row_stats(self, logits: Tensor, labels: Tensor, reference: Tensor | None, fields: int) -> Tensor:
        config = self.call.config
        rows = RowStats(
            logits=logits,
            labels=labels,
            reference=reference,
            fields=fields,
            temperature=config.row_temperature,
            ignore_index=config.ignore_index,
            backend=config.backend,
        )
        result: Tensor = self.backend.row_stats(rows) if config.shard is None else config.shard.row_stats(rows)
        return result

    def gradient(self, chunk: _Chunk, stats: Tensor, coefficients: Tensor) -> Tensor:
        """dL/dl of a chunk's own logits, `[n, V]`, in the dtype of the GEMMs; the logits are gone afterwards.

        The next chunk overwrites it, unless it waits.

        Args:
            chunk: with its logits.
            stats: `[3 or 6, 1, n]`, the softmax statistics of the models.
            coefficients: `[1 or 5, 1, n]`, see `qkernels.core.coefficients`.
        """
        config, n = self.call.config, chunk.labels.shape[1]
        reference_softmax = None
        if chunk.reference is not None and coefficients.shape[0] > 1 and stats.shape[0] >= 6:
            reference_softmax = stats[3:6]
        if chunk.temperatures is not None:  # d(l / t)/dl of each row
            coefficients = coefficients / chunk.temperatures.view(1, 1, n)
        rows = RowGrad(
            logits=chunk.logits,
            labels=chunk.labels,
            reference=chunk.reference if reference_softmax is not None else None,
            softmax=stats[:3],
            reference_softmax=reference_softmax,
            coefficients=coefficients,
            upstream=None,
            temperature=config.row_temperature,
            ignore_index=config.ignore_index,
            backend=config.backend,
        )
        if config.shard is not None:
            rows = config.shard.gradient_inputs(rows)
        out = chunk.logits[0] if self.narrow == self.wide else self._room(chunk)
        if config.softcap is not None:
            grad = self._buffer("capped", n, self.wide)
            self.backend.row_grad_into(grad.unsqueeze(0), rows)
            if chunk.temperatures is not None:  # the slope of the cap is a function of what it made
                chunk.logits[0].mul_(chunk.temperatures)
            self.head.uncap(chunk.logits[0], grad, out)
            return out
        if self.narrow == self.wide:
            self.backend.row_grad_(rows)
        elif self.waiting is None or self.waiting.behind:
            self._over_the_logits(out, rows)
        else:
            self.backend.row_grad_into(out.unsqueeze(0), rows)
        return out

    def scale_for_fp16(self, chunk: _Chunk, coefficients: Tensor) -> Tensor | None:
        """`[1, 1, n]`: powers of two that the coefficients are to be divided by; None where GEMMs do not take fp16.

        Each entry of a row's gradient is then at most 2^14, of one coefficient; of five 2^5 times the sum of their
        terms, among them log q. The temperature and the slope of a softcap multiply what the coefficients bound.
        """
        if self.narrow != torch.float16:
            return None
        config = self.call.config
        slope = (1.0 if config.softcap is None else abs(config.logit_scale)) / abs(config.row_temperature)
        room = max(0, (14 if coefficients.shape[0] == 1 else 5) - math.ceil(math.log2(max(slope, 1.0))))
        largest = coefficients.abs().amax(0, keepdim=True)
        if chunk.temperatures is not None:
            largest = largest / chunk.temperatures.view(1, 1, -1)
        return torch.where(largest > 0, torch.exp2(largest.log2().ceil() - room), 1.0)

    def _room(self, chunk: _Chunk) -> Tensor:
        """`[n, V]` in the dtype of the GEMMs: the first half of a chunk's own logits, or where its gradient waits."""
        n, vocab = chunk.logits.shape[1:]
        if self.waiting is not None:
            return self.waiting.room(n)
        return chunk.logits.view(-1).view(self.narrow)[: n * vocab].view(n, vocab)

    def _over_the_logits(self, out: Tensor, rows: RowGrad) -> None:
        """Write the gradient to `_room` of the logits that it is computed from.

        Row i takes the place of logits i / 2, so that in one call half as many rows can be done as have been before;
        the first ones go through memory of their own. The larger half of all rows is one call.
        """
        n, done = out.shape[0], min(out.shape[0], FIRST_ROWS)
        first = self._buffer("first rows", done, self.narrow, FIRST_ROWS)
        self.backend.row_grad_into(first.unsqueeze(0), _some_rows(rows, 0, done))
        out[:done] = first
        while done < n:
            end = min(n, 2 * done)
            self.backend.row_grad_into(out[done:end].unsqueeze(0), _some_rows(rows, done, end))
            done = end


# Rows of a chunk whose gradient cannot be written over its logits at once (`Pass._over_the_logits`).
FIRST_ROWS = 16


def _some_rows(rows: RowGrad, start: int, end: int) -> RowGrad:
    """Some of the rows of a batch `[1, n, V]`."""

    reference, softmax = rows.reference, rows.reference_softmax
    return rows._replace(
        logits=rows.logits[:, start:end],
        labels=rows.labels[:, start:end],
        reference=None if reference is None else reference[:, start:end],
        softmax=rows.softmax[..., start:end].contiguous(),
        reference_softmax=None if softmax is None else softmax[..., start:end].contiguous(),
        coefficients=rows.coefficients[..., start:end].contiguous(),
    )


def _follows_a_body(hidden: Tensor) -> bool:
    """Whether a model's backward is to follow: the memory of a step is at its peak there, and scratch buffers would lie
    idle in it."""
    source = hidden if hidden._base is None else hidden._base
    return source.grad_fn is not None


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


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients and without autocast: the dtypes of the GEMMs have been chosen."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        call: Any = args[0]
        kind = call.labels.device.type
        if not torch.is_autocast_enabled(kind):  # the context takes longer than some products
            with torch.no_grad():
                return function(*args, **kwargs)
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


@_without_autocast
def stats(call: HeadCall) -> Tensor:
    """The fields of the config for each row, `[K, N]`; 0 at ignored rows. One GEMM per model."""
    work = Pass(call)
    result = work.result()
    for chunk in work.chunks(work.selections()):
        _put(result, chunk.where, work.stats(chunk, call.config.fields)[:, 0], 1)
    return result


@_without_autocast
def unit_gradient(call: HeadCall) -> tuple[Tensor, Tensor]:
    """The fields and d logp / d hidden, `[K, N]` and `[N, H]` in `saved_dtype` of the GEMMs. Two GEMMs."""
    work, fields = Pass(call), call.config.fields
    result = work.result()
    unit = torch.zeros(call.policy.hidden.shape, dtype=saved_dtype(call.config.dtype), device=call.labels.device)
    for chunk in work.chunks(work.selections()):
        values = work.stats(chunk, fields | SOFTMAX)
        _put(result, chunk.where, _only(values, fields | SOFTMAX, fields)[:, 0], 1)
        ones = torch.ones_like(values[:1])
        scale = work.scale_for_fp16(chunk, ones)
        dx = work.head.input_grad(work.gradient(chunk, values[:3], ones if scale is None else ones / scale))
        _put(unit, chunk.where, dx if scale is None else dx * scale.view(-1, 1))
    return result, unit


def _only(stats_: Tensor, have: int, want: int) -> Tensor:
    """The wanted fields of a buffer that has more."""
    if have == want:
        return stats_
    return stats_[[field_index(have, name) for name in field_names(want)]]


class _Gradients:
    """dX, dW and db of a pass, from coefficients, in `dtypes` of hidden states, weight and bias.

    Args:
        work: the pass.
        needs: which of the three are wanted.
        dtypes: theirs.
        rows: of each chunk.
        leading: of these with a gradient, at most.
    """

    def __init__(
        self, work: Pass, needs: Sequence[bool], dtypes: Sequence[torch.dtype | None], rows: Sequence[int],
        leading: Sequence[int],
    ):  # fmt: skip
        self.work, self.dtypes = work, dtypes
        hidden, chunks = work.call.policy.hidden, sum(n > 0 for n in leading)
        self.hidden = torch.zeros(hidden.shape, dtype=dtypes[0], device=hidden.device) if needs[0] else None
        self.waiting: Waiting | None = None
        if needs[1] and waits(work.call.policy.weight, work.call.config.dtype, sum(leading), chunks):
            self.waiting, chunks = work.wait(rows, leading), 1
        self.weight = WeightGrad(work.head, needs[1], needs[2], chunks)

    def add(self, chunk: _Chunk, softmax: Tensor, coefficients: Tensor) -> None:
        x, scale = chunk.x, self.work.scale_for_fp16(chunk, coefficients)
        if scale is not None:
            coefficients, scale = coefficients / scale, scale.view(-1, 1)
        g = self.work.gradient(chunk, softmax, coefficients)
        dx = None
        if self.hidden is not None:
            dx = self.work.head.input_grad(g)
            dx = dx if scale is None else dx * scale
        shard = self.work.call.config.shard
        summed = None if dx is None or shard is None else shard.sum_(dx)  # while the GEMM of dW runs
        if scale is not None:
            # The rows' own scales, relative to the largest, ride on x; the largest on the sum.
            top = scale.amax()
            self.weight.add(g, (x.float() * (scale / top)).to(x.dtype), scale.view(-1), top)
        elif self.waiting is not None:
            self.waiting.add(x)
        else:
            self.weight.add(g, x)
        if self.hidden is not None and dx is not None:
            _put(self.hidden, chunk.where, dx if summed is None else summed())

    def result(self) -> Gradients:
        if self.waiting is not None and self.waiting.rows:
            self.work.release_logits()
            self.weight.add(*self.waiting.all())
        weight, bias = self.weight.result(self.dtypes[1], self.dtypes[2])
        return self.hidden, weight, bias


@_without_autocast
def gradients(call: HeadCall, softmax: Tensor, coefficients: Tensor, needs: Sequence[bool]) -> Gradients:
    """dL/dhidden, dL/dweight, dL/dbias (None where not needed) from coefficients; the logits are recomputed.

    Args:
        call: the batch. Its reference is read only by five coefficients.
        softmax: `[3 or 6, N]`, the softmax statistics of the models, from `stats`.
        coefficients: `[1 or 5, N]`, see `qkernels.core.coefficients`.
        needs: which of the three are wanted.
    """
    work = Pass(call if coefficients.shape[0] > 1 else call._replace(reference=None))
    selections = work.selections()
    dtypes = [None if x is None else x.dtype for x in call.policy]
    rows = [_length(where) for where in selections]
    total = _Gradients(work, needs, dtypes, rows, rows)
    chunk: _Chunk | None
    for chunk in work.chunks(selections):
        at = (slice(None), chunk.where)
        total.add(chunk, softmax[at].unsqueeze(1), coefficients[at].unsqueeze(1))
    chunk = None  # with it goes the last view of its logits
    return total.result()


class KnownLoss(Protocol):
    """A loss that is a sum over units, tokens, sequences or pairs, each of which is known from its own rows.

    selections: the rows of each chunk, whole units.
    leading: of each chunk, how many of its first rows may have a gradient; the others are known to have none.
    drops: whether rows whose gradient turns out to be 0 are to leave the GEMMs, too, where the host can tell.
    dropped: rows that have left the GEMMs of the backward; `known_gradients` counts them.
    """

    drops: bool
    dropped: int

    @property
    def selections(self) -> Sequence[Selection]: ...

    @property
    def leading(self) -> Sequence[int]: ...

    def gradient_of(self, chunk: int, stats: Tensor) -> Mapping[str, Tensor]:
        """dL/dfield `[1, n]` by name of field, from the fields `[K, 1, n]` of that chunk."""


@_without_autocast
def known_gradients(call: HeadCall, loss: KnownLoss, needs: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """The fields and the gradients of a loss whose coefficients are known once a chunk's fields are. Three GEMMs.

    The gradients are in `saved_dtype` of the inputs: an upstream gradient is still to come.

    Args:
        call: the batch.
        loss: what each chunk loses.
        needs: which of hidden, weight, bias need a gradient.
    """
    work, fields = Pass(call), call.config.fields
    result = work.result()
    dtypes = [None if x is None else saved_dtype(x.dtype) for x in call.policy]
    # The largest chunk first: no gradients wait beside its logits yet.
    order = sorted(range(len(loss.selections)), key=lambda number: -_length(loss.selections[number]))
    selections = [loss.selections[number] for number in order]
    lengths = [_length(where) for where in selections]
    leading_rows = [min(n, loss.leading[number]) for n, number in zip(lengths, order, strict=True)]
    total = _Gradients(work, needs, dtypes, lengths, leading_rows)
    chunk: _Chunk | None
    for number, leading, chunk in zip(order, leading_rows, work.chunks(selections), strict=True):
        values = work.stats(chunk, fields)
        _put(result, chunk.where, values[:, 0], 1)
        rows = chunk.labels.shape[1]
        if leading:
            coefficients = coefficients_of(values, loss.gradient_of(number, values), fields)
            softmax = values[:6] if fields & BIT["reference_row_max"] else values[:3]
            if leading < rows:
                chunk = chunk.first(leading)
                softmax, coefficients = (x[..., :leading].contiguous() for x in (softmax, coefficients))
            # (Ranks that share a head have to agree on the rows: they take all of them.)
            if loss.drops and devices.on_cpu(coefficients.device) and call.config.shard is None:
                chunk, softmax, coefficients = _with_gradient(chunk, softmax, coefficients)
            leading = chunk.labels.shape[1]
        loss.dropped += rows - leading
        if leading:
            total.add(chunk, softmax, coefficients)
    chunk = None  # with it goes the last view of its logits
    return result, total.result()


def _with_gradient(chunk: _Chunk, softmax: Tensor, coefficients: Tensor) -> tuple[_Chunk, Tensor, Tensor]:
    """The rows of a chunk whose coefficients are not all 0, moved to its front in its own memory; the host looks.

    Only as many rows of logits are copied as there are holes among the first ones.
    """
    wanted = (coefficients != 0).any(0)[0]
    number, rows = int(wanted.sum()), wanted.shape[0]
    if number == rows:
        return chunk, softmax, coefficients
    holes = (~wanted[:number]).nonzero()[:, 0]
    movers = wanted[number:].nonzero()[:, 0] + number
    order = torch.arange(number, device=wanted.device)
    order[holes] = movers
    for logits in (chunk.logits, chunk.reference if coefficients.shape[0] > 1 else None):
        if logits is not None:
            for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
                logits[0, hole].copy_(logits[0, mover])
    where = chunk.where
    if isinstance(where, slice):
        where = torch.arange(where.start, where.stop)
    moved = chunk.first(number)._replace(
        where=where[order],
        x=chunk.x[order],
        labels=chunk.labels[:, order].contiguous(),
        temperatures=None if chunk.temperatures is None else chunk.temperatures[order],
    )
    return moved, softmax[..., order], coefficients[..., order]
