"""`make quick` fails when a kernel, the head's GEMMs or an objective is wrong by 1 %.

All places take minutes, so they are for the nightly run; that each place can still be made wrong is tested always.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import one_percent
import qkernels
from qkernels.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
QUICK = ("-m", "quick and not nightly")


def quick(*arguments: str, place: str = "") -> subprocess.CompletedProcess[str]:
    """The quick tier in a process of its own, with this copy of the package, until a test fails."""
    path = [str(Path(qkernels.__file__).parents[1]), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "one_percent", *QUICK, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), one_percent.VARIABLE: place},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_place_can_be_made_wrong():
    assert {f"objective {name}" for name in OBJECTIVES} < one_percent.PLACES.keys()
    for apply in one_percent.PLACES.values():
        with pytest.MonkeyPatch.context() as patch:
            apply(patch)


def test_the_makefile_runs_this_selection():
    makefile = ROOT / "Makefile"
    if not makefile.exists():
        pytest.skip("the tests lie outside the source tree")
    assert f'-m "{QUICK[1]}"' in makefile.read_text(encoding="utf-8")


@pytest.mark.nightly
@pytest.mark.parametrize("place", one_percent.PLACES)
def test_one_percent_is_seen(place):
    # The folders of the layers first: what is wrong shows in seconds.
    done = quick("tests/objectives", "tests/backends", "tests/functional/test_linear.py", place=place)
    assert done.returncode == 1 and "1 failed" in done.stdout, f"status {done.returncode}: {done.stdout[-1500:]}"
