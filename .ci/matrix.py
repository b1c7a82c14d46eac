"""Tests of the path from hidden states on every kind of processor that torch and this package can act as here.

`python .ci/matrix.py` (`make matrix`) runs some tests under several settings, one after the other: instruction sets of
this package's kernels, of torch's own operations (ATEN_CPU_CAPABILITY) and of its GEMMs (ONEDNN_MAX_CPU_ISA, MKL_CBWR),
and thread counts. `--full` takes all tests of linear paths, and emulated tiles; `--whole` every test of `make test`
(some minutes for each setting). Where a processor has AVX-512 BF16 but not AMX, the AMX GEMMs run all the same, each
tile instruction carried out in plain code (tests/support/amx_instructions.py). GEMMs of other shapes or instruction
sets add in another order: a comparison that holds by luck of one machine fails here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"

# The instruction set of this package's kernels, threads, and what torch and its libraries are told.
SETTINGS: list[tuple[str, int, dict[str, str]]] = [
    ("baseline", 1, {"ATEN_CPU_CAPABILITY": "default"}),
    ("avx2", 3, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ("avx512", 7, {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    ("avx512_bf16", 2, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    ("amx_bf16", 3, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}),
    ("amx_emulated", 2, {"MKL_CBWR": "COMPATIBLE"}),
]
SHORT = ["tests/functional/test_linear_autograd.py", "-k", "not gradcheck and not compile"]
FULL = [
    "tests/functional/test_linear_autograd.py",
    "tests/backends/test_determinism.py",
    "tests/functional/test_linear.py",
    "tests/functional/test_linear_known_bugs.py",
    "tests/functional/test_linear_valid_rows.py",
    "tests/head/test_product.py",
]
WHOLE = ["tests", "-m", "not nightly", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]


def available() -> list[str]:
    """Instruction sets of this package that run here."""
    code = "from qkernels import _C; print(*_C.instruction_sets(), 'amx_emulated')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="all tests of the linear paths (minutes)")
    extent.add_argument(
        "--whole", action="store_true", help="all tests but the nightly ones (minutes for each setting)"
    )
    options = parser.parse_args()
    chosen = WHOLE if options.whole else FULL if options.full else SHORT
    sets, failed = available(), 0
    for instruction_set, threads, variables in SETTINGS[:-1] if chosen is SHORT else SETTINGS:
        name = " ".join([instruction_set, f"{threads} threads", *(f"{k}={v}" for k, v in variables.items())])
        tests = {"QKERNELS_TEST_INSTRUCTION_SET": instruction_set, "QKERNELS_TEST_THREADS": str(threads)}
        if instruction_set == "amx_bf16" not in sets and "avx512_bf16" in sets:
            name += ", tile instructions carried out in plain code"
            tests["PYTEST_ADDOPTS"] = "-p amx_instructions -p no:faulthandler"  # also in processes that tests start
            tests["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        elif instruction_set not in sets:
            print(f"{name}: not on this processor", flush=True)
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:
            # Inductor takes what it compiled for another ATEN_CPU_CAPABILITY out of its cache: NaN, or a broken heap.
            tests |= {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", *chosen],
                cwd=ROOT,
                env={**os.environ, **variables, **tests},
                capture_output=True,
                text=True,
            )
        summary = (run.stdout.strip().splitlines() or [run.stderr])[-1]
        print(f"{name}: {summary} ({time.monotonic() - start:.0f} s)", flush=True)
        if run.returncode:
            failed += 1
            print(run.stdout, run.stderr, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
