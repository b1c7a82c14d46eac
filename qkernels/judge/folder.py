"""The folder of a comparison: files that grow a line at a time, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import folders
from ..score.files import LOCK, RESTORE, SETTINGS, as_json, read_json, temporary_name
from ..score.folder import RunLock, is_blank
from ..score.options import ScoreError
from .options import JudgeError

ANSWERS = {"a": "answers_a.jsonl", "b": "answers_b.jsonl"}
VERDICTS, QUESTIONS, FIGURES, REPORT = "verdicts.jsonl", "questions.jsonl", "judge.json", "report.html"
_OWN = (SETTINGS, *ANSWERS.values(), VERDICTS, QUESTIONS, FIGURES, REPORT)
_KIND = "qkernels judge 1"


class Folder:
    """Where a comparison is written to.

    Args:
        out: the folder.
        lock: of the folder.

    Every method raises JudgeError for what cannot be read or written.
    """

    def __init__(self, out: Path, lock: RunLock):
        self.out, self.lock = out, lock

    def refuse(self, resume: bool, overwrite: bool) -> None:
        """Say no before anything is loaded, if the folder is there and may not be touched."""
        out = self.out
        if not os.path.lexists(out):
            try:
                folders.try_to_make(out)
            except OSError as error:
                raise JudgeError(f"--out {out}: cannot be written ({error.strerror or error})") from None
            return
        if not out.is_dir():
            raise JudgeError(f"--out {out}: exists and is not a folder")
        if resume:
            if self._settings() is None and not is_blank(out):
                raise JudgeError(f"--out {out}: no comparison to resume there; it has no {SETTINGS} of one")
        elif not overwrite:
            raise JudgeError(
                f"--out {out}: the folder exists; go on with --resume, replace an earlier comparison with --overwrite,"
                " or choose another one"
            )
        elif self._settings() is None and not is_blank(out):
            raise JudgeError(
                f"--out {out}: --overwrite replaces only what an earlier comparison has written; the folder holds"
                f" {folders.some_of(sorted(entry.name for entry in out.iterdir()))}"
            )
        else:
            foreign = folders.foreign(out, _is_own, lambda _: False)
            if foreign:
                raise JudgeError(
                    f"--out {out}: --overwrite replaces only what an earlier comparison has written; the folder also"
                    f" holds {folders.some_of(foreign)}"
                )

    def open(self, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        """Make the folder, or take up what is in it: settings have to be those that it began with."""
        settings = {"kind": _KIND, **settings}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            earlier = self._settings()
            if earlier is not None and resume:
                now = json.loads(as_json(settings))
                changed = [
                    f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
                    for name in sorted({*earlier, *now})
                    if earlier.get(name) != now.get(name)
                ]
                if changed:
                    raise JudgeError(
                        f"--out {self.out}: --resume needs the settings that the run began with: {'; '.join(changed)}"
                    )
                return
            if earlier is not None and not overwrite:  # since `refuse` looked, before this process had the lock
                raise JudgeError(f"--out {self.out}: another run has written a comparison there meanwhile")
            if overwrite:  # the settings last: by them an interrupted deletion is known for one
                folders.remove(self.out, lambda name: _is_own(name) and name not in (LOCK, SETTINGS), lambda _: False)
                folders.remove(self.out, lambda name: name == SETTINGS, lambda _: False)
        except ScoreError as error:
            raise JudgeError(str(error)) from None
        except OSError as error:
            raise JudgeError(f"--out {self.out}: cannot be written ({error.strerror or error})") from None
        self.write(SETTINGS, as_json(settings))

    def _settings(self) -> dict[str, Any] | None:
        try:
            settings = read_json(self.out / SETTINGS, RESTORE)
        except ScoreError:
            return None
        return settings if settings.get("kind") == _KIND else None

    def write(self, name: str, text: str) -> None:
        """Write a file; it takes its name when it is complete."""
        temporary = self.out / temporary_name(name)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.out / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise JudgeError(f"--out {self.out}: {name} cannot be written ({error.strerror or error})") from None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a file that grows; what a run that was struck has left of a last line is cut off."""
        path = self.out / name
        try:
            raw = path.read_bytes() if path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw):
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            # Not splitlines(), which also parts a line at separators that JSON leaves as they are, such as U+2028.
            records = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        except OSError as error:
            raise JudgeError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, RecursionError):
            records = [None]
        for record in records:
            if not (isinstance(record, dict) and type(record.get("number")) is int):
                raise JudgeError(f"{path}: damaged (not the lines of a comparison); delete it and run again")
        return records

    def append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records to a file; they are on disk when this returns."""
        try:
            with (self.out / name).open("ab") as file:
                file.write(as_lines(records).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise JudgeError(f"--out {self.out}: {name} cannot be written ({error.strerror or error})") from None


def as_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _is_own(name: str) -> bool:
    return name in (*_OWN, LOCK) or name in map(temporary_name, _OWN)
