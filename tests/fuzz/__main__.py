"""Command line of the fuzzer: `python -m tests.fuzz --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support")]  # this package as `fuzz`, and the oracle


def main() -> int:
    """Run random cases, or the one that is given; 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random calls against float64 formulas.")
    parser.add_argument("--cases", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--start", type=int, default=0, help="number of the first one")
    parser.add_argument("--backend", default="cpu", help="cpu, torch, triton (interpreted without a GPU) or cuda")
    parser.add_argument("--only", help="name of the one function to call")
    parser.add_argument("--stop-after", type=int, default=10, help="failures after which to stop")
    parser.add_argument("--seconds", type=float, help="begin no case after so many seconds")
    parser.add_argument("--case", help="JSON: run this case and no other")
    options = parser.parse_args()
    if options.backend == "triton":
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
            import fast_interpreter  # noqa: F401

    from fuzz import engine

    if options.case is not None:
        with engine.one_thread():
            failure = engine.run(json.loads(options.case), options.backend)
        print("passed" if failure is None else f"failed: {failure.kind}\n{failure.message}")
        return failure is not None

    def report(number: int, failure: engine.Failure) -> None:
        print(f"case {number} of seed {options.seed}: {failure.message}\n  {failure.line(options.backend)}", flush=True)

    ran, failures = engine.fuzz(
        options.cases, options.seed, options.backend, start=options.start, stop_after=options.stop_after,
        seconds=options.seconds, only=options.only, report=report,
    )  # fmt: skip
    print(f"{ran} cases on {options.backend}, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
