"""Pairs to token ids in Arrow files, a few in memory at a time, and which of them are held out.

Token ids are those of `qkernels score`: the prompt and an answer rendered and tokenised as one text. In a trajectory,
what the assistant did not say has a token weight of 0, which leaves it out of the loss.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ..data import DataError, Preference, PreferenceData, open_preferences
from ..score.encode import EncodedAnswer, Encoder
from ..score.rows import columns, row
from ..text.between import interleaved
from .options import TrainError, TrainOptions

TRAIN, HELD_OUT, CHOSEN = "train.arrow", "held_out.arrow", "chosen.arrow"
_SHARE, _MOST_HELD_OUT = 0.1, 200
_ROWS = 256  # that are tokenised and written together


class Prepared(NamedTuple):
    """The data of a run.

    folder: with the Arrow files.
    held_out: the held-out pairs, with the numbers of their records.
    train_pairs: how many are trained on.
    split: how the held-out pairs were chosen, in words.
    ignored_fields, skipped: of the data: fields that no layout has; in words, records that were left out.
    longer, dropped: training pairs that are cut to the most tokens, and those whose prompt alone has as many.
    unanswered: held-out pairs whose prompt alone has as many: nothing of their answers could be measured in training.
    trajectories: whether some answers have several turns.
    digest: of everything that is trained on.
    """

    folder: Path
    held_out: dict[int, Preference]
    train_pairs: int
    split: str
    ignored_fields: tuple[str, ...]
    skipped: str
    longer: int
    dropped: int
    unanswered: int
    trajectories: bool
    digest: str


class _Sources(NamedTuple):
    train: PreferenceData
    evaluation: PreferenceData | None


def open_sources(options: TrainOptions) -> _Sources:
    """The data, opened.

    Raises:
        DataError: as `open_preferences`.
    """
    assert options.data is not None
    how: dict[str, Any] = {"config": options.data_config, "skip_invalid": options.skip_invalid}
    train = open_preferences(options.data, split=options.split, **how)
    if options.eval_data is None and options.eval_split is None:
        return _Sources(train, None)
    return _Sources(train, open_preferences(options.eval_data or options.data, split=options.eval_split, **how))


def prepare(
    options: TrainOptions, sources: _Sources, encoder: Encoder, max_length: int | None, seed: int, folder: Path
) -> Prepared:
    """Read, check, split and tokenise everything.

    Args:
        options: of the run.
        sources: its data.
        encoder: without a cut.
        max_length: TRL cuts longer sequences at their end; None for no cut.
        seed: of the split.
        folder: to write to.

    Raises:
        DataError, ScoreError: a record that cannot be used, rendered or tokenised; no pair is left to train on.
    """
    prompts: list[bytes] = []
    numbers: list[int] = []
    trajectories = False
    for number, pair in itertools.islice(sources.train.numbered(), options.limit):
        prompts.append(hashlib.blake2b(repr(pair.prompt).encode(), digest_size=8).digest())
        numbers.append(number)
        trajectories |= bool(pair.chosen_turns)
    skipped = sources.train.skipped_line()
    if sources.evaluation is not None:
        held_out = dict(itertools.islice(sources.evaluation.numbered(), _MOST_HELD_OUT))
        outside, split = set[int](), f"the first {len(held_out)} pairs of data of their own"
        trajectories |= any(pair.chosen_turns for pair in held_out.values())
    else:
        places, split = hold_out(prompts, options.held_out, seed)
        outside = {numbers[place] for place in places}
        held_out = {}
    if len(numbers) - len(outside) < 1:
        raise DataError(
            f"{sources.train.name}: expected pairs to train on, found {len(numbers)}, of which {len(outside)} are held"
            " out; --held-out 0 holds none out"
        )
    folder.mkdir(exist_ok=True)
    counts = {"longer": 0, "dropped": 0, "train": 0, "unanswered": 0}
    hasher = hashlib.sha256()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(_Writer(folder / name, columns))
            for name, columns in (
                (TRAIN, columns(trajectories)),
                (HELD_OUT, columns(trajectories)),
                *([(CHOSEN, ("input_ids", "labels"))] if options.wants_sft else []),
            )
        }

        def hold(chosen: EncodedAnswer, rejected: EncodedAnswer) -> None:
            if max_length is not None and len(chosen.prompt) >= max_length:
                counts["unanswered"] += 1
            else:
                writers[HELD_OUT].add(row(chosen, rejected, trajectories))

        pairs = itertools.islice(sources.train.numbered(), options.limit)
        for number, pair, (chosen, rejected) in _encoded(encoder, pairs):
            if number in outside:
                held_out[number] = pair
                hold(chosen, rejected)
                continue
            if max_length is not None:
                counts["longer"] += max(chosen.length, rejected.length) > max_length
                if len(chosen.prompt) >= max_length:
                    counts["dropped"] += 1
                    continue
            tokens = row(chosen, rejected, trajectories)
            counts["train"] += 1
            hasher.update(json.dumps(tokens).encode())
            writers[TRAIN].add(tokens)
            if options.wants_sft:
                writers[CHOSEN].add(_labelled(chosen, max_length))
        if sources.evaluation is not None:
            for _, _, (chosen, rejected) in _encoded(encoder, held_out.items()):
                hold(chosen, rejected)
    if not counts["train"]:
        raise DataError(
            f"{sources.train.name}: no pair is left to train on: the prompt alone of all {counts['dropped']} fills"
            f" max_length={max_length}; a larger --max-length keeps them"
        )
    return Prepared(
        folder, held_out, counts["train"], split, sources.train.ignored_fields, skipped, counts["longer"],
        counts["dropped"], counts["unanswered"], trajectories, hasher.hexdigest()[:16],
    )  # fmt: skip


def hold_out(prompts: list[bytes], wanted: int | None, seed: int) -> tuple[list[int], str]:
    """Which pairs to hold out, whole prompts at a time where there are several.

    Args:
        prompts: what tells one pair's prompt from another's.
        wanted: how many pairs, at most; None for a tenth, at most 200.
        seed: of the choice.

    Returns:
        Their places, ascending, and how they were chosen, in words.
    """
    if wanted is None:
        wanted = min(_MOST_HELD_OUT, round(_SHARE * len(prompts)))
    if not wanted:
        return [], "none are held out"
    groups: dict[bytes, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    parts, words = list(groups.values()), "held-out prompts do not occur in training"
    if min(map(len, parts)) > wanted:
        parts, words = [[place] for place in range(len(prompts))], "held-out pairs share prompts with training"
    random.Random(f"split {seed}").shuffle(parts)
    found: list[int] = []
    for part in parts:
        if len(found) + len(part) <= wanted:
            found += part
    return sorted(found), words


def _encoded(
    encoder: Encoder, pairs: Iterable[tuple[int, Preference]]
) -> Iterator[tuple[int, Preference, tuple[EncodedAnswer, EncodedAnswer]]]:
    remaining = iter(pairs)
    while neighbours := dict(itertools.islice(remaining, _ROWS)):
        for (number, pair), answers in zip(neighbours.items(), encoder.pairs(neighbours), strict=True):
            yield number, pair, answers


def _labelled(answer: EncodedAnswer, max_length: int | None) -> dict[str, list[int]]:
    """What supervised fine-tuning takes: the tokens, and labels of those that the assistant said."""
    tokens, scored = interleaved(answer.ids, answer.between)
    labels = [token if flag else -100 for token, flag in zip(tokens, scored, strict=True)]
    ids, labels = [*answer.prompt, *tokens], [-100] * len(answer.prompt) + labels
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


class _Writer:
    """An Arrow file that takes its name when it is complete; a context."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        import pyarrow as pa

        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._schema = pa.schema(
            [(name, pa.list_(pa.float32() if name.endswith("weights") else pa.int32())) for name in columns]
        )
        self._rows: list[dict[str, list[Any]]] = []

    def __enter__(self) -> _Writer:
        import pyarrow as pa

        self._file = pa.OSFile(str(self._partial), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        return self

    def add(self, row: dict[str, list[Any]]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            self._file.close()
            if kind is None:
                self._partial.replace(self.path)
        except OSError as failed:
            raise TrainError(f"{self.path}: cannot be written ({failed.strerror or failed})") from None
        finally:
            if kind is not None:
                self._partial.unlink(missing_ok=True)


def load(path: Path) -> Any:
    """An Arrow file as a `datasets.Dataset`, mapped into memory."""
    from datasets import Dataset

    return Dataset.from_file(str(path))
