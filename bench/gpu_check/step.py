"""What a step sees of the run, and how it tells what it measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import measure, report

ROOT = Path(__file__).resolve().parents[2]
IGNORE = -100
# What the lines begin with by which a process tells which step it begins, what it measured, and a step's result.
BEGIN, ENTRY, RESULT = "gpu_check begin: ", "gpu_check entry: ", "gpu_check result: "


class Missing(Exception):
    """A step has nothing to run with here: a tool or a package that is not installed. No failure."""


@dataclass
class Bench:
    """One step's view of the run: where, how large, and what was measured so far.

    device: where the kernels run; on the CPU everything is a rehearsal on tiny tensors.
    quick: a quarter of the rows, a third of the rounds.
    wheels: folder with wheels of peers, or None.
    unpacked: what was said when they were made importable.
    """

    device: torch.device
    quick: bool = False
    wheels: Path | None = None
    unpacked: list[str] = field(default_factory=list)
    entries: list[report.Entry] = field(default_factory=list)
    copies: dict[tuple[torch.dtype, int], float] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    @property
    def rounds(self) -> int:
        return 1 if self.rehearsal else 10 if self.quick else 30

    @property
    def rows(self) -> int:
        return 8 if self.rehearsal else 2048 if self.quick else 8192

    @property
    def vocab(self) -> int:
        return 515 if self.rehearsal else 128256

    def backends(self) -> list[str]:
        """The backends with kernels that run here: on a GPU the GPU's, in a rehearsal the CPU's and emulated ones."""
        from qkernels import backends

        return [n for n in ("cuda", "triton", "cpu") if backends.unavailable(n, self.device, torch.float32) is None]

    def logits(self, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        out = torch.empty(rows, vocab, dtype=dtype, device=self.device)
        for part in out.split(1024):  # the fp32 originals are not kept
            part.copy_(3 * torch.randn(part.shape, generator=generator, device=self.device))
        return out

    def labels(self, rows: int, vocab: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randint(0, vocab, (rows,), generator=generator, device=self.device)

    def seconds(self, call: Callable[[], object], setup: Callable[[], object] | None = None) -> float:
        """Median time of a call on the device."""
        return statistics.median(measure.device_seconds(call, self.device, self.rounds, setup))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give memory that nothing uses back to the device, as after a peer that ran out of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def add(
        self,
        work: str,
        contender: str,
        logits: Tensor,
        passes: float,
        call: Callable[[], object],
        setup: Callable[[], object] | None = None,
        peak: int | None = None,
    ) -> float:
        """Time a call that reads or writes `passes` times the bytes of `logits`, beside a copy of as many; seconds."""
        size = logits.numel() * logits.element_size()
        key = (logits.dtype, size)
        if key not in self.copies:
            self.copies[key] = measure.copy_bandwidth(logits, self.rounds)
        facts = {
            "dtype": str(logits.dtype).removeprefix("torch."),
            "shape": f"{logits.numel() // logits.shape[-1]} rows x {logits.shape[-1]}",
            "amount": passes * size / 1e9,
            "unit": "GB",
            "floor": "copy of the same bytes",
            "floor_seconds": passes * size / self.copies[key],
            "logits_bytes": size,
        }
        return self.record(work, contender, facts, peak, measure.device_seconds(call, self.device, self.rounds, setup))

    def record(self, work: str, contender: str, facts: dict[str, Any], peak: int | None, seconds: list[float]) -> float:
        """Note the times of all rounds; their median. `facts`: the rest of a `report.Entry`.

        Printed at once, so that what was measured counts even if the step does not come to its end.
        """
        median = statistics.median(seconds)
        described = {key: value for key, value in facts.items() if key != "floor_seconds"}
        entry = report.Entry(
            work=work,
            contender=contender,
            milliseconds=median * 1e3,
            fastest=min(seconds) * 1e3,
            slowest=max(seconds) * 1e3,
            floor_ratio=median / facts["floor_seconds"],
            peak_bytes=peak,
            **described,
        )
        self.entries.append(entry)
        print(ENTRY + json.dumps(asdict(entry)), flush=True)
        return median


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
