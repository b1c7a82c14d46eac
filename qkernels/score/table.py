"""The results as a table: one row per token, columns of numpy, Parquet and pandas on request.

| column | type | |
|---|---|---|
| pair | int64 | number of the pair in the data, from 0 |
| side | str | "chosen" or "rejected" |
| position | int32 | number of the token in its answer, from 0 |
| token_id | int32 | |
| token | str | its text; the texts of an answer joined are the answer with its end marks |
| start, end | int32 | its characters in the answer's text, -1 outside it (end token) or unknown |
| ... | float32 | the outputs, as `qkernels.TokenStats` and `qkernels.TokenMDP` name them |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..credit import Span, low_reward_spans, overlapping
from ..data import Preference
from ..heatmap import HeatMap
from ..report.page import ScoredPair, Token
from .encode import EncodedAnswer

if TYPE_CHECKING:
    import numpy as np

SIDES = ("chosen", "rejected")
_CONTEXT = 60  # characters on either side of a span
KEYS = ("pair", "side", "position", "token_id", "token", "start", "end")


class FoundSpan(NamedTuple):
    """A span of low reward and where it stands: the text before it, its own, and the text after it."""

    pair: int
    side: str
    span: Span
    before: str
    text: str
    after: str


class TokenTable:
    """Per-token results, sorted by pair, side (chosen first) and position.

    Args:
        columns: name -> numpy array, all of one length; those of `KEYS` first, then the outputs.
        prompts: (role, text) of each message, by pair, for heat maps; pairs may be missing.
        special: token ids that are markers, for heat maps.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        prompts: Mapping[int, Sequence[tuple[str, str]]] | None = None,
        special: Iterable[int] = (),
    ):
        missing = [name for name in KEYS if name not in columns]
        if missing:
            raise ValueError(f"columns must have {', '.join(KEYS)}; missing: {', '.join(missing)}")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns must have one length, got {lengths}")
        self.columns = dict(columns)
        self.prompts, self.special = dict(prompts or {}), frozenset(special)

    def __len__(self) -> int:
        return len(self.columns["pair"])

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns)}") from None

    def __repr__(self) -> str:
        return f"TokenTable({len(self)} tokens of {len(self.pairs())} pairs: {', '.join(self.columns)})"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The columns that hold results."""
        return tuple(name for name in self.columns if name not in KEYS)

    def pairs(self) -> list[int]:
        """Numbers of the pairs, ascending."""
        import numpy as np

        return [int(pair) for pair in np.unique(self.columns["pair"])]

    def _taken(self, rows: Any) -> TokenTable:
        return TokenTable({name: column[rows] for name, column in self.columns.items()}, self.prompts, self.special)

    def sorted(self) -> TokenTable:
        """By pair, side (chosen first) and position."""
        import numpy as np

        keys = (self["position"], self["side"] != SIDES[0], self["pair"])
        return self._taken(np.lexsort(keys))

    def select(self, pair: int | None = None, side: str | None = None) -> TokenTable:
        """The rows of one pair, one side, or both.

        Raises:
            KeyError: no such pair. ValueError: no such side.
        """
        import numpy as np

        rows: Any = slice(None)
        if side is not None and side not in SIDES:
            raise ValueError(f"side must be 'chosen' or 'rejected', got {side!r}")
        if pair is not None:
            first, last = np.searchsorted(self["pair"], [pair, pair + 1])
            if first == last:
                raise KeyError(f"no pair {pair!r} among the {len(self.pairs())} of the table")
            rows = slice(int(first), int(last))
        taken = self._taken(rows)
        return taken if side is None else taken._taken(taken["side"] == side)

    def pair_rewards(self) -> dict[str, np.ndarray]:
        """Per pair: `pair`; `chosen_rewards` and `rejected_rewards`, sums over the answers' tokens; `margins`."""
        import numpy as np

        pairs, index = np.unique(self["pair"], return_inverse=True)
        rewards = self["implicit_rewards"].astype(np.float64)
        chosen = self["side"] == SIDES[0]
        sums = [np.bincount(index, np.where(side, rewards, 0.0), len(pairs)) for side in (chosen, ~chosen)]
        return {"pair": pairs, "chosen_rewards": sums[0], "rejected_rewards": sums[1], "margins": sums[0] - sums[1]}

    def tokens(self, pair: int, side: str) -> list[Token]:
        """The tokens of one answer as reports and heat maps take them; needs both log-probs and the rewards."""
        rows = self.select(pair, side)
        entropies = rows.columns.get("entropy")
        return [
            Token(
                text if text else f"⟨{token_id}⟩",
                float(reward),
                float(logp),
                float(reference),
                None if entropies is None else float(entropies[i]),
                special=int(token_id) in self.special,
            )
            for i, (text, token_id, reward, logp, reference) in enumerate(
                zip(
                    rows["token"],
                    rows["token_id"],
                    rows["implicit_rewards"],
                    rows["logps"],
                    rows["reference_logps"],
                    strict=True,
                )
            )
        ]

    def scored_pair(self, pair: int, note: str = "") -> ScoredPair:
        """One pair as `qkernels.report.heat_map` takes it."""
        return ScoredPair(self.prompts.get(pair, ()), self.tokens(pair, SIDES[0]), self.tokens(pair, SIDES[1]), note)

    def heat_map(self, pair: int, side: str | None = None, *, scale: float | None = None) -> HeatMap:
        """The tokens of a pair, or of one of its answers, coloured by their rewards.

        Args:
            pair: its number.
            side: "chosen" or "rejected"; both by default.
            scale: the |reward| of the full colour; from the tokens shown by default.
        """
        sides = SIDES if side is None else (side,)
        return HeatMap({name: self.tokens(pair, name) for name in sides}, self.prompts.get(pair, ()), scale=scale)

    def lowest_spans(self, limit: int | None = 20, *, per_answer: int = 3) -> list[FoundSpan]:
        """The least rewarded spans (`qkernels.credit.low_reward_spans`) of all answers, lowest first.

        Args:
            limit: at most so many; None for all.
            per_answer: at most so many of one answer, so that a single bad one does not fill the list.
        """
        import numpy as np

        keys = 2 * self["pair"] + (self["side"] != SIDES[0])
        starts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(self)] if len(self) else [0]
        found = []
        for first, last in itertools.pairwise(starts):
            texts = self["token"][first:last]
            for span in low_reward_spans(self["implicit_rewards"][first:last].tolist(), limit=per_answer):
                before = "".join(texts[max(0, span.start - _CONTEXT) : span.start])
                after = "".join(texts[span.end : span.end + _CONTEXT])
                found.append(
                    FoundSpan(
                        int(self["pair"][first]),
                        str(self["side"][first]),
                        span,
                        _end(before),
                        "".join(texts[span.start : span.end]),
                        _end(after[::-1])[::-1],
                    )
                )
        found.sort(key=lambda one: -math.inf if math.isnan(one.span.reward) else one.span.reward)
        return found[:limit]

    def tokens_in(self, pair: int, side: str, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """For each token of an answer, whether it overlaps one of the character spans `[start, end)` of its text.

        What `qkernels.credit.detection` takes as planted errors.
        """
        rows = self.select(pair, side)
        return overlapping(list(zip(rows["start"].tolist(), rows["end"].tolist(), strict=True)), spans)

    # --- other forms ------------------------------------------------------------------------------------------------

    def to_arrow(self) -> Any:
        """A `pyarrow.Table`; sides as a dictionary column."""
        import pyarrow as pa

        columns = {
            name: pa.array(column, pa.string()).dictionary_encode() if name == "side" else pa.array(column)
            for name, column in self.columns.items()
        }
        return pa.table(columns)

    @staticmethod
    def from_arrow(table: Any, **more: Any) -> TokenTable:
        """From a `pyarrow.Table` with these columns; `more` as in the constructor."""
        import numpy as np

        columns = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if name in ("side", "token"):
                columns[name] = np.array(column.to_pylist(), dtype=object)
            else:
                columns[name] = column.to_numpy(zero_copy_only=False)
        return TokenTable(columns, **more)

    def write_parquet(self, path: Any) -> None:
        """Write one Parquet file."""
        import pyarrow.parquet as pq

        pq.write_table(self.to_arrow(), path)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`."""
        import pandas as pd

        return pd.DataFrame(self.columns)

    @staticmethod
    def concat(tables: Sequence[TokenTable]) -> TokenTable:
        """The rows of several tables with the same columns, sorted; of a row that is there twice, the first."""
        import numpy as np

        prompts = {pair: prompt for table in tables for pair, prompt in table.prompts.items()}
        names = list(tables[0].columns)
        joined = {name: np.concatenate([table[name] for table in tables]) for name in names}
        table = TokenTable(joined, prompts, tables[0].special).sorted()
        if not len(table):
            return table
        same = [table[name][1:] == table[name][:-1] for name in ("pair", "side", "position")]
        return table._taken(np.concatenate([[True], ~np.logical_and.reduce(same)]))

    @staticmethod
    def of_answers(
        answers: Iterable[tuple[int, str, EncodedAnswer, Mapping[str, np.ndarray]]], **more: Any
    ) -> TokenTable:
        """From (pair, side, tokens, results) of each answer, in order; `more` as in the constructor."""
        import numpy as np

        answers = list(answers)
        counts = [len(encoded.ids) for _, _, encoded, _ in answers]

        def per_token(values: Iterator[Any], dtype: Any) -> np.ndarray:
            return np.fromiter(values, dtype, sum(counts))

        columns = {
            "pair": np.repeat(np.array([pair for pair, _, _, _ in answers], np.int64), counts),
            "side": np.repeat(np.array([side for _, side, _, _ in answers], object), counts),
            "position": per_token((i for count in counts for i in range(count)), np.int32),
            "token_id": per_token((i for _, _, encoded, _ in answers for i in encoded.ids), np.int32),
            "token": per_token((text for _, _, encoded, _ in answers for text in encoded.texts), object),
            "start": per_token((a for _, _, encoded, _ in answers for a, _ in encoded.offsets), np.int32),
            "end": per_token((b for _, _, encoded, _ in answers for _, b in encoded.offsets), np.int32),
        }
        for name in answers[0][3] if answers else ():
            columns[name] = np.concatenate([scores[name] for _, _, _, scores in answers])
        return TokenTable(columns, **more)


def _end(text: str) -> str:
    """The last characters of a text, from a word's beginning on, and a mark if there is more before them."""
    if len(text) <= _CONTEXT:
        return text
    space = text.find(" ", len(text) - _CONTEXT)
    return "…" + text[space if space >= 0 else -_CONTEXT :]


def prompt_of(pair: Preference) -> list[tuple[str, str]]:
    """A pair's prompt as tables keep it."""
    return [(message.role, message.content) for message in pair.prompt]
