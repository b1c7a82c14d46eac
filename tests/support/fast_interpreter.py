"""Triton's interpreter in half of the time; imported before kernels run in it.

Before each call of a device function the interpreter looks through all of `triton.language` for what it has to replace,
although the launch around the call has replaced it already. Here each module is looked through once a launch. On a GPU,
or with an interpreter that is built otherwise, nothing changes.
"""

from __future__ import annotations

import functools

from triton.language import core
from triton.runtime import interpreter

if all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "GridExecutor")):
    _replace, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    _replaced: set[int] = set()

    @functools.cache
    def _modules(function) -> frozenset[int]:
        """Which modules of Triton's language the function sees: those in which the interpreter replaces names."""
        return frozenset(id(x) for x in function.__globals__.values() if x is interpreter.tl or x is core)

    def _replace_once(function):
        if _modules(function) <= _replaced:
            return interpreter._LangPatchScope()
        _replaced.update(_modules(function))
        return _replace(function)

    def _launch_anew(self, *args, **kwargs):
        _replaced.clear()
        try:
            return _launch(self, *args, **kwargs)
        finally:
            _replaced.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _replace_once, _launch_anew
