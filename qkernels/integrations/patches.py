"""Attributes of other packages that are replaced for a while and put back exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any


class Patch:
    """Attributes replaced until `undo`; as a context manager, until the end of the block."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Let `holder.name` be `value`.

        Raises:
            AttributeError: there is no such attribute to replace.
        """
        self._before.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._before:
            setattr(*self._before.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def holders(function: Any, name: str, packages: Sequence[str]) -> Iterator[ModuleType]:
    """The loaded modules of some packages whose attribute `name` is `function`: all that have imported it by now."""
    for title, module in list(sys.modules.items()):
        known = title.split(".")[0] in packages and isinstance(module, ModuleType)
        if known and vars(module).get(name) is function:
            yield module
