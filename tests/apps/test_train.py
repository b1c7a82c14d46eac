"""`qkernels train`: from a model and pairs to a trained model, a report and a card; interruptions; what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import tiny_models
from qkernels.cli import main
from qkernels.data import as_preferences
from qkernels.integrations.trl import TokenDPOTrainer
from qkernels.score.rows import row as columns_of
from qkernels.train import TrainError, callbacks, dataset, folder, processes, run, sft
from qkernels.train.options import machine_rank, parse

TOWNS = ("Lima", "Oslo", "Rome", "Quito")


def records(count: int) -> list[dict]:
    return [
        {
            "prompt": f"Tell me about place {i}, please.",
            "chosen": f"Its capital is {TOWNS[i % 4]}." + " It is old." * (i % 3),
            "rejected": f"Its capital is {TOWNS[(i + 1) % 4]}. Yes" + " and so on" * (i % 4),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its pairs."""
    made = tmp_path_factory.mktemp("train")
    tokenizer = tiny_models.tokenizer([text for record in records(20) for text in record.values()])
    tiny_models.llama(len(tokenizer), 0, max_position_embeddings=64).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, records(20))), encoding="utf-8")
    return made


def arguments(given: Path, out: Path, *more: object) -> list[str]:
    usual = [
        "--model", given / "model", "--data", given / "pairs.jsonl", "--out", out, "--max-steps", 6, "--save-steps", 3,
        "--logging-steps", 1, "--per-device-train-batch-size", 2, "--learning-rate", 1e-2, "--held-out", 4,
        "--gradient-checkpointing", "false", "--use-cpu", *more,
    ]  # fmt: skip
    return ["train", *map(str, usual)]


def train(given: Path, out: Path, *more: object) -> tuple[int, str, str]:
    """Run the command in this process; status, standard output, standard error."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(arguments(given, out, *more))
    return status, stdout.getvalue(), stderr.getvalue()


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = out.glob("*model.safetensors")
    return load_file(file)


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted, with dropout, whose random numbers a resumed run has to repeat."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, _, err = train(given, out, "--seed", 5)
    assert status == 0, err
    return out


def test_a_run_leaves_a_model_a_report_and_a_card(given: Path, finished: Path) -> None:
    figures = metrics(finished)
    assert figures["results"]["pairs"] == 4 and figures["results"]["mean_margin"] > 0.1
    assert figures["data"]["train_pairs"] == 16 and figures["training"]["steps"] == 6
    margins = [entry["rewards/margins"] for entry in figures["curves"]["log"] if "rewards/margins" in entry]
    assert len(margins) == 6 and margins[0] == 0 < margins[-1]
    assert [one["step"] for one in figures["monitor"]["history"]] == [0, 1, 2, 3, 4, 5, 6]
    card = (finished / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "95 % interval" in card
    assert f"--reference {given / 'model'}" in card
    report = (finished / "report.html").read_text()
    assert "What the reward monitor found" in report and "Held-out answers" in report
    assert not (finished / "data").exists() and not (finished / ".lock").exists()
    # The figures are those of the model that was saved.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qkernels.score import score_preferences

    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (finished, given / "model"))
    table = score_preferences(
        model, AutoTokenizer.from_pretrained(finished), records(20), reference=reference, beta=0.1
    )
    rewards = dict(zip(table.pair_rewards()["pair"].tolist(), table.pair_rewards()["margins"].tolist(), strict=True))
    held_out = dataset.hold_out([str(i).encode() for i in range(20)], 4, 5)[0]
    assert figures["results"]["mean_margin"] == pytest.approx(sum(rewards[i] for i in held_out) / 4, abs=1e-5)


def test_scores_without_memory_for_them_are_left_out(given: Path, tmp_path: Path, monkeypatch) -> None:
    """The trained model is saved by then, and the message says how to score it."""

    def score_preferences(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("qkernels.score.run.score_preferences", score_preferences)
    status, _, err = train(given, tmp_path / "out", "--max-steps", 1)
    assert status == 0 and "out of memory while scoring (CUDA out of memory" in err
    assert f"qkernels score --model {tmp_path / 'out'} --reference {given / 'model'}" in err
    assert metrics(tmp_path / "out")["results"] is None and weights(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_model_that_has_not_changed_has_no_rewards_under_autocast(given: Path, tmp_path: Path) -> None:
    """The trainer computes in bf16 for good, and a reference that is loaded for the report has to do so too."""
    how = ("--loss-type", "simpo", "--bf16", "true", "--learning-rate", 0, "--max-steps", 1)
    status, _, err = train(given, tmp_path / "out", *how)
    assert status == 0, err
    assert metrics(tmp_path / "out")["results"]["mean_margin"] == 0


def test_a_resumed_run_is_the_run_that_was_interrupted(
    given: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    """Bit for bit: weights, log entries, observations of the monitor."""
    out = tmp_path / "out"

    def interrupt(self, args, state, control, **kwargs) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TrainProgress, "on_step_end", interrupt)
        status, _, err = train(given, out, "--seed", 5)
    assert status == 130 and "--resume goes on from the last checkpoint" in err
    status, _, err = train(given, out, "--seed", 5)
    assert status == 2 and "the folder holds an unfinished run; continue it with --resume" in err
    status, _, err = train(given, out, "--seed", 5, "--resume", "--beta", 0.3)
    assert status == 2 and "beta was None and is 0.3" in err
    (out / "checkpoint-4").mkdir()  # as a full disk leaves one
    status, _, err = train(given, out, "--seed", 5, "--resume")
    assert status == 0, err
    assert "checkpoint-4 is incomplete and left aside" in err and "From checkpoint-3" in err
    resumed, whole = weights(out), weights(finished)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole) and resumed.keys() == whole.keys()

    def log(path: Path) -> list[dict]:
        # Times, sums over the process' own steps, and TRL's count of tokens, which begins anew.
        timed = (
            "num_tokens",
            "train_runtime",
            "train_samples_per_second",
            "train_steps_per_second",
            "train_loss",
            "total_flos",
        )
        return [{k: v for k, v in entry.items() if k not in timed} for entry in metrics(path)["curves"]["log"]]

    assert log(out) == log(finished)
    assert metrics(out)["monitor"] == metrics(finished)["monitor"]
    assert metrics(out)["results"] == metrics(finished)["results"]
    status, _, err = train(given, out, "--seed", 5, "--resume")
    assert status == 2 and "the run there is finished" in err


def test_lora_after_sft_from_a_yaml_file_of_trls(given: Path, tmp_path: Path) -> None:
    """TRL's names are taken, and SFT's result is what preference training starts from."""
    (tmp_path / "dpo.yaml").write_text(
        f"model_name_or_path: {given / 'model'}\ndataset_name: {given / 'pairs.jsonl'}\nmax_steps: 2\nuse_cpu: true\n"
        "sft-steps: 2\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\nlearning_rate: 5e-3\n"
        "loss_type: [sigmoid, sft]\n"
        "loss_weights: [1.0, 0.5]\nlogging_steps: 1\nheld_out: 2\ndataset_train_split: null\n"
    )
    out = tmp_path / "out"
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--config", str(tmp_path / "dpo.yaml"), "--output_dir", str(out), "--seed=3"]) == 0
    assert "1. Supervised fine-tuning" in stderr.getvalue() and "loss sigmoid + sft" in stderr.getvalue()
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and adapter["base_model_name_or_path"] == str(out / "sft")
    first, before = weights(out / "sft"), weights(given / "model")
    changed = [name for name in before if not torch.equal(first[name], before[name])]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    figures = metrics(out)
    assert len(figures["curves"]["sft"]) == 2 and figures["training"]["lora_rank"] == 2
    assert "library_name: peft" in (out / "README.md").read_text()
    repeat = (out / "train.yaml").read_text()
    assert "lora_r: 2" in repeat and "seed: 3" in repeat and "\nout:" not in repeat


def test_only_the_assistants_turns_are_trained(given: Path, tmp_path: Path) -> None:
    def say(role: str, content: str) -> dict:
        return {"role": role, "content": content}

    pairs = [
        {
            "prompt": record["prompt"],
            "chosen": [say("assistant", "I look."), say("tool", "Peru is far."), say("assistant", record["chosen"])],
            "rejected": [say("assistant", record["rejected"])],
        }
        for record in records(8)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    out = tmp_path / "out"
    more = ("--data", tmp_path / "pairs.json", "--max-steps", 1, "--held-out", 2, "--save-strategy", "no")
    status, _, err = train(given, out, *more, "--loss-type", "tdpo2", "--loss-kwargs", '{"alpha": 0.3}')
    assert status == 0, err
    assert "only what the assistant said in them is trained" in err and "loss tdpo2" in err
    figures = metrics(out)
    assert figures["data"]["trajectories"] and "ranked right" in (out / "README.md").read_text()


def test_rows_of_a_trajectory_have_weights_of_0_between_the_turns(given: Path) -> None:
    from transformers import AutoTokenizer

    from qkernels.score import Encoder

    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    turns = [{"role": r, "content": c} for r, c in (("assistant", "Yes."), ("tool", "Lima"), ("assistant", "It is."))]
    pairs = as_preferences([{"prompt": "Is it?", "chosen": turns, "rejected": turns[:1]}])
    (answers,) = Encoder(tokenizer).pairs(dict(enumerate(pairs)))
    row = columns_of(*answers, True)
    ids = torch.tensor(row["chosen_ids"])
    scored = torch.tensor(row["chosen_token_weights"]) == 1
    assert tokenizer.decode(ids[scored]) == "Yes.<|end|>It is.<|end|>"
    assert tokenizer.decode(ids[~scored]) == "<|tool|>Lima<|end|><|assistant|>"
    assert tokenizer.decode(row["prompt_ids"]) == "<|user|>Is it?<|end|><|assistant|>"
    assert row["rejected_token_weights"] == [1.0] * len(row["rejected_ids"])


def test_token_ids_are_those_of_trl(given: Path) -> None:
    """Of pairs with single answers."""
    import datasets
    from transformers import AutoTokenizer
    from trl.trainer.dpo_trainer import DPOTrainer

    from qkernels.score import Encoder

    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    pairs = as_preferences(records(3))
    encoded = Encoder(tokenizer).pairs(dict(enumerate(pairs)))
    ours = [columns_of(*answers, False) for answers in encoded]

    rows = datasets.Dataset.from_list([pair.as_messages() for pair in pairs])
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    theirs = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    assert ours == [{name: list(row[name]) for name in ours[0]} for row in theirs]


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_are_trls_and_ours(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("beta: 0.3\nlora-r: 4\nenv:\n  QKERNELS_TEST_VARIABLE: 7\nmodel: m\ndata: d\n")
    ours, args, model, given = parse(
        ["--config", str(tmp_path / "a.yaml"), "--out", "o", "--beta", "0.2", "--model_name_or_path=other"]
    )
    assert (ours.model, ours.data, ours.out, args.output_dir) == ("other", "d", "o", "o")
    assert args.beta == 0.2 and model.lora_r == 4 and model.use_peft and args.disable_tqdm
    assert given == {"beta": 0.2, "lora_r": 4, "model": "other", "data": "d", "out": "o"}

    assert os.environ.pop("QKERNELS_TEST_VARIABLE") == "7"
    assert parse(["--loss-type", "ipo", "--backend", "torch"])[1].backend == "torch"


BAD_OPTIONS = {
    "nothing": ([], "--model is missing: give it as a flag, or as `model:`"),
    "unknown": (["--betta", "1"], "betta"),
    "a value of another kind": (["--beta", "much"], "invalid float value"),
    "both": (["--resume", "--overwrite"], "either --resume or --overwrite"),
    "below 0": (["--held-out", "-1"], "--held-out must be 0 or more, got -1"),
    "two lengths of SFT": (["--sft-steps", "1", "--sft-epochs", "1"], "either --sft-epochs or --sft-steps"),
    "an unknown loss": (["--loss-type", "sigmod"], "sigmod"),
    "no file": (["--config", "absent.yaml"], r"--config absent\.yaml: cannot be read"),
    "a blank template": (["--chat-template", os.devnull], "the file is blank; expected a chat template"),
    "a template for nothing": (["--chat-template", "x", "--prompt-format", "plain"], "plain uses no chat template"),
    "no pairs a step": (
        ["--per-device-train-batch-size", "0"],
        "--per-device-train-batch-size must be 1 or more, got 0",
    ),
    "no checkpoint": (["--resume-from-checkpoint", "absent"], "--resume-from-checkpoint absent: no checkpoint"),
    "no file of FSDP": (["--fsdp", "full_shard", "--fsdp-config", "absent.json"], r"absent\.json"),
    "nowhere to report to": (["--report-to", "somewhere"], r"--report-to somewhere: not known to transformers; known"),
    "a package that is missing": (
        ["--report-to", "clearml"],
        r"--report-to clearml: its package is not installed \(pip install clearml; ",
    ),
}


@pytest.mark.parametrize(("more", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_wrong_options_are_refused(given: Path, tmp_path: Path, more: list[str], message: str, capsys) -> None:

    status = main(["train"] if not more else arguments(given, tmp_path / "out", *more))
    err = capsys.readouterr().err
    assert status == 2 and re.search(message, err), err
    assert err.count("\n") == 1 or "Data:" in err
    assert not (tmp_path / "out").exists() or (tmp_path / "out/train.json").exists()


def test_wrong_names_in_the_file_are_refused(tmp_path: Path) -> None:
    for text, message in (
        ("betaa: 1", r"betaa: there is no such option; did you mean beta\?"),
        ("dataset_streaming: true", "dataset_streaming: True is an option of TRL's own command"),
        ("[1]", "expected options by name, found list"),
        ("a: [", "not valid YAML"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(TrainError, match=message):
            parse(["--config", str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text("dataset_streaming: false")
    parse(["--config", str(tmp_path / "a.yaml")])


# --- folders, models, data that cannot be used ------------------------------------------------------------------------


def test_models_that_cannot_be_trained_are_refused(given: Path, tmp_path: Path) -> None:
    empty, adapter, ggufs = tmp_path / "empty", tmp_path / "adapter", tmp_path / "ggufs"
    for path in (empty, adapter, ggufs):
        path.mkdir()
    (tmp_path / "bare").mkdir()
    cut = tmp_path / "cut"  # as an interrupted download leaves it
    shutil.copytree(given / "model", cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    parts = tmp_path / "parts"
    shutil.copytree(given / "model", parts)
    (parts / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-2.safetensors"}}')
    (empty / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text("{}")
    for name in "ab":
        (ggufs / f"{name}.gguf").write_bytes(b"GGUF")
    for model, message in (
        (empty, "the folder has no weights (model.safetensors, pytorch_model.bin or a GGUF file), only config.json"),
        (tmp_path / "bare", "no weights (model.safetensors, pytorch_model.bin or a GGUF file); it is empty"),
        (cut, "model.safetensors cannot be loaded ("),
        (parts, "names weights that the folder lacks: model-2.safetensors"),
        (adapter, "a PEFT adapter, whose reference would be the adapter itself; merge it into its base"),
        (ggufs, "expected one GGUF file, found a.gguf, b.gguf"),
        (tmp_path / "absent", "no such folder"),
        (given / "pairs.jsonl", "expected the folder of a model, found a file"),
    ):
        status, _, err = train(given, tmp_path / "out", "--model", model)
        assert status == 2 and message in err, err
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_needs_its_package(given: Path, tmp_path: Path, monkeypatch) -> None:
    from qkernels.train import model

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"reading a\.gguf needs the package gguf: pip install gguf"):
        model.check_folder(str(tmp_path))


def test_a_gguf_file_becomes_a_folder_with_the_same_weights(given: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from qkernels.train.model import check_folder, from_gguf

    model = AutoModelForCausalLM.from_pretrained(given / "model")
    config, heads = model.config, model.config.num_attention_heads
    folder_ = tmp_path / "gguf"
    folder_.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(given / "model" / file, folder_ / file)
    writer = gguf.GGUFWriter(str(folder_ / "tiny.gguf"), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "blk.0.attn_q", "self_attn.k_proj": "blk.0.attn_k", "self_attn.v_proj": "blk.0.attn_v",
        "self_attn.o_proj": "blk.0.attn_output", "mlp.gate_proj": "blk.0.ffn_gate", "mlp.up_proj": "blk.0.ffn_up",
        "mlp.down_proj": "blk.0.ffn_down", "input_layernorm": "blk.0.attn_norm",
        "post_attention_layernorm": "blk.0.ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp orders the halves of rotary embeddings
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(
            names[name.removeprefix("model.layers.0.").removesuffix(".weight")] + ".weight", tensor.contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = check_folder(str(folder_))
    assert file == folder_ / "tiny.gguf"
    converted = AutoModelForCausalLM.from_pretrained(from_gguf(file, tmp_path, anew=False))
    assert all(torch.equal(converted.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_data_and_lengths_that_cannot_be_used_are_refused(given: Path, tmp_path: Path) -> None:
    same = [{**records(1)[0], "rejected": records(1)[0]["chosen"]}]
    for name, rows in (("same", same), ("columns", [{"text": "a"}]), ("one", records(1))):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    for more, message in (
        (("--data", tmp_path / "same.json"), "record 1: expected two different answers"),
        (("--data", tmp_path / "columns.json"), "expected the field 'chosen', found only 'text'"),
        (("--data", tmp_path / "one.json", "--held-out", 1), "--held-out 0 holds none out"),
        (("--max-length", 65), "--max-length 65 is more than the 64 tokens the model takes"),
        (("--max-length", 4), "the prompt alone of all 16 fills max_length=4"),
    ):
        status, _, err = train(given, tmp_path / "out", *more)
        assert status == 2 and message in err, err
        assert not (tmp_path / "out/train.json").exists()


def test_a_folder_is_written_to_by_one_run_and_cleared_only_of_its_own(
    given: Path, finished: Path, tmp_path: Path
) -> None:
    from qkernels.score.folder import RunLock

    status, _, err = train(given, finished)
    assert status == 2 and "the folder holds a finished run; choose another one, or replace" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    status, _, err = train(given, tmp_path / "mine", "--overwrite")
    assert status == 2 and "has no train.json of one and holds thesis.txt" in err
    with RunLock(tmp_path / "mine") as lock:
        lock.acquire()
        (tmp_path / "mine/thesis.txt").unlink()
        status, _, err = train(given, tmp_path / "mine")
        assert status == 2 and "is writing to it; wait for its end" in err, err
    out = tmp_path / "earlier"
    out.mkdir()
    (out / "train.json").write_text("{}")
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-7/optimizer.pt").write_text("x")
    (out / "notes.txt").write_text("x")
    with pytest.raises(TrainError, match=r"the folder also holds notes\.txt"):
        folder.refuse(out, False, True)
    (out / "notes.txt").unlink()
    folder.refuse(out, False, True)
    (out / "data").mkdir()
    (out / "data/train.arrow").write_text("x")
    folder.clear(out, ["data"])
    assert [path.name for path in out.iterdir()] == ["data"]
    with pytest.raises(TrainError, match="the folder exists"):  # without a lock it is somebody's data
        folder.refuse(out, False, False)


def test_an_earlier_run_stays_until_the_new_one_can_begin(given: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for more, message in (
        (("--data", tmp_path / "typo.json"), "typo.json: no such file"),
        (("--max-length", 4), "the prompt alone of all 16 fills max_length=4"),
        (("--model", out), f"--model {out}: lies in --out"),
        (("--data", out / "metrics.json"), "lies in --out"),
    ):
        status, _, err = train(given, out, *more, "--overwrite")
        assert status == 2 and message in err, err
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    status, _, err = train(given, out, "--overwrite", "--max-steps", 1)
    assert status == 0 and metrics(out)["training"]["steps"] == 1, err
    assert not (out / "checkpoint-6").exists() and not (out / "data").exists()


def test_a_run_that_was_stopped_while_it_tokenised_is_none(given: Path, tmp_path: Path, monkeypatch) -> None:
    """After an error nothing is left; what a killed one leaves stands in no run's way."""

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(dataset, "_encoded", stopped)
        assert train(given, tmp_path / "out")[0] == 130
    assert not (tmp_path / "out").exists()
    for more in ((), ("--resume",), ("--overwrite",)):
        (tmp_path / "out/data").mkdir(parents=True)
        for name in (".lock", "data/train.arrow", "data/.held_out.arrow.partial"):
            (tmp_path / "out" / name).write_text("x")
        folder.refuse(tmp_path / "out", *(flag in more for flag in ("--resume", "--overwrite")))
        if not more:
            status, _, err = train(given, tmp_path / "out", "--max-steps", 1)
            assert status == 0 and not (tmp_path / "out/data").exists(), err
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("variables", "machine"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_WORLD_SIZE": "2"}, 1),
        ({"RANK": "3"}, 0),
        ({"RANK": "5", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}, 1),
    ],
)
def test_machines_that_share_a_folder_have_data_of_their_own(tmp_path: Path, monkeypatch, variables, machine) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine_rank() == machine
    name = folder.data_of(tmp_path, machine).name
    assert name == ("data-1" if machine else "data") and folder.is_own_folder(name)


def test_observations_that_were_cut_off_do_not_end_a_resumed_run(given: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "metrics.json").unlink()
    shutil.rmtree(out / "checkpoint-6")
    kept = out / "checkpoint-3/reward_monitor.json"
    assert len(json.loads(kept.read_text())["history"]) == 4 and not list(kept.parent.glob("*.partial"))
    kept.write_bytes(kept.read_bytes()[:20])
    with pytest.warns(UserWarning, match="the reward monitor begins anew"):
        status, _, err = train(given, out, "--seed", 5, "--resume")
    assert status == 0 and "From checkpoint-3" in err
    assert [one["step"] for one in metrics(out)["monitor"]["history"]] == [3, 4, 5, 6]


def test_held_out_pairs_without_an_answer_measure_nothing(given: Path, tmp_path: Path, capsys) -> None:
    """Cut to max_length, their two sides are equal."""
    rows = records(3)
    rows[0]["prompt"] *= 12
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    more = ("--eval-data", tmp_path / "eval.json", "--max-length", 60, "--max-steps", 1)
    usual = arguments(given, tmp_path / "out", *more)
    place = usual.index("--held-out")
    del usual[place : place + 2]
    assert main(usual) == 0
    err = capsys.readouterr().err
    assert "1 of the held-out pairs have prompts of max_length=60 tokens or more" in err
    assert "Reward monitor: 2 held-out pairs" in err
    figures = metrics(tmp_path / "out")["data"]
    assert figures["held_out_unanswered"] == 1 and figures["held_out_pairs"] == 3
    assert "1 held-out pairs, for the same reason" in (tmp_path / "out/report.html").read_text()


def test_pairs_of_the_report_have_the_numbers_of_their_records(finished: Path) -> None:
    numbers = metrics(finished)["data"]["held_out_numbers"]
    assert len(numbers) == 4 and numbers != [0, 1, 2, 3]
    report = (finished / "report.html").read_text()
    assert all(f"Pair {number}." in report for number in numbers)


def test_a_full_disk_ends_in_one_sentence_and_the_checkpoint_stays(given: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import Trainer

    save = Trainer._save_optimizer_and_scheduler

    def fail(self, output_dir) -> None:
        if output_dir.endswith("checkpoint-6"):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    status, _, err = train(given, tmp_path / "out", "--monitor-pairs", 0)
    assert status == 2 and "cannot be written" in err, err
    assert "checkpoint-3 is kept, and --resume goes on from it" in err
    assert folder.last_checkpoint(tmp_path / "out")[0] == tmp_path / "out/checkpoint-3"


def test_held_out_pairs_are_whole_prompts() -> None:
    prompts = [bytes([i // 3]) for i in range(30)]  # 10 prompts of 3 pairs
    places, words = dataset.hold_out(prompts, 7, 0)
    assert len(places) == 6 and len({prompts[i] for i in places}) == 2 and "do not occur in training" in words
    places, words = dataset.hold_out(prompts, 2, 0)
    assert len(places) == 2 and "share prompts" in words
    assert (
        dataset.hold_out(prompts, 0, 0)[0] == []
        and len(dataset.hold_out([b"%d" % i for i in range(5000)], None, 0)[0]) == 200
    )


# --- several processes ------------------------------------------------------------------------------------------------


def as_rank(rank: int, port: int, given: str, out: str, more: list[str], lost_at: int) -> None:
    """One process of two, as torchrun starts it; the second is lost at a step of this number."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.distributed.tensor import DTensor

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)

    def step(self, args, state, control, model, **kwargs) -> None:
        if any(isinstance(one, DTensor) and one.to_local().numel() < one.numel() for one in model.parameters()):
            Path(f"{out}.sharded{rank}").touch()
        if rank and state.global_step == lost_at:
            os._exit(0)

    callbacks.TrainProgress.on_step_end = step  # of this process alone
    status, _, err = train(Path(given), Path(out), *more)
    Path(f"{out}.rank{rank}").write_text(f"{status}\n{err}")


def on_two_processes(given: Path, out: Path, *more: object, lost_at: int = 0) -> list[str]:
    """What each process said, after its status."""
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # so that the children need not import torch again
    arguments = [(rank, port, str(given), str(out), list(map(str, more)), lost_at) for rank in range(2)]
    ranks = [context.Process(target=as_rank, args=one, daemon=True) for one in arguments]
    said = [Path(f"{out}.rank{rank}") for rank in range(2)]
    for path in said:
        path.unlink(missing_ok=True)
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0, process.exitcode
    return [path.read_text() if path.exists() else "lost" for path in said]


# Weights move by their gradient alone: Adam and clipping would divide a factor of it out again.
SGD = (
    "--max-steps", 3, "--optim", "sgd", "--learning-rate", 1.0, "--lr-scheduler-type", "constant", "--max-grad-norm", 0,
)  # fmt: skip


def check_same_run(two: Path, one: Path, start: Path) -> None:
    """That a run on two processes is the run on one with batches of twice the size, up to rounding.

    The gradient is a sum of a few hundred terms in fp32 in another order, which may err by parts of 1e-6 of its size
    (`EPS32` times the number of additions one after the other, as a rule its root); three steps of SGD hand that on.
    Each tensor is allowed 1e-4 of what it moved, or 1e-6 of what all did, where its own gradient cancels.
    """
    ours, expected, begun = weights(two), weights(one), weights(start)
    assert ours.keys() == expected.keys()
    moved = {name: (expected[name] - begun[name]).norm().item() for name in expected}
    whole = sum(x * x for x in moved.values()) ** 0.5
    assert whole > 0.1 and min(moved.values()) > 0, moved
    for name in expected:
        off = (ours[name] - expected[name]).norm().item()
        assert off <= 1e-4 * moved[name] + 1e-6 * whole, f"{name}: off by {off}, moved by {moved[name]}, all by {whole}"
    figures = [metrics(path) for path in (two, one)]
    for name in ("loss", "rewards/margins", "logps/rejected"):
        curves = [[entry[name] for entry in one["curves"]["log"] if name in entry] for one in figures]
        assert len(curves[1]) >= 3 and curves[0] == pytest.approx(curves[1], rel=1e-4, abs=1e-5), name
    assert figures[0]["results"]["mean_margin"] == pytest.approx(figures[1]["results"]["mean_margin"], rel=1e-3)
    assert figures[0]["training"]["pairs_a_step"] == figures[1]["training"]["pairs_a_step"] == 4


@pytest.fixture(scope="module")
def on_one(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process of what two processes run."""
    out = tmp_path_factory.mktemp("one") / "out"
    status, _, err = train(given, out, *SGD, "--save-strategy", "no", "--per-device-train-batch-size", 4)
    assert status == 0, err
    return out


def test_two_processes_train_as_one_does(given: Path, on_one: Path, tmp_path: Path, monkeypatch) -> None:
    said = on_two_processes(given, tmp_path / "two", *SGD, "--save-strategy", "no")
    assert [text.split("\n")[0] for text in said] == ["0", "0"], said
    assert "training 3/3" in said[0] and "\n" not in said[1].strip()  # the main process speaks, the other is silent
    check_same_run(tmp_path / "two", on_one, given / "model")
    with monkeypatch.context() as patch:
        real = TokenDPOTrainer.compute_loss
        patch.setattr(TokenDPOTrainer, "compute_loss", lambda *a, **k: 1.01 * real(*a, **k))
        on_two_processes(given, tmp_path / "wrong", *SGD, "--save-strategy", "no")
    with pytest.raises(AssertionError, match="off by"):
        check_same_run(tmp_path / "wrong", on_one, given / "model")


def test_a_process_that_comes_late_takes_the_run_for_its_own(given: Path, tmp_path: Path, monkeypatch) -> None:
    """The main process writes to the folder only when all have been told that they may."""
    real = run._check_out

    def late(options) -> None:
        for _ in range(0 if run.is_main_process() else 10):
            if options.folder.exists() and any(options.folder.iterdir()):
                break
            time.sleep(0.1)
        real(options)

    monkeypatch.setattr(run, "_check_out", late)
    said = on_two_processes(given, tmp_path / "out", "--max-steps", 1, "--save-strategy", "no")
    assert [text.split("\n")[0] for text in said] == ["0", "0"], said
    said = on_two_processes(given, tmp_path / "out", "--max-steps", 1)
    assert [text.split("\n")[0] for text in said] == ["2", "2"], said
    assert all("the folder holds a finished run" in text for text in said)


FSDP2 = ("--fsdp", "--fsdp-config", '{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}')
IN_SHARDS = ("--fsdp", "--fsdp-config", '{"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}')


@pytest.mark.nightly
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing", "true")], ids=["plain", "gradient checkpointing"])
def test_two_processes_with_sharded_weights_train_as_one_does(
    given: Path, on_one: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    said = on_two_processes(given, tmp_path / "two", *SGD, "--save-strategy", "no", *FSDP2, *more)
    assert [text.split("\n")[0] for text in said] == ["0", "0"], said
    assert all((tmp_path / f"two.sharded{rank}").exists() for rank in range(2))
    check_same_run(tmp_path / "two", on_one, given / "model")


@pytest.mark.nightly
@pytest.mark.parametrize("more", [(), FSDP2, IN_SHARDS], ids=["DDP", "FSDP2", "FSDP2, checkpoints in shards"])
def test_a_run_on_two_processes_resumed_is_the_run_that_lost_one(
    given: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Bit for bit: a sum of two numbers has one order."""
    assert [text[0] for text in on_two_processes(given, tmp_path / "whole", *more)] == ["0", "0"]
    said = on_two_processes(given, tmp_path / "out", *more, lost_at=5)
    assert said[1] == "lost" and "a process of the run was lost" in said[0], said
    said = on_two_processes(given, tmp_path / "out", *more, "--resume")
    assert "From checkpoint-3" in said[0] and said[0][0] == said[1][0] == "0", said
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert metrics(tmp_path / "out")["monitor"] == metrics(tmp_path / "whole")["monitor"]
    assert metrics(tmp_path / "out")["results"] == metrics(tmp_path / "whole")["results"]


@pytest.mark.nightly
def test_lora_after_sft_on_two_processes_with_sharded_weights(given: Path, tmp_path: Path) -> None:
    """As with whole weights: the gradients of two processes have one sum, whichever of them has it."""
    usual = ("--max-steps", 2, "--save-strategy", "no", "--sft-steps", 2, "--lora-r", 2)
    for name, more in (("whole", ()), ("sharded", FSDP2)):
        said = on_two_processes(given, tmp_path / name, *usual, *more)
        assert [text.split("\n")[0] for text in said] == ["0", "0"], said
    assert (tmp_path / "sharded.sharded0").exists() and not (tmp_path / "whole.sharded0").exists()
    for part in ("", "sft"):
        sharded, whole = weights(tmp_path / "sharded" / part), weights(tmp_path / "whole" / part)
        assert sharded.keys() == whole.keys()
        for name in whole:  # what differs is the order of the sum of squares that gradients are clipped by
            torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=1e-6)
    assert metrics(tmp_path / "sharded")["training"]["lora_rank"] == 2


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    "accelerate with a file": ("accelerate.commands.launch", "--config_file", "fsdp.yaml"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_launchers_start_two_processes(given: Path, on_one: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    (tmp_path / "fsdp.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\n"
        "mixed_precision: 'no'\nfsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
        "  fsdp_reshard_after_forward: true\n"  # its checkpoints are in shards, by default
    )
    told = arguments(given, Path("out"), *SGD)
    told.remove("--use-cpu")  # which the command knows by itself where there is no accelerator
    if torch.accelerator.is_available():
        told.append("--use-cpu")
    command = [sys.executable, "-m", *launcher, "-m", "qkernels", *told]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=launched())
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out/checkpoint-3/pytorch_model_fsdp_0").exists() == ("fsdp.yaml" in launcher)
    check_same_run(tmp_path / "out", on_one, given / "model")
    begun = json.loads((tmp_path / "out/train.json").read_text())["settings"]
    assert begun["processes"] == 2 and begun.get("FSDP version") == (2 if "fsdp.yaml" in launcher else None)


def launched() -> dict[str, str]:
    """The environment of a launcher: this package, one thread for each process."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_fsdp1_without_an_accelerator_and_one_process_for_several_are_refused(
    given: Path, tmp_path: Path, monkeypatch
) -> None:
    status, _, err = train(given, tmp_path / "out", "--fsdp", "--fsdp-config", '{"version": 1}')
    assert status == 2 and "FSDP1 shards models on accelerators alone" in err and "--fsdp_version 2" in err, err
    with monkeypatch.context() as patch:  # as accelerate launch --use_fsdp sets it
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        status, _, err = train(given, tmp_path / "out")
        assert status == 2 and "FSDP1 shards models on accelerators alone" in err, err
        patch.setenv("FSDP_VERSION", "2")
        assert processes.fsdp_version(SimpleNamespace(fsdp_plugin_args=None)) == 2
    assert processes.fsdp_version(SimpleNamespace(fsdp_plugin_args=None)) is None
    with monkeypatch.context() as patch:  # as accelerate launch --cpu --num_processes 2 sets it
        patch.setenv("ACCELERATE_USE_CPU", "True")
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        status, _, err = train(given, tmp_path / "out")
        assert status == 2 and "accelerate launch has started one process where several were asked for" in err, err
        patch.setenv("OMPI_COMM_WORLD_SIZE", "1")  # as mpirun sets it
        processes.check_launcher(1)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(TrainError, match="has started 2 processes, and accelerate joins 1"):
            processes.check_launcher(1)


def test_accelerate_shards_on_cpus_where_it_was_asked_to(monkeypatch) -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    monkeypatch.setattr(PartialState, "_shared_state", {"distributed_type": DistributedType.MULTI_CPU})
    seen = []

    def begin(self, **options) -> None:
        seen.append(PartialState._shared_state["distributed_type"])

    monkeypatch.setattr(AcceleratorState, "__init__", begin)
    with processes.sharding_on_cpus():
        AcceleratorState(fsdp_plugin=None)
        AcceleratorState(fsdp_plugin=object())
    assert seen == [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]  # one that it takes the plugin for
    assert AcceleratorState.__init__ is begin


def test_an_adapter_of_sharded_weights_is_merged_by_the_main_process(given: Path, tmp_path: Path) -> None:
    """With a model that is whole in the place of a sharded one: what is asked of accelerate, and what comes out."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(given / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model, asked = get_peft_model(base, lora), []
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(set_state_dict_type=asked.append))

    def trainer(main: bool) -> SimpleNamespace:
        return SimpleNamespace(
            model=model, save_model=model.save_pretrained, args=SimpleNamespace(trust_remote_code=False),
            is_fsdp_enabled=True, accelerator=SimpleNamespace(is_main_process=main, state=state),
        )  # fmt: skip

    merged = sft._merged(trainer(True), tmp_path / "adapter")
    assert sft._merged(trainer(False), tmp_path / "adapter") is None
    assert asked == ["FULL_STATE_DICT"] * 2  # every process takes part in gathering the weights
    found, expected = merged.state_dict(), model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    before = AutoModelForCausalLM.from_pretrained(given / "model").state_dict()
    assert [name for name in before if not torch.equal(before[name], found[name])] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_zero3_is_refused_before_anything_is_read(given: Path, tmp_path: Path, monkeypatch) -> None:
    from qkernels.integrations.trl import TokenDPOConfig

    made = TokenDPOConfig.__post_init__

    def with_a_plugin(self) -> None:  # as transformers sets it from --deepspeed FILE or for accelerate launch
        made(self)
        self.deepspeed_plugin = SimpleNamespace(zero_stage=3)

    monkeypatch.setattr(TokenDPOConfig, "__post_init__", with_a_plugin)
    status, _, err = train(given, tmp_path / "out", "--data", tmp_path / "absent.json")
    assert status == 2 and "DeepSpeed ZeRO-3 shards the head's weight" in err and "use ZeRO-2, or FSDP2" in err, err
    config = TokenDPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 shards the head's weight"):
        TokenDPOTrainer(tiny_models.llama(100), args=config, train_dataset=None)


@pytest.mark.nightly
def test_tensorboard_gets_the_rewards_and_the_monitors_numbers(given: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = on_two_processes(given, tmp_path / "out", "--max-steps", 3, "--report-to", "tensorboard")
    assert [text[0] for text in said] == ["0", "0"], said
    (written,) = (tmp_path / "out/runs").iterdir()  # by the main process alone
    events = EventAccumulator(str(written))
    events.Reload()
    logged = {entry["step"]: entry for entry in metrics(tmp_path / "out")["curves"]["log"] if "loss" in entry}
    for tag, name in (("train/loss", "loss"), ("train/rewards/margins", "rewards/margins")):
        shown = {one.step: one.value for one in events.Scalars(tag)}
        assert shown == pytest.approx({step: entry[name] for step, entry in logged.items()}, rel=1e-6), tag
    assert any("qkernels/" in tag for tag in events.Tags()["scalars"]), events.Tags()["scalars"]


def test_errors_of_the_network_mean_a_lost_process_where_there_are_several(tmp_path: Path, monkeypatch) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23456")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError) as caught, run._errors(tmp_path):
        raise error
    assert caught.value is error
    monkeypatch.setenv("RANK", "0")
    told = r"a process of the run was lost \(.*no checkpoint yet; --resume .* with the same number of processes"
    with pytest.raises(TrainError, match=told), run._errors(tmp_path):
        raise error


@pytest.mark.nightly
def test_a_lost_process_ends_in_one_sentence_and_the_checkpoint_stays(given: Path, tmp_path: Path) -> None:
    said = on_two_processes(given, tmp_path / "out", "--monitor-pairs", 0, lost_at=5)
    assert said[1] == "lost" and said[0].startswith("2\n"), said
    assert "a process of the run was lost" in said[0], said[0]
    assert "checkpoint-3 is kept, and --resume goes on from it with the same number of processes" in said[0]
