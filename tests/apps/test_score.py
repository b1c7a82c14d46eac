"""Scoring preference pairs: every number against plain torch, the command, its folder, interruptions and refusals."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

import numpy as np
import pyarrow.parquet as pq
from torch.utils._python_dispatch import TorchDispatchMode

import hf_models
import qkernels
from processes import Command
from qkernels.cli import main
from qkernels.credit import low_reward_spans
from qkernels.data import DataError, Message, Preference
from qkernels.demo.tokenizer import train_tokenizer
from qkernels.score import (
    Answer,
    Encoder,
    ScoreError,
    ScoreOptions,
    TokenScorer,
    TokenTable,
    read_scores,
    run,
    score_preferences,
    store,
)
from qkernels.text.lengths import batches_by_length, default_batch_tokens
from score_runs import BETA, REAL_PAIRS, ROOT, llama, records, resign, score, started, usual, write_data

# --- the numbers ------------------------------------------------------------------------------------------------------


def by_hand(
    model, reference, tokenizer, record: dict, side: str, columns: int | None = None
) -> dict[str, torch.Tensor]:
    """Every output of one answer, from whole logits in fp64, on the text as the template writes it."""
    prompt = f"<|user|>{record['prompt']}<|end|><|assistant|>"
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + record[side] + "<|end|>")["input_ids"]])
    with torch.no_grad():
        z, z_ref = (m(ids).logits[0, start - 1 : -1, :columns].double() for m in (model, reference))
    return {"ids": ids[0, start:], **by_logits(z, z_ref, ids[0, start:])}


def by_logits(z: torch.Tensor, z_ref: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every output from the rows of both models' logits, fp64."""
    labels = ids[:, None]
    log_p, log_q = z.log_softmax(-1), z_ref.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    lse, lse_ref = z.logsumexp(-1), z_ref.logsumexp(-1)
    logps, reference_logps = (x.gather(1, labels)[:, 0] for x in (log_p, log_q))
    following = torch.cat([lse[1:], torch.zeros(1)])
    return {
        "logps": logps,
        "reference_logps": reference_logps,
        "logsumexp": lse,
        "reference_logsumexp": lse_ref,
        "entropy": -(p * log_p).sum(-1),
        "kl_policy_reference": (p * (log_p - log_q)).sum(-1),
        "kl_reference_policy": (q * (log_q - log_p)).sum(-1),
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "mean_logits": z.mean(-1),
        "is_top1": (z.argmax(-1) == labels[:, 0]).double(),
        "Q": BETA * z.gather(1, labels)[:, 0],
        "V": BETA * lse,
        "A": BETA * logps,
        "implicit_rewards": BETA * (logps - reference_logps),
        "bellman_rewards": BETA * (z.gather(1, labels)[:, 0] - reference_logps - following),
    }


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt2", "phi", "mamba"])
def test_other_heads(family: str) -> None:
    """Softcap, logit scale, no scale, bias, no attention."""
    model, reference = (hf_models.model(family, seed=seed) for seed in (0, 1))
    answers = [Answer([5, 6, 7], [8, 9, 10, 11]), Answer([5], [50, 60]), Answer([7] * 9, [30])]
    for i, found in TokenScorer(model, reference, beta=BETA).scores(answers):
        ids, start = [*answers[i].prompt, *answers[i].ids], len(answers[i].prompt)
        with torch.no_grad():
            z, z_ref = (m(torch.tensor([ids])).logits[0, start - 1 : -1].double() for m in (model, reference))
        for name, expected in by_logits(z, z_ref, torch.tensor(answers[i].ids)).items():
            if name in found:
                assert np.allclose(found[name].astype(float), expected.numpy(), rtol=2e-5, atol=3e-5), name


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_every_output_is_its_definition(models: tuple, batch_tokens: int) -> None:
    data = records(7)
    table = score_preferences(
        models[0], models[2], data, reference=models[1], beta=BETA, outputs=qkernels.score.OUTPUTS,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    assert set(table.outputs) == set(qkernels.score.OUTPUTS)
    assert table.pairs() == list(range(7))
    checked = 0
    for pair, record in enumerate(data):
        for side in ("chosen", "rejected"):
            rows, expected = table.select(pair, side), by_hand(*models, record, side)
            assert rows["token_id"].tolist() == expected.pop("ids").tolist()
            assert rows["position"].tolist() == list(range(len(rows)))
            for name, values in expected.items():
                assert np.allclose(rows[name].astype(float), values.numpy(), rtol=2e-5, atol=2e-5), name
                checked += 1
            # (10) summed: Bellman and implicit rewards differ by the value of the first state.
            difference = (rows["bellman_rewards"] - rows["implicit_rewards"]).sum()
            assert difference == pytest.approx(rows["V"][0], abs=1e-4)
    assert checked == 14 * len(qkernels.score.OUTPUTS)
    assert all(
        column.dtype == np.float32 for name, column in table.columns.items() if name in expected and name != "is_top1"
    )
    assert table["is_top1"].dtype == bool
    rewards = table.pair_rewards()
    chosen, rejected = (by_hand(*models, data[3], side)["implicit_rewards"].sum() for side in ("chosen", "rejected"))
    assert rewards["margins"][3] == pytest.approx(float(chosen - rejected), abs=1e-4)


def test_a_greedy_answer_is_top1_throughout(models: tuple) -> None:
    ids = [7, 8]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(models[0](torch.tensor([ids])).logits[0, -1].argmax()))
    greedy, other = Answer(ids[:2], ids[2:]), Answer(ids[:2], [*ids[2:4], ids[4] ^ 1, *ids[5:]])
    found = dict(TokenScorer(models[0], outputs=["is_top1"]).scores([greedy, other]))
    assert found[0]["is_top1"].tolist() == [True] * 5
    assert found[1]["is_top1"].tolist()[:3] == [True, True, False]


def test_a_policy_that_is_its_reference_has_rewards_of_exactly_0(models: tuple) -> None:
    model, _, tokenizer = models
    table = score_preferences(model, tokenizer, records(3), reference=llama(len(tokenizer), 0))
    assert not table["implicit_rewards"].any() and np.abs(table["kl_policy_reference"]).max() < 1e-6


def test_text_and_places_of_tokens(models: tuple) -> None:
    data = records(4)
    table = score_preferences(models[0], models[2], data, reference=models[1])
    for pair, record in enumerate(data):
        for side in ("chosen", "rejected"):
            rows = table.select(pair, side)
            assert "".join(rows["token"]) == record[side] + "<|end|>"
            assert (rows["start"][-1], rows["end"][-1]) == (-1, -1)
            for text, start, end in zip(rows["token"][:-1], rows["start"], rows["end"], strict=False):
                assert start >= 0 and text in ("", record[side][start:end], " " + record[side][start:end])


def test_only_what_is_asked_for_is_there(models: tuple) -> None:
    table = score_preferences(models[0], models[2], records(2), outputs=("entropy", "V", "A"), beta=BETA)
    assert table.outputs == ("entropy", "V", "A")
    expected = by_hand(*models, records(1)[0], "chosen")
    rows = table.select(0, "chosen")
    for name in table.outputs:
        assert np.allclose(rows[name], expected[name].numpy(), atol=2e-5), name
    assert score_preferences(models[0], models[2], records(1)).outputs == ("logps", "Q", "V", "A", "entropy", "is_top1")


def test_cached_log_probs_stand_in_for_the_reference(models: tuple) -> None:
    live = score_preferences(models[0], models[2], records(5), reference=models[1], beta=BETA)
    cached = score_preferences(models[0], models[2], records(5), reference_logps=live, beta=BETA)
    assert set(live.outputs) - set(cached.outputs) == {"kl_policy_reference", "kl_reference_policy"}
    for name in cached.outputs:
        assert np.array_equal(cached[name], live[name]), name
    with pytest.raises(ValueError, match="kl_policy_reference need a reference model"):
        score_preferences(models[0], models[2], records(5), reference_logps=live, outputs=["kl_policy_reference"])
    with pytest.raises(ScoreError, match=r"pair 5 .record 6 of the data., chosen answer: not among the pairs"):
        score_preferences(models[0], models[2], records(6), reference_logps=live)
    with pytest.raises(ScoreError, match=r"pair 0 .record 1 of the data., chosen answer: its tokens are not those"):
        score_preferences(models[0], models[2], records(5, start=1), reference_logps=live)


def test_an_adapter_is_switched_off_for_the_reference(models: tuple, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, _, tokenizer = models
    policy = peft.get_peft_model(
        llama(len(tokenizer), 0), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=8)
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    table = score_preferences(policy, tokenizer, records(3), reference=policy, beta=BETA)
    expected = by_hand(policy, base, tokenizer, records(3)[2], "rejected")
    for name in table.outputs:
        assert np.allclose(table.select(2, "rejected")[name].astype(float), expected[name].numpy(), atol=3e-5), name
    assert np.abs(table["implicit_rewards"]).max() > 0.01
    # The same from folders: without --reference, an adapter's base is the reference.
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    policy.save_pretrained(tmp_path / "adapter")
    data = write_data(tmp_path / "data.json", records(3))
    status, _, err = score("--model", tmp_path / "adapter", "--data", data, "--out", tmp_path / "out", "--beta", BETA)
    assert status == 0, err
    assert "reference: its adapter switched off" in err
    assert np.array_equal(read_scores(tmp_path / "out")["implicit_rewards"], table["implicit_rewards"])


def test_heads_padded_to_different_widths_are_scored_over_the_common_columns(models: tuple, tmp_path: Path) -> None:
    policy, _, tokenizer = models
    padded = llama(len(tokenizer) + 24, 3)
    table = score_preferences(policy, tokenizer, records(3), reference=padded, beta=BETA)
    expected = by_hand(policy, padded, tokenizer, records(3)[1], "chosen", columns=len(tokenizer))
    for name in table.outputs:
        assert np.allclose(table.select(1, "chosen")[name].astype(float), expected[name].numpy(), atol=3e-5), name
    for name, model in (("policy", policy), ("padded", padded)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    data = write_data(tmp_path / "data.json", records(3))
    status, _, err = score(
        "--model", tmp_path / "policy", "--reference", tmp_path / "padded", "--data", data, "--out", tmp_path / "out"
    )
    assert status == 0, err
    note = f"scored over the first {len(tokenizer)}, which both have"
    assert note in err and note in json.loads((tmp_path / "out/summary.json").read_text())["note"]
    assert note in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    # Columns are missing for tokens there are: that is not padding.
    llama(len(tokenizer) - 3).save_pretrained(tmp_path / "smaller")
    status, _, err = score(
        "--model", tmp_path / "policy", "--reference", tmp_path / "smaller", "--data", data, "--out", tmp_path / "other"
    )
    assert status == 2 and "more than a difference of padding" in err and not (tmp_path / "other").exists()


def test_training_mode_and_gradients_are_left_as_they_were(models: tuple) -> None:
    model = llama(len(models[2]), attention_dropout=0.5)
    model.train()
    first, second = (score_preferences(model, models[2], records(2), reference=models[1]) for _ in range(2))
    assert np.array_equal(first["logps"], second["logps"]), "dropout was on"
    assert model.training and not models[1].training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def test_memory_of_the_head_does_not_grow_with_the_length() -> None:
    vocabulary, largest = 6000, []
    model, reference = (llama(vocabulary, seed) for seed in (0, 1))
    weights = vocabulary * 32
    for length in (60, 240):
        answers = [Answer([1, 2], torch.randint(0, vocabulary, (length,)).tolist())]
        scorer = TokenScorer(model, reference, max_chunk_bytes=40 * vocabulary * 2 * 4)
        with Largest() as seen:
            list(scorer.scores(answers))
        largest.append(seen.elements)
    assert largest[0] == largest[1] == 40 * vocabulary > weights


def test_low_level_answers_are_checked(models: tuple) -> None:
    scorer = TokenScorer(models[0], models[1])
    for answer, message in (
        (Answer([1], []), "answer 0 has no tokens"),
        (Answer([], [1]), "answer 0 has no token before it"),
        (Answer([1], [10**6]), "answer 0 has token 1000000, outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            list(scorer.scores([answer]))
    with pytest.raises(ValueError, match="exactly if the scorer was made with cached=True"):
        list(scorer.scores([Answer([1], [2])], [[0.0]]))
    cached = TokenScorer(models[0], cached=True)
    with pytest.raises(ValueError, match="answer 0 has 1 tokens and 2 reference_logps"):
        list(cached.scores([Answer([1], [2])], [[0.0, 1.0]]))
    with pytest.raises(ValueError, match="has 0 entries for 1 answers"):
        list(cached.scores([Answer([1], [2])], []))
    for arguments, message in (
        ({"beta": 0.0}, "beta"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more"),
        ({"outputs": ["logp"]}, "outputs must be names out of"),
        ({"outputs": []}, "outputs must be names out of"),
        ({"outputs": ["entropy"]}, "none of the outputs entropy reads the reference"),
        ({"cached": True}, "either a reference or cached"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenScorer(models[0], models[1], **arguments)
    with pytest.raises(ValueError, match="implicit_rewards need a reference"):
        TokenScorer(models[0], outputs=["implicit_rewards"])
    with pytest.raises(ValueError, match="reference is model itself, which has no PEFT adapter to switch off"):
        TokenScorer(models[0], models[0])
    with pytest.raises(TypeError, match=r"reference must be a torch\.nn\.Module, got str"):
        score_preferences(models[0], models[2], records(1), reference="before/")
    with pytest.raises(DataError, match="pair 1: expected the field 'rejected'"):
        score_preferences(models[0], models[2], [*records(1), {"prompt": "a", "chosen": "b"}])
    with pytest.raises(ValueError, match="at least one pair"):
        score_preferences(models[0], models[2], [])


def test_batches_hold_the_longest_first_and_keep_the_budget() -> None:
    lengths = [5, 30, 7, 7, 100, 1]
    groups = list(batches_by_length(lengths, 30))
    assert groups == [[4], [1], [2, 3, 0, 5]]
    assert list(batches_by_length([], 30)) == []


def test_known_errors_are_found_by_their_characters(models: tuple) -> None:
    table = score_preferences(models[0], models[2], records(3), reference=models[1])
    answer = records(3)[1]["rejected"]
    start = answer.index("Rome")
    flags = table.tokens_in(1, "rejected", [(start, start + 4)])
    texts = table.select(1, "rejected")["token"]
    assert "".join(text for text, flag in zip(texts, flags, strict=True) if flag).strip() == "Rome"
    assert not any(table.tokens_in(1, "rejected", []))


def test_the_lowest_spans_of_a_table(models: tuple) -> None:
    table = score_preferences(models[0], models[2], records(6), reference=models[1])
    found = table.lowest_spans(None, per_answer=2)
    assert [one.span.reward for one in found] == sorted(one.span.reward for one in found)
    assert {(one.pair, one.side) for one in found} == {
        (pair, side) for pair in range(6) for side in ("chosen", "rejected")
    }
    for pair, side, span, before, text, after in found:
        rows = table.select(pair, side)
        assert span in low_reward_spans(rows["implicit_rewards"].tolist(), limit=2)
        assert text == "".join(rows["token"][span.start : span.end])
        whole = "".join(rows["token"])
        assert before.removeprefix("…") + text + after.removesuffix("…") in whole
        assert len(before) <= 61 and len(after) <= 61
    assert table.lowest_spans(3, per_answer=2) == found[:3]
    assert table.select(side="chosen").lowest_spans(1) == [one for one in found if one.side == "chosen"][:1]


# --- encoding ---------------------------------------------------------------------------------------------------------


def one(encoder: Encoder, prompt: str | tuple, chosen: str, rejected: str = "other"):
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return encoder.pairs({7: Preference(messages, chosen, rejected)})[0]


def test_plain_prompts_are_text_and_answer_one_after_the_other(models: tuple) -> None:
    tokenizer = models[2]
    chosen, rejected = one(Encoder(tokenizer, "plain"), "Its capital is", " Lima.", " Oslo.")
    assert tokenizer.decode(chosen.prompt + chosen.ids) == "Its capital is Lima.<|end|>"
    assert tokenizer.decode(rejected.prompt) == "Its capital is" and "".join(rejected.texts) == " Oslo.<|end|>"
    # A token that reaches over the end of the prompt belongs to the answer.
    across, _ = one(Encoder(tokenizer, "plain"), "Its capi", "tal is Lima.")
    whole = tokenizer("Its capital is Lima.")["input_ids"]
    assert across.prompt + across.ids[:-1] == whole and across.texts[0] == "tal" and across.offsets[0] == (0, 3)
    with pytest.raises(
        ScoreError, match=r"pair 7 .record 8 of the data., chosen answer: .* conversation of 2 messages"
    ):
        one(Encoder(tokenizer, "plain"), (Message("system", "Be brief."), Message("user", "Why?")), "so")


def test_templates_that_strip_and_templates_that_rewrite(models: tuple) -> None:
    tokenizer = models[2]
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("message['content']", "message['content'] | trim")
        stripped, _ = one(Encoder(tokenizer), "Why?", "  so it is \n")
        assert "".join(stripped.texts) == "so it is<|end|>"
        assert stripped.offsets[0][0] == 2 and stripped.offsets[-2][1] == 10
        # The prompt is written otherwise once an answer follows.
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '[' + loop.length|string + m['role'] + ']' + m['content'] }}{% endfor %}"
        )
        rewritten, _ = one(Encoder(tokenizer), "Why?", "so it is")
        assert (
            tokenizer.decode(rewritten.prompt) == "[2user]Why?[2assistant]" and "".join(rewritten.texts) == "so it is"
        )
        tokenizer.chat_template = "{% for m in messages %}{{ loop.length|string + m['content'] | upper }}{% endfor %}"
        with pytest.raises(ScoreError, match=r"pair 7 .* does not write the answer as it is"):
            one(Encoder(tokenizer), "Why?", "so it is")
        tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
        with pytest.raises(ScoreError, match=r"pair 7 .* refuses the conversation .Roles must alternate"):
            one(Encoder(tokenizer), "Why?", "so it is")
        tokenizer.chat_template = None
        assert not Encoder(tokenizer).chat
        with pytest.raises(ScoreError, match="no chat template"):
            Encoder(tokenizer, "chat")
    finally:
        tokenizer.chat_template = template
    with pytest.raises(ScoreError, match="--prompt-format must be one of auto, chat, plain, got 'chatty'"):
        Encoder(tokenizer, "chatty")


def test_what_is_too_long_is_refused_or_cut(models: tuple) -> None:
    tokenizer = models[2]
    long, short = "abcdefghij" * 3, "xyz"
    with pytest.raises(ScoreError, match=r"chosen answer: \d+ tokens .* than the 20 that .* --max-length 20 cuts"):
        one(Encoder(tokenizer, limit=20), short, long)
    with pytest.raises(ScoreError, match="--max-length 21 is more than the 20 tokens"):
        Encoder(tokenizer, max_length=21, limit=20)
    whole = one(Encoder(tokenizer), long, short, long)
    cut = one(Encoder(tokenizer, max_length=24, limit=24), long, short, long)
    for before, after in zip(whole, cut, strict=True):
        assert after.length <= 24 and len(after.prompt) == 6  # a quarter: the longer answer takes the rest
        assert before.prompt[-6:] == after.prompt and before.ids[: len(after.ids)] == after.ids
        assert (after.cut_prompt, after.cut_answer) == (len(before.prompt) - 6, len(before.ids) - len(after.ids))
        assert len(after.ids) == len(after.texts) == len(after.offsets)
    assert one(Encoder(tokenizer, max_length=500), long, short, long) == whole


def test_tokenizers_that_disagree_on_a_text_are_found_out(models: tuple) -> None:
    other = train_tokenizer(["completely different words entirely"] * 3, 400)
    with pytest.raises(ScoreError, match=r"pair 7 .* make different tokens of it, from token"):
        one(Encoder(models[2], other=other), "Tell me", "Its capital is Lima.")
    assert one(Encoder(models[2], other=models[2]), "Tell me", "Its capital")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    out = tmp_path_factory.mktemp("scored") / "out"
    status, stdout, err = score(*usual(folders, out))
    assert status == 0, err
    return out, stdout, err


def test_a_run_writes_tables_figures_and_a_report(models: tuple, finished: tuple[Path, str, str]) -> None:
    out, stdout, err = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "checksums.json", "pairs.parquet", "report.html", "settings.json", "summary.json", "tokens.parquet",
    ]  # fmt: skip
    table = score_preferences(models[0], models[2], records(20), reference=models[1], beta=BETA)
    read = read_scores(out)
    assert list(read.columns) == list(pq.read_table(out / "tokens.parquet").column_names)
    assert set(read.columns) == set(table.columns)
    for name in table.columns:
        assert np.array_equal(read[name], table[name]), name
    assert read.prompts[3] == [("user", "Tell me about place 3, please.")]
    pairs = pq.read_table(out / "pairs.parquet").to_pydict()
    rewards = table.pair_rewards()
    for name in ("chosen_rewards", "rejected_rewards", "margins"):
        assert pairs[name] == pytest.approx(rewards[name].tolist(), abs=1e-6)
    assert pairs["chosen_logps"][4] == pytest.approx(float(table.select(4, "chosen")["logps"].sum()), abs=1e-4)
    assert pairs["chosen_tokens"][4] == len(table.select(4, "chosen")) and not any(pairs["rejected_cut"])
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["pairs"] == 20 and summary["tokens"] == len(table)
    assert summary["mean_margin"] == pytest.approx(rewards["margins"].mean(), abs=1e-6)
    assert summary["pair_accuracy"] == (rewards["margins"] > 0).mean()
    chosen = table["side"] == "chosen"
    assert summary["token_means"]["entropy"]["chosen"] == pytest.approx(table["entropy"][chosen].mean(), rel=1e-5)
    longer = [a - b for a, b in zip(pairs["chosen_tokens"], pairs["rejected_tokens"], strict=True)]
    assert summary["correlation_of_margin_and_length"] == pytest.approx(np.corrcoef(longer, rewards["margins"])[0, 1])
    for text in ("ranked right", "mean margin", str(out / "report.html")):
        assert text in stdout
    assert "scoring 20/20" in err and "20 of 20 pairs" in err


def test_the_report_shows_the_most_suspicious_first(finished: tuple[Path, str, str]) -> None:
    from html_pages import Tree

    report = (finished[0] / "report.html").read_text(encoding="utf-8")
    tree = Tree(report)
    cards = tree.of("pair")
    assert len(cards) == 12
    order = np.argsort(read_scores(finished[0]).pair_rewards()["margins"])
    notes = [element["text"] for element in tree.of("note")]
    assert notes == [f"Pair {pair}." for pair in order[:12]]
    lowest = [float(element["text"].replace("−", "-")) for element in tree.of("num")]
    assert len(lowest) == 30
    table = read_scores(finished[0])
    for side, shown in (("chosen", lowest[:15]), ("rejected", lowest[15:])):
        rewards = [table.select(pair, side)["implicit_rewards"].tolist() for pair in table.pairs()]
        spans = sorted(span.reward for answer in rewards for span in low_reward_spans(answer, limit=3))
        assert shown == pytest.approx(spans[:15], abs=6e-4)
    assert "eq. 11" in report and report.count("<script") == 1
    assert max(report.find("is_top1"), 0) and "kl_policy_reference (nats)" in report


def test_a_demo_is_scored_as_it_scored_itself(tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["demo", "--tiny", "--out", str(tmp_path / "demo")]) == 0
    from qkernels.demo import synthetic

    metrics = json.loads((tmp_path / "demo/metrics.json").read_text(encoding="utf-8"))
    pairs = synthetic.generate(metrics["sizes"]["train_pairs"], metrics["sizes"]["held_out_pairs"], seed=0).held_out
    rows = [{"prompt": [m._asdict() for m in p.prompt], "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    data = write_data(tmp_path / "held_out.json", rows)
    status, _, err = score(
        "--model", tmp_path / "demo/model", "--reference", tmp_path / "demo/reference", "--data", data,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    for ours, its in (("mean_margin", "mean_margin"), ("pair_accuracy", "pair_accuracy")):
        assert summary[ours] == pytest.approx(metrics["results"][its], abs=1e-5)


def test_cached_reference_log_probs_of_an_earlier_run(folders: Path, finished: tuple, tmp_path: Path) -> None:
    for source in (finished[0], finished[0] / "tokens.parquet"):
        out = tmp_path / source.name
        status, _, err = score(
            "--model", folders / "policy", "--reference-logps", source, "--data", folders / "data.json", "--out", out,
            "--beta", BETA, "--limit", 7,
        )  # fmt: skip
        assert status == 0, err
        table, live = read_scores(out), read_scores(finished[0])
        assert table.pairs() == list(range(7))
        assert np.array_equal(table["implicit_rewards"], live["implicit_rewards"][: len(table)])
        assert "kl_policy_reference" not in table.outputs
    status, _, err = score(
        "--model", folders / "policy", "--reference-logps", folders / "data.json", "--data", folders / "data.json",
        "--out", tmp_path / "data",
    )  # fmt: skip
    assert status == 2 and "expected a Parquet file of scores" in err and "delete" not in err
    status, _, err = score(
        "--model", folders / "policy", "--reference-logps", finished[0], "--data", folders / "data.json",
        "--out", tmp_path / "cut", "--max-length", 20,
    )  # fmt: skip
    assert (
        status == 2 and "its tokens are not those of --reference-logps" in err and re.search(r"pair \d+ .record", err)
    )


def test_a_missing_template_is_found_before_weights_are_loaded(
    models: tuple, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation of several messages needs one."""
    from qkernels.score import models as loading

    def load(*_: object) -> None:
        raise AssertionError("the weights were loaded first")

    monkeypatch.setattr(loading, "load_model", load)
    data = tmp_path / "turns.json"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    data.write_text(json.dumps([{"prompt": turns, "chosen": "So.", "rejected": "Now."}]))
    arguments = ("--reference", folders / "reference", "--data", data, "--out", tmp_path / "out")
    status, _, err = score("--model", folders / "policy", *arguments, "--prompt-format", "plain")
    assert status == 2 and "conversation of 2 messages" in err and "--chat-template" in err


def test_options_reach_the_results(folders: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}")
    status, _, err = score(
        *usual(folders, tmp_path / "out"), "--outputs", "entropy, V", "--limit", 3, "--max-length", 22,
        "--chat-template", template, "--shown", 3, "--dtype", "bfloat16", "--device", "cpu", "--batch-tokens", 30,
    )  # fmt: skip
    assert status == 0, err
    table = read_scores(tmp_path / "out")
    assert table.outputs == ("logps", "reference_logps", "implicit_rewards", "entropy", "V")
    assert "".join(table.select(0, "chosen")["token"]) == "Its capital is Lima.|"
    pairs = pq.read_table(tmp_path / "out/pairs.parquet").to_pydict()
    assert max(pairs["longest"]) == 22 and max(pairs["prompt_cut"]) > 0
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert report.count('<article class="pair"') == 3 and "at 22 tokens" in report and "bfloat16" in report
    assert "Cut off:" in report
    status, _, err = score(*usual(folders, tmp_path / "plain"), "--prompt-format", "plain", "--limit", 1)
    assert status == 0 and json.loads((tmp_path / "plain/settings.json").read_text())["prompt_format"] == "plain"


# --- interruptions ----------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch: pytest.MonkeyPatch, answers: int, error: BaseException) -> None:
    real = TokenScorer.scores

    def interrupted(self, *arguments, **more):
        for i, found in enumerate(real(self, *arguments, **more)):
            if i == answers:
                raise error
            yield found

    monkeypatch.setattr(TokenScorer, "scores", interrupted)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "--resume goes on"),
        (SystemExit(143), 143, ""),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "a smaller --batch-tokens than 200"),
        (ValueError("odd"), 2, "error: odd"),
        (RuntimeError("bug"), None, ""),
    ],
)
def test_what_was_scored_is_kept_and_continued(
    folders: Path,
    finished: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int | None,
    message: str,
) -> None:
    out = tmp_path / "out"
    arguments = usual(folders, out, "--batch-tokens", 200)
    interrupt_after(monkeypatch, 13, error)
    if status is None:
        with pytest.raises(RuntimeError, match="bug"):
            score(*arguments)
    else:
        got, stdout, err = score(*arguments)
        assert got == status and message in err and not stdout and "Traceback" not in err
    kept = read_scores(out).pairs()
    assert 0 < len(kept) < 13
    assert sorted(path.name for path in out.iterdir()) == ["checksums.json", "parts", "settings.json"]
    # Neither without --resume, nor twice as much work: only the rest is scored.
    got, _, err = score(*arguments)
    assert got == 2 and "unfinished run; continue it with --resume" in err
    monkeypatch.undo()
    scored = []
    real = store.Results.add
    monkeypatch.setattr(store.Results, "add", lambda self, pair, *rest: scored.append(pair) or real(self, pair, *rest))
    got, _, err = score(*arguments, "--resume")
    assert got == 0, err
    assert sorted(scored) == [pair for pair in range(20) if pair not in kept]
    assert f"{len(kept)} scored before" in err
    for name in read_scores(out).columns:
        whole, continued = read_scores(finished[0])[name], read_scores(out)[name]
        # A batch of another shape may round differently in the last digit.
        assert np.allclose(whole, continued, atol=1e-5) if whole.dtype.kind == "f" else np.array_equal(whole, continued)
    assert not (out / "parts").exists()
    assert pq.read_table(out / "pairs.parquet").num_rows == 20


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.nightly_except(number=(signal.SIGKILL,))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_a_folder_that_can_be_resumed(
    folders: Path, finished: tuple, tmp_path: Path, number: int
) -> None:
    # Every pair is written at once, and the process is struck while it writes the tenth file.
    code = f"""
import os, signal, pyarrow.parquet as pq
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's child inherits that it is ignored
store._FLUSH_SECONDS = 0
real, writes = pq.ParquetWriter.close, []
def close(self):
    writes.append(self)
    if len(writes) == 10:
        os.kill(os.getpid(), {int(number)})
    real(self)
pq.ParquetWriter.close = close
"""
    out = tmp_path / "out"
    with started(folders, out, code=code, cwd=tmp_path) as process:
        err = process.errors.read()
        assert process.wait() == {signal.SIGKILL: -9, signal.SIGINT: 130}[number], err
    kept = read_scores(out)
    assert len(kept.pairs()) >= 9 and np.isfinite(kept["logps"]).all()
    status, _, err = score(*usual(folders, out, "--resume"))
    assert status == 0 and f"{len(kept.pairs())} scored before" in err
    table = read_scores(out)
    assert np.allclose(table["implicit_rewards"], read_scores(finished[0])["implicit_rewards"], atol=1e-5)
    assert not [path for path in out.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("missing", ["merge", "pairs.parquet", "summary.json", "report.html", "close"])
def test_a_run_struck_while_finishing_finishes_later(
    folders: Path, finished: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    out = tmp_path / "out"
    real = store.Results.replace

    def replace(self, name, write):
        if str(name) == missing:
            raise KeyboardInterrupt
        real(self, name, write)

    def stop(self):
        raise KeyboardInterrupt

    if missing in ("merge", "close"):
        monkeypatch.setattr(store.Results, missing, stop)
    else:
        monkeypatch.setattr(store.Results, "replace", replace)
    assert score(*usual(folders, out))[0] == 130
    assert len(read_scores(out)) == len(read_scores(finished[0]))  # nothing twice
    monkeypatch.undo()
    status, _, err = score(*usual(folders, out, "--resume"))
    assert status == 0 and "20 scored before" in err
    for name in ("tokens.parquet", "pairs.parquet"):
        assert pq.read_table(out / name).equals(pq.read_table(finished[0] / name))


def test_a_full_disk_is_told_and_leaves_nothing_partial(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = score(*usual(folders, tmp_path / "out"))
    assert status == 2 and "cannot be written (No space left on device)" in err and "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_bad_row_is_named_before_any_work(folders: Path, tmp_path: Path) -> None:
    rows = [*records(70), {"prompt": "Why?", "chosen": "because " * 600, "rejected": "no"}, *records(2)]
    data, out = write_data(tmp_path / "data.json", rows), tmp_path / "out"
    arguments = ["--model", folders / "policy", "--reference", folders / "reference", "--data", data, "--out", out]
    status, _, err = score(*arguments)
    assert status == 2 and "pair 70 (record 71 of the data), chosen answer" in err and "--max-length 512" in err
    assert not out.exists()
    assert score(*arguments, "--limit", 67)[0] == 0
    before = (out / "tokens.parquet").read_bytes()
    status, _, err = score(*arguments, "--resume")
    assert status == 2 and "pair 70 (record 71 of the data), chosen answer" in err
    assert (out / "tokens.parquet").read_bytes() == before and len(read_scores(out).pairs()) == 67
    # The row may be mended, or cut; what was scored stays.
    status, _, err = score(*arguments, "--resume", "--max-length", 512)
    assert status == 0 and "67 scored before" in err
    assert pq.read_table(out / "pairs.parquet").column("chosen_cut").to_pylist()[70] > 0
    for more in ([], ["--max-length", 40]):
        status, _, err = score(*arguments, "--resume", *more)
        assert status == 2 and "has been scored" in err and "--max-length" in err


def test_resuming_takes_the_same_settings_and_data(folders: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", write_data(tmp_path / "data.json", records(6))
    arguments = ["--model", folders / "policy", "--reference", folders / "reference", "--data", data, "--out", out]
    assert score(*arguments, "--limit", 4)[0] == 0
    for more, message in (
        (["--beta", 0.2], "beta was 0.1 and is 0.2"),
        (["--outputs", "V"], "outputs was"),
        (["--prompt-format", "plain"], "prompt_format was 'chat' and is 'plain'"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
        (["--model", folders / "reference"], "model was"),
        (["--reference", folders / "policy"], "reference was"),
    ):
        status, _, err = score(*arguments, *more, "--resume")
        assert status == 2 and message in err and "settings that the run began with" in err
    before = (out / "tokens.parquet").read_bytes()
    write_data(data, [*records(3), *records(3)])
    status, _, err = score(*arguments, "--resume")
    assert status == 2 and "pair 3 has been scored, and its texts in the data have changed" in err
    write_data(data, records(2))
    status, _, err = score(*arguments, "--resume")
    assert status == 2 and "pair 2 has been scored, and the data has only 2 pairs now" in err
    assert (out / "tokens.parquet").read_bytes() == before
    write_data(data, records(9))  # more pairs: only those are new
    status, _, err = score(*arguments, "--resume")
    assert status == 0 and "4 scored before" in err and read_scores(out).pairs() == list(range(9))
    status, _, err = score(*arguments, "--resume")  # nothing left to do
    assert status == 0 and "9 scored before" in err
    (out / "settings.json").write_text("{")
    status, _, err = score(*arguments, "--resume")
    assert status == 2 and "settings.json: damaged" in err
    (out / "settings.json").unlink()
    status, _, err = score(*arguments, "--resume")
    assert status == 2 and "no run to resume there" in err


@pytest.fixture
def cached(folders: Path, tmp_path: Path) -> list[object]:
    """The arguments of a run that takes the log-probs of another one; 6 of its 8 pairs are scored."""
    assert score(*usual(folders, tmp_path / "refs", "--limit", 8))[0] == 0
    arguments = [
        "--model", folders / "policy", "--data", folders / "data.json", "--out", tmp_path / "out", "--beta", BETA,
        "--reference-logps", tmp_path / "refs",
    ]  # fmt: skip
    status, _, err = score(*arguments, "--limit", 6)
    assert status == 0, err
    return arguments


def test_resuming_takes_the_same_log_probs_wherever_they_lie(
    folders: Path, cached: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("refs", "./refs", "refs/tokens.parquet"):
        status, _, err = score(*cached, "--reference-logps", place, "--limit", 6, "--resume")
        assert status == 0, err
    status, _, err = score(*usual(folders, tmp_path / "refs", "--limit", 12, "--resume"))
    assert status == 0, err
    interrupt_after(monkeypatch, 20, KeyboardInterrupt())  # more of them; what is scored lies in a part as well now
    assert score(*cached, "--limit", 12, "--resume")[0] == 130 and any((tmp_path / "out/parts").iterdir())
    monkeypatch.undo()
    status, _, err = score(*cached, "--limit", 12, "--resume")
    assert status == 0 and re.search(r"([7-9]|1\d) scored before", err), err
    assert np.array_equal(read_scores(tmp_path / "out")["logps"], read_scores(tmp_path / "refs")["logps"])


def test_resuming_refuses_log_probs_of_another_reference(folders: Path, cached: list[object], tmp_path: Path) -> None:
    more = ["--reference", folders / "policy", "--overwrite"]
    assert score(*usual(folders, tmp_path / "refs", "--limit", 8), *more)[0] == 0
    before = (tmp_path / "out/tokens.parquet").read_bytes()
    status, _, err = score(*cached, "--limit", 8, "--resume")
    assert status == 2 and "pair 0 has been scored, and its log-probs in --reference-logps" in err
    assert (tmp_path / "out/tokens.parquet").read_bytes() == before


def test_resuming_notices_another_dtype_of_the_reference(folders: Path, models: tuple, tmp_path: Path) -> None:
    half = copy.deepcopy(models[1]).bfloat16()
    half.save_pretrained(tmp_path / "half")
    models[2].save_pretrained(tmp_path / "half")
    arguments = usual(folders, tmp_path / "out", "--reference", tmp_path / "half")
    assert score(*arguments, "--limit", 2)[0] == 0
    status, _, err = score(*arguments, "--dtype", "float32", "--resume")
    assert status == 2 and "reference_dtype was 'bfloat16' and is 'float32'" in err
    # A folder of a version that did not note it says so, and can still be read.
    settings = tmp_path / "out/settings.json"
    known = json.loads(settings.read_text())
    del known["reference_dtype"]
    settings.write_text(json.dumps(known))
    resign(tmp_path / "out")
    status, _, err = score(*arguments, "--resume")
    assert status == 2 and "reference_dtype was not noted and is 'bfloat16'" in err
    assert read_scores(tmp_path / "out").pairs() == [0, 1]


def test_an_adapter_on_another_base_is_another_model(folders: Path, tmp_path: Path) -> None:
    from qkernels.score.models import fingerprint

    base, adapter, other = (tmp_path / name for name in ("base", "adapter", "other"))
    shutil.copytree(folders / "policy", base)
    for folder, on in ((adapter, base), (other, other)):  # the second one is its own base
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(on)}))
    before, own = fingerprint(str(adapter)), fingerprint(str(other))
    assert before != own and fingerprint(str(adapter)) == before
    shutil.copy(folders / "reference/model.safetensors", base)
    assert fingerprint(str(adapter)) != before and fingerprint(str(other)) == own
    (other / "adapter_config.json").write_text("{")  # damaged: loading it says so
    assert fingerprint(str(other)) not in (None, own)


def test_resuming_cuts_trajectories_where_they_were_cut(folders: Path, tmp_path: Path) -> None:
    """The cut falls into what a tool returned, whose tokens at the end are dropped: no length tells of it."""
    rows = []
    for i in range(6):
        tool = {"role": "tool", "content": "and so on " * 8}
        turns = [
            [{"role": "assistant", "content": text}, tool, {"role": "assistant", "content": last}]
            for text, last in (("Its capital is Lima.", "It is old."), ("It is Oslo.", "Yes."))
        ]
        prompt = [{"role": "user", "content": f"Tell me about place {i}"}]
        rows.append({"prompt": prompt, "chosen": turns[0], "rejected": turns[1]})
    data = write_data(tmp_path / "data.json", rows)
    arguments = usual(folders, tmp_path / "out", "--data", data)
    status, _, err = score(*arguments, "--max-length", 40, "--limit", 3)
    assert status == 0, err
    pairs = pq.read_table(tmp_path / "out/pairs.parquet").to_pydict()
    longest = max(pairs["longest"])
    assert min(pairs["chosen_cut"]) > 0 and longest < 40, "the case needs such a cut"
    for length in (longest, 39, 41):
        status, _, err = score(*arguments, "--max-length", length, "--resume")
        assert status == 2 and "pair 0 has been scored" in err and "--max-length" in err
    status, _, err = score(*arguments, "--max-length", 40, "--resume")
    assert status == 0 and "3 scored before" in err, err


def test_what_a_limit_leaves_out_of_the_data_is_told_all_the_same(folders: Path, tmp_path: Path) -> None:
    """With a limit, passes over the data stop before the bad records."""
    bad = {"prompt": "Why?", "chosen": "So.", "rejected": "So."}
    data = write_data(tmp_path / "data.json", [*records(4), bad, bad])
    status, _, err = score(*usual(folders, tmp_path / "out", "--data", data, "--skip-invalid", "--limit", 2))
    assert status == 0 and "left out 2 records" in err, err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["pairs"] == 2 and summary["skipped"] == {"expected two different answers": 2}
    assert "2 x expected two different answers" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_damaged_part_is_named(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 13, KeyboardInterrupt())
    out = tmp_path / "out"
    assert score(*usual(folders, out))[0] == 130
    monkeypatch.undo()
    (part,) = (out / "parts").iterdir()
    part.write_bytes(b"PAR1" + b"\0" * 100)
    status, _, err = score(*usual(folders, out, "--resume"))
    assert status == 2 and part.name in err and "delete it, and --resume scores its pairs again" in err
    part.unlink()
    assert score(*usual(folders, out, "--resume"))[0] == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_left_alone_unless_told_otherwise(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("earlier")
    status, _, err = score(*usual(folders, out))
    assert status == 2 and "the folder exists" in err and "--overwrite" in err
    (out / "thesis.txt").write_text("precious")
    status, _, err = score(*usual(folders, out, "--overwrite"))
    assert status == 2 and "thesis.txt" in err and (out / "report.html").read_text() == "earlier"
    (out / "thesis.txt").unlink()
    status, _, err = score(*usual(folders, out, "--overwrite"))
    assert status == 2 and "no run has written to this folder" in err and "it holds report.html" in err
    settings = {"format": 1, "model": "", "reference": "", "beta": 1, "outputs": [], "special_ids": []}
    (out / "settings.json").write_text(json.dumps(settings))
    # Nothing goes before everything is ready.
    status, _, err = score(*usual(folders, out, "--overwrite", "--model", tmp_path / "absent"))
    assert status == 2 and (out / "report.html").read_text() == "earlier"
    status, _, err = score(*usual(folders, out, "--overwrite", "--limit", 2))
    assert status == 0, err
    assert read_scores(out).pairs() == [0, 1]
    (tmp_path / "file").write_text("")
    status, _, err = score(*usual(folders, tmp_path / "file"))
    assert status == 2 and "exists and is not a folder" in err
    status, _, err = score(*usual(folders, tmp_path / "file/below"))
    assert status == 2 and "cannot be written" in err
    status, _, err = score(*usual(folders, tmp_path / "new", "--resume", "--limit", 2))  # nothing there yet: it begins
    assert status == 0, err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beta", "0"], "--beta must be finite and above 0, got 0.0"),
        (["--beta", "nan"], "--beta must be finite"),
        (["--batch-tokens", "0"], "--batch-tokens must be 1 or more, got 0"),
        (["--max-length", "3"], "--max-length must be 8 or more, got 3"),
        (["--max-length", "513"], "--max-length 513 is more than the 512 tokens that the model takes"),
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--shown", "-1"], "--shown must be 0 or more, got -1"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--device", "abacus"], "--device abacus"),
        (["--outputs", "entropy,speed"], "--outputs: outputs must be names out of"),
        (["--outputs", ","], "--outputs: outputs must be names out of"),
        (["--prompt-format", "poem"], "--prompt-format must be one of auto, chat, plain, got 'poem'"),
        (["--chat-template", "absent.jinja"], "--chat-template absent.jinja: cannot be read"),
        (["--chat-template", os.devnull], f"--chat-template {os.devnull}: the file is blank"),
        (["--prompt-format", "plain", "--chat-template", "any"], "leave out --chat-template, or the format"),
        (["--data", "absent.json"], "absent.json: no such file"),
        (["--model", "./absent/model"], "--model ./absent/model: no such folder"),
        (["--reference", "/absent/model"], "--reference /absent/model: no such folder"),
        (["--reference-logps", "absent"], "either --reference or --reference-logps"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--colour"], "unrecognized arguments"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = score(*usual(folders, Path("out"), *more))
    assert status == 2 and message in err and not out and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit(folders: Path, models: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = folders / "data.json", tmp_path / "out"
    status, _, err = score("--model", folders / "policy", "--data", data, "--out", out)
    assert status == 2 and "no PEFT adapter" in err and "--reference DIR" in err and "--reference-logps" in err
    other = train_tokenizer(["completely different words entirely"] * 3, 400)
    models[1].save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    status, _, err = score(
        "--model", folders / "policy", "--reference", tmp_path / "other", "--data", data, "--out", out
    )
    assert status == 2 and "the tokenizers of --model and --reference differ" in err
    models[0].save_pretrained(tmp_path / "bare")
    status, _, err = score(
        "--model", tmp_path / "bare", "--reference", folders / "policy", "--data", data, "--out", out
    )
    assert status == 2 and "the folder has no tokenizer" in err
    # A reference without a tokenizer is taken to share the policy's.
    status, _, err = score(
        "--model", folders / "reference", "--reference", tmp_path / "bare", "--data", data, "--out", tmp_path / "fine",
        "--limit", 1,
    )  # fmt: skip
    assert status == 0, err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    models[2].save_pretrained(tmp_path / "broken")
    status, _, err = score(
        "--model", tmp_path / "broken", "--reference", folders / "policy", "--data", data, "--out", out
    )
    assert status == 2 and f"--model {tmp_path / 'broken'}: the folder has no weights" in err
    status, _, err = score("--model", data, "--reference", folders / "policy", "--data", data, "--out", out)
    assert status == 2 and "Traceback" not in err
    from qkernels.score import models as loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "pyarrow" else object())
    status, _, err = score(*usual(folders, out))
    assert status == 2 and "scoring needs pyarrow: pip install pyarrow" in err
    assert not out.exists()


@pytest.mark.parametrize("name", ["traind", "traind/", "no/such/model", "./traind", "/absent/traind", "~/traind"])
def test_a_mistyped_folder_is_no_download(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import transformers

    def download(*_: object, **__: object) -> None:
        raise AssertionError("looked for on the hub")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", download)
    for option in ("--model", "--reference"):
        status, _, err = score(*usual(folders, tmp_path / "out", option, name))
        assert status == 2 and f"{option} {name}: no such folder" in err and "OWNER/MODEL" in err


def test_an_output_folder_that_cannot_be_made_is_told_before_anything_is_loaded(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(run.models, "load", load)
    (tmp_path / "file").touch()
    status, _, err = score(*usual(folders, tmp_path / "file/out"))
    assert status == 2 and "--out" in err and "cannot be written" in err
    with pytest.raises(AssertionError, match="loaded"):
        score(*usual(folders, tmp_path / "a/b/out"))
    assert not (tmp_path / "a").exists()


class Arguments:
    """As a trainer saves its arguments: an object of a class that is elsewhere."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)

    def __reduce__(self) -> tuple:
        return (Arguments, (), self.__dict__)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("touched"),))


def test_the_trainers_own_beta_is_read_without_running_anything(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ScoreOptions(model=str(tmp_path), data=Path("d"), out=Path("o"), beta=0.3)
    path = tmp_path / "training_args.bin"
    assert run.models.check_beta(options) is None
    for values, beta in (
        ({"beta": 0.5, "device": torch.device("cpu"), "evil": Evil()}, "0.5"),
        ({"beta": 0.3}, None), ({"beta": "0.5"}, None), ({"beta": True}, None), ({"lr": 1.0}, None),
    ):  # fmt: skip
        torch.save(Arguments(**values), path)
        note = run.models.check_beta(options)
        assert note is None if beta is None else f"beta = {beta}," in note and "--beta 0.3" in note
    for content in (b"", b"PK\x03\x04", b"\x80" * 40, path.read_bytes()[:-70]):
        path.write_bytes(content)
        assert run.models.check_beta(options) is None
    assert not Path("touched").exists()


def test_a_beta_that_training_contradicts_is_told(folders: Path, tmp_path: Path) -> None:
    policy = shutil.copytree(folders / "policy", tmp_path / "policy")
    torch.save(Arguments(beta=0.05), policy / "training_args.bin")
    status, _, err = score(*usual(folders, tmp_path / "out", "--model", policy, "--limit", 1))
    assert status == 0 and "say beta = 0.05, and the rewards are in units of --beta 0.3" in err
    assert "beta = 0.05" in json.loads((tmp_path / "out/summary.json").read_text())["note"]


CUSTOM = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "homemade"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.nightly_except(trusted=(False,))
@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_only_with_the_flag(folders: Path, tmp_path: Path, trusted: bool) -> None:
    """Also where something answers yes to every question, and stands ready on standard input."""
    marker = tmp_path / "ran"
    shutil.copytree(folders / "policy", tmp_path / "custom")
    (tmp_path / "custom/homemade.py").write_text(CUSTOM.format(marker=str(marker)))
    config = json.loads((tmp_path / "custom/config.json").read_text())
    code = {"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Model"}
    config |= {"model_type": "homemade", "auto_map": code, "architectures": ["Model"]}
    (tmp_path / "custom/config.json").write_text(json.dumps(config))
    arguments = usual(folders, tmp_path / "out", "--model", tmp_path / "custom", "--limit", 1)
    if trusted:
        assert run_trusted([*arguments, "--trust-remote-code"], tmp_path / "modules") == 0 and marker.exists()
        return
    (tmp_path / "answers").write_text("y\n" * 1000)
    stdin = f"import os, sys; os.dup2(os.open({str(tmp_path / 'answers')!r}, os.O_RDONLY), 0); sys.stdin = open(0)"
    with Command(["score", *map(str, arguments)], tmp_path, stdin) as process:
        err = process.errors.read()
        assert process.wait() == 2 and not marker.exists(), err
    assert "[y/N]" not in err and "Traceback" not in err and not (tmp_path / "out").exists()
    assert "comes with Python code of its own, which runs only with --trust-remote-code" in err


def run_trusted(arguments: list, modules: Path) -> int:
    """The command in a process that has not imported transformers yet, so that copies of the code go to `modules`."""
    done = subprocess.run(
        [sys.executable, "-m", "qkernels", "score", *map(str, arguments)], capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(modules)},
    )  # fmt: skip
    return done.returncode


def acts_on_terminals(text: str) -> list[str]:
    return [character for character in text if not (character.isprintable() or character == "\n")]


NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x00\r\b"


def test_control_characters_of_data_do_not_reach_the_terminal(
    folders: Path, models: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert acts_on_terminals(NASTY)
    rows = [{**record, NASTY: 1, f"score\n{NASTY}": 2} for record in records(3)]
    rows[1]["chosen"] = f"Lima {NASTY} Oslo"
    rows[0]["prompt"] = f"Which {NASTY} is it?"
    data, out = write_data(tmp_path / "data.json", rows), tmp_path / "out"
    status, stdout, err = score(*usual(folders, out, "--data", data))
    assert status == 0 and "ignored fields: " in err and "␛]0;owned" in err
    assert "owned" in err and not acts_on_terminals(stdout + err)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["show", str(out), "--pair", "1"]) == main(["show", str(out), "--pair", "0", "--prompt"]) == 0
    assert (
        shown.getvalue().count("owned") >= 2
        and "␛]0;owned" in shown.getvalue()
        and not acts_on_terminals(shown.getvalue())
    )

    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('roles " + NASTY + "') }}")
    for number, (more, message) in enumerate(
        [
            (["--chat-template", template], "refuses the conversation (roles "),
            (["--model", tmp_path / f"absent{NASTY[:-4]}/a/b"], "no such folder"),
            (["--outputs", NASTY], "--outputs: outputs must be names out of"),
            (["--data", write_data(tmp_path / "bad.json", [{NASTY: 1}])], "expected the field 'chosen'"),
            (
                ["--data", write_data(tmp_path / "role.json", [{"prompt": [{"role": NASTY, "content": ""}]}])],
                "expected",
            ),
        ]
    ):
        status, stdout, err = score(*usual(folders, tmp_path / f"out{number}", *more))
        assert status == 2 and message in err and not stdout
        assert not acts_on_terminals(err) and err.count("\n") == len(err.splitlines())
    with pytest.raises(ScoreError) as error:
        models[2].chat_template, kept = template.read_text(), models[2].chat_template
        try:
            score_preferences(models[0], models[2], records(1))
        finally:
            models[2].chat_template = kept
    assert "roles ␛]0;owned" in str(error.value) and not acts_on_terminals(str(error.value))


def test_a_run_says_at_once_that_it_works_and_on_what(
    finished: tuple[Path, str, str], folders: Path, tmp_path: Path
) -> None:
    lines = finished[2].splitlines()
    assert lines.index("  checking 0/20") < lines.index("  scoring 0/20")
    batch = next(line for line in lines if "batch 1 of" in line)  # before the first of them is through
    assert re.match(r"  scoring 0/20  batch 1 of \d+: \d+ x \d+ tokens  \d+ s$", batch)
    report = (finished[0] / "report.html").read_text(encoding="utf-8")
    first_screen = report[: report.index("What a token reward is")]
    assert "policy against reference on data.json: 20 pairs" in first_screen
    sources = json.loads((finished[0] / "summary.json").read_text())["sources"]
    assert sources["model"] == str(folders / "policy") and sources["reference"] == str(folders / "reference")
    assert sources["data"] == str(folders / "data.json") and re.match(r"20\d\d-\d\d-\d\dT", sources["created"])
    status, _, err = score(*usual(folders, tmp_path / "same", "--reference", folders / "policy", "--limit", 1))
    assert status == 0 and "are the same: every reward is 0" in err
    assert "every reward is 0" in (tmp_path / "same/report.html").read_text(encoding="utf-8")


def test_a_model_of_which_a_part_was_trained_is_another(tmp_path: Path) -> None:
    """One small tensor between large ones; and one entry that no sample of the file holds."""
    from safetensors.torch import save_file

    from qkernels.score.models import check_difference, fingerprint
    from qkernels.score.options import ScoreOptions

    plain = {"a": torch.zeros(2**20), "b": torch.zeros(8), "c": torch.zeros(2**20)}
    models = {"plain": plain, "same": plain, "norm": {**plain, "b": torch.ones(8)}, "entry": {**plain, "c": None}}
    models["entry"]["c"] = torch.zeros(2**20).index_fill(0, torch.tensor([5000]), 1.0)
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file(tensors, str(tmp_path / name / "model.safetensors"))

    def told(name: str) -> str | None:
        of = {"model": str(tmp_path / name), "reference": str(tmp_path / "plain"), "data": "x", "out": "y"}
        return check_difference(ScoreOptions(**of))

    prints = {name: fingerprint(str(tmp_path / name)) for name in models}
    assert prints["same"] == prints["plain"] != prints["norm"]
    assert prints["entry"] == prints["plain"], "the case needs an entry between the samples"
    assert "every reward is 0" in (told("same") or "") and told("norm") is None and told("entry") is None
    outside = b'{"a": {"data_offsets": [-99, 5]}}'
    for broken in (b"", b"\xff" * 20, len(outside).to_bytes(8, "little") + outside):  # headers that cannot be
        (tmp_path / "same" / "model.safetensors").write_bytes(broken)
        assert fingerprint(str(tmp_path / "same")) != prints["plain"]


def test_a_batch_on_a_cpu_is_small_unless_told_otherwise(models: tuple) -> None:
    assert TokenScorer(models[0], models[1]).batch_tokens == 1024
    assert TokenScorer(models[0], models[1], batch_tokens=8192).batch_tokens == 8192
    assert default_batch_tokens(torch.device("cuda", 1)) == 8192


def test_a_damaged_adapter_is_named(folders: Path, tmp_path: Path) -> None:
    for number, contents in enumerate((b"[]", b"{", b"\xff", b"[" * 100000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(contents)
        status, _, err = score(*usual(folders, tmp_path / "out", "--model", folder))
        assert status == 2 and "adapter_config.json: damaged" in err and "Traceback" not in err


def test_tokens_that_the_head_lacks_are_named(models: tuple) -> None:
    small = llama(300)
    with pytest.raises(ScoreError, match=r"pair \d+ .record \d+ of the data., \w+ answer: .* head of 300 columns"):
        score_preferences(small, models[2], records(5))


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_table_goes_round_through_its_other_forms(models: tuple, tmp_path: Path) -> None:
    table = score_preferences(models[0], models[2], records(3), reference=models[1], beta=BETA)
    table.write_parquet(tmp_path / "table.parquet")
    back = TokenTable.from_arrow(pq.read_table(tmp_path / "table.parquet"))
    assert list(back.columns) == list(table.columns)
    assert all(np.array_equal(back[name], table[name]) for name in table.columns)
    assert back.select(2, "rejected")["pair"].tolist() == [2] * len(table.select(2, "rejected"))
    assert "3 pairs" in repr(table)
    with pytest.raises(KeyError, match="no pair 3"):
        table.select(3)
    with pytest.raises(ValueError, match="side must be"):
        table.select(0, "best")
    with pytest.raises(KeyError, match="no column 'speed'"):
        table["speed"]
    with pytest.raises(ValueError, match="missing: end"):
        TokenTable({name: column for name, column in table.columns.items() if name != "end"})
    with pytest.raises(ValueError, match="one length"):
        TokenTable({**table.columns, "extra": np.zeros(1)})
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(table)


def test_rewards_that_are_no_numbers_reach_summary_and_report(models: tuple, folders: Path, tmp_path: Path) -> None:
    broken = llama(len(models[2]), 0)
    with torch.no_grad():
        # One token gets NaN; the softmax over it, and so every row.
        broken.lm_head.weight[5] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    models[2].save_pretrained(tmp_path / "broken")
    status, out, err = score(*usual(folders, tmp_path / "out", "--model", tmp_path / "broken", "--limit", 2))
    assert status == 0, err
    assert "token rewards are infinite or NaN" in out

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    summary = json.loads((tmp_path / "out/summary.json").read_text(), parse_constant=refuse)
    assert summary["rewards_not_finite"] == summary["tokens"] and summary["mean_margin"] is None
    assert "rewards that are no numbers" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the shared data set is not here")
def test_real_pairs_are_scored(folders: Path, tmp_path: Path) -> None:
    status, _, err = score(*usual(folders, tmp_path / "out", "--data", REAL_PAIRS, "--max-length", 96, "--limit", 40))
    assert status == 0, err
    assert len(read_scores(tmp_path / "out").pairs()) == 40
