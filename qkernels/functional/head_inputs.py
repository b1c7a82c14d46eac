"""Hidden states and heads: the arguments that all public functions on hidden states share, and their passes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autograd.head import FrozenHead, HeadStats
from ..autograd.saved import by_name
from ..core import checks
from ..core.compile import constant_when_compiled
from ..core.fields import DIVERGENCES, REFERENCE_SOFTMAX, SOFTMAX, stats_dtype
from ..distributed import groups, vocab_parallel
from ..distributed.fingerprint import NOTHING, CallFingerprint, Fingerprint, words
from ..distributed.groups import Ranks
from ..distributed.vocab_parallel import Shard
from ..head import chunks
from ..head.call import HeadCall, HeadConfig, Model
from ..head.plan import LinearPlan, Work


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _autocasts(hidden: Tensor) -> bool:
    """Whether autocast chooses the dtype of a linear layer of these hidden states; it leaves float64 alone."""
    kind = hidden.device.type
    return hidden.dtype != torch.float64 and _has_autocast(kind) and torch.is_autocast_enabled(kind)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a plain linear layer would compute in: autocast's dtype, or the inputs' own."""
    return torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype


class HeadInputs(NamedTuple):
    """Checked arguments: models as `[N, H]`, labels `[N]`, and how the GEMMs run.

    valid: `[M]`, indices of the valid rows; None where the host does not know how many, or compiles.
    valid_rows: the number of valid rows that the caller has given; None without.
    shape: of the caller's labels.
    dtype, reference_dtype: of the GEMMs.
    shard: this rank's shard of the vocabulary; None where it holds all of it.
    temperatures: `[N]`, of each row, besides `temperature`; None for 1.
    rounded: whether logits are rounded to the dtype of the GEMMs.
    """

    policy: Model
    reference: Model | None
    labels: Tensor
    shape: torch.Size
    dtype: torch.dtype
    reference_dtype: torch.dtype
    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    max_chunk_bytes: int | None
    valid: Tensor | None = None
    valid_rows: int | None = None
    shard: Shard | None = None
    temperatures: Tensor | None = None
    rounded: bool = False

    @property
    def vocab(self) -> int:
        return self.policy.weight.shape[0]

    def needs(self) -> tuple[bool, bool, bool]:
        """Whether hidden states, weight and bias need a gradient."""
        if not torch.is_grad_enabled():
            return False, False, False
        hidden, weight, bias = self.policy
        return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad

    def agree(
        self,
        ranks: Ranks | None,
        request: HeadRequest,
        options: Fingerprint | None = None,
        arguments: Mapping[str, Any] | None = None,
        plan: str | None = None,
    ) -> HeadInputs:
        """The same with their shard, once the ranks of `tp_group` have found that they make the same call.

        Args:
            ranks: the groups of the call; None without any.
            request: the call.
            options: facts of its options, besides those of the head.
            arguments: by name, those that have to be the same on all ranks, besides the labels.
            plan: the one asked for; None where there is no choice.
        """
        labels, shard = self.labels.view(self.shape), None
        if ranks is not None:
            fingerprint = HeadFingerprint(
                call=request.function,
                options=options or NOTHING,
                labels=labels,
                arguments=arguments or {},
                plan=plan,
                hidden_name=request.names[0],
                hidden_size=self.policy.hidden.shape[-1],
                dtype=self.dtype,
                reference=self.reference is not None,
                needs=self.needs(),
                numbers=(self.temperature, self.softcap, self.logit_scale, self.rounded, self.ignore_index),
                max_chunk_bytes=self.max_chunk_bytes,
            )
            shard = vocab_parallel.agree(ranks, fingerprint, self.vocab, self.ignore_index, chunked=True)
        if shard is not None:
            return self._replace(shard=shard)
        checks.check_labels(labels, self.vocab, self.ignore_index)  # rows lose their positions in the chunks
        return self

    def refuse_meta(self, name: str) -> None:
        """ValueError for tensors without values."""
        if self.labels.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, which has no values to compute with; plan_linear takes it")

    def call(self, fields: int, chunk_rows: int) -> HeadCall:
        """The arguments of a pass for these fields."""
        config = HeadConfig(
            fields=fields,
            temperature=self.temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ignore_index=self.ignore_index,
            dtype=self.dtype,
            reference_dtype=self.reference_dtype,
            chunk_rows=chunk_rows,
            backend=self.backend,
            valid_rows=self.valid_rows,
            shard=self.shard,
            rounded=self.rounded,
        )
        return HeadCall(
            policy=self.policy,
            reference=self.reference,
            labels=self.labels,
            config=config,
            valid=self.valid,
            temperatures=self.temperatures,
        )

    def work(
        self, wanted: str, fields: int, *, only_logps: bool, coupled: str | None, valid_rows: int, unit_rows: int
    ) -> Work:
        """What the choice of a plan depends on; see `qkernels.head.plan.Work`."""
        return Work(
            policy=self.policy,
            reference=self.reference,
            dtype=self.dtype,
            reference_dtype=self.reference_dtype,
            softcap=self.softcap is not None,
            needs=self.needs(),
            fields=fields,
            only_logps=only_logps,
            coupled=coupled,
            valid_rows=valid_rows,
            unit_rows=unit_rows,
            wanted=wanted,
            max_chunk_bytes=self.max_chunk_bytes,
            shard=self.shard,
        )

    def stats(self, plan: LinearPlan, fields: int, differentiable: tuple[str, ...]) -> dict[str, Tensor]:
        """Per-row results by name, `[N]`, those of `differentiable` with autograd as the plan has it."""
        if plan.name == "forward_only":
            call = self.call(fields, plan.chunk_rows)
            if torch.compiler.is_compiling():
                return by_name(fields, fields, (), HeadStats.apply(*self.policy, call, ()))
            return by_name(fields, fields, (), (chunks.stats(call),))
        wanted, fields = fields, fields_with_softmax(fields, self.reference is not None)
        call = self.call(fields, plan.chunk_rows)
        if plan.name == "frozen_head":
            return by_name(wanted, fields, ("logps",), FrozenHead.apply(self.policy.hidden, call))
        return by_name(wanted, fields, differentiable, HeadStats.apply(*self.policy, call, differentiable))


def fields_with_softmax(fields: int, has_model: bool) -> int:
    """What a backward needs besides the results asked for."""
    fields |= SOFTMAX
    if has_model and fields & DIVERGENCES:
        fields |= REFERENCE_SOFTMAX
    return fields


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadFingerprint(CallFingerprint):
    """Of a call on hidden states.

    plan: the one asked for; None where there is no choice.
    hidden_name, hidden_size: the argument with the hidden states, and H.
    dtype: of the logits' inputs.
    reference: whether there is a reference model.
    needs: whether hidden states, weight and bias need a gradient.
    numbers: how logits follow from products, and the ignored label.
    """

    plan: str | None
    hidden_name: str
    hidden_size: int = field(metadata=words("{hidden_name}.shape[-1]"))
    dtype: torch.dtype
    reference: bool = field(metadata=words("a reference"))
    needs: tuple[bool, bool, bool] = field(metadata=words("requires_grad of hidden states, weight, bias"))
    numbers: tuple[float, float | None, float, bool, int] = field(
        metadata=words("temperature, softcap, logit_scale, logits_dtype, ignore_index")
    )
    max_chunk_bytes: int | None


class HeadRequest(NamedTuple):
    """The arguments that the public functions on hidden states share, as they came.

    function: name of the public function.
    names: of its arguments for the policy's hidden states, weight and bias.
    hint: for ranks that disagree over a group that DTensors imply.
    """

    function: str
    names: tuple[str, str, str]
    hidden: Any
    weight: Any
    bias: Any
    labels: Any
    reference_hidden: Any
    reference_weight: Any
    reference_bias: Any
    temperature: Any
    softcap: Any
    logit_scale: Any
    ignore_index: Any
    max_chunk_bytes: Any
    backend: str
    logits_dtype: Any = "float32"
    tp_group: Any = None
    sp_group: Any = None
    hint: str = ""

    @staticmethod
    def of(function: str, given: Mapping[str, Any]) -> HeadRequest:
        """Of a function whose arguments, here by name, are called as the fields are."""
        return HeadRequest(
            function=function,
            names=("hidden", "weight", "bias"),
            **{name: given[name] for name in HeadRequest._fields if name in given},
        )

    def local(self) -> tuple[HeadRequest, AbstractContextManager[Ranks | None]]:
        """The same with local tensors in place of DTensors, and the context to check it in, where the ranks agree."""
        tensors = (self.hidden, self.weight, self.bias, self.labels)
        request = self
        if groups.any_dtensor(*tensors, self.reference_hidden, self.reference_weight, self.reference_bias):
            request = self._local()
        return request, groups.ranks(request.tp_group, request.sp_group, request.hidden, request.hint)

    def _local(self) -> HeadRequest:
        hidden_name, weight_name, bias_name = self.names
        group, hint, local = groups.to_local(
            self.tp_group,
            **{hidden_name: (self.hidden, None), weight_name: (self.weight, 0), bias_name: (self.bias, 0)},
            reference_hidden=(self.reference_hidden, None),
            reference_weight=(self.reference_weight, 0),
            reference_bias=(self.reference_bias, 0),
            labels=(self.labels, None),
        )
        hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels = local
        return self._replace(
            tp_group=group, hint=hint, hidden=hidden, weight=weight, bias=bias, labels=labels,
            reference_hidden=reference_hidden, reference_weight=reference_weight, reference_bias=reference_bias,
        )  # fmt: skip

    def validate(self) -> HeadInputs:
        """Check the arguments and view the hidden states as `[N, H]`."""
        policy = _model(self.hidden, self.weight, self.bias, self.names)
        labels = checks.labels(self.labels, self.hidden, self.names[0])
        reference = self._reference()
        ignore_index = checks.ignore_index(self.ignore_index)
        softcap = None if self.softcap is None else checks.positive(self.softcap, "softcap")
        budget = self.max_chunk_bytes
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            raise TypeError(f"max_chunk_bytes must be an int or None, got {type(budget).__name__}")
        dtype = _compute_dtype(self.hidden)
        return HeadInputs(
            policy=policy,
            reference=reference,
            labels=labels.reshape(-1).contiguous(),
            shape=labels.shape,
            dtype=dtype,
            reference_dtype=dtype if reference is None else _compute_dtype(self.reference_hidden),
            temperature=checks.positive(self.temperature, "temperature"),
            softcap=softcap,
            logit_scale=checks.positive(self.logit_scale, "logit_scale"),
            ignore_index=ignore_index,
            backend=backends.resolve_for(self.backend, self.hidden.device, stats_dtype(dtype)),
            max_chunk_bytes=budget,
            rounded=checks.choice(self.logits_dtype, "logits_dtype", ("float32", "input")) == "input",
        )

    def _reference(self) -> Model | None:
        """Check the reference model; its tensors are constants."""
        hidden, weight, name, weight_name = self.hidden, self.weight, self.names[0], self.names[1]
        reference_hidden, reference_weight = self.reference_hidden, self.reference_weight
        if reference_hidden is None:
            for given, value in (("reference_weight", reference_weight), ("reference_bias", self.reference_bias)):
                if value is not None:
                    raise ValueError(f"{given} given without reference_hidden")
            return None
        if reference_weight is None:
            raise ValueError(
                f"reference_hidden needs reference_weight (pass {weight_name} itself if both models share the head)"
            )
        names = ("reference_hidden", "reference_weight", "reference_bias")
        model = _model(reference_hidden, reference_weight, self.reference_bias, names)
        if reference_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"reference_hidden must have the rows of {name}, {tuple(hidden.shape[:-1])}, got shape"
                f" {tuple(reference_hidden.shape)}"
            )
        if reference_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"reference_weight has V = {reference_weight.shape[0]} and {weight_name} V = {weight.shape[0]}:"
                " policy and reference must share the vocabulary"
            )
        checks.same_device(reference_hidden, "reference_hidden", hidden, name)
        if (reference_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(
                f"reference_hidden is {reference_hidden.dtype} and {name} {hidden.dtype}: use float64 for both or"
                " neither"
            )
        return detached(model)


def detached(model: Model) -> Model:
    """A model of constants."""
    hidden, weight, bias = model
    return Model(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


def _model(hidden: Any, weight: Any, bias: Any, names: tuple[str, str, str]) -> Model:
    """Check one model's hidden states and head, and view the hidden states as `[N, H]`."""
    hidden_name, weight_name, bias_name = names
    hidden = checks.logits(hidden, hidden_name, "H")
    weight = checks.tensor(weight, weight_name)
    if not weight.is_floating_point():
        raise TypeError(f"{weight_name} must be floating point, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{weight_name} must have shape [V, H] with H = {hidden.shape[-1]} as in {hidden_name}"
            f" {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    checks.same_device(weight, weight_name, hidden, hidden_name)
    if not _autocasts(hidden) and weight.dtype != hidden.dtype:
        raise TypeError(
            f"{hidden_name} is {hidden.dtype} and {weight_name} {weight.dtype}: they must agree, or be under"
            " torch.autocast"
        )
    if bias is not None:
        bias = checks.like(bias, bias_name, torch.Size([weight.shape[0]]), weight, weight_name)
    return Model(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
