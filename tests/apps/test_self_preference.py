"""Pairs that a model makes for itself, and rounds of training on them: what is kept, resumed, refused."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tiny_models
from qkernels.cli import main
from qkernels.data import read_preferences
from qkernels.preference_classifier import PreferenceClassifier
from qkernels.self_preference import Prompt, SelfPreferenceError, build_pairs, improve, read_prompts, rounds, train_dpo

PROMPTS = ["Tell me about Peru.", "Why is the sky blue?", "Say no."]
SAMPLING = {"samples": 3, "temperature": 1.2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer(["Answer with just Yes/No", "Yes yes No no", *PROMPTS] * 3)


@pytest.fixture
def model(tokenizer):
    return tiny_models.llama(len(tokenizer), seed=1)


def length(prompts, responses, categories):
    """A judge that likes long answers."""
    return [float(len(response)) for response in responses]


# --- one round of pairs -----------------------------------------------------------------------------------------------


def test_best_and_worst_make_a_pair(model, tokenizer, tmp_path):
    """By the definition: the model's own samples, its own scores, argmax and argmin; the file is read back."""
    seen = []

    def judge(prompts, responses, categories):
        scores = PreferenceClassifier(model, tokenizer).scores(prompts, responses).tolist()
        seen.append((prompts, responses, scores, categories))
        return scores

    out = tmp_path / "pairs.jsonl"
    shown = io.StringIO()
    model.train()
    prompts = [PROMPTS[0], {"prompt": PROMPTS[1], "category": "chat"}, Prompt(PROMPTS[2])]
    found = build_pairs(model, tokenizer, prompts, judge=judge, out=out, progress=shown, **SAMPLING)
    assert model.training and len(found.records) + found.skipped == len(seen) == 3
    assert [categories[0] for *_, categories in seen] == [None, "chat", None]
    for record, (asked, responses, scores, _) in zip(found.records, seen, strict=True):
        assert record["prompt"] == asked[0] and len(set(responses)) == len(responses) <= 3
        assert record["chosen"] == responses[scores.index(max(scores))] and record["chosen_score"] == max(scores)
        assert record["rejected"] == responses[scores.index(min(scores))] and record["rejected_score"] == min(scores)
    assert found.records[1]["category"] == "chat" and "category" not in found.records[0]
    every = [score for *_, scores, _ in seen for score in scores]
    assert found.mean_score == pytest.approx(sum(every) / len(every))
    assert found.mean_gap == pytest.approx(sum(max(s) - min(s) for *_, s, _ in seen) / 3)
    assert [json.loads(line) for line in out.read_text().splitlines()] == found.records
    pairs = read_preferences(out).pairs
    assert [(pair.prompt[-1].content, pair.chosen, pair.rejected) for pair in pairs] == [
        (record["prompt"], record["chosen"], record["rejected"]) for record in found.records
    ]
    assert "prompts 3/3" in shown.getvalue() and not (tmp_path / "pairs.jsonl.partial").exists()
    own = build_pairs(model, tokenizer, prompts, **SAMPLING)  # the default judge is the model itself
    assert own == found


def test_samples_are_those_of_the_model(model, tokenizer):
    """Ids of the chat template, the model's own distribution, whatever its generation_config says."""
    asked = []
    real = model.generate

    def generate(**given):
        asked.append(given)
        return real(**given)

    model.generate = generate
    model.generation_config.update(top_k=1, repetition_penalty=1.9)
    found = build_pairs(model, tokenizer, PROMPTS[:1], judge=length, **SAMPLING)
    (given,) = asked
    assert tokenizer.decode(given["input_ids"][0]) == "<|user|>Tell me about Peru.<|end|><|assistant|>"
    assert given["temperature"] == 1.2 and given["top_k"] == 0 and given["top_p"] == 1.0
    assert given["top_k"] == 0 and given["num_return_sequences"] == 3
    record = found.records[0]
    assert record["chosen_score"] == len(record["chosen"]) > len(record["rejected"])


def test_the_seed_decides_and_the_global_generator_does_not(model, tokenizer):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING) == first
    assert build_pairs(model, tokenizer, PROMPTS, judge=length, seed=1, **SAMPLING) != first
    alone = build_pairs(model, tokenizer, [PROMPTS[0]], judge=length, **SAMPLING)
    assert alone.records == first.records[:1]


def test_a_stopped_run_goes_on(model, tokenizer, tmp_path):
    """Nothing is sampled twice, a line that was cut off is made again, and the result is that of one run."""
    whole = build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING)
    out, calls = tmp_path / "pairs.jsonl", []

    def stopping(prompts, responses, categories):
        calls.append(prompts[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return length(prompts, responses, categories)

    with pytest.raises(KeyboardInterrupt):
        build_pairs(model, tokenizer, PROMPTS, judge=stopping, out=out, **SAMPLING)
    partial = tmp_path / "pairs.jsonl.partial"
    assert not out.exists() and len(partial.read_text().splitlines()) == 3
    partial.write_text(partial.read_text() + '{"scores": [1.0')
    with pytest.raises(SelfPreferenceError, match=r"go on with it \(resume=True"):
        build_pairs(model, tokenizer, PROMPTS, judge=length, out=out, **SAMPLING)
    with pytest.raises(
        SelfPreferenceError, match=r"other settings: min_gap \(then 0.0, now 0.5\), seed \(then 0, now 3"
    ):
        build_pairs(model, tokenizer, PROMPTS, judge=length, out=out, resume=True, seed=3, min_gap=0.5, **SAMPLING)
    assert len(partial.read_text().splitlines()) == 4
    found = build_pairs(model, tokenizer, PROMPTS, judge=stopping, out=out, resume=True, **SAMPLING)
    assert found == whole and calls == [*PROMPTS, PROMPTS[2]] and not partial.exists()


def test_what_gives_no_pair(model, tokenizer):
    """A gap that is too small, equal answers, blank ones."""
    some = build_pairs(model, tokenizer, PROMPTS, judge=lambda p, r, c: [float(p[0] == PROMPTS[0]) * i for i in
                       range(len(r))], min_gap=0.5, **SAMPLING)  # fmt: skip
    assert [record["prompt"] for record in some.records] == PROMPTS[:1] and some.skipped == 2
    with pytest.raises(SelfPreferenceError, match=r"none of 3 prompts .* min_gap=0.0 \(the largest difference is 0\)"):
        build_pairs(model, tokenizer, PROMPTS, judge=lambda p, r, c: [0.5] * len(r), **SAMPLING)
    model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.full((len(input_ids), 1), 1)], 1).repeat(3, 1)
    with pytest.raises(SelfPreferenceError, match="none of 3 prompts gave two different answers: raise temperature"):
        build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING)


def test_errors_of_pairs(model, tokenizer, tmp_path):
    for given, error, message in (
        ({"prompts": "Why?"}, TypeError, "got one string"),
        ({"prompts": []}, SelfPreferenceError, "at least one prompt"),
        ({"prompts": ["a", {"text": "b"}]}, SelfPreferenceError, "prompt 1: expected a text"),
        ({"prompts": [" "]}, SelfPreferenceError, "prompt 0"),
        ({"samples": 1}, ValueError, "samples must be at least 2"),
        ({"samples": 2.0}, TypeError, "samples must be an int"),
        ({"temperature": 0}, ValueError, "temperature must be above 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"min_gap": -1}, ValueError, "min_gap must be at least 0"),
        ({"min_gap": float("nan")}, ValueError, "min_gap"),
        ({"seed": -1}, ValueError, "seed"),
        ({"judge": "me"}, TypeError, "judge must be a PreferenceClassifier or a function"),
        ({"judge": lambda p, r, c: [1.0]}, SelfPreferenceError, "judge must return"),
        ({"prompts": ["word " * 600]}, SelfPreferenceError, r"has \d+ tokens, which with max_new_tokens=6 .* shorten"),
        ({"max_new_tokens": 510}, SelfPreferenceError, "or lower max_new_tokens"),
    ):
        with pytest.raises(error, match=message):
            build_pairs(
                **{"model": model, "tokenizer": tokenizer, "prompts": PROMPTS, "judge": length, **SAMPLING, **given}
            )
    published = PreferenceClassifier.published(model, tokenizer)
    with pytest.raises(SelfPreferenceError, match="prompt 1: category must be one of 'chat'"):
        build_pairs(model, tokenizer, [{"prompt": "a", "category": "math"}, "b"], judge=published, **SAMPLING)
    other = tiny_models.tokenizer(["nothing of the kind"] * 3, 300)
    with pytest.raises(ValueError, match=r"yes: none of 'Yes', .* is a single token of this tokenizer; pass yes="):
        build_pairs(tiny_models.llama(len(other)), other, PROMPTS, **SAMPLING)


def test_prompts_of_a_file(tmp_path):
    for name, text in (
        ("a.txt", "Why?\n\nHow?\n"),
        ("a.jsonl", '"Why?"\n{"instruction": "How?"}\n'),
        ("a.json", '[{"prompt": "Why?", "chosen": "x"}, {"question": "How?"}]'),
    ):
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == [Prompt("Why?"), Prompt("How?")]
    (tmp_path / "a.jsonl").write_text('{"prompt": "Why?", "category": "math"}')
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt("Why?", "math")]
    for name, text, message in (
        ("b.json", "{}", "expected an array"),
        ("b.json", "[", "not valid JSON"),
        ("b.jsonl", '{"x": 1}', "prompt 0: expected a text"),
        ("b.txt", "", "at least one prompt"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(SelfPreferenceError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(SelfPreferenceError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


# --- rounds -----------------------------------------------------------------------------------------------------------


def shifting(model, tokenizer, records, seed):
    """A training of no meaning that depends on all that it is given."""
    with torch.no_grad():
        model.lm_head.weight += 0.01 * (len(records[0]["chosen"]) + seed)
    return model


def test_rounds_go_on_where_they_stopped(model, tokenizer, tmp_path):
    """Stopped in the second round's training, resumed by another process: the models and pairs of one run."""
    start = copy.deepcopy(model)
    options = {"judge": lambda m, t: length, "seed": 4, **SAMPLING}
    whole = improve(copy.deepcopy(start), tokenizer, PROMPTS, tmp_path / "whole", rounds=3, trainer=shifting, **options)
    assert [row.number for row in whole.rounds] == [1, 2, 3]
    seeds, sampled = [], []

    def stopping(model, tokenizer, records, seed):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return shifting(model, tokenizer, records, seed)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        improve(copy.deepcopy(start), tokenizer, PROMPTS, out, rounds=2, trainer=stopping, **options)
    assert (out / "round-1/round.json").exists() and not (out / "round-2/round.json").exists()
    before = (out / "round-1/model/model.safetensors").read_bytes()
    with pytest.raises(SelfPreferenceError, match="holds rounds of an earlier run: go on"):
        improve(copy.deepcopy(start), tokenizer, PROMPTS, out, rounds=2, trainer=stopping, **options)
    for other in ({"samples": 2}, {"beta": 0.5}, {"seed": 5}):
        with pytest.raises(SelfPreferenceError, match=rf"other settings: {next(iter(other))} .*finished rounds stay"):
            improve(
                copy.deepcopy(start), tokenizer, PROMPTS, out, trainer=stopping, resume=True, **{**options, **other}
            )
    with pytest.raises(SelfPreferenceError, match=r"other settings: prompts"):
        improve(copy.deepcopy(start), tokenizer, PROMPTS[:2], out, trainer=stopping, resume=True, **options)

    def counted(model, tokenizer):
        sampled.append(1)
        return length

    found = improve(
        copy.deepcopy(start), tokenizer, PROMPTS, out, rounds=3, trainer=stopping, resume=True,
        **{**options, "judge": counted},
    )  # fmt: skip
    assert seeds == [5, 6, 6, 7] and len(sampled) == 1, "only the third round's pairs were made"
    assert (out / "round-1/model/model.safetensors").read_bytes() == before
    assert found.rounds == whole.rounds
    for one, two in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, two)
    for number in (1, 2, 3):
        pairs = (out / f"round-{number}/pairs.jsonl").read_text()
        assert pairs == (tmp_path / f"whole/round-{number}/pairs.jsonl").read_text()
    again = improve(copy.deepcopy(start), tokenizer, PROMPTS, out, rounds=2, trainer=stopping, resume=True, **options)
    assert len(again.rounds) == 3 and len(seeds) == 4, "nothing is left to do"


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c"])
def test_separators_in_answers_do_not_damage_a_rounds_pairs(tmp_path, separator):
    """What str.splitlines() takes for the end of a line, and JSON does not."""
    record = {"prompt": "p", "chosen": f"one{separator}two", "rejected": "three"}
    figures = {"skipped": {}, "mean_score": 0.5, "mean_gap": 0.1}
    (tmp_path / rounds.PAIRS).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / rounds.FIGURES).write_text(json.dumps(figures), encoding="utf-8")
    assert rounds._finished_pairs(tmp_path).records == [record]


def test_errors_of_rounds(model, tokenizer, tmp_path):
    for given, error, message in (
        ({"rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"beta": 0.0}, ValueError, "beta must be above 0"),
        ({"learning_rate": "x"}, TypeError, "learning_rate must be a number"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"samples": 1}, ValueError, "samples must be at least 2"),
        ({"top_k": 3}, TypeError, "unknown options: top_k"),
    ):
        with pytest.raises(error, match=message):
            improve(model, tokenizer, PROMPTS, tmp_path / "out", trainer=shifting, **given)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(SelfPreferenceError, match="holds other things than rounds"):
        improve(model, tokenizer, PROMPTS, tmp_path / "full", trainer=shifting)
    with pytest.raises(SelfPreferenceError, match="is not a folder"):
        improve(model, tokenizer, PROMPTS, tmp_path / "full/mine.txt", trainer=shifting)


@pytest.mark.filterwarnings("ignore")
def test_training_raises_the_chosen_above_the_rejected(model, tokenizer):
    """With DPO through TRL: the implicit reward margin of the pairs grows from 0, equal seeds give equal weights."""
    pytest.importorskip("trl")
    from qkernels.search import score_completions
    from qkernels.self_preference.pairs import rendered

    records = build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING).records
    start = copy.deepcopy(model)
    shown = io.StringIO()
    options = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 2}
    trained = train_dpo(model, tokenizer, records, 1, progress=shown, **options)
    assert not trained.training and "steps, mean loss 0." in shown.getvalue()
    margins = []
    for record in records:
        prompt = rendered(tokenizer, Prompt(record["prompt"]))
        rewards = []
        for side in ("chosen", "rejected"):
            answer = tokenizer(record[side], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt, *answer]])
            mask = torch.ones(1, len(answer), dtype=torch.bool)
            rewards.append(score_completions(trained, ids, torch.ones_like(ids), mask, reference_model=start).rewards)
        margins.append(float(rewards[0] - rewards[1]))
    assert min(margins) > 0
    again = train_dpo(copy.deepcopy(start), tokenizer, records, 1, **options)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_trained_in_fp32(model, tokenizer, dtype):
    """A step of 1e-6 is less than half a unit in the last place of bf16: nothing would change, in silence."""
    pytest.importorskip("trl")
    records = build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING).records
    start = copy.deepcopy(model).to(dtype)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    trained = train_dpo(start, tokenizer, records, 1, learning_rate=1e-6, epochs=1, batch_size=2)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    moved = [(value - before[name].float()).abs().max().item() for name, value in trained.state_dict().items()]
    assert 0 < max(moved) < 1e-4 and sum(m > 0 for m in moved) > len(moved) / 2


@pytest.mark.filterwarnings("ignore")
def test_16_bit_weights_and_their_reference_agree_before_the_first_step(model, tokenizer, monkeypatch):
    pytest.importorskip("trl")
    seen = []

    class Recorded(rounds.PreferenceTraining):
        def run(self):
            super().run()
            seen.append(self.trainer.state.log_history[0])

    monkeypatch.setattr(rounds, "PreferenceTraining", Recorded)
    records = [{"prompt": "Say no.", "chosen": "Yes yes No", "rejected": "no No Yes yes"}] * 2
    train_dpo(copy.deepcopy(model).bfloat16(), tokenizer, records, learning_rate=1e-30, batch_size=2)
    assert seen[0]["rewards/chosen"] == seen[0]["rewards/rejected"] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_has_the_weights_that_16_bit_ones_became(model, tokenizer, tmp_path):
    """Loaded into 16 bits again, nearly all of what a round has changed would be rounded away."""
    pytest.importorskip("trl")
    given = {"judge": lambda m, t: length, "rounds": 1, "learning_rate": 1e-6, **SAMPLING}
    trained = improve(copy.deepcopy(model).bfloat16(), tokenizer, PROMPTS, tmp_path / "out", **given).model
    resumed = improve(copy.deepcopy(model).bfloat16(), tokenizer, PROMPTS, tmp_path / "out", resume=True, **given).model
    for one, two in zip(trained.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("option", [{"min_p": 0.99}, {"typical_p": 0.01}, {"suppress_tokens": list(range(8, 20))}])
def test_a_models_own_truncation_is_off(model, tokenizer, option):
    expected = build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING)
    for name, value in option.items():
        setattr(model.generation_config, name, value)
    assert build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING) == expected


@pytest.mark.filterwarnings("ignore")
def test_a_round_trains_as_the_command_does(model, tokenizer, tmp_path):
    """`qkernels train` on the same pairs gives the same weights; what cannot be trained is said."""
    pytest.importorskip("trl")
    from safetensors.torch import load_file

    from qkernels.train import run_train

    records = build_pairs(model, tokenizer, PROMPTS, judge=length, **SAMPLING).records
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_train(
        ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out"),
         "--held-out", "0", "--beta", "0.2", "--learning-rate", "1e-2", "--num-train-epochs", "2", "--seed", "3",
         "--per-device-train-batch-size", "2", "--report-to", "none", "--save-strategy", "no"],
        io.StringIO(),
    )  # fmt: skip
    shown = io.StringIO()
    options = {"beta": 0.2, "learning_rate": 1e-2, "epochs": 2, "batch_size": 2}
    trained = train_dpo(copy.deepcopy(model), tokenizer, records, 3, progress=shown, **options)
    expected = load_file(tmp_path / "out/model.safetensors")
    found = {name: value for name, value in trained.state_dict().items() if name in expected}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in found.items())
    assert "training: 4 steps" in shown.getvalue() and "margin" in shown.getvalue()
    with pytest.raises(SelfPreferenceError, match="training diverged: its weights are not finite"):
        train_dpo(copy.deepcopy(model), tokenizer, records, 3, **{**options, "learning_rate": 1e30})


@pytest.mark.filterwarnings("ignore")
def test_the_command(model, tokenizer, tmp_path, capsys):
    pytest.importorskip("trl")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "out"
    arguments = ["self-improve", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"),
                 "--out", str(out), "--samples", "3", "--temperature", "1.2", "--max-new-tokens", "6"]  # fmt: skip
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "mean score" in captured.out and "round 1: prompts 3/3" in captured.err
    assert len(read_preferences(out / "round-1/pairs.jsonl").pairs) >= 1
    assert (out / "round-1/model/config.json").exists() and (out / "round-1/model/tokenizer.json").exists()
    assert main(arguments) == 2 and "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--seed", "1"]) == 2
    assert "other settings: seed (then 0, now 1)" in capsys.readouterr().err
    assert main([*arguments[:2], str(tmp_path / "none"), *arguments[3:]]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([*arguments, "--judge", "me"]) == 2 and "--judge must be one of" in capsys.readouterr().err
    assert (
        main([*arguments, "--resume", "--samples", "1"]) == 2
        and "samples must be at least 2" in capsys.readouterr().err
    )
