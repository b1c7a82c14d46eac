"""The folder of a run: whose it is, which process writes to it, and whether its files are as they were written."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ..report import folders
from .files import (
    CHECKSUMS,
    FORMAT,
    LOCK,
    PAIRS,
    PARTS,
    RANKS,
    REPORT,
    RESTORE,
    SETTINGS,
    SUMMARY,
    TEMPORARY,
    TOKENS,
    are_settings,
    as_json,
    in_rank,
    is_part,
    is_rank_folder,
    read_json,
    temporary_name,
)
from .options import ScoreError

_FILES = (TOKENS, PAIRS, SUMMARY, REPORT, SETTINGS)
_OLD_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY)}\d+-")  # format 1 put the process's number there
_BLOCK = 1 << 20


# --- whose it is ------------------------------------------------------------------------------------------------------


def is_own_name(name: str) -> bool:
    """Whether a run writes a file of this path, relative to its folder."""
    head, slash, last = in_rank(name).rpartition("/")
    plain = head + slash + _OLD_TEMPORARY.sub(TEMPORARY, last).removeprefix(TEMPORARY)
    return plain in (*_FILES, CHECKSUMS, LOCK) or is_part(plain)


def is_own_folder(name: str) -> bool:
    """Whether a run makes a folder of this path, relative to its own."""
    return name == RANKS or is_rank_folder(name) or in_rank(name) == PARTS


def foreign(out: Path) -> list[str]:
    """What a folder holds that no run writes."""
    return folders.foreign(out, is_own_name, is_own_folder)


def is_run(out: Path) -> bool:
    """Whether a run of this package wrote to the folder, by its settings or its checksums; a blank one counts too."""
    for name, fits in ((SETTINGS, are_settings), (CHECKSUMS, _are_checksums)):
        try:
            if fits(read_json(out / name)):
                return True
        except ScoreError:
            continue
    return is_blank(out)


def is_blank(out: Path) -> bool:
    """Whether a folder is empty, or holds no more than a run that was struck before its settings were in place."""
    first = {LOCK, CHECKSUMS, temporary_name(CHECKSUMS), temporary_name(SETTINGS)}
    return all(entry.name in first and folders.is_plain_file(entry) for entry in out.iterdir())


def clear(out: Path) -> None:
    """Delete what a run has written, by name; the settings, by which the folder is known, and the lock stay."""
    folders.remove(out, lambda name: is_own_name(name) and name not in (SETTINGS, LOCK), is_own_folder)


# --- who writes to it -------------------------------------------------------------------------------------------------


class RunLock:
    """The right to write to a folder, held by one process at a time; a context.

    It is the operating system's lock on the file `.lock`, which goes with the process that holds it, however that ends:
    a file left by a killed run locks nothing. The file says who holds it, for messages.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self._lock = FileLock(out / LOCK, timeout=0)

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the lock."""
        return bool(self._lock.is_locked)

    def acquire(self) -> None:
        """Take the lock, or keep it; the folder has to exist.

        Raises:
            ScoreError: another run holds it; names it.
            OSError: the file cannot be written.
        """
        if self.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise ScoreError(f"--out {self.out}: {self.holder()} is writing to it; wait for its end") from None
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # where a locked file cannot be written, the lock holds all the same
            (self.out / LOCK).write_text(as_json(owner), encoding="utf-8")

    def is_held(self) -> bool:
        """Whether another process holds the lock."""
        if self.is_locked or not (self.out / LOCK).is_file():
            return False
        try:
            self._lock.acquire()
        except Timeout:
            return True
        except OSError:
            return False
        self._lock.release()
        return False

    def holder(self) -> str:
        """Who holds the lock, as far as the file tells."""
        try:
            owner = read_json(self.out / LOCK)
        except ScoreError:
            return "another run"
        return "another run (process {pid} on {host}, since {since})".format(
            **{name: str(owner.get(name, "unknown"))[:80] for name in ("pid", "host", "since")}
        )

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_locked:
            with contextlib.suppress(OSError):  # a file that is left locks nothing
                (self.out / LOCK).unlink()
            self._lock.release()


# --- whether it is intact ---------------------------------------------------------------------------------------------


def _are_checksums(value: Any) -> bool:
    files = value.get("files") if isinstance(value, dict) and value.get("format") == FORMAT else None
    return isinstance(files, dict) and all(
        (name in _FILES or is_part(name))
        and isinstance(digests, list)
        and digests
        and all(isinstance(one, str) for one in digests)
        for name, digests in files.items()
    )


class Checksums:
    """The SHA-256 of every file of a run, in `checksums.json`: what is not as it was written is found and named.

    A file and its checksum cannot be written in one step. So a new file is complete under its temporary name first,
    then its checksum is noted beside that of the file it replaces, then it takes its name. Whenever a run is struck,
    one of the noted checksums fits a file under one of the two names.

    Args:
        out: the folder.

    Attributes:
        files: relative path -> the checksums of which one must fit.
    """

    def __init__(self, out: Path):
        self.out = out
        self.files: dict[str, list[str]] = {}

    @staticmethod
    def read(out: Path) -> Checksums:
        """Those of a folder.

        Raises:
            ScoreError: there are none, or not such as a run writes.
        """
        found = read_json(out / CHECKSUMS)
        if not _are_checksums(found):
            raise ScoreError(f"{out / CHECKSUMS}: damaged (not the checksums of a run); {RESTORE}")
        checksums = Checksums(out)
        checksums.files = found["files"]
        return checksums

    def parts(self) -> list[str]:
        """The names of all parts."""
        return sorted(filter(is_part, self.files))

    def find(self, name: str, advice: str = RESTORE) -> Path | None:
        """Where a noted file lies, its checksum verified; None if it is missing.

        Raises:
            ScoreError: its contents are not those that were written.
        """
        path = self.out / name
        for place in (path, self.out / temporary_name(name)):
            if place.is_file() and _sha256(place) in self.files[name]:
                return place
        if path.is_file():
            raise ScoreError(f"{path}: its contents have changed since it was written (SHA-256 differs); {advice}")
        return None

    def settle(self, name: str, place: Path) -> None:
        """Give a file that `find` has found under its temporary name its own."""
        if place != self.out / name:
            os.replace(place, self.out / name)
        self.files[name] = [_sha256(self.out / name)]

    def put(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file: `write` gets a temporary path, which takes the name when it is complete.

        Raises:
            ScoreError: it cannot be written.
        """
        temporary = self.out / temporary_name(name)
        noted = False
        try:
            write(temporary)
            _sync(temporary)
            new, before = _sha256(temporary), self.files.get(name, [])
            self.files[name] = [*before[-1:], new]
            try:
                self._save()
            except BaseException:
                self.files[name] = before
                if not before:
                    del self.files[name]
                raise
            noted = True
            os.replace(temporary, self.out / name)
            self.files[name] = [new]
        except OSError as error:
            raise ScoreError(f"--out {self.out}: {name} cannot be written ({error.strerror or error})") from error
        finally:
            if not noted:
                temporary.unlink(missing_ok=True)

    def drop(self, names: Sequence[str]) -> None:
        """Forget files, on disk as well.

        Raises:
            ScoreError: `checksums.json` cannot be written.
        """
        for name in names:
            self.files.pop(name, None)
        try:
            self._save()
        except OSError as error:
            raise ScoreError(f"--out {self.out}: {CHECKSUMS} cannot be written ({error.strerror or error})") from error

    def _save(self) -> None:
        temporary = self.out / temporary_name(CHECKSUMS)
        try:
            temporary.write_text(json.dumps({"format": FORMAT, "files": self.files}, indent=1) + "\n", encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, self.out / CHECKSUMS)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("r+b") as written:
        os.fsync(written.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read ({error.strerror or error}); {RESTORE}") from None
    return digest.hexdigest()
