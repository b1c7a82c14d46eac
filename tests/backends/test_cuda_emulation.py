"""The CUDA kernels on the host: csrc/tests/cuda_emulation as a Python module, and tests over all backends run on it.

In processes of their own, because QKERNELS_CUDA_EMULATION is read when `qkernels` is imported. There `backend="cuda"`
takes CPU tensors, so every test that takes a backend has cases named "cuda-cpu". What the emulation cannot see is what
the device's compiler makes of the kernels: `test_cuda_aot.py` reads that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import native_modules
import qkernels

TESTS = next(folder for folder in Path(__file__).resolve().parents if (folder / "conftest.py").exists())

# Every kernel, split rows, all alignments, rows that are not read, one pass of each operation through autograd.
ORDINARY = {
    "test_rows.py": (
        "test_all_outputs_in_one_pass",
        "test_gradients_of_all_outputs_combined",
        "test_reference_logits_of_another_dtype",
        "masked_with_the_lowest_number",
        "test_first_of_equal",
        "test_any_base_alignment",
        "test_gradient_into_a_given_tensor",
    ),
    "test_autograd.py": ("test_in_place_gradient_aliases", "test_retain_graph", "test_logps_in_a_loss"),
    "test_objectives.py": ("test_per_token_reference", "test_per_sequence_reference"),
    "test_known_bugs.py": (
        "test_a_row_may_begin_with_minus_infinity",
        "not_read",
        "test_a_label_outside_the_vocabulary",
        "test_packed_and_dense_batches_agree",
        "test_with_equal_models",
        "test_a_broken_row",
    ),
    "test_determinism.py": ("test_same_bits_from_run_to_run", "test_a_row_does_not_depend_on_its_neighbours"),
}
NIGHTLY = (*ORDINARY, "test_mdp.py", "test_ops.py", "test_errors.py", "test_mutations.py", "test_edges.py")


@pytest.fixture(scope="module")
def module() -> Path:
    """The emulation as a Python module."""
    if missing := native_modules.why_not():
        pytest.skip(missing)
    return native_modules.build("_cuda_emulation", "QK_CUDA_EMULATION=ON")


def run(module: Path, code: list[str]) -> subprocess.CompletedProcess[str]:
    """A Python process with the emulation, of the package that is tested here."""
    path = os.pathsep.join([str(Path(qkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "QKERNELS_CUDA_EMULATION": str(module)}
    return subprocess.run(
        [sys.executable, *code], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


def run_tests(module: Path, files: tuple[str, ...], expression: str, *options: str) -> int:
    """Runs tests of these files; how many passed."""
    found = [str(next(TESTS.rglob(name))) for name in files if next(TESTS.rglob(name), None)]
    how = ["-m", "pytest", "-q", "-r", "fE", "--maxfail", "5", "-p", "no:cacheprovider", "-k", expression]
    done = run(module, [*how, *options, *found])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    return int(passed[1])


def test_every_kernel(module):
    names = " or ".join(name for file in ORDINARY.values() for name in file)
    assert run_tests(module, tuple(ORDINARY), f"cuda-cpu and ({names})", "-m", "not nightly") > 200


@pytest.mark.nightly
def test_everything_that_takes_a_backend(module):
    assert run_tests(module, NIGHTLY, "cuda-cpu") > 1500


# Importing torch takes seconds: one process does it, and runs each piece of code in a fork of itself.
FORKS = """
import os, sys, torch
for code in sys.argv[1:]:
    if os.fork() == 0:
        exec(code, {"torch": torch})
        sys.stdout.flush()
        os._exit(0)
    if os.wait()[1]:
        sys.exit("failed: " + code)
"""


def test_it_is_there_for_tests_only(module, tmp_path):
    """Asked for by name it runs; "auto" never picks it, and another device or a file that is no module is refused."""
    code = """
from qkernels import backends, info; from qkernels.backends import cuda
cpu = torch.zeros(1)
assert backends.resolve("cuda", cpu) == "cuda" and backends.resolve("auto", cpu) != "cuda"
assert "emulated" in cuda.unavailable(torch.device("cuda", 0), torch.float32)
assert "got torch.float64" in cuda.unavailable(torch.device("cpu"), torch.float64)
assert cuda.describe()["built"] is False and "emulated" in cuda.describe()["reason"]; info()
"""
    nothing = f"""
import os; os.environ["QKERNELS_CUDA_EMULATION"] = {str(tmp_path / "nothing.txt")!r}
try:
    import qkernels.backends.cuda
except Exception as error:
    assert "QKERNELS_CUDA_EMULATION must name a compiled module" in str(error)
else:
    raise AssertionError("it is taken")
"""
    done = run(module, ["-c", FORKS, code, nothing])
    assert done.returncode == 0, done.stderr
