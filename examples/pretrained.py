"""A pretrained model in the experiments: data in its tokens, and trainings that go on where they stopped.

Trainings run in `TokenDPOTrainer` and TRL's `SFTTrainer`. What one of them yields, the weights of the layers that it
trained, is kept in a folder beside the results, by a name and a hash of everything that it was made with; so the
experiments share trainings, and a command that was interrupted goes on from the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from common import Options
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from qkernels.data import Message, Preference, read_preferences
from qkernels.report.progress import Progress
from qkernels.score.encode import EncodedAnswer, Encoder
from qkernels.score.tokens import Answer, TokenScorer

T = TypeVar("T")
Encoded = list[tuple[EncodedAnswer, EncodedAnswer]]
SAVE_EVERY = 8  # steps between checkpoints


class Training(NamedTuple):
    """Sizes of a training. rate: peak of the learning rate; layers: how many of the last layers are trained."""

    steps: int
    pairs: int
    rate: float
    layers: int

    def of(self, pairs: Sequence[T], seed: int) -> list[T]:
        """Those that `steps` steps of `pairs` pairs read: pass after pass in random orders."""
        if not pairs:
            raise SystemExit("no pairs are left to train on; the file of --pairs needs more, or longer answers")
        rng = random.Random(f"order {seed}")
        read: list[T] = []
        while len(read) < self.steps * self.pairs:
            read += rng.sample(list(pairs), len(pairs))
        return read[: self.steps * self.pairs]


class Study:
    """A model folder and a folder of what was made from it.

    Args:
        chosen: the command line; its `model` is a folder in transformers format.
        max_length: longer sequences are cut to it.
    """

    def __init__(self, chosen: Options, max_length: int):
        assert chosen.model is not None
        self.chosen, self.max_length, self.seed = chosen, max_length, chosen.seed
        self.folder = chosen.out / f"{chosen.model.name}-trainings"
        self.tokenizer = AutoTokenizer.from_pretrained(chosen.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.encoder = Encoder(self.tokenizer)
        self.progress = Progress(sys.stderr)

    # --- models ---------------------------------------------------------------------------------------------------

    def model(self, training: str | None = None) -> PreTrainedModel:
        """The pretrained model, or what a training has made of it; frozen, in eval mode, in fp32."""
        from safetensors.torch import load_file

        model = AutoModelForCausalLM.from_pretrained(self.chosen.model, dtype=torch.float32)
        if training is not None:
            model.load_state_dict(load_file(self._weights(training)), strict=False)
        return model.requires_grad_(False).eval()

    def _weights(self, training: str) -> Path:
        return self.folder / training / "trained.safetensors"

    def once(self, name: str, made_with: Any, compute: Callable[[], Any]) -> Any:
        """A result (what JSON can hold) that is computed once and kept."""
        path = self.folder / f"{_named(name, made_with)}.json"
        if not path.exists():
            result = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".new")
            beside.write_text(json.dumps(result), encoding="utf-8")
            beside.rename(path)
        return json.loads(path.read_text(encoding="utf-8"))

    # --- data -----------------------------------------------------------------------------------------------------

    def encode(self, pairs: Sequence[Preference]) -> Encoded:
        """Token ids of the answers, cut at their ends to `max_length`."""
        encoded = self.encoder.pairs(dict(enumerate(pairs)))
        return [(self._cut(chosen), self._cut(rejected)) for chosen, rejected in encoded]

    def _cut(self, answer: EncodedAnswer) -> EncodedAnswer:
        room = max(0, self.max_length - len(answer.prompt))
        return answer._replace(ids=answer.ids[:room], texts=answer.texts[:room], offsets=answer.offsets[:room])

    def scores(self, model: PreTrainedModel, answers: Sequence[EncodedAnswer], output: str = "logps") -> list[Any]:
        """A per-token result of `qkernels.TokenStats` for each answer, as arrays."""
        scorer = TokenScorer(model, outputs=(output,))
        found = dict(scorer.scores([Answer(answer.prompt, answer.ids) for answer in answers]))
        return [found[i][output] for i in range(len(answers))]

    def real_pairs(self, longest_prompt: int, count: int) -> list[Preference]:
        """Pairs of the file, in random order, with their prompts cut so that more of them fit a small computer.

        Args:
            longest_prompt: characters that are kept of a prompt: the end of its last message, from a word on.
            count: how many.
        """
        assert self.chosen.pairs is not None
        pairs = read_preferences(self.chosen.pairs).pairs
        random.Random(f"pairs {self.seed}").shuffle(pairs)
        pairs = [pair._replace(prompt=_end_of(pair.prompt, longest_prompt)) for pair in pairs]
        kept = [
            pair for pair, encoded in zip(pairs, self.encode(pairs), strict=True)
            if min(len(answer.ids) for answer in encoded) >= 8
        ]  # fmt: skip
        if len(kept) < count:
            raise SystemExit(
                f"{self.chosen.pairs}: {len(kept)} of {len(pairs)} pairs have answers of at least 8 tokens; this"
                f" experiment needs {count}"
            )
        return kept[:count]

    # --- trainings ------------------------------------------------------------------------------------------------

    def sft(self, name: str, pairs: Sequence[Preference], size: Training, start: str | None = None) -> str:
        """Fine-tune on the chosen answers; the name under which `model` has the result."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from qkernels.integrations.trl import patch_trl

        read = size.of(pairs, self.seed)
        training = _named(f"{name}-sft", (read, size, start, self.max_length, self.seed))
        if self._weights(training).exists():
            return training
        answers = [chosen for chosen, _ in self.encode(read)]
        rows = [
            {"input_ids": a.prompt + a.ids, "completion_mask": [0] * len(a.prompt) + [1] * len(a.ids)} for a in answers
        ]
        model = self._trainable(start, size.layers)
        options = self._options(training, size, completion_only_loss=True, max_length=self.max_length)
        with patch_trl():
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**options),
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
            )
            self._train(trainer, training, start)
        return training

    def dpo(
        self,
        name: str,
        pairs: Sequence[Preference],
        size: Training,
        start: str | None,
        beta: float,
        evaluate: tuple[int, Callable[[PreTrainedModel, int], Any]] | None = None,
    ) -> tuple[str, list[Any]]:
        """Preference training from `start`, which is the reference too.

        Args:
            name: of the training.
            pairs: to learn from.
            size: how long.
            start: name of a training; None for the pretrained model.
            beta: strength of the KL constraint.
            evaluate: every how many steps what is to be called with the policy and the step; also before the first.

        Returns:
            The name under which `model` has the result, and what the evaluations returned.
        """
        from datasets import Dataset

        from qkernels.integrations.trl import TokenDPOConfig, TokenDPOTrainer

        read = size.of(pairs, self.seed)
        made_with = (read, size, start, beta, self.max_length, self.seed, None if evaluate is None else evaluate[0])
        training = _named(f"{name}-dpo", made_with)
        recorded = _Recorder(self.folder / training / "evaluations.json", size.steps, evaluate)
        if self._weights(training).exists():
            return training, recorded.values()
        model = self._trainable(start, size.layers)
        rows = [
            {**record, "ref_chosen_token_logps": logps[0], "ref_rejected_token_logps": logps[1]}
            for record, logps in zip(map(self._record, read), self._reference_logps(model, read, start), strict=True)
        ]
        options = self._options(
            training, size, beta=beta, max_length=self.max_length, padding_free=True, precompute_ref_log_probs=True
        )
        trainer = TokenDPOTrainer(
            model=model,
            args=TokenDPOConfig(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[recorded],
        )
        self._train(trainer, training, start)
        return training, recorded.values()

    def _record(self, pair: Preference) -> dict[str, Any]:
        """A pair as TRL takes it."""
        if self.encoder.chat:
            return {
                "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
        return {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected}

    def _reference_logps(
        self, model: PreTrainedModel, pairs: Sequence[Preference], start: str | None
    ) -> list[list[list[float]]]:
        """The reference's log-prob of each token of both answers, NaN where an answer is cut; each answer once."""
        whole = self.encoder.pairs(dict(enumerate(pairs)))
        answers = [answer for pair in whole for answer in pair]
        unlike = {_named("answer", (a.prompt, a.ids)): a for a in answers}

        def compute() -> dict[str, list[float]]:
            self.progress.say(f"{len(unlike)} answers under the reference")
            cut = [self._cut(answer) for answer in unlike.values()]
            return {key: [float(x) for x in logps] for key, logps in zip(unlike, self.scores(model, cut), strict=True)}

        known = self.once("reference-logps", (sorted(unlike), start, self.max_length), compute)
        padded = []
        for answer in answers:
            logps = known[_named("answer", (answer.prompt, answer.ids))]
            padded.append(logps + [float("nan")] * (len(answer.ids) - len(logps)))
        return [list(pair) for pair in zip(padded[::2], padded[1::2], strict=True)]

    def _trainable(self, start: str | None, layers: int) -> PreTrainedModel:
        model = self.model(start)
        for layer in model.model.layers[-layers:]:
            layer.requires_grad_(True)
        return model

    def _options(self, training: str, size: Training, **more: Any) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / training),
            "max_steps": size.steps,
            "per_device_train_batch_size": size.pairs,
            "learning_rate": size.rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, size.steps // 8),
            "adam_beta2": 0.98,
            "seed": self.seed,
            "save_strategy": "steps",
            "save_steps": SAVE_EVERY,
            "save_total_limit": 1,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **more,
        }

    def _train(self, trainer: Any, training: str, start: str | None) -> None:
        """Train, from the last checkpoint if there is one, and keep the trained weights alone."""
        from safetensors.torch import load_file, save_file
        from transformers.trainer_utils import get_last_checkpoint

        folder = self.folder / training
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        self.progress.say(f"{training}" + (f", from {Path(last).name}" if last else ""))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=last)
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
        trained = {} if start is None else load_file(self._weights(start))  # it may have trained other layers too
        trained |= {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "new.safetensors")
        (folder / "new.safetensors").rename(self._weights(training))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def log(self, training: str) -> list[dict[str, Any]]:
        """What TRL logged at each step of a training."""
        entries = json.loads((self.folder / training / "log.json").read_text(encoding="utf-8"))
        return [entry for entry in entries if "loss" in entry]


class _Recorder(TrainerCallback):
    """Evaluates while a training runs, and keeps the results in a file, so that an interrupted one has them too."""

    def __init__(self, path: Path, steps: int, evaluate: tuple[int, Callable[[PreTrainedModel, int], Any]] | None):
        self.path, self.steps = path, steps
        self.every, self.evaluate = evaluate or (0, None)

    def values(self) -> list[Any]:
        known = self._known()
        return [known[step] for step in sorted(known, key=int)]

    def _known(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def _at(self, step: int, model: PreTrainedModel) -> None:
        if self.evaluate is None or (step % self.every and step != self.steps):
            return
        training = model.training
        model.eval()
        known = {**self._known(), str(step): self.evaluate(model, step)}
        model.train(training)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(known), encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self._at(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._at(state.global_step, model)


def _named(name: str, made_with: Any) -> str:
    """The name and a hash of everything that something was made with."""
    return f"{name}-{hashlib.sha256(repr(_told(made_with)).encode()).hexdigest()[:8]}"


def _told(value: Any) -> Any:
    """Plain tuples; of a pair its texts, whatever else this version of the package notes."""
    if isinstance(value, Preference):
        return tuple((m.role, m.content) for m in value.prompt), value.chosen, value.rejected
    return tuple(map(_told, value)) if isinstance(value, (tuple, list)) else value


def _end_of(prompt: Sequence[Message], longest: int) -> tuple[Message, ...]:
    """The end of the last message, from the beginning of a word on."""
    last = prompt[-1].content
    end = last if len(last) <= longest else last[-longest:].partition(" ")[2] or last[-longest:]
    return (Message("user", end),)


# --- natural text with planted errors ------------------------------------------------------------------------------

_WORD = re.compile(r"(?<![\w'])(?:[A-Za-z]{4,}|\d+)(?![\w'])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|\n+")
_TWO_ERRORS = 0.25  # share of the passages


def passages(pairs: Sequence[Preference], shortest: int, longest: int) -> list[Preference]:
    """The beginnings of the pairs' answers, whole sentences of `shortest` to `longest` characters together.

    Of both sides: here an answer is a piece of natural text. Those in other alphabets are left out. As
    `Preference`s whose two answers are still the same.
    """
    found = []
    for pair in pairs:
        for answer in dict.fromkeys((pair.chosen, pair.rejected)):
            ends = [m.start() for m in _SENTENCE_END.finditer(answer)] + [len(answer)]
            end = max((e for e in ends if e <= longest), default=0)
            text = answer[:end].strip()
            if len(text) >= shortest and sum(map(str.isascii, text)) >= 0.97 * len(text):
                found.append(Preference(pair.prompt, text, text))
    return found


def _kind(word: str) -> tuple[str, ...]:
    """Words that can stand for each other without making the sentence look odd at first sight: the same case and
    ending, numbers of the same length."""
    if word.isdigit():
        return ("number", str(len(word)))
    return ("upper" if word[0].isupper() else "lower", word[-2:].lower())


def plant_errors(rng: random.Random, texts: Sequence[Preference]) -> list[Preference]:
    """Pairs of a text and the same with one or two of its words replaced by words of other texts, of the same kind."""
    pool: dict[tuple[str, ...], set[str]] = {}
    for text in texts:
        for match in _WORD.finditer(text.chosen):
            pool.setdefault(_kind(match[0]), set()).add(match[0])
    planted = []
    for text in texts:
        words = [m for m in _WORD.finditer(text.chosen) if m.start() > 0 and len(pool[_kind(m[0])]) > 1]
        count = 2 if rng.random() < _TWO_ERRORS else 1
        if len(words) <= 2 * count:
            continue
        places = sorted(rng.sample(range(0, len(words), 2), count))  # never neighbours
        wrong, spans, at = "", [], 0
        for word in (words[i] for i in places):
            other = rng.choice(sorted(pool[_kind(word[0])] - {word[0]}))
            wrong += text.chosen[at : word.start()]
            spans.append((len(wrong), len(wrong) + len(other)))
            wrong, at = wrong + other, word.end()
        planted.append(Preference(text.prompt, text.chosen, wrong + text.chosen[at:], tuple(spans)))
    return planted
