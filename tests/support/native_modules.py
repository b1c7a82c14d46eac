"""Python modules that tests build of csrc/, with CMake: kept in build/, and built anew where a source has changed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "conftest.py").exists()).parent
SOURCES = ROOT / "csrc"
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def why_not() -> str | None:
    """What is missing to build one; None if nothing is."""
    if not SOURCES.is_dir():
        return "csrc/ lies in the source tree only"
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing or not (os.environ.get("CXX") or HAS_COMPILER):
        return f"needs a C++ compiler, cmake and ninja; missing: {missing or 'compiler'}"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None


def build(target: str, *definitions: str) -> Path:
    """Build a module in a folder of build/ named like the definition that it is built with.

    Args:
        target: of csrc/CMakeLists.txt, which is the module's name.
        definitions: CMake's, such as `QK_CUDA_EMULATION=ON`.

    Raises:
        RuntimeError: a build that failed, or that warned.
    """
    import pybind11

    folder = ROOT / "build" / definitions[0].partition("=")[0].removeprefix("QK_").lower()
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-D{definition}" for definition in definitions]
    with (folder / "lock").open("w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or "warning:" in done.stdout:
                raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}")
    (path,) = folder.glob(f"{target}.*so")
    return path
