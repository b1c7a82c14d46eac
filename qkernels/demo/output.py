"""The output folder: filled out of sight, put in place in one step, gone without trace if the run fails."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from .options import DemoError

MODEL, REFERENCE, METRICS, REPORT = "model", "reference", "metrics.json", "report.html"
_CONTENTS = (MODEL, REFERENCE, METRICS, REPORT)


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
        foreign = sorted(entry.name for entry in self.target.iterdir() if entry.name not in _CONTENTS)
        if foreign:
            raise DemoError(
                f"--out {self.target}: --overwrite replaces only what an earlier demo has written; the folder also"
                f" holds {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}"
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
            shutil.rmtree(earlier)
        except OSError as error:
            raise DemoError(f"--out {self.target}: cannot be put in place ({error.strerror or error})") from None
