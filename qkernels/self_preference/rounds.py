"""Rounds of making preference pairs and training on them; a folder that a stopped run can be gone on with.

OUT/settings.json            what the rounds were begun with
OUT/round-1/pairs.jsonl      the pairs of the first round, as `qkernels score` and `qkernels train` read them
OUT/round-1/model/           the model after it, with its tokenizer
OUT/round-1/round.json       its figures; the round counts once this file is there
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..data import as_preferences
from ..integrations.training import PreferenceTraining, TrainError
from ..report.progress import Progress, quiet_transformers
from ..score.encode import Encoder
from ..score.options import ScoreError
from ..score.rows import in_memory
from ..text.characters import first_line
from ..text.lengths import position_limit
from .files import as_prompts, digest, read_json_object, write_whole
from .options import SelfPreferenceError, check_number, check_sampling, differing
from .pairs import Pairs, build_pairs, nowhere

SETTINGS, PAIRS, FIGURES, ROUND = "settings.json", "pairs.jsonl", "pairs.json", "round.json"
_SAMPLING = {"samples": 4, "temperature": 0.7, "max_new_tokens": 256, "min_gap": 0.0}  # of build_pairs
_LOGGED = 0.1  # of the steps of a training, from one line of its progress to the next
Trainer = Callable[[Any, Any, list[dict[str, Any]], int], Any]


class Round(NamedTuple):
    """One round's figures.

    number: from 1.
    pairs, skipped: prompts that gave a pair, and those that did not.
    mean_score: of the answers that the model wrote, by its own judgement, before this round's training.
    mean_gap: between its best and its worst answer.
    """

    number: int
    pairs: int
    skipped: int
    mean_score: float
    mean_gap: float


class Improvement(NamedTuple):
    """What `improve` returns.

    model: after the last round.
    rounds: the figures of every round.
    folder: where its pairs and models are.
    """

    model: Any
    rounds: list[Round]
    folder: Path


def improve(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    rounds: int = 1,
    trainer: Trainer | None = None,
    judge: Callable[[Any, Any], Any] | None = None,
    beta: float = 0.1,
    learning_rate: float = 1e-6,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    resume: bool = False,
    progress: TextIO | None = None,
    **sampling: Any,
) -> Improvement:
    """Let a model make preference pairs and train on them, round after round.

    In each round the model of the round before writes, judges and is the reference of the training (Garg et al. 2025
    train one round). A stopped run keeps its finished rounds and the pairs that it had made; `resume=True` goes on.

    Args:
        model, tokenizer, prompts: as in `build_pairs`. The model is trained in place.
        out: folder to create; see above for what is in it.
        rounds: how many, 1 or more. A finished run is gone on with by a larger number and `resume=True`.
        trainer: a function of model, tokenizer, pairs and the round's seed that returns the trained model; None for
            `train_dpo` with the options below.
        judge: a function of the round's model and the tokenizer that returns what `build_pairs` takes as `judge`; None
            for the model's own Yes or No.
        beta, learning_rate, epochs, batch_size: of `train_dpo`.
        seed: of samples and training; each round has its own.
        resume: go on with what is in `out`.
        progress: where to show progress; None for nowhere.
        sampling: samples, temperature, max_new_tokens and min_gap of `build_pairs`.

    Raises:
        SelfPreferenceError: `out` holds rounds and resume is not set, or rounds of other settings; as `build_pairs`.
        TypeError, ValueError: an option of the wrong type or out of range.
        ModuleNotFoundError: training needs trl, which is not installed.
    """
    asked = as_prompts(prompts)
    check_number("rounds", rounds, 1, whole=True)
    for name, value in (("beta", beta), ("learning_rate", learning_rate)):
        check_number(name, value, 0, above=True)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_number(name, value, 1, whole=True)
    unknown = sorted(set(sampling) - set(_SAMPLING))
    if unknown:
        raise TypeError(f"improve got unknown options: {', '.join(unknown)}")
    sampling = {**_SAMPLING, **sampling}
    check_sampling(**sampling, seed=seed)
    training: dict[str, Any] = {
        "beta": beta, "learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size
    }  # fmt: skip
    settings = {
        **training, **sampling, "seed": seed, "prompts": digest([list(prompt) for prompt in asked]),
        "model": f"{type(model).__name__} of {sum(p.numel() for p in model.parameters())} parameters",
        "trainer": "train_dpo" if trainer is None else "given", "judge": "own" if judge is None else "given",
    }  # fmt: skip
    folder, say = Path(out), Progress(progress).say if progress is not None else lambda text: None
    done = _begin(folder, settings, resume)
    if done:
        say(f"{len(done)} finished round{'s' if len(done) > 1 else ''} found")
        model = _reload(model, folder / f"round-{len(done)}" / "model")
    for number in range(len(done) + 1, rounds + 1):
        place = folder / f"round-{number}"
        pairs = _finished_pairs(place)
        if pairs is None:
            pairs = build_pairs(
                model, tokenizer, asked, judge=None if judge is None else judge(model, tokenizer),
                out=place / PAIRS, seed=seed + number, resume=True, progress=progress,
                name=f"round {number}: prompts", **sampling,
            )  # fmt: skip
            figures = {name: value for name, value in pairs._asdict().items() if name != "records"}
            write_whole(place / FIGURES, json.dumps(figures, indent=2) + "\n")
        say(f"  round {number}: {len(pairs.records)} pairs, mean score {pairs.mean_score:.3f}; training")
        if trainer is None:
            model = train_dpo(model, tokenizer, pairs.records, seed + number, progress=progress, **training)
        else:
            model = trainer(model, tokenizer, pairs.records, seed + number)
        shutil.rmtree(place / "model", ignore_errors=True)
        with quiet_transformers():
            model.save_pretrained(place / "model")
            tokenizer.save_pretrained(place / "model")
        done.append(Round(number, len(pairs.records), pairs.skipped, pairs.mean_score, pairs.mean_gap))
        write_whole(place / ROUND, json.dumps(done[-1]._asdict(), indent=2) + "\n")
    return Improvement(model, done, folder)


def _finished_pairs(place: Path) -> Pairs | None:
    """The pairs of a round that was stopped while it trained; None if they are not complete."""
    figures = read_json_object(place / FIGURES)
    if figures is None or not (place / PAIRS).is_file():
        return None
    lines = (place / PAIRS).read_text(encoding="utf-8").split("\n")  # model text may hold what splitlines() parts at
    return Pairs([json.loads(line) for line in lines if line], **figures)


def _begin(folder: Path, settings: dict[str, Any], resume: bool) -> list[Round]:
    """The finished rounds of a folder that may be written to.

    Raises:
        SelfPreferenceError: it may not.
    """
    before = read_json_object(folder / SETTINGS)
    if folder.exists() and not folder.is_dir():
        raise SelfPreferenceError(f"{folder}: exists and is not a folder")
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise SelfPreferenceError(f"{folder}: holds other things than rounds; choose a folder that is new or empty")
        write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        return []
    if not resume:
        raise SelfPreferenceError(
            f"{folder}: holds rounds of an earlier run: go on with them (resume=True, --resume), or choose another"
            " folder"
        )
    other = differing(before, settings)
    if other:
        raise SelfPreferenceError(
            f"{folder}: its rounds were made with other settings: {other}. Go on with the same ones, or choose another"
            " folder; the finished rounds stay as they are"
        )
    done: list[Round] = []
    while (figures := read_json_object(folder / f"round-{len(done) + 1}" / ROUND)) is not None:
        done.append(Round(**figures))
    return done


def _reload(model: Any, folder: Path) -> Any:
    """The weights of a finished round in the model that was given; an adapter of PEFT alone if it is one.

    In the dtype that they were saved in: 16-bit weights would round away what a round has changed.
    """
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SelfPreferenceError(f"{folder}: the finished round's weights are missing; delete that round's folder")
    state = {name: value for file in files for name, value in load_file(file).items()}
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    for parameter in model.parameters():
        if parameter.requires_grad and len(dtypes) == 1:
            parameter.data = parameter.data.to(*dtypes)
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state)
        return model
    wrong = model.load_state_dict(state, strict=False)
    tied = {key for name in ("all_tied_weights_keys", "_tied_weights_keys") for key in getattr(model, name, None) or ()}
    missing = set(wrong.missing_keys) - tied
    if missing or wrong.unexpected_keys:
        raise SelfPreferenceError(f"{folder}: these are not the weights of the model that was given")
    return model


def train_dpo(
    model: Any,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    seed: int = 0,
    *,
    beta: float = 0.1,
    learning_rate: float = 1e-6,
    epochs: int = 1,
    batch_size: int = 8,
    progress: TextIO | None = None,
) -> Any:
    """Train a model on pairs with DPO (`TokenDPOTrainer`), the model as it comes as the reference.

    Args:
        model: trained in place; a PEFT model is its own reference, of another one a copy is made.
        tokenizer: its tokenizer.
        records: of `build_pairs`.
        seed: of the order of the pairs.
        beta: strength of the KL constraint.
        learning_rate: peak, of AdamW, with a linear decay.
        epochs: passes over the pairs.
        batch_size: pairs per step.
        progress: where to say what the training came to; None for nowhere.

    Returns:
        The model, in eval mode. A model with 16-bit weights is trained, and comes back, in fp32: steps of AdamW at such
        learning rates are less than half a unit in the last place of bf16, and would change nothing.

    Raises:
        SelfPreferenceError: a pair that the model cannot take, a training that diverged, memory that does not suffice.
        ModuleNotFoundError: trl or datasets is not installed.
    """
    import copy
    import tempfile

    import torch

    from ..core.memory import collect

    try:
        from datasets import disable_progress_bars, enable_progress_bars
        from datasets.utils import are_progress_bars_disabled

        from ..integrations.trl import TokenDPOConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs {error.name}: pip install 'qkernels[trl]'", name=error.name
        ) from None
    limit = position_limit(model)
    device, half = next(model.parameters()).device, False
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data, half = parameter.data.float(), True
    # After that: a reference in 16 bits would differ from the policy before the first step.
    reference = None if hasattr(model, "peft_config") else copy.deepcopy(model).eval()
    bf16 = half and device.type == "cuda" and torch.cuda.is_bf16_supported()  # autocast; the weights are in fp32
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            args = TokenDPOConfig(
                output_dir=folder, beta=beta, learning_rate=learning_rate, num_train_epochs=epochs,
                per_device_train_batch_size=batch_size, seed=seed % 2**32, save_strategy="no", report_to=[],
                logging_steps=_LOGGED, disable_tqdm=True, use_cpu=device.type == "cpu", bf16=bf16, log_level="error",
                gradient_checkpointing=False, max_length=None,
            )  # fmt: skip
            _ = args.device  # sets the number of GPUs: this trains on one
            args._n_gpu = min(1, args.n_gpu)
            training = PreferenceTraining(
                Progress(progress if progress is not None else nowhere()),
                "training",
                model=model,
                ref_model=reference,
                args=args,
                train_dataset=in_memory(Encoder(tokenizer, "auto", limit, limit), as_preferences(records)),
                processing_class=tokenizer,
            )  # fmt: skip
            training.run()
    except torch.OutOfMemoryError as error:
        raise SelfPreferenceError(f"out of memory ({first_line(error)}); a smaller batch_size takes less") from error
    except (ScoreError, TrainError) as error:
        raise SelfPreferenceError(str(error)) from error
    finally:
        if shown:
            enable_progress_bars()
    trainer = training.trainer
    if progress is not None:
        done, loss = trainer.state.global_step, trainer.state.log_history[-1]["train_loss"]
        Progress(progress).say(f"  trained {done} steps, mean loss {loss:.4f}")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    del trainer, training, reference
    collect()  # the reference and the optimizer's state, before the next round samples
    return trained.to(device)
