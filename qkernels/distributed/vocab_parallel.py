"""Row operations on a vocabulary that is split over ranks: each holds the columns [first, first + width) of every row.

Nothing of the logits' size travels. Each rank runs the backend's `row_stats` on its columns, and two small all-reduces
make the whole row of the parts: the maximum of the rows' maxima, then a float64 sum of what each part contributes. With
m_i, s_i the maximum and the sum of exponentials of rank i's part, m = max m_i, T the temperature:

    S_i = s_i exp((m_i - m) / T)       log sum exp = m / T + log sum S_i       P_i = S_i / sum S
    H = sum P_i (H_i - log P_i)                                              (chain rule of the entropy)
    KL(p || q) = sum P_i (KL_i + log P_i - log Q_i)                          (chain rule of the divergence)
    sum p^2 = sum P_i^2 (sum p^2)_i

The label's own term is left out of S on the rank that holds it, as S_i (1 - p_i(label)) with all the digits of the
saved log-prob, and added last: a token that is certain keeps its gradient.

Backward: the entry of column j needs the state of the whole row and the row's coefficients, and nothing else. Where the
label lies in another part, label (1[j = y] - p_j) is -label p_j, which the coefficient `p` expresses. So gradients of
logits are local, and dL/dhidden is a sum over ranks.

A part of nothing but -inf is empty (P_i = 0), and a row is NaN only if all its parts are empty, or one holds a NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..core import checks
from ..core.columns import (
    BIT,
    NEEDS_REFERENCE,
    REFERENCE_STATE,
    STATE,
    RowConfig,
    bits,
    column_names,
    label_error,
    stats_dtype,
)
from . import groups
from .groups import Ranks

# Stands for an ignored row in labels that count from a part's first column, whatever the caller's ignore_index is.
IGNORED = -100

_NO_COLUMN = BIT["logsumexp"] | BIT["reference_logsumexp"]  # follow from the states
_KLS = BIT["kl_reference_policy"] | BIT["kl_policy_reference"]
_BLOCK = 64  # rows that are looked at again at a time


class Shard(NamedTuple):
    """The part of the vocabulary that this rank holds, as all ranks of the group have agreed.

    group: the process group.
    first, width: its columns are [first, first + width).
    vocab: columns of all parts together.
    widest: columns of the largest part.
    free: bytes of memory that every rank has, for the size of chunks; 0 where there are none.
    """

    group: Any
    first: int
    width: int
    vocab: int
    widest: int
    free: int

    def local_labels(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Labels that count from this part's first column, and where they lie in it.

        A row whose label lies elsewhere gets column 0, an ignored one `IGNORED`, and one whose label lies nowhere a
        column that no part has (IndexError on the CPU).
        """
        ignored = labels == ignore_index
        local = (labels - self.first).masked_fill(ignored, -1)
        mine = (local >= 0) & (local < self.width)
        nowhere = ((labels < 0) | (labels >= self.vocab)) & ~ignored
        if labels.device.type == "cpu":
            if bool(nowhere.any()):
                raise label_error(labels, int(nowhere.reshape(-1).nonzero()[0]), self.vocab)
            local = torch.where(mine, local, 0)
        else:
            local = torch.where(mine, local, torch.where(nowhere, self.width, 0))
        return local.masked_fill(ignored, IGNORED), mine

    def row_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        reference: Tensor | None,
        columns: int,
        temperature: float,
        ignore_index: int,
        backend: ModuleType,
    ) -> Tensor:
        """The requested columns of the whole rows, `[K, S, T]`, from this part of them. Two all-reduces.

        Args:
            logits, reference: `[S, T, width]`, this rank's columns.
            labels: `[S, T]` in the whole vocabulary.
            columns, temperature, ignore_index: as `qkernels.backends.ops.row_stats` has them.
            backend: the module that reads the logits.

        Raises:
            IndexError: a label outside [0, vocab), on the CPU, on every rank.
        """
        local, mine = self.local_labels(labels, ignore_index)
        if not columns & NEEDS_REFERENCE:
            reference = None
        have = columns & ~_NO_COLUMN | STATE | (0 if reference is None else REFERENCE_STATE)
        part = _part(backend, logits, local, reference, have, temperature)
        at = local.clamp(0, self.width - 1).unsqueeze(-1)
        models = [_Model("", part, logits, at, mine)]
        if reference is not None:
            models.append(_Model("reference_", part, reference, at, mine))
        top = torch.stack([torch.where(model.max.isnan(), -torch.inf, model.max) for model in models])
        groups.all_reduce_(top, "max", self.group)
        for model, maximum in zip(models, top, strict=True):
            model.relative_to(maximum.double(), temperature)
        policy = models[0]

        sums: dict[str, Tensor] = {}
        for model in models:
            sums[model.prefix + "others"], sums[model.prefix + "label"] = model.others, model.label
        if columns & BIT["entropy"]:
            sums["entropy"] = policy.weighted(part["entropy"].double() - policy.log_mass)
        if columns & BIT["log_sum_sq_probs"]:
            sums["log_sum_sq_probs"] = torch.exp(part["log_sum_sq_probs"].double() + 2 * policy.log_mass)
        if columns & BIT["mean_logits"]:
            sums["mean_logits"] = part["mean_logits"].double() * (self.width / self.vocab)
        if columns & BIT["is_top1"]:
            # 1 from the part whose first maximum is the label, -1 from each earlier part that reaches the maximum too.
            at_top = policy.max == policy.top
            earlier = labels >= self.first + self.width
            sums["is_top1"] = (at_top & mine & (part["is_top1"] > 0)).double() - (at_top & earlier).double()
        for name, p, q in _divergences(models):
            if columns & BIT[name]:
                sums[name] = p.weighted(part[name].double() + (p.log_mass - q.log_mass))
        packed = torch.stack(list(sums.values()))
        groups.all_reduce_(packed, "sum", self.group)
        total = dict(zip(sums, packed, strict=True))

        out: dict[str, Tensor] = {}
        for model in models:
            out |= model.whole(total, temperature)
        if columns & BIT["entropy"]:
            out["entropy"] = (total["entropy"] / policy.total + policy.log_sum).clamp_min(0.0)
        if columns & BIT["log_sum_sq_probs"]:
            out["log_sum_sq_probs"] = total["log_sum_sq_probs"].log() - 2 * policy.log_sum
        if columns & BIT["mean_logits"]:
            out["mean_logits"] = total["mean_logits"] + policy.broken
        if columns & BIT["is_top1"]:
            out["is_top1"] = (total["is_top1"] > 0) + policy.broken
        for name, p, q in _divergences(models):
            if columns & BIT[name]:
                out[name] = (total[name] / p.total - p.log_sum + q.log_sum).clamp_min(0.0)
        stats = torch.stack([out[name] for name in column_names(columns)])
        return stats.masked_fill(local == IGNORED, 0.0).to(stats_dtype(logits.dtype))

    def gradient_inputs(
        self,
        logits: Tensor,
        labels: Tensor,
        state: Tensor,
        coefficients: Tensor,
        temperature: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `row_grad` takes for this part: labels `[S, T]`, state `[3, S, T]` and coefficients `[5, S, T]`.

        Its ignored label is `IGNORED`.
        """
        local, mine = self.local_labels(labels, ignore_index)
        # Backends make the label's entry of the label's log-prob: the stand-in of a label elsewhere brings its own.
        stand_in = logits[..., 0].double() - state[0].double()
        logps = torch.where(mine, state[2], (stand_in / temperature - state[1]).to(state.dtype))
        label = coefficients[0]
        elsewhere = torch.where(mine, 0.0, -label)
        label = torch.where(mine, label, 0.0)
        if coefficients.shape[0] == 1:
            zero = torch.zeros_like(label)
            coefficients = torch.stack([label, elsewhere, zero, zero, zero])
        else:
            coefficients = torch.stack([label, coefficients[1] + elsewhere, *coefficients[2:]])
        return local, torch.stack([state[0], state[1], logps]), coefficients

    def sum_rows(self, partial: Tensor, valid: Tensor) -> Tensor:
        """The sum over the ranks of a tensor `[N, H]` that is 0 outside of rows `valid` `[M]`. May reuse its memory."""
        if valid.shape[0] == partial.shape[0]:
            return groups.all_reduce_(partial, "sum", self.group)
        rows_ = groups.all_reduce_(partial.index_select(0, valid), "sum", self.group)
        return partial.index_copy_(0, valid, rows_)

    def sum_(self, partial: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor over the ranks, in its own memory; calling what is returned waits for the result."""
        return groups.all_reduce_start_(partial, self.group)


def row_stats(
    logits: Tensor, labels: Tensor, reference: Tensor | None, config: RowConfig, shard: Shard | None
) -> Tensor:
    """`ops.row_stats` of whole rows, or of rows of which this rank holds a part."""
    if shard is None:
        return ops.run("row_stats", logits, labels, reference, *config)
    columns, temperature, ignore_index, backend = config
    with torch.no_grad():
        return shard.row_stats(logits, labels, reference, columns, temperature, ignore_index, backends.get(backend))


def agree(
    ranks: Ranks | None,
    width: int,
    labels: Tensor,
    ignore_index: int,
    equal: Mapping[str, Any],
    fields: Mapping[str, Any],
    chunked: bool = False,
) -> Shard | None:
    """Agree with the other ranks of `tp_group` on a call and on who holds which columns; None without such a group.

    Args:
        ranks: the groups of the call.
        width: columns of this rank's part.
        labels: the same on all ranks, in the whole vocabulary.
        equal: further arguments that are the same on all ranks where they are tensors.
        fields: whatever else has to be the same on all ranks, by name.
        chunked: whether the call makes its logits chunk by chunk, whose size is agreed on too.

    Raises:
        ValueError: the ranks disagree. RuntimeError: another rank failed.
        IndexError: a label outside the vocabulary, where the host can look.
    """
    if ranks is None or "tp_group" not in ranks.groups:
        return None
    parts = ranks.agree(
        "tp_group", width, {**fields, "labels.shape": tuple(labels.shape)}, {"labels": labels, **equal}, chunked
    )
    widths = [part.width for part in parts]
    group = ranks.groups["tp_group"]
    first = sum(widths[: groups.rank_of(group)])
    shard = Shard(group, first, width, sum(widths), max(widths), min(part.free for part in parts))
    try:
        checks.label_range(labels, shard.vocab, ignore_index)
    except IndexError as error:
        raise IndexError(f"{error}; the ranks of tp_group hold {', '.join(map(str, widths))} columns") from None
    return shard


class _Model:
    """One model's part of the rows, `[S, T]` in float64, and what follows once the whole rows' maxima are known."""

    def __init__(self, prefix: str, part: dict[str, Tensor], logits: Tensor, at: Tensor, mine: Tensor):
        self.prefix, self.mine = prefix, mine
        self.max = part[prefix + "row_max"]
        self._log_sum = part[prefix + "log_sum"].double()
        self._logps = part[prefix + "logps"].double()
        self.label = torch.where(mine, logits.gather(-1, at).squeeze(-1).double(), 0.0)

    def relative_to(self, top: Tensor, temperature: float) -> None:
        """Restate this part relative to the whole rows' maxima."""
        self.top = top
        own = self.max.double()
        shift = torch.where(own == top, 0.0, (own - top) / temperature)
        self.log_mass = self._log_sum + shift  # log S_i; -inf for an empty part, NaN for a broken one
        self.mass = self.log_mass.exp()
        self.others = torch.where(self.mine, self.mass * -torch.expm1(self._logps), self.mass)

    def weighted(self, values: Tensor) -> Tensor:
        """S_i * values, where nothing has no value."""
        return torch.where(self.mass == 0, 0.0, self.mass * values)

    def whole(self, total: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
        """The columns of the whole rows' state, from the summed parts."""
        others, label = total[self.prefix + "others"], total[self.prefix + "label"]
        # Nothing but -inf, or a part that is broken: NaN. Elsewhere the maximum is finite.
        self.broken = torch.where(self.top.isfinite() & ~others.isnan(), 0.0, torch.nan)
        shifted = torch.where(label == self.top, 0.0, (label - self.top) / temperature)
        exp = shifted.exp()
        self.total = others + exp
        self.log_sum = torch.where(label == self.top, others.log1p(), self.total.log()) + self.broken
        values = {
            "row_max": self.top + self.broken,
            "log_sum": self.log_sum,
            "logps": shifted - self.log_sum,
            "logsumexp": self.top / temperature + self.log_sum,
        }
        return {self.prefix + name: value for name, value in values.items()}


def _divergences(models: list[_Model]) -> list[tuple[str, _Model, _Model]]:
    """Name, p and q of each KL(p || q) that the models allow."""
    if len(models) == 1:
        return []
    policy, reference = models
    return [("kl_policy_reference", policy, reference), ("kl_reference_policy", reference, policy)]


def _part(
    backend: ModuleType, logits: Tensor, labels: Tensor, reference: Tensor | None, have: int, temperature: float
) -> dict[str, Tensor]:
    """The backend's columns of this part by name; an empty part has maximum -inf, log of its sum -inf, entropy 0.

    On a GPU the host waits here, once per call, to learn whether a row has to be looked at again.
    """
    stats = backend.row_stats(logits, labels, reference, have, temperature, IGNORED)
    part = dict(zip(column_names(have), stats.unbind(0), strict=True))
    again = part["row_max"].isnan()
    if reference is not None:
        again = again | part["reference_row_max"].isnan()
    # A backend calls a row of -inf broken, as it is when it is the whole row.
    if bool(again.any()):
        where = again.nonzero(as_tuple=True)
        for start in range(0, where[0].shape[0], _BLOCK):
            block = tuple(index[start : start + _BLOCK] for index in where)
            _look_again(backend, logits, labels, reference, have, temperature, part, block)
    return part


def _look_again(
    backend: ModuleType,
    logits: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    have: int,
    temperature: float,
    part: dict[str, Tensor],
    where: tuple[Tensor, ...],
) -> None:
    """Fill in the rows of which at least one model's part is empty or broken."""
    empty = {"row_max": -torch.inf, "log_sum": -torch.inf, "logps": -torch.inf, "mean_logits": -torch.inf}
    one_is_empty = torch.zeros_like(where[0], dtype=torch.bool)
    for prefix, model in (("", logits), ("reference_", reference)):
        if model is None:
            continue
        columns = [name for name in part if name.startswith("reference_") == bool(prefix) and not BIT[name] & _KLS]
        own_names = [name.removeprefix(prefix) for name in columns]
        x = model[where].unsqueeze(0)
        alone = backend.row_stats(x, labels[where].unsqueeze(0), None, bits(own_names), temperature, IGNORED)[:, 0]
        is_empty = x[0].amax(-1) == -torch.inf
        stored = column_names(bits(own_names))
        for name, value in zip(stored, alone, strict=True):
            part[prefix + name][where] = torch.where(is_empty, empty.get(name, 0.0), value)
        one_is_empty |= is_empty
    for name in part:
        if BIT[name] & _KLS:  # nothing here, or everything: the masses of the parts say which
            part[name][where] = torch.where(one_is_empty, 0.0, part[name][where])
