"""The results of a benchmark run as a Markdown table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
