"""What a case says, with defaults; the tensors that all calls share; the comparison of a result with its truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assertions import EPS32, ROW_BOUNDS
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

    def inject(self, rows: Tensor, labels: Tensor) -> Tensor:
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
        policy = self.place(self.inject(policy, labels).to(self.dtype), names[0], rows=True)
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
