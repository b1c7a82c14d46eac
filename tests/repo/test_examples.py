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
    names = ("common", "credit", "beam", "decline", "pretrained", "make_pretrained", "single_index", "search", "qstar",
             "copying", "self_improve")  # fmt: skip
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


@pytest.mark.nightly
def test_decline(example, tmp_path, capsys):
    results = run(example("decline"), tmp_path, capsys)
    worst = results["largest_difference_eq_16"]
    assert worst["float64"] < 1e-5 and worst["bfloat16"] < 1e-3
    for name in ("SFT first", "no SFT"):
        assert len(results["runs"][name]["held_out"]) == 3
        checks = results["runs"][name]["equation_16"][0]
        assert checks[0]["float64"]["expectation"] == 0 and checks[-1]["float64"]["expectation"] < 0
        assert not any("reference_mismatch" in finding for run in results["runs"][name]["findings"] for finding in run)


def test_dpo_learns_q(example):
    """On the expected preferences of a known reward the trained policy *is* the solved one: advantages, implicit
    rewards r + V' - V and Q up to shaping; on a hundred thousand drawn pairs it is close, on a thousand less so."""
    from qkernels.tabular import random_mdp

    module = example("qstar")
    mdp = random_mdp(3, 2, 0.5, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    errors = []
    for pairs, error, correlation in ((None, 1e-3, 0.999999), (100_000, 0.1, 0.98), (1_000, 10.0, 0.0)):
        found = module.quantities(mdp, module.learn(mdp, module.preferences(mdp, pairs, generator), 40))
        assert set(found) == {"advantage", "implicit reward", "Q up to shaping"}
        for learnt, true in found.values():
            compared = module.compare(learnt, true, module.visits(mdp))
            assert compared["error"] < error and compared["correlation"] > correlation
        errors.append(compared["error"])
    assert errors == sorted(errors)
    learnt, true = found["advantage"]
    perturbed = module.compare([1.01 * table for table in true], true, module.visits(mdp))
    assert perturbed["error"] > 5e-3, "one percent would be seen"


@pytest.mark.nightly
def test_qstar(example, tmp_path, capsys):
    results = run(example("qstar"), tmp_path, capsys)
    assert list(results["sizes"]) == ["1000", "10000"] and results["states"] == 21
    for row in results["sizes"].values():
        assert all(len(value["correlation"]) == 2 and value["mean_error"] > 0 for value in row.values())


@pytest.mark.nightly
def test_search(example, tmp_path, capsys):
    results = run(example("search"), tmp_path, capsys)
    assert list(results["widths"]) == ["1", "2"] and results["prompts"] == 4
    for row in results["widths"].values():
        assert row["forwards_of_the_tree"] <= row["forwards_of_the_beam"] + 4
    assert results["widths"]["1"]["tree"]["logp"] >= results["widths"]["1"]["beam"]["logp"] - 1e-3


@pytest.mark.nightly
def test_single_index(example, tmp_path, capsys):
    results = run(example("single_index"), tmp_path, capsys)
    assert set(results["shifts"]) == {"0", "1.5"} and results["seeds"] == 2
    for rows in results["shifts"].values():
        assert set(rows) == {"sigmoid", "rspo", "pspo", "pspo, memory", "ospo"}
        assert all(row["reward"] > 0.2 and row["flipped"] == 0 for row in rows.values())


def test_single_index_meets_the_budget(example):
    """A policy that is the teacher has the largest reward at every divergence, and the interpolation is between two."""
    module = example("single_index")
    torch.manual_seed(0)
    teacher, other = module.network(), module.network()
    data = module.draw(teacher, 50, 1.5, 0)
    best, worse = (module.frontier(policy, teacher, data, 1.0) for policy in (teacher, other))
    assert module.at_budget(*best, 0.2) > module.at_budget(*worse, 0.2)
    for divergences, values in (best, worse):
        low = max(i for i, kl in enumerate(divergences) if kl >= 0.01)
        assert min(values) <= module.at_budget(divergences, values, divergences[low]) <= max(values)
        assert module.at_budget(divergences, values, divergences[low]) == pytest.approx(values[low], rel=1e-6)
    reversed_ = module.frontier(other, teacher, data, -1.0)
    assert reversed_[0] != worse[0], "the sign matters"
    assert module.margins(teacher, data).mean() > 0, "the teacher prefers what has won"


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


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a model, and a file of pairs: what --model and --pairs take."""
    import tiny_models

    folder = tmp_path_factory.mktemp("pretrained")
    pairs = synthetic.generate(30, 1, 0).train
    texts = [text for pair in pairs for text in (pair.prompt[0].content, pair.chosen, pair.rejected)]
    tokenizer = tiny_models.tokenizer(texts)
    tiny_models.llama(len(tokenizer)).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    rows = [{"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def run_pretrained(module, pretrained: Path, folder: Path, *, pairs: bool = True) -> dict:
    arguments = ["--tiny", "--out", str(folder), "--model", str(pretrained / "small")]
    module.main([*arguments, *(["--pairs", str(pretrained / "pairs.json")] if pairs else [])])
    name = f"{module.__name__}-small"
    document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert document["command"].startswith(f"python examples/{module.__name__}.py --seed 0 --model small")
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return document["results"]


@pytest.mark.nightly
def test_experiments_on_a_pretrained_model(example, pretrained, tmp_path):
    """All three; a second run trains nothing again."""
    pytest.importorskip("trl")
    credit, decline, beam = (example(name) for name in ("credit", "decline", "beam"))
    results = run_pretrained(credit, pretrained, tmp_path)
    assert len(results["scores"]) == 6 and len(results["real_spans"]) == 2
    for row in results["scores"].values():
        assert row["auroc_interval"]["low"] <= row["auroc"] <= row["auroc_interval"]["high"]
    trainings = tmp_path / "small-trainings"
    made = {path: path.stat().st_mtime_ns for path in trainings.rglob("*.safetensors")}
    assert len(made) == 2 and run_pretrained(credit, pretrained, tmp_path) == results
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    falls = run_pretrained(decline, pretrained, tmp_path)
    assert falls["largest_difference_eq_16"] < 1e-4
    for run in falls["runs"].values():
        assert [point["step"] for point in run["held_out"]] == [0, 1, 2]
        assert run["held_out"][0]["margin"] == pytest.approx(0, abs=1e-5)
        assert run["held_out"][-1]["expectation"] <= 0
    found = run_pretrained(beam, pretrained, tmp_path, pairs=False)
    sampled = {"sampled", "best of 2 by logp", "best of 2 by reward"}
    assert set(found["all"]["policy"]) == {"1 beams", "3 beams", "tree search", *sampled}
    assert set(found["all"]["reference"]) == {"1 beams", *sampled}
    assert found["all"]["reference"]["1 beams"]["win_rate"]["mean"] == 0.5, "against itself"


def test_an_interrupted_training_goes_on_to_the_same_weights(example, pretrained, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from safetensors.torch import load_file

    common, module = example("common"), example("pretrained")
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    pairs = synthetic.generate(6, 1, 0).train
    size = module.Training(3, 2, 1e-2, 1)

    def train(out: str, evaluate=lambda policy, step: step) -> tuple[dict, list]:
        arguments = ["--out", str(tmp_path / out), "--model", str(pretrained / "small")]
        study = module.Study(common.options("", arguments, needs_pairs=False), 96)
        name, steps = study.dpo("pairs", pairs, size, None, 0.1, (1, evaluate))
        return load_file(study._weights(name)), steps

    def interrupt(policy, step):
        if step == 2:
            raise KeyboardInterrupt
        return step

    whole, steps = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("parts", interrupt)
    parts, again = train("parts")
    assert steps == again == [0, 1, 2, 3]
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert train("parts", interrupt)[1] == steps, "nothing is trained again"


def test_planted_errors_are_where_they_are_said_to_be(example):
    module = example("pretrained")
    import random

    texts = module.passages(synthetic.generate(20, 1, 0).train, 20, 400)
    pairs = module.plant_errors(random.Random(0), texts)
    assert len(pairs) > 20 and any(len(pair.planted) == 2 for pair in pairs)
    for pair in pairs:
        right = pair.rejected
        assert pair.chosen != pair.rejected
        kept = []
        at = 0
        for start, end in pair.planted:
            kept.append(right[at:start])
            at = end
        kept.append(right[at:])
        assert re.fullmatch(r"(?:[A-Za-z]+|\d+)".join(map(re.escape, kept)), pair.chosen), "the rest is unchanged"
        words = [pair.rejected[a:b] for a, b in pair.planted]
        assert all(re.fullmatch(r"[A-Za-z]{4,}|\d+", word) for word in words)


def test_the_pretrained_experiments_say_what_they_need(example, tmp_path, capsys):
    credit = example("credit")
    for arguments, message in (
        (["--model", str(tmp_path)], "has no config.json"),
        (["--pairs", "pairs.json"], "--model and --pairs go together"),
    ):
        with pytest.raises(SystemExit):
            credit.main(arguments)
        assert message in capsys.readouterr().err


def test_published_results_meet_the_requirement():
    """What docs/results.md says of credit assignment is in its file."""
    path = EXAMPLES.parent / "docs/results/credit.json"
    if not path.exists():
        pytest.skip("the results are not here")
    scores = json.loads(path.read_text(encoding="utf-8"))["results"]["scores"]
    best = scores.pop("token reward")["fp32"]["auroc"]
    assert best >= 0.95 and all(best > row["fp32"]["auroc"] for row in scores.values())


def test_published_qstar_meets_the_requirement():
    path = EXAMPLES.parent / "docs/results/qstar.json"
    if not path.exists():
        pytest.skip("the results are not here")
    sizes = json.loads(path.read_text(encoding="utf-8"))["results"]["sizes"]
    assert sizes[max(sizes, key=int)]["advantage"]["least_correlation"] >= 0.98


@pytest.mark.parametrize(
    "name",
    [
        "credit",
        "beam",
        "decline",
        "credit-smollm2",
        "beam-smollm2",
        "decline-smollm2",
        "self_improve-smollm2",
        "qstar",
        "single_index",
        "search",
    ],
)
def test_published_figures_are_those_of_the_files(name):
    """Every decimal and percentage that docs/results.md gives of an experiment is some number of its file."""
    docs = EXAMPLES.parent / "docs"
    if not (docs / f"results/{name}.json").exists():
        pytest.skip("the results are not here")
    text = (docs / "results.md").read_text(encoding="utf-8")
    script, _, model = name.partition("-")
    command = f"`python examples/{script}.py" + (" --model" if model else "`")
    (section,) = [part for part in text.split("\n## ") if command in part]
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


@pytest.mark.nightly
def test_step_of_a_pretrained_model(pretrained, tmp_path, capsys):
    trl_step = pytest.importorskip("bench.trl_step", reason="the benchmarks are not here")
    pytest.importorskip("trl")
    from bench import trl_real

    model, pairs, out = pretrained / "small", pretrained / "pairs.json", tmp_path / "step.json"
    arguments = ["--model", str(model), "--data", str(pairs), "--rounds", "1", "--clock", "cpu", "--json", str(out)]
    assert trl_step.main(arguments) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [found["dtype"] for found in written] == ["fp32", "bf16"]
    for found in written:
        assert {"TRL", "TRL, patch_trl()", "TokenDPOTrainer"} <= set(found["seconds"])
        assert set(found["seconds"]) | set(found["absent"]) == set(trl_step.with_liger())
        assert found["scored"] < found["tokens"] <= found["positions"] <= 4 * 384
        assert trl_real.table(found) in printed
        (floor,) = found["floor_seconds"]
        assert len(floor) == 4 and all(seconds > 0 for seconds in floor.values())
    with pytest.raises(RuntimeError, match="disagree"):
        trl_real._check_losses({"TRL": 0.69, "other": 0.70}, "fp32")
    with pytest.raises(SystemExit):
        trl_step.main(["--dtype", "bf16"])
    assert "go with --model" in capsys.readouterr().err


@pytest.fixture
def small_model(tmp_path):
    """A folder with a random model and a tokenizer that has a chat template."""
    import tiny_models

    tokenizer = tiny_models.tokenizer(
        ["Answer with just Yes/No, yes, no. What is the capital of France? Paris."] * 3, 500
    )
    tiny_models.llama(len(tokenizer), num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.nightly
def test_copying(example, small_model, capsys):
    example("copying").main(["--model", small_model, "--cases", "2", "--answers", "1", "--new-tokens", "3"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["plain", "calibrated", "largepig", "largepig-normalised"]
    assert " of 2 |" in rows[2] and "4 beams" in lines[-1] and "median ratio" in lines[-1]
    assert any(line.startswith("largepig, log-prob of the right name above plain") for line in lines)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_self_improve(example, small_model, tmp_path, capsys):
    pytest.importorskip("trl")
    example("self_improve").main(
        ["--model", small_model, "--out", str(tmp_path / "out"), "--train", "1", "--held-out", "1", "--samples", "2",
         "--new-tokens", "3", "--epochs", "1"]
    )  # fmt: skip
    assert "Right answers, held out: 0.000 before, 0.000 after" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/self_improve-model.json").read_text())["results"]
    assert results["rounds"][0]["pairs"] == 4 and results["right_difference"]["mean"] == 0
    assert (tmp_path / "out/self_improve-model.png").stat().st_size > 5000


def test_what_counts_as_degenerate_and_right(example):
    copying, improve = example("copying"), example("self_improve")
    assert copying.degenerate([5] * 8) and copying.degenerate([1, 5, 5, 5, 5, 2]) and not copying.degenerate([5, 5, 5])
    assert not copying.degenerate([1, 2, 3, 1, 2, 3])
    assert improve.is_right(("Peru", "capital"), "It is LIMA.") and not improve.is_right(("Peru", "currency"), "Lima")
    assert improve.by_country([("a", "x"), ("a", "y"), ("b", "x")], [1.0, 0.0, 0.25]) == [0.5, 0.25]
    for case in (*copying.CASES, *copying.generated(20)):
        assert case.right in case.text and case.right not in case.question + case.lead, case.question
