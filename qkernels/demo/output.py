"""The output folder: filled out of sight, put in place in one step, gone without trace if the run fails."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..report import folders
from .options import DemoError

MODEL, REFERENCE, METRICS, REPORT = "model", "reference", "metrics.json", "report.html"
# What transformers saves of a model and its tokenizer; demos of before metrics.json listed its files wrote no others.
_SAVED = re.compile(
    rf"({MODEL}|{REFERENCE})/(config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja)"
)


def written_files(folder: Path) -> list[str]:
    """The files of a complete output folder, for `metrics.json` to list: what a later run may replace."""
    files, _ = folders.entries(folder, _is_own_folder)
    return sorted({*files, METRICS})


def _is_own_folder(name: str) -> bool:
    return name in (MODEL, REFERENCE)


def _own_files(folder: Path) -> Callable[[str], bool] | None:
    """Which files of a folder an earlier demo has written; None if none has written to it."""
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not (isinstance(metrics, dict) and {"results", "options", "versions"} <= set(metrics)):
        return None
    listed = metrics.get("files")
    names = set(filter(lambda name: isinstance(name, str), listed)) if isinstance(listed, list) else set()
    return lambda name: name in names or name in (METRICS, REPORT) or _SAVED.fullmatch(name) is not None


class OutputFolder:
    """A context: write below `path`, then `commit`; whatever was not committed is removed on the way out.

    Args:
        target: the folder to be.
        overwrite: whether an earlier demo's folder at `target` may be replaced.

    Raises:
        DemoError: `target` exists and may not be replaced, or cannot be created.
    """

    def __init__(self, target: Path, overwrite: bool) -> None:
        # A trailing ".." or a symbolic link would make the folder's name and parent other than they look.
        self.target = Path(os.path.abspath(target))
        self._overwrite = overwrite
        self._refuse_existing()
        # Beside the target, or where the first missing folder on the way to it would be: the same file system, so
        # that the last step is a rename.
        parent = self.target.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise DemoError(f"--out {target}: {parent} is not a folder")
        self.path = parent / f".{self.target.name}.partial-{secrets.token_hex(4)}"

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir():
            raise DemoError(f"--out {self.target}: exists and is not a folder")
        if not self._overwrite:
            raise DemoError(
                f"--out {self.target}: the folder exists; choose another one, or replace it with --overwrite"
            )
        held = sorted(entry.name for entry in self.target.iterdir())
        own = _own_files(self.target)
        if own is None:
            if held:
                raise DemoError(
                    f"--out {self.target}: --overwrite replaces only what an earlier demo has written, and none has"
                    f" written to this folder (it has no {METRICS} of one); it holds {folders.some_of(held)}"
                )
            return
        foreign = folders.foreign(self.target, own, _is_own_folder)
        if foreign:
            raise DemoError(
                f"--out {self.target}: --overwrite replaces only what an earlier demo has written; the folder also"
                f" holds {folders.some_of(foreign)}"
            )

    def __enter__(self) -> OutputFolder:
        try:
            self.path.mkdir()
        except OSError as error:
            raise DemoError(f"--out {self.target}: cannot be created ({error.strerror or error})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> None:
        """Put the folder in place; an earlier one is deleted only when the new one stands."""
        self._refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if not self.target.exists():
                self.path.rename(self.target)
                return
            earlier = self.path.with_name(self.path.name.replace(".partial-", ".replaced-"))
            self.target.rename(earlier)
            try:
                self.path.rename(self.target)
            except BaseException:
                earlier.rename(self.target)
                raise
            own = _own_files(earlier)
            left = folders.remove(earlier, own, _is_own_folder) if own is not None else []
            if left:  # put there since it was looked at
                raise DemoError(f"--out {self.target}: done; {earlier} keeps what is not the earlier demo's")
            earlier.rmdir()
        except OSError as error:
            raise DemoError(f"--out {self.target}: cannot be put in place ({error.strerror or error})") from None
