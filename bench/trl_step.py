"""One training step of TRL's DPOTrainer, stock and with this package: `python -m bench.trl_step`.

With `--model DIR` it is a step of that model on real pairs (`--data FILE`), in fp32 and bf16, beside its floor and with
its peak memory: `bench/trl_real.py`. Without, tiny models show what the loss head alone costs.

A step is `trainer.training_step(model, batch)`: reference forward, policy forward, loss, backward; no optimiser. The
contenders take turns, so that a busy moment hits all of them. The cases: a small vocabulary, where all that can be
measured is overhead; a large one with long prompts; the same without layers, which is the loss head and the embedding;
the same with a frozen head (LoRA on the attention), where PEFT is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import contenders, measure, trl_real


@dataclass(frozen=True)
class Case:
    """Shape of a step: `2 * pairs` sequences of `prompt + answer` tokens, a model of `layers` of width `hidden`."""

    name: str
    vocab: int
    hidden: int
    pairs: int
    prompt: int
    answer: int
    lora: bool = False
    layers: int = 2


CASES = [
    Case("small vocabulary", vocab=1000, hidden=64, pairs=4, prompt=32, answer=32),
    Case("large vocabulary, long prompts", vocab=128256, hidden=256, pairs=2, prompt=192, answer=64),
    Case("the same, no layers", vocab=128256, hidden=256, pairs=2, prompt=192, answer=64, layers=0),
    Case("the same, LoRA on the attention", vocab=128256, hidden=256, pairs=2, prompt=192, answer=64, lora=True),
]


def model(case: Case, seed: int = 0) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=2 * case.hidden,
        num_hidden_layers=case.layers, num_attention_heads=4,
        max_position_embeddings=case.prompt + case.answer, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def batch(case: Case) -> dict[str, torch.Tensor]:
    """Random tokens, as TRL's collator lays them out."""
    generator = torch.Generator().manual_seed(1)
    shape = (2 * case.pairs, case.prompt + case.answer)
    ids = torch.randint(3, case.vocab, shape, generator=generator)
    answer = torch.zeros_like(ids)
    answer[:, case.prompt :] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answer}


def step(case: Case, make: Callable[..., Any], folder: str) -> Callable[[], float]:
    """A trainer's step as a function; it returns the loss."""
    from datasets import Dataset
    from trl import DPOConfig

    options: dict[str, Any] = {}
    if case.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(
        model=model(case),
        ref_model=None if case.lora else model(case),
        args=DPOConfig(
            folder, use_cpu=True, report_to=[], bf16=False, disable_tqdm=True, log_level="error",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a b"}]),
        processing_class=tokenizer(),
        **options,
    )  # fmt: skip
    inputs, policy = batch(case), trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1  # as the training loop has it
    policy.train()

    def run() -> float:
        policy.zero_grad(set_to_none=True)
        return float(trainer.training_step(policy, dict(inputs)))

    return run


def trainers() -> dict[str, Callable[..., Any]]:
    from trl import DPOTrainer

    from qkernels.integrations.trl import TokenDPOTrainer, patch_trl

    def patched(**arguments: Any) -> Any:
        with patch_trl():
            return DPOTrainer(**arguments)

    return {"TRL": DPOTrainer, "TRL, patch_trl()": patched, "TokenDPOTrainer": TokenDPOTrainer}


def compare(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's rounds, by name, the contenders taking turns. Their losses have to agree."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: step(case, make, folder) for name, make in trainers().items()}
        losses = {name: run() for name, run in steps.items()}  # also the warm-up
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise RuntimeError(f"the contenders disagree on the loss: {losses}")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return seconds


CONTENDERS = ("TRL", "TRL, patch_trl()", "TokenDPOTrainer", "TRL, Liger")


def with_liger(names: Sequence[str] = CONTENDERS) -> dict[str, Callable[..., Any]]:
    """The trainers of these names and TRL's own; "TRL, Liger" has Liger's layers (TRL has no loss of Liger's)."""
    made = trainers()
    made["TRL, Liger"] = made["TRL"]
    return {name: made[name] for name in CONTENDERS if name in names or name == "TRL"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trl_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each contender (default: 5)")
    parser.add_argument("--model", metavar="DIR", type=Path, default=None, help="a pretrained model instead")
    parser.add_argument("--data", metavar="FILE", type=Path, default=None,
                        help="preference pairs for it, JSON or JSONL (default: generated ones)")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(trl_real.DTYPES), default=None, help="one dtype alone, with --model")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: this process' own time, where others slow the wall clock; with --model")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=trl_real.PAIRS, help="of its batch (default: 2)")
    parser.add_argument("--max-length", type=int, default=trl_real.LONGEST, help="tokens of a sequence (default: 384)")
    parser.add_argument("--checkpointing", action="store_true",
                        help="with gradient checkpointing, which is TRL's default; with --model")  # fmt: skip
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME",
                        help="some of them alone; TRL is always there")  # fmt: skip
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: as it takes them)")
    parser.add_argument("--json", metavar="FILE", default=None, help="write all times there")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.model is None and (options.data is not None or options.dtype is not None):
        parser.error("--data and --dtype go with --model")
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model: {options.model} is not the folder of a model, it has no config.json")
    if options.pairs < 1 or options.max_length < 2:
        parser.error(f"--pairs must be at least 1 and --max-length 2, got {options.pairs} and {options.max_length}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    missing = [name for name in ("trl", "transformers", "datasets") if not contenders.installed(name)]
    if missing:
        parser.error(f"needs {', '.join(missing)}: pip install 'qkernels[trl]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    from datasets import disable_progress_bars

    disable_progress_bars()
    facts = measure.machine()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"load average: {os.getloadavg()[0]:.2f}")
    results: list[dict[str, Any]] = []
    if options.model is not None:
        for dtype in [options.dtype] if options.dtype else trl_real.DTYPES:
            found = trl_real.compare(
                options.model,
                dtype,
                options.data,
                options.rounds,
                with_liger(options.contenders),
                clock=options.clock,
                pairs=options.pairs,
                longest=options.max_length,
                checkpointing=options.checkpointing,
            )
            print("\n" + trl_real.table(found), flush=True)
            results.append(found)
    for case in CASES if options.model is None else []:
        if case.lora and not contenders.installed("peft"):
            print(f"\n{case.name}: left out, peft is not installed")
            continue
        seconds = compare(case, options.rounds)
        positions = 2 * case.pairs * (case.prompt + case.answer)
        scored = 2 * case.pairs * case.answer
        print(f"\n{case.name}: V = {case.vocab}, H = {case.hidden}, {positions} positions, {scored} scored, fp32")
        print(f"  {'':20} {'median':>9} {'min':>9} {'max':>9}   of TRL's")
        stock = statistics.median(seconds["TRL"])
        for name, times in seconds.items():
            median = statistics.median(times)
            figures = " ".join(f"{value * 1e3:6.0f} ms" for value in (median, min(times), max(times)))
            print(f"  {name:20} {figures}   {median / stock:.2f}")
        results.append({"case": asdict(case), "seconds": seconds})
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "results": results}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
