"""Reading preferences as people have them: files, folders and data sets of the hub, in any usual layout, to one record.

Sources: JSON arrays and JSON lines, plain or .gz; CSV and TSV; Parquet and Arrow files; folders of these; what
`save_to_disk` of `datasets` writes; OWNER/NAME of a data set on the Hugging Face Hub (through `datasets`, which
downloads it). All but JSON arrays are read a few records at a time.

Layouts of a record, told apart record by record:

    {"prompt": "...", "chosen": "...", "rejected": "..."}                                   plain strings
    {"prompt": [MESSAGE, ...], "chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}        chat messages
    {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}                                  whole conversations
    {"messages": [MESSAGE, ...], "chosen": MESSAGE, "rejected": MESSAGE}
    {"conversations": [TURN, ...], "chosen": TURN, "rejected": TURN}                        ShareGPT
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "\\n\\nHuman: ..."}      HH-RLHF
    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}              Alpaca
    {"question": "...", "chosen": "...", "rejected": "..."}                                 also "query"
    {"question": "...", "response_j": "...", "response_k": "..."}                           the better one is j
    {"instruction": "...", "chosen_response": "...", "rejected_response": "..."}
    {"prompt": "...", "response_0": "...", "response_1": "...", "better_response_id": 0}
    {"instruction": "...", "completions": [{"response": "...", "overall_score": 7.5}, ...]} UltraFeedback

MESSAGE is {"role": "user", "content": "..."}, TURN is {"from": "human", "value": "..."}. A prompt may be a string or
messages, whatever the answers are; answers given as conversations may repeat the prompt. Answers of several turns, with
results of tools or words of the user between, are trajectories: of them, only what the assistant said is trained and
scored. Needs neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, NamedTuple

from .records.layouts import preference
from .records.pairs import ROLES as ROLES
from .records.pairs import DataError, Message, Preference, Unusable
from .records.sources import Source

__all__ = [
    "DataError",
    "Message",
    "Preference",
    "PreferenceData",
    "PreferenceFile",
    "as_preferences",
    "open_preferences",
    "read_preferences",
]

_REASONS = 20  # that are told apart when records are left out
_OTHER = "expected other things"


class PreferenceFile(NamedTuple):
    """What a file held.

    pairs: in the order of the file.
    ignored_fields: names of fields beside those of the layouts above, sorted; ids, scores and the like.
    """

    pairs: list[Preference]
    ignored_fields: tuple[str, ...]


class PreferenceData:
    """Preference pairs that are read anew each time they are iterated over; `open_preferences` makes one.

    Iterating gives `Preference`s, `numbered()` each with the number of its record. What memory they take does not
    depend on how many there are, but for JSON arrays, which are parsed as a whole.

    Attributes:
        name: of the file, the folder or the data set.
        skip_invalid: whether records that cannot be used are left out.
        ignored_fields: names of fields that no layout has, sorted, among the records read so far.
        skipped: how many records the latest iteration has left out, by what was expected of them.
    """

    def __init__(self, source: Source, skip_invalid: bool = False):
        self.name, self.skip_invalid = source.name, skip_invalid
        self.skipped: Counter[str] = Counter()
        self._source, self._ignored = source, set[str]()

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        return tuple(sorted(self._ignored))

    def __iter__(self) -> Iterator[Preference]:
        return (pair for _, pair in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Preference]]:
        """The pairs, each with the number of its record, from 0; numbers of records that are left out are missing.

        Raises:
            DataError: as `open_preferences`; records that cannot be used, unless `skip_invalid` leaves them out; no
                pair at all.
        """
        self.skipped.clear()
        number, used = -1, 0
        for number, (place, record) in enumerate(self._source.rows()):
            try:
                pair, read = preference(record)
            except Unusable as error:
                if not self.skip_invalid:
                    raise DataError(f"{self.name}, {place}: {error}") from None
                reason = error.reason
                known = reason in self.skipped or len(self.skipped) < _REASONS
                self.skipped[reason if known else _OTHER] += 1
                continue
            self._ignored.update(name for name in record if name not in read)
            used += 1
            yield number, pair
        if not used and self.skipped:
            raise DataError(f"{self.name}: no record can be used; {self.skipped_line()}")

    def skipped_line(self) -> str:
        """What was left out, in one line; "" if nothing was."""
        if not self.skipped:
            return ""
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common(5))
        more = f"; and {len(self.skipped) - 5} more reasons" if len(self.skipped) > 5 else ""
        count = sum(self.skipped.values())
        return f"left out {count} record{'s' if count > 1 else ''}: {reasons}{more}"


def open_preferences(
    source: str | PathLike[str],
    *,
    split: str | None = None,
    config: str | None = None,
    skip_invalid: bool = False,
) -> PreferenceData:
    """Preference data of any size, read while it is used.

    Args:
        source: a file, a folder, or OWNER/NAME of a data set on the Hugging Face Hub. In a folder, files are Parquet,
            Arrow, JSON lines, JSON or CSV, the first of these that it has; their names tell the split as on the hub
            ("train-00000-of-00002.parquet", "test.jsonl"), and files whose names tell none are "train".
        split: of a folder or a data set on the hub; None for its only one, or "train".
        config: of a data set on the hub that has several.
        skip_invalid: leave records out that cannot be used, and count them, instead of raising an error.

    Returns:
        `PreferenceData`.

    Raises:
        DataError: no such folder or data set, no such split, a package that is missing. What is wrong with a file or a
            record shows when it is read; messages name the file and the line (JSON lines, CSV), the row (Parquet,
            Arrow) or the record (JSON).
    """
    return PreferenceData(Source(source, split, config), skip_invalid)


def read_preferences(path: str | PathLike[str], *, minimum: int = 1, split: str | None = None) -> PreferenceFile:
    """Read and check all preferences of a source, into a list.

    Args:
        path: as `open_preferences` takes it. Of a file, its first bytes tell Parquet, Arrow and gzip, its ending the
            rest; with an ending that says nothing, the first character tells an array from JSON lines. Text is UTF-8,
            with or without a byte order mark.
        minimum: the fewest pairs that are of use to the caller.
        split: as `open_preferences`.

    Returns:
        `PreferenceFile`.

    Raises:
        DataError: the source is missing, unreadable, not UTF-8, empty, not JSON, has too few pairs, or a record is not
            in one of the known layouts, has an empty answer or two identical ones.
    """
    data = open_preferences(path, split=split)
    pairs = list(data)
    if len(pairs) < minimum:
        raise DataError(
            f"{data.name}: expected at least {minimum} preference pair{'s' if minimum > 1 else ''}, found {len(pairs)}"
        )
    return PreferenceFile(pairs, data.ignored_fields)


def as_preferences(records: Iterable[Any]) -> list[Preference]:
    """Check records that are at hand: dicts in the layouts above (the rows of a data set), or `Preference`s.

    Raises:
        DataError: a record that cannot be used, by its number from 0.
        TypeError: a path instead of records.
    """
    if isinstance(records, (str, PathLike)):
        raise TypeError(
            f"expected preference records, got the path {os.fspath(records)!r}: read_preferences(path).pairs reads it"
        )
    pairs = []
    for number, record in enumerate(records):
        try:
            pairs.append(record if isinstance(record, Preference) else preference(record)[0])
        except Unusable as error:
            raise DataError(f"pair {number}: {error}") from None
    return pairs
