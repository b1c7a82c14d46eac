"""Files of token ids with log-probs, as engines and trainers write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..records.pairs import DataError, found
from ..records.sources import Source
from ..records.tables import written

PROMPT = ("prompt_token_ids", "prompt_ids", "input_ids", "prompts")
TOKENS = ("token_ids", "completion_ids", "output_ids", "response_ids", "responses")
LOGPS = ("logprobs", "logps", "rollout_log_probs", "sampling_logps", "output_token_logprobs")


class Rollout(NamedTuple):
    """A generated sequence.

    prompt, tokens: token ids.
    logps: of each of `tokens`, nats, as many.
    place: where it stands, for messages.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    place: str


def read_rollouts(path: Path, limit: int | None = None) -> list[Rollout]:
    """The sequences of a file: JSON lines, JSON, Parquet, Arrow or CSV.

    A record has token ids of the prompt and of what was generated, and a log-prob of each generated token: a number,
    vLLM's `{token id: {"logprob": x}}`, or SGLang's `[x, token id, text]`. vLLM's `outputs` are looked into. A cell of
    a CSV file holds a list as JSON, or as pandas writes it.

    Raises:
        DataError: no such file, a record without these names, or whose lengths differ; the message says which record.
            No generated token in any of them.
    """
    rows: Iterator[tuple[str, Any]] = itertools.islice(Source(path).rows(), limit)
    rollouts = [_rollout(record, f"{path}, {place}") for place, record in rows]
    if not any(rollout.tokens for rollout in rollouts):
        raise DataError(f"{path}: there is no generated token in it")
    return rollouts


def same_tokens(one: list[Rollout], other: list[Rollout]) -> None:
    """DataError that names the first difference, unless both have the same tokens in the same order."""
    for n, (a, b) in enumerate(zip(one, other, strict=False), 1):
        for name, first, second in (("prompt", a.prompt, b.prompt), ("generated", a.tokens, b.tokens)):
            if first == second:
                continue
            where = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
            if where is None:
                what = f"{len(first)} {name} tokens against {len(second)}"
            else:
                what = f"{name} token {where + 1} is {first[where]} against {second[where]}"
            raise DataError(f"sequence {n} differs: {what} ({a.place}; {b.place})")
    if len(one) != len(other):
        longer = (one if len(one) > len(other) else other)[min(len(one), len(other))]
        raise DataError(f"{len(one)} sequences against {len(other)}; the first without a partner: {longer.place}")


def _rollout(record: Any, place: str) -> Rollout:
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: expected an object, got {type(record).__name__}")
    fields = dict(record)
    outputs = _listed(fields.get("outputs"))
    if isinstance(outputs, list) and len(outputs) == 1 and isinstance(outputs[0], Mapping):
        fields |= outputs[0]
    tokens = _ids(fields, TOKENS, place)
    logps = _values(fields, tokens, place)
    return Rollout(_ids(fields, PROMPT, place), tokens, logps, place)


def _field(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[str, Any]:
    for name in names:
        value = _listed(fields.get(name))
        if isinstance(value, list):
            return name, value
    others = [f"{found(fields[name])} in {name!r}" for name in names if fields.get(name) is not None]
    raise DataError(
        f"{place}: expected a list {' or '.join(map(repr, names))}; found {', '.join(others or fields) or 'nothing'}"
    )


def _listed(value: Any) -> Any:
    """A field's value; of a text, which all cells of a CSV file are, what it writes."""
    return written(value) if isinstance(value, str) else value


def _ids(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[int, ...]:
    name, values = _field(fields, names, place)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(f"{place}: {name!r} must hold token ids, entry {i + 1} is {value!r}")
    return tuple(values)


def _values(fields: Mapping[str, Any], tokens: tuple[int, ...], place: str) -> tuple[float, ...]:
    name, values = _field(fields, LOGPS, place)
    if len(values) != len(tokens):
        raise DataError(f"{place}: {len(values)} log-probs in {name!r} for {len(tokens)} generated tokens")
    logps = []
    for i, (value, token) in enumerate(zip(values, tokens, strict=True)):
        if isinstance(value, Mapping):  # vLLM: those of several tokens, by id
            value = value.get(str(token), value.get(token))
            value = value.get("logprob") if isinstance(value, Mapping) else value
        elif isinstance(value, list) and len(value) >= 2:  # SGLang
            if value[1] != token:
                raise DataError(f"{place}: {name!r} entry {i + 1} is of token {value[1]}, generated was {token}")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > 1e-3:
            raise DataError(f"{place}: {name!r} entry {i + 1} must be a log-prob (a number up to 0), got {value!r}")
        logps.append(min(float(value), 0.0))
    return tuple(logps)
