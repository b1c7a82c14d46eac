"""Which versions of Python, torch, transformers and TRL work with this package: installed, tested and written down.

    .venv/bin/python .ci/compatibility.py [PYTHON ...] [--write docs/compatibility.md]        (`make compatibility`)

For each Python (by default every python3.10 to python3.14 that answers) and each of the oldest torch that
pyproject.toml admits, the one in constraints.txt and the newest, a fresh environment gets the oldest and another one
the newest transformers and TRL that pyproject.toml admits. There the quick tests and those of the integrations run on
the installed package. What pip cannot install is said in the table, and so is a torch that comes as a CUDA build of
gigabytes, unless --cuda-builds asks for those too: five gigabytes of disk at a time, and no GPU is needed. (To have CPU
builds, name an index with them: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from build_wheels import pythons_here, version_of
from check_package import ROOT, new_environment, run

sys.path.append(str(ROOT))
from bench.measure import machine

PYTHONS = tuple(f"3.{minor}" for minor in range(10, 15))
COLUMNS = ("torch", "transformers", "trl")
NO_PYTHON = "not run: this Python was not tried"
BEGIN, END = "<!-- written by .ci/compatibility.py -->", "<!-- end -->"
FOLDERS = ("core", "backends", "objectives", "head", "functional")
TESTS = {
    "quick": ["-m", "quick and not nightly", *(f"tests/{name}" for name in FOLDERS)],
    "integrations": ["-m", "not nightly", *(f"tests/integrations/test_{name}.py" for name in ("transformers", "trl"))],
}  # fmt: skip
TOOLS = ("pytest>=8.3", "hypothesis>=6.120", "peft>=0.18")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", type=Path, metavar="PYTHON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the rows into this page's table")
    parser.add_argument("--cuda-builds", action="store_true", help="also torch builds that bring CUDA with them")
    options = parser.parse_args()
    failed = False
    for python in options.pythons or pythons_here():
        version, rows = version_of(python), []
        for row in combinations(version, python, options.cuda_builds):
            print(" | ".join(row), flush=True)
            rows.append(row)
        failed |= any("FAILED" in row[-1] for row in rows)
        if options.write:
            write(options.write, version, rows)
    return int(failed)


def requirements(version: str) -> Iterator[list[str]]:
    """What to ask pip for: the oldest, the pinned and the newest torch, with the oldest and newest of the others."""
    project, pins = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt"))
    bounds = {name: re.search(rf'"{name}>=([\d.]+)(,<\d+)?', project) for name in COLUMNS}
    asked = {}
    for name, found in bounds.items():
        assert found is not None, f"pyproject.toml has no lower bound of {name}"
        asked[name] = [f"{name}=={found[1]}.*", f"{name}>={found[1]}{found[2] or ''}"]
    pinned = re.search(r"^torch==\S+", pins, re.MULTILINE)
    assert pinned is not None, "constraints.txt does not name a torch"
    asked["torch"].insert(1, pinned[0])
    if version == "3.10":  # TRL needs 3.11
        asked["trl"] = ["", ""]
    for torch in asked["torch"]:
        for others in zip(asked["transformers"], asked["trl"], strict=True):
            yield [torch, *filter(None, others)]


def combinations(version: str, python: Path, cuda_builds: bool) -> Iterator[tuple[str, ...]]:
    """A row of the table for each combination on one Python."""
    seen: dict[tuple[str, ...], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        planner = new_environment(scratch / "planner", python)
        run(planner, "-m", "pip", "install", "-q", "--upgrade", "pip", quiet=True)  # one that reads metadata alone
        wheel = None
        for number, asked in enumerate(requirements(version)):
            plan = planned(planner, asked)
            if isinstance(plan, str):
                names = {one.split("=")[0].split(">")[0]: one for one in asked}
                yield (version, *(names[n].removeprefix(n) if n in names else "none" for n in COLUMNS), plan)
                continue
            key = tuple(plan.get(name, "none") for name in COLUMNS)
            if key in seen:
                continue
            cuda = [name for name in plan if name.startswith(("nvidia-", "cuda-"))]
            if cuda and not cuda_builds:
                seen[key] = f"not run: this torch is a CUDA build here, with {len(cuda)} packages of CUDA"
            else:
                wheel = wheel or built(planner, scratch)
                seen[key] = tested(python, scratch / str(number), plan, wheel)
            yield (version, *key, seen[key])


def planned(python: Path, asked: list[str]) -> dict[str, str] | str:
    """What pip would install, name to version; or why it cannot."""
    command = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *asked, *TOOLS]
    done = subprocess.run([str(python), *command], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        return f"not run: pip finds no such versions ({(errors or ['it failed'])[-1].removeprefix('ERROR: ')})"
    report = json.loads(done.stdout)
    return {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in report["install"]}


def built(python: Path, scratch: Path) -> Path:
    """The package for one Python; without CUDA kernels, which the tests do not run."""
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(scratch / "wheels"), str(ROOT)]
    run(python, *command, quiet=True, QKERNELS_NATIVE="1", QKERNELS_CUDA="0")
    (wheel,) = (scratch / "wheels").iterdir()
    return wheel


def tested(python: Path, folder: Path, plan: dict[str, str], wheel: Path) -> str:
    """The results of the tests in a fresh environment with these packages."""
    fresh = new_environment(folder, python)
    try:
        return results_in(fresh, plan, wheel)
    finally:
        shutil.rmtree(folder)


def results_in(fresh: Path, plan: dict[str, str], wheel: Path) -> str:
    """Install these packages and run the tests."""
    exactly = [f"{name}=={version}" for name, version in plan.items()]
    run(fresh, "-m", "pip", "install", "-q", "--no-deps", *exactly, str(wheel), quiet=True)
    results = []
    for name, arguments in TESTS.items():
        # The command and not `python -m pytest`, which would import the package from the source tree.
        command = [str(fresh.with_name("pytest")), "-q", "-p", "no:cacheprovider", *arguments]
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last))
        results.append(f"{name}: {counts or last}" + (" FAILED" if done.returncode else ""))
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return "; ".join(results)


def write(page: Path, version: str, rows: list[tuple[str, ...]]) -> None:
    """Put the rows of one Python into the page's table; those of the others stay as they are."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    kept = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[3:] if line}
    kept = {row for row in kept if row[0] not in (version, "Python") and row[0].startswith("3.")}
    where = f"{datetime.datetime.now(datetime.timezone.utc).date()}, {machine()['processor'].rpartition(', ')[0]}"
    missing = {(name, *("any" for _ in COLUMNS), NO_PYTHON, where) for name in PYTHONS}
    every = [*kept, *((*row, where) for row in rows)]
    every += [row for row in missing if row[0] not in {one[0] for one in every}]
    every.sort(key=lambda row: ([int(part) for part in row[0].split(".")], row))
    lines = ["| Python | torch | transformers | TRL | tests | when and where |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in every]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
