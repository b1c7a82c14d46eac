"""Losses on plain sequences and tokens, from logits and from hidden states: the steps that all of them share.

A `UnitLoss` knows what some units lose, given the per-row results of their rows. From logits autograd goes through it;
from hidden states chunks of whole units are differentiated while their logits exist (`UnitChunks`), or the logits are
made twice, as the plan has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..autograd.head import Known, KnownGradient
from ..core import checks
from ..core.fields import BIT, bits, field_names, stats_dtype
from ..core.sequences import Sequences
from ..distributed.fingerprint import Fingerprint
from ..distributed.groups import Ranks, SequenceShard
from ..head import chunks
from ..head import plan as head_plan
from ..head.call import HeadCall
from ..head.chunks import Gradients
from ..head.plan import LinearPlan
from . import valid_rows
from .head_inputs import HeadInputs, HeadRequest, fields_with_softmax
from .preference import Batch
from .results import Outputs, TokenStats
from .rows import Rows, RowsRequest
from .tempered import tempered
from .unit_chunks import SEQUENCES_OF, Part, UnitChunks
from .valid_rows import Counts

Output = TypeVar("Output", bound=tuple[Any, ...])


class UnitLoss(ABC, Generic[Output]):
    """A checked loss with its tensors, for a batch.

    unit: "token", "sequence" or "batch".
    fields: mask of the per-row results that it reads.
    differentiable: those of them that it differentiates; "logps" is among them.
    """

    unit: str
    fields: int
    differentiable: tuple[str, ...]

    @abstractmethod
    def total(self, stats: Mapping[str, Tensor], part: Part) -> Tensor:
        """The part's share of the reduced loss, `[]`, from the per-row results of its rows."""

    @abstractmethod
    def output(self, stats: Mapping[str, Tensor], part: Part, known: Mapping[str, Any]) -> Output:
        """What the public function returns, for all units. `known`: fields of it that the plan has found."""

    def unreduced(self) -> str | None:
        """Why the loss is not one number, if it is not: the gradient of a unit is known only later then."""
        return None

    def active(self) -> Tensor | None:
        """bool `[S, T]`, rows that may have a gradient; None where nothing is known beforehand."""
        return None

    def gradient(self, stats: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        """d total / d field, for the differentiable fields."""
        leaves = {name: stats[name].detach().requires_grad_() for name in self.differentiable}
        with torch.enable_grad():
            total = self.total({**stats, **leaves}, part)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        return gradients if gradients else {"logps": torch.zeros_like(stats["logps"])}


class LossArguments(ABC, Generic[Output]):
    """The arguments of a loss, as they came, without its rows; what does not depend on tensors is checked already."""

    @abstractmethod
    def tensors(self) -> dict[str, Any]:
        """Arguments that all ranks of `tp_group` have to have alike, by name."""

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """What else they have to have alike."""

    @abstractmethod
    def token_weights(self, labels: Tensor, ignore_index: int) -> Tensor | None:
        """Checked factors of the tokens, `[S, T]`; None without."""

    @abstractmethod
    def of(self, labels: Tensor, batch: Batch, has_model: bool) -> UnitLoss[Output]:
        """Check the tensors against the caller's labels."""


def per_token(value: Any, name: str, labels: Tensor, batch: Batch) -> Tensor:
    """An argument shaped like the caller's labels, as `[S, T]` in the dtype of the results; 0 at ignored rows."""
    value = checks.like(value, name, labels.shape, labels, "labels").detach().reshape(batch.labels.shape)
    return torch.where(batch.valid, value.to(batch.weights.dtype), 0.0)


def check_shape(rows: Any, name: str, last: str, cu_seqlens: Any) -> None:
    """`[S, T, last]`, or with `cu_seqlens` `[N, last]`."""
    packed = cu_seqlens is not None
    rows = checks.dense_or_packed(rows, name, last, packed, paired=False)
    if not packed and rows.shape[0] == 0:
        raise ValueError(f"empty batch: {name} holds no sequences")


def check_temperature(value: Any, labels: Tensor) -> tuple[float, Tensor | None]:
    """A number for all rows, or a tensor with one for each: shaped like the labels, finite and above 0.

    Returns:
        The number, and the tensor; 1.0 beside a tensor.
    """
    if not isinstance(value, Tensor):
        return checks.positive(value, "temperature"), None
    if value.requires_grad:
        raise ValueError("temperature is a constant and gets no gradient; pass temperature.detach()")
    value = checks.like(value, "temperature", labels.shape, labels, "labels")
    if checks.readable(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError("temperature must be finite and above 0 in every row")
    return 1.0, value


class UnitOptions(NamedTuple):
    """Arguments of a loss on hidden states besides its model and its own."""

    cu_seqlens: Any
    valid_rows: Any
    plan: str
    outputs: Sequence[str]
    temperature: Any

    @staticmethod
    def of(given: Mapping[str, Any]) -> UnitOptions:
        """Out of all arguments by name."""
        return UnitOptions(**{name: given[name] for name in UnitOptions._fields})


def from_logits(
    request: RowsRequest, cu_seqlens: Any, outputs: Sequence[str], arguments: LossArguments[Output]
) -> Output:
    """A loss from logits: validate, agree with the ranks if there are any, run and assemble."""
    check_shape(request.logits, request.name, "V", cu_seqlens)
    temperatures = request.temperature
    request, agreement = request.local()
    has_model = request.reference_logits is not None
    with agreement as ranks:
        if isinstance(temperatures, Tensor):
            labels = checks.labels(request.labels, checks.logits(request.logits, request.name), request.name)
            request = tempered(request, check_temperature(temperatures, labels)[1])
        rows = request.validate()
        if ranks is not None:
            tensors = {**arguments.tensors(), "cu_seqlens": cu_seqlens}
            rows = rows.agree(ranks, request.function, arguments.fingerprint(), tensors)
        labels = request.labels
        batch = _batch(rows.labels, labels, cu_seqlens, arguments, (rows.ignore_index, stats_dtype(rows.logits.dtype)))
        loss = arguments.of(labels, batch, has_model)
        shard = _shard(ranks, batch, arguments)
    batch, loss = _spread(batch, loss, shard, lambda whole: arguments.of(labels, whole, has_model))
    rows = rows._replace(labels=batch.labels)
    fields, wanted = _fields(loss, outputs, has_model, "reference_logits")
    stats = rows.stats(fields, loss.differentiable)
    part = Part.whole(batch)
    idle = None
    if not torch.compiler.is_compiling():
        gradient = loss.gradient({name: value.detach() for name, value in stats.items()}, part)
        idle = _idle(gradient, batch)
    known = {"idle_rows": idle, "stats": _extra(stats, wanted, rows)}
    return loss.output(stats, part, known)


def _shard(ranks: Ranks | None, batch: Batch, arguments: LossArguments[Any]) -> SequenceShard | None:
    """Which part of every sequence this rank has, once the ranks of `sp_group` agree on the loss; None without one."""
    if ranks is None:
        return None
    return ranks.sequence_shard(batch.sequences.number, batch.weights.dtype, arguments.fingerprint())


def _spread(
    batch: Batch, loss: UnitLoss[Output], shard: SequenceShard | None, of: Callable[[Batch], UnitLoss[Output]]
) -> tuple[Batch, UnitLoss[Output]]:
    """Batch and loss of sequences whose positions are spread over ranks.

    The loss is made a second time: the first one, which sends nothing, has raised what is wrong on this rank alone.
    """
    if shard is None:
        return batch, loss
    batch = batch._replace(sequences=batch.sequences._replace(shard=shard))
    return batch, of(batch)


def _idle(gradient: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """How many valid rows have no gradient."""
    moving = torch.stack([g != 0 for g in gradient.values()]).any(0)
    return (batch.valid & ~moving).sum()


def _batch(
    rows: Tensor, labels: Tensor, cu_seqlens: Any, arguments: LossArguments[Any], how: tuple[int, torch.dtype]
) -> Batch:
    """`rows` are the labels as `[S, T]` or `[1, N]`; `how` has ignore_index and the dtype of the results."""
    if cu_seqlens is not None:
        cu_seqlens = checks.cu_seqlens(cu_seqlens, labels, paired=False)
    return Batch.unpaired(rows, arguments.token_weights(labels, how[0]), cu_seqlens, *how)


def _fields(
    loss: UnitLoss[Any], outputs: Sequence[str], has_model: bool, model_name: str
) -> tuple[int, tuple[str, ...]]:
    """Mask of the per-row results, and the names of those that the caller wants besides."""
    outputs = checks.names(outputs, "outputs")
    if not outputs:
        return loss.fields, ()
    read = ("reference_logps",) if has_model else ()
    wanted = Outputs.of((*outputs, *read), model_name, has_model)
    return loss.fields | wanted.fields, tuple(outputs)


def _extra(stats: Mapping[str, Tensor], wanted: tuple[str, ...], rows: Rows | HeadInputs) -> TokenStats | None:
    return TokenStats.of(stats, wanted, rows.shape, detach=True) if wanted else None


class HiddenUnits(NamedTuple):
    """A checked loss on hidden states, with the plan that runs it.

    wanted: names of per-row results that the caller wants besides.
    """

    inputs: HeadInputs
    loss: UnitLoss[Any]
    batch: Batch
    counts: Counts
    fields: int
    wanted: tuple[str, ...]
    plan: LinearPlan | None = None

    @staticmethod
    def prepare(model: HeadRequest, options: UnitOptions, arguments: LossArguments[Any]) -> HiddenUnits:
        """Check everything, agree with the other ranks if there are any, count the valid rows and choose a plan."""
        check_shape(model.hidden, model.names[0], "H", options.cu_seqlens)
        model, agreement = model.local()
        with agreement as ranks:
            labels = checks.labels(model.labels, checks.logits(model.hidden, model.names[0], "H"), model.names[0])
            temperature, temperatures = check_temperature(options.temperature, labels)
            given = None if options.valid_rows is None else checks.row_counts(options.valid_rows, "valid_rows")
            inputs = model._replace(temperature=temperature).validate()
            has_model = inputs.reference is not None
            facts: Fingerprint | None = None
            tensors: dict[str, Any] = {}
            if ranks is not None:
                own = {"cu_seqlens": options.cu_seqlens, **valid_rows.as_equal(given, ranks)}
                tensors, facts = {**arguments.tensors(), "temperature": temperatures, **own}, arguments.fingerprint()
            inputs = inputs.agree(ranks, model, facts, tensors, plan=options.plan)
            how = (inputs.ignore_index, stats_dtype(inputs.dtype))
            rows = inputs.labels.view(labels.shape if labels.dim() == 2 else (1, -1))
            batch = _batch(rows, labels, options.cu_seqlens, arguments, how)
            if given is not None:
                valid_rows.check_sizes(given, Sequences.of(batch.labels, batch.cu_seqlens))
                if checks.readable(labels):
                    valid_rows.check_counts(given, batch)
            loss = arguments.of(labels, batch, has_model)
            shard = _shard(ranks, batch, arguments)
        batch, loss = _spread(batch, loss, shard, lambda whole: arguments.of(labels, whole, has_model))
        fields, wanted = _fields(loss, options.outputs, has_model, "reference_hidden")
        counts = Counts.of(batch, given, checks.readable(labels))
        flat, valid = batch.labels.reshape(-1), None
        if counts.known is not None and flat.device.type != "meta":
            valid = chunks.valid_rows(flat, inputs.ignore_index, sum(counts.known))
        inputs = inputs._replace(
            labels=flat,
            valid=valid,
            valid_rows=None if given is None else sum(given),
            temperatures=None if temperatures is None else temperatures.reshape(-1).to(how[1]),
        )
        work = HiddenUnits(inputs, loss, batch, counts, fields=fields, wanted=wanted)
        return work._replace(plan=work._plan(options.plan))

    def _plan(self, wanted: str) -> LinearPlan:
        inputs, counts, unit = self.inputs, self.counts.known, self.loss.unit
        if counts is None:
            rows = inputs.labels.shape[0]
            largest = rows if self.batch.cu_seqlens is not None else self.batch.labels.shape[1]
        else:
            rows, largest = sum(counts), max(counts, default=0)
        active = self._active()
        work = inputs.work(
            wanted,
            self.fields,
            only_logps=self.loss.differentiable == ("logps",),
            coupled=self._coupled(),
            valid_rows=rows,
            unit_rows=min(1, rows) if unit == "token" else largest,
        )
        work = work._replace(
            unit=unit if unit in head_plan.BY_UNIT else "sequence",
            idle=True,
            idle_rows=0 if active is None else int((~active & self.batch.valid).sum()),
        )
        return head_plan.plan(work)

    def _coupled(self) -> str | None:
        """Why the gradient of a unit is not known from that unit alone; None if it is."""
        if self.loss.unit == "batch":
            return "the loss of a token depends on the whole batch"
        if self.batch.sequences.shard is not None:
            return "sp_group spreads each sequence over ranks"
        if (why := self.loss.unreduced()) is not None:
            return why
        if torch.compiler.is_compiling() or (self.counts.known is None and self.inputs.labels.device.type != "meta"):
            return "inside torch.compile the loss is differentiated by the compiler"
        return None

    def _active(self) -> Tensor | None:
        """Rows that may have a gradient, where some may not and the host may look at them."""
        if self.counts.known is None or self.inputs.labels.device.type == "meta":
            return None
        if self.counts.given is not None and not checks.readable(self.inputs.labels):
            return None  # the caller wants no synchronisation
        active = self.loss.active()
        return None if active is None or bool((active | ~self.batch.valid).all()) else active

    def run(self) -> Any:
        """Run the plan; the output of the loss, with the plan."""
        inputs, plan, batch, loss = self.inputs, self.plan, self.batch, self.loss
        assert plan is not None
        inputs.refuse_meta("hidden")
        known: Known | None = None
        idle: Tensor | None = None
        if plan.name in head_plan.BY_UNIT.values():
            stats, known, dropped = self._by_units(plan)
            idle = torch.full((), dropped, device=batch.labels.device)
        else:
            stats = inputs.stats(plan, self.fields, loss.differentiable)
        factor = self.counts.wrong(batch)
        stats = {k: v.view(batch.labels.shape) for k, v in valid_rows.times(stats, factor).items()}
        found = {"idle_rows": idle, "stats": _extra(stats, self.wanted, inputs)}
        output = loss.output(stats, Part.whole(batch), found)
        value = output.loss
        if known is not None:
            value = KnownGradient.apply(value, *inputs.policy, known)
        if factor is not None:
            value = value * factor
        output = output._replace(loss=value)
        if not torch.compiler.is_compiling():
            output.plan = plan
        return output

    def _by_units(self, plan: LinearPlan) -> tuple[dict[str, Tensor], Known, int]:
        """The fields of all rows by name, the gradients, and how many rows had none."""
        inputs = self.inputs
        fields = fields_with_softmax(self.fields, inputs.reference is not None)
        call = inputs.call(fields, plan.chunk_rows)
        units = _Chunks(self, call, plan.name.split("_")[0])
        needs = inputs.needs()  # now: inside a backward nothing does

        def run() -> tuple[Tensor, Gradients]:
            units.dropped = 0
            return chunks.known_gradients(call, units, needs)

        values, gradients = run()
        dropped = units.dropped
        stats = dict(zip(field_names(fields), values.unbind(0), strict=True))
        return stats, Known(gradients, lambda: run()[1]), dropped


class _Chunks(UnitChunks):
    """The chunks of a `UnitLoss`."""

    def __init__(self, work: HiddenUnits, call: HeadCall, unit: str):
        assert unit == "token" or unit in SEQUENCES_OF
        self.loss = work.loss
        super().__init__(call, work.batch, unit, counts=work.counts, active=work._active(), drops=True)

    def gradient(self, stats: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        return self.loss.gradient(stats, part)


def fields_of(*names: str) -> int:
    """The mask of these per-row results; the log-prob is always among them."""
    return BIT["logps"] | bits(names)
