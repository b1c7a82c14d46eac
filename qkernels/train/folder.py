"""The folder of a training run: what a run writes to it, what an interrupted one left, and what may be deleted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..report import folders
from ..text.characters import first_line
from .options import TrainError

RUN, METRICS, REPORT, CARD, CONFIG = "train.json", "metrics.json", "report.html", "README.md", "train.yaml"
SFT, BASE, DATA = "sft", "base", "data"
_FORMAT = 1
# Tokenised data, by machine: where machines share the folder, none writes over another's.
_DATA = rf"{DATA}(-\d+)?"
_FOLDERS = re.compile(rf"({SFT}|{BASE}(\.partial)?|{_DATA}|runs)(/.*)?|checkpoint-\d+(/.*)?")
# What there is before a run's settings are written.
_PREPARATIONS = re.compile(
    rf"\.lock|\.{re.escape(RUN)}\.[0-9a-f]+|{_DATA}/\.?(train|held_out|chosen)\.arrow(\.partial)?|{BASE}\.partial/.*"
)
_FILES = re.compile(
    rf"({RUN}|{METRICS}|{REPORT}|{CARD}|{CONFIG}|\.lock|config\.json|generation_config\.json|training_args\.bin"
    r"|(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_config\.json"
    r"|trainer_state\.json|(train|eval|all)_results\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja)"
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def is_own(name: str) -> bool:
    """Whether a run writes a file of this name, relative to its folder."""
    return bool(_FILES.fullmatch(name) or _FOLDERS.fullmatch(name))


def is_own_folder(name: str) -> bool:
    """Whether a run makes a subfolder of this name."""
    return bool(_FOLDERS.fullmatch(name))


def refuse(out: Path, resume: bool, overwrite: bool) -> None:
    """Say no before anything is loaded.

    Raises:
        TrainError: `out` is there and may not be touched, or there is nothing to resume.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise TrainError(f"--out {out}: exists and is not a folder")
    held = sorted(entry.name for entry in out.iterdir() if entry.name != ".lock")
    is_run = (out / RUN).is_file()
    if not is_run and is_blank(out):
        return
    if resume:
        if not is_run:
            raise TrainError(f"--out {out}: no run to resume there; the folder has no {RUN}")
        return
    if not overwrite:
        what = "the folder holds an unfinished run; continue it with --resume" if is_run else "the folder exists"
        if is_run and (out / METRICS).is_file():
            what = "the folder holds a finished run"
        raise TrainError(f"--out {out}: {what}; choose another one, or replace an earlier run with --overwrite")
    in_the_way = held if not is_run else folders.foreign(out, is_own, is_own_folder)
    if in_the_way:
        raise TrainError(
            f"--out {out}: --overwrite replaces only what an earlier run has written; the folder"
            f" {'also holds' if is_run else f'has no {RUN} of one and holds'} {folders.some_of(in_the_way)}"
        )


def is_blank(out: Path) -> bool:
    """Whether a folder is empty, or holds no more than a run that was struck while it prepared its data.

    Such a run has left its lock: a user's own folder of data has none.
    """
    if not (out / ".lock").is_file():
        return not any(out.iterdir())
    return not folders.foreign(out, lambda name: bool(_PREPARATIONS.fullmatch(name)), is_own_folder)


def data_of(out: Path, machine: int) -> Path:
    """Where a machine's processes have their tokenised data; `machine` counts from 0."""
    return out / (f"{DATA}-{machine}" if machine else DATA)


def clear(out: Path, spared: Collection[str]) -> None:
    """Delete what an earlier run has written, by name; the lock stays, and so do the subfolders named in `spared`."""

    def goes(name: str) -> bool:
        return is_own(name) and name != ".lock" and name.partition("/")[0] not in spared

    # The settings last: by them an interrupted deletion is known for one.
    folders.remove(out, lambda name: goes(name) and name != RUN, is_own_folder)
    folders.remove(out, lambda name: name == RUN, lambda _: False)


def discard_preparations(out: Path) -> None:
    """Delete what a run without settings has prepared."""
    with contextlib.suppress(OSError):
        folders.remove(
            out, lambda name: bool(_FOLDERS.fullmatch(name)) and name.startswith((DATA, BASE)), is_own_folder
        )


def write(path: Path, text: str) -> None:
    """Write a file under another name and rename it when it is complete.

    Raises:
        TrainError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainError(f"{path}: cannot be written ({error.strerror or error})") from None


def begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Note what the run's results depend on."""
    write(out / RUN, json.dumps({"format": _FORMAT, "settings": dict(settings)}, indent=1, default=str) + "\n")


def check_same(out: Path, settings: Mapping[str, Any]) -> None:
    """Whether the run to be resumed began with these settings.

    Raises:
        TrainError: naming what has changed.
    """
    try:
        earlier = json.loads((out / RUN).read_text(encoding="utf-8"))["settings"]
        now = json.loads(json.dumps(dict(settings), default=str))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{out / RUN}: damaged ({first_line(error)}); train again with --overwrite") from None
    changed = [
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*earlier, *now})
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise TrainError(f"--out {out}: --resume needs the settings that the run began with: {'; '.join(changed)}")


def last_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The last complete checkpoint, and later ones that a killed run or a full disk has left incomplete.

    Of a checkpoint, `trainer_state.json` is written last.
    """
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()),
        key=lambda path: -int(path.name.split("-")[1]),
    )
    broken: list[Path] = []
    for path in found:
        if _is_complete(path):
            return path, broken
        broken.append(path)
    return None, broken


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
