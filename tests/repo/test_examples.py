"""The experiments and the decoding benchmark at their smallest size: they run, and what they write adds up."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from qkernels.demo import synthetic

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import an example as running it would."""
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are not here")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("common", "credit", "beam", "decline")
    yield lambda name: __import__(name)
    for name in names:
        sys.modules.pop(name, None)


def run(module, folder: Path, capsys) -> dict:
    module.main(["--tiny", "--out", str(folder)])
    name = module.__name__
    document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert document["paragraph"] in capsys.readouterr().out
    assert document["command"] == f"python examples/{name}.py --seed 0 --tiny"
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return document["results"]


def test_credit(example, tmp_path, capsys):
    results = run(example("credit"), tmp_path, capsys)
    scores = results["scores"]
    assert len(scores) == 6 and set(scores["token reward"]) == {"fp32", "bf16"}
    assert all(0 <= row[kind]["auroc"] <= 1 for row in scores.values() for kind in row)
    assert results["course"][-1]["fp32"]["auroc"] == pytest.approx(scores["token reward"]["fp32"]["auroc"], abs=1e-6)


def test_credit_data_has_errors_that_training_has_not(example):
    """The held-out errors are in the base texts and not in the preferences; the name at the end is no error."""
    module = example("credit")
    from qkernels.demo.options import DemoOptions

    texts = module.misconceptions(DemoOptions(Path("out"), tiny=True).base_sizes(), 0)

    def planted(pairs):
        return {(p.prompt[0].content.partition(".")[0], p.rejected[a:b]) for p in pairs for a, b in p.planted}

    def values(pairs):
        return {p.rejected[a:b] for p in pairs for a, b in p.planted}

    assert values(texts.held_out) and not planted(texts.held_out) & planted(texts.train)
    for pair in texts.train:
        assert pair.chosen != pair.rejected and pair.chosen.split()[-1] == pair.rejected.split()[-1]
    for pair in texts.base:
        assert not any(pair.chosen == other.chosen for other in texts.train)
    again = module.misconceptions(DemoOptions(Path("out"), tiny=True).base_sizes(), 0)
    assert again == texts


def test_beam(example, tmp_path, capsys):
    results = run(example("beam"), tmp_path, capsys)
    assert set(results["policies"]) == {"0.02", "0.1"}
    for policy in results["policies"].values():
        assert set(policy["widths"]) == {"1", "3"}
        assert policy["widths"]["3"]["logp"] >= policy["widths"]["1"]["logp"] - 1e-3
    assert "implicit_reward" not in results["reference"]["width 1"]


def test_the_checker_knows_right_from_wrong(example):
    checker = example("beam").Checker()
    judge = checker.judge
    assert judge("Peru", "Its capital is Lima. Peru lies in South America.") == (2, 0, 2)
    assert judge("Peru", "Its capital is Oslo. Peru lies in South America.") == (1, 0, 2)
    assert judge("Peru", "Its capital is Lima. The capital of Peru is Lima.") == (1, 1, 2), "said twice"
    assert judge("Peru", "The capital of Chile is Santiago.") == (0, 0, 1), "about another country"
    assert judge("Peru", "Its capital is Atlantis. Hello. Its capital is Li") == (0, 1, 3)
    assert judge("Peru", "") == (0, 0, 0) and judge("Peru", "").score == 0.0
    assert judge("Peru", "Its capital is Lima. Hello.").score == 0.5
    for country, facts in list(synthetic.facts().items())[:5]:
        for kind, forms in synthetic.SENTENCES.items():
            for form in forms:
                assert judge(country, form.format(country=country, value=facts[kind])) == (1, 0, 1)
                for wrong in synthetic.wrong_values(country, kind, checker.world)[:3]:
                    assert judge(country, form.format(country=country, value=wrong)) == (0, 0, 1)


def test_decline(example, tmp_path, capsys):
    results = run(example("decline"), tmp_path, capsys)
    worst = results["largest_difference_eq_16"]
    assert worst["float64"] < 1e-5 and worst["bfloat16"] < 1e-3
    for name in ("SFT first", "no SFT"):
        assert len(results["runs"][name]["held_out"]) == 3
        checks = results["runs"][name]["equation_16"][0]
        assert checks[0]["float64"]["expectation"] == 0 and checks[-1]["float64"]["expectation"] < 0
        assert not any("reference_mismatch" in finding for run in results["runs"][name]["findings"] for finding in run)


def test_equation_16_fails_when_it_should(example, monkeypatch):
    """The check has teeth: a KL that is one percent off is seen."""
    module = example("decline")
    from qkernels.demo.encode import EncodedPair
    from toy_models import llama

    pairs = [EncodedPair([3, 4], [5, 6, 1], [7, 1], [False, False], 0)]
    policy, reference = llama(1), llama(2)
    error, expectation, bound = module.equation_16(policy, reference, pairs, torch.float64)
    assert error < 1e-10 and expectation == pytest.approx(bound) and expectation < -0.05
    plain = module.token_stats

    def wrong(*args, **kwargs):
        stats = plain(*args, **kwargs)
        return stats._replace(kl_reference_policy=1.01 * stats.kl_reference_policy)

    monkeypatch.setattr(module, "token_stats", wrong)
    assert module.equation_16(policy, reference, pairs, torch.float64)[0] > 1e-3


def test_published_results_meet_the_requirement():
    """What docs/results.md says of credit assignment is in its file."""
    path = EXAMPLES.parent / "docs/results/credit.json"
    if not path.exists():
        pytest.skip("the results are not here")
    scores = json.loads(path.read_text(encoding="utf-8"))["results"]["scores"]
    best = scores.pop("token reward")["fp32"]["auroc"]
    assert best >= 0.95 and all(best > row["fp32"]["auroc"] for row in scores.values())


@pytest.mark.parametrize("name", ["credit", "beam", "decline"])
def test_published_figures_are_those_of_the_files(name):
    """Every decimal and percentage that docs/results.md gives of an experiment is some number of its file."""
    docs = EXAMPLES.parent / "docs"
    if not (docs / f"results/{name}.json").exists():
        pytest.skip("the results are not here")
    text = (docs / "results.md").read_text(encoding="utf-8")
    (section,) = [part for part in text.split("\n## ") if f"examples/{name}.py" in part]
    results = json.loads((docs / f"results/{name}.json").read_text(encoding="utf-8"))["results"]

    def numbers(value) -> list[float]:
        if isinstance(value, dict):
            betas = [float(key) for key in value if re.fullmatch(r"0\.\d+", key)]
            return betas + numbers(list(value.values()))
        if isinstance(value, list):
            return [number for inner in value for number in numbers(inner)]
        return [abs(value), 100 * abs(value)] if isinstance(value, float) else []

    known = numbers(results)
    said = re.findall(r"\d+\.\d+|\d+(?= %)", section)
    assert len(said) > 8
    for digits in said:
        half = 0.5000001 * 10.0 ** -len(digits.partition(".")[2])
        assert any(abs(number - float(digits)) <= half for number in known), digits


def test_decoding_benchmark(capsys):
    decoding = pytest.importorskip("bench.decoding", reason="the benchmarks are not here")
    decoding.main(["--batch", "2", "--prompt", "8", "--new", "3", "--beams", "2", "--vocab", "50", "--hidden", "16",
                   "--layers", "2", "--rounds", "1"])  # fmt: skip
    out = capsys.readouterr().out
    assert "| generate | " in out and "CopyMixture" in out
