"""Samples of a model, scored by the model: the best and the worst answer to each prompt."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..report.progress import Progress
from ..text.lengths import position_limit
from .files import Prompt, as_lines, as_prompts, digest, write_whole
from .options import SelfPreferenceError, check_sampling, differing

Judge = Callable[[Sequence[str], Sequence[str], Sequence[Any]], Sequence[float]]


class Pairs(NamedTuple):
    """What `build_pairs` made.

    records: one per prompt that gave a pair, in their order: {"prompt", "chosen", "rejected", "chosen_score",
        "rejected_score"}, and "category" where the prompt has one. `qkernels.data` reads them.
    skipped: prompts whose answers did not differ enough, or of which fewer than two were not blank.
    mean_score: of all answers that were scored.
    mean_gap: between best and worst, over all prompts with two answers or more.
    """

    records: list[dict[str, Any]]
    skipped: int
    mean_score: float
    mean_gap: float


def build_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[Any],
    *,
    samples: int = 4,
    temperature: float = 0.7,
    max_new_tokens: int = 256,
    judge: Any = None,
    min_gap: float = 0.0,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: TextIO | None = None,
    name: str = "prompts",
) -> Pairs:
    """Let a model write several answers to each prompt and judge them itself; the best and the worst make a pair.

    Each prompt has its own random numbers, made of `seed` and its place, so that a run that was stopped and resumed
    gives the pairs of one that was not. The model's `generation_config` does not matter but for its end tokens.

    Args:
        model: a causal language model of transformers with `generate`; instruction-tuned, or its judgement is worth
            little. It is left in the mode it came in.
        tokenizer: its tokenizer. Where it has a chat template, prompts are asked as a user's message.
        prompts: strings; or objects with "prompt" and perhaps "category" (see `read_prompts`).
        samples: answers per prompt, 2 or more.
        temperature: of the sampling, above 0; no truncation.
        max_new_tokens: longest answer.
        judge: None for the model itself as `PreferenceClassifier(model, tokenizer)`; another `PreferenceClassifier`,
            such as `PreferenceClassifier.published(model, tokenizer)`; or a function of the lists of prompts,
            responses and categories that returns one number each, of which higher is better.
        min_gap: a pair is kept if its scores differ by more than this.
        seed: of the samples.
        out: JSON lines to write, for `qkernels score` and `qkernels train`; until it is complete, what there is stands
            in `out` + ".partial". None writes nothing.
        resume: go on with what a stopped run has left there, instead of refusing it.
        progress: where to show progress, such as `sys.stderr`; None for nowhere.
        name: of what is counted there.

    Raises:
        SelfPreferenceError: a prompt that leaves the model no room for an answer, no prompt that gave a pair, a stopped
            run with other settings, a judge whose scores do not fit; the text says what to do.
        TypeError, ValueError: an option of the wrong type or out of range; a tokenizer in which neither Yes nor No is a
            token of its own.
    """
    asked = as_prompts(prompts)
    check_sampling(samples, temperature, max_new_tokens, min_gap, seed)
    scores = _judge(judge, model, tokenizer, asked)
    texts = [rendered(tokenizer, prompt) for prompt in asked]
    _check_lengths(model, texts, asked, max_new_tokens)
    settings = {
        "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens, "min_gap": min_gap,
        "seed": seed, "prompts": digest([list(prompt) for prompt in asked]),
    }  # fmt: skip
    kept = _Partial(None if out is None else Path(out), settings, resume)
    found = kept.lines
    with Progress(progress or nowhere()).phase(name, len(asked)) as phase, kept:
        phase.step(steps=len(found))
        for number in range(len(found), len(asked)):
            prompt = asked[number]
            answers = _sample(model, tokenizer, texts[number], samples, temperature, max_new_tokens, (seed, number))
            distinct = [answer for answer in dict.fromkeys(answers) if answer.strip()]
            values = _scores_of(scores, prompt, distinct)
            found.append(_line(prompt, distinct, values, min_gap))
            kept.add(found[-1])
            pairs = sum("pair" in line for line in found)
            phase.step(f"{pairs} pairs")
    records = [line["pair"] for line in found if "pair" in line]
    if not records:
        raise SelfPreferenceError(_no_pair(found, min_gap))
    if out is not None:
        write_whole(Path(out), as_lines(records))
        kept.remove()
    every = [value for line in found for value in line["scores"]]
    gaps = [line["gap"] for line in found if line["gap"] is not None]
    return Pairs(records, len(found) - len(records), _mean(every), _mean(gaps))


def _line(prompt: Prompt, answers: Sequence[str], values: Sequence[float], min_gap: float) -> dict[str, Any]:
    """What is kept of a prompt: scores, their largest difference, and the pair if there is one."""
    line: dict[str, Any] = {"scores": list(values), "gap": max(values) - min(values) if len(values) > 1 else None}
    if line["gap"] is not None and line["gap"] > min_gap:
        best, worst = values.index(max(values)), values.index(min(values))
        line["pair"] = {
            "prompt": prompt.text, "chosen": answers[best], "rejected": answers[worst],
            "chosen_score": values[best], "rejected_score": values[worst],
        }  # fmt: skip
        if prompt.category is not None:
            line["pair"]["category"] = prompt.category
    return line


def _no_pair(found: Sequence[dict[str, Any]], min_gap: float) -> str:
    gaps = [line["gap"] for line in found if line["gap"] is not None]
    if not gaps:
        return (
            f"none of {len(found)} prompts gave two different answers: raise temperature, samples or max_new_tokens, or"
            " check that the model writes anything to such prompts"
        )
    return (
        f"none of {len(found)} prompts gave two answers whose scores differ by more than min_gap={min_gap} (the largest"
        f" difference is {max(gaps):.3g}): lower min_gap, or raise temperature or samples"
    )


def rendered(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, by the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt.text)["input_ids"])


def _check_lengths(model: Any, texts: Sequence[Sequence[int]], prompts: Sequence[Prompt], new: int) -> None:
    limit = position_limit(model)
    for number, text in enumerate(texts):
        if limit is not None and len(text) + new > limit:
            raise SelfPreferenceError(
                f"prompt {number} ({prompts[number].text[:40]!r}) has {len(text)} tokens, which with"
                f" max_new_tokens={new} is more than the {limit} that the model takes: shorten the prompt, or lower"
                " max_new_tokens"
            )


def _judge(judge: Any, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Judge:
    from ..preference_classifier import PreferenceClassifier

    if judge is None:
        judge = PreferenceClassifier(model, tokenizer)
    if isinstance(judge, PreferenceClassifier):
        classifier = judge
        several = not isinstance(classifier.template, str)
        for number, prompt in enumerate(prompts if several else ()):
            try:
                classifier.question("", "", prompt.category)
            except ValueError as error:
                raise SelfPreferenceError(f"prompt {number}: {error}") from None
        return lambda prompts, responses, categories: classifier.scores(
            prompts, responses, list(categories) if several else None
        ).tolist()
    if not callable(judge):
        raise TypeError(f"judge must be a PreferenceClassifier or a function, got {type(judge).__name__}")
    return judge  # type: ignore[no-any-return]


def _scores_of(judge: Judge, prompt: Prompt, answers: Sequence[str]) -> list[float]:
    if not answers:
        return []
    count = len(answers)
    values = [float(value) for value in judge([prompt.text] * count, answers, [prompt.category] * count)]
    if len(values) != count or any(value != value for value in values):
        raise SelfPreferenceError(f"judge must return {count} numbers, none of them NaN, for {count} responses")
    return values


def _sample(
    model: Any, tokenizer: Any, ids: Sequence[int], count: int, temperature: float, new: int, place: tuple[int, int]
) -> list[str]:
    """`count` answers, drawn with random numbers that depend on the seed and the prompt's number alone."""
    import torch

    from ..integrations.transformers.generation import plain_generation

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = torch.tensor([list(ids)], device=device)
    training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), plain_generation(model):
            # torch's generator on the CPU takes 32 bits of a seed.
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{place[0]} {place[1]}".encode()).digest()[:4], "big"))
            written = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=temperature,
                top_k=0, top_p=1.0, num_beams=1, num_return_sequences=count,
                max_new_tokens=new, pad_token_id=pad if pad is not None else 0,
            )  # fmt: skip
    finally:
        model.train(training)
    answers = written[:, len(ids) :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


class _Partial:
    """The lines of a file that is not complete yet, the settings in the first; a context while it is written."""

    def __init__(self, out: Path | None, settings: dict[str, Any], resume: bool):
        self.path = None if out is None else out.with_name(out.name + ".partial")
        self.lines: list[dict[str, Any]] = []
        self._settings, self._file = settings, None
        if self.path is None or not self.path.exists():
            return
        if not resume:
            raise SelfPreferenceError(
                f"{self.path}: a stopped run has left this file: go on with it (resume=True, --resume), or delete it"
            )
        whole = self.path.read_text(encoding="utf-8").split("\n")[:-1]  # a line that was cut off has no end
        lines = [json.loads(line) for line in whole]
        if lines:
            other = differing(lines[0], settings)
            if other:
                raise SelfPreferenceError(
                    f"{self.path}: was begun with other settings: {other}. Go on with the same ones, or delete the file"
                )
            self.lines = lines[1:]

    def __enter__(self) -> _Partial:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, as_lines([self._settings, *self.lines]))
            self._file = self.path.open("a", encoding="utf-8")  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(as_lines([line]))
            self._file.flush()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def nowhere() -> TextIO:
    """A stream that keeps nothing."""
    return open(os.devnull, "w", encoding="utf-8")
