"""Every objective as a function of `PairScores`, without logits: values and slopes against the oracle's formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from assertions import FLOAT64, assert_within
from cases import generator
from mutations import SLIGHTLY
from oracle import Options
from qkernels import PairScores, objectives

PAIRS = 5
FIELDS = ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps", "chosen_kl",
          "rejected_kl")  # fmt: skip
# Each objective with a label smoothing under which it has a meaning.
SMOOTHING = {"robust": 0.2, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
SCORED = [
    name for name, objective in objectives.OBJECTIVES.items() if objective.scored and not objective.reference_free
]
DIVERGENCES = [("forward_kl", 0.5), ("js", 0.5), ("js_divergence", 0.5), ("alpha", 0.3), ("alpha_divergence", 2.0)]


def options_of(name: str, **more) -> Options:
    return Options(**{"beta": 0.3, "label_smoothing": SMOOTHING.get(name, 0.0), **more})


COUNTS = (torch.tensor([3.0, 1.0, 4.5, 0.0, 7.0], dtype=torch.float64),
          torch.tensor([2.0, 6.0, 0.0, 1.0, 2.5], dtype=torch.float64))  # fmt: skip


def leaves(key: int, scale: float, probabilities: bool = False) -> dict[str, Tensor]:
    """Float64 sums over sequences, by field: 0 for the sequences without tokens, the KLs above 0.

    probabilities: log-probs below 0, for an objective that reads 1 - p.
    """
    g = generator(key)
    values = {name: scale * (torch.randn(PAIRS, generator=g, dtype=torch.float64) - 2) for name in FIELDS}
    values["chosen_kl"], values["rejected_kl"] = values["chosen_kl"].abs(), values["rejected_kl"].abs()
    if probabilities:
        values |= {name: -values[name].abs() for name in FIELDS[:4]}
    return {name: value.requires_grad_() for name, value in values.items()}


def of_sequences(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums, which are 0 where a sequence has no tokens."""
    return {name: value * (COUNTS["rejected" in name] > 0) for name, value in given.items()}


def ours(name: str, given: dict[str, Tensor], options: Options) -> Tensor:
    """The loss of each pair by the package's formula, its options found by `resolve`."""
    kwargs = {key: getattr(options, key) for key in objectives.OBJECTIVES[name].options}
    if name in ("cpo", "alphapo"):  # whose alpha is not TDPO's
        kwargs = {k: v for k, v in kwargs.items() if k != "alpha"} | (
            {} if options.power is None else {"alpha": options.power}
        )
    if objectives.OBJECTIVES[name].scored:
        kwargs |= {"f_divergence": options.f_divergence}
        if options.f_divergence.startswith("alpha"):
            kwargs |= {"f_alpha_divergence_coef": options.f_alpha_divergence_coef}
    given = of_sequences(given)
    spec = objectives.resolve(name, None, options.label_smoothing, kwargs)
    scores = PairScores(
        given["chosen_logps"] - given["reference_chosen_logps"],
        given["rejected_logps"] - given["reference_rejected_logps"],
        *(given[field] for field in FIELDS[:4]), *COUNTS, given["chosen_kl"], given["rejected_kl"],
        f_divergence=spec.f_divergence, f_alpha_divergence_coef=spec.f_alpha_divergence_coef,
    )  # fmt: skip
    return spec.losses(scores, options.beta)


def truth(name: str, given: dict[str, Tensor], options: Options) -> Tensor:
    """The same by the oracle's."""
    w, l, rw, rl, kw, kl = (of_sequences(given)[field].unbind() for field in FIELDS)  # noqa: E741
    batch = [
        oracle.Pair(
            w[i] - rw[i],
            l[i] - rl[i],
            w[i],
            l[i],
            rw[i],
            rl[i],
            COUNTS[0][i].item(),
            COUNTS[1][i].item(),
            kw[i],
            kl[i],
            full_logp_w=w[i],
        )
        for i in range(PAIRS)
    ]
    return oracle.objective(name, batch, options)


def check(name: str, options: Options, formula=ours, scale: float = 2.0) -> None:
    """Losses of all pairs, and their slopes in every field, weighted differently for each pair."""
    upstream = torch.linspace(-1, 2, PAIRS, dtype=torch.float64)
    found = []
    for compute in (formula, truth):
        given = leaves(len(name), scale, probabilities=name == "orpo")
        losses = compute(name, given, options)
        slopes = torch.autograd.grad(losses, list(given.values()), upstream, allow_unused=True)
        found.append((losses, [torch.zeros(PAIRS) if slope is None else slope for slope in slopes]))
    (losses, slopes), (expected, expected_slopes) = found
    # A few hundred roundings of float64; where exp is taken, of numbers up to e^20.
    assert_within(losses, expected, 100 * FLOAT64 * (1 + expected.detach().abs()), f"{name}: loss")
    for field, slope, exact in zip(FIELDS, slopes, expected_slopes, strict=True):
        assert_within(slope, exact, 100 * FLOAT64 * (1 + exact.abs()), f"{name}: slope in {field}")


@pytest.mark.quick
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize("beta", [0.01, 0.3, 2.0])
def test_formula(name, beta):
    check(name, options_of(name, beta=beta))


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name, term in objectives.OBJECTIVES.items() if term.smoothing])
@pytest.mark.parametrize("label_smoothing", [0.01, 0.3])
def test_label_smoothing(name, label_smoothing):
    check(name, options_of(name, label_smoothing=label_smoothing))


@pytest.mark.quick
@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("divergence, coefficient", DIVERGENCES)
def test_f_divergence(name, divergence, coefficient):
    smoothing = 0.1 if objectives.OBJECTIVES[name].smoothing else 0.0
    how = {"f_divergence": divergence, "f_alpha_divergence_coef": coefficient, "label_smoothing": smoothing}
    check(name, options_of(name, **how), scale=0.5)  # an f-divergence takes exp of a log-ratio, DiscoPOP exp of that


@pytest.mark.quick
@pytest.mark.parametrize("name", ["discopop", "tdpo2", "simpo", "alphapo"])
def test_own_options(name):
    check(name, options_of(name, discopop_tau=0.7, alpha=0.1, gamma=1.2, power=0.6))


@pytest.mark.quick
@pytest.mark.parametrize("power", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("form", ["sigmoid", "hinge", "ipo", "simpo"])
def test_forms_of_cpo(form, power):
    smoothing = 0.1 if form in ("sigmoid", "simpo") else 0.0
    how = {"form": form, "power": power, "cpo_alpha": 0.7, "simpo_gamma": 1.1, "label_smoothing": smoothing}
    check("cpo", options_of("cpo", **how), scale=0.5)


@pytest.mark.quick
def test_ipo_of_sums():
    check("ipo", options_of("ipo", length_normalised=False))
    with pytest.raises(AssertionError):
        check(
            "ipo", options_of("ipo", length_normalised=False), lambda *args: ours(args[0], args[1], options_of("ipo"))
        )


def test_cpo_refuses_an_unknown_form():
    with pytest.raises(ValueError, match=r"'form'.*'simpo'.*'kto_pair'"):
        ours("cpo", leaves(0, 1.0), options_of("cpo", form="kto_pair"))


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_one_percent_is_seen(name):
    """In the value with the right slope, and in the slope with the right value."""
    options = options_of(name)
    check(name, options)
    for perturb in (lambda loss: loss + 0.01 * loss.detach(), lambda loss: loss * SLIGHTLY - 0.01 * loss.detach()):
        with pytest.raises(AssertionError):
            check(name, options, lambda *args, perturb=perturb: perturb(ours(*args)))
