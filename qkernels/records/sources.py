"""From a file, a folder or the name of a data set on the hub to records, read one after the other."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from ..text.characters import first_line
from ..text.hub import is_hub_name
from .pairs import DataError, found
from .tables import arrow_rows, csv_rows, parquet_rows

# Where a record stands, for messages, and the record.
Row = tuple[str, Any]

_GZIP = b"\x1f\x8b"
# First bytes of what data sets also come in, and what is not read.
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a file compressed with bzip2",
    b"\xfd7zXZ": "a file compressed with xz",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd",
}
# Endings of the files that are read from a folder; where it has several kinds, the first of these.
_KINDS = ((".parquet",), (".arrow",), (".jsonl", ".ndjson", ".jsonl.gz"), (".json", ".json.gz"), (".csv", ".tsv"))
_ENDINGS = tuple(ending for kind in _KINDS for ending in kind)
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_NUMBERED = re.compile(r"(.+?)-\d+-of-\d+$")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_WORDS = re.compile(r"[^a-z0-9]+")


class Source:
    """Where records come from.

    Args:
        name: a file, a folder, or OWNER/NAME of a data set on the Hugging Face Hub.
        split: of a folder or a data set on the hub; None for its only one, or "train".
        config: of a data set on the hub that has several.

    Raises:
        DataError: there is no such thing, or it has no such split.
    """

    def __init__(self, name: str | PathLike[str], split: str | None = None, config: str | None = None):
        self.name = os.fspath(name)
        path = Path(self.name)
        self._rows: Callable[[], Iterator[Row]]
        if path.is_dir():
            self._rows = _folder(path, split)
        elif path.exists() or not is_hub_name(self.name, _ENDINGS):
            if split is not None and path.exists():
                raise DataError(f"{path}: a file has no splits, and the split {split!r} was asked for")
            self._rows = lambda: _file(path)
        else:
            self._rows = _hub(self.name, split, config)

    def rows(self) -> Iterator[Row]:
        """The records, from the first on.

        Raises:
            DataError: what cannot be read; no record at all.
        """
        row = None
        for row in self._rows():
            yield row
        if row is None:
            raise DataError(f"{self.name}: there is no record in it")


# --- folders and the hub ----------------------------------------------------------------------------------------------


def _folder(path: Path, split: str | None) -> Callable[[], Iterator[Row]]:
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits", [])
        return _folder(path / _one_split(path, splits, split), None)
    if (path / "state.json").is_file():
        if split is not None:
            raise DataError(f"{path}: the data set has no splits, and the split {split!r} was asked for")
        files = [path / entry["filename"] for entry in _json(path / "state.json").get("_data_files", [])]
        return lambda: _files(files)
    by_split: dict[str, list[Path]] = {}
    for file in _data_files(path):
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not by_split:
        held = sorted(entry.name for entry in path.iterdir())
        raise DataError(
            f"{path}: expected a folder with data ({', '.join(_ENDINGS)}, or what save_to_disk writes), found"
            f" {', '.join(map(repr, held[:5])) or 'an empty folder'}"
        )
    files = by_split[_one_split(path, list(by_split), split)]
    return lambda: _files(files)


def _data_files(folder: Path) -> list[Path]:
    """The files of the first kind that there is, sorted; nothing hidden, and no file about the data."""
    everything = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.name not in _NOT_DATA
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    ]
    for endings in _KINDS:
        files = [file for file in everything if file.name.lower().endswith(endings)]
        if files:
            return files
    return []


def _split_of(file: Path) -> str:
    """The split that a file's name tells, as on the hub: "train-00000-of-00002.parquet", "test.jsonl", "dev/a.csv"."""
    stem = file.name.lower()
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    numbered = _NUMBERED.match(stem)
    if numbered:
        return numbered[1]
    for part in (stem, *reversed(file.parts[:-1])):
        words = [_SPLITS[word] for word in _WORDS.split(part.lower()) if word in _SPLITS]
        if words:
            return words[-1]
    return "train"


def _one_split(where: object, splits: list[str], wanted: str | None) -> str:
    if wanted is None:
        if len(splits) == 1:
            return splits[0]
        if "train" in splits:
            return "train"
    elif wanted in splits:
        return wanted
    listed = ", ".join(map(repr, sorted(splits)))
    if wanted is None:
        raise DataError(f"{where}: expected one split, or one called 'train', found {listed}; say which")
    raise DataError(f"{where}: expected the split {wanted!r}, found {listed}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object, found {found(value)}")
    return value


def _hub(name: str, split: str | None, config: str | None) -> Callable[[], Iterator[Row]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            f"{name}: no such file; to read a data set of that name from the hub: pip install datasets"
        ) from None
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, the hub, a builder
        raise DataError(f"{name}: no such file, and as a data set of the hub: {first_line(error)}") from error
    if hasattr(data, "keys"):
        data = data[_one_split(name, list(data.keys()), split)]
    return lambda: ((f"row {number}", record) for number, record in enumerate(data, 1))


# --- files ------------------------------------------------------------------------------------------------------------


def _files(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        for place, record in _file(path):
            yield f"{path.name}, {place}", record


def _file(path: Path) -> Iterator[Row]:
    try:
        if path.exists() and not path.is_file():  # each reading begins anew, which a pipe cannot do
            raise DataError(f"{path}: expected a file, found a pipe or a device; write its contents to a file first")
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    for magic, kind in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise DataError(f"{path}: expected JSON, JSON lines, CSV, Parquet or Arrow, found {kind}; unpack it first")
    ending = path.name.lower()
    if start.startswith(b"PAR1"):
        yield from parquet_rows(path)
    elif start.startswith(b"ARROW1") or ending.endswith((".arrow", ".feather")):
        yield from arrow_rows(path)
    elif start.startswith(_GZIP):
        try:
            with gzip.open(path) as file:
                yield from _text(path, ending.removesuffix(".gz"), file)  # type: ignore[arg-type]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({first_line(error)})") from None
    else:
        with path.open("rb") as file:
            yield from _text(path, ending, file)


def _text(path: Path, name: str, file: BinaryIO) -> Iterator[Row]:
    """The records of a text file, whose name, without an ending of compression, tells what it holds."""
    if name.endswith((".csv", ".tsv")):
        yield from csv_rows(path, file, "\t" if name.endswith(".tsv") else ",")
        return
    first = _first_lines(file)
    file.seek(0)
    if not first:
        raise DataError(f"{path}: the file is empty; expected records, as a JSON array or as JSON lines")
    is_lines = name.endswith((".jsonl", ".ndjson"))
    if not is_lines and first[0].startswith(b"{"):
        # One object a line under the name .json is common.
        is_lines = not name.endswith(".json") or (len(first) > 1 and _is_json_object(first[0]))
    yield from _json_lines(path, file) if is_lines else _json_array(path, file)


def _first_lines(file: BinaryIO) -> list[bytes]:
    """The first two lines that are not blank, without a byte order mark."""
    lines: list[bytes] = []
    for line in file:
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            lines.append(line)
        if len(lines) == 2:
            break
    return lines


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _decoded(path: Path, raw: bytes, first_line_number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line_number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + first_line_number
        raise DataError(
            f"{path}, line {line}: expected UTF-8 text, found byte 0x{raw[error.start]:02x} ({error.reason})"
        ) from None


def _json_array(path: Path, file: BinaryIO) -> Iterator[Row]:
    text = _decoded(path, file.read(), 1)
    try:
        document = json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be preference pairs") from None
    except ValueError as error:
        raise DataError(f"{path}, {_syntax(error)}") from None
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise DataError(f"{path}: expected an array of records, found {found(document)}")
    for number, record in enumerate(document, 1):
        yield f"record {number}", record


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    for number, raw in enumerate(file, 1):
        line = _decoded(path, raw, number).rstrip("\r\n")
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deeply to be a preference pair") from None
        except ValueError as error:
            raise DataError(f"{path}, {_syntax(error, number)}") from None


def _syntax(error: ValueError, line: int | None = None) -> str:
    if not isinstance(error, json.JSONDecodeError):  # an integer of thousands of digits
        return f"line {line}: {error}" if line else str(error)
    return f"line {line or error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
