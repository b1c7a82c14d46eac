"""The AMX GEMMs as compiled, where the processor has no AMX (tests/support/amx_instructions.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import native_modules
import qkernels

_C = pytest.importorskip("qkernels._C", reason="the compiled extension is missing")

PRODUCTS = Path(__file__).with_name("test_product.py")

pytestmark = [
    pytest.mark.skipif("amx_bf16" in _C.instruction_sets(), reason="the processor has AMX: test_product.py uses it"),
    pytest.mark.skipif("avx512_bf16" not in _C.instruction_sets(), reason="the AMX GEMM needs AVX-512, too"),
    pytest.mark.skipif(bool(native_modules.why_not()), reason=native_modules.why_not() or ""),
]


def run(code: list[str]) -> subprocess.CompletedProcess[str]:
    """A Python process of this package that finds the plugin."""
    path = os.pathsep.join([str(Path(qkernels.__file__).parents[1]), str(Path(native_modules.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("QKERNELS_TEST_INSTRUCTION_SET", None)  # may be one that is left out there
    return subprocess.run(
        [sys.executable, *code], env=environment, capture_output=True, text=True, cwd=PRODUCTS.parents[2]
    )


@pytest.mark.parametrize(
    "tests",
    [
        "emulated_tiles_have_the_bits or amx_bf16 and not large",
        pytest.param("emulated_tiles_have_the_bits or amx_bf16", marks=pytest.mark.nightly),
    ],
)
def test_products(tests):
    """To the bit those of the plain code that all other tests of tiles use, and right."""
    plugins = ["-p", "amx_instructions", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    done = run(["-m", "pytest", "-q", *plugins, "-m", "nightly or not nightly", "-k", tests, str(PRODUCTS)])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200, done.stdout[-2000:]


def test_another_illegal_instruction_still_ends_the_process():
    code = "import amx_instructions, ctypes, mmap\n"
    code += "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
    code += "page.write(bytes([0x0F, 0x0B]))\n"  # UD2
    code += "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    done = run(["-c", code])
    assert done.returncode < 0 and "another instruction than AMX's" in done.stderr, done.stderr
