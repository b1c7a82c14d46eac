"""Credit assignment: which tokens and spans of an answer a score blames, and how well it finds known errors.

Plain Python on one number per token. A *score* is high where an error is suspected (minus the token reward, say); a
*reward* is low there.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Tokens `[start, end)` of an answer and the sum of their rewards."""

    start: int
    end: int
    reward: float


class Detection(NamedTuple):
    """How well a score finds errors whose places are known; means over the answers that have some.

    auroc: chance that a token of an error scores above another token of the same answer.
    hit_at_1, hit_at_3: share of the answers with a token of an error among the 1, 3 highest scores.
    second_error_recall: see the function of that name; None if no answer has two errors.
    answers, answers_with_two: how many answers stand behind these numbers.
    """

    auroc: float
    hit_at_1: float
    hit_at_3: float
    second_error_recall: float | None
    answers: int
    answers_with_two: int


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean of at least one number."""
    values = list(values)
    return sum(values) / len(values)


def ranked_right(scores: Iterable[tuple[float, float]]) -> float:
    """Share of (chosen, rejected) with the larger score on the chosen side; a tie is half right."""
    return mean(float(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in scores)


# ------------------------------------------------------------------------------------------------------------- ranking


def least_rewarded(rewards: Sequence[float], limit: int | None = None) -> list[int]:
    """Positions of the tokens by reward, lowest first; the earlier of equals first; NaN nowhere.

    Args:
        rewards: one per token.
        limit: at most so many; None for all.
    """
    order = sorted((i for i, reward in enumerate(rewards) if not math.isnan(reward)), key=lambda i: rewards[i])
    return order if limit is None else order[: _count(limit, "limit")]


def default_threshold(rewards: Sequence[float]) -> float:
    """A quarter of the way from the answer's median reward down to its lowest, and never above 0 (finite ones only)."""
    finite = [reward for reward in rewards if math.isfinite(reward)]
    if not finite:
        return 0.0
    middle = statistics.median(finite)
    return min(0.0, middle + (min(finite) - middle) / 4)


def low_reward_spans(
    rewards: Sequence[float], *, threshold: float | None = None, limit: int | None = None
) -> list[Span]:
    """The stretches of an answer with little reward, lowest sum first.

    A token counts as low if its reward is below the threshold, and what it is worth is its distance to the threshold,
    `threshold - reward`. Spans are the maximal scoring segments of these worths (Ruzzo and Tompa 1999): neighbouring
    low tokens form one span, and two of them are joined across higher ones between if what those cost is less than
    either side is worth. So a wrong name of three tokens is one span though its middle token was as expected, and two
    errors a sentence apart stay two. No span begins or ends with a token that is not low; none overlap.

    Args:
        rewards: one per token, such as `beta * (logp - reference_logp)`. A NaN belongs to no span; what lies on either
            side of it is not joined. An infinite one counts as beyond every other.
        threshold: rewards below it are low; `default_threshold(rewards)` by default.
        limit: at most so many spans; None for all.

    Returns:
        `Span`s by the sum of their rewards, the earlier of equals first.

    Raises:
        ValueError: a threshold that is not a finite number, a negative limit.
    """
    if threshold is None:
        threshold = default_threshold(rewards)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    # Infinite rewards stand in line as the largest finite step, so that sums stay numbers.
    largest = 1.0 + 2.0 * sum(abs(r - threshold) for r in rewards if math.isfinite(r))
    spans: list[Span] = []
    start = 0
    for stop in range(len(rewards) + 1):
        if stop < len(rewards) and not math.isnan(rewards[stop]):
            continue
        worths = [max(-largest, min(largest, threshold - reward)) for reward in rewards[start:stop]]
        for first, last in _maximal_segments(worths):
            inside = rewards[start + first : start + last]
            spans.append(Span(start + first, start + last, math.fsum(inside) if _finite(inside) else sum(inside)))
        start = stop + 1
    # inf - inf: a token that only the reference forbids beside one that only the policy does.
    spans.sort(key=lambda span: -math.inf if math.isnan(span.reward) else span.reward)
    return spans if limit is None else spans[: _count(limit, "limit")]


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _count(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return value


def _maximal_segments(worths: Sequence[float]) -> list[tuple[int, int]]:
    """All maximal scoring segments `[start, end)`, in order (Ruzzo and Tompa 1999, figure 1)."""
    # Each candidate: start, end, sum of everything before it, sum of everything up to its end.
    candidates: list[tuple[int, int, float, float]] = []
    total = 0.0
    for i, worth in enumerate(worths):
        before, total = total, total + worth
        if worth <= 0:
            continue
        start, left = i, before
        while True:
            j = len(candidates) - 1
            while j >= 0 and candidates[j][2] >= left:
                j -= 1
            if j < 0 or candidates[j][3] >= total:
                break
            # The j-th candidate, all after it and this one make one larger segment; try again with that.
            start, left = candidates[j][0], candidates[j][2]
            del candidates[j:]
        candidates.append((start, i + 1, left, total))
    return [(start, end) for start, end, _, _ in candidates]


# ---------------------------------------------------------------------------------------------------------- evaluation


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that a positive scores above a negative, ties counting half.

    Raises:
        ValueError: only one kind occurs, or a score is NaN.
    """
    positives = [s for s, p in zip(scores, positive, strict=True) if p]
    negatives = sorted(s for s, p in zip(scores, positive, strict=True) if not p)
    if not positives or not negatives:
        raise ValueError(f"auroc needs both kinds, got {len(positives)} positive and {len(negatives)} negative")
    _refuse_nan(scores)
    below = sum(bisect.bisect_left(negatives, s) + bisect.bisect_right(negatives, s) for s in positives)
    return below / (2 * len(positives) * len(negatives))


def hit_at_k(scores: Sequence[float], positive: Sequence[bool], k: int = 1) -> float:
    """Chance that at least one of the k highest scores is a positive; equal scores are ranked at random.

    1.0 or 0.0 unless a tie decides. Chance level of an answer: the same with constant scores.

    Raises:
        ValueError: k below 1, or a score is NaN.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    _refuse_nan(scores)
    pairs = list(zip(scores, positive, strict=True))
    if len(pairs) <= k:
        return float(any(positive))
    last = sorted(scores, reverse=True)[k - 1]
    if any(p for s, p in pairs if s > last):
        return 1.0
    tied = [p for s, p in pairs if s == last]
    places = k - sum(s > last for s in scores)
    return 1.0 - math.comb(len(tied) - sum(map(bool, tied)), places) / math.comb(len(tied), places)


def second_error_recall(scores: Sequence[float], planted: Sequence[bool], k: int = 1) -> float | None:
    """Whether the second error of an answer is still found after the first one.

    The tokens of the first error (in reading order) are taken out; the result is `hit_at_k` of the later errors' tokens
    among what is left. A score that only marks where an answer first goes wrong, or everything after that, fails here.

    Args:
        scores: one per token.
        planted: whether the token belongs to an error; neighbouring ones to the same.
        k: how many of the remaining tokens may be looked at.

    Returns:
        1.0 or 0.0 unless a tie decides; None if there are not two errors, or nothing but errors after the first.
    """
    errors = error_spans(planted)
    if len(errors) < 2:
        return None
    start, end = errors[0]
    rest = [*planted[:start], *planted[end:]]
    if all(rest):
        return None
    return hit_at_k([*scores[:start], *scores[end:]], rest, k)


def error_spans(planted: Sequence[bool]) -> list[tuple[int, int]]:
    """The runs `[start, end)` of tokens that belong to an error."""
    spans, start = [], None
    for i, flag in enumerate([*planted, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            spans.append((start, i))
            start = None
    return spans


def detection(scores: Sequence[Sequence[float]], planted: Sequence[Sequence[bool]]) -> Detection | None:
    """Measure a score, high where it suspects an error, against the tokens that are known to be wrong.

    Args:
        scores: per answer, per token.
        planted: the same shape; answers with nothing planted, or nothing else, are left out.

    Returns:
        None if no answer is left.

    Raises:
        ValueError: answers or tokens that do not match in number; a NaN among the scores.
    """
    usable = [(s, p) for s, p in zip(scores, planted, strict=True) if any(p) and not all(p)]
    if not usable:
        return None
    seconds = [found for s, p in usable if (found := second_error_recall(s, p)) is not None]
    return Detection(
        mean(auroc(s, p) for s, p in usable),
        mean(hit_at_k(s, p, 1) for s, p in usable),
        mean(hit_at_k(s, p, 3) for s, p in usable),
        mean(seconds) if seconds else None,
        len(usable),
        len(seconds),
    )


def _refuse_nan(scores: Sequence[float]) -> None:
    for i, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(f"scores must be numbers, got NaN at token {i}")
