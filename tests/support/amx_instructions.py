"""Lets a processor with AVX-512 BF16 but without AMX run the AMX GEMMs as they were compiled.

Each tile instruction is an illegal one there, and a handler of SIGILL carries it out (csrc/tests/amx_instructions.cpp).
As a pytest plugin it replaces the extension in all tests of a process (with `-p no:faulthandler`, because
pytest's own handler of that signal would take its place).
"""

from __future__ import annotations

import importlib.util
import sys

import native_modules


def install() -> None:
    """Build the extension, and let `qkernels` find it as its own; before `qkernels` is imported."""
    assert "qkernels" not in sys.modules, "qkernels has been imported with another extension"
    name = "qkernels._C"
    path = native_modules.build("_C", "QK_TRAP_AMX=ON", "QK_LEAVE_OUT=avx2")  # which takes long to compile
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    import qkernels

    qkernels._C = module  # what the import system does after importing a submodule
    assert "amx_bf16" in module.instruction_sets()


install()
