"""`qkernels compare`: an engine's log-probs beside a model's."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from qkernels.cli import main
from qkernels.compare import agreement
from qkernels.compare.rollouts import read_rollouts, same_tokens
from qkernels.data import DataError

pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models

VOCAB = 61


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny_models.llama(VOCAB)
    folder = tmp_path_factory.mktemp("compare") / "model"
    made.save_pretrained(folder)
    return made, folder


def rollouts(model, *, temperature=1.0, rounded=False, sequences=6):
    """Sequences with the log-probs that an engine would give, from the model's own logits."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for n in range(sequences):
        ids = torch.randint(3, VOCAB, (1, 5 + n), generator=generator)
        with torch.no_grad():
            logits = model(ids).logits[0]
        if rounded:
            logits = logits.bfloat16().float()
        logps = (logits.double() / temperature).log_softmax(-1)[2:-1].gather(-1, ids[0, 3:, None])[:, 0]
        records.append(
            {"prompt_token_ids": ids[0, :3].tolist(), "token_ids": ids[0, 3:].tolist(), "logprobs": logps.tolist()}
        )
    return records


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def compare(tmp_path, *arguments):
    out = tmp_path / "out"
    status = main(["compare", "--out", str(out), "--overwrite", *map(str, arguments)])
    return status, json.loads((out / "compare.json").read_text()) if status == 0 else None, out


def test_the_same_numbers_agree(model, tmp_path, capsys):
    engine = write(tmp_path / "engine.jsonl", rollouts(model[0]))
    status, figures, out = compare(tmp_path, "--engine", engine, "--model", model[1], "--batch-tokens", 20)
    assert status == 0
    assert figures["all"]["tokens"] == sum(2 + n for n in range(6)) and figures["all"]["sequences"] == 6
    assert figures["all"]["largest"] < 1e-5  # fp32 log-probs of a few nats
    assert figures["all"]["outside"][0] == 0
    assert "<title>Log-probs beside an engine" in (out / "report.html").read_text()
    assert "mean ratio 1.00000" in capsys.readouterr().out


def test_rounded_logits_are_explained_by_rounding(model, tmp_path):
    engine = write(tmp_path / "engine.jsonl", rollouts(model[0], rounded=True))
    _, figures, _ = compare(tmp_path, "--engine", engine, "--model", model[1])
    seen, explained = figures["all"]["mean_absolute"], figures["rounding"]["mean_absolute"]
    # The model's logits and those of its bf16 weights are rounded at different places: equal in size, not in value.
    assert 1e-4 < seen < 0.1 and 0.3 * seen < explained < 3 * seen


def test_another_temperature_is_seen_and_can_be_told(model, tmp_path):
    engine = write(tmp_path / "engine.jsonl", rollouts(model[0], temperature=0.7))
    _, figures, _ = compare(tmp_path, "--engine", engine, "--model", model[1])
    assert figures["all"]["outside"][0] > 0.3
    assert figures["all"]["k3"][0] > 100 * figures["rounding"]["k3"][0]
    _, figures, _ = compare(tmp_path, "--engine", engine, "--model", model[1], "--temperature", 0.7)
    assert figures["all"]["largest"] < 1e-5


def test_two_files(model, tmp_path):
    records = rollouts(model[0])
    engine = write(tmp_path / "engine.jsonl", records)
    records[3]["logprobs"][1] -= 1.0
    other = write(tmp_path / "other.jsonl", records)
    _, figures, out = compare(tmp_path, "--engine", engine, "--other", other)
    assert figures["rounding"] is None
    assert figures["all"]["largest"] == pytest.approx(1.0)
    assert figures["all"]["k1"][0] == pytest.approx(1 / figures["all"]["tokens"])
    assert "sequence 4, token 2" in (out / "report.html").read_text()


def test_figures_by_their_definitions():
    trainer = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    engine = [torch.tensor([-1.2, -2.0]), torch.tensor([-0.1])]
    found = agreement(trainer, engine)
    log_r = torch.tensor([0.2, 0.0, -0.4], dtype=torch.float64)
    ratio = log_r.exp()
    assert found.ratio.estimate == pytest.approx(float(ratio.mean()), rel=1e-6)
    assert found.k1.estimate == pytest.approx(float(-log_r.mean()), rel=1e-6)
    assert found.k3.estimate == pytest.approx(float((ratio - 1 - log_r).mean()), rel=1e-6)
    assert found.outside.estimate == pytest.approx(2 / 3)
    assert found.effective == pytest.approx(float(ratio.sum() ** 2 / (3 * (ratio**2).sum())), rel=1e-6)
    assert found.ratio.low <= found.ratio.estimate <= found.ratio.high


def test_sequences_without_tokens_are_not_drawn():
    logps = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0]), torch.empty(0)]
    found = agreement(logps, logps)
    assert found.ratio[:3] == (1, 1, 1) and found.sequences == 3


def test_impossible_tokens_leave_the_figures_finite():
    found = agreement([torch.tensor([-math.inf, -1.0])], [torch.tensor([-1.0, -1.0])])
    assert math.isfinite(found.k3.estimate) and found.largest == 20
    with pytest.raises(ValueError, match="the same tokens"):
        agreement([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="no token"):
        agreement([torch.zeros(0)], [torch.zeros(0)])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt_ids": [1, 2], "completion_ids": [3, 4], "logprobs": [-0.5, -1.25]},  # TRL
        {"prompts": [1, 2], "responses": [3, 4], "rollout_log_probs": [-0.5, -1.25]},  # verl
        {"prompt_token_ids": [1, 2],
         "outputs": [{"token_ids": [3, 4], "logprobs": [{"3": {"logprob": -0.5}, "9": {"logprob": -0.1}},
                                                        {"4": {"logprob": -1.25}}]}]},  # vLLM
        {"input_ids": [1, 2], "output_ids": [3, 4],
         "output_token_logprobs": [[-0.5, 3, None], [-1.25, 4, None]]},  # SGLang
    ],
)  # fmt: skip
def test_layouts(record, tmp_path):
    (found,) = read_rollouts(write(tmp_path / "a.jsonl", [record]))
    assert found[:3] == ((1, 2), (3, 4), (-0.5, -1.25))
    for name, write_cell in (("json.csv", json.dumps), ("pandas.csv", str)):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([record, map(write_cell, record.values())])
        (again,) = read_rollouts(tmp_path / name)
        assert again[:3] == found[:3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logprobs": [-0.5]}, "line 1.*1 log-probs in 'logprobs' for 2 generated tokens"),
        ({"logprobs": [0.5, -1]}, r"'logprobs' entry 1 must be a log-prob \(a number up to 0\), got 0.5"),
        ({"token_ids": [3, "x"]}, "'token_ids' must hold token ids, entry 2 is 'x'"),
        ({"token_ids": None, "text": "abc"}, "expected a list 'token_ids' or .*found .*text"),
        ({"token_ids": "3 4"}, "expected a list 'token_ids' or .*found '3 4' in 'token_ids'"),
        ({"token_ids": [], "logprobs": []}, "there is no generated token in it"),
        ({"logprobs": None, "output_token_logprobs": [[-1, 3], [-1, 5]]}, "entry 2 is of token 5, generated was 4"),
    ],
)
def test_records_that_cannot_be_used(change, message, tmp_path):
    record = {"prompt_token_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-0.5, -1.0], **change}
    with pytest.raises(DataError, match=message):
        read_rollouts(write(tmp_path / "a.jsonl", [record]))


def test_the_first_difference_is_named(tmp_path):
    records = [{"prompt_token_ids": [1, 2], "token_ids": [3, n], "logprobs": [-0.5, -1.0]} for n in range(4)]
    one = read_rollouts(write(tmp_path / "a.jsonl", records))
    records[2] = {**records[2], "token_ids": [3, 7]}
    with pytest.raises(DataError, match=r"sequence 3 differs: generated token 2 is 2 against 7 \(.*a.jsonl, line 3"):
        same_tokens(one, read_rollouts(write(tmp_path / "b.jsonl", records)))
    with pytest.raises(DataError, match=r"4 sequences against 2; the first without a partner: .*a.jsonl, line 3"):
        same_tokens(one, one[:2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --model DIR or --other FILE"),
        (["--model", "m", "--other", "o"], "either --model DIR or --other FILE"),
        (["--other", "o", "--temperature", "2"], "--temperature is for --model"),
        (["--model", "m", "--low", "1.5"], "--low and --high must enclose 1"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--model", "nowhere", "--temperature", "inf"], "--temperature must be above 0 and finite, got inf"),
    ],
)
def test_wrong_options(arguments, message, model, tmp_path, capsys):
    engine = write(tmp_path / "engine.jsonl", rollouts(model[0], sequences=1))
    status, _, _ = compare(tmp_path, "--engine", engine, *arguments)
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token_ids": [VOCAB], "logprobs": [-1.0]}, f"token id {VOCAB} is outside of the model's {VOCAB}"),
        ({"prompt_token_ids": [], "token_ids": [], "logprobs": []}, "the prompt has no token"),
        ({"token_ids": [3] * 510, "logprobs": [-1.0] * 510}, "513 tokens, and the model has positions for 512"),
    ],
)
def test_records_that_the_model_cannot_take(change, message, model, tmp_path, capsys):
    records = rollouts(model[0], sequences=2)
    records[1] |= change
    status, _, _ = compare(tmp_path, "--engine", write(tmp_path / "e.jsonl", records), "--model", model[1])
    assert status == 2 and f"e.jsonl, line 2: {message}" in capsys.readouterr().err


def test_only_files_of_a_comparison_are_replaced(model, tmp_path, capsys):
    engine = write(tmp_path / "e.jsonl", rollouts(model[0], sequences=1))
    (tmp_path / "out").mkdir()
    for name in ("compare.json", ".partial-report.html"):  # the second of a run that was killed
        (tmp_path / "out" / name).write_text("half")
    status, _, out = compare(tmp_path, "--engine", engine, "--other", engine)
    assert status == 0 and sorted(path.name for path in out.iterdir()) == ["compare.json", "report.html"]
    (out / "mine.txt").write_text("")
    status, _, _ = compare(tmp_path, "--engine", engine, "--other", engine)
    assert status == 2 and "mine.txt" in capsys.readouterr().err


def test_a_token_that_neither_can_make_is_shown_as_agreement(model, tmp_path):
    records = rollouts(model[0], sequences=1)
    records[0]["logprobs"][0] = -math.inf
    engine = write(tmp_path / "e.jsonl", records)
    _, figures, out = compare(tmp_path, "--engine", engine, "--other", engine)
    assert figures["all"]["largest"] == 0
    assert "<td>−inf</td><td>−inf</td><td>1</td>" in (out / "report.html").read_text()
