"""Row operations on a vocabulary that is split over ranks: each holds the columns [first, first + width) of every row.

Nothing of the logits' size travels. Each rank runs the backend's `row_stats` on its columns, and two small all-reduces
make the whole row of the shards: the maximum of the rows' maxima, then a float64 sum of what each contributes. With
m_i, s_i the maximum and the sum of exponentials of rank i's shard, m = max m_i, T the temperature:

    S_i = s_i exp((m_i - m) / T)       log sum exp = m / T + log sum S_i       P_i = S_i / sum S
    H = sum P_i (H_i - log P_i)                                              (chain rule of the entropy)
    KL(p || q) = sum P_i (KL_i + log P_i - log Q_i)                          (chain rule of the divergence)
    sum p^2 = sum P_i^2 (sum p^2)_i

The label's own term is left out of S on the rank that holds it, as S_i (1 - p_i(label)) with all the digits of the
saved log-prob, and added last: a token that is certain keeps its gradient.

Backward: the entry of column j needs the softmax statistics of the whole row and the row's coefficients, and nothing
else. Where the label lies in another shard, label (1[j = y] - p_j) is -label p_j, which the coefficient `p` expresses.
So gradients of logits are local, and dL/dhidden is a sum over ranks.

A shard of nothing but -inf is empty (P_i = 0), and a row is NaN only if all its shards are empty, or one holds a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..core import checks
from ..core.calls import RowGrad, RowStats
from ..core.fields import (
    BIT,
    COMBINED,
    NEEDS_REFERENCE,
    REFERENCE_SOFTMAX,
    SOFTMAX,
    bits,
    field_names,
    stats_dtype,
)
from . import groups
from .fingerprint import CallFingerprint
from .groups import Ranks

# The ignored label among labels that count from a shard's first column, whatever the caller's ignore_index is.
IGNORED = -100

_NO_FIELD = BIT["logsumexp"] | BIT["reference_logsumexp"]  # follow from the softmax statistics
# Of both models at once: the divergences.
_JOINT = [name for name in COMBINED if BIT[name] & NEEDS_REFERENCE]
_BLOCK = 64  # rows that are recomputed at a time


class Shard(NamedTuple):
    """The shard of the vocabulary that this rank holds, as all ranks of the group have agreed.

    group: the process group.
    first, width: its columns are [first, first + width).
    vocab: columns of all shards together.
    widest: columns of the largest shard.
    free: bytes of memory that every rank has, for the size of chunks; 0 where there are none.
    """

    group: Any
    first: int
    width: int
    vocab: int
    widest: int
    free: int

    def local_labels(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Labels that count from this shard's first column, and which of them lie in it.

        A row whose label another shard holds gets column 0, an ignored one `IGNORED`, and one whose label is outside
        the vocabulary a column that no shard has (IndexError on the CPU).
        """
        ignored = labels == ignore_index
        local = (labels - self.first).masked_fill(ignored, -1)
        mine = (local >= 0) & (local < self.width)
        outside = ((labels < 0) | (labels >= self.vocab)) & ~ignored
        if labels.device.type == "cpu":
            if bool(outside.any()):
                raise checks.label_error(labels, int(outside.reshape(-1).nonzero()[0]), self.vocab)
            local = torch.where(mine, local, 0)
        else:
            local = torch.where(mine, local, torch.where(outside, self.width, 0))
        return local.masked_fill(ignored, IGNORED), mine

    def row_stats(self, call: RowStats) -> Tensor:
        """The requested fields of the whole rows, `[K, S, T]`, from this shard of them. Two all-reduces.

        Args:
            call: logits and reference are this rank's columns of the vocabulary, labels those of the whole one.

        Raises:
            IndexError: a label outside [0, vocab), on the CPU, on every rank.
        """
        logits, labels, reference, fields, temperature, ignore_index, _ = call
        local, mine = self.local_labels(labels, ignore_index)
        if not fields & NEEDS_REFERENCE:
            reference = None
        have = fields & ~_NO_FIELD | SOFTMAX | (0 if reference is None else REFERENCE_SOFTMAX)
        part = _part(call._replace(labels=local, reference=reference, fields=have, ignore_index=IGNORED))
        at = local.clamp(0, self.width - 1).unsqueeze(-1)
        place = _Place(mine, labels >= self.first + self.width, self.width / self.vocab)
        models = [_Model("", part, logits, at, place)]
        if reference is not None:
            models.append(_Model("reference_", part, reference, at, place))
        top = torch.stack([torch.where(model.max.isnan(), -torch.inf, model.max) for model in models])
        groups.all_reduce_(top, "max", self.group)
        for model, maximum in zip(models, top, strict=True):
            model.relative_to(maximum.double(), temperature)
        policy, other = models[0], models[-1]
        sums: dict[str, Tensor] = {}
        for model in models:
            sums[model.prefix + "others"], sums[model.prefix + "label"] = model.others, model.label
        combined = [name for name in COMBINED if fields & BIT[name]]
        for name in combined:
            sums[name] = COMBINED[name].share(part[name].double(), policy, other)
        packed = torch.stack(list(sums.values()))
        groups.all_reduce_(packed, "sum", self.group)
        total = dict(zip(sums, packed, strict=True))
        out: dict[str, Tensor] = {}
        for model in models:
            out |= model.whole(total, temperature)
        for name in combined:
            out[name] = COMBINED[name].whole(total[name], policy, other)
        stats = torch.stack([out[name] for name in field_names(fields)])
        return stats.masked_fill(local == IGNORED, 0.0).to(stats_dtype(logits.dtype))

    def gradient_inputs(self, call: RowGrad) -> RowGrad:
        """The call of `row_grad` for this shard: with other labels, softmax statistics and coefficients.

        `softmax` is `[3, S, T]`, `coefficients` `[5, S, T]`, and the ignored label `IGNORED`.
        """
        logits, labels, softmax, coefficients = call.logits, call.labels, call.softmax, call.coefficients
        temperature, ignore_index = call.temperature, call.ignore_index
        local, mine = self.local_labels(labels, ignore_index)
        # Backends make the label's entry of the label's log-prob: the placeholder of a label elsewhere brings its own.
        placeholder = logits[..., 0].double() - softmax[0].double()
        logps = torch.where(mine, softmax[2], (placeholder / temperature - softmax[1]).to(softmax.dtype))
        label = coefficients[0]
        elsewhere = torch.where(mine, 0.0, -label)
        label = torch.where(mine, label, 0.0)
        if coefficients.shape[0] == 1:
            zero = torch.zeros_like(label)
            coefficients = torch.stack([label, elsewhere, zero, zero, zero])
        else:
            coefficients = torch.stack([label, coefficients[1] + elsewhere, *coefficients[2:]])
        softmax = torch.stack([softmax[0], softmax[1], logps])
        return call._replace(labels=local, softmax=softmax, coefficients=coefficients, ignore_index=IGNORED)

    def sum_rows(self, partial: Tensor, valid: Tensor) -> Tensor:
        """The sum over the ranks of a tensor `[N, H]` that is 0 outside of rows `valid` `[M]`. May reuse its memory."""
        if valid.shape[0] == partial.shape[0]:
            return groups.all_reduce_(partial, "sum", self.group)
        rows_ = groups.all_reduce_(partial.index_select(0, valid), "sum", self.group)
        return partial.index_copy_(0, valid, rows_)

    def sum_(self, partial: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor over the ranks, in its own memory; calling what is returned waits for the result."""
        return groups.all_reduce_start_(partial, self.group)


def row_stats(call: RowStats, shard: Shard | None) -> Tensor:
    """The operation `row_stats` on whole rows, or on rows of which this rank holds a shard."""
    if shard is None:
        stats: Tensor = ops.row_stats(call)
        return stats
    with torch.no_grad():
        return shard.row_stats(call)


def agree(
    ranks: Ranks, fingerprint: CallFingerprint, width: int, ignore_index: int, chunked: bool = False
) -> Shard | None:
    """Agree with the other ranks of `tp_group` on a call and on who holds which columns; None without such a group.

    Args:
        ranks: the groups of the call.
        fingerprint: what is the same on all ranks.
        width: columns of this rank's shard.
        ignore_index: the label of ignored rows.
        chunked: whether the call makes its logits chunk by chunk, whose size is agreed on too.

    Raises:
        ValueError: the ranks disagree. RuntimeError: another rank failed.
        IndexError: a label outside the vocabulary, where the host can look.
    """
    if "tp_group" not in ranks.groups:
        return None
    parts = ranks.agree("tp_group", fingerprint, width, chunked)
    widths = [part.width for part in parts]
    group = ranks.groups["tp_group"]
    first = sum(widths[: groups.rank_of(group)])
    shard = Shard(
        group=group,
        first=first,
        width=width,
        vocab=sum(widths),
        widest=max(widths),
        free=min(part.free for part in parts),
    )
    try:
        checks.check_labels(fingerprint.labels, shard.vocab, ignore_index)
    except IndexError as error:
        raise IndexError(f"{error}; the ranks of tp_group hold {', '.join(map(str, widths))} columns") from None
    return shard


class _Place(NamedTuple):
    """Where the labels `[S, T]` are, seen from a shard: in it, or in a later one; and its share of the vocabulary."""

    mine: Tensor
    later: Tensor
    width_share: float


class _Model:
    """One model's shard of the rows, `[S, T]` in float64, and what follows once the whole rows' maxima are known.

    A `qkernels.core.fields.ModelShard`.
    """

    def __init__(self, prefix: str, part: dict[str, Tensor], logits: Tensor, at: Tensor, place: _Place):
        mine = place.mine
        self.prefix, self.mine, self.width_share = prefix, mine, place.width_share
        self._label_is_later = place.later
        self.max = part[prefix + "row_max"]
        self._log_sum = part[prefix + "log_sum"].double()
        self._logps = part[prefix + "logps"].double()
        self.label = torch.where(mine, logits.gather(-1, at).squeeze(-1).double(), 0.0)

    def relative_to(self, top: Tensor, temperature: float) -> None:
        """Rescale this shard's sums to the whole rows' maxima."""
        self.top = top
        own = self.max.double()
        shift = torch.where(own == top, 0.0, (own - top) / temperature)
        self.log_mass = self._log_sum + shift  # log S_i; -inf for an empty shard, NaN for one with a NaN
        self.mass = self.log_mass.exp()
        self.others = torch.where(self.mine, self.mass * -torch.expm1(self._logps), self.mass)

    def weighted(self, values: Tensor) -> Tensor:
        """S_i * values, where nothing has no value."""
        return torch.where(self.mass == 0, 0.0, self.mass * values)

    def label_is_first(self, in_shard: Tensor) -> Tensor:
        """1 from the shard whose first maximum is the label, -1 from each earlier one that reaches the maximum too."""
        at_top = self.max == self.top
        return (at_top & self.mine & (in_shard > 0)).double() - (at_top & self._label_is_later).double()

    def whole(self, total: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
        """The softmax statistics of the whole rows, from the sums over the shards."""
        others, label = total[self.prefix + "others"], total[self.prefix + "label"]
        # Nothing but -inf, or a shard with a NaN: NaN. Elsewhere the maximum is finite.
        self.invalid = torch.where(self.top.isfinite() & ~others.isnan(), 0.0, torch.nan)
        shifted = torch.where(label == self.top, 0.0, (label - self.top) / temperature)
        exp = shifted.exp()
        self.total = others + exp
        self.log_sum = torch.where(label == self.top, others.log1p(), self.total.log()) + self.invalid
        values = {
            "row_max": self.top + self.invalid,
            "log_sum": self.log_sum,
            "logps": shifted - self.log_sum,
            "logsumexp": self.top / temperature + self.log_sum,
        }
        return {self.prefix + name: value for name, value in values.items()}


def _part(call: RowStats) -> dict[str, Tensor]:
    """The backend's fields of this shard by name; an empty one has maximum -inf, log of its sum -inf, entropy 0.

    On a GPU this synchronises host and device once per call: the host has to know whether a row is recomputed.
    """
    stats = backends.get(call.backend).row_stats(call)
    part = dict(zip(field_names(call.fields), stats.unbind(0), strict=True))
    again = part["row_max"].isnan()
    if call.reference is not None:
        again = again | part["reference_row_max"].isnan()
    # A row of nothing but -inf is NaN to a backend, which is right only for a whole row.
    if bool(again.any()):
        where = again.nonzero(as_tuple=True)
        for start in range(0, where[0].shape[0], _BLOCK):
            block = tuple(index[start : start + _BLOCK] for index in where)
            _recompute(call, part, block)
    return part


def _recompute(call: RowStats, part: dict[str, Tensor], where: tuple[Tensor, ...]) -> None:
    """Fill in the rows of which at least one model's shard is empty or holds a NaN."""
    empty = {"row_max": -torch.inf, "log_sum": -torch.inf, "logps": -torch.inf}
    empty |= {name: rule.of_nothing for name, rule in COMBINED.items()}
    one_is_empty = torch.zeros_like(where[0], dtype=torch.bool)
    for prefix, model in (("", call.logits), ("reference_", call.reference)):
        if model is None:
            continue
        names = [name for name in part if name.startswith("reference_") == bool(prefix) and name not in _JOINT]
        own_names = [name.removeprefix(prefix) for name in names]
        x = model[where].unsqueeze(0)
        alone = backends.get(call.backend).row_stats(
            call._replace(logits=x, labels=call.labels[where].unsqueeze(0), reference=None, fields=bits(own_names))
        )[:, 0]
        is_empty = x[0].amax(-1) == -torch.inf
        stored = field_names(bits(own_names))
        for name, value in zip(stored, alone, strict=True):
            part[prefix + name][where] = torch.where(is_empty, empty.get(name, 0.0), value)
        one_is_empty |= is_empty
    for name in part:
        if name in _JOINT:  # nothing here, or everything: the masses of the shards say which
            part[name][where] = torch.where(one_is_empty, 0.0, part[name][where])
