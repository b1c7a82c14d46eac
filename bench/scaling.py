"""What a vocabulary or positions split over ranks cost: collectives, bytes, and time beyond the split GEMMs.

    python -m bench.scaling                          measure, and print the tables
    python -m bench.scaling --rounds 0               count only, no times
    python -m bench.scaling --write docs/scaling.md  put them between the markers of that file

Starts `--ranks` processes with one thread each, joined by gloo. Every collective is counted where it leaves for
torch.distributed. The overhead compares a call with `tp_group` with the same call on the same part of the vocabulary
without a group: same GEMMs, nothing sent. Rounds of both alternate, so that other work on the machine meets both.

The last table is arithmetic, no measurement: collectives and bytes at sizes of a large model, by formulas that the
counted ones have to agree with, and the bandwidth and latency stated there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from qkernels import fused_linear_token_dpo, fused_token_dpo

from .measure import machine

BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"


@dataclass(frozen=True)
class Work:
    """One kind of call.

    name: for the table.
    path: "logits" or "hidden".
    plan: of the hidden-states path.
    split: "tp" (vocabulary) or "sp" (positions).
    """

    name: str
    path: str
    plan: str = ""
    split: str = "tp"


WORKS = (
    Work("logits", "logits"),
    Work("hidden, frozen_head", "hidden", "frozen_head"),
    Work("hidden, pair_chunks", "hidden", "pair_chunks"),
    Work("hidden, recompute", "hidden", "recompute"),
    Work("logits, positions", "logits", split="sp"),
    Work("hidden, recompute, positions", "hidden", "recompute", split="sp"),
)


@dataclass(frozen=True)
class Sizes:
    """rows: valid rows of the whole batch, N. vocab: V of all ranks together. hidden: H."""

    rows: int
    vocab: int
    hidden: int
    dtype: torch.dtype


class Counter:
    """Counts what goes through torch.distributed while it is entered: collectives and bytes of tensors."""

    def __init__(self) -> None:
        self.messages: list[int] = []

    def __enter__(self) -> Counter:
        self._real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_object")}
        for name, function in self._real.items():
            setattr(dist, name, self._counting(function, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)

    def _counting(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            self.messages.append(tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0)
            return function(*args, **kwargs)

        return call


def _call(work: Work, sizes: Sizes, grouped: bool) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """Forward (returns the loss) on this rank's part, and what clears the gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5)
    vocab = sizes.vocab // ranks if work.split == "tp" else sizes.vocab
    length = sizes.rows // 4 // (ranks if work.split == "sp" else 1)
    labels = torch.randint(0, sizes.vocab, (4, length))
    if not grouped:
        labels = labels % vocab
    group = {f"{work.split}_group": dist.group.WORLD} if grouped else {}
    if work.path == "logits":
        x = torch.randn(4, length, vocab, dtype=sizes.dtype).requires_grad_()
        leaves = [x]
        if grouped and rank:  # columns and positions differ from rank to rank; what is replicated does not
            x.data.add_(0.1)

        def forward() -> torch.Tensor:
            return fused_token_dpo(x, labels, reference_logps=0.0, **group).loss

    else:
        hidden = torch.randn(4, length, sizes.hidden, dtype=sizes.dtype).requires_grad_()
        weight = torch.randn(vocab, sizes.hidden, dtype=sizes.dtype).mul_(sizes.hidden**-0.5)
        weight.requires_grad_(work.plan != "frozen_head")
        leaves = [hidden, weight]

        def forward() -> torch.Tensor:
            return fused_linear_token_dpo(
                hidden, weight, labels, reference_logps=0.0, plan=work.plan, **group
            ).loss  # fmt: skip

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    return forward, clear


def _measure(work: Work, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Messages and bytes of forward and backward, and milliseconds with and without the group, on this rank."""
    result: dict[str, Any] = {}
    forward, clear = _call(work, sizes, grouped=True)
    with Counter() as sent:
        loss = forward()
        result["forward"] = list(sent.messages)
        sent.messages.clear()
        loss.backward()
        result["backward"] = list(sent.messages)
    clear()
    if work.split == "sp" or not rounds:
        return result
    alone, clear_alone = _call(work, sizes, grouped=False)
    wall: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds + 2):
        grouped = number % 2 == 0
        run, cleared = (forward, clear) if grouped else (alone, clear_alone)
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        run().backward()
        elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        cleared()
        if number >= 2:  # the first of each warms up
            wall[grouped].append(elapsed * 1e3)
            cpu[grouped].append(elapsed_cpu * 1e3)
    for name, times in (("wall", wall), ("cpu", cpu)):
        # All ranks have to be done: the slowest one counts, round by round.
        slowest = torch.tensor([times[True], times[False]])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        with_group, without = slowest.median(1).values.tolist()
        ratios = (slowest[0] / slowest[1] - 1).tolist()
        result[name] = (with_group, without, statistics.median(ratios), min(ratios), max(ratios))
    return result


def _rank(rank: int, ranks: int, store: str, sizes: Sizes, logits_vocab: int, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    of_logits = replace(sizes, vocab=logits_vocab)
    results = [_measure(work, of_logits if work.path == "logits" else sizes, rounds) for work in WORKS]
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, sizes: Sizes, logits_vocab: int, rounds: int) -> list[dict[str, Any]]:
    """What rank 0 saw, for each of `WORKS`."""
    with tempfile.TemporaryDirectory() as folder:
        store, out = str(Path(folder) / "store"), str(Path(folder) / "out")
        torch.multiprocessing.spawn(_rank, (ranks, store, sizes, logits_vocab, rounds, out), nprocs=ranks)
        return list(torch.load(out))


# Of the estimates: bytes per second and seconds per all-reduce.
WITHIN, BETWEEN = (300e9, 15e-6), (40e9, 40e-6)
SERVER = 8  # ranks that share the faster links
PEAK = 400e12
LARGE = Sizes(16384, 131072, 4096, torch.bfloat16)
PAIRS = 16


def tp_messages(sizes: Sizes) -> list[int]:
    """Bytes of each message of one chunk with `tp_group`: maxima, two sums, dL/dhidden."""
    return [4 * sizes.rows, 2 * 8 * sizes.rows, sizes.dtype.itemsize * sizes.rows * sizes.hidden]


def sp_message(sequences: int) -> int:
    """Bytes of the message of a loss with `sp_group`: four sums of each sequence."""
    return 4 * 8 * sequences


def check_formulas(sizes: Sizes, results: list[dict[str, Any]]) -> None:
    """Refuse to estimate from formulas that are not those of the code. (The first message is the agreement.)"""
    expected = {"hidden, pair_chunks": tp_messages(sizes), "hidden, recompute, positions": [sp_message(4)]}
    for work, result in zip(WORKS, results, strict=True):
        counted = result["forward"][1:] + result["backward"]
        if work.name in expected and counted != expected[work.name]:
            raise RuntimeError(f"{work.name} sends {counted} bytes, by the formula it is {expected[work.name]}")


@dataclass(frozen=True)
class Layout:
    """Ranks as a grid: vocabulary x positions x data."""

    tp: int
    sp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.sp * self.dp

    def milliseconds(self) -> tuple[float, float, float, float]:
        """Of a step, on paper: three GEMMs, `tp_group`'s collectives, `sp_group`'s, and FSDP's of the head.

        Every tp group has `LARGE.rows` rows whatever the number of ranks. A ring of R ranks moves 2 (R - 1) / R of the
        bytes through each; FSDP gathers the head's part once and reduces its gradient.
        """
        products = 3 * 2 * LARGE.rows * LARGE.vocab * LARGE.hidden / self.tp / PEAK
        bandwidth, latency = WITHIN if self.tp <= SERVER else BETWEEN
        tp = sum(latency + 2 * (self.tp - 1) / self.tp * size / bandwidth for size in tp_messages(LARGE))
        sp = BETWEEN[1] + sp_message(2 * PAIRS) / BETWEEN[0] if self.sp > 1 else 0.0
        head = LARGE.dtype.itemsize * LARGE.vocab * LARGE.hidden / self.tp
        shards = self.sp * self.dp
        dp = 2 * (BETWEEN[1] + (shards - 1) / shards * head / BETWEEN[0]) if shards > 1 else 0.0
        return products * 1e3, tp * 1e3, sp * 1e3, dp * 1e3


LAYOUTS = (Layout(2), Layout(4), Layout(8), Layout(16), Layout(8, 8), Layout(8, 8, 4), Layout(8, 16, 8))


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _sent(messages: list[int]) -> str:
    return f"{len(messages)}: {' + '.join(_bytes(m) for m in messages)}" if messages else "0"


def report(ranks: int, sizes: Sizes, logits_vocab: int, rounds: int, results: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    facts = machine()
    dtype = str(sizes.dtype).removeprefix("torch.")
    processor = facts["processor"].rpartition(",")[0]
    load = f"; load of the machine afterwards {os.getloadavg()[0]:.1f}, of which these processes are {ranks}"
    lines = [
        f"`python -m bench.scaling`: {ranks} ranks of one thread, gloo, N = {sizes.rows}, V = {logits_vocab} from"
        f" logits and {sizes.vocab} from hidden states, H = {sizes.hidden}, {dtype}. {processor};"
        f" {facts['software']}{load if rounds else ''}.",
        "",
        "| call | sent in the forward | sent in the backward |",
        "|---|---|---|",
    ]
    for work, result in zip(WORKS, results, strict=True):
        lines.append(f"| {work.name} | {_sent(result['forward'])} | {_sent(result['backward'])} |")
    if any("wall" in result for result in results):
        lines += [
            "",
            f"Forward and backward, medians of {rounds} rounds, the slower rank of each: with `tp_group`, the same"
            " products with nothing sent, and what the first takes longer (in the best and the worst round). Wall time"
            " contains the waiting of ranks for each other, and for a core if the machine has other work.",
            "",
            "| call | time | with `tp_group` | without | overhead |",
            "|---|---|---|---|---|",
        ]
        for work, result in zip(WORKS, results, strict=True):
            for name, what in (("wall", "wall"), ("cpu", "processor")):
                if name in result:
                    with_group, without, ratio, low, high = result[name]
                    lines.append(
                        f"| {work.name} | {what} | {with_group:.1f} ms | {without:.1f} ms |"
                        f" {ratio:+.1%} ({low:+.1%}, {high:+.1%}) |"
                    )
    lines += [
        "",
        f"On paper, not measured: N = {LARGE.rows} rows in each tp group, V = {LARGE.vocab}, H = {LARGE.hidden}, bf16,"
        f" {PAIRS} pairs, pair_chunks in one chunk (recompute with sp has a product more); {PEAK / 1e12:.0f}e12"
        f" operations per second and rank; {WITHIN[0] / 1e9:.0f} GB/s and {WITHIN[1] * 1e6:.0f} us per message within"
        f" {SERVER} ranks, {BETWEEN[0] / 1e9:.0f} GB/s and {BETWEEN[1] * 1e6:.0f} us beyond; nothing overlaps.",
        "",
        "| ranks | tp x sp x dp | GEMMs | tp collectives | sp collectives | head gathered, its gradient reduced |",
        "|---|---|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        products, *messages = layout.milliseconds()
        tp, sp, dp = (f"{m:.2f} ms ({m / products:.0%})" if m else "-" for m in messages)
        grid = f"{layout.tp} x {layout.sp} x {layout.dp}"
        lines.append(f"| {layout.ranks} | {grid} | {products:.1f} ms | {tp} | {sp} | {dp} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--rows", type=int, default=1024, metavar="N", help="rows, a multiple of 4 ranks (1024)")
    parser.add_argument("--vocab", type=int, default=32000, metavar="N", help="columns of all ranks, of a head (32000)")
    parser.add_argument("--logits-vocab", type=int, default=128256, metavar="N", help="the same, of logits (128256)")
    parser.add_argument("--hidden", type=int, default=1024, metavar="N", help="size of hidden states (1024)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="timed rounds; 0 only counts (9)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace what lies between this file's markers")
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.rows % (4 * args.ranks) or args.vocab % args.ranks or args.logits_vocab % args.ranks:
        parser.error("--ranks must be 2 or more, --rows a multiple of 4 ranks, vocabularies multiples of the ranks")
    sizes = Sizes(args.rows, args.vocab, args.hidden, getattr(torch, args.dtype))
    measured = measure(args.ranks, sizes, args.logits_vocab, args.rounds)
    check_formulas(sizes, measured)
    text = report(args.ranks, sizes, args.logits_vocab, args.rounds, measured)
    if args.write is None:
        print(text, end="")
        return 0
    old = args.write.read_text(encoding="utf-8")
    before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    if BEGIN not in old or END not in old:
        parser.error(f"{args.write} has no markers {BEGIN} and {END}")
    args.write.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
