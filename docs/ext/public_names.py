"""A Sphinx extension: a public name that the API reference lacks is a warning, hence an error of `make docs`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.util import logging

import qkernels

log = logging.getLogger(__name__)

# Packages with public names of their own. A file beside qkernels/__init__.py is public anyway.
PACKAGES = (
    "decoding",
    "objectives",
    "score",
    "train",
    "compare",
    "judge",
    "self_preference",
    "report",
    "integrations.transformers",
    "integrations.trl",
    "integrations.monitor",
    "integrations.log_softmax",
    "integrations.axolotl",
    "integrations.verl",
)


def modules() -> list[str]:
    """The public modules, by name."""
    folder = Path(qkernels.__file__).parent
    beside = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    return ["qkernels", *(f"qkernels.{name}" for name in (*beside, *PACKAGES))]


def names(module: ModuleType) -> Iterator[str]:
    """The public names of a module: `__all__`, or else the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        yield from (name for name in module.__all__ if not inspect.ismodule(getattr(module, name)))
        return
    for name, thing in vars(module).items():
        defined = (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == module.__name__
        if defined and not name.startswith("_"):
            yield name


def _object(path: str) -> Any:
    """What a full name stands for; None if it is not an attribute of a module."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def missing(shown: Collection[str]) -> list[str]:
    """Public names that are not among the names shown, by the name itself or by another one for the same object."""
    objects = {id(_object(path)) for path in shown}
    return [
        f"{module}.{name}"
        for module in modules()
        for name in names(importlib.import_module(module))
        if f"{module}.{name}" not in shown and id(_object(f"{module}.{name}")) not in objects - {id(None)}
    ]


def _check(app: Any, env: Any) -> None:
    for name in missing(env.domaindata["py"]["objects"]):
        log.warning("%s is public and not in the API reference (docs/api/)", name)


def setup(app: Any) -> dict[str, bool]:
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
