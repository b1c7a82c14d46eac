"""The demo from options to a finished folder: data, tokenizer, two trainings, scores, report."""

from __future__ import annotations

import copy
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch

from .. import backends
from .._version import __version__
from ..credit import detection, mean, ranked_right
from ..data import DataError, Preference, open_preferences
from ..report.progress import Progress, quiet_transformers
from . import synthetic
from .options import MIN_PAIRS, DemoError, DemoOptions, Sizes
from .output import METRICS, MODEL, REFERENCE, REPORT, OutputFolder, written_files

if TYPE_CHECKING:
    from .encode import EncodedPair, Truncation
    from .evaluate import TokenScores

_HELD_OUT = 0.1  # share of a user's own pairs


class Data(NamedTuple):
    """Pairs before tokenisation.

    split: how the held-out pairs were chosen, in words.
    ignored_fields, skipped: of the user's file: fields that were not read; in words, records that were left out.
    """

    train: list[Preference]
    held_out: list[Preference]
    split: str
    ignored_fields: tuple[str, ...] = ()
    skipped: str = ""


def run_demo(options: DemoOptions, stream: TextIO | None = None) -> dict[str, Any]:
    """Train, score and write `options.out`.

    Args:
        options: what to do.
        stream: where progress goes; standard error by default.

    Returns:
        The contents of `metrics.json`.

    Raises:
        DemoError: an option, the output folder or a missing package stands in the way, or training diverged.
        DataError: the preference file cannot be used.
        Nothing is left behind in either case, nor on any other exception.
    """
    options.check()
    _require_packages()
    output = OutputFolder(options.out, options.overwrite)
    progress = Progress(stream or sys.stderr)
    clock = _Clock()
    data = _own_data(options) if options.data is not None else _generated_data(options)
    with quiet_transformers(), _threads(options), output:
        try:
            metrics = _train_and_write(options, data, output.path, progress, clock)
        except OSError as error:  # a full disk, above all
            raise DemoError(f"--out {options.out}: cannot be written ({error.strerror or error})") from error
        output.commit()
    return metrics


def _train_and_write(
    options: DemoOptions, data: Data, folder: Path, progress: Progress, clock: _Clock
) -> dict[str, Any]:
    # Imported here: `qkernels demo --help` and every refusal come without waiting for transformers.
    from .encode import encode, truncate
    from .evaluate import pair_logps, score_tokens
    from .page import write_page
    from .tokenizer import message_text, train_tokenizer
    from .train import build_model, train_preferences, train_sft

    progress.say(_data_line(options, data))
    if data.skipped:
        progress.say(f"--skip-invalid {data.skipped}")
    texts = [
        message_text(message)
        for pair in data.train
        for message in (*pair.prompt, *pair.turns("chosen"), *pair.turns("rejected"))
    ]
    tokenizer = train_tokenizer(texts, options.base_sizes().vocabulary_size)
    pairs = encode(data.train + data.held_out, tokenizer)
    sizes = options.sizes(len(data.train), max(pair.length for pair in pairs))
    kept, cut = truncate(pairs, sizes.max_length)
    train = [pair for pair in kept if pair.source < len(data.train)]
    held_out = [pair for pair in kept if pair.source >= len(data.train)]
    _require_pairs(options, train, held_out, cut, sizes)
    for line in _truncation_lines(cut, len(data.train) + len(data.held_out), sizes.max_length):
        progress.say(line)
    clock.lap("data")

    reference = build_model(tokenizer, sizes, options.seed)
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    progress.say(
        f"Model: {sizes.layers} layers, width {sizes.hidden_size}, {len(tokenizer)} tokens,"
        f" {parameters / 1e6:.2f} M parameters, from scratch"
    )
    passes = f"{2 * sizes.sft_steps * sizes.batch_size / len(train):.1f} passes"
    progress.say(f"1. Supervised fine-tuning on the chosen answers ({sizes.sft_steps} steps, {passes} over the data)")
    sft_curve = train_sft(reference, train, sizes, options.seed, progress)
    reference.requires_grad_(False)
    clock.lap("sft")

    loss = "token-level DPO" if options.loss == "sigmoid" else f"loss {options.loss}"
    passes = f"{sizes.steps * sizes.batch_size / len(train):.1f} passes"
    progress.say(f"2. The result is frozen as the reference; {loss} ({sizes.steps} steps, {passes} over the data)")
    policy = copy.deepcopy(reference).requires_grad_(True)
    held_out_reference = pair_logps(reference, held_out, sizes.batch_size)
    curves = train_preferences(policy, reference, train, held_out, held_out_reference, options, sizes, progress)
    clock.lap("preferences")

    progress.say("3. Scoring the held-out pairs, writing model and report")
    scores = score_tokens(policy, held_out, held_out_reference, options.beta, sizes.batch_size)
    results = _results(scores, held_out)
    for name, model in ((MODEL, policy), (REFERENCE, reference)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    clock.lap("scoring")
    metrics = {
        "results": results,
        "options": _plain_options(options),
        "loss_terms": options.terms,
        "sizes": {
            **vars(sizes),
            "train_pairs": len(train),
            "held_out_pairs": len(held_out),
            "vocabulary": len(tokenizer),
            "parameters": parameters,
        },
        "data": {
            "source": str(options.data) if options.data else "generated",
            "split": data.split,
            "ignored_fields": list(data.ignored_fields),
            "skipped": data.skipped,
            "truncated_prompts": cut.prompts,
            "truncated_answers": cut.answers,
            "dropped_pairs": cut.dropped,
        },
        "curves": {"sft": sft_curve, "train": curves.train, "held_out": curves.held_out},
        "versions": _versions(),
        "backend": backends.resolve("auto", torch.zeros(1, 1)),
        "threads": torch.get_num_threads(),
        "elapsed_seconds": clock.seconds,
    }
    write_page(folder / REPORT, metrics, data.train + data.held_out, held_out, scores, tokenizer)
    metrics["files"] = written_files(folder)
    text = json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / METRICS).write_text(text + "\n", encoding="utf-8")
    return metrics


def _generated_data(options: DemoOptions) -> Data:
    sizes = options.base_sizes()
    pairs = synthetic.generate(sizes.train_pairs, sizes.held_out_pairs, options.seed)
    return Data(pairs.train, pairs.held_out, "held-out pairs plant wrong facts that no training pair has")


def _own_data(options: DemoOptions) -> Data:
    """Read the user's file and hold some pairs out, whole prompts at a time where there are several."""
    if options.data is None:
        raise ValueError("options.data is None")
    data = open_preferences(
        options.data, split=options.split, config=options.data_config, skip_invalid=options.skip_invalid
    )
    pairs = list(data)
    if len(pairs) < MIN_PAIRS:
        left_out = f"; {data.skipped_line()}" if data.skipped else ""
        raise DataError(f"{data.name}: expected at least {MIN_PAIRS} preference pairs, found {len(pairs)}{left_out}")
    wanted = min(options.base_sizes().held_out_pairs, max(2, round(_HELD_OUT * len(pairs))))
    by_prompt: dict[Any, list[Preference]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    groups, split = list(by_prompt.values()), "held-out prompts do not occur in training"
    if max(map(len, groups)) > len(pairs) - wanted:
        groups, split = [[pair] for pair in pairs], "held-out pairs share prompts with training"
    random.Random(f"split {options.seed}").shuffle(groups)
    held_out: list[Preference] = []
    train: list[Preference] = []
    for group in groups:
        (held_out if len(held_out) + len(group) <= wanted else train).extend(group)
    if not held_out:  # every prompt has more pairs than are wanted
        held_out, train = train[: len(groups[0])], train[len(groups[0]) :]
    return Data(train, held_out, split, data.ignored_fields, data.skipped_line())


def _results(scores: Sequence[tuple[TokenScores, TokenScores]], held_out: Sequence[EncodedPair]) -> dict[str, Any]:
    """The final figures, all of held-out pairs."""
    rewards = [(sum(chosen.rewards), sum(rejected.rewards)) for chosen, rejected in scores]
    logps = [(sum(chosen.reference_logps), sum(rejected.reference_logps)) for chosen, rejected in scores]
    results: dict[str, Any] = {
        "pair_accuracy": ranked_right(rewards),
        "pair_accuracy_before": ranked_right(logps),
        "mean_margin": mean(chosen - rejected for chosen, rejected in rewards),
        "mean_chosen_reward": mean(chosen for chosen, _ in rewards),
        "mean_rejected_reward": mean(rejected for _, rejected in rewards),
    }
    planted = [pair.planted for pair in held_out]
    rejected_scores = [rejected for _, rejected in scores]
    suspicions = {
        "token_reward": [[-x for x in s.rewards] for s in rejected_scores],
        "logp_after": [[-x for x in s.logps] for s in rejected_scores],
        "logp_before": [[-x for x in s.reference_logps] for s in rejected_scores],
        "entropy": [s.entropies for s in rejected_scores],
    }
    found = {name: detection(suspicion, planted) for name, suspicion in suspicions.items()}
    chance = detection([[0.0] * len(flags) for flags in planted], planted)
    if chance is not None:
        results["planted_errors"] = {
            "answers": chance.answers,
            "answers_with_two": chance.answers_with_two,
            "chance_hit_at_1": chance.hit_at_1,
            "chance_second_error_recall": chance.second_error_recall,
            **{name: value._asdict() for name, value in found.items() if value is not None},
        }
    return results


def summary(metrics: dict[str, Any], out: Path) -> str:
    """What a run has come to, in a few lines for the terminal."""
    results, sizes = metrics["results"], metrics["sizes"]
    before, after = results["pair_accuracy_before"], results["pair_accuracy"]
    rows = [
        ("held-out pairs", f"{sizes['held_out_pairs']}"),
        ("ranked right", f"{after:.1%} by reward; before training {before:.1%} by the SFT model's log-prob"),
        (
            "mean margin",
            f"{results['mean_margin']:+.3f} (chosen {results['mean_chosen_reward']:+.3f},"
            f" rejected {results['mean_rejected_reward']:+.3f})",
        ),
    ]
    if "planted_errors" in results:
        planted = results["planted_errors"]
        reward = planted["token_reward"]
        rows.append(
            (
                "planted errors",
                f"AUROC {reward['auroc']:.3f} by token reward; lowest reward on an error in"
                f" {reward['hit_at_1']:.1%} (chance {planted['chance_hit_at_1']:.1%})",
            )
        )
    cut = metrics["data"]
    if cut["truncated_prompts"] or cut["truncated_answers"] or cut["dropped_pairs"]:
        rows.append(
            (
                "truncated",
                f"{cut['truncated_prompts']} prompts, {cut['truncated_answers']} answers at {sizes['max_length']}"
                f" tokens; {cut['dropped_pairs']} pairs dropped",
            )
        )
    rows += [
        ("time", f"{metrics['elapsed_seconds']['total']:.0f} s, backend {metrics['backend']}"),
        ("model", f"{out / MODEL}  (its reference: {out / REFERENCE})"),
        ("figures", str(out / METRICS)),
        ("report", str(out / REPORT)),
    ]
    return "\n".join(f"{name:<15} {text}" for name, text in rows)


def _data_line(options: DemoOptions, data: Data) -> str:
    counts = f"{len(data.train)} training pairs, {len(data.held_out)} held out"
    if options.data is None:
        return f"Data: {counts}, generated; each rejected answer has one or two planted errors"
    ignored = f"; ignored fields: {', '.join(data.ignored_fields)}" if data.ignored_fields else ""
    return f"Data: {counts}, from {options.data}{ignored}"


def _truncation_lines(cut: Truncation, pairs: int, max_length: int) -> Iterator[str]:
    if cut.prompts or cut.answers:
        yield (
            f"Cut to {max_length} tokens: {cut.prompts} of {pairs} prompts (their beginning),"
            f" {cut.answers} of {2 * pairs} answers (their end); --max-length changes it"
        )
    if cut.dropped:
        yield f"Dropped {cut.dropped} of {pairs} pairs: their answers do not differ in the first {max_length} tokens"


def _require_pairs(
    options: DemoOptions, train: Sequence[EncodedPair], held_out: Sequence[EncodedPair], cut: Truncation, sizes: Sizes
) -> None:
    if cut.dropped and (len(train) + len(held_out) < MIN_PAIRS or len(train) < sizes.batch_size or not held_out):
        raise DataError(
            f"{options.data or 'the generated pairs'}: cut to {sizes.max_length} tokens, {cut.dropped} pairs no longer"
            f" differ and {len(train) + len(held_out)} are left, too few to train on; use a larger --max-length"
        )


def _require_packages() -> None:
    missing = [name for name in ("transformers", "tokenizers") if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _threads(options: DemoOptions) -> Iterator[None]:
    """As many CPU threads as the options say, for as long as the run lasts."""
    before = torch.get_num_threads()
    small = options.data is None or options.tiny
    torch.set_num_threads(options.threads or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Wall-clock seconds per stage."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The stage that ends now."""
        now = time.monotonic()
        self._laps[stage], self._last = round(now - self._last, 2), now

    @property
    def seconds(self) -> dict[str, float]:
        """Per stage and in total, up to now."""
        return {**self._laps, "total": round(time.monotonic() - self._start, 2)}


def _plain_options(options: DemoOptions) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"qkernels": __version__, "python": platform.python_version(), **packages}
