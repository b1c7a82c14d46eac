"""Builds the compiled extension `qkernels._C` with CMake and Ninja. It does not need torch.

Without a C++ compiler the package installs without the extension and `qkernels.info()` says so. Environment:
QKERNELS_NATIVE=0 leaves the extension out on purpose; =1 makes a missing compiler an error.

The CUDA kernels are built too where nvcc is found. QKERNELS_CUDA=0 leaves them out on purpose, =1 makes a missing nvcc
an error; QKERNELS_CUDA_ARCHS picks the targets, like "90;100", of which the newest also comes as PTX for later GPUs.
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


# Targets by default, as far as the nvcc at hand knows them: A100, A10/RTX 30, RTX 40/L40, H100/H200, B200, RTX 50.
ARCHITECTURES = "80;86;89;90;100;120"


def find_nvcc() -> str | None:
    """The CUDA compiler: named by CUDACXX, on the PATH, or where CUDA is usually installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named = [os.environ.get("CUDACXX"), "nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    return next((found for name in named if name and (found := shutil.which(name))), None)


def cuda_architectures(nvcc: str) -> list[str]:
    """What to compile for, in CMake's terms: machine code for each target, and PTX of the newest."""
    wish = os.environ.get("QKERNELS_CUDA_ARCHS")
    wanted = [name.strip() for name in (wish or ARCHITECTURES).replace(",", ";").split(";") if name.strip()]
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [name for name in wanted if f"sm_{name}" in listed.split()]
    if (wish and known != wanted) or not known:
        raise SystemExit(
            f"{nvcc} does not compile for all of {wanted} (QKERNELS_CUDA_ARCHS); it knows {listed.split()}"
        )
    *older, newest = sorted(known, key=lambda name: int(name.rstrip("af")))
    return [*(f"{name}-real" for name in older), newest]


def cuda_plan() -> tuple[str | None, str | None]:
    """`(nvcc, None)`, or `(None, why the CUDA kernels are left out)`."""
    wish = os.environ.get("QKERNELS_CUDA", "")
    if wish == "0":
        return None, "left out at installation (QKERNELS_CUDA=0)"
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "no nvcc (CUDA toolkit) was found at installation"
        if wish == "1":
            raise SystemExit(f"QKERNELS_CUDA=1, but {reason}; put it on the PATH or name it in CUDACXX")
        return None, reason
    return nvcc, None


class CMakeBuild(build_ext):
    """Configure and build csrc/ with CMake, and note what was built for `qkernels.info()`."""

    def run(self) -> None:
        package = ROOT / "qkernels" if self.inplace else Path(self.build_lib).resolve() / "qkernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
            stale.unlink()
        reason = why_not_native()
        built = {"native": reason is None, "reason": reason}
        if reason is None:
            built["cuda"] = self.build_native(package)
        else:
            print(f"qkernels: the compiled extension is left out: {reason}", file=sys.stderr)
        (package / "_build.json").write_text(json.dumps(built) + "\n")

    def build_native(self, package: Path) -> dict[str, object]:
        """Build the extension; returns what it has of CUDA, or why it has nothing."""
        import pybind11

        nvcc, no_cuda = cuda_plan()
        architectures = cuda_architectures(nvcc) if nvcc else []
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
        if nvcc:
            configure += [
                "-DQK_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
            ]
        without = "Set QKERNELS_NATIVE=0 to install without it (slower on the CPU)."
        if nvcc:
            without = f"{without}\nSet QKERNELS_CUDA=0 if it is the CUDA part that fails (compiler: {nvcc})."
        step = "configuring the compiled extension"
        try:
            subprocess.run(configure, check=True)
            step = "building the compiled extension"
            everything = ["cmake", "--build", str(build)]
            if subprocess.run(everything).returncode:  # all at once takes the least time; now: which part was it?
                if nvcc:
                    step = "building the CUDA part of the compiled extension"
                    subprocess.run([*everything, "--target", "cuda_kernels"], check=True)
                    step = "building the compiled extension"
                subprocess.run(everything, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"qkernels: {step} failed ({error}).\n{without}") from None
        if not nvcc:
            print(f"qkernels: the CUDA kernels are left out: {no_cuda}", file=sys.stderr)
        return {"built": nvcc is not None, "reason": no_cuda, "architectures": architectures}

    def get_outputs(self) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build writes next to the sources."""


setup(ext_modules=[Extension("qkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
