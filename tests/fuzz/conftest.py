"""Options of the fuzzer: `pytest tests/fuzz --fuzz-cases 5000 --fuzz-seed 3 --fuzz-backend cpu`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-cases", type=int, default=200, help="random cases for each backend")
    group.addoption("--fuzz-seed", type=int, default=0, help="which cases")
    group.addoption("--fuzz-backend", help="one backend instead of all that can run here: cpu, torch, triton or cuda")


@pytest.fixture
def fuzz_options(request):
    """Number of cases, seed, and the name of the one backend or None.

    pytest knows the options only when `tests/fuzz` is named on its command line; elsewhere the defaults hold.
    """
    get = request.config.getoption
    return get("fuzz_cases", 200), get("fuzz_seed", 0), get("fuzz_backend", None)
