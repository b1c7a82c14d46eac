"""Peers out of a folder of wheels, importable without their dependencies.

Nothing is installed: the wheels are unpacked into a folder that is searched after everything that is installed. A
package that a wheel asks for and that is not here is replaced by a stand-in, which can be imported and inherited from
and fails when it is called: enough for a module whose kernels need no more than torch and Triton.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class _Absent(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{cls.__module__} is not installed, so {cls.__module__}.{cls.__name__} cannot be used")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__module__}.{cls.__name__}", name)


def _absent(module: str, name: str) -> type:
    return _Absent(name, (), {"__module__": module})


class _StandIn(ModuleType):
    """A module that is not installed: each of its names is a class that cannot be called."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(self.__name__, name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nothing else found, if a wheel asked for it."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.wanted:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_STAND_INS = _StandIns()


def required(folder: Path) -> set[str]:
    """Names of the packages that unpacked wheels ask for, as they are imported."""
    found = set()
    for metadata in folder.glob("*.dist-info/METADATA"):
        for line in metadata.read_text(encoding="utf-8").splitlines():
            named = re.match(r"Requires-Dist:\s*([\w.-]+)", line)
            if named and "extra ==" not in line:
                found.add(re.sub(r"[-.]", "_", named[1]).lower())
    return found


def _installed(name: str) -> bool:
    try:  # under the name of its distribution, which may not be that of its module
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    return True


def use(wheels: Path, scratch: Path) -> list[str]:
    """Make the packages of the wheels importable in this process; a line for each wheel.

    wheels: folder with wheels.
    scratch: an empty folder, kept as long as the process runs.

    Raises:
        FileNotFoundError: there are no wheels.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise FileNotFoundError(f"--wheels {wheels}: there are no wheels")
    lines = []
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(scratch)
        except (OSError, zipfile.BadZipFile) as error:
            lines.append(f"{file.name}: cannot be unpacked: {error}")
    sys.path.append(str(scratch))  # what is installed comes first
    importlib.invalidate_caches()
    here = {path.name for path in scratch.iterdir()}
    _STAND_INS.wanted |= {name for name in required(scratch) if name not in here and not _installed(name)}
    if _STAND_INS not in sys.meta_path:
        sys.meta_path.append(_STAND_INS)
    if _STAND_INS.wanted:
        lines.append(f"not installed, replaced by stand-ins: {', '.join(sorted(_STAND_INS.wanted))}")
    return lines
