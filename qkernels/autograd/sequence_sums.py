"""Autograd of the sums over sequences that losses are functions of: one node, differentiated in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.sequences import Sequences, both_masked, log_ratios
from . import finite_gradient, once_differentiable


class Summed(NamedTuple):
    """What is summed over each sequence, `[S, T] -> [number]`, besides the rows that carry gradient.

    sequences: the grouping of the rows.
    weights: `[S, T]`, factors in all sums but those of the next line.
    base_weights: the same before LD-DPO: factors in the sum `full_logps`, and summed themselves as `counts`.
    reference_tokens: `[S, T]`, the reference's log-probs, 0 in rows that are not used; None where they came summed.
    reference_sums: `[number]`, their sums where they came so.
    counts: `[number]` float64, where they are known; None to sum `base_weights`.
    with_full_logps: whether the sum of log-probs before LD-DPO is wanted, too.
    parts: in how many parts each sum is returned: 2 for chosen and rejected sequences, 1 for all.
    """

    sequences: Sequences
    weights: Tensor
    base_weights: Tensor
    reference_tokens: Tensor | None
    reference_sums: Tensor | None
    counts: Tensor | None = None
    with_full_logps: bool = False
    parts: int = 2

    def names(self, with_kl: bool) -> list[str]:
        """Of the sums, in the order in which `SequenceSums` has them: those over rows, then those that are given."""
        summed = ["logps", "ratios", "reference"] if self.reference_tokens is not None else ["logps"]
        given = ["reference", "ratios"] if self.reference_tokens is None else []
        (summed if self.counts is None else given).append("counts")
        if with_kl:
            summed.append("kl")
        if self.with_full_logps:
            summed.append("full_logps")
        return summed + given


class Totals(NamedTuple):
    """Sums over sequences.

    parts: of each sum by name, `[number / parts]` each.
    ratios: `[number]`, the sums of log-ratios; no gradient.
    row_ratios: `[S, T]`, log-ratios of the rows, no gradient; None where the reference came summed.
    """

    parts: dict[str, tuple[Tensor, ...]]
    ratios: Tensor
    row_ratios: Tensor | None


def sequence_sums(logps: Tensor, kl: Tensor | None, summed: Summed) -> Totals:
    """The sums over the rows of each sequence, with `weights` w and `base_weights` b:

        ratios = sum w (log pi - log pi_ref)    logps = sum w log pi    reference = sum w log pi_ref    counts = sum b
        kl = sum w KL                           full_logps = sum b log pi

    Ratios are summed as ratios: sums of log-probs are thousands of times larger, and their difference would have lost
    the digits. Sums are formed in float64 and returned in the dtype of the weights.

    Args:
        logps: `[S, T]`, log pi; differentiable.
        kl: `[S, T]`, differentiable; None where no loss reads it.
        summed: the constants.
    """
    names, n = summed.names(kl is not None), summed.parts
    totals, *found = SequenceSums.apply(logps, kl, summed, names)
    parts = {name: tuple(found[i * n : (i + 1) * n]) for i, name in enumerate(names)}
    return Totals(parts, totals[names.index("ratios")], None if summed.reference_tokens is None else found[-1])


class SequenceSums(torch.autograd.Function):
    """`(logps, kl, summed, names) -> sums [K, number], their parts ..., log-ratios of the rows [S, T]`.

    Arguments are those of `sequence_sums`, and the names of the sums in order. Only the parts carry gradient (those of
    `reference` and `counts` none), and it is kept finite. The log-ratios of the rows are left out where the reference
    came summed.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor, kl: Tensor | None, summed: Summed, names: list[str]) -> tuple[Tensor, ...]:
        weights, base, tokens = summed.weights, summed.base_weights, summed.reference_tokens
        rows = {"logps": weights * logps}
        row_ratios, masked = [], None
        if tokens is not None:
            masked = both_masked(logps, tokens)
            row_ratios = [log_ratios(logps, tokens, masked)]
            rows["ratios"], rows["reference"] = weights * row_ratios[0], weights * tokens
        if summed.counts is None:
            rows["counts"] = base
        if kl is not None:
            rows["kl"] = weights * kl
        if summed.with_full_logps:
            rows["full_logps"] = base * logps
        sums = summed.sequences.sums_of(list(rows.values()))
        given = []
        if summed.reference_sums is not None:
            reference = summed.reference_sums.double()
            masked = both_masked(sums[0], reference)
            given += [reference, log_ratios(sums[0], reference, masked)]
        if summed.counts is not None:
            given += [summed.counts]
        totals = (torch.cat([sums, torch.stack(given)]) if given else sums).to(weights.dtype)
        n = summed.parts
        parts = totals.view(len(names) * n, totals.shape[1] // n).unbind()
        constant = ("reference", "counts")
        constants = [part for i, part in enumerate(parts) if names[i // n] in constant]
        ctx.save_for_backward(weights, base, masked)
        ctx.summed, ctx.names = summed, names
        ctx.mark_non_differentiable(totals, *constants, *row_ratios)
        ctx.set_materialize_grads(False)
        return totals, *parts, *row_ratios

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, base, masked = ctx.saved_tensors
        summed, n = ctx.summed, ctx.summed.parts
        of = {name: _joined(grads[i * n : (i + 1) * n]) for i, name in enumerate(ctx.names)}
        ratios, logps, kl, full = (of.get(name) for name in ("ratios", "logps", "kl", "full_logps"))

        def rows(of_sums: Tensor, factors: Tensor) -> Tensor:
            of_tokens = summed.sequences.to_tokens(of_sums)
            return (of_tokens if of_tokens.dtype == factors.dtype else of_tokens.to(factors.dtype)) * factors

        terms: list[Tensor] = []
        if ratios is not None and summed.reference_tokens is not None:
            terms.append(rows(ratios, weights).masked_fill_(masked, 0.0))
        elif ratios is not None:  # of the same sums as `logps`
            ratios = ratios.double().masked_fill_(masked, 0.0)
            logps = ratios if logps is None else ratios + logps
        if full is not None:
            terms.append(rows(full, base))
        if logps is not None:
            terms.append(rows(logps, weights))
        of_logps: Tensor | None = None
        for term in terms:
            of_logps = term if of_logps is None else of_logps + term
        return of_logps, None if kl is None else rows(kl, weights), None, None


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """The gradient of a sum out of those of its parts, kept finite; None where none has one."""
    there = next((part for part in parts if part is not None), None)
    if there is None:
        return None
    whole = [torch.zeros_like(there) if part is None else part for part in parts]
    return finite_gradient(whole[0] if len(whole) == 1 else torch.cat(whole))
