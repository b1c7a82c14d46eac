"""The C++ core for 64-bit Arm (Graviton, Grace): cross-compiled, and its host tests run under an emulator.

Needs a cross compiler and qemu-user, on Debian `apt install g++-aarch64-linux-gnu qemu-user`. All kernels there are the
baseline ones; GEMMs of bf16 matrices run on widened inputs.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")


@pytest.mark.nightly  # a minute or two of emulation
def test_core_for_aarch64(tmp_path: Path) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this is such a machine: test_sanitizers.py runs these programs natively")
    missing = [tool for tool in ("cmake", "ninja", COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing or not LIBRARIES.is_dir():
        pytest.skip(f"missing: {', '.join(missing) or LIBRARIES} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    configure = ["cmake", "-S", str(SOURCES), "-B", str(tmp_path), "-G", "Ninja", "-DQK_TESTS=ON"]
    configure += ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    configure += [f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, (built.stdout + built.stderr)[-4000:]
        assert "warning:" not in built.stdout, built.stdout[-4000:]
    # QEMU 7.2 cannot start threads in the child of a process that has some; test_sanitizers.py does it natively.
    programs = [path for path in sorted(tmp_path.glob("test_*")) if path.is_file()]
    assert "test_core" in [path.name for path in programs]
    for path in programs:
        emulated = [EMULATOR, "-L", str(LIBRARIES), str(path), *(["--no-fork"] if path.name == "test_core" else [])]
        run = subprocess.run(emulated, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, f"{path.name}: {run.stdout[-3000:]}{run.stderr[-3000:]}"
        assert " 0 failures" in run.stdout
