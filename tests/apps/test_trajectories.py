"""Answers of several turns: only what the assistant said is scored, wherever tool results stand between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import score_runs
import tiny_models
from qkernels.data import Preference, as_preferences
from qkernels.demo.encode import chosen_batch, encode, truncate
from qkernels.score import Encoder, ScoreError, TokenScorer, score_preferences
from qkernels.score.tokens import Answer
from qkernels.text.between import first, interleaved, separated

CALL = {"type": "function", "function": {"name": "look", "arguments": {"place": "Lima"}}}
# Writes tool calls; every turn begins and ends with a mark, and a turn reads the same whatever follows.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Of earlier turns of the assistant, only the first word.
FORGETTING = TEMPLATE.replace(
    "{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split(' ')[0] }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split(' ')[0] }}{% endif %}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def say(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def record(i: int = 0) -> dict:
    shared = [say("user", f"Where is Lima? {i}")]
    return {
        "chosen": [
            *shared,
            say("assistant", "I look.", tool_calls=[CALL]),
            say("tool", "Peru is where Lima lies."),
            say("assistant", "In Peru."),
        ],
        "rejected": [*shared, say("assistant", "In Spain, sure."), say("user", "Sure?"), say("assistant", "Yes.")],
    }


def pair(i: int = 0) -> Preference:
    return as_preferences([record(i)])[0]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [m["content"] for side in record().values() for m in side] + ["CALL look", json.dumps({"place": "Lima"})]
    made = tiny_models.tokenizer(texts)
    made.chat_template = TEMPLATE
    return made


def with_template(tokenizer, template: str):
    tokenizer.chat_template, before = template, tokenizer.chat_template
    return before


def test_only_the_assistants_turns_are_scored(tokenizer) -> None:
    ((chosen, rejected),) = Encoder(tokenizer).pairs({0: pair()})
    tokens, scored = interleaved(chosen.ids, chosen.between)
    whole = "<|user|>Where is Lima? 0<|end|><|assistant|>"
    assert tokenizer.decode(chosen.prompt) == whole
    call = 'I look.CALL look {"place": "Lima"}<|end|>'
    assert tokenizer.decode(tokens) == f"{call}<|tool|>Peru is where Lima lies.<|end|><|assistant|>In Peru.<|end|>"
    assert tokenizer.decode(chosen.ids) == "".join(chosen.texts) == f"{call}In Peru.<|end|>"
    read = [token for token, is_scored in zip(tokens, scored, strict=True) if not is_scored]
    assert tokenizer.decode(read) == "<|tool|>Peru is where Lima lies.<|end|><|assistant|>"
    # Offsets are those in the assistant's words.
    said = pair().chosen
    assert said == "I look.\n\nIn Peru."
    for (start, end), text in zip(chosen.offsets, chosen.texts, strict=True):
        assert start < 0 or said[start:end] == text
    assert "".join(said[a:b] for a, b in chosen.offsets if a >= 0) == "I look.In Peru."
    assert tokenizer.decode(rejected.ids) == "In Spain, sure.<|end|>Yes.<|end|>"
    assert chosen.length == len(chosen.prompt) + len(tokens)


def test_a_template_that_rewrites_earlier_turns_is_refused_or_tells_itself(tokenizer) -> None:
    before = with_template(tokenizer, FORGETTING)
    try:
        with pytest.raises(ScoreError, match=r"pair 0 .*chosen answer: it has several turns.*message 2.*generation %}"):
            Encoder(tokenizer).pairs({0: pair()})
        tokenizer.chat_template = MARKED
        ((_, rejected),) = Encoder(tokenizer).pairs({0: pair()})
        assert tokenizer.decode(rejected.ids) == "In<|end|>Yes.<|end|>"
        assert tokenizer.decode(interleaved(rejected.ids, rejected.between)[0]).endswith(
            "Sure?<|end|><|assistant|>Yes.<|end|>"
        )
    finally:
        tokenizer.chat_template = before
    with pytest.raises(ScoreError, match="with its answer it is a conversation of 3 messages"):
        Encoder(tokenizer, "plain").pairs({0: pair()})


def test_cuts_keep_what_stands_before_what_is_kept(tokenizer) -> None:
    ((whole, _),) = Encoder(tokenizer).pairs({0: pair()})
    room = whole.length - 2
    ((cut, _),) = Encoder(tokenizer, max_length=room).pairs({0: pair()})
    assert cut.ids == whole.ids[:-2] and cut.between == whole.between and cut.cut_answer == 2
    prompt = 3  # a quarter of 12 is kept of the prompt
    ((cut, _),) = Encoder(tokenizer, max_length=12).pairs({0: pair()})
    assert cut.between == () and cut.ids == whole.ids[: 12 - prompt] and cut.length == 12


def test_sequences_come_apart_and_together_again() -> None:
    tokens, scored = [5, 6, 7, 8, 9, 3], [False, True, False, False, True, True]
    ids, between = separated(tokens, scored)
    assert (ids, between) == ([6, 9, 3], ((0, (5,)), (1, (7, 8))))
    assert interleaved(ids, between) == (tokens, scored)
    assert separated([*tokens, 4], [*scored, False]) == (ids, between)  # nothing depends on it
    assert [first(ids, between, room) for room in (0, 1, 2, 4, 5)] == [
        (0, ()), (0, ()), (1, ((0, (5,)),)), (1, ((0, (5,)),)), (2, between),
    ]  # fmt: skip


def test_scores_are_those_of_the_whole_conversation(tokenizer) -> None:
    policy, reference = (tiny_models.llama(len(tokenizer), seed) for seed in (0, 1))
    (answers,) = Encoder(tokenizer).pairs({0: pair()})
    scorer = TokenScorer(policy, reference, beta=0.3)
    scored = dict(scorer.scores([Answer(a.prompt, a.ids, a.between) for a in answers]))
    for i, answer in enumerate(answers):
        tokens, is_scored = interleaved(answer.ids, answer.between)
        ids = torch.tensor([[*answer.prompt, *tokens]])
        with torch.no_grad():
            logps = [
                m(ids).logits[0].log_softmax(-1).gather(1, ids[0].roll(-1)[:, None])[:, 0] for m in (policy, reference)
            ]
        places = [len(answer.prompt) - 1 + at for at, flag in enumerate(is_scored) if flag]
        expected = 0.3 * (logps[0] - logps[1])[places].numpy()
        assert scored[i]["implicit_rewards"] == pytest.approx(expected, abs=1e-5)
        # Q - beta log pi_ref - V of the assistant's next state, over what is said in between.
        rows = scored[i]
        values = [*rows["V"][1:], 0.0]
        bellman = rows["Q"] - 0.3 * rows["reference_logps"] - values
        assert rows["bellman_rewards"] == pytest.approx(bellman, abs=1e-4)
    table = score_preferences(policy, tokenizer, [record()], reference=reference, beta=0.3)
    assert table.select(0, "chosen")["implicit_rewards"] == pytest.approx(scored[0]["implicit_rewards"], abs=1e-5)
    assert table.tokens_in(0, "chosen", [(9, 17)]).count(True) >= 2  # "In Peru." of the joined words


def test_the_command_scores_trajectories_and_leaves_bad_records_out(tokenizer, tmp_path: Path) -> None:
    for seed, name in enumerate(("policy", "reference")):
        tiny_models.llama(len(tokenizer), seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    same = {**record(), "rejected": record()["chosen"]}
    lines = [record(0), same, record(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    usual = ["--model", tmp_path / "policy", "--reference", tmp_path / "reference", "--data", tmp_path / "a.jsonl"]
    status, _, err = score_runs.score(*usual, "--out", tmp_path / "out")
    assert status == 2 and "line 2: expected two different answers" in err
    status, _, err = score_runs.score(*usual, "--out", tmp_path / "out", "--skip-invalid", "--shown", 1)
    assert status == 0 and "left out 1 record: 1 x expected two different answers" in err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["pairs"] == 2 and summary["skipped"] == {"expected two different answers": 1}
    import pyarrow.parquet as pq

    pairs = pq.read_table(tmp_path / "out/pairs.parquet").to_pydict()
    assert pairs["pair"] == [0, 2]  # the numbers of their records
    assert json.loads(pairs["prompt"][1]) == [["user", "Where is Lima? 2"]]
    status, _, err = score_runs.score(*usual, "--out", tmp_path / "out", "--resume")
    assert status == 2 and "line 2" in err
    lines[0] = same
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, _, err = score_runs.score(*usual, "--out", tmp_path / "out", "--resume", "--skip-invalid")
    assert status == 2 and "1 pairs have been scored, and some records of the data are left out now" in err


def test_the_demo_trains_the_assistants_turns_alone() -> None:
    texts = [m["content"] for side in record().values() for m in side]
    tokenizer = tiny_models.tokenizer(texts)
    (encoded,) = encode([pair()], tokenizer)
    tokens, scored = interleaved(encoded.chosen, encoded.chosen_between)
    text = tokenizer.decode([t for t, flag in zip(tokens, scored, strict=True) if not flag])
    assert text == "<|tool|>Peru is where Lima lies.<|end|><|assistant|>"
    batch = chosen_batch([encoded], 0)
    labels = batch.labels[0][batch.labels[0] != -100].tolist()
    assert labels == encoded.chosen
    assert encoded.length == len(encoded.prompt) + max(len(tokens), 1)
    (cut,), counts = truncate([encoded], encoded.length - 1)
    assert counts.answers == 1 and cut.chosen == encoded.chosen[:-1]
