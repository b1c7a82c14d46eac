"""What a scored data set comes to: per-pair figures, means, the least rewarded spans; fed a window at a time."""

from __future__ import annotations

import heapq
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..credit import mean, ranked_right
from .files import CUT_COLUMNS, PairInfo
from .table import SIDES, FoundSpan, TokenTable

_KEPT_SPANS = 20  # of each side
_PER_ANSWER = 3
_COUNTS = ("pair", "chosen_tokens", "rejected_tokens")
_ROWS = 4096  # of pairs.parquet that are in memory at a time


class PairFigures(NamedTuple):
    """One pair: numbers of tokens, rewards of its answers, sums of their log-probs (nats)."""

    pair: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_rewards: float
    rejected_rewards: float
    margins: float
    chosen_logps: float
    rejected_logps: float
    chosen_reference_logps: float
    rejected_reference_logps: float


class _Pairs:
    """`PairFigures` in the order in which they were added, 80 bytes each: there may be millions."""

    def __init__(self) -> None:
        self._numbers = array("d")

    def append(self, figures: PairFigures) -> None:
        self._numbers.extend(figures)

    def __len__(self) -> int:
        return len(self._numbers) // len(PairFigures._fields)

    def __iter__(self) -> Iterator[PairFigures]:
        width = len(PairFigures._fields)
        for start in range(0, len(self._numbers), width):
            pair, chosen, rejected, *others = self._numbers[start : start + width]
            yield PairFigures(int(pair), int(chosen), int(rejected), *others)


class Overview:
    """Figures of all pairs that were added.

    Attributes:
        pairs: one `PairFigures` each, in the order of the data.
        positions: per side, sum of rewards and number of tokens at each position of an answer.
    """

    def __init__(self) -> None:
        self.pairs = _Pairs()
        self.positions: dict[str, tuple[list[float], list[int]]] = {side: ([], []) for side in SIDES}
        self.not_finite = 0
        self._sums: dict[str, dict[str, float]] = {side: {} for side in SIDES}
        self._tokens = dict.fromkeys(SIDES, 0)
        self._heaps: dict[str, list[tuple[float, int, FoundSpan]]] = {side: [] for side in SIDES}
        self._seen = 0

    def add(self, window: TokenTable) -> None:
        """Take in whole pairs."""
        import numpy as np

        for pair in window.pairs():
            answers = {side: window.select(pair, side) for side in SIDES}
            sums = {
                side: [
                    float(rows[name].sum(dtype=np.float64)) for name in ("implicit_rewards", "logps", "reference_logps")
                ]
                for side, rows in answers.items()
            }
            chosen, rejected = sums["chosen"], sums["rejected"]
            self.pairs.append(
                PairFigures(
                    pair,
                    len(answers["chosen"]),
                    len(answers["rejected"]),
                    chosen[0],
                    rejected[0],
                    chosen[0] - rejected[0],
                    chosen[1],
                    rejected[1],
                    chosen[2],
                    rejected[2],
                )
            )
            for side, rows in answers.items():
                self._answer(pair, side, rows)

    def _answer(self, pair: int, side: str, rows: TokenTable) -> None:
        import numpy as np

        rewards = rows["implicit_rewards"]
        self._tokens[side] += len(rows)
        self.not_finite += int((~np.isfinite(rewards)).sum())
        for name in rows.outputs:
            self._sums[side][name] = self._sums[side].get(name, 0.0) + float(rows[name].sum(dtype=np.float64))
        totals, counts = self.positions[side]
        grown = len(rows) - len(totals)
        totals.extend([0.0] * grown)
        counts.extend([0] * grown)
        for i, reward in enumerate(rewards.tolist()):
            if math.isfinite(reward):
                totals[i] += reward
                counts[i] += 1
        heap = self._heaps[side]
        for found in rows.lowest_spans(limit=_PER_ANSWER):
            self._seen += 1
            key = -math.inf if math.isnan(found.span.reward) else found.span.reward
            entry = (-key, -self._seen, found)
            if len(heap) < _KEPT_SPANS:
                heapq.heappush(heap, entry)
            elif -key > heap[0][0]:
                heapq.heapreplace(heap, entry)

    def spans(self, side: str) -> list[FoundSpan]:
        """The least rewarded spans of the chosen or of the rejected answers, lowest first."""
        return [found for _, _, found in sorted(self._heaps[side], reverse=True)]

    def suspicious(self, count: int) -> list[PairFigures]:
        """The pairs with the lowest margins, lowest first: the model contradicts their labels most."""
        return heapq.nsmallest(
            count, self.pairs, key=lambda pair: -math.inf if math.isnan(pair.margins) else pair.margins
        )

    def means(self) -> dict[str, dict[str, float]]:
        """Per output, its mean over the tokens of the chosen and of the rejected answers."""
        return {
            name: {side: self._sums[side][name] / self._tokens[side] for side in SIDES} for name in self._sums[SIDES[0]]
        }

    def figures(self) -> dict[str, Any]:
        """The summary, as JSON values."""
        rewards = ((pair.chosen_rewards, pair.rejected_rewards) for pair in self.pairs)
        reference = ((pair.chosen_reference_logps, pair.rejected_reference_logps) for pair in self.pairs)
        longer = [float(pair.chosen_tokens - pair.rejected_tokens) for pair in self.pairs]
        return {
            "pairs": len(self.pairs),
            "tokens": sum(self._tokens.values()),
            "pair_accuracy": ranked_right(rewards),
            "pair_accuracy_of_reference_logps": ranked_right(reference),
            "mean_margin": mean(pair.margins for pair in self.pairs),
            "mean_chosen_reward": mean(pair.chosen_rewards for pair in self.pairs),
            "mean_rejected_reward": mean(pair.rejected_rewards for pair in self.pairs),
            "correlation_of_margin_and_length": correlation(longer, [pair.margins for pair in self.pairs]),
            "rewards_not_finite": self.not_finite,
            "token_means": self.means(),
        }

    def write_pairs(
        self, path: Path, prompts: Iterable[tuple[int, list[tuple[str, str]]]], info: Mapping[int, PairInfo]
    ) -> None:
        """Write `pairs.parquet`, a few thousand rows in memory at a time.

        Args:
            path: of the file.
            prompts: of all pairs of the data, scored or not, with their numbers; ascending.
            info: of the scored pairs.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [(name, pa.int64() if name in _COUNTS else pa.float64()) for name in PairFigures._fields]
            + [(name, pa.int64()) for name in (*CUT_COLUMNS, "longest")]
            + [("digest", pa.string()), ("prompt", pa.string())]
        )
        scored = iter(self.pairs)
        with pq.ParquetWriter(path, schema) as writer:
            rows: list[tuple[Any, ...]] = []
            pair = next(scored, None)
            for number, prompt in prompts:
                if pair is None:
                    break
                if number != pair.pair:
                    continue
                known = info[number]
                rows.append((*pair, *known.cuts, known.longest, known.digest, json.dumps(prompt, ensure_ascii=False)))
                pair = next(scored, None)
                if len(rows) == _ROWS or pair is None:
                    columns = zip(*rows, strict=True)
                    writer.write_table(pa.table([pa.array(list(column)) for column in columns], schema=schema))
                    rows = []


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's; None where one of them does not vary, or is not finite."""
    if not xs or not all(map(math.isfinite, [*xs, *ys])):
        return None
    mx, my = mean(xs), mean(ys)
    sx = math.sqrt(sum((x - mx) ** 2 for x in xs))
    sy = math.sqrt(sum((y - my) ** 2 for y in ys))
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / (sx * sy) if sx and sy else None
