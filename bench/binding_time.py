"""What a call into the extension costs by way of pybind11, of nanobind, and of nanobind with Python's stable ABI.

    python -m bench.binding_time [PYTHON]

A function with the arguments of `row_stats` that computes next to nothing is built with each, by the C++ compiler on
the path, for PYTHON (default: this one; the stable ABI of nanobind starts with Python 3.12), in a temporary environment
into which pip installs both libraries. One wheel for all Pythons would take a stable ABI; pybind11 has none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

_FUNCTION = """
#include <array>
#include <cstdint>
#include <tuple>
using Sizes = std::array<int64_t, 3>;
using View = std::tuple<uintptr_t, int, int64_t, int64_t>;
static int64_t row_stats(const Sizes& shape, const View& policy, const View& reference, uintptr_t labels,
                         int64_t ignore_index, double temperature, uint32_t fields, uintptr_t out, int threads) {
  Release release;
  return shape[0] + std::get<2>(policy) + std::get<1>(reference) + static_cast<int64_t>(labels + out + fields) +
         ignore_index + static_cast<int64_t>(temperature) + threads;
}
"""
_NAMES = (
    "shape", "policy", "reference", "labels", "ignore_index", "temperature", "fields", "out", "threads",
)  # fmt: skip
_PYBIND11 = f"""
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
using Release = pybind11::gil_scoped_release;
{_FUNCTION}
PYBIND11_MODULE(NAME, m) {{
  m.def("row_stats", &row_stats, pybind11::kw_only(), {", ".join(f'pybind11::arg("{name}")' for name in _NAMES)});
}}
"""
_NANOBIND = f"""
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>
using Release = nanobind::gil_scoped_release;
{_FUNCTION}
NB_MODULE(NAME, m) {{
  m.def("row_stats", &row_stats, nanobind::kw_only(), {", ".join(f'nanobind::arg("{name}")' for name in _NAMES)});
}}
"""
_STABLE = "-DPy_LIMITED_API=0x030C0000"
# Name of the module, what it is, its source, and more arguments of the compiler.
_WAYS = (
    ("with_pybind11", "pybind11", _PYBIND11, ()),
    ("with_nanobind", "nanobind", _NANOBIND, ()),
    ("with_stable_abi", "nanobind, stable ABI", _NANOBIND, (_STABLE,)),
)
_MEASURE = """
import importlib, sys, timeit
view, best = (123456789, 0, 512, 64), {}
for _ in range(5):
    for name in sys.argv[1:]:
        call = importlib.import_module(name).row_stats
        step = lambda: call(shape=(4, 8, 64), policy=view, reference=view, labels=1234567, ignore_index=-100,
                            temperature=1.0, fields=71, out=7654321, threads=1)
        best.setdefault(name, []).append(min(timeit.repeat(step, number=20000, repeat=5)) / 20000 * 1e9)
for name in sys.argv[1:]:
    print(name, round(sorted(best[name])[2]))
"""
_PATHS = """
import nanobind, pathlib, pybind11, sysconfig
root = pathlib.Path(nanobind.source_dir()).parent
print(sysconfig.get_path("include"), nanobind.include_dir(), root / "ext/robin_map/include", pybind11.get_include())
print(root / "src/nb_combined.cpp")
print(nanobind.__version__, pybind11.__version__, sysconfig.get_python_version())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", default=sys.executable, metavar="PYTHON")
    chosen = parser.parse_args().python
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run([chosen, "-m", "venv", str(folder / "venv")])
        python = str(folder / "venv" / "bin" / "python")
        run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "nanobind", "pybind11"])
        includes, nanobind, versions = run([python, "-c", _PATHS]).splitlines()
        number = tuple(int(part) for part in versions.split()[2].split("."))
        ways = [way for way in _WAYS if _STABLE not in way[3] or number >= (3, 12)]
        for name, _, source, more in ways:
            (folder / f"{name}.cpp").write_text(source, encoding="utf-8")
            sources = [f"{name}.cpp", *([nanobind] if source is _NANOBIND else [])]
            flags = ["-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", f"-DNAME={name}"]
            run(["c++", *flags, *more, *(f"-I{i}" for i in includes.split()), *sources, "-o", f"{name}.so"], folder)
        print(
            "nanobind {}, pybind11 {}, Python {}; ns per call, the median of 5 rounds' best".format(*versions.split())
        )
        measured = run([python, "-c", _MEASURE, *(way[0] for way in ways)], folder)
        titles = {name: title for name, title, _, _ in ways}
        for line in measured.splitlines():
            name, nanoseconds = line.split()
            print(f"{titles[name]:24}{nanoseconds:>6}")


def run(command: list[str], folder: Path | None = None) -> str:
    """What a command prints; its errors end this program."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
