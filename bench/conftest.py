"""Options, data and the report of the benchmark run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import measure, report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qkernels benchmarks")
    group.addoption(
        "--rows", type=int, default=None, help="positions in the batch (default: what memory holds, <= 1024)"
    )
    group.addoption("--vocab", type=int, default=128256, help="size of the vocabulary (default: 128256)")
    group.addoption("--hidden", type=int, default=1024, help="size of the hidden states (default: 1024)")
    group.addoption(
        "--linear-vocab", type=int, default=32000, help="vocabulary of the head in test_linear.py (default: 32000)"
    )
    group.addoption("--dtypes", default="fp32,bf16", help="comma-separated among fp32, bf16, fp16 (default: fp32,bf16)")
    group.addoption("--rounds", type=int, default=5, help="timed rounds of each contender (default: 5)")
    group.addoption(
        "--report", default=None, metavar="DIR", help="write results.md, results.json and results.png there"
    )


def pytest_configure(config: pytest.Config) -> None:
    """GEMMs alone are timed by the clock that the contenders are timed by."""
    if str(config.getoption("benchmark_timer", "")) == "time.process_time":
        measure.clock = time.process_time


@dataclass(frozen=True)
class Size:
    """Shape of the work: `sequences * length` rows of `vocab` logits."""

    sequences: int
    length: int
    vocab: int

    @property
    def rows(self) -> int:
        return self.sequences * self.length


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Size:
    """As asked for, or as many of 1024 rows as leave two thirds of the free memory to the contenders that copy."""
    vocab, rows = pytestconfig.getoption("--vocab"), pytestconfig.getoption("--rows")
    if rows is None:
        copies = 12  # what eager torch and torch.compile hold at their worst, in fp32
        fitting = measure.available_memory() / (copies * 4 * vocab)
        rows = min(1024, max(8, 2 ** int(math.log2(max(fitting, 8)))))
    if rows % 8 or rows <= 0 or vocab <= 0:
        raise pytest.UsageError(f"--rows must be a positive multiple of 8 and --vocab positive, got {rows} and {vocab}")
    return Size(8, rows // 8, vocab)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype_name" in metafunc.fixturenames:
        names = metafunc.config.getoption("--dtypes").split(",")
        unknown = [name for name in names if name not in DTYPES]
        if unknown:
            raise pytest.UsageError(f"--dtypes: unknown {unknown}; expected some of {list(DTYPES)}")
        metafunc.parametrize("dtype_name", names, scope="session")


@dataclass(frozen=True)
class Data:
    """Policy and reference logits, labels, and how fast such tensors are copied here (bytes/s, read + write)."""

    policy: Tensor
    reference: Tensor
    labels: Tensor
    copy_bandwidth: float

    @property
    def logits_bytes(self) -> int:
        return self.policy.numel() * self.policy.element_size()


@pytest.fixture(scope="session")
def data(dtype_name: str, size: Size) -> Iterator[Data]:
    """The tensors all contenders share; a reference close to the policy, as in training."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.sequences, size.length, size.vocab)
    dtype = DTYPES[dtype_name]
    policy, reference = (torch.empty(shape, dtype=dtype) for _ in range(2))
    for i in range(size.sequences):  # one sequence at a time: the fp32 originals are not kept
        logits = 3 * torch.randn(shape[1:], generator=generator)
        policy[i] = logits
        reference[i] = logits.add_(torch.randn(shape[1:], generator=generator), alpha=0.3)
    labels = torch.randint(0, size.vocab, shape[:2], generator=generator)
    yield Data(policy, reference, labels, measure.copy_bandwidth(policy))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    entries = [report.Entry.of(b) for b in benchmarks if not b.has_error and "contender" in b.extra_info]
    if not entries:
        return
    machine, directory = measure.machine(), config.getoption("--report")
    terminalreporter.write_line("\n" + report.markdown(entries, machine))
    if directory:
        report.write(entries, machine, Path(directory))
        terminalreporter.write_line(f"\nwritten to {directory}")
