"""Tables as records: CSV, Parquet, and the Arrow files that `datasets` writes; a few rows in memory at a time."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..text.characters import first_line
from .pairs import DataError, message_keys

_ROWS = 256  # of a table that are in memory at a time
_LONGEST_CELL = 2**31 - 1
_OBJECTS = re.compile(r"\s*(\[\s*)?\{")


def csv_rows(path: Path, file: BinaryIO, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file with a header, each with its line for messages. A cell may hold messages as JSON."""
    # All readers of a process share this limit, and several are read in turn: it is raised and never lowered.
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, {place}: expected {len(reader.fieldnames or ())} cells, as in the header, found"
                        f" {'more' if None in row else 'fewer'}"
                    )
                yield place, {name: _cell(name, value) for name, value in row.items() if value != ""}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from None
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV ({error})") from None


def _cell(name: str, text: str) -> Any:
    """A cell's text, or the messages (or tools) that it holds; other JSON is text, since it may be an answer."""
    if not _OBJECTS.match(text):
        return text
    value = written(text)
    items = value if isinstance(value, list) else [value]
    are_meant = all(isinstance(item, dict) and (name == "tools" or message_keys(item)) for item in items)
    return value if items and are_meant else text


def written(text: str) -> Any:
    """The value that a text writes, as JSON or as pandas writes lists and dicts; the text itself if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file."""
    pq = _pyarrow(path, "parquet")
    with _reading(path, "a Parquet file"), pq.ParquetFile(path) as file:
        features = _features(file.schema_arrow)
        yield from _rows(file.iter_batches(batch_size=_ROWS), features)


def arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of an Arrow file, in the stream format (as `save_to_disk` writes) or the file format (Feather)."""
    ipc = _pyarrow(path, "ipc")
    with _reading(path, "an Arrow file"), path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if not is_file:
            reader = ipc.open_stream(file)
            yield from _rows(_small(reader), _features(reader.schema))
            return
        reader = ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _rows(_small(batches), _features(reader.schema))


def _small(batches: Any) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


class _reading:
    """A context that turns pyarrow's errors, and those of decoding what it read, into `DataError`."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(error, (pyarrow.ArrowException, OSError, ValueError, RecursionError)):
            raise DataError(f"{self._path}: cannot be read as {self._what} ({first_line(error)})") from None


def _pyarrow(path: Path, module: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"pyarrow.{module}")
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading this kind of file needs pyarrow: pip install pyarrow") from None


def _rows(batches: Any, features: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", {name: _plain(value, features.get(name)) for name, value in row.items()}


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` notes in a file about its columns: above all which of them are JSON in strings."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _plain(value: Any, feature: Any) -> Any:
    """A value as it was before it became a table: JSON decoded, and without the fields that only other rows have."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Json" and isinstance(value, str):
        return json.loads(value)
    if isinstance(value, list):
        inner = feature.get("feature") if kind in ("List", "LargeList", "Sequence") else None
        return [_plain(item, inner) for item in value]
    if isinstance(value, dict):
        inner = feature if kind is None and isinstance(feature, dict) else {}
        return {name: _plain(item, inner.get(name)) for name, item in value.items() if item is not None}
    return value
