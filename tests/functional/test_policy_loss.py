"""Policy losses against formulas written out a second time in float64: values, metrics and gradients, on every path.

`truth` is written from the papers and TRL's documentation, on dense `[S, T]` tensors with masks; the package computes
chunk by chunk, packed, and with sequences in another order.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assertions import refuses
from cases import IGNORE, generator
from qkernels import PolicyScores, fused_linear_policy_loss, fused_policy_loss, objectives, plan_linear_policy
from qkernels.objectives import declare_unit

pytestmark = pytest.mark.quick

S, T, H, V = 5, 7, 9, 23
BY_ITEMS = ("dapo", "cispo", "vespo")
LENGTH = {"dr_grpo": {"max_completion_length": 9}}


class Case:
    """Hidden states, a head and what a policy loss reads; float64 unless asked for. One sequence has no tokens."""

    def __init__(self, key: int = 0, dtype: torch.dtype = torch.float64, spread: float = 0.3):
        g = generator(key, S, T)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.hidden, self.weight, self.bias = normal(S, T, H).to(dtype), normal(V, H).to(dtype), normal(V).to(dtype)
        self.reference_weight = (self.weight.double() + 0.1 * normal(V, H)).to(dtype)
        self.labels = torch.randint(0, V, (S, T), generator=g)
        self.labels[:, 0] = IGNORE
        self.labels[1, 4:] = IGNORE
        self.labels[3] = IGNORE
        self.mask = (self.labels != IGNORE).double()
        self.advantages = torch.tensor([1.0, 0.0, -1.3, 0.4, -0.2], dtype=torch.float64)
        own = self.logps(self.hidden.double(), self.weight.double(), self.bias.double())[0].detach()
        self.old = own + spread * normal(S, T)
        self.reference = own + 0.2 * normal(S, T)
        self.sampling = self.old + 0.3 * normal(S, T)
        self.sampling[0, 2] = torch.nan

    def model(self) -> list[tuple[str, Tensor]]:
        return [("h", self.hidden), ("w", self.weight), ("b", self.bias)]

    def logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature=1.0) -> tuple[Tensor, Tensor]:
        """Log-probs of the labels and entropies, `[S, T]`; anything at ignored tokens."""
        z = hidden @ weight.T + (0 if bias is None else bias)
        z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
        log_p = z.log_softmax(-1)
        chosen = log_p.gather(-1, self.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_p.exp() * log_p).sum(-1)

    def arguments(self, loss_type: str, **more) -> dict:
        return {"advantages": self.advantages, "old_logps": self.old, "loss_type": loss_type,
                **LENGTH.get(loss_type, {}), **more}  # fmt: skip


def truth(
    case: Case, lp: Tensor, entropy: Tensor, loss_type: str = "grpo", *, advantages=None, old_logps=None,
    on_policy=False, reference_logps=None, sampling_logps=None, beta=0.0, epsilon=0.2, epsilon_high=None, delta=None,
    importance_sampling_level=None, importance_correction=None, correction_min=None, correction_max=None,
    entropy_coef=0.0, loss_kwargs=None, reduction=None, num_items_in_batch=None, max_completion_length=None,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and metrics from log-probs and entropies with gradient, in float64."""
    own, mask = loss_kwargs or {}, case.mask
    lp = torch.where(mask > 0, lp, 0.0)
    a = case.advantages if advantages is None else advantages
    a = a.unsqueeze(1) if a.dim() == 1 else a
    old = lp.detach() if on_policy else torch.where(mask > 0, old_logps, 0.0)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    level = importance_sampling_level or {"gspo": "sequence", "luspo": "sequence", "rloo": "sequence_sum"}.get(
        loss_type, "token"
    )
    x = lp - old
    if level != "token":
        x = (x * mask).sum(1, keepdim=True) / (count if level == "sequence" else 1)
    rho = torch.exp(x)
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        cap = 5.0 if epsilon_high is None else epsilon_high
        token = -rho.clamp(max=cap).detach() * a * lp
    elif loss_type == "sapo":
        tau = torch.full_like(a, own.get("temperature_neg", 1.05))
        tau[a > 0] = own.get("temperature_pos", 1.0)
        token = -a * 4 / tau / (1 + torch.exp(-tau * (rho - 1)))
    elif loss_type == "vespo":
        w = ((lp - old).detach() * mask).sum(1, keepdim=True)
        k = torch.where(a >= 0, own.get("k_pos", 2.0), own.get("k_neg", 3.0))
        lam = torch.where(a >= 0, own.get("lambda_pos", 3.0), own.get("lambda_neg", 2.0))
        token = -torch.exp(lam + k * w - lam * torch.exp(w)) * a * lp
    else:
        rho_capped = rho if delta is None else rho.clamp(max=delta)
        token = -torch.minimum(rho_capped * a, rho.clamp(1 - epsilon, 1 + high) * a)
    token = token * torch.ones_like(mask)
    if "off_policy_threshold" in own:
        sampled = old if sampling_logps is None else sampling_logps
        far = ((sampled - lp.detach()).nan_to_num(nan=0.0) * mask).sum(1, keepdim=True) / count
        token = token * ((a >= 0) | (far <= own["off_policy_threshold"]))
    wanted = mask
    if "entropy_quantile" in own:
        threshold = torch.quantile(entropy.detach()[mask > 0].float(), 1 - own["entropy_quantile"])
        wanted = mask * (entropy.detach() >= threshold)
        token = token * wanted
    if importance_correction:
        d = torch.where(mask > 0, (old.detach() - sampling_logps).nan_to_num(nan=0.0), 0.0)
        d = d.sum(1, keepdim=True) if importance_correction.startswith("sequence") else d
        r = torch.exp(d)
        if importance_correction.endswith("truncate"):
            r = r.clamp(correction_min, correction_max)
        else:
            outside = (r < (correction_min or -math.inf)) | (r > (correction_max or math.inf))
            r = r.masked_fill(outside, 0.0)
        token = token * r
    if reference_logps is not None:
        y = torch.where(mask > 0, reference_logps, 0.0) - lp
        kl = torch.exp(y) - y - 1
        token = token + beta * kl * (rho if own.get("corrected_kl") else 1.0)
    reduction = reduction or {"bnpo": "token_mean", "dr_grpo": "fixed_length", "luspo": "sequence_sum"}.get(
        loss_type, "items" if loss_type in BY_ITEMS else "sequence_mean"
    )
    tokens = mask.sum()
    total = (token * mask).sum()
    loss = {
        "sequence_mean": ((token * mask).sum(1) / count.squeeze(1)).mean(),
        "token_mean": total / tokens,
        "items": total / (num_items_in_batch or tokens),
        "fixed_length": total / (S * (max_completion_length or 1)),
        "sequence_sum": total / S,
        "sum": total,
        "none": token * mask,
    }[reduction]
    policy_loss = loss.detach()
    if entropy_coef:
        loss = loss - entropy_coef * (entropy * wanted).sum() / wanted.sum()
    rho, a = rho * torch.ones_like(mask), a * torch.ones_like(mask)
    found = {"loss": loss, "policy_loss": policy_loss, "ratio_mean": (rho * mask).sum() / tokens}
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "rloo"):
        capped = rho if delta is None else rho.clamp(max=delta)
        found["clip_low"] = (((capped < 1 - epsilon) & (a < 0)) * mask).sum() / tokens
        found["clip_high"] = (((capped > 1 + high) & (a > 0)) * mask).sum() / tokens
    if reference_logps is not None:
        found["kl"] = (kl * mask).sum() / tokens
    return found


def run_truth(case: Case, arguments: dict, trains="hwb", temperature=1.0) -> dict[str, Tensor]:
    leaves = [t.double().clone().requires_grad_(n in trains) for n, t in case.model()]
    lp, entropy = case.logps(*leaves, temperature)
    how = dict(arguments)
    if how.pop("model", False):
        how["reference_logps"] = case.logps(case.hidden.double(), case.reference_weight.double(), None, temperature)[0]
    found = truth(case, lp, entropy, **how)
    upstream = torch.ones_like(found["loss"]) * (1 + torch.arange(found["loss"].numel()).view_as(found["loss"]) % 3)
    found["loss"].backward(upstream)
    return {**found, **{f"d{n}": leaf.grad for n, leaf in zip("hwb", leaves, strict=True) if leaf.grad is not None}}


def run(case: Case, arguments: dict, how="auto", trains="hwb", chunk_rows=None, packed=False, **more):
    """The output of one path, with gradients by name. `how`: "logits" or a plan."""
    leaves = [t.clone().requires_grad_(n in trains) for n, t in case.model()]
    given, labels, hidden = dict(arguments), case.labels, leaves[0]
    temperature = given.pop("temperature", more.pop("temperature", 1.0))
    if packed:
        keep = torch.rand(S, T, generator=generator(3)) < 0.5
        keep |= labels != IGNORE
        ends = torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).int()
        for name in ("old_logps", "reference_logps", "sampling_logps", "advantages"):
            if isinstance(given.get(name), Tensor) and given[name].dim() == 2:
                given[name] = given[name][keep]
        hidden, labels, more["cu_seqlens"] = hidden[keep], labels[keep], ends
        temperature = temperature[keep] if isinstance(temperature, Tensor) else temperature
    model = given.pop("model", False)
    if how == "logits":
        if model:
            given["reference_logits"] = (hidden @ case.reference_weight.T).detach()
        out = fused_policy_loss(hidden @ leaves[1].T + leaves[2], labels, temperature=temperature, **given, **more)
    else:
        if model:
            given |= {"reference_hidden": hidden.detach(), "reference_weight": case.reference_weight}
        budget = None if chunk_rows is None else chunk_rows * V * 8 * (2 if model else 1)
        out = fused_linear_policy_loss(hidden, leaves[1], labels, bias=leaves[2], plan=how, temperature=temperature,
                                       max_chunk_bytes=budget, **given, **more)  # fmt: skip
    upstream = torch.ones_like(out.loss) * (1 + torch.arange(out.loss.numel()).view_as(out.loss) % 3)
    if out.loss.requires_grad:
        out.loss.backward(upstream)
    return out, {f"d{n}": leaf.grad for n, leaf in zip("hwb", leaves, strict=True) if leaf.grad is not None}


def check(case: Case, arguments: dict, how="auto", tolerance=1e-10, **more):
    """One path against the truth: loss, metrics and gradients."""
    temperature, trains = more.get("temperature", 1.0), more.get("trains", "hwb")
    out, gradients = run(case, arguments, how, **more)
    expected = run_truth(case, arguments, trains, temperature)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    if not more.get("packed"):
        torch.testing.assert_close(out.loss.detach(), expected["loss"].detach(), **close)
    for name in ("policy_loss", "ratio_mean", "clip_low", "clip_high", "kl"):
        if name in expected and not (name == "policy_loss" and out.loss.dim()):
            torch.testing.assert_close(getattr(out.metrics, name), expected[name].detach(), **close)
    assert gradients.keys() == {f"d{n}" for n in trains}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **close)
    return out


WAYS = {
    "one chunk": {},
    "chunks": {"chunk_rows": 4},
    "packed": {"packed": True, "chunk_rows": 7},
    "logits": {"how": "logits"},
    "packed logits": {"how": "logits", "packed": True},
    "recompute": {"how": "recompute", "chunk_rows": 4},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("loss_type", objectives.POLICY_OBJECTIVES)
def test_every_loss(loss_type, way):
    case = Case()
    by_sequence = objectives.POLICY_OBJECTIVES[loss_type].unit == "sequence" or loss_type in ("gspo", "luspo", "rloo")
    way = {**way, "chunk_rows": 8} if by_sequence and way.get("chunk_rows") and "how" not in way else way
    out = check(case, case.arguments(loss_type), **way)
    if "how" not in way:
        assert out.plan.name == ("sequence_chunks" if by_sequence else "token_chunks") and out.plan.products == 3


OPTIONS = {
    "a clip on each side": {"epsilon": 0.1, "epsilon_high": 0.28},
    "two-sided": {"epsilon": 0.1, "delta": 1.15},
    "cispo's cap": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo's temperatures": {"loss_type": "sapo", "loss_kwargs": {"temperature_pos": 0.7, "temperature_neg": 1.4}},
    "vespo's": {"loss_type": "vespo", "loss_kwargs": {"k_pos": 1.5, "lambda_neg": 1.0}},
    "sequence ratio": {"importance_sampling_level": "sequence", "loss_type": "dapo", "num_items_in_batch": 31},
    "kl": {"beta": 0.3, "reference_logps": ...},
    "kl of a model": {"beta": 0.3, "model": True},
    "kl times the ratio": {"beta": 0.3, "reference_logps": ..., "loss_kwargs": {"corrected_kl": True}},
    "kl as a metric": {"reference_logps": ...},
    "entropy bonus": {"entropy_coef": 0.2},
    "entropy and kl of a model": {"entropy_coef": -0.1, "beta": 0.1, "model": True, "loss_type": "gspo"},
    "high entropy only": {"loss_kwargs": {"entropy_quantile": 0.4}, "entropy_coef": 0.2},
    "on policy": {"on_policy": True, "old_logps": None},
    "on policy, by sequence": {"on_policy": True, "old_logps": None, "loss_type": "gspo"},
    "off-policy sequences": {"loss_kwargs": {"off_policy_threshold": 0.02}},
    "off-policy, by the engine": {"loss_kwargs": {"off_policy_threshold": 0.02}, "sampling_logps": ...},
    "items": {"loss_type": "dapo", "num_items_in_batch": 100},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "token_truncate": {"sampling_logps": ..., "importance_correction": "token_truncate", "correction_max": 1.1},
    "token_mask": {
        "sampling_logps": ..., "importance_correction": "token_mask", "correction_min": 0.8, "correction_max": 1.2
    },
    "sequence_truncate": {
        "sampling_logps": ..., "importance_correction": "sequence_truncate", "correction_min": 0.9
    },
    "sequence_mask": {"sampling_logps": ..., "importance_correction": "sequence_mask", "correction_max": 1.5},
    "correction on policy": {
        "sampling_logps": ..., "importance_correction": "sequence_truncate", "correction_max": 1.5, "on_policy": True,
        "old_logps": None,
    },
}  # fmt: skip


def filled(case: Case, options: dict) -> dict:
    """The options, with the case's tensors in place of `...`."""
    own = {"reference_logps": case.reference, "sampling_logps": case.sampling}
    given = case.arguments(options.get("loss_type", "grpo"))
    return {**given, **{name: own[name] if value is ... else value for name, value in options.items()}}


@pytest.mark.parametrize("way", [{"chunk_rows": 8}, {"how": "logits", "packed": True}], ids=["hidden", "logits"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options, way):
    case = Case(1)
    if options.get("reduction") == "none":
        way = {k: v for k, v in way.items() if k != "packed"}
    check(case, filled(case, options), **way)


@pytest.mark.parametrize("options", ["kl", "entropy bonus", "on policy", "kl of a model"])
@pytest.mark.parametrize("trains", ["h", "w", "hw"])
def test_what_trains(options, trains):
    case = Case(2)
    out = check(case, filled(case, OPTIONS[options]), trains=trains, chunk_rows=5)
    assert (out.plan.name, out.plan.products) == ("token_chunks", 1 + len(trains))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "way", [{"chunk_rows": 4}, {"how": "recompute"}, {"trains": "h"}, {"trains": "h", "how": "frozen_head"}]
)
def test_temperature_of_each_row(way, softcap):
    """The temperature as a tensor equals rows that are scaled before."""
    case, trains = Case(4), way.get("trains", "hw")
    temperature = 0.5 + torch.rand(S, T, generator=generator(9), dtype=torch.float64)
    arguments = case.arguments("grpo", beta=0.1, reference_logps=case.reference)
    if softcap is None:
        check(case, arguments, temperature=temperature, **{**way, "trains": trains})
        return
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_("w" in trains)]
    out = fused_linear_policy_loss(*leaves, case.labels, temperature=temperature, softcap=softcap, logit_scale=0.7,
                                   plan=way.get("how", "auto"), **arguments)  # fmt: skip
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logits = softcap * torch.tanh(0.7 * (again[0] @ again[1].T) / softcap)
    expected = fused_policy_loss(logits, case.labels, temperature=temperature, **arguments)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward(), expected.loss.backward()
    for ours, theirs in zip(leaves, again, strict=True):
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_logits_with_a_temperature_of_each_row():
    case, temperature = Case(4), 0.5 + torch.rand(S, T, generator=generator(9), dtype=torch.float64)
    for inplace in (False, True):
        check(case, case.arguments("grpo"), how="logits", temperature=temperature, inplace_backward=inplace)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("options", ["kl of a model", "entropy bonus", "sequence ratio"])
def test_narrow_inputs(dtype, tolerance, options):
    """Within what rounding of inputs' gradients explains; the log-probs are those of fp32 logits."""
    case = Case(5, dtype)
    arguments = filled(case, OPTIONS[options])
    out, gradients = run(case, arguments, chunk_rows=8)
    expected = run_truth(case, arguments)
    torch.testing.assert_close(out.loss.double(), expected["loss"], rtol=2e-5, atol=2e-5)
    for name, gradient in gradients.items():
        error = (gradient.double() - expected[name]).abs().max()
        assert gradient.dtype == dtype and error <= tolerance * expected[name].abs().max(), name


# --- rows without a gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
@pytest.mark.parametrize("trains", ["h", "hw"])
def test_rows_without_a_gradient_leave_the_products(loss_type, trains, monkeypatch):
    """Counted by the rows that go into the GEMMs of the backward."""
    from qkernels.head.products import Head

    rows, real = [], Head.input_grad
    monkeypatch.setattr(Head, "input_grad", lambda self, g: rows.append(g.shape[0]) or real(self, g))
    case = Case(6, spread=1.5)
    case.old[0] -= 1.0  # of advantage 1: clipped
    arguments = case.arguments(loss_type)
    out, gradients = run(case, arguments, trains=trains, chunk_rows=8)
    valid = int(case.mask.sum())
    idle = int(out.metrics.idle_rows)
    assert out.plan.idle_rows == int(case.mask[1].sum()) < idle and sum(rows) == valid - idle
    zero = gradients["dh"].abs().sum(-1) == 0
    assert int((zero & (case.mask > 0)).sum()) == idle
    assert f"{out.plan.idle_rows} of them without a gradient" in str(out.plan)
    expected = run(case, arguments, "logits")[0]
    assert int(expected.metrics.idle_rows) == idle
    for more in ({"beta": 0.1, "reference_logps": case.reference}, {"entropy_coef": 0.1}):
        assert int(run(case, {**arguments, **more}, trains=trains)[0].metrics.idle_rows) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_any_gradient(dtype):
    case = Case(6, dtype)
    arguments = case.arguments("grpo", advantages=torch.zeros(S))
    for how in ("auto", "recompute", "logits"):
        out, gradients = run(case, arguments, how, trains="hw")
        assert out.loss.item() == 0 and all(not g.any() for g in gradients.values())
    case.labels[:] = IGNORE
    out, gradients = run(case, arguments)
    assert out.loss.item() == 0 and all(not g.any() for g in gradients.values())


def test_advantages_of_tokens():
    """Some of them 0 within a sequence: of a token loss these rows leave, of a sequence loss the sequence stays."""
    case = Case(7)
    advantages = torch.randn(S, T, generator=generator(7), dtype=torch.float64)
    advantages[:, ::2] = 0
    for loss_type in ("grpo", "gspo", "cispo"):
        for way in ({"chunk_rows": 8}, {"how": "logits"}, {"packed": True}):
            check(case, {**case.arguments(loss_type), "advantages": advantages}, **way)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_token_at_the_entropy_quantile_is_one_of_the_highest(dtype):
    """Alone it is the quantile itself; rounding must not put it below."""
    for seed in range(20):
        logits = torch.randn(1, 1, 8, generator=generator(seed), dtype=torch.float64).to(dtype).requires_grad_()
        options = {"advantages": torch.ones(1), "on_policy": True, "loss_kwargs": {"entropy_quantile": 0.5}}
        assert fused_policy_loss(logits, torch.tensor([[3]]), **options).loss.item() == -1


@pytest.mark.parametrize("how", ["auto", "recompute", "logits"])
def test_a_correction_inside_the_loss_leaves_no_row_without_a_gradient(how):
    """VESPO takes the masked importance into its weight, which is not 0 then."""
    case = Case(9)
    arguments = case.arguments("vespo", importance_correction="token_mask", correction_max=2.0)
    arguments |= {"sampling_logps": case.old - 3, "loss_kwargs": {"k_pos": 0.01, "lambda_pos": 1.0, "k_neg": 0.01}}
    _, expected = run(case, arguments, "logits")
    _, found = run(case, arguments, how)
    assert expected["dh"].any()
    torch.testing.assert_close(found["dh"], expected["dh"])


def test_ratios_of_a_batch_without_valid_tokens():
    case = Case(10)
    case.labels[:] = IGNORE
    metrics = run(case, case.arguments("grpo"), "logits")[0].metrics
    assert math.isnan(metrics.ratio_min) and math.isnan(metrics.ratio_max)


def test_a_second_backward():
    case = Case(8)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = fused_linear_policy_loss(hidden, weight, case.labels, **case.arguments("grpo"))
    out.loss.backward(retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    (out.loss * 2).backward()
    for grad, once in zip((hidden.grad, weight.grad), first, strict=True):
        torch.testing.assert_close(grad, 3 * once)


@pytest.mark.parametrize("loss_type", ["grpo", "rloo", "sapo"])
def test_gradcheck(loss_type):
    case = Case(9)
    arguments = case.arguments(loss_type, entropy_coef=0.1, beta=0.2, reference_logps=case.reference)

    def loss(hidden, weight):
        return fused_linear_policy_loss(hidden, weight, case.labels, **arguments).loss

    leaves = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("perturbed", ["advantages", "old_logps", "reference_logps", "scale", "coefficients"])
def test_one_percent_is_seen(perturbed, monkeypatch):
    case = Case(10)
    arguments = case.arguments("grpo", beta=0.2, reference_logps=case.reference)
    check(case, arguments)
    if perturbed == "scale":
        from qkernels.functional import policy_loss

        real = policy_loss._scale
        monkeypatch.setattr(policy_loss, "_scale", lambda *a: 1.01 * real(*a))
        wrong = arguments
    elif perturbed == "coefficients":
        from qkernels.head import chunks

        known = chunks.coefficients_of
        monkeypatch.setattr(chunks, "coefficients_of", lambda *a: 1.01 * known(*a))
        wrong = arguments
    else:
        wrong = {**arguments, perturbed: 1.01 * arguments[perturbed]}
    out, gradients = run(case, wrong)
    expected = run_truth(case, arguments)
    values = [(out.loss, expected["loss"]), *((gradients[n], expected[n]) for n in gradients)]
    with pytest.raises(AssertionError):
        for found, exact in values:
            torch.testing.assert_close(found.detach(), exact.detach(), rtol=1e-4, atol=1e-9)


# --- a user's loss ----------------------------------------------------------------------------------------------------


def reinforce(scores: PolicyScores, baseline: float = 0.0) -> Tensor:
    return -(scores.advantages - baseline) * scores.logps


def by_sequence(scores: PolicyScores) -> Tensor:
    return -scores.advantages * scores.sequence_mean(scores.logps)


def fresh(function, unit):
    return declare_unit(unit)(lambda scores, **options: function(scores, **options))


@pytest.mark.parametrize("packed", [False, True])
def test_a_callable_with_a_unit(packed):
    case = Case(11)
    for function, unit in ((reinforce, "token"), (by_sequence, "sequence")):
        found = []
        for declared in (fresh(function, unit), fresh(function, "batch"), function):
            out, gradients = run(case, {**case.arguments("grpo"), "loss_type": declared}, chunk_rows=8, packed=packed)
            found.append((out.loss.detach(), gradients))
            assert out.plan.name == (f"{unit}_chunks" if len(found) == 1 else "recompute")
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[0], found[2])


def test_options_of_a_callable():
    case = Case(11)
    loss = declare_unit("token")(reinforce)
    arguments = {**case.arguments("grpo"), "loss_type": loss, "loss_kwargs": {"baseline": 0.5}}
    shifted = {**case.arguments("grpo"), "loss_type": loss, "advantages": case.advantages - 0.5}
    torch.testing.assert_close(run(case, arguments)[0].loss, run(case, shifted)[0].loss)


BROKEN = {
    "token": [lambda s: s.logps - s.logps.mean(), lambda s: s.logps / s.logps.numel(), lambda s: s.logps.cumsum(-1)],
    "sequence": [lambda s: s.logps - s.logps.mean(), lambda s: s.logps / s.logps.shape[0]],
}


@pytest.mark.parametrize("how", ["auto", "logits"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unit, broken", [(unit, f) for unit, fs in BROKEN.items() for f in fs])
def test_a_unit_that_is_not_kept_is_found(unit, broken, packed, how):
    case = Case(12)
    arguments = {**case.arguments("grpo"), "loss_type": fresh(broken, unit)}
    refuses(
        ValueError, f"declares unit='{unit}'", "depends on other", call=lambda: run(case, arguments, how, packed=packed)
    )


def test_a_token_loss_cannot_sum():
    case = Case(12)
    arguments = {**case.arguments("grpo"), "loss_type": fresh(by_sequence, "token")}
    refuses(ValueError, "unit 'token'", "declare_unit", call=lambda: run(case, arguments))


# --- what may be wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["auto", "logits"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_that_overflows(how, sign):
    """The loss and its gradients stay finite, and the metric says so."""
    case = Case(13, torch.float32)
    old = case.old.clone()
    old[0, 2] = -1e4
    for loss_type in objectives.POLICY_OBJECTIVES:
        arguments = {**case.arguments(loss_type), "old_logps": old, "advantages": sign * case.advantages.abs()}
        out, gradients = run(case, arguments, how)
        assert bool(out.loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients.values()), loss_type
        assert int(out.metrics.overflows) >= 1, loss_type
    assert int(run(case, case.arguments("grpo"), how)[0].metrics.overflows) == 0


def test_wrong_arguments():
    case = Case(14)
    good = case.arguments("grpo")
    wrong = [
        ({"advantages": case.advantages[:3]}, ValueError, ["advantages", r"\(5, 7\)", r"\(5,\)", r"\(3,\)"]),
        ({"advantages": [1.0] * S}, TypeError, ["advantages", "list"]),
        ({"advantages": torch.ones(S, dtype=torch.long)}, TypeError, ["advantages", "floating"]),
        ({"old_logps": None}, ValueError, ["old_logps", "on_policy=True"]),
        ({"on_policy": True}, ValueError, ["old_logps", "on_policy"]),
        ({"old_logps": case.old[:, :3]}, ValueError, ["old_logps", r"\(5, 7\)"]),
        ({"beta": 0.1}, ValueError, ["beta=0.1", "reference_logps"]),
        ({"loss_kwargs": {"corrected_kl": True}}, ValueError, ["corrected_kl", "beta=0"]),
        ({"beta": -0.1}, ValueError, ["beta", "0 or more"]),
        ({"loss_type": "ppo"}, ValueError, ["'ppo'", "grpo"]),
        ({"loss_type": 3}, TypeError, ["loss_type", "int"]),
        ({"loss_type": "sapo", "epsilon": 0.2}, ValueError, ["epsilon", "sapo", "temperature_pos"]),
        ({"epsilon": 1.5}, ValueError, ["epsilon", r"\[0, 1\)"]),
        ({"delta": -1.0}, ValueError, ["delta", "above 0"]),
        ({"epsilon": 0.1, "loss_kwargs": {"epsilon": 0.1}}, ValueError, ["epsilon", "both"]),
        ({"loss_kwargs": {"tau": 1.0}}, ValueError, ["tau", "unknown"]),
        ({"loss_kwargs": 3}, TypeError, ["loss_kwargs", "int"]),
        ({"importance_sampling_level": "pair"}, ValueError, ["importance_sampling_level", "'sequence'", "'pair'"]),
        ({"importance_correction": "token_mask"}, ValueError, ["token_mask", "sampling_logps"]),
        ({"importance_correction": "mask"}, ValueError, ["importance_correction", "'mask'"]),
        ({"sampling_logps": case.sampling}, ValueError, ["sampling_logps", "importance_correction"]),
        ({"correction_max": 2.0}, ValueError, ["correction_max", "importance_correction"]),
        ({"reduction": "mean"}, ValueError, ["reduction", "'sequence_mean'", "'mean'"]),
        ({"num_items_in_batch": 7}, ValueError, ["num_items_in_batch", "sequence_mean"]),
        ({"max_completion_length": 7}, ValueError, ["max_completion_length", "sequence_mean"]),
        ({"reduction": "fixed_length"}, ValueError, ["fixed_length", "max_completion_length"]),
        ({"reduction": "none", "entropy_coef": 0.1}, ValueError, ["none", "entropy_coef"]),
        ({"temperature": torch.zeros(S, T)}, ValueError, ["temperature", "above 0"]),
        ({"temperature": torch.ones(S)}, ValueError, ["temperature", r"\(5, 7\)"]),
        ({"outputs": ("entropi",)}, ValueError, ["outputs", "entropi"]),
        ({"loss_kwargs": {"entropy_quantile": 0.0}}, ValueError, ["entropy_quantile", r"\(0, 1\]"]),
        ({"loss_kwargs": {"entropy_group": 1}}, ValueError, ["entropy_group", "entropy_quantile below 1"]),
        (
            {"loss_kwargs": {"entropy_group": 1, "entropy_quantile": 0.5}},
            ValueError,
            ["entropy_group", "init_process_group"],
        ),
    ]
    for options, error, words in wrong:
        for how in ("auto", "logits"):
            refuses(error, *words, call=lambda o=options, h=how: run(case, {**good, **o}, h))
    dense = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels}
    refuses(ValueError, "plan='pair_chunks'", "token", call=lambda: run(case, good, "pair_chunks"))
    refuses(ValueError, "hidden", r"\[S, T, H\]", call=lambda: fused_linear_policy_loss(
        **{**dense, "hidden": case.hidden[0]}, **good))  # fmt: skip
    refuses(ValueError, "sequence_chunks", "recompute|chunk holds", call=lambda: run(
        case, case.arguments("gspo"), "sequence_chunks", chunk_rows=2))  # fmt: skip
    refuses(TypeError, "no argument", "gamma", call=lambda: plan_linear_policy(*dense.values(), gamma=1, **good))


def test_plans_are_told():
    case = Case(15)
    meta = [x.to("meta").requires_grad_(x.is_floating_point()) for x in (case.hidden, case.weight, case.labels)]
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.arguments("gspo").items()}
    assert plan_linear_policy(*meta, **given).name == "sequence_chunks"
    hidden, weight = meta[0], case.weight.to("meta")
    assert (p := plan_linear_policy(hidden, weight, meta[2], **given)).products == 2 and p.name == "sequence_chunks"
    assert plan_linear_policy(hidden.detach(), weight, meta[2], **given).name == "forward_only"
    given["loss_type"] = "grpo"
    assert plan_linear_policy(*meta, **given).name == "token_chunks"
    coupled = plan_linear_policy(*meta, **given, loss_kwargs={"entropy_quantile": 0.2})
    assert coupled.name == "recompute" and "whole batch" in coupled.reason and coupled.products == 4


def test_given_numbers_of_rows():
    case = Case(16)
    counts = case.mask.sum(1).long().tolist()
    check(case, case.arguments("gspo"), valid_rows=counts, chunk_rows=8)
    counts[0] += 1
    refuses(ValueError, r"valid_rows\[0\]", call=lambda: run(case, case.arguments("grpo"), valid_rows=counts))


def test_further_outputs():
    case = Case(17)
    for how in ("auto", "logits"):
        out, _ = run(case, case.arguments("grpo"), how, outputs=("entropy", "mean_logits"))
        entropy = case.logps(case.hidden, case.weight, case.bias)[1] * case.mask
        torch.testing.assert_close(out.stats.entropy, entropy)
        assert out.stats.logps is None and out.stats.mean_logits.shape == (S, T) and not out.stats.entropy.requires_grad


@pytest.mark.nightly
@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_compiled(loss_type):
    case = Case(18, torch.float32)

    def loss(hidden, weight):
        return fused_linear_policy_loss(hidden, weight, case.labels, **case.arguments(loss_type)).loss

    leaves = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, expected)
