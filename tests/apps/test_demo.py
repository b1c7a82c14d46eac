"""The demo from end to end on its smallest size, its data, its tokenizer, and what it leaves behind when it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from transformers import AutoModelForCausalLM, AutoTokenizer

import qkernels
from processes import Command
from qkernels.cli import main
from qkernels.data import Message, Preference
from qkernels.demo import DemoError, DemoOptions, evaluate, output, run, synthetic, train
from qkernels.demo.encode import IGNORE, encode, pair_batch, truncate
from qkernels.demo.tokenizer import encode_prompts, encode_texts, token_texts, train_tokenizer
from qkernels.objectives import OBJECTIVES, STATEFUL

REAL_PAIRS = Path(__file__).parents[2] / "../shared/data/dpo_en_demo.json"


def demo(*arguments: object) -> tuple[int, str, str]:
    """Run the command in this process; status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["demo", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of one tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    status, out, err = demo("--tiny", "--out", folder)
    assert status == 0, err
    return folder, out, err


def test_a_run_writes_model_figures_and_report(finished: tuple[Path, str, str]) -> None:
    folder, out, err = finished
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "model", "reference", "report.html"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    sizes, curves = metrics["sizes"], metrics["curves"]
    assert [point["step"] for point in curves["sft"]] == list(range(1, sizes["sft_steps"] + 1))
    assert [point["step"] for point in curves["train"]] == list(range(1, sizes["steps"] + 1))
    assert curves["held_out"][0] == {
        "step": 0,
        "chosen_reward": 0.0,
        "rejected_reward": 0.0,
        "margin": 0.0,
        "accuracy": 0.5,
    }
    assert curves["held_out"][-1]["margin"] == pytest.approx(metrics["results"]["mean_margin"], abs=1e-5)
    # Policy and reference agree before the first update, whatever path their log-probs came by.
    assert curves["train"][0]["margin"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["options"]["seed"] == 0 and metrics["elapsed_seconds"]["total"] > 0
    for text in ("ranked right", "mean margin", "AUROC", str(folder / "model"), str(folder / "report.html")):
        assert text in out
    for text in ("64 training pairs, 16 held out", "Supervised fine-tuning", "token-level DPO", "SFT 8/8", "DPO 8/8"):
        assert text in err
    assert len(err.splitlines()) < 40  # not a terminal: a handful of lines per phase
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.count('<article class="pair"') == sizes["shown_pairs"]
    assert "planted" in report and "eq. 11" in report and report.count('<figure class="chart">') == 5


def test_the_saved_models_give_the_reported_rewards(finished: tuple[Path, str, str]) -> None:
    folder, _, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference")
    sizes = metrics["sizes"]
    pairs = synthetic.generate(sizes["train_pairs"], sizes["held_out_pairs"], seed=0).held_out
    rewards = []
    for pair in pairs:
        prompt = [message._asdict() for message in pair.prompt]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        for answer in (pair.chosen, pair.rejected):
            whole = [*prompt, {"role": "assistant", "content": answer}]
            ids = torch.tensor([tokenizer.apply_chat_template(whole, return_dict=False)])
            mask = torch.arange(ids.shape[1])[None] >= start
            labels = qkernels.shift_labels(ids, mask=mask)
            with torch.no_grad():
                rewards.append(
                    0.1
                    * sum(
                        sign
                        * torch.log_softmax(model(ids).logits, -1).gather(-1, labels.clamp(min=0)[..., None])[0, :, 0]
                        for sign, model in ((1, policy), (-1, reference))
                    )[labels[0] != -100]
                    .sum()
                    .item()
                )
    margins = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    assert sum(margins) / len(margins) == pytest.approx(metrics["results"]["mean_margin"], abs=1e-5)
    generated = policy.generate(
        **tokenizer("<|user|>Tell me about Peru.<|end|><|assistant|>", return_tensors="pt"), max_new_tokens=3
    )
    assert generated.shape[1] > 3


def test_same_seed_same_result(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    again = run.run_demo(DemoOptions(tmp_path / "again", tiny=True), io.StringIO())
    other = run.run_demo(DemoOptions(tmp_path / "other", tiny=True, seed=1), io.StringIO())
    first = json.loads((finished[0] / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(again["curves"])) == first["curves"]
    assert again["results"] == first["results"]
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (finished[0], tmp_path / "again")]
    assert weights[0] == weights[1]
    assert other["curves"] != again["curves"]


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2", "simpo", "exo_pair", "rspo", "ospo", "pspo"])
def test_other_losses_run(tmp_path: Path, loss: str) -> None:
    status, _, err = demo("--tiny", "--loss", loss, "--steps", 2, "--sft-steps", 1, "--out", tmp_path / "out")
    assert status == 0, err
    metrics = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["loss_terms"] == {loss: 1.0, "sft": 1.0}


def test_every_loss_is_accepted() -> None:
    for name in (*OBJECTIVES, *STATEFUL):
        DemoOptions(Path("out"), loss=name).check()


def test_what_exists_is_refused_and_replaced_only_on_request(
    finished: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("earlier")
    status, _, err = demo("--tiny", "--out", out)
    assert status == 2 and "the folder exists" in err and "--overwrite" in err
    assert (out / "report.html").read_text() == "earlier"
    (out / "thesis.txt").write_text("precious")
    status, _, err = demo("--tiny", "--out", out, "--overwrite")
    assert status == 2 and "thesis.txt" in err
    (out / "thesis.txt").unlink()
    status, _, err = demo("--tiny", "--out", out, "--overwrite")
    assert status == 2 and "none has written to this folder" in err and "it holds report.html" in err
    (out / "metrics.json").write_text('{"results": {}, "options": {}, "versions": {}}')
    # The earlier folder stays until the new run has succeeded.
    monkeypatch.setattr(train, "train_sft", _raise(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        demo("--tiny", "--out", out, "--overwrite")
    assert (out / "report.html").read_text() == "earlier"
    monkeypatch.undo()
    status, _, err = demo("--tiny", "--steps", 1, "--sft-steps", 0, "--out", out, "--overwrite")
    assert status == 0, err
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize(
    "name", ["model/thesis.tex", "reference/deep/er/thesis.tex", "model/config.json.bak", ".partial-thesis", "parts/x"]
)
def test_what_no_demo_has_written_survives(
    finished: tuple[Path, str, str], tmp_path: Path, name: str, mine: bool
) -> None:
    out = tmp_path / "out"
    if not mine:
        shutil.copytree(finished[0], out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("precious")
    status, _, err = demo("--tiny", "--out", out, "--overwrite")
    assert status == 2 and name.split("/")[0] in err and "--overwrite replaces only what an earlier demo has" in err
    assert (out / name).read_text() == "precious"
    if not mine:
        for path in finished[0].rglob("*"):
            assert not path.is_file() or (out / path.relative_to(finished[0])).read_bytes() == path.read_bytes()
        # What comes while the new run is at work stays as well.
        (out / name).unlink()
        shutil.rmtree(out)
        shutil.copytree(finished[0], out)
        new = output.OutputFolder(out, overwrite=True)
        with new:
            shutil.copytree(finished[0], new.path, dirs_exist_ok=True)
            new._refuse_existing()
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("precious")
            new._refuse_existing = lambda: None
            with pytest.raises(DemoError, match="keeps what is not the earlier demo's"):
                new.commit()
        (kept,) = tmp_path.glob(".out.replaced-*")
        assert (kept / name).read_text() == "precious"
        assert (out / "report.html").exists() and not (kept / "report.html").exists()


def test_a_demo_lists_its_files_and_replaces_exactly_those(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    folder = finished[0]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    on_disk = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert metrics["files"] == on_disk
    # Of a demo from before there was that list, the files that transformers saves are known by name.
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    del metrics["files"]
    (out / "metrics.json").write_text(json.dumps(metrics))
    with output.OutputFolder(out, overwrite=True) as new:
        shutil.copytree(folder, new.path, dirs_exist_ok=True)
        new.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # A list that somebody has written reaches no further than the folder.
    metrics["files"] = ["../../thesis.tex", "/etc/passwd", 7, "model/../../thesis.tex"]
    (out / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "thesis.tex").write_text("precious")
    with output.OutputFolder(out, overwrite=True) as new:
        shutil.copytree(folder, new.path, dirs_exist_ok=True)
        new.commit()
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_names_of_fields_do_not_act_on_the_terminal(tmp_path: Path) -> None:
    nasty = "\x1b]0;owned\x07\r"
    rows = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}", nasty: 1} for i in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    status, out, err = demo("--tiny", "--data", tmp_path / "data.json", "--out", tmp_path / "out", "--batch-size", 2)
    assert status == 0, err
    assert "␛]0;owned␇␍" in err and all(c.isprintable() or c == "\n" for c in out + err)


def _raise(error: BaseException):
    def raiser(*_: object, **__: object) -> None:
        raise error

    return raiser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "-1"], "--steps must be 1 or more, got -1"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--sft-steps", "-1"], "--sft-steps must be 0 or more"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--batch-size", "65"], "--batch-size must not exceed the 64 training pairs, got 65"),
        (["--beta", "0"], "--beta must be finite and above 0, got 0.0"),
        (["--beta", "nan"], "--beta must be finite"),
        (["--sft-weight", "-1"], "--sft-weight must be finite and 0 or more"),
        (["--max-length", "4"], "--max-length must be 16 or more"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--seed", str(2**64)], "--seed must be below"),
        (["--loss", "dpo"], "--loss must be one of alphapo, aot, "),
        (["--data", "absent.json"], "absent.json: no such file"),
        (["--colour"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = demo("--tiny", *arguments)
    assert status == 2 and message in err and not out
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_output_folder_must_be_possible(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        status, _, err = demo("--tiny", "--out", out)
        assert status == 2 and "not a folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2), (SystemExit(143), 143)],
)
def test_a_run_that_stops_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    from qkernels.demo import page

    monkeypatch.setattr(page, "write_page", _raise(error))
    got, out, err = demo("--tiny", "--steps", 1, "--sft-steps", 1, "--out", tmp_path / "a/b")
    assert got == status and not out and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_terminated_run_leaves_nothing(tmp_path: Path) -> None:
    with Command(["demo", "--tiny", "--steps", "100000", "--out", str(tmp_path / "out")], tmp_path) as process:
        for line in process.errors:
            if line.startswith("1. "):
                break
        assert [path.name.startswith(".out.partial-") for path in tmp_path.iterdir()] == [True]
        os.kill(process.pid, signal.SIGTERM)
        process.errors.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="diverged: the loss is nan at step 3"):
        train._update(
            torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), torch.tensor(float("nan")), 1.0, "SFT", 3
        )


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "tokenizers" else object())
    status, _, err = demo("--tiny", "--out", tmp_path / "out")
    assert status == 2 and err == "qkernels demo: error: the demo needs tokenizers: pip install tokenizers\n"


# ---------------------------------------------------------------------------------------------------- own data


def write_pairs(path: Path, count: int, answer: str = "yes {i} <|end|> <script>\n\t\u202e😀") -> Path:
    records = [
        {"prompt": f"Question {i}?", "chosen": answer.format(i=i), "rejected": f"no {i}", "id": i} for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_own_pairs_train_and_cuts_are_told(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 12, "word {i} " * 30)
    status, out, err = demo("--tiny", "--data", data, "--max-length", 24, "--steps", 2, "--out", tmp_path / "out")
    assert status == 0, err
    assert "of 12 prompts (their beginning), 12 of 24 answers (their end)" in err
    assert "ignored fields: id" in err and "truncated" in out and "AUROC" not in out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["data"]["truncated_answers"] == 12 and metrics["sizes"]["max_length"] == 24
    assert metrics["sizes"]["held_out_pairs"] == 2 and metrics["sizes"]["train_pairs"] == 10


def test_own_text_is_harmless_in_the_report(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    status, _, err = demo("--tiny", "--data", data, "--steps", 1, "--sft-steps", 1, "--out", tmp_path / "out")
    assert status == 0, err
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert report.count("<script") == 1 and "\u202e" not in report


@pytest.mark.parametrize(
    ("count", "answer", "arguments", "message"),
    [
        (7, "yes", [], "expected at least 8 preference pairs, found 7"),
        (8, "no {i}", [], "line 1: expected two different answers"),
        (8, "yes", ["--batch-size", 9], "--batch-size must not exceed the 6 training pairs, got 9"),
        (8, "no {i}" + " and so on" * 50, ["--max-length", 16], "a larger --max-length"),
    ],
)
def test_own_pairs_that_cannot_be_used(
    tmp_path: Path, count: int, answer: str, arguments: list[object], message: str
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", count, answer)
    if "max-length" in str(arguments):
        data.write_text(data.read_text().replace('"no ', '"no'), encoding="utf-8")
        records = [json.loads(line) for line in data.read_text().splitlines()]
        for record in records:
            record["rejected"] = record["chosen"] + " end"
        data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    status, _, err = demo("--tiny", "--data", data, "--out", tmp_path / "out", *arguments)
    assert status == 2 and message in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_prompts_do_not_straddle_the_split(tmp_path: Path) -> None:
    records = [{"prompt": f"{i // 4}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(40)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records))
    data = run._own_data(DemoOptions(Path("out"), data=path, seed=3))
    assert len(data.train) + len(data.held_out) == 40 and data.held_out
    assert not {pair.prompt for pair in data.train} & {pair.prompt for pair in data.held_out}
    for record in records:
        record["prompt"] = "always the same"
    path.write_text(json.dumps(records))
    data = run._own_data(DemoOptions(Path("out"), data=path))
    assert len(data.held_out) == 4 and "share" in data.split


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the shared data set is not here")
def test_real_pairs_train(tmp_path: Path) -> None:
    status, _, err = demo("--tiny", "--data", REAL_PAIRS, "--steps", 1, "--sft-steps", 1, "--out", tmp_path / "out")
    assert status == 0, err
    assert "284 training pairs, 16 held out" in err and "Cut to" in err


# ------------------------------------------------------------------------------------------ data and tokenizer


def test_planted_errors_are_where_they_are_said_to_be() -> None:
    data = synthetic.generate(300, 100, seed=5)
    assert (len(data.train), len(data.held_out)) == (300, 100)
    world = synthetic.facts()
    values = {kind: {known[kind] for known in world.values()} for kind in synthetic.KINDS}
    planted: list[set[tuple[str, str]]] = [set(), set()]
    for part, pairs in enumerate(data):
        for pair in pairs:
            country = next(name for name in world if name in pair.prompt[0].content)
            assert 1 <= len(pair.planted) <= 2
            # Putting the truth back at the spans gives the chosen answer.
            repaired = pair.rejected
            for start, stop in reversed(pair.planted):
                wrong = pair.rejected[start:stop]
                planted[part].add((country, wrong))
                kind = next(kind for kind in synthetic.KINDS if wrong in values[kind])
                assert wrong in synthetic.wrong_values(country, kind, world)
                repaired = repaired[:start] + world[country][kind] + repaired[stop:]
            assert repaired == pair.chosen
    assert not planted[0] & planted[1]
    assert synthetic.generate(300, 100, seed=5) == data
    assert synthetic.generate(300, 100, seed=6) != data


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Tell me about Peru.", "Its capital is Lima.", "Its capital is Lima."], 320)


def test_the_chat_template_is_the_layout_trained_on(tokenizer) -> None:
    messages = [Message("system", "Be brief."), Message("user", "Tell me\nabout Peru. 😀")]
    rendered = tokenizer.apply_chat_template(
        [message._asdict() for message in messages], add_generation_prompt=True, return_dict=False
    )
    assert rendered == encode_prompts(tokenizer, [messages])[0]
    assert tokenizer.decode(rendered) == "<|system|>Be brief.<|end|><|user|>Tell me\nabout Peru. 😀<|end|><|assistant|>"


def test_a_special_token_in_the_text_is_text(tokenizer) -> None:
    ((ids, offsets),) = encode_texts(tokenizer, ["a<|end|>b"])
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert "".join(token_texts(tokenizer, ids)) == "a<|end|>b"
    assert offsets[0] == (0, 1) and offsets[-1] == (8, 9)
    # The setting was for that call alone.
    assert tokenizer("<|end|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_bytes_that_are_no_character_are_shown_as_bytes(tokenizer) -> None:
    ((ids, _),) = encode_texts(tokenizer, ["é😀"])
    assert token_texts(tokenizer, ids) == ["<C3>", "<A9>", "<F0>", "<9F>", "<98>", "<80>"]
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == ["<|end|>"]


def test_truncation_keeps_the_end_of_prompts_and_the_start_of_answers(tokenizer) -> None:
    long, short = "abcdefghij" * 4, "xyz"
    pairs = [
        Preference((Message("user", long),), short, "zyx"),
        Preference((Message("user", short),), long, long + "k"),
        Preference((Message("user", long),), long, "k" + long, ((0, 1),)),
    ]
    whole = encode(pairs, tokenizer)
    kept, cut = truncate(whole, 24)
    assert cut == (2, 4, 1) and [pair.source for pair in kept] == [0, 2]  # the second pair differs past the cut
    for pair in kept:
        before = whole[pair.source]
        assert pair.length <= 24
        assert before.prompt[-len(pair.prompt) :] == pair.prompt
        assert before.chosen[: len(pair.chosen)] == pair.chosen
        assert before.rejected[: len(pair.rejected)] == pair.rejected
        assert len(pair.planted) == len(pair.rejected)
    assert kept[0].chosen == whole[0].chosen  # answers come first
    assert kept[1].planted == [True] + [False] * (len(kept[1].rejected) - 1)
    assert truncate(whole, 100) == (whole, (0, 0, 0))


def test_planted_tokens_are_those_that_overlap_the_span(tokenizer) -> None:
    pair = Preference((Message("user", "Tell me"),), "Its capital is Lima.", "Its capital is Oslo.", ((15, 19),))
    (encoded,) = encode([pair], tokenizer)
    texts = token_texts(tokenizer, encoded.rejected)
    assert "".join(t for t, planted in zip(texts, encoded.planted, strict=True) if planted).strip() == "Oslo"


def test_cached_log_probs_land_on_their_labels(tokenizer) -> None:
    sizes = DemoOptions(Path("out"), tiny=True).sizes(64, 64)
    model = train.build_model(tokenizer, sizes, seed=0)
    pairs, _ = truncate(encode(synthetic.generate(6, 0, seed=0).train, tokenizer), 64)
    cached = evaluate.pair_logps(model, pairs, batch_size=2)
    batch = pair_batch(pairs, model.config.pad_token_id)
    with torch.no_grad():
        live = qkernels.token_logps(model(input_ids=batch.input_ids).logits, batch.labels)
    assert torch.allclose(train._as_rows(cached, batch.labels), live, atol=1e-5)
    assert not live[batch.labels == IGNORE].any()
    # Padding is harmless without an attention mask: what comes later is not seen.
    alone = evaluate.pair_logps(model, pairs[:1], batch_size=1)[0]
    assert torch.allclose(alone.chosen, cached[0].chosen, atol=1e-5)
