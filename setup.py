"""Builds the compiled extension `qkernels._C` with CMake and Ninja. It does not need torch.

Without a C++ compiler the package installs without the extension and `qkernels.info()` says so. Environment:
QKERNELS_NATIVE=0 leaves the extension out on purpose; =1 makes a missing compiler an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def why_not_native() -> str | None:
    """Why the extension cannot be built here; None if it can."""
    wish = os.environ.get("QKERNELS_NATIVE", "")
    if wish == "0":
        return "left out at installation (QKERNELS_NATIVE=0)"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        reason = "no C++ compiler (GCC or Clang) was found at installation"
        if wish == "1":
            raise SystemExit(f"QKERNELS_NATIVE=1, but {reason}")
        return reason
    return None


class CMakeBuild(build_ext):
    """Configure and build csrc/ with CMake, and note what was built for `qkernels.info()`."""

    def run(self) -> None:
        package = ROOT / "qkernels" if self.inplace else Path(self.build_lib).resolve() / "qkernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
            stale.unlink()
        reason = why_not_native()
        if reason is None:
            self.build_native(package)
        else:
            print(f"qkernels: the compiled extension is left out: {reason}", file=sys.stderr)
        (package / "_build.json").write_text(json.dumps({"native": reason is None, "reason": reason}) + "\n")

    def build_native(self, package: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--fresh",  # an earlier build may have used tools of a build environment that is gone
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"qkernels: building the compiled extension failed ({error}).\n"
                "Set QKERNELS_NATIVE=0 to install without it (slower on the CPU)."
            ) from None

    def get_outputs(self) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build writes next to the sources."""


setup(ext_modules=[Extension("qkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
