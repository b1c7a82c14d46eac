"""Scoring from pairs to results: in memory for a notebook, into a folder that can be resumed for the command."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import itertools
import platform
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch

from .. import backends
from .._version import __version__
from ..data import DataError, Preference, PreferenceData, as_preferences, open_preferences
from ..report import folders
from ..report.page import ScoredPair
from ..report.progress import Progress, quiet_transformers
from ..text.characters import first_line
from ..text.lengths import position_limit
from . import models
from .encode import EncodedAnswer, Encoder, place
from .files import ALWAYS, PAIRS, REPORT, SUMMARY, TOKENS, as_json, rank_folder
from .folder import RunLock
from .options import ScoreError, ScoreOptions
from .page import make_page
from .ranks import Ranks, bitmap, in_bitmap, launched
from .store import WINDOW, CachedReference, Results, Scored
from .summary import Overview
from .table import SIDES, TokenTable, prompt_of
from .tokens import Answer, Batch, TokenScorer, check_outputs

if TYPE_CHECKING:
    import numpy as np

# Gives the reference's log-probs of one answer: place for messages, pair, side, token ids.
Cached = Callable[[str, int, str, list[int]], "np.ndarray"]


# Pairs with their numbers, ascending.
Numbered = Iterable[tuple[int, Preference]]
# Neighbouring pairs that are batched together.
Window = dict[int, Preference]


class _Sequence(NamedTuple):
    """An answer ready to be scored.

    known: the reference's log-probs, if they are cached.
    is_done: it has been scored before, and is there because the others were in a batch with it.
    """

    number: int
    pair: Preference
    side: str
    answer: EncodedAnswer
    known: np.ndarray | None
    is_done: bool


def _windows(pairs: Numbered) -> Iterator[Window]:
    """Neighbours together; where a window begins depends on the numbers of the pairs alone."""
    for _, group in itertools.groupby(pairs, lambda numbered: numbered[0] // WINDOW):
        yield dict(group)


def _encode(
    scorer: TokenScorer,
    encoder: Encoder,
    windows: Iterable[Window],
    cached: Cached | None,
    done: bytes = b"",
) -> Iterator[list[_Sequence]]:
    """Tokenise pairs, a window of neighbours at a time, and check that they can be scored.

    Args:
        done: `bitmap` of the pairs that are scored.
    """
    for neighbours in windows:
        window = []
        for (number, pair), answers in zip(neighbours.items(), encoder.pairs(neighbours), strict=True):
            for side, answer in zip(SIDES, answers, strict=True):
                where = f"{place(number)}, {side} answer"
                if max(*answer.prompt, *answer.ids, *(max(ids) for _, ids in answer.between)) >= scorer.vocabulary:
                    raise ScoreError(
                        f"{where}: the tokenizer makes a token of it that the model's head of {scorer.vocabulary}"
                        " columns does not have"
                    )
                known = None if cached is None else cached(where, number, side, answer.ids)
                window.append(_Sequence(number, pair, side, answer, known, in_bitmap(done, number)))
        yield window


def _score(
    scorer: TokenScorer, windows: Iterable[list[_Sequence]], on_batch: Callable[[Batch], None] | None = None
) -> Iterator[tuple[int, Preference, list[Scored]]]:
    """Score what is missing of window after window; a pair comes when both its answers have been scored."""
    for window in windows:
        answers = [Answer(s.answer.prompt, s.answer.ids, s.answer.between) for s in window]
        known = [sequence.known for sequence in window] if scorer.cached else None
        done: dict[int, dict[str, Scored]] = {}
        missing = [not sequence.is_done for sequence in window]
        for i, scores in scorer.scores(answers, known, wanted=missing, on_batch=on_batch):
            sequence = window[i]
            if sequence.is_done:
                continue
            both = done.setdefault(sequence.number, {})
            both[sequence.side] = (sequence.side, sequence.answer, scores)
            if len(both) == len(SIDES):
                yield sequence.number, sequence.pair, [both[side] for side in SIDES]


def score_preferences(
    model: torch.nn.Module,
    tokenizer: Any,
    pairs: Iterable[Any],
    *,
    reference: torch.nn.Module | None = None,
    reference_logps: TokenTable | None = None,
    beta: float = 0.1,
    outputs: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    prompt_format: str = "auto",
    progress: TextIO | None = None,
    backend: str = "auto",
) -> TokenTable:
    """Q, V, advantages, rewards, log-probs, entropy and KLs of every token of preference pairs. No gradients.

    Args:
        model: the policy, a causal language model of transformers, bare or inside PEFT, on any device.
        tokenizer: its tokenizer.
        pairs: records in the layouts of `qkernels.data` (such as rows of a data set), or `Preference`s.
        reference: the model that training started from, on the same device; `model` itself if it is a PEFT model, whose
            adapter is then switched off.
        reference_logps: instead, an earlier table over the same pairs, whose `reference_logps` are taken. Without
            either, only the outputs that need no reference can be had.
        beta: strength of the KL constraint the policy was trained with.
        outputs: names of fields of `TokenStats` and `TokenMDP`; by default all that are of use and can be had.
        batch_tokens: padded tokens of a forward pass, at most, unless a single sequence has more; None for 8192 on a
            GPU, 1024 on a CPU.
        max_length: longer sequences are cut to it, the prompt at its beginning, the answer at its end; None refuses
            those that the model cannot take.
        prompt_format: "chat" (the tokenizer's template), "plain" (prompt, answer, end token, one after the other) or
            "auto": "chat" where there is a template.
        progress: where to draw a progress bar, such as `sys.stderr`; None for nowhere.
        backend: "auto", or by name; `qkernels.info()` lists what can run.

    Returns:
        `TokenTable`, one row per token. Log-probs, entropy and KLs in nats; rewards, Q, V and A in units of reward.

    Raises:
        DataError: a record that cannot be used, by its number.
        ScoreError: an answer that cannot be rendered, tokenised or taken by the model, by its number.
        TypeError, ValueError: a model whose head is not known, an output that cannot be had, a number out of range.
    """
    checked = as_preferences(pairs)
    scorer = TokenScorer(
        model,
        reference,
        cached=reference_logps is not None,
        beta=beta,
        outputs=outputs,
        batch_tokens=batch_tokens,
        backend=backend,
    )
    limits = [position_limit(m) for m in (model, reference) if m is not None]
    encoder = Encoder(tokenizer, prompt_format, max_length, min((n for n in limits if n), default=None))
    cached = None if reference_logps is None else _from_table(reference_logps)
    windows = list(_encode(scorer, encoder, _windows(enumerate(checked)), cached))
    rows: list[tuple[int, str, EncodedAnswer, Mapping[str, np.ndarray]]] = []
    phase = None if progress is None else Progress(progress).phase("scoring", len(checked))
    try:
        for number, _, answers in _score(scorer, windows):
            rows += [(number, *answer) for answer in answers]
            if phase is not None:
                phase.step()
    finally:
        if phase is not None:
            phase.__exit__()
    prompts = {i: prompt_of(pair) for i, pair in enumerate(checked)}
    if not rows:
        raise ValueError("pairs must hold at least one pair")
    return TokenTable.of_answers(rows, prompts=prompts, special=tokenizer.all_special_ids).sorted()


def _from_table(table: TokenTable) -> Cached:
    def logps(where: str, pair: int, side: str, ids: list[int]) -> np.ndarray:
        try:
            rows = table.select(pair, side)
        except KeyError:
            raise ScoreError(f"{where}: not among the pairs of reference_logps") from None
        if rows["token_id"].tolist() != ids:
            raise ScoreError(
                f"{where}: its tokens are not those of reference_logps ({len(rows)} there, {len(ids)} here)"
            )
        return rows["reference_logps"]

    return logps


# --- the command ------------------------------------------------------------------------------------------------------


def run_score(options: ScoreOptions, stream: TextIO | None = None) -> dict[str, Any]:
    """Score a preference file into a folder.

    Args:
        options: what to do.
        stream: where progress goes; standard error by default.

    Under `torchrun`, or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, the ranks share the
    pairs; `out` has to be on a file system that all of them see. Results do not depend on how many there are.

    Returns:
        The contents of `summary.json`; an empty dict on ranks other than 0.

    Raises:
        ScoreError: an option, the folder, a model, a tokenizer, an answer or a lost rank stands in the way.
        DataError: the preference file cannot be used.
        On these and on any other exception, what has been scored is in the folder, and a run with `resume` goes on
        from there.
    """
    options.check()
    models.require_packages(options)
    progress = Progress(stream or sys.stderr)
    if not launched():
        return _score_into(options, progress, None)
    with Ranks() as ranks:
        try:
            if options.device in ("auto", "cuda") and torch.cuda.is_available():
                # (A launcher may show each rank a device of its own, the only one there is.)
                options = dataclasses.replace(options, device=f"cuda:{ranks.local % torch.cuda.device_count()}")
            return _score_into(options, progress, ranks) if ranks.is_first else _join(options, ranks)
        except BaseException as error:
            ranks.fail(error)
            raise


class _Prepared(NamedTuple):
    """All that scoring needs, loaded and checked.

    data, records: the pairs, and how many there are.
    cached: the reference's log-probs; None with a model.
    settings: what results depend on.
    note: what to tell of the models; None for nothing.
    """

    data: PreferenceData
    records: int
    cached: CachedReference | None
    loaded: models.Loaded
    scorer: TokenScorer
    encoder: Encoder
    settings: dict[str, Any]
    note: str | None

    @property
    def logps(self) -> Cached | None:
        """The reference's log-probs of an answer, if they are cached."""
        return None if self.cached is None else self.cached.logps


def _prepare(options: ScoreOptions) -> _Prepared:
    """Read the data and load the models."""
    outputs = _outputs(options)
    data = open_preferences(
        options.data, split=options.split, config=options.data_config, skip_invalid=options.skip_invalid
    )
    tokenizers = models.load_tokenizers(options)
    plain = Encoder(tokenizers.model, options.prompt_format)
    records = 0
    for number, pair in data.numbered():  # and every one of them is checked
        if options.limit is None or records < options.limit:
            plain.refuse_conversation(number, pair)
        records += 1
    if not records:
        raise DataError(f"{data.name}: expected at least 1 preference pair, found 0")
    cached = None if options.reference_logps is None else CachedReference(options.reference_logps)
    with quiet_transformers():
        loaded = models.load(options, tokenizers)
    try:
        scorer = TokenScorer(
            loaded.model,
            loaded.reference,
            cached=cached is not None,
            beta=options.beta,
            outputs=outputs,
            batch_tokens=options.batch_tokens,
        )
    except (TypeError, ValueError) as error:
        raise ScoreError(f"--model {options.model}: {error}") from error
    notes = [
        models.check_heads(scorer.vocabularies, loaded.tokenizer),
        models.check_difference(options),
        models.check_beta(options),
    ]
    encoder = Encoder(loaded.tokenizer, options.prompt_format, options.max_length, loaded.limit, loaded.other_tokenizer)
    settings = _settings(options, scorer, loaded, encoder)
    note = " ".join(filter(None, notes)) or None
    return _Prepared(data, records, cached, loaded, scorer, encoder, settings, note)


def _score_into(options: ScoreOptions, progress: Progress, ranks: Ranks | None) -> dict[str, Any]:
    """The whole run; of many ranks, the part of rank 0."""
    with RunLock(options.out) as lock:
        Results.refuse(options.out, options.resume, options.overwrite, lock)
        try:
            if options.out.is_dir():  # an earlier run's; a new folder is made, and locked, when everything is ready
                lock.acquire()
            else:
                folders.try_to_make(options.out)
        except OSError as error:
            raise ScoreError(f"--out {options.out}: cannot be written ({error.strerror or error})") from None
        began = time.monotonic()
        prepared = _prepare(options)
        data, loaded, scorer = prepared.data, prepared.loaded, prepared.scorer
        # Each pass over the data counts anew, and with --limit the next ones stop early.
        skipped, reasons = data.skipped_line(), dict(data.skipped)
        results = Results(options.out, prepared.settings, lock)
        if options.resume:
            results.open(options.resume, options.overwrite)
            results.check(data.numbered(), prepared.encoder)
            if prepared.cached is not None:
                results.check_reference(prepared.cached)
            for text in results.notes:
                progress.say(text)
        ignored = f"; ignored fields: {', '.join(data.ignored_fields)}" if data.ignored_fields else ""
        before = len(results.info)
        todo = _Todo(data, options.limit, bitmap(results.info))
        kept = f"; {before} scored before" if before else ""
        progress.say(
            f"Data: {todo.wanted(prepared.records)} of {prepared.records} pairs from {options.data}{kept}{ignored}"
        )
        if skipped:
            progress.say(f"--skip-invalid {skipped}")
        progress.say(_model_line(loaded, scorer) + (f"; {ranks.size} ranks" if ranks is not None else ""))
        if prepared.note is not None:
            progress.say(prepared.note)
        _check(prepared, todo, ranks, progress)
        if not options.resume:
            results.open(options.resume, options.overwrite)
        if ranks is not None:
            ranks.publish(_shared_settings(prepared), todo.done)
        tokens = _run(prepared, todo, results, ranks, progress)
        device = next(loaded.model.parameters()).device
        facts = {
            "note": prepared.note,
            "skipped": reasons,
            "sources": {
                "model": options.model,
                "reference": _reference_name(options),
                "data": str(options.data) + (f", split {options.split}" if options.split else ""),
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            },
            "device": str(device),
            "ranks": 1 if ranks is None else ranks.size,
            "threads": torch.get_num_threads(),
            "backend": backends.resolve("auto", torch.zeros(1, 1, device=device)),
            "elapsed_seconds": {"scoring": round(time.monotonic() - began, 2), "tokens_scored": tokens},
        }
        if ranks is not None:
            _adopt(results, before + ranks.scored(0))
        progress.say("Writing tables and report")
        return _finish(options, results, data, facts)


def _join(options: ScoreOptions, ranks: Ranks) -> dict[str, Any]:
    """The part of a rank that is not the first: it scores into a folder of its own."""
    silent = Progress(io.StringIO())
    prepared = _prepare(options)
    _check(prepared, _Todo(prepared.data, options.limit, b""), ranks, silent)
    todo = _Todo(prepared.data, options.limit, ranks.await_folder(_shared_settings(prepared)))
    out = options.out / rank_folder(ranks.rank)
    with RunLock(out) as lock:
        results = Results(out, prepared.settings, lock)
        results.open(resume=False, overwrite=False)
        tokens = _run(prepared, todo, results, ranks, silent)
    ranks.end(tokens)
    return {}


def _shared_settings(prepared: _Prepared) -> dict[str, Any]:
    return {**prepared.settings, "the number of pairs": prepared.records}


def _adopt(results: Results, expected: int) -> None:
    """Take over what the other ranks have scored."""
    results.flush()
    results.adopt()
    if len(results.info) != expected:
        raise ScoreError(
            f"--out {results.out}: {expected} pairs have been scored, and {len(results.info)} of them can be seen from"
            " rank 0: the folder has to be on a file system that all ranks share"
        )


def _outputs(options: ScoreOptions) -> tuple[str, ...]:
    kind = "cached" if options.reference_logps is not None else "live"
    try:
        chosen = check_outputs(options.outputs, kind)
    except ValueError as error:
        raise ScoreError(f"--outputs: {error}") from None
    return tuple(dict.fromkeys((*ALWAYS, *chosen)))


class _Todo:
    """The pairs that are wanted and not scored yet, read anew each time they are asked for.

    Args:
        data: all pairs.
        limit: how many of them are wanted, from the first on; None for all.
        done: `bitmap` of the pairs that are scored.
    """

    def __init__(self, data: PreferenceData, limit: int | None, done: bytes):
        self._data, self._limit, self.done = data, limit, done

    def wanted(self, records: int) -> int:
        """How many are wanted, scored or not."""
        return records if self._limit is None else min(records, self._limit)

    def __len__(self) -> int:
        """How many are missing."""
        wanted = itertools.islice(self._data.numbered(), self._limit)
        return sum(not in_bitmap(self.done, number) for number, _ in wanted)

    def windows(self) -> Iterator[Window]:
        """The windows in which a pair is missing, whole: batches are made of windows, whatever is scored of them."""
        for window in _windows(itertools.islice(self._data.numbered(), self._limit)):
            if not all(in_bitmap(self.done, number) for number in window):
                yield window

    def share(self, ranks: Ranks | None) -> Iterator[Window]:
        """The windows that this rank gets, one after the other as it asks for them; without ranks all."""
        if ranks is None:
            yield from self.windows()
            return
        tickets = ranks.tickets()
        wanted = next(tickets)
        for i, window in enumerate(self.windows()):
            if i == wanted:
                yield window
                wanted = next(tickets)


def _check(prepared: _Prepared, todo: _Todo, ranks: Ranks | None, progress: Progress) -> None:
    """Tokenise everything once and let it go: what is wrong with a row should be known before hours of work.

    Of many ranks, each takes its share, and rank 0 waits for all.
    """
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    windows = itertools.islice(todo.windows(), rank, None, size)
    with progress.phase("checking", len(todo)) as phase:
        for window in _encode(prepared.scorer, prepared.encoder, windows, prepared.logps, todo.done):
            phase.step(steps=sum(not sequence.is_done for sequence in window) // len(SIDES))
    if ranks is not None:
        ranks.checked()


def _run(prepared: _Prepared, todo: _Todo, results: Results, ranks: Ranks | None, progress: Progress) -> int:
    """Score what is missing, or this rank's share of it; number of answer tokens, on rank 0 of all."""
    tokens, start, shown = 0, time.monotonic(), 0
    scorer = prepared.scorer
    try:
        with progress.phase("scoring", len(todo)) as phase:

            def show(pairs: int, note: str = "") -> None:
                """Pairs that all ranks have scored by now."""
                nonlocal shown
                if pairs > shown:
                    phase.step(note, steps=pairs - shown)
                    shown = pairs

            windows = _encode(scorer, prepared.encoder, todo.share(ranks), prepared.logps, todo.done)
            for number, pair, answers in _score(scorer, windows, lambda batch: phase.note(str(batch))):
                results.add(number, answers, pair)
                tokens += sum(len(encoded.ids) for _, encoded, _ in answers)
                rate = f"{tokens / (time.monotonic() - start):.0f} answer tokens/s"
                if ranks is None:
                    show(shown + 1, rate)
                else:
                    show(ranks.scored(1), f"{rate} on rank 0")
            if ranks is not None and ranks.is_first:
                ranks.end(tokens)
                tokens = ranks.await_all(lambda: show(ranks.scored(0)))
                show(ranks.scored(0))
    except torch.OutOfMemoryError as error:
        raise ScoreError(
            f"out of memory ({first_line(error)}); a smaller --batch-tokens than {scorer.batch_tokens} takes less"
        ) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, (ScoreError, DataError)):
            raise
        raise ScoreError(str(error)) from error
    finally:
        results.flush()
    return tokens


def _finish(
    options: ScoreOptions,
    results: Results,
    data: PreferenceData,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Tables, figures and report out of the parts."""
    results.merge()
    overview = Overview()
    for window in results.windows():
        overview.add(window)
    cuts = {pair: info.cuts for pair, info in results.info.items() if any(info.cuts)}
    suspicious = overview.suspicious(options.shown)
    prompts: dict[int, list[tuple[str, str]]] = {}
    results.replace(
        PAIRS,
        lambda temporary: overview.write_pairs(
            temporary, _prompts(data, {figures.pair for figures in suspicious}, prompts), results.info
        ),
    )
    figures = {
        **overview.figures(),
        "cut_pairs": len(cuts),
        "max_length": options.max_length,
        "settings": results.settings,
        **facts,
        "versions": _versions(),
    }
    results.write(SUMMARY, as_json(figures))
    shown = _shown(results, [figures.pair for figures in suspicious], prompts, cuts)
    results.write(REPORT, make_page(overview, figures, shown, _facts(figures)))
    results.close()
    return figures


def _prompts(
    data: PreferenceData, wanted: Container[int], kept: dict[int, list[tuple[str, str]]]
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """The prompts of all pairs, with their numbers; those that are wanted are kept."""
    for number, pair in data.numbered():
        prompt = prompt_of(pair)
        if number in wanted:
            kept[number] = prompt
        yield number, prompt


def _shown(
    results: Results,
    wanted: Sequence[int],
    prompts: Mapping[int, list[tuple[str, str]]],
    cuts: Mapping[int, Sequence[int]],
) -> list[ScoredPair]:
    """The most suspicious pairs with their tokens; read again rather than kept."""
    found: dict[int, ScoredPair] = {}
    special = results.settings["special_ids"]
    for window in results.windows():
        here = set(wanted) & set(window.pairs())
        if here:
            table = TokenTable(window.columns, {pair: prompts[pair] for pair in here}, special)
            for pair in here:
                found[pair] = table.scored_pair(pair, _note(pair, cuts.get(pair)))
    return [found[pair] for pair in wanted]


def _note(pair: int, cut: Sequence[int] | None) -> str:
    if not cut:
        return f"Pair {pair}."
    parts = [f"{n} tokens of the {name}" for n, name in zip(cut, ("prompt", *SIDES), strict=True) if n]
    return f"Pair {pair}. Cut off: {', '.join(parts)}."


def _settings(options: ScoreOptions, scorer: TokenScorer, loaded: models.Loaded, encoder: Encoder) -> dict[str, Any]:
    """What results depend on. Not the folders' names: a model may have moved."""
    reference, dtype = "none", None
    if options.reference is not None:
        dtype = _dtype(loaded.reference)
        reference = f"model {models.fingerprint(options.reference)}"
    elif options.reference_logps is not None:
        reference = "log-probs"  # `Results.check_reference` compares them one by one: more may have come
    elif loaded.reference is loaded.model:
        reference = "adapter switched off"
    return {
        "model": models.fingerprint(options.model),
        "reference": reference,
        "reference_dtype": dtype,
        "beta": options.beta,
        "outputs": list(scorer.outputs),
        "prompt_format": "chat" if encoder.chat else "plain",
        "chat_template": None
        if options.chat_template is None
        else hashlib.sha256(options.chat_template.read_bytes()).hexdigest()[:16],
        "dtype": _dtype(loaded.model),
        "special_ids": sorted(loaded.tokenizer.all_special_ids),
    }


def _dtype(model: torch.nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _model_line(loaded: models.Loaded, scorer: TokenScorer) -> str:
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    device = next(loaded.model.parameters()).device
    reference = "its adapter switched off" if loaded.reference is loaded.model else "another model"
    if loaded.reference is None:
        reference = "cached log-probs (no KL divergences)"
    return (
        f"Model: {type(loaded.model).__name__}, {parameters / 1e6:.1f} M parameters,"
        f" {_dtype(loaded.model)} on {device}; reference: {reference}"
    )


def _facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, elapsed, sources = figures["settings"], figures["elapsed_seconds"], figures["sources"]
    cut = f"{figures['cut_pairs']} pairs, at {figures['max_length']} tokens" if figures["cut_pairs"] else "nothing"
    facts = [
        ("model", f"{sources['model']} ({settings['dtype']})"),
        ("reference", sources["reference"]),
        ("data", sources["data"]),
        ("prompts", "chat template" if settings["prompt_format"] == "chat" else "plain text"),
        ("cut", cut),
        ("left out", _skipped(figures["skipped"])),
        ("time", f"{elapsed['scoring']:.1f} s for {elapsed['tokens_scored']} answer tokens, loading included"),
        ("versions", ", ".join(f"{name} {version}" for name, version in figures["versions"].items())),
        ("backend", f"{figures['backend']} on {figures['device']}, threads: {figures['threads']}"),
    ]
    if figures["note"]:
        facts.insert(2, ("note", figures["note"]))
    return facts


def _skipped(reasons: Mapping[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "nothing"


def _reference_name(options: ScoreOptions) -> str:
    return str(options.reference or options.reference_logps or "the same model, adapter switched off")


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "pyarrow")}
    return {"qkernels": __version__, "python": platform.python_version(), **packages}


def summary(figures: Mapping[str, Any], options: ScoreOptions) -> str:
    """What a run has come to, in a few lines for the terminal; nothing on ranks other than the first."""
    if not figures:
        return ""
    rows = [
        ("pairs", f"{figures['pairs']} ({figures['tokens']} answer tokens)"),
        (
            "ranked right",
            f"{figures['pair_accuracy']:.1%} by reward; {figures['pair_accuracy_of_reference_logps']:.1%} by the"
            " reference's log-prob",
        ),
        (
            "mean margin",
            f"{figures['mean_margin']:+.3f} (chosen {figures['mean_chosen_reward']:+.3f},"
            f" rejected {figures['mean_rejected_reward']:+.3f})",
        ),
    ]
    if figures["rewards_not_finite"]:
        rows.append(("not finite", f"{figures['rewards_not_finite']} token rewards are infinite or NaN"))
    if figures["cut_pairs"]:
        rows.append(("cut", f"{figures['cut_pairs']} pairs, at {figures['max_length']} tokens"))
    rows += [
        ("tokens", str(options.out / TOKENS)),
        ("pairs", str(options.out / PAIRS)),
        ("report", str(options.out / REPORT)),
    ]
    return "\n".join(f"{name:<13} {text}" for name, text in rows)
