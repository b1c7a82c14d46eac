"""The files of a run's folder: names, and reading them. What is read is checked, or ends in one `ScoreError`.

A folder may be damaged, or made by somebody to do harm; nothing that lies in it is trusted to have the form that a run
writes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import Message, Preference
from ..text.characters import first_line
from .options import ScoreError
from .table import KEYS, SIDES, TokenTable

TOKENS, PAIRS, SUMMARY, REPORT, SETTINGS, CHECKSUMS, LOCK, PARTS = (
    "tokens.parquet",
    "pairs.parquet",
    "summary.json",
    "report.html",
    "settings.json",
    "checksums.json",
    ".lock",
    "parts",
)
RANKS = "ranks"
TEMPORARY = ".partial-"
FORMAT = 2  # 1: no checksums, no lock
ALWAYS = ("logps", "reference_logps", "implicit_rewards")  # outputs of every run
CUT_COLUMNS = ("prompt_cut", "chosen_cut", "rejected_cut")
COUNT_COLUMNS = ("chosen_tokens", "rejected_tokens")
RESTORE = "restore the file from a copy, or score again with --overwrite"

_METADATA = b"qkernels"
_PART = re.compile(rf"{PARTS}/\d{{6}}\.parquet")
_RANK = re.compile(rf"{RANKS}/\d{{5}}")
_LARGEST = 2**31 - 1  # of a pair's number and of counts
_COUNTS = struct.Struct(f"<{1 + len(CUT_COLUMNS) + len(COUNT_COLUMNS)}i")  # of a PairInfo


def rank_folder(rank: int) -> str:
    """Where a rank of a run of many writes, a folder like that of a run of its own."""
    return f"{RANKS}/{rank:05d}"


def is_rank_folder(name: str) -> bool:
    """Whether a path inside the folder is a rank's folder."""
    return _RANK.fullmatch(name) is not None


def in_rank(name: str) -> str:
    """A path inside the folder without the rank's folder that it may begin with."""
    head, rest = name[: len(RANKS) + 7], name[len(RANKS) + 7 :]
    return rest if _RANK.fullmatch(head[:-1]) and head.endswith("/") else name


def part_name(number: int) -> str:
    """Where a part lies in the folder."""
    return f"{PARTS}/{number:06d}.parquet"


def part_number(name: str) -> int:
    """The number in the name of a part."""
    return int(name[len(PARTS) + 1 :].partition(".")[0])


def is_part(name: str) -> bool:
    """Whether a path inside the folder is a part's."""
    return _PART.fullmatch(name) is not None


def temporary_name(name: str) -> str:
    """Where a file is written before it is complete."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{TEMPORARY}{file}"


def as_json(value: Any) -> str:
    """A value as the text of a file; numbers that JSON does not have, NaN and the infinite ones, as null."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same with numbers that JSON does not have as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path, advice: str = RESTORE) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ScoreError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read ({error.strerror or error}); {advice}") from None
    except RecursionError:
        raise ScoreError(f"{path}: damaged (nested too deeply); {advice}") from None
    except ValueError as error:
        raise ScoreError(f"{path}: damaged ({first_line(error)}); {advice}") from None
    if not isinstance(value, dict):
        raise ScoreError(f"{path}: damaged (expected an object, found {type(value).__name__}); {advice}")
    return value


# --- settings ---------------------------------------------------------------------------------------------------------


def are_settings(value: Any) -> bool:
    """Whether a JSON value is what a run notes of its settings: so that its folder is known for one."""
    return (
        isinstance(value, dict)
        and value.get("format") in (1, FORMAT)
        and {"model", "reference", "beta", "outputs", "special_ids"} <= set(value)
    )


def read_settings(out: Path) -> dict[str, Any]:
    """`settings.json` of a run.

    Raises:
        ScoreError: there is none, or not one that a run writes.
    """
    path = out / SETTINGS
    if not path.is_file():
        raise ScoreError(f"{out}: not a folder of scores; it has no {SETTINGS}")
    settings = read_json(path)
    if not are_settings(settings):
        newer = settings.get("format")
        if isinstance(newer, int) and newer > FORMAT:
            raise ScoreError(f"{path}: format {newer}, of a later version of qkernels; this one reads up to {FORMAT}")
        raise ScoreError(f"{path}: damaged (not the settings of a run); {RESTORE}")
    outputs, special = settings["outputs"], settings["special_ids"]
    if not (
        _are(outputs, str) and set(ALWAYS) <= set(outputs) and len(set(outputs)) == len(outputs) and _are(special, int)
    ):
        raise ScoreError(f"{path}: damaged (outputs or special_ids are not what a run writes); {RESTORE}")
    return settings


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


# --- what is known of pairs -------------------------------------------------------------------------------------------


class PairInfo(NamedTuple):
    """What a scored pair was, to tell on resuming whether it still is the same, and in the end whether it is complete.

    digest: of its texts.
    longest: tokens of its longer sequence, after any cut.
    cuts: tokens cut off the prompt, the chosen and the rejected answer.
    tokens: rows of the chosen and of the rejected answer.
    """

    digest: str
    longest: int
    cuts: tuple[int, ...]
    tokens: tuple[int, ...]

    @staticmethod
    def of(values: Any) -> PairInfo:
        """From JSON or a table. ValueError for anything that is none."""
        digest, longest, cuts, tokens = values
        counts = [longest, *cuts, *tokens]
        if not isinstance(digest, str) or len(cuts) != len(CUT_COLUMNS) or len(tokens) != len(COUNT_COLUMNS):
            raise ValueError("not a pair's")
        if any(type(count) is not int or not 0 <= count <= _LARGEST for count in counts):
            raise ValueError("not a pair's numbers")
        return PairInfo(digest, longest, tuple(cuts), tuple(tokens))


class PairInfos(MutableMapping[int, PairInfo]):
    """`PairInfo` by the pair's number, ascending as they come, in a fraction of the memory: there may be millions."""

    def __init__(self, given: Mapping[int, PairInfo] | None = None):
        self._packed: dict[int, bytes] = {}
        self.update(given or {})

    def __getitem__(self, pair: int) -> PairInfo:
        packed = self._packed[pair]
        longest, *counts = _COUNTS.unpack_from(packed)
        cuts, tokens = counts[: len(CUT_COLUMNS)], counts[len(CUT_COLUMNS) :]
        return PairInfo(packed[_COUNTS.size :].decode("utf-8", "surrogatepass"), longest, tuple(cuts), tuple(tokens))

    def __setitem__(self, pair: int, info: PairInfo) -> None:
        counts = _COUNTS.pack(info.longest, *info.cuts, *info.tokens)
        self._packed[pair] = counts + info.digest.encode("utf-8", "surrogatepass")

    def __delitem__(self, pair: int) -> None:
        del self._packed[pair]

    def __contains__(self, pair: object) -> bool:
        return pair in self._packed

    def __iter__(self) -> Iterator[int]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def digest(pair: Preference) -> str:
    """What tells one pair's texts from another's."""
    fields: list[Any] = [_plain(pair.prompt), pair.chosen, pair.rejected]
    if pair.chosen_turns or pair.tools:
        fields += [_plain(pair.chosen_turns), _plain(pair.rejected_turns), pair.tools]
    text = json.dumps(fields, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(messages: Iterable[Message]) -> list[Sequence[str]]:
    """Messages as lists of texts; of those that say nothing more than their text, role and text."""
    return [message if message.more else message[:2] for message in messages]


def metadata_of(info: Mapping[int, PairInfo]) -> dict[bytes, str]:
    """What a part says of its pairs, as metadata of the file."""
    return {_METADATA: json.dumps(info, separators=(",", ":"))}


# --- tables -----------------------------------------------------------------------------------------------------------


class TokenFile:
    """A Parquet file of token rows, whose columns are what they should be.

    Args:
        path: of the file.
        columns: those that are read, `KEYS` or some of them first; None for all.
        advice: what to do about a file that cannot be used.

    Raises:
        ScoreError: here and from every method: the file cannot be read, a column is missing or of another type, a
            value is missing or impossible.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None, advice: str = RESTORE):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.advice = path, advice
        # Whatever pyarrow or numpy raises on bytes that somebody has made up.
        self._errors = (OSError, MemoryError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError)
        try:
            self._file = pq.ParquetFile(path)
            self.names = list(self._file.schema_arrow.names)
            self.groups = int(self._file.num_row_groups)
            self._metadata = dict(self._file.schema_arrow.metadata or {})
        except self._errors as error:
            raise self._damaged(f"cannot be read: {first_line(error)}") from None
        self.columns = list(self.names if columns is None else columns)
        missing = [name for name in self.columns if name not in self.names]
        if missing or len(set(self.names)) < len(self.names):
            raise ScoreError(
                f"{path}: expected the columns {', '.join(self.columns)}; missing: {', '.join(missing) or 'none'},"
                f" found: {', '.join(self.names)}; {advice}"
            )
        for name in self.columns:
            self._check_type(name)

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _damaged(self, what: str) -> ScoreError:
        return ScoreError(f"{self.path}: damaged ({what}); {self.advice}")

    def _check_type(self, name: str) -> None:
        from pyarrow import types, uint64

        kind = self._file.schema_arrow.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if name in ("side", "token", "digest", "prompt"):
            fine, expected = types.is_string(value) or types.is_large_string(value), "text"
        elif name in (*KEYS, *CUT_COLUMNS, *COUNT_COLUMNS, "longest"):
            fine, expected = types.is_integer(kind) and kind != uint64(), "integers"
        else:
            fine = types.is_floating(kind) or (name == "is_top1" and types.is_boolean(kind))
            expected = "numbers"
        if not fine:
            raise self._damaged(f"column {name} holds {kind}, expected {expected}")

    def info(self) -> dict[int, PairInfo]:
        """What the metadata of a part says of its pairs."""
        try:
            found = json.loads(self._metadata.get(_METADATA, b"null"))
            info = {int(pair): PairInfo.of(values) for pair, values in found.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise self._damaged("its metadata do not say which pairs it holds") from None
        if any(not 0 <= pair <= _LARGEST for pair in info):
            raise self._damaged("its metadata name an impossible pair")
        return info

    def arrow(self, group: int | None = None, columns: Sequence[str] | None = None) -> Any:
        """Columns (by default all) of one row group or of all, as a `pyarrow.Table` without missing values."""
        import pyarrow.compute as pc
        from pyarrow import types

        columns = self.columns if columns is None else list(columns)
        try:
            file = self._file
            rows = file.read(columns) if group is None else file.read_row_group(group, columns)
            rows.validate(full=True)  # text that is no UTF-8, indices that point nowhere
            rows = rows.select(columns)
            for name in columns:
                if types.is_dictionary(rows.column(name).type):
                    at = rows.column_names.index(name)
                    rows = rows.set_column(at, name, rows.column(name).cast(rows.column(name).type.value_type))
        except self._errors as error:
            raise self._damaged(first_line(error)) from None
        for name in columns:
            if rows.column(name).null_count:
                raise self._damaged(f"column {name} lacks values")
        if "pair" in columns and rows.num_rows:
            bounds = pc.min_max(rows.column("pair")).as_py()
            if not 0 <= bounds["min"] <= bounds["max"] <= _LARGEST:
                raise self._damaged("column pair holds an impossible number")
        if "side" in columns and not set(pc.unique(rows.column("side")).to_pylist()) <= set(SIDES):
            raise self._damaged(f"column side holds something else than {' and '.join(SIDES)}")
        return rows

    def pairs(self, group: int) -> list[int]:
        """The numbers of the pairs in a row group."""
        import pyarrow.compute as pc

        return sorted(pc.unique(self.arrow(group, ["pair"]).column("pair")).to_pylist())

    def table(self, group: int | None = None) -> TokenTable:
        """The same as a sorted `TokenTable` of whole pairs; the columns have to include `KEYS`."""
        table = TokenTable.from_arrow(self.arrow(group)).sorted()
        check_rows(table, self.path)
        return table


def read_pairs(path: Path, prompts: bool) -> tuple[PairInfos, dict[int, list[tuple[str, str]]]]:
    """`pairs.parquet`: what is known of each pair, and its prompt's (role, text) by message if asked for."""
    names = ["pair", "digest", "longest", *CUT_COLUMNS, *COUNT_COLUMNS, *(["prompt"] if prompts else [])]
    info, texts = PairInfos(), {}
    with TokenFile(path, names) as file:
        for row in itertools.chain.from_iterable(file.arrow(group).to_pylist() for group in range(file.groups)):
            try:
                info[row["pair"]] = PairInfo.of(
                    (
                        row["digest"],
                        row["longest"],
                        [row[name] for name in CUT_COLUMNS],
                        [row[name] for name in COUNT_COLUMNS],
                    )
                )
                if prompts:
                    texts[row["pair"]] = [_message(message) for message in json.loads(row["prompt"])]
            except (ValueError, TypeError, RecursionError):
                raise ScoreError(f"{path}: damaged (pair {row['pair']}); {RESTORE}") from None
    return info, texts


def _message(value: Any) -> tuple[str, str]:
    role, text = value
    if not (isinstance(role, str) and isinstance(text, str)):
        raise ValueError("not a message")
    return role, text


# --- completeness -----------------------------------------------------------------------------------------------------


def check_rows(table: TokenTable, where: Path, info: Mapping[int, PairInfo] | None = None) -> list[int]:
    """Whether both answers of each pair are there from their first token on, each row once; the pairs' numbers.

    Args:
        table: sorted.
        where: the file, for messages.
        info: how many tokens each answer has; None if that is not known.

    Raises:
        ScoreError: naming the first pair that is not whole.
    """
    import numpy as np

    keys = 2 * table["pair"].astype(np.int64) + (table["side"] != SIDES[0])
    answers, first, counts = np.unique(keys, return_index=True, return_counts=True)
    expected = np.arange(len(table)) - np.repeat(first, counts)
    wrong = np.flatnonzero((table["position"] != expected) | (keys != np.repeat(answers, counts)))
    if len(wrong):
        raise _incomplete(where, int(keys[wrong[0]]) // 2, "a row is missing, or there twice")
    pairs, sides = np.unique(answers // 2, return_counts=True)
    if (sides != len(SIDES)).any():
        raise _incomplete(where, int(pairs[np.flatnonzero(sides != len(SIDES))[0]]), "one of its answers is missing")
    if info is not None:
        for i, pair in enumerate(pairs.tolist()):
            known = info.get(pair)
            found = tuple(counts[2 * i : 2 * i + 2].tolist())
            if known is None:
                raise _incomplete(where, pair, "nothing says that it was scored")
            if known.tokens != found:
                counted, expected_counts = (" and ".join(map(str, some)) for some in (found, known.tokens))
                raise _incomplete(where, pair, f"{counted} tokens instead of {expected_counts}")
    return [int(pair) for pair in pairs]


def _incomplete(where: Path, pair: int, what: str) -> ScoreError:
    return ScoreError(f"{where}: pair {pair} is not as it was scored ({what}); {RESTORE}")


def check_all_there(found: Sequence[int], info: Mapping[int, PairInfo], where: Path) -> None:
    """Whether the pairs of a table are exactly those that were scored, each once, in order.

    Raises:
        ScoreError: naming some that are not.
    """
    missing = sorted(set(info) - set(found))
    if missing:
        some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        raise ScoreError(f"{where}: {len(missing)} of {len(info)} scored pairs are missing from it ({some}); {RESTORE}")
    if any(a >= b for a, b in zip(found, list(found)[1:], strict=False)):
        raise ScoreError(f"{where}: its pairs are not in order, each once; {RESTORE}")


def windows_of(file: TokenFile, info: Mapping[int, PairInfo]) -> Iterator[TokenTable]:
    """The row groups of a merged table, in order, each pair checked; at the end, whether all are there."""
    found: list[int] = []
    for group in range(file.groups):
        table = file.table(group)
        found += check_rows(table, file.path, info)
        yield table
    check_all_there(found, info, file.path)
