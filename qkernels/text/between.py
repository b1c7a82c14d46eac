"""Sequences in which tokens that are not scored stand between those that are: answers of several turns."""

from __future__ import annotations

from collections.abc import Sequence

# Groups of tokens that are read and not scored: (number of the scored token that follows, token ids), ascending.
Between = tuple[tuple[int, tuple[int, ...]], ...]


def interleaved(ids: Sequence[int], between: Between) -> tuple[list[int], list[bool]]:
    """All tokens of an answer in order, and which of them are scored.

    Args:
        ids: the scored tokens.
        between: what stands before some of them.
    """
    tokens: list[int] = []
    scored: list[bool] = []
    start = 0
    for position, group in between:
        tokens += [*ids[start:position], *group]
        scored += [True] * (position - start) + [False] * len(group)
        start = position
    tokens += ids[start:]
    return tokens, scored + [True] * (len(ids) - start)


def separated(tokens: Sequence[int], scored: Sequence[bool]) -> tuple[list[int], Between]:
    """The inverse of `interleaved`; tokens after the last scored one, which nothing depends on, are left out."""
    ids: list[int] = []
    groups: list[tuple[int, tuple[int, ...]]] = []
    waiting: list[int] = []
    for token, is_scored in zip(tokens, scored, strict=True):
        if not is_scored:
            waiting.append(token)
            continue
        if waiting:
            groups.append((len(ids), tuple(waiting)))
            waiting = []
        ids.append(token)
    return ids, tuple(groups)


def first(ids: Sequence[int], between: Between, room: int) -> tuple[int, Between]:
    """How many scored tokens are among the first `room` of an answer, and what stands between those.

    Args:
        ids: the scored tokens.
        between: what stands before some of them.
        room: tokens of either kind that are kept.
    """
    _, scored = interleaved(ids, between)
    kept = sum(scored[: max(0, room)])
    return kept, tuple(group for group in between if group[0] < kept)
