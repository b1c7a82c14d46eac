"""Lines of qkernels/ that nightly tests run and the day's tests do not: what `make test` has lost to the nightly run.

`python .ci/nightly_lines.py [PYTEST ARGUMENTS]` (`make coverage`) runs both sets under coverage.py, with the processes
that tests start, and prints each such line. That takes half an hour on one core; arguments such as `-n 4` share it out.
(Of a part of the tests, it prints lines as well that the day's other tests run.)

Left out are a nightly test that runs the quick ones again and again, and one that runs no Python. A process that a test
kills writes nothing: its lines count as not run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qkernels"
LEFT_OUT = ["tests/repo/test_quick.py::test_one_percent_is_seen", "tests/repo/test_aarch64.py"]


def measured(marker: str, arguments: list[str], folder: Path) -> coverage.Coverage:
    """Run the tests of this marker expression; what they and their processes have run."""
    config = folder / "coveragerc"
    config.write_text(
        f"[run]\nsource = {PACKAGE}\ndata_file = {folder / 'data'}\nparallel = true\nsigterm = true\n"
        "concurrency = multiprocessing, thread\npatch = subprocess, _exit\n"
        "disable_warnings = no-data-collected, module-not-measured, module-not-imported\n"
    )
    left_out = [part for test in LEFT_OUT for part in ("--deselect", test)]
    how = ["-m", "coverage", "run", f"--rcfile={config}", "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out]
    status = subprocess.run([sys.executable, *how, "-m", marker, *arguments], cwd=ROOT, check=False).returncode
    if status not in (0, 5):  # 5: there is no such test
        raise SystemExit(f"the tests with -m {marker!r} ended with status {status}")
    found = coverage.Coverage(config_file=str(config))
    found.combine()
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as day_folder, tempfile.TemporaryDirectory() as night_folder:
        day = measured("not nightly", sys.argv[1:], Path(day_folder))
        night = measured("nightly", sys.argv[1:], Path(night_folder))
        lost = 0
        for path in sorted(PACKAGE.rglob("*.py")):
            _, statements, _, missing_by_day, _ = day.analysis2(str(path))
            _, _, _, missing_by_night, _ = night.analysis2(str(path))
            text = path.read_text(encoding="utf-8").splitlines()
            for line in sorted({*statements} & {*missing_by_day} - {*missing_by_night}):
                print(f"{path.relative_to(ROOT)}:{line}: {text[line - 1].strip()}")
                lost += 1
    print(f"{lost} lines are run by nightly tests alone")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
