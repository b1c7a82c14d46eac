"""Which backends, devices and dtypes every test runs on, and how hypothesis draws.

A test that takes `backend` runs once for each entry of the registry in `qkernels.backends` on each device where that
backend says it can run, so a backend added there is tested unasked. A test that takes `backend` and `dtype` runs once
for each pair that the backend accepts; `@pytest.mark.dtypes(torch.float32, ...)` narrows the dtypes.

`tiers.py` says which cases run when: `make quick`, `make test` (all that are not marked `nightly`), `make nightly`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import tiers
from runnable import DTYPES, runnable_backends

# `bench`, after everything else: the installed package stays the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

hypothesis.settings.register_profile(
    "qkernels",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("qkernels")


MARKERS = (
    "dtypes(*dtypes): the dtypes of logits that this test runs with",
    "only_backends(*names): the backends that promise what this test checks",
    "not_backends(*names): backends that do not promise what this test checks",
    "every_dtype: the torch backend's 16-bit cases are more than a cast here, so they are not left to the nightly run",
    "quick: runs in `make quick`",
    "quick_cases(**values): the cases whose parameters have one of these values run in `make quick`",
    "nightly: runs in `make nightly` only",
    "nightly_except(**values): the cases whose parameters have none of these values run in `make nightly` only",
    "nightly_cases(**values): the cases whose parameters all have one of these values run in `make nightly` only",
)


def pytest_configure(config):
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    if wanted := os.environ.get("QKERNELS_TEST_INSTRUCTION_SET"):  # `make matrix`
        from qkernels import _C

        assert _C.use_instruction_set(wanted), f"this machine has no {wanted}"


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return

    def names(marker: str) -> tuple | None:
        found = metafunc.definition.get_closest_marker(marker)
        return found.args if found else None

    only, excluded = names("only_backends"), names("not_backends") or ()
    found = [b for b in runnable_backends() if b.name not in excluded and (only is None or b.name in only)]
    wanted = "the backend " + " or ".join(only) if only else "a backend with kernels"
    missing = pytest.mark.skip(reason=f"{wanted} cannot run here")
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("backend", found or [pytest.param(None, marks=missing)], ids=str)
        return
    pairs = [(backend, dtype) for backend in found for dtype in names("dtypes") or DTYPES if backend.takes(dtype)]
    ids = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in pairs] or ["missing"]
    metafunc.parametrize("backend, dtype", pairs or [pytest.param(None, None, marks=missing)], ids=ids)


def pytest_ignore_collect(collection_path, config):
    """For the quick run, files and folders without a quick case are not even imported."""
    if not config.option.markexpr.startswith("quick") or not (
        collection_path.is_dir() or collection_path.suffix == ".py"
    ):
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.quick" in path.read_text(encoding="utf-8") for path in files) else True


# Folders whose files hold few and long cases: compilations, processes, trainings. `make test` gives each process the
# next file, so the long files come first, and the many short ones even out what the processes have left to do.
LONG = ("backends", "repo", "apps", "integrations", "distributed")


def _order(item):
    folder = Path(item.path).parent.name
    return LONG.index(folder) if folder in LONG else len(LONG)


def pytest_collection_modifyitems(items):
    """Long files first; which tier each case belongs to: `quick`, `nightly`, or neither."""
    items.sort(key=_order)
    for item in items:
        values = (getattr(item, "callspec", None) and item.callspec.params) or {}
        if tiers.is_nightly(item, values):
            item.add_marker("nightly")
        elif tiers.is_quick(item, values):
            item.add_marker("quick")


@pytest.fixture(autouse=True, scope="session")
def _threads_of_wider_fixtures():
    """Fixtures of a module or session run before `_seed_and_threads`: what they compute is on the tests' threads too.

    Torch's products have other bits on another number of threads, and several tests compare such a fixture's run with
    a run of their own bit for bit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("QKERNELS_TEST_THREADS", 1)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed_and_threads(request):
    """Each test draws the same numbers whatever ran before it, and leaves torch's thread count as it was.

    The kernels run on 3 threads, which divides nothing evenly; torch itself on one, because its threads wait for each
    other in busy loops and a machine with other work on it would spend minutes there. QKERNELS_TEST_THREADS=N runs both
    on N (`make matrix`).
    """
    threads = torch.get_num_threads()
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    usual = 1 if backend is None or backend.name == "torch" else 3
    torch.set_num_threads(int(os.environ.get("QKERNELS_TEST_THREADS", usual)))
    torch.manual_seed(20240412)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_graphs():
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()


@pytest.fixture
def bare_products(monkeypatch):
    """Products of as many rows as there are, for tests that count their operations."""
    monkeypatch.setattr("qkernels.head.products._FEWEST_ROWS", 0)
