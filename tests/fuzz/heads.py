"""Hidden states and heads: logits in float64, and allowed errors of gradients that pass through the products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import oracle
from assertions import EPS32, HEAD_GRADIENT, HEAD_SCALE, SMALLEST
from fuzz import formulas
from fuzz.setup import Setup, check, compare, exact, without_rows


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
        hidden = s.inject(hidden, labels)
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
