"""Rows of logits in float64: every per-token number, its allowed error, and the gradient of any combination of them."""

from __future__ import annotations

import torch
from torch import Tensor

import oracle
from assertions import gradient_allowance
from fuzz.setup import Mismatch, Setup, check, compare, without_rows


def row_sizes(z: Tensor, z_ref: Tensor | None) -> dict[str, Tensor]:
    """What the bounds of an output are relative to, where that is not the output itself (see `assertions`)."""
    log_p = z.log_softmax(-1)
    sizes = {"mean_logits": z.abs().mean(-1)}
    if z_ref is not None:
        log_q = z_ref.log_softmax(-1)
        for name, first, second in (
            ("kl_policy_reference", log_p, log_q),
            ("kl_reference_policy", log_q, log_p),
        ):
            p = first.exp()
            both = first.masked_fill(p == 0, 0).abs() + second.masked_fill(p == 0, 0).abs()
            sizes[name] = (p * both).sum(-1)
    return sizes


class Rows:
    """Logits `[..., V]` in float64 with labels and everything that can be said about their rows.

    size: from hidden states, what rounding of the logits themselves goes by, at least 1.
    """

    def __init__(
        self, s: Setup, z: Tensor, z_ref: Tensor | None, labels: Tensor, temperature: float, size: float | None = None
    ):
        self.s, self.temperature = s, temperature
        self.linear, self.size = size is not None, size or 1.0
        self.labels = labels.cpu()
        self.valid = self.labels != s["ignore_index"]
        self.broken = s.broken_rows(labels)
        hidden = ~self.valid | self.broken
        self.z = without_rows(z, hidden)
        self.z_ref = None if z_ref is None else without_rows(z_ref, hidden)
        self.stats = oracle.token_stats(
            self.z, self.labels, self.z_ref, temperature=temperature, ignore_index=s["ignore_index"]
        )
        sizes = row_sizes(self.z / temperature, None if self.z_ref is None else self.z_ref / temperature)
        self.errors = {name: self._error(name, value, sizes) for name, value in self.stats.items()}

    def _error(self, name: str, value: Tensor, sizes: dict[str, Tensor]) -> Tensor:
        relative = torch.as_tensor(sizes.get(name, 1.0), dtype=torch.float64).clamp_min(1.0)
        if self.linear:
            # A rounding of the logits reaches divergences times E|log p|, and the log-sum-exp's bound is tight.
            factor = 4.0 if name in ("logsumexp", "reference_logsumexp", "entropy", "mean_logits") else 2.0
            relative = factor * self.size * relative
        scale = torch.maximum(value.abs(), relative)
        return (self.s.bounds[name] * scale).nan_to_num(posinf=0.0).masked_fill(~self.valid, 0.0)

    def check(self, name: str, actual: Tensor, what: str | None = None, where: Tensor | None = None) -> None:
        """An output against the oracle; in broken rows NaN, in ignored ones 0."""
        what = what or name
        wanted = torch.bool if name == "is_top1" else self.s.wide
        check(actual.dtype == wanted, what, f"dtype {actual.dtype}, expected {wanted}")
        compared = ~self.broken if where is None else where & ~self.broken
        if name == "is_top1" and self.linear:  # logits that are equal but for rounding
            near = self.z >= self.z.amax(-1, keepdim=True) - 8e-6 * self.size * self.temperature
            compared = compared & (near.sum(-1) == 1)
        compare(actual, self.stats[name], self.errors[name], what, compared)
        if name in ("logps", "logsumexp", "entropy"):
            bad = self.broken if where is None else where & self.broken
            check(bool(actual.cpu()[bad].isnan().all()), what, "a row with NaN, +inf or only -inf is not NaN")

    def gradient(self, upstream: dict[str, Tensor], errors: dict[str, Tensor] | None = None):
        """dL/dlogits in float64, the size of its terms, and what its coefficients' errors make of it."""
        how = {"temperature": self.temperature, "ignore_index": self.s["ignore_index"]}
        upstream = {k: g.cpu().double().masked_fill(~self.valid | self.broken, 0.0) for k, g in upstream.items()}
        grad = oracle.gradient(self.z, self.labels, upstream, self.z_ref, **how)
        terms = oracle.gradient_terms(self.z, self.labels, upstream, self.z_ref, **how)
        # What float64 autograd itself rounds away: a probability of 1 - 1e-18 is 1 there.
        own = sum((g.abs() for g in upstream.values()), torch.zeros(())).unsqueeze(-1) * 2.0**-50 / self.temperature
        own = own + 2.0**-149 / self.temperature  # a denormal product that is divided
        terms = oracle.Terms(terms.size, terms.unsure + own)
        # A probability of almost 1 that is not the label's keeps the absolute precision of the log-sum-exp.
        coarse = sum((upstream[k].abs() for k in ("entropy", "kl_policy_reference") if k in upstream), torch.zeros(()))
        own = 4 * self.s.unit / self.temperature * coarse.unsqueeze(-1) * (self.z / self.temperature).softmax(-1)
        terms = oracle.Terms(terms.size, terms.unsure + own)
        if self.linear:
            # Probabilities carry three roundings of their exponent, all of one sign where they come from the same sum:
            # in a product with the weight they do not average out.
            exponents = (self.z / self.temperature).log_softmax(-1).abs().clamp_max(104.0)
            terms = oracle.Terms(terms.size, terms.unsure + 3 * self.s.unit * exponents * terms.size)
        if errors is not None:
            extra = oracle.gradient_terms(self.z, self.labels, errors, self.z_ref, **how).size
            terms = oracle.Terms(terms.size, terms.unsure + extra.nan_to_num(nan=torch.inf))
        return grad, terms


def allowance(s: Setup, grad: Tensor, terms: oracle.Terms, dtype: torch.dtype) -> Tensor:
    """`assertions.gradient_allowance`; Triton's interpreter truncates to bf16 where a GPU rounds."""
    allowed = gradient_allowance(grad, terms, dtype)
    if dtype == torch.float64:
        allowed = allowed + terms.unsure + 1e-200  # float64 autograd has its own denormal numbers
    if s.backend == "triton" and dtype == torch.bfloat16 and s.device.type == "cpu":
        allowed = allowed + grad.abs() * 2.0**-8
    return allowed


def check_logits_gradient(s: Setup, leaf: Tensor, rows: Rows, grad: Tensor, terms: oracle.Terms, times: int) -> None:
    """`leaf.grad` after `times` backward passes."""
    check(leaf.grad is not None, "gradient", "is None")
    assert leaf.grad is not None
    check(leaf.grad.dtype == leaf.dtype, "gradient", f"dtype {leaf.grad.dtype}")
    allowed = times * allowance(s, grad, terms, leaf.dtype)
    if times > 1:
        grad = times * grad
        allowed = allowed + grad.abs() * torch.finfo(leaf.dtype).eps
    compare(leaf.grad, grad, allowed, "gradient", ~rows.broken.unsqueeze(-1).expand(grad.shape))


def backward(s: Setup, outputs: list[Tensor], upstream: list[Tensor], inplace: bool) -> int:
    """Run it once or, if the case says so, twice; how often. After an in-place one a second has to raise."""
    twice = s["twice"]
    torch.autograd.backward(outputs, upstream, retain_graph=twice)
    if not twice:
        return 1
    if not inplace:
        torch.autograd.backward(outputs, upstream)
        return 2
    try:
        torch.autograd.backward(outputs, upstream)
    except RuntimeError:
        return 1
    raise Mismatch("second backward", "ran after an in-place one")
