"""Reading preference files: JSON or JSONL in the usual layouts, to one kind of record; errors that say where and what.

Layouts of a record, told apart record by record:

    {"prompt": "...", "chosen": "...", "rejected": "..."}                                   plain strings
    {"prompt": [MESSAGE, ...], "chosen": [MESSAGE], "rejected": [MESSAGE]}                  chat messages
    {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}                                  whole conversations
    {"conversations": [TURN, ...], "chosen": TURN, "rejected": TURN}                        ShareGPT

MESSAGE is {"role": "user", "content": "..."}, TURN is {"from": "human", "value": "..."}. A prompt may be a string or
messages, whatever the answers are; answers given as conversations may repeat the prompt. Needs neither torch nor
transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from .text.characters import PrintableError

# The names that data sets use for who is speaking, and ours.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_FIELDS = ("prompt", "chosen", "rejected", "conversations", "system")
# First bytes of what data sets also come in.
_OTHER_KINDS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "a file compressed with gzip",
    b"PK\x03\x04": "a zip archive",
}
_CONSTANTS = {True: "true", False: "false", None: "null"}


class DataError(PrintableError, ValueError):
    """A preference file that cannot be used; the message names the file, the place, what was expected and found."""


class Message(NamedTuple):
    """One turn of a conversation; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


class Preference(NamedTuple):
    """A prompt with a better and a worse answer.

    prompt: the conversation up to the answer, at least one message.
    chosen, rejected: the assistant's answers; neither is blank, and they differ.
    planted: character spans `[start, end)` of the rejected answer that are known to be wrong; empty if unknown.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    planted: tuple[tuple[int, int], ...] = ()


class PreferenceFile(NamedTuple):
    """What a file held.

    pairs: in the order of the file.
    ignored_fields: names of fields beside those of the layouts above, sorted; ids, scores and the like.
    """

    pairs: list[Preference]
    ignored_fields: tuple[str, ...]


class _Unusable(Exception):
    """What is wrong with a record, without the place."""


def read_preferences(path: str | PathLike[str], *, minimum: int = 1) -> PreferenceFile:
    """Read and check a whole preference file.

    Args:
        path: a `.json` file (an array of records) or a `.jsonl` file (one record a line); with any other ending the
            first character decides. UTF-8, with or without a byte order mark.
        minimum: the fewest pairs that are of use to the caller.

    Returns:
        `PreferenceFile`.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, empty, not JSON, has too few pairs, or a record is not
            one of the known layouts, has an empty answer or two identical ones. Names the file and the line (JSONL,
            JSON syntax) or the record (JSON).
    """
    text = _text(Path(path))
    pairs: list[Preference] = []
    ignored: set[str] = set()
    for place, record in _records(Path(path), text):
        try:
            pairs.append(_preference(record))
        except _Unusable as error:
            raise DataError(f"{path}, {place}: {error}") from None
        ignored.update(name for name in record if name not in _FIELDS)
    if len(pairs) < minimum:
        raise DataError(
            f"{path}: expected at least {minimum} preference pair{'s' if minimum > 1 else ''}, found {len(pairs)}"
        )
    return PreferenceFile(pairs, tuple(sorted(ignored)))


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
            pairs.append(record if isinstance(record, Preference) else _preference(record))
        except _Unusable as error:
            raise DataError(f"pair {number}: {error}") from None
    return pairs


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a JSON or JSONL file, found a folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    for start, kind in _OTHER_KINDS.items():
        if raw.startswith(start):
            raise DataError(f"{path}: expected JSON or JSON lines, found {kind}; convert it first")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8 text, found byte 0x{raw[error.start]:02x} ({error.reason})"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected preference pairs as a JSON array or as JSON lines")
    return text


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The records of the file, each with its place for error messages."""
    if path.suffix.lower() == ".jsonl" or (path.suffix.lower() != ".json" and text.lstrip()[0] == "{"):
        yield from _json_lines(path, text)
        return
    try:
        document = json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be preference pairs") from None
    except ValueError as error:
        lines = text.strip().split("\n")
        # One object a line under the name .json is common; a comma after the first one would be an array's.
        if text.lstrip()[0] == "{" and len(lines) > 1 and _is_json_object(lines[0]):
            yield from _json_lines(path, text)
            return
        raise DataError(f"{path}, {_syntax(error)}") from None
    if isinstance(document, dict) and "chosen" in document:
        document = [document]
    if not isinstance(document, list):
        raise DataError(f"{path}: expected an array of records, found {_found(document)}")
    for number, record in enumerate(document, 1):
        yield f"record {number}", record


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deeply to be a preference pair") from None
        except ValueError as error:
            raise DataError(f"{path}, {_syntax(error, number)}") from None


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _syntax(error: ValueError, line: int | None = None) -> str:
    if not isinstance(error, json.JSONDecodeError):  # an integer of thousands of digits
        return f"line {line}: {error}" if line else str(error)
    return f"line {line or error.lineno}, column {error.colno}: not valid JSON: {error.msg}"


def _preference(record: Any) -> Preference:
    if not isinstance(record, dict):
        raise _Unusable(f"expected an object with a prompt, 'chosen' and 'rejected', found {_found(record)}")
    for name in ("chosen", "rejected"):
        if name not in record:
            raise _Unusable(f"expected the field {name!r}, found only {_names(record)}")
    prompt_name = "conversations" if "conversations" in record else "prompt"
    if prompt_name == "conversations" and record.get("prompt") is not None:
        raise _Unusable("expected either 'prompt' or 'conversations', found both")
    prompt = record.get(prompt_name)
    given = None if prompt is None else _conversation(prompt, prompt_name, "user")
    chosen = _conversation(record["chosen"], "chosen", "assistant")
    rejected = _conversation(record["rejected"], "rejected", "assistant")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            found = f"one from {messages[-1].role!r}" if messages else "no message"
            raise _Unusable(f"expected {name!r} to end with a message from the assistant, found {found}")
        if not messages[-1].content.strip():
            raise _Unusable(f"expected an answer in {name!r}, found only an empty one")
    context = _context(given, isinstance(prompt, str), prompt_name, chosen[:-1], rejected[:-1])
    if record.get("system") is not None and _string(record["system"], "system").strip():
        context = (Message("system", record["system"]), *context)
    if not any(message.content.strip() for message in context):
        raise _Unusable("expected a prompt, found only an empty one")
    if chosen[-1].content == rejected[-1].content:
        raise _Unusable("expected two different answers, found 'chosen' and 'rejected' identical")
    return Preference(context, chosen[-1].content, rejected[-1].content)


def _context(
    given: tuple[Message, ...] | None,
    given_as_text: bool,
    name: str,
    before_chosen: tuple[Message, ...],
    before_rejected: tuple[Message, ...],
) -> tuple[Message, ...]:
    """The conversation before the answers, from the prompt field and from what the answers repeat of it.

    Args:
        given: the messages of the prompt field, None if there is none.
        given_as_text: whether that field was a string, which says nothing about a system message or earlier turns.
        name: of the prompt field.
        before_chosen, before_rejected: the messages of either side before its last.
    """
    if before_chosen != before_rejected:
        shared = next(
            (i for i, (a, b) in enumerate(zip(before_chosen, before_rejected, strict=False)) if a != b),
            min(len(before_chosen), len(before_rejected)),
        )
        raise _Unusable(
            "expected 'chosen' and 'rejected' to be the same conversation up to the last answer, found that they part"
            f" at message {shared + 1}"
        )
    if not before_chosen:
        if given is None:
            raise _Unusable("expected the field 'prompt' (or 'conversations'), found answers without one")
        return given
    if given is None:
        return before_chosen
    if given_as_text:
        agrees = any(m.role == "user" and m.content.strip() == given[0].content.strip() for m in before_chosen)
    else:
        agrees = before_chosen[: len(given)] == given
    if not agrees:
        raise _Unusable(f"expected the conversation in 'chosen' to contain {name!r}, found a different one")
    return before_chosen


def _conversation(value: Any, name: str, role: str) -> tuple[Message, ...]:
    """Messages out of a string (spoken by `role`), one message or a list of them."""
    if isinstance(value, str):
        return (Message(role, _string(value, name)),)
    if isinstance(value, dict):
        return (_message(value, name),)
    if isinstance(value, list):
        return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))
    raise _Unusable(f"expected {name!r} to be a string, a message or a list of messages, found {_found(value)}")


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise _Unusable(f"expected {name!r} to be a message, found {_found(value)}")
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in value and content_key in value:
            break
    else:
        raise _Unusable(
            f"expected {name!r} to have the fields 'role' and 'content' (or 'from' and 'value'), found {_names(value)}"
        )
    role = _string(value[role_key], f"{name}.{role_key}")
    if role.lower() not in ROLES:
        raise _Unusable(f"expected {name}.{role_key} to be one of {', '.join(ROLES)}, found {_found(role)}")
    return Message(ROLES[role.lower()], _string(value[content_key], f"{name}.{content_key}"))


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"expected {name!r} to be a string, found {_found(value)}")
    try:
        value.encode()  # UTF-8 refuses half surrogate pairs and nothing else
    except UnicodeEncodeError:
        raise _Unusable(
            f"expected {name!r} to be valid text, found half of a surrogate pair (a broken \\u escape)"
        ) from None
    return value


def _names(record: dict[str, Any]) -> str:
    return ", ".join(repr(_short(name)) for name in list(record)[:8]) + (" ..." if len(record) > 8 else "") or "none"


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _found(value: Any) -> str:
    """A JSON value in few words."""
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    if isinstance(value, str):
        return repr(_short(value)) if value else "an empty string"
    if isinstance(value, (int, float)):
        return f"the number {_short(repr(value))}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"an object with the fields {_names(value)}" if value else "an empty object"
