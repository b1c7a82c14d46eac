"""Losses on sequences that are not paired against their formulas in float64, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import refuses
from cases import IGNORE, generator
from qkernels import fused_linear_sequence_loss, fused_sequence_loss, objectives, plan_linear_sequences
from qkernels.objectives import declare_unit

pytestmark = pytest.mark.quick

S, T, H, V = 5, 6, 8, 19
DESIRABLE = torch.tensor([True, False, False, True, False])


class Case:
    """Hidden states, a head, cached log-probs and weights of tokens; the fourth sequence has no tokens."""

    def __init__(self, key: int = 0, dtype: torch.dtype = torch.float64):
        g = generator(key, S, T)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.hidden, self.weight = normal(S, T, H).to(dtype), normal(V, H).to(dtype)
        self.reference_weight = (self.weight.double() + 0.1 * normal(V, H)).to(dtype)
        self.labels = torch.randint(0, V, (S, T), generator=g)
        self.labels[:, 0] = IGNORE
        self.labels[3] = IGNORE
        self.mask = (self.labels != IGNORE).double()
        self.weights = torch.rand(S, T, generator=g, dtype=torch.float64)
        self.reference = self.logps(self.hidden.double(), self.reference_weight.double())

    def logps(self, hidden: Tensor, weight: Tensor) -> Tensor:
        chosen = (hidden @ weight.T).log_softmax(-1).gather(-1, self.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.mask > 0, chosen, 0.0)


def truth(case: Case, loss_type: str, trains="hw", *, beta=0.1, kl=0.0, weights=None, wanted=1.0, unwanted=1.0,
          reference=None, reduction="mean") -> dict[str, Tensor]:  # fmt: skip
    """The loss, rewards and gradients, as in the papers with 1 - sigma."""
    hidden = case.hidden.double().clone().requires_grad_("h" in trains)
    weight = case.weight.double().clone().requires_grad_("w" in trains)
    w = case.mask if weights is None else weights * case.mask
    r = (w * (case.logps(hidden, weight) - (case.reference if reference is None else reference))).sum(1)
    kl = kl if loss_type == "kto" else 0.0
    losses = [
        wanted * (1 - torch.sigmoid(beta * (r[i] - kl))) if good else unwanted * (1 - torch.sigmoid(beta * (kl - r[i])))
        for i, good in enumerate(DESIRABLE.tolist())
    ]
    losses = torch.stack(losses)
    loss = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    loss.sum().backward()
    return {"loss": loss.detach(), "rewards": beta * r.detach(), "dh": hidden.grad, "dw": weight.grad}


def run(case: Case, how="auto", trains="hw", packed=False, chunk_rows=None, **options):
    """One path: the output, with gradients by name. `how`: "logits" or a plan."""
    leaves = [t.clone().requires_grad_(n in trains) for n, t in zip("hw", (case.hidden, case.weight), strict=True)]
    hidden, labels, desirable = leaves[0], case.labels, options.pop("desirable", DESIRABLE)
    if packed:
        keep = (torch.rand(S, T, generator=generator(5)) < 0.5) | (labels != IGNORE)
        options["cu_seqlens"] = torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).int()
        for name in ("reference_logps", "token_weights"):
            if isinstance(options.get(name), Tensor) and options[name].dim() == 2:
                options[name] = options[name][keep]
        hidden, labels = hidden[keep], labels[keep]
    model = options.pop("model", False)
    if how == "logits":
        options |= {"reference_logits": (hidden @ case.reference_weight.T).detach()} if model else {}
        out = fused_sequence_loss(hidden @ leaves[1].T, labels, desirable, **options)
    else:
        options |= {"reference_hidden": hidden.detach(), "reference_weight": case.reference_weight} if model else {}
        budget = None if chunk_rows is None else chunk_rows * V * 8 * (2 if model else 1)
        out = fused_linear_sequence_loss(
            hidden, leaves[1], labels, desirable, plan=how, max_chunk_bytes=budget, **options
        )
    out.loss.sum().backward()
    return out, {f"d{n}": leaf.grad for n, leaf in zip("hw", leaves, strict=True) if leaf.grad is not None}


def check(case: Case, loss_type: str, expected: dict, how="auto", tolerance=1e-10, **options) -> None:
    out, gradients = run(case, how, loss_type=loss_type, **options)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(out.loss.detach(), expected["loss"], **close)
    torch.testing.assert_close(out.rewards, expected["rewards"], **close)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **close)
    if how == "auto":
        assert (out.plan.name, out.plan.products) == ("sequence_chunks", 1 + len(gradients))


WAYS = {
    "one chunk": {},
    "chunks": {"chunk_rows": 7},
    "packed": {"packed": True, "chunk_rows": 7},
    "logits": {"how": "logits"},
    "packed logits": {"how": "logits", "packed": True},
    "recompute": {"how": "recompute", "chunk_rows": 2},
    "frozen": {"trains": "h"},
}
LOSSES = tuple(objectives.SEQUENCE_OBJECTIVES)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(loss_type, way):
    case, kl = Case(), {"kl": 0.07} if loss_type == "kto" else {}
    expected = truth(case, loss_type, kl=0.07, beta=0.4, wanted=1.3, unwanted=0.6)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    for reference in ({"reference_logps": case.reference}, {"reference_logps": case.reference.sum(1)}, {"model": True}):
        check(case, loss_type, expected, beta=0.4, loss_kwargs=weights, **kl, **reference, **way)


@pytest.mark.parametrize("how", ["auto", "logits"])
def test_options(how):
    case = Case(1)
    for reduction in ("sum", "none"):
        expected = truth(case, "apo_zero_unpaired", reduction=reduction)
        way = "recompute" if how == "auto" and reduction == "none" else how
        check(case, "apo_zero_unpaired", expected, way, reduction=reduction, reference_logps=case.reference)
    expected = truth(case, "apo_zero_unpaired", weights=case.weights)
    check(case, "apo_zero_unpaired", expected, how, token_weights=case.weights, reference_logps=case.reference)
    free = truth(case, "apo_zero_unpaired", reference=torch.zeros(S, T))
    check(case, "apo_zero_unpaired", free, how, reference_logps=0.0)
    policy = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    for reference, kl in ((policy - 0.2, 0.2), (policy + 0.2, 0.0)):
        estimate = {"kl_logps": policy, "kl_reference_logps": reference}
        check(case, "kto", truth(case, "kto", kl=kl), how, reference_logps=case.reference, **estimate)
        assert run(case, how, reference_logps=case.reference, **estimate)[0].kl == pytest.approx(kl)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_narrow_inputs(dtype, tolerance):
    case = Case(2, dtype)
    out, gradients = run(case, reference_logps=case.reference, kl=torch.tensor(0.05), chunk_rows=8)
    expected = truth(case, "kto", kl=0.05)
    torch.testing.assert_close(out.loss.double(), expected["loss"], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        error = (gradient.double() - expected[name]).abs().max()
        assert gradient.dtype == dtype and error <= tolerance * expected[name].abs().max(), name


def test_one_percent_is_seen(monkeypatch):
    case, expected = Case(3), truth(Case(3), "kto", kl=0.1)
    check(case, "kto", expected, reference_logps=case.reference, kl=0.1)
    for wrong in ({"beta": 0.101}, {"kl": 0.101}, {"reference_logps": 1.01 * case.reference},
                  {"loss_kwargs": {"desirable_weight": 1.01}}):  # fmt: skip
        with pytest.raises(AssertionError):
            check(case, "kto", expected, **{"tolerance": 1e-7, "reference_logps": case.reference, "kl": 0.1, **wrong})
    from qkernels.head import chunks

    known = chunks.coefficients_of
    monkeypatch.setattr(chunks, "coefficients_of", lambda *a: 1.01 * known(*a))
    with pytest.raises(AssertionError):
        check(case, "kto", expected, tolerance=1e-5, reference_logps=case.reference, kl=0.1)


def margin(scores, beta):
    return torch.relu(1 - beta * torch.where(scores.desirable, 1.0, -1.0) * scores.log_ratios)


def fresh(function, unit):
    return declare_unit(unit)(lambda scores, beta: function(scores, beta))


def test_a_callable_with_a_unit():
    case, found = Case(4), []
    for loss in (fresh(margin, "sequence"), fresh(margin, "batch"), margin):
        out, gradients = run(case, loss_type=loss, reference_logps=case.reference, chunk_rows=7)
        found.append((out.loss.detach(), gradients))
        assert out.plan.name == ("sequence_chunks" if len(found) == 1 else "recompute")
    torch.testing.assert_close(found[0], found[1])
    broken = fresh(lambda scores, beta: scores.log_ratios - scores.log_ratios.mean(), "sequence")
    for how in ("auto", "logits"):
        refuses(ValueError, "declares unit='sequence'", "depends on other sequences", call=lambda h=how: run(
            case, h, loss_type=broken, reference_logps=0.0))  # fmt: skip
    refuses(ValueError, "unit 'pair'", "'sequence', 'batch'", call=lambda: run(
        case, loss_type=fresh(margin, "pair"), reference_logps=0.0))  # fmt: skip
    refuses(ValueError, "one loss per sequence", r"\(5,\)", r"\(\)", call=lambda: run(
        case, loss_type=lambda scores: scores.logps.sum(), reference_logps=0.0))  # fmt: skip


def test_wrong_arguments():
    case = Case(5)
    good = {"reference_logps": case.reference, "kl": 0.1}
    logps = torch.zeros(3)
    wrong = [
        ({"desirable": DESIRABLE.float()}, TypeError, ["desirable", "bool", "float32"]),
        ({"desirable": DESIRABLE[:3]}, ValueError, ["desirable", r"\(5,\)", r"\(3,\)"]),
        ({"reference_logps": None}, ValueError, ["no reference", "reference_logps"]),
        ({"reference_logps": case.reference[:2]}, ValueError, ["reference_logps", r"\(5, 6\)"]),
        ({"model": True}, ValueError, ["reference_logps", "not both"]),
        ({"kl": None}, ValueError, ["'kto'", "kl_logps"]),
        ({"kl": -0.1}, ValueError, ["kl", "0 or more"]),
        ({"kl": "0.1"}, ValueError, ["kl", "finite number"]),
        ({"kl_logps": logps, "kl_reference_logps": logps}, ValueError, ["kl", "not both"]),
        ({"kl": None, "kl_logps": logps}, ValueError, ["kl_reference_logps", "together"]),
        (
            {"kl": None, "kl_logps": logps, "kl_reference_logps": logps[:2]},
            ValueError,
            ["kl_reference_logps", r"\(3,\)"],
        ),
        ({"loss_type": "apo_zero_unpaired"}, ValueError, ["apo_zero_unpaired", "reads no kl"]),
        ({"loss_type": "sigmoid"}, ValueError, ["'sigmoid'", "kto", "fused_token_dpo"]),
        ({"loss_kwargs": {"gamma": 1}}, ValueError, ["gamma", "desirable_weight"]),
        ({"loss_kwargs": {"desirable_weight": -1.0}}, ValueError, ["desirable_weight", "0 or more"]),
        ({"beta": 0.0}, ValueError, ["beta", "above 0"]),
        ({"reduction": "items"}, ValueError, ["reduction", "'mean'"]),
    ]
    for options, error, words in wrong:
        for how in ("auto", "logits"):
            refuses(error, *words, call=lambda o=options, h=how: run(case, h, **{**good, **o}))
    rows = (case.hidden, case.weight, case.labels, DESIRABLE)
    refuses(TypeError, "no argument", "gamma", call=lambda: plan_linear_sequences(*rows, gamma=1, **good))


def test_plans_are_told():
    case = Case(6)
    rows = [x.to("meta") for x in (case.hidden, case.weight, case.labels)]
    rows[0].requires_grad_()
    given = {"reference_logps": 0.0, "kl": 0.1}
    desirable = DESIRABLE.to("meta")
    assert plan_linear_sequences(*rows, desirable, **given).products == 2
    rows[1].requires_grad_()
    plan = plan_linear_sequences(*rows, desirable, **given)
    assert (plan.name, plan.products) == ("sequence_chunks", 3)
    small = plan_linear_sequences(*rows, desirable, max_chunk_bytes=2 * V * 8, **given)
    assert small.name == "recompute" and "largest sequence has 6 valid rows and a chunk holds 2" in small.reason
