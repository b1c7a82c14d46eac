"""The public functions on hidden states: logits exist only as a chunk, never as a whole.

Checks of arguments, choice of a plan (`qkernels.head.plan`), and assembly of the outputs; the work is in
`qkernels.head.chunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, objectives
from ..autograd.head import FrozenHead, Gradients, KnownGradient, LinearStats
from ..autograd.saved import by_name
from ..core import checks
from ..core.columns import BIT, DIFFERENTIABLE, REFERENCE_STATE, STATE, column_names, stats_dtype
from ..core.compile import constant_when_compiled, eager_with_groups
from ..core.sequences import Sequences
from ..distributed import groups, vocab_parallel
from ..distributed.groups import Ranks
from ..distributed.vocab_parallel import Shard
from ..head import chunks
from ..head import plan as head_plan
from ..head.chunks import LinearConfig, Model, Selection
from ..head.plan import LinearPlan
from ..head.products import logits_product
from ..objectives import LossSpec, LossType
from . import preference
from .logits import TokenStats, check_outputs
from .preference import Batch, PlannedOutput, Reference, TokenDPOOutput


class _Call(NamedTuple):
    """Checked arguments: models as `[N, H]`, labels `[N]`, and how the products run."""

    policy: Model
    reference: Model | None
    labels: Tensor
    valid: Tensor | None  # numbers of the rows that count; None where the host does not know how many, or compiles
    valid_rows: int | None  # how many rows count, as the caller has said; None where nothing was said
    shape: torch.Size  # of the caller's labels
    dtype: torch.dtype
    reference_dtype: torch.dtype
    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    max_chunk_bytes: int | None
    shard: Shard | None

    @property
    def vocab(self) -> int:
        return self.policy.weight.shape[0]

    def config(self, columns: int, chunk_rows: int) -> LinearConfig:
        return LinearConfig(
            columns,
            self.temperature,
            self.softcap,
            self.logit_scale,
            self.ignore_index,
            self.dtype,
            self.reference_dtype,
            chunk_rows,
            self.backend,
            self.valid_rows,
            self.shard,
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The arguments of the autograd functions, but for the config."""
        reference = self.reference or (None, None, None)
        return (*self.policy, *reference, self.labels, self.valid)

    def needs(self) -> tuple[bool, bool, bool]:
        """Whether hidden states, weight and bias need a gradient."""
        if not torch.is_grad_enabled():
            return False, False, False
        hidden, weight, bias = self.policy
        return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


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


def _prepare(
    hidden: Any,
    weight: Any,
    bias: Any,
    reference: tuple[Any, Any, Any],
    labels: Any,
    temperature: Any,
    softcap: Any,
    logit_scale: Any,
    ignore_index: Any,
    max_chunk_bytes: Any,
    backend: str,
    names: tuple[str, str, str],
    ranks: Ranks | None,
    equal: dict[str, Any],
    agreed: dict[str, Any],
) -> _Call:
    """Check what all functions on hidden states share, and agree on it with the ranks that share the vocabulary.

    Args (the last two matter with `ranks` only):
        equal: tensors that all ranks of `tp_group` have to have alike, besides the labels.
        agreed: what else has to be the same there.
    """
    policy = _model(hidden, weight, bias, names)
    labels = checks.labels(labels, hidden, names[0])
    reference_hidden, reference_weight, reference_bias = reference
    reference_model = None
    if reference_hidden is None:
        for name, value in (("reference_weight", reference_weight), ("reference_bias", reference_bias)):
            if value is not None:
                raise ValueError(f"{name} given without reference_hidden")
    else:
        if reference_weight is None:
            raise ValueError(
                f"reference_hidden needs reference_weight (pass {names[1]} itself if both models share the head)"
            )
        reference_model = _model(
            reference_hidden,
            reference_weight,
            reference_bias,
            ("reference_hidden", "reference_weight", "reference_bias"),
        )
        if reference_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"reference_hidden must have the rows of {names[0]}, {tuple(hidden.shape[:-1])}, got shape"
                f" {tuple(reference_hidden.shape)}"
            )
        if reference_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"reference_weight has V = {reference_weight.shape[0]} and {names[1]} V = {weight.shape[0]}:"
                " policy and reference must share the vocabulary"
            )
        checks.same_device(reference_hidden, "reference_hidden", hidden, names[0])
        if (reference_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(
                f"reference_hidden is {reference_hidden.dtype} and {names[0]} {hidden.dtype}: use float64 for both or"
                " neither"
            )
        reference_model = Model(*(None if x is None else x.detach() for x in reference_model))  # type: ignore[arg-type]
    ignore_index = checks.ignore_index(ignore_index)
    if softcap is not None:
        softcap = checks.positive(softcap, "softcap")
    if max_chunk_bytes is not None and (isinstance(max_chunk_bytes, bool) or not isinstance(max_chunk_bytes, int)):
        raise TypeError(f"max_chunk_bytes must be an int or None, got {type(max_chunk_bytes).__name__}")
    dtype = _compute_dtype(hidden)
    checked = _Call(
        policy,
        reference_model,
        labels.reshape(-1).contiguous(),
        None,
        None,
        labels.shape,
        dtype,
        dtype if reference_model is None else _compute_dtype(reference_hidden),
        checks.positive(temperature, "temperature"),
        softcap,
        checks.positive(logit_scale, "logit_scale"),
        ignore_index,
        backends.resolve_for(backend, hidden.device, stats_dtype(dtype)),
        max_chunk_bytes,
        None,
    )
    if ranks is not None:
        agreed = agreed | {
            f"{names[0]}.shape[-1]": hidden.shape[-1],
            "dtype": dtype,
            "a reference": reference_model is not None,
            "requires_grad of hidden states, weight, bias": checked.needs(),
            "temperature, softcap, logit_scale, ignore_index": (temperature, softcap, logit_scale, ignore_index),
            "max_chunk_bytes": max_chunk_bytes,
        }
        shard = vocab_parallel.agree(ranks, checked.vocab, labels, ignore_index, equal, agreed, chunked=True)
        checked = checked._replace(shard=shard)
    if checked.shard is None:
        checks.label_range(labels, checked.vocab, ignore_index)  # rows lose their numbers in the chunks
    return checked


def _refuse_meta(call: _Call, name: str) -> None:
    if call.labels.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which has no values to compute with; plan_linear takes it")


def _host_can_count(labels: Tensor) -> bool:
    """Whether numbers of rows can be known: not those of meta tensors, nor inside torch.compile."""
    return not torch.compiler.is_compiling() and labels.device.type != "meta"


def _counts(valid: Tensor, sequences: Sequences) -> list[int] | None:
    """Valid rows of each sequence; None where the host cannot know. On a GPU this is where it waits, and only here."""
    if not _host_can_count(valid):
        return None
    return [int(n) for n in _sums(valid, sequences).tolist()]


def _sums(valid: Tensor, sequences: Sequences) -> Tensor:
    """Valid rows of each sequence, `[2B]` float64, where the rows are."""
    return sequences.here().sums(valid.double())


def _check_sizes(given: list[int], sequences: Sequences) -> None:
    """ValueError for numbers of valid rows that no labels of this shape could have."""
    number, length, packed = sequences.number, sequences.length, sequences.offsets is not None
    if len(given) != number:
        raise ValueError(f"valid_rows must have one number for each of the {number} sequences, got {len(given)}")
    for i, n in enumerate(given):
        if n > length:
            raise ValueError(f"valid_rows[{i}] is {n}, but {'the batch' if packed else 'a sequence'} has {length} rows")
    if packed and sum(given) > length:
        raise ValueError(f"valid_rows is {sum(given)} rows in all, but the batch has {length}")


def _check_counts(given: list[int], batch: Batch) -> None:
    """ValueError for numbers of valid rows that are not those of the labels: the host looks."""
    counts = _sums(batch.used, batch.sequences).tolist()
    for i, (said, n) in enumerate(zip(given, counts, strict=True)):
        if said != n:
            raise ValueError(
                f"valid_rows[{i}] is {said}, but {int(n)} rows of sequence {i} count (a label that is not ignore_index,"
                " a token weight that is not 0, and with ld_alpha=0 within the pair's shared length)"
            )


def _compare_number(given: int, call: _Call) -> Tensor | None:
    """`_check_sizes` and `_check_counts` of all rows together; where the host does not look, `_nan_if` of it."""
    labels = call.labels
    if given > labels.shape[0]:
        raise ValueError(f"valid_rows is {given}, but there are {labels.shape[0]} rows")
    if labels.device.type == "meta":
        return None
    count = (labels != call.ignore_index).sum()
    if not checks.readable(labels):
        return _nan_if(count != given)
    if int(count) != given:
        raise ValueError(f"valid_rows is {given}, but {int(count)} labels are not ignore_index ({call.ignore_index})")
    return None


def _as_tensor(given: int | list[int] | None) -> Tensor | None:
    """On the CPU: ranks compare values of tensors when they agree for the first time, those of numbers on each call."""
    return None if given is None else torch.tensor(given, dtype=torch.int64)


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`[n]` int64. On a GPU a copy from page-locked memory, for which the host does not wait.

    A captured CUDA graph would copy again from memory that is somebody else's by then: there, and for the compiler,
    each number is an argument of a kernel that writes it.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])


def _nan_if(wrong: Tensor) -> Tensor:
    """A factor `[]`: NaN if `wrong` `[]`, else 1. A factor, not a term: gradients become NaN as well."""
    return torch.ones((), device=wrong.device).masked_fill(wrong, torch.nan)


def _spoiled(stats: dict[str, Tensor], factor: Tensor | None) -> dict[str, Tensor]:
    """Per-row results times a factor of `_nan_if`."""
    return stats if factor is None else {name: value * factor for name, value in stats.items()}


def _plan(
    call: _Call,
    wanted: str,
    columns: int,
    *,
    only_logps: bool,
    pairwise: str | None,
    valid_rows: int,
    pair_rows: int,
) -> LinearPlan:
    """Choose the plan and work out what it costs."""
    needs_hidden, needs_weight, needs_bias = call.needs()
    trains_head = needs_weight or needs_bias
    grad = needs_hidden or trains_head
    device = call.labels.device
    reference_dtype = None if call.reference is None else call.reference_dtype
    widest, free = (call.vocab, None) if call.shard is None else (call.shard.widest, call.shard.free)
    per_row = chunks.bytes_per_row(widest, device, call.dtype, reference_dtype, grad, call.softcap is not None)
    # Room for a whole pair is of use to one plan only.
    wants_pairs = wanted == "pair_chunks" or (wanted == "auto" and (trains_head or not only_logps))
    wants_pairs = wants_pairs and grad and pairwise is None
    fit = head_plan.chunk_rows(
        per_row, call.max_chunk_bytes, device, max(valid_rows, 1), pair_rows if wants_pairs else 0, widest, free
    )
    name, reason = head_plan.choose(
        wanted,
        trains_hidden=needs_hidden,
        trains_head=trains_head,
        only_logps=only_logps,
        pairwise=pairwise,
        pair_rows=pair_rows,
        chunk_rows=fit,
    )
    backward = needs_hidden + needs_weight
    products = {"forward_only": 1, "frozen_head": 2, "pair_chunks": 1 + backward}.get(name, 2 + backward)
    with_kl = bool(columns & (BIT["kl_reference_policy"] | BIT["kl_policy_reference"]))
    reference_products = 0 if call.reference is None else 2 if name == "recompute" and with_kl else 1
    number = -(-valid_rows // fit) if valid_rows else 0
    peak = fit * per_row + chunks.bytes_besides(
        call.policy, call.reference, call.dtype, reference_dtype, name, call.needs(), fit, number
    )
    return LinearPlan(
        name,
        reason,
        valid_rows,
        fit,
        number,
        products,
        reference_products,
        fit * per_row,
        peak,
        logits_product(device, call.dtype),
    )


def _columns_with_state(columns: int, reference: bool) -> int:
    """What a backward needs besides the results asked for."""
    columns |= STATE
    if reference and columns & (BIT["kl_reference_policy"] | BIT["kl_policy_reference"]):
        columns |= REFERENCE_STATE
    return columns


def _run(call: _Call, name: str, columns: int, carrying: tuple[str, ...], chunk_rows: int) -> dict[str, Tensor]:
    """Per-row results by name, `[N]`, those of `carrying` with autograd as the plan has it."""
    if name == "forward_only":
        config = call.config(columns, chunk_rows)
        if torch.compiler.is_compiling():
            return by_name(columns, (), LinearStats.apply(*call.tensors, config, ()))
        return by_name(columns, (), (chunks.stats(call.policy, call.reference, call.labels, config, call.valid),))
    columns = _columns_with_state(columns, call.reference is not None)
    config = call.config(columns, chunk_rows)
    if name == "frozen_head":
        return by_name(columns, ("logps",), FrozenHead.apply(*call.tensors, config))
    return by_name(columns, carrying, LinearStats.apply(*call.tensors, config, carrying))


@eager_with_groups
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    outputs: Sequence[str] = ("logps", "logsumexp"),
    detached: Sequence[str] = (),
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_rows: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
) -> TokenStats:
    """Any subset of the per-token numbers of a policy (and its reference), from hidden states.

    Logits are softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap) / temperature, in fp32, a chunk at a
    time. Rows with an ignored label are dropped before the first product.

    Args:
        hidden: `[..., H]`, the last hidden states (after the final norm); fp32, bf16, fp16 or fp64.
        weight: `[V, H]`, the head's, in the dtype of `hidden` (any under autocast).
        labels: `[...]` int64, aligned with the rows (see `shift_labels`); `ignore_index` marks rows that cost nothing.
        bias: `[V]`.
        reference_hidden, reference_weight, reference_bias: of the reference, which may have an H of its own; constants.
        outputs: names of fields of `TokenStats`; only these are computed, the others are None.
        detached: those of them that need no gradient. With a frozen head, log-probs alone take two products where
            log-probs and an entropy with gradient take three.
        softcap: of Gemma; None for none.
        logit_scale: of Cohere (`logit_scale`) and Granite (1 / `logits_scaling`), applied before the softcap.
        temperature: divides the logits; above 0.
        ignore_index: the label that marks a row to be left out.
        valid_rows: how many labels are not `ignore_index`, exactly, counted where the labels were on the CPU. With it
            the host never waits for a GPU (but see `tp_group`); without it, once.
        max_chunk_bytes: memory for a chunk's logits and their gradient; None takes a share of the free memory.
        backend: "auto", or by name; `qkernels.info()` lists what can run.
        tp_group: process group (or 1-D `DeviceMesh`) over whose ranks, in their order, the vocabulary is split: each
            holds its rows of weight and bias, and the same hidden states and labels (of the whole vocabulary). A
            weight that is a DTensor sharded in dimension 0 over a 1-D mesh implies its group. dL/dhidden is summed
            over the ranks. See docs/scaling.md.

    Returns:
        `TokenStats` of fp32 (fp64 for fp64 inputs) tensors shaped like `labels`; log-probs, logsumexp, entropy and the
        KLs are differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or option; a budget too small for one row (the message says
            the smallest that works); ranks of a group that disagree, on every one of them; a `valid_rows` that is not
            what the labels have (CPU, or QKERNELS_CHECK=1; on a GPU and inside torch.compile all rows and their
            gradients become NaN, and is_top1 False).
        RuntimeError: another rank of a group failed; the message quotes its error.
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
    """
    tp_group, hint, local = groups.to_local(
        tp_group,
        hidden=(hidden, None),
        weight=(weight, 0),
        bias=(bias, 0),
        reference_hidden=(reference_hidden, None),
        reference_weight=(reference_weight, 0),
        reference_bias=(reference_bias, 0),
        labels=(labels, None),
    )
    hidden, weight, bias, reference_hidden, reference_weight, reference_bias, labels = local
    with groups.ranks(tp_group, None, hidden, hint) as ranks:
        outputs, columns = check_outputs(outputs, "reference_hidden", reference_hidden is not None)
        if valid_rows is not None:
            valid_rows = checks.row_count(valid_rows, "valid_rows")
        call = _prepare(
            hidden,
            weight,
            bias,
            (reference_hidden, reference_weight, reference_bias),
            labels,
            temperature,
            softcap,
            logit_scale,
            ignore_index,
            max_chunk_bytes,
            backend,
            ("hidden", "weight", "bias"),
            ranks,
            {} if ranks is None else {"valid_rows": _as_tensor(valid_rows)},
            {"the call": "linear_token_stats", "outputs": outputs},
        )
        factor = None if valid_rows is None else _compare_number(valid_rows, call)
    _refuse_meta(call, "hidden")
    unknown = [name for name in detached if name not in outputs]
    if unknown:
        raise ValueError(f"detached names {unknown}, which are not among the outputs {list(outputs)}")
    differentiable = tuple(name for name in DIFFERENTIABLE if name in outputs and name not in detached)
    if not differentiable:  # nothing to be saved for a backward that cannot come
        call = call._replace(policy=Model(*(None if x is None else x.detach() for x in call.policy)))  # type: ignore[arg-type]
    call = call._replace(valid_rows=valid_rows)
    if _host_can_count(call.labels):
        call = call._replace(valid=chunks.valid_rows(call.labels, call.ignore_index, valid_rows))
    plan = _plan(
        call,
        "auto",
        columns,
        only_logps=differentiable == ("logps",),
        pairwise="the upstream gradient is not known in advance",
        valid_rows=(call.labels if call.valid is None else call.valid).shape[0],
        pair_rows=0,
    )
    stats = _spoiled(_run(call, plan.name, columns, differentiable, plan.chunk_rows), factor)
    result = {name: stats[name].view(call.shape) for name in outputs}
    if "is_top1" in result:
        result["is_top1"] = result["is_top1"] > 0
    return TokenStats(**result)


@eager_with_groups
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    valid_rows: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
) -> Tensor:
    """Log-probability of each label, from hidden states; differentiable under any loss.

    Two products if the head needs no gradient, four otherwise, one without gradients; each over valid rows only.

    Args:
        As `linear_token_stats`.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), nats; 0 at ignored rows.

    Raises:
        As `linear_token_stats`.
    """
    stats = linear_token_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        outputs=("logps",),
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
        valid_rows=valid_rows,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        tp_group=tp_group,
    )
    assert stats.logps is not None
    return stats.logps


class _Loss(NamedTuple):
    """A checked preference loss on hidden states, with its plan."""

    call: _Call
    objective: LossSpec
    batch: Batch
    reference: Reference
    counts: list[int] | None  # valid rows of each sequence; None where the host does not know them, or compiles
    unchecked: Tensor | None  # the same `[2B]` on the device, where the caller has said them and nobody looked
    beta: float
    reduction: str
    columns: int
    plan: LinearPlan

    def pairs(self) -> list[tuple[int, int]]:
        """Consecutive pairs whose valid rows fill a chunk, as ranges of pair numbers."""
        assert self.counts is not None
        half, size = len(self.counts) // 2, self.plan.chunk_rows
        groups, start, filled = [], 0, 0
        for pair in range(half):
            here = self.counts[pair] + self.counts[half + pair]
            if filled and filled + here > size:
                groups.append((start, pair))
                start, filled = pair, 0
            filled += here
        groups.append((start, half))
        return groups

    def selections(self, groups: list[tuple[int, int]]) -> list[Selection]:
        """The valid rows of each group: those of its chosen sequences, then those of its rejected ones."""
        assert self.counts is not None
        labels, half = self.call.labels, len(self.counts) // 2
        if len(groups) == 1 and sum(self.counts) == labels.shape[0]:
            return [slice(0, labels.shape[0])]
        ends = [0]
        for count in self.counts:
            ends.append(ends[-1] + count)
        index = self.call.valid
        assert index is not None
        return [
            torch.cat([index[ends[first] : ends[last]], index[ends[half + first] : ends[half + last]]])
            for first, last in groups
        ]

    def objective_of(
        self, groups: list[tuple[int, int]], selections: list[Selection]
    ) -> Callable[[int, Tensor], dict[str, Tensor]]:
        """The loss of one chunk of pairs, differentiated with respect to the chunk's columns."""
        assert self.counts is not None
        half, batch, reference = len(self.counts) // 2, self.batch, self.reference
        # Where sequences begin among the valid rows, on the device: numbers sent there would make the host wait. What
        # the caller has said may be wrong, but the chunks are cut accordingly.
        lengths = _sums(batch.used, batch.sequences) if self.unchecked is None else self.unchecked
        starts = nn.functional.pad(lengths, (1, 0)).cumsum(0).int()
        share = 1.0 / half if self.reduction == "mean" else 1.0
        # LD-DPO with alpha 0 leaves rows out that a mean over the answer's tokens still counts.
        discounts = self.objective.ld_alpha is not None
        counts = batch.sequences.sums(batch.base_weights, keep_double=True) if discounts else None
        names = column_names(self.columns)

        def gradient(number: int, values: Tensor) -> dict[str, Tensor]:
            (first, last), where = groups[number], selections[number]
            chosen = starts[first : last + 1] - starts[first]
            rejected = starts[half + first + 1 : half + last + 1] - starts[half + first]
            cu_seqlens = torch.cat([chosen, chosen[-1] + rejected])

            def pick(per_row: Tensor) -> Tensor:
                return per_row.reshape(-1)[where].unsqueeze(0)

            def pick_pairs(per_sequence: Tensor) -> Tensor:
                return torch.cat([per_sequence[first:last], per_sequence[half + first : half + last]])

            labels = pick(batch.labels)
            part = Batch(
                labels,
                pick(batch.used),
                pick(batch.weights),
                pick(batch.base_weights),
                Sequences.of(labels, cu_seqlens),
                cu_seqlens,
                batch.ignore_index,
                None if counts is None else pick_pairs(counts),
            )
            known = Reference(
                None if reference.tokens is None else pick(reference.tokens),
                None if reference.sequence_sums is None else pick_pairs(reference.sequence_sums),
            )
            stats = dict(zip(names, values, strict=True))
            upstream = preference.loss_gradient(stats, part, known, self.objective, self.beta, self.call.backend)
            return {name: g * share for name, g in upstream.items()}

        return gradient


def _prepare_loss(
    policy_hidden: Any,
    lm_head_weight: Any,
    labels: Any,
    lm_head_bias: Any,
    reference_hidden: Any,
    reference_weight: Any,
    reference_bias: Any,
    reference_logps: Any,
    beta: Any,
    loss_type: LossType,
    loss_weights: Any,
    label_smoothing: Any,
    loss_kwargs: Any,
    token_weights: Any,
    cu_seqlens: Any,
    valid_rows: Any,
    temperature: Any,
    ignore_index: Any,
    reduction: Any,
    softcap: Any,
    logit_scale: Any,
    plan: str,
    max_chunk_bytes: Any,
    backend: str,
    tp_group: Any,
    sp_group: Any,
    outputs: Sequence[str] = (),
) -> _Loss:
    """Check all arguments of the preference loss, agree on them with the other ranks, and choose a plan.

    outputs: further per-row results, without gradient.
    """
    tp_group, hint, local = groups.to_local(
        tp_group,
        policy_hidden=(policy_hidden, None),
        lm_head_weight=(lm_head_weight, 0),
        lm_head_bias=(lm_head_bias, 0),
        reference_hidden=(reference_hidden, None),
        reference_weight=(reference_weight, 0),
        reference_bias=(reference_bias, 0),
        labels=(labels, None),
    )
    (
        policy_hidden,
        lm_head_weight,
        lm_head_bias,
        reference_hidden,
        reference_weight,
        reference_bias,
        labels,
    ) = local
    with groups.ranks(tp_group, sp_group, policy_hidden, hint) as ranks:
        wanted = 3 if cu_seqlens is None else 2
        if checks.tensor(policy_hidden, "policy_hidden").dim() != wanted:
            expected = "[2B, T, H], or [N, H] with cu_seqlens" if cu_seqlens is None else "[N, H] with cu_seqlens"
            raise ValueError(f"policy_hidden must have shape {expected}; got {tuple(policy_hidden.shape)}")
        beta = checks.positive(beta, "beta")
        reduction = checks.choice(reduction, "reduction", ("mean", "sum", "none"))
        objective = objectives.resolve(loss_type, loss_weights, label_smoothing, loss_kwargs)
        live = reference_hidden is not None
        agreed = {} if ranks is None else preference.described(objective, beta, reduction, cu_seqlens, live)
        said = None if valid_rows is None else checks.row_counts(valid_rows, "valid_rows")
        call = _prepare(
            policy_hidden,
            lm_head_weight,
            lm_head_bias,
            (reference_hidden, reference_weight, reference_bias),
            labels,
            temperature,
            softcap,
            logit_scale,
            ignore_index,
            max_chunk_bytes,
            backend,
            ("policy_hidden", "lm_head_weight", "lm_head_bias"),
            ranks,
            {"token_weights": token_weights, "cu_seqlens": cu_seqlens, "reference_logps": reference_logps}
            | ({} if ranks is None else {"valid_rows": _as_tensor(said)}),
            {"the call": "fused_linear_token_dpo", "plan": plan, **agreed},
        )
        if cu_seqlens is None:
            checks.pairs(labels.shape[0], "policy_hidden holds")
        else:
            cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
        weights = preference.check_token_weights(token_weights, labels)
        # Contiguous, as every operation takes labels: the caller's may be a column of something, or expanded.
        as_rows = (labels.unsqueeze(0) if labels.dim() == 1 else labels).contiguous()

        number = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dtype = stats_dtype(call.dtype)
        reference = Reference.of(reference_logps, live, "reference_hidden", objective, labels, number, dtype)
        how = (as_rows, weights, cu_seqlens, objective, call.ignore_index, dtype)
        # With sp_group, which rows LD-DPO leaves out is known only after the ranks have agreed: too late for an error
        # on one of them.
        looks = checks.readable(labels) and (sp_group is None or objective.ld_alpha is None)
        if said is not None:
            _check_sizes(said, Sequences.of(as_rows, cu_seqlens))
            if looks:
                _check_counts(said, Batch.of(*how))
        positions = None if ranks is None else ranks.sequence_shard(number, call.dtype, agreed)
    batch = Batch.of(*how, positions)
    call = call._replace(labels=batch.labels.reshape(-1))
    columns = preference.columns(objective, live)
    if outputs:
        columns |= check_outputs((*outputs, *(("reference_logps",) if live else ())), "reference_hidden", live)[1]
    compiles, meta = torch.compiler.is_compiling(), labels.device.type == "meta"
    counts = _counts(batch.used, batch.sequences) if said is None else None if compiles else said
    unchecked = None
    if said is not None:
        call = call._replace(valid_rows=sum(said))
        unchecked = None if looks or meta else _on_device(said, labels.device)
    if counts is None:
        number = call.labels.shape[0]
        pair_rows = 2 * labels.shape[1] if cu_seqlens is None else number
    else:
        half, number = len(counts) // 2, sum(counts)
        pair_rows = max(map(sum, zip(counts[:half], counts[half:], strict=True)))
        if not meta:
            call = call._replace(valid=chunks.valid_rows(call.labels, call.ignore_index, number))
    pairwise = None
    if not objective.separable:
        pairwise = "the objective couples the pairs of the batch"
    elif positions is not None:
        pairwise = "sp_group spreads each pair over ranks"
    elif reduction == "none":
        pairwise = "reduction='none' leaves each pair's factor to what follows"
    elif compiles or (counts is None and not meta):
        # (Where the compiler leaves a part of this to Python, the parts differ in what they call compiling.)
        pairwise = "inside torch.compile the loss is differentiated by the compiler"
    chosen = _plan(
        call,
        plan,
        columns,
        only_logps=not objective.needs_kl,
        pairwise=pairwise,
        valid_rows=number,
        pair_rows=pair_rows,
    )
    loss = _Loss(call, objective, batch, reference, counts, unchecked, beta, reduction, columns, chosen)
    if chosen.name == "pair_chunks" and counts is not None:
        loss = loss._replace(plan=chosen._replace(chunks=len(loss.pairs()) if number else 0))
    return loss


@eager_with_groups
def plan_linear(
    policy_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    plan: str = "auto",
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> LinearPlan:
    """What `fused_linear_token_dpo` would do with these arguments, without doing it.

    Takes the same arguments, checks them the same way, and runs no product. Tensors on the meta device will do (all
    rows count as valid then, or as many as `valid_rows` says). With a `tp_group` or `sp_group` every rank of it has to
    call this.

    Returns:
        `LinearPlan`: name, reason, chunk sizes, number of products, expected peak memory. It prints as a summary.

    Raises:
        As `fused_linear_token_dpo`.
    """
    return _prepare_loss(
        policy_hidden, lm_head_weight, labels, lm_head_bias, reference_hidden, reference_weight, reference_bias,
        reference_logps, beta, loss_type, loss_weights, label_smoothing, loss_kwargs, token_weights, cu_seqlens,
        valid_rows, temperature, ignore_index, reduction, softcap, logit_scale, plan, max_chunk_bytes, backend,
        tp_group, sp_group,
    ).plan  # fmt: skip


@eager_with_groups
def fused_linear_token_dpo(
    policy_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    plan: str = "auto",
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    sp_group: Any = None,
) -> TokenDPOOutput:
    """A preference loss from hidden states and the head's weight; the logits are never stored.

    The first B sequences are chosen, the last B rejected. Logits are softcap * tanh(logit_scale * (hidden weight^T +
    bias) / softcap) / temperature, in fp32, one chunk of rows at a time. Rows with an ignored label are dropped before
    the first product: prompt and padding cost nothing.

    Args:
        policy_hidden: `[2B, T, H]`, or packed `[N, H]` with `cu_seqlens`: the last hidden states (after the final
            norm); fp32, bf16, fp16 or fp64.
        lm_head_weight: `[V, H]`, in the dtype of `policy_hidden` (any under autocast).
        labels: int64 `[2B, T]` or `[N]`, aligned with the rows (see `shift_labels`).
        lm_head_bias: `[V]`.
        reference_hidden, reference_weight, reference_bias: of the reference, which may have an H of its own; constants.
        reference_logps: instead, cached log-probs per token or per sequence, as in `fused_token_dpo`.
        beta, loss_type, loss_weights, label_smoothing, loss_kwargs, token_weights, cu_seqlens, temperature,
            ignore_index, reduction: as in `fused_token_dpo`.
        valid_rows: 2B ints, how many rows of each sequence count, exactly: those whose label is not `ignore_index` and
            whose token weight, if there are any, is not 0. (With `ld_alpha=0` a row past the shorter of the pair's two
            numbers does not count either, unless the loss has WPO weights or the SFT term; with `sp_group` the rows of
            this rank are meant.) Count them where the labels are on the CPU, `(labels != -100).sum(1).tolist()`: the
            host then never waits for a GPU (but see `tp_group`), without them once per call.
        softcap: of Gemma; None for none.
        logit_scale: of Cohere (`logit_scale`) and Granite (1 / `logits_scaling`), applied before the softcap.
        plan: "auto", "frozen_head", "pair_chunks" or "recompute"; see `qkernels.head.plan` and `plan_linear`.
        max_chunk_bytes: memory for a chunk's logits and their gradient; None takes a share of the free memory.
        backend: "auto", or by name; `qkernels.info()` lists what can run.
        tp_group: process group (or 1-D `DeviceMesh`) over whose ranks, in their order, the vocabulary is split: each
            holds its rows of weight and bias, and the same hidden states and labels (of the whole vocabulary). A
            weight that is a DTensor sharded in dimension 0 over a 1-D mesh implies its group. dL/dhidden is summed
            over the ranks. See docs/scaling.md.
        sp_group: process group over whose ranks the positions of every sequence are split: each passes its own rows
            of the same 2B sequences (`[2B, T_local, ...]`, T_local may differ, or packed), and gets the loss of the
            whole sequences with the gradient of its own rows. Parameters' gradients are to be summed over its ranks.

    Returns:
        `TokenDPOOutput`, with the `LinearPlan` that was followed.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or combination; a plan that cannot do the work; a
            budget too small for one row (the message says the smallest that works); `valid_rows` that are not what
            the labels have, with the first sequence that differs (CPU, or QKERNELS_CHECK=1; on a GPU, inside
            torch.compile, and with `sp_group` and `ld_alpha` the loss, the per-token outputs and all gradients become
            NaN instead).
        IndexError: a label outside [0, V), with its position (CPU; on a GPU the row becomes NaN).
    """
    work = _prepare_loss(
        policy_hidden, lm_head_weight, labels, lm_head_bias, reference_hidden, reference_weight, reference_bias,
        reference_logps, beta, loss_type, loss_weights, label_smoothing, loss_kwargs, token_weights, cu_seqlens,
        valid_rows, temperature, ignore_index, reduction, softcap, logit_scale, plan, max_chunk_bytes, backend,
        tp_group, sp_group,
    )  # fmt: skip
    return _solve(work)[0]


def linear_token_dpo(
    policy_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    outputs: Sequence[str] = (),
    lm_head_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    loss_kwargs: Mapping[str, Any] | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid_rows: Sequence[int] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    plan: str = "auto",
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[TokenDPOOutput, TokenStats]:
    """`fused_linear_token_dpo`, and further per-token results of the policy from the same pass; for integrations.

    Args:
        outputs: names of fields of `TokenStats`, without gradient here; they cost next to nothing.
        policy_hidden ... backend: as in `fused_linear_token_dpo`.

    Returns:
        What `fused_linear_token_dpo` returns, and the outputs.

    Raises:
        As `fused_linear_token_dpo`; ValueError for an unknown output.
    """
    work = _prepare_loss(
        policy_hidden, lm_head_weight, labels, lm_head_bias, reference_hidden, reference_weight, reference_bias,
        reference_logps, beta, loss_type, loss_weights, label_smoothing, loss_kwargs, token_weights, cu_seqlens,
        valid_rows, temperature, ignore_index, reduction, softcap, logit_scale, plan, max_chunk_bytes, backend,
        None, None, outputs,
    )  # fmt: skip
    output, stats = _solve(work)
    further = {name: stats[name].detach().view(work.call.shape) for name in outputs}
    if "is_top1" in further:
        further["is_top1"] = further["is_top1"] > 0
    return output, TokenStats(**further)


def _solve(work: _Loss) -> tuple[TokenDPOOutput, dict[str, Tensor]]:
    """Run the plan; the loss, and the per-row results by name."""
    call, batch = work.call, work.batch
    _refuse_meta(call, "policy_hidden")
    gradients: Gradients | None = None
    if work.plan.name == "pair_chunks":
        columns = _columns_with_state(work.columns, call.reference is not None)
        groups = work.pairs()
        selections = work.selections(groups)
        objective = work._replace(columns=columns).objective_of(groups, selections)
        config = call.config(columns, work.plan.chunk_rows)
        needs = call.needs()  # now: inside a backward nothing does

        def run() -> tuple[Tensor, Gradients]:
            return chunks.pair_gradients(call.policy, call.reference, call.labels, selections, objective, needs, config)

        values, gradients = run()
        stats = dict(zip(column_names(columns), values.unbind(0), strict=True))
    else:
        carrying = preference.carrying(work.objective)
        stats = _run(call, work.plan.name, work.columns, carrying, work.plan.chunk_rows)
    factor = None
    if work.unchecked is not None:
        factor = _nan_if((_sums(batch.used, batch.sequences) != work.unchecked).any())
    stats = _spoiled(stats, factor)  # before the sums, which other ranks share
    by_sequence = {name: value.view(batch.labels.shape) for name, value in stats.items()}
    output = preference.loss_and_rewards(
        by_sequence, batch, work.reference, work.objective, work.beta, work.reduction, call.backend, call.shape
    )
    if gradients is not None:
        loss = KnownGradient.apply(output.loss, *call.policy, gradients, lambda: run()[1])
        output = output._replace(loss=loss)
    if factor is not None:  # what the loss made of the rows, and the gradients that are known already
        output = TokenDPOOutput(*(None if x is None else x * factor for x in output))  # type: ignore[arg-type]
    return (output if torch.compiler.is_compiling() else PlannedOutput.of(output, work.plan)), stats
