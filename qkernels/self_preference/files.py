"""Prompts of a file; files that are complete or not there; what a stopped run leaves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .options import SelfPreferenceError

_TEXT_NAMES = ("prompt", "instruction", "question")


class Prompt(NamedTuple):
    """What a model is asked.

    text: of one message of the user.
    category: which of the judge's templates applies; None where there is one for all.
    """

    text: str
    category: str | None = None


def as_prompts(prompts: Iterable[Any]) -> list[Prompt]:
    """Check prompts: strings, `Prompt`s, or objects with "prompt" ("instruction", "question") and perhaps "category".

    Raises:
        SelfPreferenceError: one that is none of these or blank, by its number; none at all.
        TypeError: one string in place of a sequence.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of prompts, got one string; read_prompts(path) reads a file")
    found = []
    for number, given in enumerate(prompts):
        if isinstance(given, Prompt):
            prompt = given
        elif isinstance(given, str):
            prompt = Prompt(given)
        elif isinstance(given, dict):
            name = next((name for name in _TEXT_NAMES if name in given), None)
            prompt = Prompt(given[name] if name else None, given.get("category"))  # type: ignore[arg-type]
        else:
            prompt = Prompt(None)  # type: ignore[arg-type]
        if not isinstance(prompt.text, str) or not prompt.text.strip():
            raise SelfPreferenceError(
                f"prompt {number}: expected a text, or an object with 'prompt' and perhaps 'category'; found"
                f" {str(given)[:60]!r}"
            )
        found.append(prompt)
    if not found:
        raise SelfPreferenceError("expected at least one prompt, found none")
    return found


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Prompts of a file: a JSON array (.json), JSON lines (.jsonl), or else a text with one prompt a line.

    A JSON entry is a string, or an object with "prompt" (or "instruction", "question") and perhaps "category"; other
    fields, such as those of preference pairs, are ignored.

    Raises:
        SelfPreferenceError: the file is missing, not UTF-8, not JSON, or has an entry that is no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SelfPreferenceError(f"{path}: cannot be read ({error})") from None
    try:
        if path.suffix.lower() == ".json":
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise SelfPreferenceError(f"{path}: expected an array of prompts")
        elif path.suffix.lower() == ".jsonl":
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = [line for line in text.splitlines() if line.strip()]
    except ValueError as error:
        if isinstance(error, SelfPreferenceError):
            raise
        raise SelfPreferenceError(f"{path}: not valid JSON ({error})") from None
    try:
        return as_prompts(entries)
    except SelfPreferenceError as error:
        raise SelfPreferenceError(f"{path}: {error}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name first, so that it is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name(path.name + ".writing")
    other.write_text(text, encoding="utf-8")
    os.replace(other, path)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object of a file; None if there is no such file, or none that could be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def as_lines(records: Sequence[dict[str, Any]]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def digest(value: Any) -> str:
    """A short fingerprint of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
