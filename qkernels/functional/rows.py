"""Rows of logits: the arguments that all public functions on logits share, checked, and the pass over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autograd.logits import Backward, RowStats
from ..autograd.saved import by_name
from ..core import calls, checks
from ..core.fields import DIVERGENCES, REFERENCE_SOFTMAX, SOFTMAX, stats_dtype
from ..distributed import groups, vocab_parallel
from ..distributed.fingerprint import NOTHING, CallFingerprint, Fingerprint, words
from ..distributed.groups import Ranks
from ..distributed.vocab_parallel import Shard


class Rows(NamedTuple):
    """Checked rows of logits, `[S, T, V]` views, and how to run on them.

    shape: of the caller's labels.
    shard: this rank's shard of the vocabulary; None where it holds all of it.
    """

    logits: Tensor
    labels: Tensor
    reference: Tensor | None
    shape: torch.Size
    temperature: float
    ignore_index: int
    inplace: bool
    backend: str
    shard: Shard | None = None

    def agree(
        self,
        ranks: Ranks | None,
        call: str,
        options: Fingerprint | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Rows:
        """The same rows with their shard, once the ranks of `tp_group` have found that they make the same call.

        Args:
            ranks: the groups of the call; None without any.
            call: name of the public function.
            options: facts of its options, besides those of the rows.
            arguments: by name, those that have to be the same on all ranks, besides the labels.
        """
        if ranks is None:
            return self
        vocab, labels = self.logits.shape[-1], self.labels.view(self.shape)
        fingerprint = RowsFingerprint(
            call=call,
            options=options or NOTHING,
            labels=labels,
            arguments=arguments or {},
            dtype=stats_dtype(self.logits.dtype),
            reference=self.reference is not None,
            temperature_and_ignore_index=(self.temperature, self.ignore_index),
        )
        shard = vocab_parallel.agree(ranks, fingerprint, vocab, self.ignore_index)
        if shard is None:  # the backend would see them too late for the other ranks of sp_group
            checks.check_labels(labels, vocab, self.ignore_index)
        return self._replace(shard=shard)

    def call(self, fields: int) -> calls.RowStats:
        """The arguments of `row_stats` for these fields."""
        return calls.RowStats(
            logits=self.logits,
            labels=self.labels,
            reference=self.reference,
            fields=fields,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )

    def stats(self, fields: int, differentiable: tuple[str, ...]) -> dict[str, Tensor]:
        """Run `row_stats` with autograd for the fields named in `differentiable`; these fields by name, `[S, T]`."""
        wanted = fields
        if differentiable and self.logits.requires_grad and torch.is_grad_enabled():
            fields |= SOFTMAX
            if fields & DIVERGENCES:
                fields |= REFERENCE_SOFTMAX
            how = Backward(self.inplace, differentiable, self.shard)
            return by_name(wanted, fields, differentiable, RowStats.apply(self.logits, self.call(fields), how))
        return by_name(fields, fields, (), (vocab_parallel.row_stats(self.call(fields), self.shard),))


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsFingerprint(CallFingerprint):
    """Of a call on logits. `dtype`: of the per-row results; `reference`: whether there are logits of a reference."""

    dtype: torch.dtype = field(metadata=words("dtype of the results"))
    reference: bool = field(metadata=words("a reference"))
    temperature_and_ignore_index: tuple[float, int] = field(metadata=words("temperature, ignore_index"))


class RowsRequest(NamedTuple):
    """The arguments that the public functions on logits share, as they came; named as they have them.

    function: name of the public function.
    name: of its argument `logits`.
    hint: for ranks that disagree over a group that DTensors imply.
    """

    function: str
    name: str
    logits: Any
    labels: Any
    reference_logits: Any
    temperature: Any
    ignore_index: Any
    inplace_backward: Any
    backend: str
    tp_group: Any
    sp_group: Any = None
    hint: str = ""

    def local(self) -> tuple[RowsRequest, AbstractContextManager[Ranks | None]]:
        """The same with local tensors in place of DTensors, and the context to check it in, where the ranks agree."""
        request = self
        if groups.any_dtensor(self.logits, self.reference_logits, self.labels):
            group, hint, (logits, reference, labels) = groups.to_local(
                self.tp_group,
                **{self.name: (self.logits, -1), "reference_logits": (self.reference_logits, -1)},
                labels=(self.labels, None),
            )
            request = self._replace(tp_group=group, hint=hint, logits=logits, reference_logits=reference, labels=labels)
        return request, groups.ranks(request.tp_group, request.sp_group, request.logits, request.hint)

    def validate(self) -> Rows:
        """Check the arguments and view the logits as `[S, T, V]`."""
        name = self.name
        logits = checks.logits(self.logits, name)
        checks.not_overwritten(logits, name)
        labels = checks.labels(self.labels, logits, name)
        reference = self.reference_logits
        if reference is not None:
            checks.not_overwritten(checks.tensor(reference, "reference_logits"), "reference_logits")
            reference = checks.reference_logits(reference, logits, name)
        return Rows(
            logits=logits if logits.dim() == 3 else _as_3d(logits, name),
            labels=_as_2d(labels),
            reference=reference if reference is None or reference.dim() == 3 else _as_3d(reference, "reference_logits"),
            shape=labels.shape,
            temperature=checks.positive(self.temperature, "temperature"),
            ignore_index=checks.ignore_index(self.ignore_index),
            inplace=(
                self.inplace_backward is not False
                and checks.inplace(self.inplace_backward, logits, name, {"reference_logits": reference})
            ),
            backend=backends.resolve_for(self.backend, logits.device, logits.dtype),
        )


def _as_3d(logits: Tensor, name: str) -> Tensor:
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    try:
        return logits.view(logits.shape[0], math.prod(logits.shape[1:-1]), logits.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"the row dimensions of {name} {tuple(logits.shape)} with strides {tuple(logits.stride())} do not merge;"
            f" use {name}.contiguous()"
        ) from None


def _as_2d(per_row: Tensor) -> Tensor:
    if per_row.dim() <= 2:
        return (per_row if per_row.dim() == 2 else per_row.unsqueeze(0)).contiguous()
    return per_row.reshape(per_row.shape[0], math.prod(per_row.shape[1:])).contiguous()
