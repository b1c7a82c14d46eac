"""Instructions that the compiled GPU kernels execute per row and per entry, counted by an emulator of PTX.

    python -m bench.instruction_counts --emulator DIR      write bench/results/instruction-counts.json

`DIR` holds an emulator that executes the kernels' PTX with their own host code launching it: a module `hosts` with the
classes `Cuda` and `Triton`, a module `machine` whose `Machine` runs the lanes of a launch, and `cases` with
`batch`, `run_stats` and `run_grad`. It is no part of this project, and nothing here needs it but this command:
`bench.kernel_report` reads the file.

What is counted, for two lengths of a row and from them per entry and per row: issue slots (an instruction of a warp,
whatever number of its lanes take part), the slots of the warp of a block that has the most to do, which is how long a
row's instructions take at least one after the other, and the kernel launches.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULT = Path("bench/results/instruction-counts.json")
# They differ by whole iterations of every kernel's main loop; part of one is left at the end, as in most rows.
LENGTHS = ((1 << 14) + 1536, (1 << 15) + 1536)
SPLITS = 4

BF16, F32 = torch.bfloat16, torch.float32
# Variant of `bench.kernel_report` -> logits' dtype, and how it is called.
STATS = {
    "log-probs": (BF16, "STATE", None),
    "log-probs, fp32": (F32, "STATE", None),
    "log-probs, split rows": (BF16, "STATE", SPLITS),
    "with entropy": (BF16, "ENTROPY", None),
    "all fields without reference": (BF16, "POLICY", None),
    "with KLs": (BF16, "KLS", None),
    "with KLs, fp32": (F32, "KLS", None),
    "all fields": (BF16, "ALL", None),
}
GRADS = {
    "gradient of log-probs": (BF16, "plain"),
    "gradient of log-probs, fp32": (F32, "plain"),
    "gradient, five coefficients": (BF16, "full"),
    "gradient with KLs": (BF16, "pair"),
    "gradient with KLs, fp32": (F32, "pair"),
}


class Counter:
    """Counts the issue slots of every warp while a machine runs.

    blocks: slots of each block of each launch.
    longest: slots of the warp of a launch with the most to do, added over the launches: they wait for each other.
    """

    def __init__(self, machine: Any):
        self.machine, self.blocks, self.longest = machine, [], 0

    def __enter__(self) -> Counter:
        self.function, self.run = self.machine.Machine._function, self.machine.Machine.run
        counter = self

        def function(emulated: Any, block: Any) -> Callable[..., Any]:
            compiled = counter.function(emulated, block)

            def counted(this: Any, registers: Any, lanes: Any) -> Any:
                warps = this.warp_of if lanes is None else this.warp_of[lanes]
                present = torch.zeros(this.n // 32, dtype=torch.bool)
                present[torch.from_numpy(warps.astype("i8"))] = True
                this.issued[present] += len(block.instructions)
                return compiled(this, registers, lanes)

            return counted

        def run(emulated: Any, *arguments: Any) -> Any:
            emulated.issued = torch.zeros(emulated.n // 32, dtype=torch.int64)
            done = counter.run(emulated, *arguments)
            counter.blocks += emulated.issued.view(-1, emulated.threads // 32).sum(1).tolist()
            counter.longest += int(emulated.issued.max())
            return done

        self.machine.Machine._function, self.machine.Machine.run = function, run
        return self

    def __exit__(self, *how: object) -> None:
        self.machine.Machine._function, self.machine.Machine.run = self.function, self.run


def per_row(call: Callable[[int, dict], list[str]], machine: Any, total: Callable[[list], int]) -> dict[str, float]:
    """Slots per entry and per row besides, and those of the longest warp besides its entries.

    total: of the blocks' slots, those of one row.
    """
    seen = []
    for length in LENGTHS:
        with Counter(machine) as counter:
            problems = call(length, {})
        if problems:
            raise RuntimeError(f"wrong results in the emulator: {problems[:3]}")
        seen.append((total(counter.blocks), counter.longest))
    (a, longest_a), (b, longest_b) = seen
    steps = LENGTHS[1] - LENGTHS[0]
    per_entry, longest_per_entry = (b - a) / steps, (longest_b - longest_a) / steps
    return {
        "slots_per_entry": round(per_entry, 5),
        "slots_per_row": round(a - per_entry * LENGTHS[0]),
        "longest_warp_per_row": round(longest_a - longest_per_entry * LENGTHS[0]),
    }


def counts_of(host: Any, cases: Any, machine: Any) -> dict[str, dict[str, float]]:
    """Every variant on one host."""
    from qkernels.core.fields import BIT, FIELDS, SOFTMAX

    everything = (1 << len(FIELDS)) - 1
    fields = {
        "STATE": SOFTMAX,
        "ENTROPY": SOFTMAX | BIT["entropy"],
        "POLICY": everything & ~cases.NEEDS_REFERENCE,
        "KLS": SOFTMAX | BIT["entropy"] | BIT["kl_policy_reference"] | BIT["kl_reference_policy"],
        "ALL": everything,
    }
    found = {}
    make = functools.partial(cases.batch, kinds=("normal",), sound=True)
    for name, (dtype, which, splits) in STATS.items():

        def stats(
            length: int, counts: dict, dtype: Any = dtype, which: str = which, splits: int | None = splits
        ) -> Any:
            batch = make((1, 1), length, dtype, layout=(0, 0, 0), r_layout=(0, 0, 0))
            return cases.run_stats(host, batch, fields[which], splits=splits or 1, counts=counts)[0]

        found[name] = per_row(stats, machine, sum)
    for name, (dtype, form) in GRADS.items():

        def grad(length: int, counts: dict, dtype: Any = dtype, form: str = form) -> Any:
            batch = make((1, 2), length, dtype, layout=(0, 0, 0), r_layout=(0, 0, 0))
            return cases.run_grad(host, batch, form=form, how="in place", splits=1, counts=counts)[0]

        found[name] = per_row(grad, machine, max)  # of the two rows one has no gradient
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--emulator", type=Path, required=True, metavar="DIR", help="folder with the emulator's modules"
    )
    parser.add_argument("--architecture", default="sm_90", help="default: sm_90")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"default: {RESULT}")
    options = parser.parse_args()
    sys.path.insert(0, str(options.emulator))
    try:
        hosts, machine, cases = (importlib.import_module(name) for name in ("hosts", "machine", "cases"))
    except ImportError as error:
        parser.error(f"--emulator {options.emulator}: {error}")
    torch.set_num_threads(1)
    document = {"architecture": options.architecture, "made by": "python -m bench.instruction_counts", "counts": {}}
    for compiler, host in (("CUDA", hosts.Cuda), ("Triton", hosts.Triton)):
        document["counts"][compiler] = counts_of(host(options.architecture), cases, machine)
        for name, counts in document["counts"][compiler].items():
            print(compiler, name, counts)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
