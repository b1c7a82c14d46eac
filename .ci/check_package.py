"""Builds the source distribution, the wheel out of it, installs that in a fresh environment and uses it there.

    .venv/bin/python .ci/check_package.py        (`make package`)

Torch and what the tests need are taken from the environment that runs this script; the package is not. The CUDA kernels
are left out: nvcc takes minutes, and what is checked here does not depend on them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD_TOOLS = ("setuptools>=77", "pybind11", "cmake", "ninja", "build")
NOTICES = {"LICENSE", "THIRD_PARTY_NOTICES.md"}
USE = ROOT / ".ci" / "use_package.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        check(Path(scratch))


def check(scratch: Path) -> None:
    tools = new_environment(scratch / "tools")
    install(tools, *BUILD_TOOLS)
    run(tools, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(scratch), str(ROOT))
    (sdist,) = scratch.glob("*.tar.gz")
    unpacked = check_sdist(sdist, scratch)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(scratch), str(sdist)]
    run(tools, *build, QKERNELS_NATIVE="1", QKERNELS_CUDA="0")
    (wheel,) = scratch.glob("*.whl")
    check_wheel(wheel)

    fresh = new_environment(scratch / "fresh")
    # Not the environment's own .pth files: an editable installation of the package would come with them.
    (packages,) = (scratch / "fresh").glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(fresh, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    run(fresh, str(USE), cwd=scratch)
    run(fresh, "-m", "qkernels", "--version", cwd=scratch)
    # Every module of the tests finds its helpers in the source distribution, and some of them run there.
    run(fresh, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests", cwd=unpacked, quiet=True)
    some = ("tests/apps/test_data.py", "tests/repo/test_import.py")
    run(fresh, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some, cwd=unpacked)
    print(f"{sdist.name} and {wheel.name} are complete")


def new_environment(folder: Path, python: Path = Path(sys.executable)) -> Path:
    """A virtual environment of `python` with pip; its interpreter."""
    subprocess.run([str(python), "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def install(python: Path, *packages: str) -> None:
    """Install into an environment, in the versions that this release is tested with."""
    constraints = ["-c", str(ROOT / "constraints.txt")]
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *constraints, *packages, quiet=True)


def run(python: Path, *arguments: str, cwd: Path = ROOT, quiet: bool = False, **environment: str) -> None:
    """Run an environment's interpreter with its tools on the path; stop with its output if it fails."""
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    variables = {**os.environ, "PATH": path, **environment}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(arguments)[:200]}: exit status {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        )
    if not quiet:
        print(done.stdout.rstrip().rpartition("\n")[2])


def check_sdist(sdist: Path, scratch: Path) -> Path:
    """Every file under version control is in it, except what belongs to the repository alone; the unpacked folder."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        # Python 3.10 and 3.11 have the filter since their releases of June 2023.
        archive.extractall(scratch / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    missing = sorted({n for n in tracked if n and (ROOT / n).exists()} - names - {".gitignore"})
    missing = [name for name in missing if not name.startswith(".ci/")]
    if missing or not names >= NOTICES:
        sys.exit(f"{sdist.name} lacks {', '.join(missing[:20]) or NOTICES - names}")
    built = [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]
    if built:
        sys.exit(f"{sdist.name} holds built files: {', '.join(built)}")
    (folder,) = (scratch / "unpacked").iterdir()
    return folder


def check_wheel(wheel: Path) -> None:
    """The package, its extension, types and notices are in it, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    if {name for name in top if not name.endswith(".dist-info")} != {"qkernels"}:
        sys.exit(f"{wheel.name} holds {sorted(top)}")
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    wanted = {"qkernels/py.typed", "qkernels/_C.pyi", "qkernels/_build.json"}
    if licences != NOTICES or not wanted <= set(names) or not any(name.startswith("qkernels/_C.") for name in names):
        sys.exit(f"{wheel.name} is incomplete: notices {sorted(licences)}, files {sorted(wanted - set(names))}")
    if not any(name.startswith("qkernels/_C.") and name.endswith((".so", ".pyd")) for name in names):
        sys.exit(f"{wheel.name} has no compiled extension")


if __name__ == "__main__":
    main()
