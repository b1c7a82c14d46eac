"""The C++ core as programs of their own, under AddressSanitizer and UndefinedBehaviorSanitizer.

`make sanitize` adds ThreadSanitizer. The programs hold every kernel of every instruction set (csrc/tests/test_core.cpp)
and every CUDA kernel (csrc/tests/test_cuda.cpp, emulated on the host, no GPU needed) against long double on buffers
that end where the data ends. Here without the kernels of instruction sets that this machine lacks; but AMX's tile
instructions are carried out in plain code (csrc/tests/amx_instructions.cpp), so that what they read and write is seen.
"""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"


def not_here() -> list[str]:
    """Instruction sets that this machine lacks: the programs could not run them; the package has them all."""
    try:
        from qkernels import _C
    except ImportError:
        return []
    found = _C.instruction_sets()
    missing = [name for name in ("avx2", "avx512", "avx512_bf16") if name not in found]
    return missing if "avx512_bf16" in found else [*missing, "amx"]


def test_core_under_sanitizers() -> None:
    tools = ("cmake", "ninja")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing or not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        pytest.skip(f"needs a C++ compiler, cmake and ninja; missing: {missing or 'compiler'}")
    if not SOURCES.is_dir():
        pytest.skip("csrc/ lies in the source tree only")
    # Kept, so that what has not changed is not compiled again: that takes minutes.
    build = SOURCES.parent / "build" / "tests-under-sanitizers"
    build.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(SOURCES), "-B", str(build), "-G", "Ninja", "-DQK_TESTS=ON"]
    configure += ["-DQK_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=None"]
    left_out = not_here()
    configure += [f"-DQK_LEAVE_OUT={';'.join(left_out)}", f"-DQK_TRAP_AMX={'OFF' if 'amx' in left_out else 'ON'}"]
    with (build / "lock").open("w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build)]):
            built = subprocess.run(command, capture_output=True, text=True)
            if "cannot find -lasan" in built.stdout + built.stderr:
                pytest.skip("the compiler has no AddressSanitizer runtime")
            assert built.returncode == 0, (built.stdout + built.stderr)[-5000:]
            assert "warning:" not in built.stdout, built.stdout[-5000:]
    for program in ("test_core", "test_cuda"):
        run = subprocess.run([str(build / program)], capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert " 0 failures" in run.stdout
