"""A comparison from prompts to a win rate: answers, verdicts in both orders, figures; what is finished is kept."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from .._version import __version__
from ..core.memory import collect
from ..intervals import Interval, bootstrap_mean
from ..records.pairs import DataError, Unusable, conversation
from ..records.sources import Source
from ..report import folders
from ..report.progress import Progress, quiet_transformers
from ..score import models
from ..score.files import as_json
from ..score.folder import RunLock
from ..score.options import ScoreError
from ..text.characters import first_line
from ..text.hub import is_hub_name
from .answers import Answer, Generator, Prompt, as_records, blocks, key_of, read_answers, read_prompts, text_of
from .folder import ANSWERS, FIGURES, QUESTIONS, REPORT, VERDICTS, Folder, as_lines
from .judges import JUDGE_TEMPLATE, ModelJudge, Scorer, question_text
from .options import JudgeError, JudgeOptions
from .page import make_page
from .statistics import Verdict, WinRate, is_close_to_half, win_rate

_BLOCK = 16  # questions after which verdicts of a model are written
_ORDERS = ("ab", "ba")


class Comparison(NamedTuple):
    """What is judged: prompts, and by side the answer to each."""

    prompts: list[Prompt]
    answers: dict[str, list[Answer]]


def run_judge(options: JudgeOptions, stream: TextIO | None = None) -> dict[str, Any]:
    """Compare two sides on a set of prompts, into a folder.

    Args:
        options: what to do.
        stream: where progress goes; standard error by default.

    Returns:
        The contents of `judge.json`; without a judge, what was written for one.

    Raises:
        JudgeError: an option, the folder, a model, the scorer or a verdict stands in the way.
        DataError: a file of prompts, answers or verdicts cannot be used.
        On these and on any other exception, the answers and verdicts that are finished are in the folder, and a run
        with `resume` goes on from there.
    """
    options.check()
    _require_packages(options)
    progress = Progress(stream or sys.stderr)
    try:
        with RunLock(options.out) as lock:
            folder = Folder(options.out, lock)
            folder.refuse(options.resume, options.overwrite)
            _spare_inputs(options)
            _check_models(options)
            scorer = None if options.scorer is None else Scorer(options.scorer)
            prompts, files = _prompts(options, progress)
            settings = _settings(options, scorer, files)
            folder.open(settings, options.resume, options.overwrite)
            began = time.monotonic()
            answers = {}
            for side in ANSWERS:
                if side in files:
                    answers[side] = [files[side][key_of(prompt)][1] for prompt in prompts]
                else:
                    answers[side] = _generated(options, side, prompts, folder, progress)
            comparison = Comparison(prompts, answers)
            extra: dict[str, Any]
            if options.verdicts is not None:
                verdicts, extra = _verdicts_of_file(options.verdicts, prompts, progress)
            elif scorer is not None:
                verdicts, extra = _scored(options, scorer, comparison, folder, progress)
            elif options.judge is not None:
                verdicts, extra = _judged(options, comparison, folder, progress)
            else:
                return _questions(options, comparison, folder, progress)
            extra |= {"seconds": time.monotonic() - began, "settings": settings}
            return _finish(options, comparison, verdicts, extra, folder)
    except ScoreError as error:  # of what is shared with `qkernels score`: the lock, loading models
        raise JudgeError(str(error)) from error


def _spare_inputs(options: JudgeOptions) -> None:
    """Not to delete what is to be read: answers and verdicts of an earlier run lie where this one writes."""
    if not options.overwrite:
        return
    for name in ("a", "b", "prompts", "verdicts"):
        value = getattr(options, name)
        if value is not None and folders.lies_in(value, options.out):
            raise JudgeError(
                f"--{name} {value}: lies in --out {options.out}, whose files --overwrite deletes; go on with --resume,"
                " or choose another --out"
            )


def _require_packages(options: JudgeOptions) -> None:
    needed = ["filelock"]
    if options.judge is not None or any(is_model(getattr(options, side)) for side in ANSWERS):
        needed += ["transformers", "tokenizers"]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise JudgeError(f"judging needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _check_models(options: JudgeOptions) -> None:
    """What can be known of the models before one of them answers for hours, and before the folder is there."""
    named = [(f"--{side}", getattr(options, side)) for side in ANSWERS if is_model(getattr(options, side))]
    for option, name in [*named, ("--judge", options.judge)]:
        models.refuse_absent(option, name)
        if name is not None:
            _tokenizer_folder(option, name)


def _tokenizer_folder(option: str, name: str) -> str:
    place = models.tokenizer_folder(name, needed=False)
    if place is None:
        raise JudgeError(f"{option} {name}: the folder has no tokenizer; save it there with tokenizer.save_pretrained")
    return place


def is_model(name: str) -> bool:
    """Whether a side is a model, not a file (or a folder of files) of answers."""
    path = Path(name)
    if path.is_dir():
        return (path / "config.json").is_file() or models.is_adapter(name)
    return not path.exists() and is_hub_name(name, (".json", ".jsonl", ".parquet", ".csv", ".gz", ".arrow", ".tsv"))


def _prompts(
    options: JudgeOptions, progress: Progress
) -> tuple[list[Prompt], dict[str, dict[str, tuple[Prompt, Answer]]]]:
    """The prompts to be judged, and the answers of the sides that are files, by prompt."""
    files = {}
    for side in ANSWERS:
        name = getattr(options, side)
        if not is_model(name):
            if not Path(name).exists():
                raise JudgeError(f"--{side} {name}: no such file or folder")
            try:
                files[side] = read_answers(Path(name))
            except DataError as error:
                if not Path(name).is_dir():
                    raise
                raise JudgeError(
                    f"--{side} {name}: no model (the folder has no config.json), and no answers ({error})"
                ) from None
    if options.prompts is not None:
        prompts, again = read_prompts(options.prompts)
        if again:
            progress.say(f"{again} prompts of {options.prompts} occur again and are judged once")
    elif files:
        first, *others = files.values()
        prompts = [prompt for prompt, _ in first.values()]
        if others and (more := others[0].keys() - first.keys()):
            raise JudgeError(
                f"--a {options.a}: no answer to {len(more)} of {len(others[0])} prompts that --b {options.b} answers;"
                " give the prompts to be judged with --prompts"
            )
    else:
        raise JudgeError("give --prompts FILE: models need prompts to answer")
    prompts = prompts[: options.limit]
    for side, answers in files.items():
        missing = [prompt for prompt in prompts if key_of(prompt) not in answers]
        if missing:
            raise JudgeError(
                f"--{side} {getattr(options, side)}: no answer to {len(missing)} of {len(prompts)} prompts, the first:"
                f" {text_of(missing[0])[:80]!r}; both sides need answers to the same prompts"
            )
    return prompts, files


def _settings(
    options: JudgeOptions, scorer: Scorer | None, files: Mapping[str, Mapping[str, tuple[Prompt, Answer]]]
) -> dict[str, Any]:
    """What results depend on, beside the prompts, which are compared line by line."""
    settings: dict[str, Any] = {side: _fingerprint(getattr(options, side), files.get(side)) for side in ANSWERS}
    if any(is_model(getattr(options, side)) for side in ANSWERS):
        names = ("max_new_tokens", "temperature", "dtype", "batch_size")
        settings |= {name: getattr(options, name) for name in names}
        if options.temperature:
            settings["seed"] = options.seed
    if options.judge is not None:
        settings["judge"] = models.fingerprint(options.judge)
        settings["template"] = hashlib.sha256(_template(options).encode()).hexdigest()[:16]
    elif scorer is not None:
        settings["judge"] = scorer.fingerprint
    return settings


def _fingerprint(name: str, answers: Mapping[str, tuple[Prompt, Answer]] | None) -> str | None:
    """What tells a side from another: a file's contents, the answers in a folder of files, the model."""
    path = Path(name)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if answers is None:
        return models.fingerprint(name)
    texts = [[key, *answer] for key, (_, answer) in answers.items()]
    return hashlib.sha256(as_json(texts).encode()).hexdigest()[:16]


def _template(options: JudgeOptions) -> str:
    if options.template is None:
        return JUDGE_TEMPLATE
    try:
        text = options.template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"--template {options.template}: cannot be read ({first_line(error)})") from None
    for field in ("{prompt}", "{response}"):
        if field not in text:
            raise JudgeError(f"--template {options.template}: expected {field} in it, where the text goes")
    return text


def _load(options: JudgeOptions, option: str, name: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    place = _tokenizer_folder(option, name)
    with quiet_transformers():
        tokenizer = models.load_tokenizer(option, place, options.trust_remote_code)
        return models.load_model(option, name, options, models.device_of(options.device)), tokenizer


# --- answers ----------------------------------------------------------------------------------------------------------


def _generated(
    options: JudgeOptions, side: str, prompts: Sequence[Prompt], folder: Folder, progress: Progress
) -> list[Answer]:
    """The answers of a model: those that an earlier run has left, and the others."""
    name, file = getattr(options, side), ANSWERS[side]
    found: dict[int, Answer] = {}
    for line in folder.lines(file):
        number = line["number"]
        if number < len(prompts):
            _same_prompt(folder.out / file, line, prompts[number])
            found[number] = Answer(str(line.get("answer", "")), line.get("finished") is True)
    missing = [number for number in range(len(prompts)) if number not in found]
    if missing:
        progress.say(f"{side.upper()}: {name}, {len(missing)} answers to generate" +
                     (f", {len(found)} are there" if found else ""))  # fmt: skip
        model, tokenizer = _load(options, f"--{side}", name)
        generator = Generator(
            f"--{side}", model, tokenizer, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            seed=options.seed,
        )  # fmt: skip
        for number in missing:  # what is wrong with a prompt should be known before hours of work
            generator.encode(number, prompts[number])
        try:
            with progress.phase(f"{side.upper()} answers", len(missing)) as phase:
                for block in blocks(missing, options.batch_size):
                    answers = generator.answers(block[0], [prompts[number] for number in block])
                    folder.append(
                        file,
                        [
                            {"number": number, "prompt": as_records(prompts[number]), "answer": answer.text,
                             "finished": answer.finished}
                            for number, answer in zip(block, answers, strict=True)
                        ],
                    )  # fmt: skip
                    found |= dict(zip(block, answers, strict=True))
                    phase.step(steps=len(block))
        except torch.OutOfMemoryError as error:
            raise JudgeError(
                f"out of memory ({first_line(error)}); a smaller --batch-size than {options.batch_size} takes less"
            ) from error
        del model, generator
        collect()
    return [found[number] for number in range(len(prompts))]


def _same_prompt(file: Path, line: Mapping[str, Any], prompt: Prompt) -> None:
    if line.get("prompt") != as_records(prompt):
        raise JudgeError(f"{file}: prompt {line['number']} was another one; --resume needs the prompts as they were")


# --- verdicts ---------------------------------------------------------------------------------------------------------


def _earlier(folder: Folder, prompts: Sequence[Prompt]) -> dict[tuple[int, str], dict[str, Any]]:
    """The verdicts that an earlier run has left, by prompt and order."""
    found = {}
    for line in folder.lines(VERDICTS):
        number, order, value = line["number"], line.get("order"), line.get("a_wins")
        if not (isinstance(value, (int, float)) and math.isfinite(value) and isinstance(order, str)):
            raise JudgeError(
                f"{folder.out / VERDICTS}: damaged (not the lines of a comparison); delete it and run again"
            )
        if number < len(prompts):
            _same_prompt(folder.out / VERDICTS, line, prompts[number])
            found[number, order] = line
    return found


def _scored(
    options: JudgeOptions, scorer: Scorer, comparison: Comparison, folder: Folder, progress: Progress
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts of a function."""
    prompts, answers = comparison
    known = _earlier(folder, prompts)
    orders = _ORDERS if scorer.compares else ("each",)
    with progress.phase("judging", len(prompts)) as phase:
        for number, prompt in enumerate(prompts):
            lines = []
            for order in orders:
                if (number, order) in known:
                    continue
                line: dict[str, Any] = {"number": number, "prompt": as_records(prompt), "order": order}
                a, b = answers["a"][number].text, answers["b"][number].text
                if order == "each":
                    scores = [scorer.score(number, text_of(prompt), text) for text in (a, b)]
                    line |= {"a_wins": _sign(scores[0] - scores[1]), "a_score": scores[0], "b_score": scores[1]}
                elif order == "ab":
                    line["a_wins"] = scorer.compare(number, text_of(prompt), a, b)
                else:
                    line["a_wins"] = 1 - scorer.compare(number, text_of(prompt), b, a)
                lines.append(line)
                known[number, order] = line
            if lines:
                folder.append(VERDICTS, lines)
            phase.step()
    if not scorer.compares:
        means = {
            f"mean_{side}_score": bootstrap_mean(
                [known[n, "each"][f"{side}_score"] for n in range(len(prompts))],
                resamples=options.resamples,
                level=options.level,
                seed=options.seed,
            )._asdict()
            for side in ANSWERS
        }
        return [Verdict(*2 * (known[n, "each"]["a_wins"],)) for n in range(len(prompts))], {**means, "ordered": False}
    return [Verdict(*(known[n, order]["a_wins"] for order in _ORDERS)) for n in range(len(prompts))], {}


def _sign(difference: float) -> float:
    return 0.5 + 0.5 * (difference > 0) - 0.5 * (difference < 0)


def _judged(
    options: JudgeOptions, comparison: Comparison, folder: Folder, progress: Progress
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts of a model: in each order the answer that it finds more probable."""
    prompts, answers = comparison
    known = _earlier(folder, prompts)
    todo = [(number, order) for number in range(len(prompts)) for order in _ORDERS if (number, order) not in known]
    if todo:
        assert options.judge is not None
        progress.say(
            f"Judge: {options.judge}, {len(todo)} questions" + (f", {len(known)} are answered" if known else "")
        )
        model, tokenizer = _load(options, "--judge", options.judge)
        try:
            judge = ModelJudge(model, tokenizer, template=_template(options), batch_tokens=options.batch_tokens)
            with progress.phase("judging", len(todo)) as phase:
                for start in range(0, len(todo), _BLOCK):
                    block = todo[start : start + _BLOCK]
                    shown = [[answers[side][number].text for side in order] for number, order in block]
                    first = judge.probabilities(
                        [text_of(prompts[number]) for number, _ in block], [a for a, _ in shown], [b for _, b in shown]
                    )
                    for (number, _), p in zip(block, first, strict=True):
                        if not math.isfinite(p):
                            raise JudgeError(
                                f"--judge {options.judge}: prompt {number}: its verdict is {p}, no probability; fp16"
                                " overflows in some models, --dtype bf16 or fp32 does not"
                            )
                    lines = [
                        {"number": number, "prompt": as_records(prompts[number]), "order": order,
                         "a_wins": p if order == "ab" else 1 - p}
                        for (number, order), p in zip(block, first, strict=True)
                    ]  # fmt: skip
                    folder.append(VERDICTS, lines)
                    known |= {(line["number"], line["order"]): line for line in lines}  # type: ignore[misc]
                    phase.step(steps=len(block))
        except torch.OutOfMemoryError as error:
            raise JudgeError(f"out of memory ({first_line(error)}); a smaller --batch-tokens takes less") from error
        except ValueError as error:
            raise JudgeError(f"--judge {options.judge}: {error}") from error
    values = [[known[n, order]["a_wins"] for order in _ORDERS] for n in range(len(prompts))]
    mean = bootstrap_mean([sum(both) / 2 for both in values], bounds=(0, 1), resamples=options.resamples,
                          level=options.level, seed=options.seed)  # fmt: skip
    return [Verdict(_sign(ab - 0.5), _sign(ba - 0.5)) for ab, ba in values], {"mean_probability": mean._asdict()}


def _verdicts_of_file(
    path: Path, prompts: Sequence[Prompt], progress: Progress
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts that were made elsewhere; of several in one order, the mean."""
    numbers = {key_of(prompt): number for number, prompt in enumerate(prompts)}
    found: dict[int, dict[str, list[float]]] = {}
    orders: set[str] = set()
    others = 0
    for place, record in Source(path).rows():
        try:
            number, order, a_wins = _verdict(record, numbers)
        except Unusable as error:
            raise DataError(f"{path}, {place}: {error}") from None
        if number is None:
            others += 1
            continue
        orders.add(order)
        if "each" in orders and len(orders) > 1:
            raise DataError(
                f"{path}, {place}: expected verdicts with an order, 'ab' or 'ba', or all of them without ('each'),"
                " found both"
            )
        found.setdefault(number, {}).setdefault(order, []).append(a_wins)
    if others:
        progress.say(f"{others} verdicts of {path} are on other prompts than those that are judged, and are left out")
    missing = [number for number in range(len(prompts)) if number not in found]
    if missing:
        raise JudgeError(
            f"--verdicts {path}: none on {len(missing)} of {len(prompts)} prompts, the first is prompt {missing[0]}:"
            f" {text_of(prompts[missing[0]])[:80]!r}"
        )
    means = [{order: sum(given) / len(given) for order, given in found[n].items()} for n in range(len(prompts))]
    if "each" in orders:
        return [Verdict(mean["each"], mean["each"]) for mean in means], {"ordered": False}
    return [Verdict(mean.get("ab"), mean.get("ba")) for mean in means], {}


def _verdict(record: Any, numbers: Mapping[str, int]) -> tuple[int | None, str, float]:
    """Which prompt, which order, and how far A's answer is the better one."""
    if not isinstance(record, dict):
        raise Unusable("expected an object with a prompt, an order and a winner")
    order = record.get("order", "ab")
    if order not in (*_ORDERS, "each"):
        raise Unusable(f"expected 'order' to be 'ab', 'ba' or 'each', found {order!r}")
    if record.get("prompt") is not None:
        number = numbers.get(key_of(conversation(record["prompt"], "prompt", "user")))
    elif type(record.get("number")) is int:
        number = record["number"] if 0 <= record["number"] < len(numbers) else None
    else:
        raise Unusable("expected 'prompt', or 'number' of the prompt from 0 on")
    value = record.get("a_wins")
    if value is None:
        winner = record.get("winner")
        values = {"a": 1.0, "b": 0.0, "tie": 0.5}
        if order in _ORDERS:
            values |= {"first": float(order == "ab"), "second": float(order == "ba")}
        if not isinstance(winner, str) or winner not in values:
            raise Unusable(f"expected 'winner' to be one of {', '.join(map(repr, values))}, found {winner!r}")
        value = values[winner]
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise Unusable(f"expected 'a_wins' to be a number between 0 and 1, found {value!r}")
    return number, order, float(value)


def _questions(options: JudgeOptions, comparison: Comparison, folder: Folder, progress: Progress) -> dict[str, Any]:
    """Without a judge: the questions in both orders, for one outside of this package."""
    lines = []
    for number, prompt in enumerate(comparison.prompts):
        for order in _ORDERS:
            first, second = (comparison.answers[side][number].text for side in order)
            lines.append({
                "number": number, "prompt": as_records(prompt), "order": order, "first": first, "second": second,
                "question": question_text(text_of(prompt), first, second), "winner": None,
            })  # fmt: skip
    if _is_filled_in(options.out / QUESTIONS):
        raise JudgeError(
            f"{options.out / QUESTIONS}: somebody has given winners there, or changed it; pass the file to --verdicts,"
            " or delete it to have it written again"
        )
    folder.write(QUESTIONS, as_lines(lines))
    progress.say(
        f'No judge was given. {options.out / QUESTIONS} asks every question in both orders: set each "winner" to'
        ' "first", "second" or "tie", and pass the file to --verdicts, with --resume'
    )
    return {"prompts": len(comparison.prompts), "questions": len(lines)}


def _is_filled_in(path: Path) -> bool:
    """Whether a file of questions is there and no longer as it was written."""
    if not path.exists():
        return False
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return any(json.loads(line).get("winner") is not None for line in lines if line.strip())
    except (OSError, ValueError, AttributeError, RecursionError):
        return True


# --- figures ----------------------------------------------------------------------------------------------------------


def _finish(
    options: JudgeOptions,
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    extra: Mapping[str, Any],
    folder: Folder,
) -> dict[str, Any]:
    answers = comparison.answers
    verdicts = [
        verdict._replace(a_length=len(answers["a"][n].text), b_length=len(answers["b"][n].text))
        for n, verdict in enumerate(verdicts)
    ]
    rate = win_rate(verdicts, resamples=options.resamples, level=options.level, seed=options.seed)
    extra = dict(extra)
    settings = extra.pop("settings")
    figures: dict[str, Any] = {
        **rate.as_json(),
        "ordered": extra.pop("ordered", True),
        "unfinished": {side: sum(not answer.finished for answer in answers[side]) for side in ANSWERS},
        "seconds": round(extra.pop("seconds"), 2),
        **extra,
        "settings": {
            "level": options.level,
            "resamples": options.resamples,
            "seed": options.seed,
            **settings,
        },
        "sources": {
            "a": options.a,
            "b": options.b,
            "prompts": str(options.prompts) if options.prompts is not None else "those of the answers",
            "judge": str(options.scorer or options.judge or options.verdicts),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
        "versions": {"qkernels": __version__, "python": platform.python_version(), **_versions()},
    }
    folder.write(FIGURES, as_json(figures))
    folder.write(REPORT, make_page(rate, figures, comparison, verdicts, options.shown))
    return figures


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers") if find_spec(name) is not None}


def summary(figures: Mapping[str, Any], options: JudgeOptions) -> str:
    """What a comparison has come to, in a few lines for the terminal."""
    if "win_rate" not in figures:
        return f"questions     {options.out / QUESTIONS} ({figures['questions']})"
    rows = [
        ("win rate", f"A wins {share(figures['win_rate'])} of {figures['prompts']} prompts"
                     f" ({figures['wins']} won, {figures['ties']} tied, {figures['losses']} lost)"),
        ("equal length", share(figures["length_controlled"]) if figures["length_controlled"] else "cannot be told"),
        ("length", f"A {figures['a_length']:.0f}, B {figures['b_length']:.0f} characters. {figures['length_note']}"),
    ]  # fmt: skip
    if figures["ordered"] and figures["agreement"]:
        rows.append(("orders", f"agree on {share(figures['agreement'])}; the first answer wins"
                               f" {share(figures['first_wins'])}"))  # fmt: skip
    elif figures["ordered"]:
        rows.append(("orders", "one order alone was judged: a preference for a position is in the figure"))
    if figures["win_rate"]["low"] <= 0.5 <= figures["win_rate"]["high"]:
        rows.append(("", "The interval holds 50 %: neither side has been shown to be better."))
    for generated, why in (
        (True, f"did not end within --max-new-tokens {options.max_new_tokens}"),
        (False, "are unfinished, as the files of answers say"),
    ):
        cut = [
            f"{count} of {side.upper()}"
            for side, count in figures["unfinished"].items()
            if count and is_model(getattr(options, side)) is generated
        ]
        if cut:
            rows.append(("cut", f"{' and '.join(cut)} {why}"))
    rows += [("figures", str(options.out / FIGURES)), ("report", str(options.out / REPORT))]
    return "\n".join(f"{name:<13} {text}".rstrip() for name, text in rows)


def share(value: Mapping[str, float] | Interval) -> str:
    """A share with its interval, in percent."""
    given = value._asdict() if isinstance(value, Interval) else value
    return (
        f"{100 * given['estimate']:.1f} % ({100 * given['level']:.0f} % interval {100 * given['low']:.1f} to"
        f" {100 * given['high']:.1f} %)"
    )


__all__ = ["Comparison", "WinRate", "is_close_to_half", "is_model", "run_judge", "share", "summary"]
