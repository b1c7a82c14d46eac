"""A preference loss on float64 rows: the request, the batch, and what loss, rewards and slopes may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz import formulas
from fuzz.rows import Rows
from fuzz.setup import Setup, check, check_constant, compare, exact
from fuzz.tensors import DTYPES, view


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
            # Below the smallest normal number the factor keeps the step between denormal ones.
            importance_error = importance_error + 2.0**-148 / importance.clamp_min(1e-300)
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
        for field, parts in paths.items():
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
            self.coefficients[field] = total.view(rows.labels.shape)
            self.coefficient_errors[field] = wrong.view(rows.labels.shape)
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
        if bool(truth.undefined.any()):
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
