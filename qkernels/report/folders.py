"""Output folders: which of their entries a command wrote itself, and how to remove exactly those.

Nothing here follows a symbolic link, and no tree is removed as a whole: a file that a person has put into the folder
stays, whatever its name is near.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_NAMED = 5  # foreign entries that a message names


def entries(folder: Path, is_own_folder: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Files and subfolders below a folder, as paths relative to it with "/" between the names, sorted.

    Args:
        folder: to be listed.
        is_own_folder: whether to look into a subfolder; one that is not looked into counts as a file.

    Returns:
        Files (links and everything else that is no folder among them), and the subfolders that were looked into.
    """
    files: list[str] = []
    folders: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as found:
            for entry in found:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False) and is_own_folder(name):
                    folders.append(name)
                    pending.append(name + "/")
                else:
                    files.append(name)
    return sorted(files), sorted(folders)


def is_plain_file(path: Path) -> bool:
    """Whether a path is a file, not a link to one."""
    return path.is_file() and not path.is_symlink()


def foreign(folder: Path, is_own: Callable[[str], bool], is_own_folder: Callable[[str], bool]) -> list[str]:
    """What a folder holds beside the plain files that `is_own` accepts, by relative path."""
    files, _ = entries(folder, is_own_folder)
    return [name for name in files if not (is_own(name) and is_plain_file(folder / name))]


def lies_in(path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether a file or folder that is there is this folder, or in it: what a run is to read must not be deleted."""
    place = Path(path)
    return place.exists() and folder.resolve() in (place.resolve(), *place.resolve().parents)


def some_of(names: list[str]) -> str:
    """The first few of a list of names, for a message."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def remove(folder: Path, is_own: Callable[[str], bool], is_own_folder: Callable[[str], bool]) -> list[str]:
    """Delete the plain files that `is_own` accepts, then the subfolders that this has emptied.

    Returns:
        What is left, by relative path.

    Raises:
        OSError: as from the file system.
    """
    files, folders = entries(folder, is_own_folder)
    for name in files:
        if is_own(name) and is_plain_file(folder / name):
            (folder / name).unlink()
    for name in sorted(folders, key=len, reverse=True):
        if not any(os.scandir(folder / name)):
            (folder / name).rmdir()
    return entries(folder, is_own_folder)[0]


def try_to_make(folder: Path) -> None:
    """Make a folder and those above it that are missing, and remove them again: whether that can be done is known then.

    Raises:
        OSError: it cannot.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    folder.mkdir(parents=True)
    for place in missing:
        place.rmdir()
