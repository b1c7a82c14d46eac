"""One random call of each public function, run and compared with float64: values, gradients, requires_grad, dtypes.

`CALLS[name](case, backend)` raises `Mismatch` (or whatever the package raised on a valid call).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import oracle
import qkernels as qk
from assertions import EPS32, HEAD_GRADIENT, HEAD_SCALE, ROW_BOUNDS, SMALLEST, gradient_allowance
from fuzz import formulas
from fuzz.tensors import DTYPES, LAYOUTS, ROW_LAYOUTS, Random, view

Case = dict[str, Any]

# What a key of a case is when it is missing: the plainest call.
DEFAULTS: Case = {
    "seed": 0,
    "dtype": "float32",
    "vocab": 7,
    "rows": [2, 3],  # of labels, for functions on rows
    "pairs": 1,
    "length": 3,
    "lengths": None,  # of the sequences of a packed batch
    "ignored": 0.0,  # share of the rows
    "ignore_index": -100,
    "poison": False,  # ignored rows hold NaN
    "scale": 3.0,
    "masked": 0.0,  # share of logits that are -inf
    "masked_label": False,  # one label's logit too
    "broken": None,  # one row holds "nan", "inf" or only "-inf"
    "equal": False,  # policy and reference are the same
    "layouts": {},
    "temperature": 1.0,
    "inplace": False,
    "twice": False,  # a second backward
    "grad": True,
    "mode": None,  # "no_grad" or "inference_mode": the leaves require a gradient, the call does not build a graph
    "outputs": ["logps", "logsumexp"],
    "detached": [],
    "reference": "zero",
    "reference_dtype": "float32",
    "ratio": 1.0,  # size of log-ratios with a cached reference
    "weights": None,
    "loss": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "loss_kwargs": {},
    "beta": 0.1,
    "reduction": "mean",
    "upstream": "one",
    "hidden": 4,
    "reference_hidden": None,
    "bias": False,
    "softcap": None,
    "logit_scale": 1.0,
    "trains": "hwb",
    "plan": "auto",
    "chunk_rows": None,
    "valid_rows": False,
    "mask": None,
}


POLICIES = ("logits", "policy_logits", "hidden", "policy_hidden", "reference_logits", "reference_hidden")


class Mismatch(AssertionError):
    """A result that is not what the formulas allow. `what` names the result."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why}")
        self.what = what


def check(condition: bool, what: str, why: str) -> None:
    """Raise `Mismatch` unless the condition holds."""
    if not condition:
        raise Mismatch(what, why)


def compare(actual: Tensor, expected: Tensor, allowed: Tensor | float, what: str, where: Tensor | None = None) -> None:
    """|actual - expected| <= allowed; where that is inf, not NaN; beyond the dtype's range inf or nearly so.

    where: bool, the entries that are compared; all of them by default.
    """
    check(actual.shape == expected.shape, what, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    top = torch.finfo(actual.dtype).max if actual.dtype.is_floating_point else torch.inf
    a, e = actual.detach().cpu().double(), expected.detach().double()
    allowed = torch.as_tensor(allowed, dtype=torch.float64).expand(e.shape)
    fine = (a - e).abs() <= allowed
    fine |= (a == e) | (a.isnan() & e.isnan())
    fine |= allowed.isinf() & ~a.isnan()
    near = e.abs() + allowed > top * (1 - 2.0**-8)
    fine |= near & (a.abs() >= top * (1 - 2.0**-7)) & ((a.sign() == e.sign()) | (allowed >= e.abs()))
    if where is not None:
        fine |= ~where
    if bool(fine.all()):
        return
    index = tuple(int(i) for i in (~fine).nonzero()[0]) if fine.dim() else ()
    at = f" at {list(index)}" if index else ""
    raise Mismatch(
        what,
        f"{a[index].item():.13g}{at}, expected {e[index].item():.13g} within {allowed[index].item():.3g}"
        f" ({int((~fine).sum())} of {fine.numel()} wrong)",
    )


class Setup:
    """What a case says, with defaults, and the tensors that all calls share."""

    def __init__(self, case: Case, backend: str):
        unknown = set(case) - set(DEFAULTS) - {"call"}
        if unknown:
            raise KeyError(f"unknown keys in the case: {sorted(unknown)}")
        self.case = {**DEFAULTS, **case}
        self.backend = backend
        if self["mode"] is not None:
            self.case["grad"] = False
        if "expanded" in [self.layout(name, True) for name in POLICIES]:  # no row is special where all are one
            self.case |= {"poison": False, "broken": None, "masked": 0.0}
        if self["softcap"] is not None and self["broken"] == "inf":  # tanh makes it finite
            self.case["broken"] = "nan"
        self.random = Random(self["seed"])
        self.dtype = DTYPES[self["dtype"]]
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        exact = self.dtype == torch.float64
        self.bounds = {name: 1e-12 if exact and bound else bound for name, bound in ROW_BOUNDS.items()}
        self.unit = 1e-15 if exact else EPS32
        self.device = torch.device("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")

    def __getitem__(self, key: str) -> Any:
        return self.case[key]

    def layout(self, name: str, rows: bool = False) -> str:
        """The layout of an argument; `rows` for those whose last dimension has to be contiguous."""
        wanted = self["layouts"].get(name, "contiguous")
        return wanted if wanted in (ROW_LAYOUTS if rows else LAYOUTS) else "contiguous"

    def place(self, values: Tensor, name: str, rows: bool = False) -> Tensor:
        """`values` in the argument's layout on the device."""
        layout = self.layout(name, rows)
        if rows and layout == "transposed" and values.dim() != 3:  # would move the last dimension, or not merge
            layout = "contiguous"
        return view(values.to(self.device), layout)

    def labels(self, shape: tuple[int, ...]) -> Tensor:
        vocab, ignore = self["vocab"], self["ignore_index"]
        labels = self.random.integers(0, vocab, *shape)
        labels[self.random.uniform(*shape) < self["ignored"]] = ignore
        return self.place(labels, "labels")

    def logits_like(self, shape: tuple[int, ...], labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Policy and reference logits of these rows, float32, with the rows that the case wants to be special."""
        vocab = self["vocab"]
        policy = scale * self.random.normal(*shape, vocab)
        reference = policy.clone() if self["equal"] else 0.9 * policy + 0.4 * scale * self.random.normal(*shape, vocab)
        if self["masked"]:
            at_label = torch.zeros(*shape, vocab, dtype=torch.bool)
            keep = labels.cpu().clamp(0, vocab - 1).unsqueeze(-1)
            masked = (self.random.uniform(*shape, vocab) < self["masked"]) & ~at_label.scatter(-1, keep, True)
            if self["masked_label"] and labels.numel() and vocab > 1:
                first = keep.reshape(-1)[0]
                masked.view(-1, vocab)[0, first] = True
                masked.view(-1, vocab)[0, (first + 1) % vocab] = False
            policy[masked] = -torch.inf
            reference[masked] = -torch.inf
        return policy, reference

    def spoil(self, rows: Tensor, labels: Tensor) -> Tensor:
        """NaN in ignored rows, and the broken row (the first valid one)."""
        flat, ids = rows.view(-1, rows.shape[-1]), labels.reshape(-1).cpu()
        valid = (ids != self["ignore_index"]).nonzero().view(-1)
        if self["poison"]:
            flat[ids == self["ignore_index"]] = torch.nan
        if self["broken"] and len(valid):
            if self["broken"] == "-inf":
                flat[valid[0]] = -torch.inf
            else:
                flat[valid[0], -1] = torch.nan if self["broken"] == "nan" else torch.inf
        return rows

    def broken_rows(self, labels: Tensor) -> Tensor:
        """bool, shaped like labels: the row that holds a NaN or the like."""
        found = torch.zeros(labels.numel(), dtype=torch.bool)
        valid = (labels.reshape(-1).cpu() != self["ignore_index"]).nonzero().view(-1)
        if self["broken"] and len(valid):
            found[valid[0]] = True
        return found.view(labels.shape)

    def logits(self, shape: tuple[int, ...], labels: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """Policy and reference logits in the dtype and layouts of the case."""
        reference_dtype = self.dtype
        if self.dtype != torch.float64 and self["reference_dtype"] in ("float32", "bfloat16", "float16"):
            reference_dtype = DTYPES[self["reference_dtype"]]
        limit = 5e3 if torch.float16 in (self.dtype, reference_dtype) else 1e30
        policy, reference = self.logits_like(shape, labels, min(self["scale"], limit))
        policy = self.place(self.spoil(policy, labels).to(self.dtype), names[0], rows=True)
        return policy, self.place(reference.to(reference_dtype), names[1], rows=True)

    def leaf(self, tensor: Tensor | None, trains: bool) -> Tensor | None:
        """The same memory as a leaf of its own."""
        if tensor is None:
            return None
        return tensor.detach().requires_grad_(trains and (self["grad"] or self["mode"] is not None))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a public function in the case's mode."""
        with getattr(torch, self["mode"] or "enable_grad")():
            return function(*args, **kwargs)

    def upstream(self, like: Tensor, key: str) -> Tensor:
        """dL/doutput: ones, or different everywhere."""
        if self["upstream"] == "one":
            return torch.ones(like.shape, dtype=like.dtype, device=like.device)
        return self.random.normal(*like.shape).to(like)


def exact(tensor: Tensor) -> Tensor:
    """As float64 on the CPU."""
    return tensor.detach().cpu().double().contiguous()


def without_rows(logits: Tensor, rows: Tensor) -> Tensor:
    """float64 logits with 0 in some rows."""
    return logits.masked_fill(rows.unsqueeze(-1), 0.0)


def check_constant(value: Tensor | None, what: str) -> None:
    """An output that promises no gradient."""
    if value is not None:
        check(not value.requires_grad, f"requires_grad of {what}", "is True for an output without gradient")


# --- rows -------------------------------------------------------------------------------------------------------------


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
        allowed = allowed + terms.unsure
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


def token_logps(case: Case, backend: str) -> None:
    s = Setup({**case, "outputs": ["logps"]}, backend)
    _rows_call(s, "token_logps")


def token_stats(case: Case, backend: str) -> None:
    _rows_call(Setup(case, backend), "token_stats")


def _rows_call(s: Setup, function: str) -> None:
    shape = tuple(s["rows"])
    outputs = tuple(dict.fromkeys(s["outputs"]))
    labels = s.labels(shape)
    policy, reference = s.logits(shape, labels, ("logits", "reference_logits"))
    reads_reference = any(name in oracle.WITH_REFERENCE for name in outputs)
    inplace = s["inplace"] and s.layout("logits", True) != "expanded"
    rows = Rows(s, exact(policy), exact(reference) if reads_reference else None, labels, s["temperature"])
    before = policy.clone()
    leaf = s.leaf(policy, True)
    how = {
        "temperature": s["temperature"],
        "ignore_index": s["ignore_index"],
        "inplace_backward": inplace,
        "backend": s.backend,
    }
    if function == "token_logps":
        found = {"logps": s.call(qk.token_logps, leaf, labels, **how)}
    else:
        stats = s.call(
            qk.token_stats,
            leaf,
            labels,
            reference_logits=reference if reads_reference else None,
            outputs=outputs,
            **how,
        )
        for name, value in stats._asdict().items():
            check((value is not None) == (name in outputs), name, "is None" if value is None else "was not asked for")
        found = {name: getattr(stats, name) for name in outputs}
    for name, value in found.items():
        rows.check(name, value)
        differentiable = name in oracle.WITH_GRADIENT and s["grad"]
        if not differentiable:
            check_constant(value, name)
        else:
            check(value.requires_grad, f"requires_grad of {name}", "is False")
    check(bool((leaf.detach() == before)[~before.isnan()].all()), "logits", "were changed by the forward")
    _backward_rows(s, rows, leaf, found, inplace)


def _backward_rows(s: Setup, rows: Rows, leaf: Tensor, found: dict[str, Tensor], inplace: bool) -> None:
    if not s["grad"]:
        return
    # An infinite divergence has no gradient.
    names = [n for n in found if n in oracle.WITH_GRADIENT and bool(rows.stats[n].isfinite().all() or n == "logps")]
    if not names or not rows.labels.numel():
        return
    upstream = {name: s.upstream(found[name], name) for name in names}
    times = backward(s, [found[n] for n in names], [upstream[n] for n in names], inplace)
    grad, terms = rows.gradient(upstream)
    check_logits_gradient(s, leaf, rows, grad, terms, times)
    bad = rows.broken & (torch.stack([g.cpu() for g in upstream.values()]) != 0).any(0)
    check(bool(leaf.grad.cpu()[bad].isnan().all()), "gradient", "of a broken row is not NaN")
    if inplace:
        check(torch.equal(leaf.detach().nan_to_num(), leaf.grad.nan_to_num()), "logits", "do not hold the gradient")
        try:
            s.call(qk.token_logps, leaf, rows.labels.to(s.device), ignore_index=s["ignore_index"], backend=s.backend)
        except RuntimeError:
            return
        raise Mismatch("overwritten logits", "were taken by another call")


# --- preference losses ------------------------------------------------------------------------------------------------


class Request:
    """The loss of a case, made consistent: what a loss does not know is left out."""

    def __init__(self, s: Setup):
        names = [name for name in s["loss"] if name in formulas.NAMES] or ["sigmoid"]
        self.names = names
        given = s["loss_weights"] or []
        self.factors = [float(given[i]) if i < len(given) else 1.0 for i in range(len(names))]
        self.explicit_weights = s["loss_weights"] is not None
        smooth = [name for name in names if name in formulas.SMOOTHED]
        eps = s["label_smoothing"] if smooth else 0.0
        if "robust" in smooth:
            eps = min(eps, 0.4)
        if "exo_pair" in smooth and eps == 0:
            eps = 0.1
        kwargs = dict(s["loss_kwargs"])
        self.ld_alpha, self.wpo = kwargs.get("ld_alpha"), kwargs.get("use_weighting", False)
        known = {"ld_alpha", "use_weighting"}
        for name in names:
            known.update(formulas.OPTIONS.get(name, ()))
        scored = any(name in formulas.SCORED for name in names)
        if scored:
            known.add("f_divergence")
            if kwargs.get("f_divergence") in ("alpha", "alpha_divergence"):
                known.add("f_alpha_divergence_coef")
        self.kwargs = {key: value for key, value in kwargs.items() if key in known}
        link = self.kwargs.get("f_divergence", "reverse_kl")
        self.settings = formulas.Settings(
            beta=s["beta"],
            label_smoothing=eps,
            f_divergence={"js": "js_divergence", "alpha": "alpha_divergence"}.get(link, link),
            f_alpha_divergence_coef=self.kwargs.get("f_alpha_divergence_coef", 0.5),
            discopop_tau=self.kwargs.get("discopop_tau", 0.05),
            alpha=self.kwargs.get("alpha", 0.5),
            gamma=self.kwargs.get("gamma", 0.5),
        )
        self.needs_kl = any(name in formulas.NEEDS_KL for name in names)
        self.reference_free = all(name in formulas.REFERENCE_FREE for name in names)
        self.coupled = any(name in formulas.COUPLED for name in names)
        self.reference = "live" if self.needs_kl else s["reference"]
        if self.reference == "none" and not self.reference_free:
            self.reference = "zero"

    def arguments(self) -> dict[str, Any]:
        several = len(self.names) > 1 or self.explicit_weights
        return {
            "loss_type": list(self.names) if several else self.names[0],
            "loss_weights": self.factors if self.explicit_weights else None,
            "label_smoothing": self.settings.label_smoothing,
            "loss_kwargs": self.kwargs or None,
            "beta": self.settings.beta,
        }


class Batch:
    """Grouping, weights and cached references of a preference batch."""

    def __init__(self, s: Setup, request: Request):
        self.s, self.request = s, request
        self.packed = s["lengths"] is not None
        if self.packed:
            lengths = list(s["lengths"])
            lengths = lengths[: len(lengths) // 2 * 2] or [2, 3]
            self.shape: tuple[int, ...] = (sum(lengths),)
            ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
            layout = s.layout("cu_seqlens")
            self.cu_seqlens = view(ends.to(s.device), "contiguous" if layout == "expanded" else layout)
        else:
            lengths = [s["length"]] * (2 * s["pairs"])
            self.shape = (2 * s["pairs"], s["length"])
            self.cu_seqlens = None
        self.number = len(lengths)
        self.sequence = torch.repeat_interleave(torch.arange(self.number), torch.tensor(lengths))
        self.labels = s.labels(self.shape)
        ids = self.labels.cpu().reshape(-1)
        self.weights = None
        base = (ids != s["ignore_index"]).double()
        if s["weights"] is not None:
            values = self.s.random.uniform(*self.shape) * 1.5
            values[self.s.random.uniform(*self.shape) < 0.25] = 0.0
            values = (values > 0.4) if s["weights"] == "bool" else values.to(DTYPES[s["weights"]])
            self.weights = s.place(values, "token_weights")
            base = base * self.weights.cpu().double().reshape(-1)
        self.base = base
        counts = (base != 0).double()
        rows = self.sums(counts)
        self.counts = rows
        # 1-based position among the valid rows of the row's sequence.
        position = torch.zeros_like(base)
        for i in range(self.number):
            at = self.sequence == i
            position[at] = counts[at].cumsum(0)
        half = self.number // 2
        shared = torch.minimum(rows[:half], rows[half:]).repeat(2)[self.sequence]
        self.loss_weights = base
        if request.ld_alpha is not None:
            self.loss_weights = torch.where(position > shared, base * request.ld_alpha, base)
        self.loss_counts = self.sums((self.loss_weights != 0).double())
        self.reference_logps: Tensor | float | None = None
        if request.reference in ("tokens", "sums"):
            dtype = DTYPES[s["reference_dtype"]]
            limit = 6e4 if dtype == torch.float16 else 1e30
            shape = self.shape if request.reference == "tokens" else (self.number,)
            values = (s["ratio"] * self.s.random.normal(*shape)).clamp(-limit, limit)
            values = -values.abs() if s["ratio"] < 50 else values
            if request.reference == "sums" and tuple(shape) == self.shape:
                request.reference = "tokens"  # a packed batch of as many rows is read as per token
            self.reference_logps = s.place(values.to(dtype), "reference_logps")
            if request.reference == "sums":  # the sum of no log-probs is 0
                empty = (self.counts == 0) | (self.loss_counts == 0)
                self.reference_logps.masked_fill_(empty.to(s.device), 0.0)
        elif request.reference == "zero":
            self.reference_logps = 0.0

    def sums(self, per_row: Tensor) -> Tensor:
        """Over each sequence, `[N] -> [2B]`; rows without weight do not enter."""
        return torch.zeros(self.number, dtype=torch.float64).index_add(0, self.sequence, per_row)

    def weighted(self, per_row: Tensor, weights: Tensor) -> Tensor:
        return self.sums(torch.where(weights == 0, 0.0, weights * per_row))

    def affected(self, rows: Tensor) -> Tensor:
        """bool `[B]`: pairs that hold one of these rows with a weight."""
        hit = self.sums((rows.reshape(-1) & (self.base != 0)).double()) > 0
        return hit[: self.number // 2] | hit[self.number // 2 :]


class Preference:
    """The whole path from float64 logits to a loss: truth and what is allowed."""

    def __init__(self, s: Setup, request: Request, batch: Batch, rows: Rows):
        self.s, self.request, self.batch, self.rows = s, request, batch, rows
        unit, half = s.unit, batch.number // 2
        logps, error = (x["logps"].reshape(-1) for x in (rows.stats, rows.errors))
        given = batch.reference_logps
        per_sequence = request.reference == "sums"
        if request.reference == "live":
            self.tokens = rows.stats["reference_logps"].reshape(-1)
            reference_error = rows.errors["reference_logps"].reshape(-1)
        elif isinstance(given, Tensor) and not per_sequence:
            self.tokens = exact(given).reshape(-1)
            reference_error = torch.zeros_like(logps)
        else:
            self.tokens = torch.zeros_like(logps)
            reference_error = torch.zeros_like(logps)
        w, base = batch.loss_weights, batch.base
        # 0 where both models forbid the token.
        ratio = torch.where((logps == -torch.inf) & (self.tokens == -torch.inf), 0.0, logps - self.tokens)
        self.ratio = ratio
        self.ratio_error = error + reference_error + 2 * unit * (logps.abs() + self.tokens.abs()).nan_to_num(posinf=0)
        f = {
            "logp": batch.weighted(logps, w),
            "ref": batch.weighted(self.tokens, w),
            "n": batch.sums(base),
            "full": batch.weighted(logps, base),
        }
        size = {
            "logp": batch.weighted(error + 4 * unit * logps.abs(), w),
            "ref": batch.weighted(reference_error + 4 * unit * self.tokens.abs(), w),
            "full": batch.weighted(error + 4 * unit * logps.abs(), base),
        }
        if per_sequence:
            sums = exact(given)
            f["ref"], f["r"] = sums, f["logp"] - sums
            size["ref"] = 4 * unit * sums.abs()
            size["r"] = size["logp"] + size["ref"] + 4 * unit * f["r"].abs()
        else:
            f["r"] = batch.weighted(ratio, w)
            size["r"] = batch.weighted(self.ratio_error + 4 * unit * ratio.abs(), w)
        if request.needs_kl:
            kl, kl_error = (x["kl_reference_policy"].reshape(-1) for x in (rows.stats, rows.errors))
            f["k"] = batch.weighted(kl, w)
            size["k"] = batch.weighted(kl_error + 4 * unit * kl, w)
        else:
            f["k"] = torch.zeros(batch.number, dtype=torch.float64)
            size["k"] = f["k"]
        self.sequence_ratio, self.sequence_error = f["r"], size["r"]
        importance, importance_error = torch.ones(half, dtype=torch.float64), torch.zeros(half, dtype=torch.float64)
        if request.wpo:
            lssp, lssp_error = (x["log_sum_sq_probs"].reshape(-1) for x in (rows.stats, rows.errors))
            count = f["n"].clamp_min(1e-300)
            mean = batch.weighted(logps - lssp, base) / count
            mean_error = batch.weighted(error + lssp_error + 4 * unit * (logps.abs() + lssp.abs()), base) / count
            importance = torch.exp(mean[:half] + mean[half:])
            importance_error = torch.expm1((mean_error[:half] + mean_error[half:]).clamp_max(50)) + 8 * unit
        split = {}
        errors = {}
        for name, value in f.items():
            split[f"{name}_w"], split[f"{name}_l"] = value[:half], value[half:]
            if name in size:
                errors[f"{name}_w"], errors[f"{name}_l"] = size[name][:half], size[name][half:]
        self.upstream = self._upstream(half)
        share = self.upstream / (half if s["reduction"] == "mean" else 1)
        share = share.expand(half) if share.dim() == 0 else share
        self.truth = formulas.evaluate(
            request.names, request.factors, split, errors, importance, importance_error, request.settings, share, unit
        )
        truth = self.truth
        # Back to rows.
        self.coefficients, self.coefficient_errors = {}, {}
        paths = {"logps": (("r", w), ("logp", w), ("full", base))}
        if request.needs_kl:
            paths["kl_reference_policy"] = (("k", w),)
        for column, parts in paths.items():
            total, wrong = torch.zeros_like(logps), torch.zeros_like(logps)
            for name, weight in parts:
                keys = [f"{name}_w", f"{name}_l"]
                if name == "full":
                    slope = torch.cat([truth.slopes["full_w"], torch.zeros(half, dtype=torch.float64)])
                    off = torch.cat([truth.slope_errors["full_w"], torch.zeros(half, dtype=torch.float64)])
                else:
                    slope = torch.cat([truth.slopes[k] for k in keys])
                    off = torch.cat([truth.slope_errors[k] for k in keys])
                total = total + torch.where(weight == 0, 0.0, weight * slope[batch.sequence])
                wrong = wrong + torch.where(weight == 0, 0.0, weight * off[batch.sequence])
            self.coefficients[column] = total.view(rows.labels.shape)
            self.coefficient_errors[column] = wrong.view(rows.labels.shape)
        self.broken_pairs = batch.affected(rows.broken)
        if request.coupled and bool(self.broken_pairs.any()):
            self.broken_pairs = torch.ones_like(self.broken_pairs)

    def _upstream(self, half: int) -> Tensor:
        if self.s["upstream"] == "one":
            one = torch.ones((), dtype=torch.float64)
            return one.expand(half) if self.s["reduction"] == "none" else one
        values = self.s.random.normal(half if self.s["reduction"] == "none" else 1).double()
        return values if self.s["reduction"] == "none" else values[0]

    def check_loss(self, loss: Tensor) -> None:
        check(loss.dtype == self.s.wide, "loss", f"dtype {loss.dtype}")
        truth, fine = self.truth, ~self.broken_pairs
        low, high = torch.minimum(truth.losses, truth.losses_low), torch.maximum(truth.losses, truth.losses_low)
        errors = truth.loss_errors
        if self.s["reduction"] != "none":
            reduce = torch.mean if self.s["reduction"] == "mean" else torch.sum
            low, high, errors = reduce(low), reduce(high), reduce(errors + 8 * self.s.unit * high.abs())
            fine = fine.all()
            if not bool(fine):
                return
        check(not bool(loss.detach().cpu()[fine].isnan().any()), "loss", "is NaN")
        middle = (low + high) / 2
        compare(loss, middle, (high - low) / 2 + errors + 2 * self.s.unit * middle.abs(), "loss", fine)

    def check_outputs(self, out: Any) -> None:
        s, batch, rows, beta = self.s, self.batch, self.rows, self.request.settings.beta
        half, fine = batch.number // 2, ~self.broken_pairs
        sides = ((out.chosen_rewards, slice(0, half)), (out.rejected_rewards, slice(half, None)))
        for value, side in sides:
            what = "chosen_rewards" if side.start == 0 else "rejected_rewards"
            check(value.dtype == s.wide, what, f"dtype {value.dtype}")
            expected = beta * self.sequence_ratio[side]
            error = beta * self.sequence_error[side] + 4 * s.unit * expected.abs()
            compare(value, expected, error, what, ~batch.affected(rows.broken))
        del fine
        # Rows that LD-DPO gives no weight may be left out (0) or in.
        counted = (batch.loss_weights != 0).view(rows.labels.shape)
        nothing = (batch.base == 0).view(rows.labels.shape)
        per_token = {
            "token_logps": ("logps", rows.stats["logps"].reshape(-1), None),
            "logsumexp": ("logsumexp", rows.stats["logsumexp"].reshape(-1), None),
            "reference_token_logps": (None, self.tokens, 2 * s.unit * self.tokens.abs()),
            "token_rewards": (
                None,
                beta * self.ratio,
                beta * self.ratio_error + 8 * s.unit * (beta * self.ratio).abs(),
            ),
        }
        if self.request.reference == "live":
            per_token["reference_token_logps"] = ("reference_logps", self.tokens, None)
        for what, (name, expected, error) in per_token.items():
            value = getattr(out, what)
            if what in ("reference_token_logps", "token_rewards") and self.request.reference == "sums":
                check(value is None, what, "is given with per-sequence references")
                continue
            check(value is not None and value.shape == rows.labels.shape, what, "has another shape than labels")
            check(value.dtype == s.wide, what, f"dtype {value.dtype}")
            check(bool((value.cpu()[nothing] == 0).all()), what, "is not 0 in a row that does not count")
            if name is not None:
                error = rows.errors[name].reshape(-1)
            compare(
                value, expected.view(rows.labels.shape), error.view(rows.labels.shape), what, counted & ~rows.broken
            )
        for name, value in out._asdict().items():
            if name != "loss":
                check_constant(value, name)


def fused_token_dpo(case: Case, backend: str) -> None:
    s = Setup(case, backend)
    request = Request(s)
    batch = Batch(s, request)
    policy, reference = s.logits(batch.shape, batch.labels, ("policy_logits", "reference_logits"))
    live = request.reference == "live"
    inplace = s["inplace"] and s.layout("policy_logits", True) != "expanded"
    rows = Rows(s, exact(policy), exact(reference) if live else None, batch.labels, s["temperature"])
    leaf = s.leaf(policy, True)
    out = s.call(
        qk.fused_token_dpo,
        leaf,
        batch.labels,
        reference_logits=reference if live else None,
        reference_logps=batch.reference_logps,
        token_weights=batch.weights,
        cu_seqlens=batch.cu_seqlens,
        temperature=s["temperature"],
        ignore_index=s["ignore_index"],
        reduction=s["reduction"],
        inplace_backward=inplace,
        backend=s.backend,
        **request.arguments(),
    )
    truth = Preference(s, request, batch, rows)
    truth.check_loss(out.loss)
    truth.check_outputs(out)
    if not s["grad"]:
        return check_constant(out.loss, "loss")
    check(out.loss.requires_grad, "requires_grad of loss", "is False")
    times = backward(s, [out.loss], [truth.upstream.to(out.loss)], inplace)
    grad, terms = rows.gradient(truth.coefficients, truth.coefficient_errors)
    fine = ~truth.broken_pairs.repeat(2)[batch.sequence].view(rows.labels.shape)
    rows.broken = ~fine
    check_logits_gradient(s, leaf, rows, grad, terms, times)
    return None


# --- hidden states ----------------------------------------------------------------------------------------------------


class Heads:
    """Hidden states and heads of policy and reference, and the way from a gradient of logits to theirs."""

    def __init__(self, s: Setup, labels: Tensor, names: dict[str, str]):
        self.s, self.labels = s, labels
        vocab, size = s["vocab"], s["hidden"]
        limit = 1e2 if s.dtype == torch.float16 else 1e15
        scale = min(math.sqrt(s["scale"]), limit)
        rand = s.random.normal
        shape = tuple(labels.shape)
        hidden = scale * rand(*shape, size)
        weight = scale * size**-0.5 * rand(vocab, size)
        bias = rand(vocab) if s["bias"] else None
        other = s["reference_hidden"] or size
        if other == size:
            r_hidden, r_weight = (
                0.95 * hidden + 0.2 * scale * rand(*shape, size),
                weight + 0.1 * scale * rand(vocab, size),
            )
        else:
            r_hidden, r_weight = scale * rand(*shape, other), scale * other**-0.5 * rand(vocab, other)
        r_bias = None if bias is None else bias + 0.1 * rand(vocab)
        hidden = s.spoil(hidden, labels)
        if s["equal"] and other == size:
            r_hidden, r_weight, r_bias = hidden, weight, bias

        def placed(values: Tensor | None, name: str, rows: bool = False) -> Tensor | None:
            return None if values is None else s.place(values.to(s.dtype), name, rows)

        self.hidden = placed(hidden, names["hidden"], True)
        self.weight = placed(weight, names["weight"])
        self.bias = placed(bias, names["bias"])
        self.reference = (
            placed(r_hidden, "reference_hidden", True),
            placed(r_weight, "reference_weight"),
            placed(r_bias, "reference_bias"),
        )
        trains = s["trains"]
        self.leaves = {
            "hidden": s.leaf(self.hidden, "h" in trains),
            "weight": s.leaf(self.weight, "w" in trains),
            "bias": s.leaf(self.bias, "b" in trains),
        }
        self.cap, self.logit_scale = s["softcap"], s["logit_scale"]
        self.ignored = (labels.cpu() == s["ignore_index"]) | s.broken_rows(labels)

    @property
    def trained(self) -> list[str]:
        if not self.s["grad"]:
            return []
        return [name for name, leaf in self.leaves.items() if leaf is not None and leaf.requires_grad]

    def _exact(self, model: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, weight, bias = model
        return without_rows(exact(hidden), self.ignored), exact(weight), None if bias is None else exact(bias)

    def logits(self, reference: bool = False) -> Tensor:
        """float64 logits."""
        model = self.reference if reference else (self.hidden, self.weight, self.bias)
        hidden, weight, bias = self._exact(model)  # type: ignore[arg-type]
        return oracle.head_logits(hidden, weight, bias, softcap=self.cap, logit_scale=self.logit_scale)

    def size(self, live: bool) -> float:
        """What the rounding of the logits goes by: a quarter of the largest sum of absolute terms (`assertions`)."""
        largest = 1.0
        for model in [(self.hidden, self.weight, self.bias)] + ([self.reference] if live else []):
            hidden, weight, bias = self._exact(model)  # type: ignore[arg-type]
            sums = hidden.flatten(0, -2).abs() @ weight.abs().T
            sums = sums if bias is None else sums + bias.abs()
            if sums.numel():
                largest = max(largest, self.logit_scale * float(sums.max()) / 4)
        return max(1.0, largest / self.s["temperature"])

    def check_gradients(
        self, grad: Tensor, terms: oracle.Terms, size: float, times: int, broken: Tensor | None = None
    ) -> None:
        """The leaves' gradients from dL/dlogits in float64."""
        s = self.s
        hidden, weight, bias = self._exact((self.hidden, self.weight, self.bias))
        raw = torch.nn.functional.linear(hidden, weight, bias).flatten(0, -2)
        slope = torch.full_like(raw, self.logit_scale)
        flat = grad.flatten(0, -2) * times
        whole = torch.maximum(terms.size, grad.abs()).flatten(0, -2) * times
        unsure = terms.unsure.flatten(0, -2) * times
        if self.cap is not None:
            slope = self.logit_scale / torch.cosh(self.logit_scale * raw / self.cap).clamp_max(1e150) ** 2
            # 1 - tanh^2 in fp32 keeps the rounding of 1.
            unsure = unsure * slope + 8 * s.unit * self.logit_scale * whole
        else:
            unsure = unsure * slope
        exact_terms = flat * slope
        sized = whole * slope
        x = hidden.flatten(0, -2)
        results = {
            "hidden": lambda g, w, x: (g @ w).view(self.hidden.shape),
            "weight": lambda g, w, x: g.T @ x,
            "bias": lambda g, w, x: g.sum(0),
        }
        products = torch.float32 if s.dtype == torch.float16 and s.device.type == "cpu" else s.dtype
        for name, leaf in self.leaves.items():
            if leaf is None:
                continue
            what = f"gradient of {name}"
            if name not in self.trained:
                check(leaf.grad is None, what, "is given though it does not train")
                continue
            check(leaf.grad is not None, what, "is None")
            check(leaf.grad.dtype == leaf.dtype, what, f"dtype {leaf.grad.dtype}")
            make = results[name]
            expected = make(exact_terms, weight, x)
            total = torch.maximum(make(sized, weight.abs(), x.abs()), expected.abs())
            off = make(unsure.nan_to_num(posinf=1e300), weight.abs(), x.abs()).nan_to_num(nan=torch.inf)
            off = torch.where(off > 1e290, torch.inf, off)
            if products == torch.float64:
                allowed = 1e-12 * size * (total + 1e-3) + off
            else:
                widest = max((products, leaf.dtype), key=lambda dtype: torch.finfo(dtype).eps)
                # Roundings of a sum of n terms grow as sqrt(n) where they are independent (Higham and Mary 2019).
                terms_of_sum = weight.shape[0] if name == "hidden" else x.shape[0]
                allowed = (HEAD_GRADIENT * (1 + size) + 4 * EPS32 * math.sqrt(terms_of_sum)) * total + SMALLEST + off
                if widest != torch.float32:
                    unit = torch.finfo(widest).eps / 2 * (2 if s.backend == "triton" else 1)
                    allowed = allowed + unit * (2 * total + 3 * expected.abs())
                # Entries of dL/dlogits, and results, below the smallest normal number of fp32 and bf16 may be 0.
                tiny = torch.finfo(torch.float32).smallest_normal
                tiny_result = tiny + torch.finfo(widest).smallest_normal * torch.finfo(widest).eps
                allowed = allowed + make(torch.full_like(flat, tiny), weight.abs(), x.abs()) + tiny_result
            where = None
            if broken is not None and bool(broken.any()):
                if name != "hidden":
                    continue
                where = ~broken.unsqueeze(-1).expand(expected.shape)
            if bool(off.isinf().any()):  # a loss beyond fp32: anything but NaN
                if s["scale"] <= 1e3:
                    compare(leaf.grad, expected, torch.inf, what, where)
                continue
            if bool((total > formulas.HUGE).any()):
                continue  # sums of terms past fp32's range: inf - inf
            compare(leaf.grad, expected, allowed, what, where)
            if where is None and products != torch.float64 and expected.numel() > 3:
                norm = float(expected.square().sum())
                if 1e-30 < norm < 1e30 and bool(leaf.grad.isfinite().all()):
                    # Roundings of single entries of dL/dlogits average out, an error of scale does not.
                    ratio = float((exact(leaf.grad) * expected).sum()) / norm - 1
                    entries = float(flat.square().sum() ** 2 / flat.pow(4).sum().clamp_min(1e-300))
                    few = (1 + 10 / min(expected.numel(), max(entries, 1.0))) * (4 if s.backend == "triton" else 1)
                    noise = few * HEAD_SCALE[widest] * total + HEAD_GRADIENT * (1 + size) * total + off + tiny_result
                    share = float((noise * expected.abs()).sum()) / norm
                    check(abs(ratio) <= share, what, f"is too large by a factor of 1 + {ratio:.3g}")


def _bytes_for(s: Setup, heads: Heads, live: bool, names: dict[str, str]) -> int | None:
    """A chunk budget that holds so many rows as the case says."""
    if s["chunk_rows"] is None:
        return None
    rows = max(1, heads.labels.numel())
    flat = heads.hidden.detach().reshape(-1, heads.hidden.shape[-1])[:rows].requires_grad_(bool(heads.trained))
    doubled = torch.cat([flat, flat])
    kwargs: dict[str, Any] = {"reference_logps": 0.0}
    if live:
        r_hidden, r_weight, r_bias = heads.reference
        r_flat = r_hidden.reshape(-1, r_hidden.shape[-1])[:rows]
        kwargs = {
            "reference_hidden": torch.cat([r_flat, r_flat]),
            "reference_weight": r_weight,
            "reference_bias": r_bias,
        }
    number = doubled.shape[0]
    ends = torch.tensor([0, number // 2, number], dtype=torch.int32, device=s.device)
    labels = torch.zeros(number, dtype=torch.int64, device=s.device)
    how = {"cu_seqlens": ends, "softcap": s["softcap"], "backend": s.backend}
    plan = s.call(qk.plan_linear, doubled, heads.weight, labels, **how, **kwargs)
    return s["chunk_rows"] * plan.chunk_bytes // plan.chunk_rows


def linear_token_logps(case: Case, backend: str) -> None:
    _linear_rows(Setup({**case, "outputs": ["logps"], "detached": []}, backend), "linear_token_logps")


def linear_token_stats(case: Case, backend: str) -> None:
    _linear_rows(Setup(case, backend), "linear_token_stats")


NAMES_OF_ROWS = {"hidden": "hidden", "weight": "weight", "bias": "bias"}
NAMES_OF_LOSS = {"hidden": "policy_hidden", "weight": "lm_head_weight", "bias": "lm_head_bias"}


def _linear_rows(s: Setup, function: str) -> None:
    shape = tuple(s["rows"])
    outputs = tuple(dict.fromkeys(s["outputs"]))
    detached = tuple(name for name in s["detached"] if name in outputs)
    labels = s.labels(shape)
    heads = Heads(s, labels, NAMES_OF_ROWS)
    live = any(name in oracle.WITH_REFERENCE for name in outputs)
    size = heads.size(live)
    rows = Rows(s, heads.logits(), heads.logits(True) if live else None, labels, s["temperature"], size)
    r_hidden, r_weight, r_bias = heads.reference
    how = {
        "bias": heads.leaves["bias"],
        "softcap": s["softcap"],
        "logit_scale": s["logit_scale"],
        "temperature": s["temperature"],
        "ignore_index": s["ignore_index"],
        "valid_rows": int((labels != s["ignore_index"]).sum()) if s["valid_rows"] else None,
        "max_chunk_bytes": _bytes_for(s, heads, live, NAMES_OF_ROWS),
        "backend": s.backend,
    }
    if function == "linear_token_logps":
        found = {"logps": s.call(qk.linear_token_logps, heads.leaves["hidden"], heads.leaves["weight"], labels, **how)}
    else:
        how |= {"outputs": outputs, "detached": detached}
        if live:
            how |= {"reference_hidden": r_hidden, "reference_weight": r_weight, "reference_bias": r_bias}
        stats = s.call(qk.linear_token_stats, heads.leaves["hidden"], heads.leaves["weight"], labels, **how)
        for name, value in stats._asdict().items():
            check((value is not None) == (name in outputs), name, "is None" if value is None else "was not asked for")
        found = {name: getattr(stats, name) for name in outputs}
    names = []
    for name, value in found.items():
        rows.check(name, value)
        if name in oracle.WITH_GRADIENT and name not in detached and heads.trained:
            check(value.requires_grad, f"requires_grad of {name}", "is False")
            names.append(name)
        else:
            check_constant(value, name)
    names = [name for name in names if bool(rows.stats[name].isfinite().all())]
    if not names or not labels.numel():
        return
    upstream = {name: s.upstream(found[name], name) for name in names}
    times = backward(s, [found[n] for n in names], [upstream[n] for n in names], False)
    grad, terms = rows.gradient(upstream)
    heads.check_gradients(grad, terms, size, times, rows.broken)


def _linear_arguments(s: Setup, request: Request, batch: Batch, heads: Heads) -> dict[str, Any]:
    """Keyword arguments of `fused_linear_token_dpo` and `plan_linear`, with a plan that can do the work."""
    live = request.reference == "live"
    r_hidden, r_weight, r_bias = heads.reference
    budget = _bytes_for(s, heads, live, NAMES_OF_LOSS)
    used = batch.loss_weights if not request.wpo and "sft" not in request.names else batch.base
    counts = [int(n) for n in batch.sums((used != 0).double())]
    half = batch.number // 2
    largest = max(a + b for a, b in zip(counts[:half], counts[half:], strict=True))
    plan = s["plan"]
    trains_head = bool({"weight", "bias"} & set(heads.trained))
    if plan == "frozen_head" and (trains_head or request.needs_kl):
        plan = "auto"
    if plan == "pair_chunks" and (
        request.coupled or s["reduction"] == "none" or (budget is not None and largest > s["chunk_rows"])
    ):
        plan = "auto"
    return {
        "lm_head_bias": heads.leaves["bias"],
        "reference_hidden": r_hidden if live else None,
        "reference_weight": r_weight if live else None,
        "reference_bias": r_bias if live else None,
        "reference_logps": batch.reference_logps,
        "token_weights": batch.weights,
        "cu_seqlens": batch.cu_seqlens,
        "valid_rows": counts if s["valid_rows"] and request.ld_alpha != 0 else None,
        "temperature": s["temperature"],
        "ignore_index": s["ignore_index"],
        "reduction": s["reduction"],
        "softcap": s["softcap"],
        "logit_scale": s["logit_scale"],
        "plan": plan,
        "max_chunk_bytes": budget,
        "backend": s.backend,
        **request.arguments(),
    }


def fused_linear_token_dpo(case: Case, backend: str) -> None:
    s = Setup(case, backend)
    request = Request(s)
    batch = Batch(s, request)
    heads = Heads(s, batch.labels, NAMES_OF_LOSS)
    live = request.reference == "live"
    size = heads.size(live)
    rows = Rows(s, heads.logits(), heads.logits(True) if live else None, batch.labels, s["temperature"], size)
    arguments = _linear_arguments(s, request, batch, heads)
    out = s.call(qk.fused_linear_token_dpo, heads.leaves["hidden"], heads.leaves["weight"], batch.labels, **arguments)
    truth = Preference(s, request, batch, rows)
    truth.check_loss(out.loss)
    truth.check_outputs(out)
    plan = s.call(qk.plan_linear, heads.leaves["hidden"], heads.leaves["weight"], batch.labels, **arguments)
    check(plan.name == out.plan.name, "plan", f"{out.plan.name}, announced was {plan.name}")
    wanted = arguments["plan"]
    if heads.trained and wanted != "auto":
        check(plan.name == wanted, "plan", f"{plan.name}, asked for was {wanted}")
    if s["chunk_rows"] is not None:
        check(plan.chunk_rows <= max(s["chunk_rows"], 1), "plan", f"chunk of {plan.chunk_rows} rows")
    if not heads.trained:
        return check_constant(out.loss, "loss")
    check(out.loss.requires_grad, "requires_grad of loss", "is False")
    times = backward(s, [out.loss], [truth.upstream.to(out.loss)], False)
    grad, terms = rows.gradient(truth.coefficients, truth.coefficient_errors)
    broken = truth.broken_pairs.repeat(2)[batch.sequence].view(rows.labels.shape)
    heads.check_gradients(grad, terms, size, times, broken)
    return None


def plan_linear(case: Case, backend: str) -> None:
    """Also on the meta device: the same plan as with values where `valid_rows` says as much."""
    s = Setup({**case, "valid_rows": True}, backend)
    request = Request(s)
    batch = Batch(s, request)
    heads = Heads(s, batch.labels, NAMES_OF_LOSS)
    arguments = _linear_arguments(s, request, batch, heads)
    plan = s.call(qk.plan_linear, heads.leaves["hidden"], heads.leaves["weight"], batch.labels, **arguments)
    valid = int(batch.counts.sum()) if request.ld_alpha != 0 else plan.rows
    check(plan.rows == valid, "plan", f"{plan.rows} rows, expected {valid}")
    check(plan.chunk_rows >= 1 and plan.chunks >= 0 and plan.chunk_bytes > 0, "plan", f"sizes of {plan}")
    check(plan.chunks * plan.chunk_rows >= plan.rows or plan.name == "pair_chunks", "plan", f"too few chunks in {plan}")
    check(bool(str(plan)) and plan.name in str(plan), "plan", "does not print")
    if plan.name == "forward_only":
        check(not heads.trained, "plan", "forward_only, but something trains")
    if arguments["valid_rows"] is None or s.backend not in ("torch",):
        return  # a named backend may not run on meta tensors

    def meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)

    given = {key: meta(value) for key, value in arguments.items()}
    if given["plan"] != "auto" or given["max_chunk_bytes"] is None or s.dtype == torch.float16:
        return  # free memory, and the size of what fp16 is widened to, differ from device to device
    other = s.call(
        qk.plan_linear, meta(heads.leaves["hidden"]), meta(heads.leaves["weight"]), meta(batch.labels), **given
    )
    check(other.name == plan.name and other.rows == plan.rows, "plan", f"{other.name} on the meta device, {plan.name}")


# --- the token MDP, labels --------------------------------------------------------------------------------------------


def token_mdp(case: Case, backend: str) -> None:
    s = Setup({**case, "temperature": 1.0}, backend)
    request = Request(s)
    if request.reference in ("sums", "none"):
        request.reference = "tokens"
    if s["lengths"] is not None:
        batch = Batch(s, request)
        shape, labels, cu_seqlens, sequence = batch.shape, batch.labels, batch.cu_seqlens, batch.sequence
    else:
        shape = tuple(s["rows"])
        labels, cu_seqlens = s.labels(shape), None
        sequence = torch.arange(labels.numel()) // max(1, shape[-1])
    policy, reference = s.logits(shape, labels, ("logits", "reference_logits"))
    given: dict[str, Any] = {"reference_logits": reference}
    live = request.reference == "live"
    if request.reference == "zero":
        given = {"reference_logps": 0.0}
    elif not live:
        values = s.random.normal(*shape) * s["ratio"]
        dtype = DTYPES[s["reference_dtype"]]
        given = {"reference_logps": s.place(values.clamp(-3e4, 3e4).to(dtype), "reference_logps")}
    rows = Rows(s, exact(policy), exact(reference) if live else None, labels, 1.0)
    beta, unit = s["beta"], s.unit
    given |= {"cu_seqlens": cu_seqlens, "ignore_index": s["ignore_index"], "backend": s.backend}
    found = s.call(qk.token_mdp, s.leaf(policy, True), labels, beta=beta, **given)
    logps, lse = rows.stats["logps"], rows.stats["logsumexp"]
    e_logps, e_lse = rows.errors["logps"], rows.errors["logsumexp"]
    if live:
        ref, e_ref = rows.stats["reference_logps"], rows.errors["reference_logps"]
    else:
        ref = exact(given["reference_logps"]) if isinstance(given["reference_logps"], Tensor) else torch.zeros_like(lse)
        e_ref = 2 * unit * ref.abs()
    valid = rows.valid
    ratio = torch.where((logps == -torch.inf) & (ref == -torch.inf), 0.0, logps - ref)
    following, e_following = torch.zeros(valid.numel(), dtype=torch.float64), torch.zeros(valid.numel())
    contaminated = rows.broken.reshape(-1).clone()
    places = valid.reshape(-1).nonzero().view(-1).tolist()
    for here, there in itertools.pairwise(places):
        if sequence[here] == sequence[there]:
            following[here], e_following[here] = lse.reshape(-1)[there], e_lse.reshape(-1)[there]
            contaminated[here] |= bool(rows.broken.reshape(-1)[there])
    following, e_following = following.view(valid.shape), e_following.view(valid.shape)
    e_ratio = e_logps + e_ref + 2 * unit * (logps.abs() + ref.abs()).nan_to_num(posinf=0.0)
    expected = {
        "Q": (logps + lse, e_logps + e_lse),
        "V": (lse, e_lse),
        "A": (logps, e_logps),
        "implicit_rewards": (ratio, e_ratio),
        "bellman_rewards": (ratio + lse - following, e_ratio + e_lse + e_following),
    }
    for name, (value, error) in expected.items():
        actual = getattr(found, name)
        check(actual.dtype == s.wide and actual.shape == labels.shape, name, f"{actual.dtype} {tuple(actual.shape)}")
        check_constant(actual, name)
        size = (logps.abs() + lse.abs() + following.abs() + ref.abs()).nan_to_num(posinf=0.0)
        error = beta * (error + 16 * unit * size)
        where = ~(contaminated.view(valid.shape) if name == "bellman_rewards" else rows.broken)
        compare(actual, torch.where(valid, beta * value, 0.0), torch.where(valid, error, 0.0), name, where)


def shift_labels(case: Case, backend: str) -> None:
    s = Setup(case, backend)
    if s["lengths"] is not None:
        batch = Batch(s, Request(s))
        labels, cu_seqlens, sequence = batch.labels, batch.cu_seqlens, batch.sequence.tolist()
    else:
        labels, cu_seqlens = s.labels(tuple(s["rows"])), None
        sequence = (torch.arange(labels.numel()) // max(1, labels.shape[-1])).tolist()
    mask = None
    if s["mask"] is not None:
        keep = s.random.uniform(*labels.shape) < 0.7
        mask = s.place(keep if s["mask"] == "bool" else keep.long(), "mask")
    found = qk.shift_labels(labels, mask=mask, cu_seqlens=cu_seqlens, ignore_index=s["ignore_index"])
    ids = labels.cpu().reshape(-1).tolist()
    kept = [True] * len(ids) if mask is None else [bool(m) for m in mask.cpu().reshape(-1).tolist()]
    expected = []
    for i in range(len(ids)):
        last = i + 1 == len(ids) or sequence[i + 1] != sequence[i]
        expected.append(s["ignore_index"] if last or not kept[i + 1] else ids[i + 1])
    check(found.dtype == torch.int64 and found.shape == labels.shape, "labels", f"{found.dtype} {tuple(found.shape)}")
    check(found.cpu().reshape(-1).tolist() == expected, "labels", f"{found.reshape(-1).tolist()}, expected {expected}")


CALLS: dict[str, Callable[[Case, str], None]] = {
    "token_logps": token_logps,
    "token_stats": token_stats,
    "fused_token_dpo": fused_token_dpo,
    "linear_token_logps": linear_token_logps,
    "linear_token_stats": linear_token_stats,
    "fused_linear_token_dpo": fused_linear_token_dpo,
    "plan_linear": plan_linear,
    "token_mdp": token_mdp,
    "shift_labels": shift_labels,
}


def run(case: Case, backend: str) -> None:
    """Run one case. Warnings of torch about zero-size tensors and the like are not results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CALLS[case["call"]](case, backend)
