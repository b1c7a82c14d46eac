"""A preference loss on hidden states, step by step: validate, agree, count and plan, run, assemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd.head import Known, KnownGradient
from ..autograd.saved import by_name
from ..core import checks, devices
from ..core.fields import stats_dtype
from ..core.sequences import Sequences
from ..distributed.fingerprint import Fingerprint
from ..distributed.groups import Ranks, SequenceShard
from ..head import chunks
from ..head import plan as head_plan
from ..head.chunks import Gradients
from ..head.plan import LinearPlan
from ..objectives import LossType
from . import preference, valid_rows
from .head_inputs import HeadInputs, HeadRequest, fields_with_softmax
from .pair_chunks import PairChunks
from .preference import Batch, Loss, LossInputs, LossRequest
from .results import Outputs, TokenDPOOutput
from .unit_chunks import groups_of
from .valid_rows import Counts


class HiddenLossRequest(NamedTuple):
    """A call of `fused_linear_token_dpo` or `plan_linear`, as it came: the arguments, named as there.

    outputs: names of further per-row results, without gradient.
    """

    policy_hidden: Any
    lm_head_weight: Any
    labels: Any
    lm_head_bias: Any = None
    reference_hidden: Any = None
    reference_weight: Any = None
    reference_bias: Any = None
    reference_logps: Any = None
    beta: Any = 0.1
    loss_type: LossType = "sigmoid"
    loss_weights: Any = None
    label_smoothing: Any = 0.0
    loss_kwargs: Any = None
    token_weights: Any = None
    cu_seqlens: Any = None
    valid_rows: Any = None
    temperature: Any = 1.0
    ignore_index: Any = -100
    reduction: Any = "mean"
    softcap: Any = None
    logit_scale: Any = 1.0
    logits_dtype: Any = "float32"
    plan: str = "auto"
    max_chunk_bytes: Any = None
    backend: str = "auto"
    tp_group: Any = None
    sp_group: Any = None
    outputs: Sequence[str] = ()

    def model(self) -> HeadRequest:
        """The models and how their logits are made."""
        return HeadRequest(
            function="fused_linear_token_dpo",
            names=("policy_hidden", "lm_head_weight", "lm_head_bias"),
            hidden=self.policy_hidden,
            weight=self.lm_head_weight,
            bias=self.lm_head_bias,
            labels=self.labels,
            reference_hidden=self.reference_hidden,
            reference_weight=self.reference_weight,
            reference_bias=self.reference_bias,
            temperature=self.temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            logits_dtype=self.logits_dtype,
            ignore_index=self.ignore_index,
            max_chunk_bytes=self.max_chunk_bytes,
            backend=self.backend,
            tp_group=self.tp_group,
            sp_group=self.sp_group,
        )

    def loss(self) -> LossRequest:
        """The loss and its tensors."""
        return LossRequest(
            reference_logps=self.reference_logps,
            beta=self.beta,
            loss_type=self.loss_type,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            loss_kwargs=self.loss_kwargs,
            token_weights=self.token_weights,
            cu_seqlens=self.cu_seqlens,
            reduction=self.reduction,
            policy_name="policy_hidden",
            model_name="reference_hidden",
        )

    def prepare(self) -> HiddenLoss:
        """Check everything, agree with the other ranks if there are any, count the valid rows and choose a plan."""
        model, agreement = self.model().local()
        with agreement as ranks:
            checked = self._validate(model, ranks)
            host_checked = self._check_valid_rows(checked)
            shard = None
            if ranks is not None:
                shard = ranks.sequence_shard(checked.tensors.sequences, checked.inputs.dtype, checked.options)
        return self._plan(self._count(checked, shard, host_checked))

    def _validate(self, model: HeadRequest, ranks: Ranks | None) -> _Checked:
        """Check the arguments; ranks of `tp_group` agree on the call before its tensors of the loss are checked."""
        request = self.loss()
        checks.dense_or_packed(model.hidden, "policy_hidden", "H", packed=self.cu_seqlens is not None)
        loss = request.loss()
        given = None if self.valid_rows is None else checks.row_counts(self.valid_rows, "valid_rows")
        inputs, has_model = model.validate(), model.reference_hidden is not None
        options: Fingerprint | None = None
        arguments: dict[str, Any] = {}
        if ranks is not None:
            options = loss.fingerprint(self.cu_seqlens is not None, has_model)
            arguments = {**request.shared_tensors(), **valid_rows.as_equal(given, ranks)}
        inputs = inputs.agree(ranks, model, options, arguments, plan=self.plan)
        tensors = request.inputs(loss, model.labels, has_model, stats_dtype(inputs.dtype), inputs.ignore_index)
        return _Checked(inputs, loss, tensors, given, options)

    def _check_valid_rows(self, checked: _Checked) -> bool:
        """Compare the given numbers with the labels where the host can read them; whether it has."""
        inputs, loss, tensors, given, _ = checked
        # With sp_group, which rows LD-DPO leaves out is known only after the ranks have agreed: too late for an error
        # on one of them.
        alone = self.sp_group is None or loss.spec.ld_alpha is None
        reads = checks.readable(inputs.labels) and alone
        if given is not None:
            valid_rows.check_sizes(given, Sequences.of(checked.labels(), tensors.cu_seqlens))
            if reads:
                valid_rows.check_counts(given, checked.batch(None))
        return reads

    def _count(self, checked: _Checked, shard: SequenceShard | None, host_checked: bool) -> HiddenLoss:
        """Fold weights and masks into the labels, and count the rows that are valid then."""
        inputs, loss, tensors, given, _ = checked
        batch = checked.batch(shard)
        counts = Counts.of(batch, given, host_checked)
        labels, valid = batch.labels.reshape(-1), None
        if counts.known is not None and labels.device.type != "meta":
            # On a CPU looking for the rows needs no number, and is faster without; a number that is given is kept to.
            found = given is None and devices.on_cpu(labels.device)
            valid = chunks.valid_rows(labels, inputs.ignore_index, None if found else sum(counts.known))
        inputs = inputs._replace(labels=labels, valid=valid, valid_rows=None if given is None else sum(given))
        has_model = inputs.reference is not None
        fields = loss.fields(has_model)
        if self.outputs:
            read = (*self.outputs, *(("reference_logps",) if has_model else ()))
            fields |= Outputs.of(read, "reference_hidden", has_model).fields
        return HiddenLoss(
            inputs=inputs,
            loss=loss,
            batch=batch,
            reference=tensors.reference,
            counts=counts,
            fields=fields,
            plan=None,
        )

    def _plan(self, work: HiddenLoss) -> HiddenLoss:
        inputs, counts = work.inputs, work.counts.known
        if counts is None:
            rows = inputs.labels.shape[0]
            unit_rows = rows if work.batch.cu_seqlens is not None else 2 * work.batch.labels.shape[1]
        else:
            half, rows = len(counts) // 2, sum(counts)
            unit_rows = max(map(sum, zip(counts[:half], counts[half:], strict=True)))
        plan = head_plan.plan(
            inputs.work(
                self.plan,
                work.fields,
                only_logps=not work.loss.spec.needs_kl,
                coupled=work.coupled(),
                valid_rows=rows,
                unit_rows=unit_rows,
            )
        )
        if plan.name == "pair_chunks" and counts is not None:
            plan = plan._replace(chunks=len(groups_of(counts, plan.chunk_rows)) if rows else 0)
        return work._replace(plan=plan)


class _Checked(NamedTuple):
    """Checked arguments, before the rows are counted."""

    inputs: HeadInputs
    loss: Loss
    tensors: LossInputs
    given: list[int] | None
    options: Fingerprint | None  # what ranks that share the loss must have alike; None without ranks

    def labels(self) -> Tensor:
        """`[2B, T]`, or `[1, N]` of a packed batch; contiguous."""
        labels = self.inputs.labels.view(self.inputs.shape)
        return labels.unsqueeze(0) if labels.dim() == 1 else labels

    def batch(self, shard: SequenceShard | None) -> Batch:
        """The rows and what each counts for."""
        return Batch.of(
            self.labels(),
            self.tensors.weights,
            self.tensors.cu_seqlens,
            spec=self.loss.spec,
            ignore_index=self.inputs.ignore_index,
            dtype=stats_dtype(self.inputs.dtype),
            shard=shard,
        )


class HiddenLoss(NamedTuple):
    """A checked preference loss on hidden states, with the plan that runs it.

    inputs: the models and the valid rows.
    loss: what to compute.
    batch: the rows and what each counts for.
    reference: cached log-probs.
    counts: how many rows of each sequence are valid.
    fields: mask of the per-row results.
    plan: how the GEMMs run; None before it is chosen.
    """

    inputs: HeadInputs
    loss: Loss
    batch: Batch
    reference: preference.Reference
    counts: Counts
    fields: int
    plan: LinearPlan | None

    def coupled(self) -> str | None:
        """Why the loss of a pair is not known from that pair alone; None if it is."""
        if not self.loss.spec.separable:
            return "the objective couples the pairs of the batch"
        if self.batch.sequences.shard is not None:
            return "sp_group spreads each pair over ranks"
        if self.loss.reduction == "none":
            return "reduction='none' leaves each pair's factor to what follows"
        if torch.compiler.is_compiling() or (self.counts.known is None and self.inputs.labels.device.type != "meta"):
            # (Where the compiler leaves a part of this to Python, the parts differ in what they call compiling.)
            return "inside torch.compile the loss is differentiated by the compiler"
        return None

    def run(self) -> tuple[TokenDPOOutput, dict[str, Tensor]]:
        """Run the plan; the loss, and the per-row results by name."""
        inputs, plan, batch = self.inputs, self.plan, self.batch
        assert plan is not None
        inputs.refuse_meta("policy_hidden")
        known = None
        if plan.name == "pair_chunks":
            stats, known = self._pair_chunks(plan)
        else:
            stats = inputs.stats(plan, self.fields, self.loss.differentiable)
        factor = self.counts.wrong(batch)
        stats = valid_rows.times(stats, factor)  # before the sums, which other ranks share
        output = preference.loss_and_rewards(
            {name: value.view(batch.labels.shape) for name, value in stats.items()},
            batch,
            self.reference,
            self.loss,
            backend=inputs.backend,
            shape=inputs.shape,
        )
        if known is not None:
            output = output._replace(loss=KnownGradient.apply(output.loss, *inputs.policy, known))
        if factor is not None:  # what the loss made of the rows, and the gradients that are known already
            output = TokenDPOOutput(*(None if x is None else x * factor for x in output))  # type: ignore[arg-type]
        if not torch.compiler.is_compiling():
            output.plan = plan
        return output, stats

    def _pair_chunks(self, plan: LinearPlan) -> tuple[dict[str, Tensor], Known]:
        """The fields of all rows by name, and the gradients that follow from each chunk's own loss."""
        inputs = self.inputs
        fields = fields_with_softmax(self.fields, inputs.reference is not None)
        call = inputs.call(fields, plan.chunk_rows)
        pairs = PairChunks(call, self.batch, self.reference, self.loss, counts=self.counts)
        needs = inputs.needs()  # now: inside a backward nothing does

        def run() -> tuple[Tensor, Gradients]:
            return chunks.known_gradients(call, pairs, needs)

        values, gradients = run()
        stats = by_name(self.fields, fields, (), (values,))
        return stats, Known(gradients, lambda: run()[1])
