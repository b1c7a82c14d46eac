"""The results of a benchmark run as a Markdown table, as JSON and as a plot.

On a machine whose speed wanders, several runs tell more than one:

    pytest bench/ --benchmark-only --report run1        (and run2, run3 ...)
    python -m bench.report run1 run2 run3 --out results

writes the same three files, with the median over the runs of each time and of each ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One contender on one piece of work.

    work, contender, dtype, shape: what was timed.
    milliseconds, fastest, slowest: median, minimum and maximum over the rounds.
    amount, unit: the least any implementation has to do, in "GB" moved between memory and processor or in "GFLOP".
    floor, floor_ratio: what the time is compared with, measured in the same run, and the median as a multiple of it.
    peak_bytes: resident memory beyond the inputs, at most; None where it was not measured.
    logits_bytes: size of one tensor of logits.
    """

    work: str
    contender: str
    dtype: str
    shape: str
    milliseconds: float
    fastest: float
    slowest: float
    amount: float
    unit: str
    floor: str
    floor_ratio: float
    peak_bytes: int | None
    logits_bytes: int

    @staticmethod
    def of(benchmark: Any) -> Entry:
        info, stats = benchmark.extra_info, benchmark.stats
        return Entry(
            milliseconds=stats.median * 1e3,
            fastest=stats.min * 1e3,
            slowest=stats.max * 1e3,
            **{
                key: info[key]
                for key in (
                    "work", "contender", "dtype", "shape", "amount", "unit", "floor", "peak_bytes", "logits_bytes"
                )
            },
            floor_ratio=stats.median / info["floor_seconds"],
        )  # fmt: skip

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.milliseconds * 1e3


def merged(runs: list[list[Entry]]) -> list[Entry]:
    """Each entry's median over the runs, of times and of ratios; fastest and slowest of all rounds.

    Raises:
        ValueError: the runs did not measure the same.
    """

    def by_name(run: list[Entry]) -> dict[tuple[str, str, str, str], Entry]:
        return {(entry.work, entry.contender, entry.dtype, entry.shape): entry for entry in run}

    first, *others = named = [by_name(run) for run in runs]
    for number, other in enumerate(others, 2):
        if differing := sorted(map(str, first.keys() ^ other.keys())):
            raise ValueError(f"runs 1 and {number} did not measure the same: {differing[0]}")
    result = []
    for name, entry in first.items():
        all_ = [run[name] for run in named]
        peaks = [e.peak_bytes for e in all_ if e.peak_bytes is not None]
        result.append(
            replace(
                entry,
                milliseconds=statistics.median(e.milliseconds for e in all_),
                fastest=min(e.fastest for e in all_),
                slowest=max(e.slowest for e in all_),
                floor_ratio=statistics.median(e.floor_ratio for e in all_),
                peak_bytes=statistics.median_high(peaks) if peaks else None,
            )
        )
    return result


def _groups(entries: list[Entry]) -> dict[tuple[str, str, str], list[Entry]]:
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.work, entry.dtype, entry.shape), []).append(entry)
    return groups


def _peak(entry: Entry) -> str:
    if entry.peak_bytes is None:
        return "–"
    share = entry.peak_bytes / entry.logits_bytes
    return f"{share:.2f}x" if share >= 0.01 else f"{100 * share:.1f} %"


def _time(milliseconds: float) -> str:
    if milliseconds >= 1:
        return f"{milliseconds:.1f} ms" if milliseconds >= 100 else f"{milliseconds:.2f} ms"
    return f"{1000 * milliseconds:.0f} µs"


def markdown(entries: list[Entry], machine: dict[str, str]) -> str:
    """One table per piece of work."""
    lines = [f"- {key}: {value}" for key, value in machine.items()]
    for (work, dtype, shape), group in _groups(entries).items():
        lines += ["", f"**{work}**, {dtype}, {shape}", ""]
        first = group[0]
        lines += [
            f"| | median | min–max | against the first | {first.unit}/s | time / {first.floor} | peak beyond inputs |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for entry in group:
            lines.append(
                f"| {entry.contender} | {_time(entry.milliseconds)} | {_time(entry.fastest)}–{_time(entry.slowest)} "
                f"| {entry.milliseconds / first.milliseconds:.2f}x | {entry.rate:.1f} "
                f"| {entry.floor_ratio:.2f} | {_peak(entry)} |"
            )
    lines += [
        "",
        "GB/s, GFLOP/s and the ratio to a copy or to bare products count what the work needs at least, whatever a",
        "contender really does; peak memory is a multiple (or share) of one tensor of logits.",
    ]
    return "\n".join(lines)


def write(entries: list[Entry], machine: dict[str, str], directory: Path) -> None:
    """results.md, results.json and, where matplotlib is installed, results.png."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.md").write_text(markdown(entries, machine) + "\n", encoding="utf-8")
    document = {"machine": machine, "results": [asdict(entry) for entry in entries]}
    (directory / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    plot(entries, directory / "results.png")


def plot(entries: list[Entry], path: Path) -> None:
    """Bars for each piece of work that peers do too: median times, and the floor as a line."""
    import matplotlib.pyplot as plt

    groups = sorted(
        ((key, group) for key, group in _groups(entries).items() if any("qkernels" not in e.contender for e in group)),
        key=lambda item: item[0][0],
    )
    if not groups:
        return
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    heights = [
        1.1 + 0.3 * max(len(group) for _, group in groups[row * columns : (row + 1) * columns]) for row in range(rows)
    ]
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.2 * columns, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.12)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, ((work, dtype, shape), group) in zip(axes.flat, groups, strict=False):
        names = [entry.contender for entry in group]
        times = [entry.milliseconds for entry in group]
        colours = ["#0b6e99" if "qkernels" in name else "#b9bec4" for name in names]
        bars = axis.barh(names, times, color=colours, height=0.7)
        axis.bar_label(bars, [_time(t) for t in times], padding=4, fontsize=9)
        floor = group[0].milliseconds / group[0].floor_ratio
        axis.axvline(floor, color="#c2410c", linewidth=1.2, linestyle="--")
        axis.text(floor, -0.75, f" {group[0].floor}", color="#c2410c", fontsize=8, va="center")
        axis.set_xlim(0, max(times) * 1.18)
        axis.set_ylim(len(names) - 0.4, -1.1)
        axis.set_title(f"{work}, {dtype}", fontsize=11, loc="left", fontweight="bold", pad=2)
        axis.set_xlabel(f"ms, {shape}", fontsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that --report has written")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the merged results go")
    options = parser.parse_args(arguments)
    documents = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in options.runs]
    machine = documents[0]["machine"]
    for run, document in zip(options.runs, documents, strict=True):
        if document["machine"] != machine:
            parser.error(f"{run} comes from another machine or software than {options.runs[0]}")
    try:
        entries = merged([[Entry(**entry) for entry in document["results"]] for document in documents])
    except ValueError as error:
        parser.error(str(error))
    write(entries, {**machine, "runs": f"{len(documents)}, medians over them"}, options.out)


if __name__ == "__main__":
    main()
