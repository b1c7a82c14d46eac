"""Credit assignment: spans of low reward against their definition, and the figures of merit on cases worked by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkernels import credit
from qkernels.credit import Span, auroc, detection, hit_at_k, least_rewarded, low_reward_spans, second_error_recall

T, F = True, False

# ------------------------------------------------------------------------------------------------------- spans, ranking


def test_a_wrong_name_is_one_span_and_two_errors_are_two() -> None:
    rewards = [0.02, -0.01, -0.6, 0.05, -0.4, 0.01, 0.03, 0.0, 0.02, -0.01, -0.3, 0.0]
    #            Its   cap.   Os    l     o     and   one   more  far   away  wrong .
    first, second = low_reward_spans(rewards)
    assert first == (2, 5, pytest.approx(-0.95)) and second == (10, 11, pytest.approx(-0.3))
    # With a cost between them above what the lesser is worth, the halves of the name are spans of their own.
    apart = low_reward_spans([0.0, -0.6, 0.5, -0.4, 0.0], threshold=-0.1)
    assert apart == [(1, 2, -0.6), (3, 4, -0.4)]
    assert low_reward_spans([0.0, -0.6, 0.15, -0.4, 0.0], threshold=-0.1) == [(1, 4, pytest.approx(-0.85))]


def test_the_threshold_is_a_quarter_of_the_way_from_the_median_to_the_lowest_and_not_above_0() -> None:
    assert credit.default_threshold([1.0, 0.0, -1.0, -0.5, -4.0]) == pytest.approx(-1.375)
    assert credit.default_threshold([3.0, 4.0]) == 0.0
    assert credit.default_threshold([0.0, -4.0, math.nan, -math.inf]) == pytest.approx(-2.5)
    assert credit.default_threshold([]) == 0.0
    assert low_reward_spans([0.0] * 5) == low_reward_spans([]) == []  # a policy that is its reference


def segments_by_definition(worths: list[float]) -> set[tuple[int, int]]:
    """Ruzzo and Tompa's definition: the segment of the largest sum, then the same on what lies left and right of it.

    Of equal sums the one that contains no other; sums here are of small integers, hence exact.
    """

    def search(low: int, high: int) -> set[tuple[int, int]]:
        best = max(
            ((sum(worths[a:b]), -(b - a), -a) for a, b in itertools.combinations(range(low, high + 1), 2)),
            default=(0, 0, 0),
        )
        if best[0] <= 0:
            return set()
        start, end = -best[2], -best[2] - best[1]
        return {(start, end)} | search(low, start) | search(end, high)

    return search(0, len(worths))


@given(st.lists(st.integers(-4, 4), max_size=14))
def test_spans_are_the_maximal_scoring_segments(worths: list[int]) -> None:
    spans = low_reward_spans([-w for w in worths], threshold=0.0)
    found = {(span.start, span.end) for span in spans}
    wanted = segments_by_definition(worths)
    if len({sum(worths[a:b]) for a, b in wanted}) == len(wanted):  # a tie leaves the definition a choice
        assert found == wanted
    assert [span.reward for span in spans] == sorted(span.reward for span in spans)
    for a, b, reward in spans:
        assert reward == -sum(worths[a:b])
        assert all(sum(worths[a:i]) > 0 and sum(worths[i - 1 : b]) > 0 for i in range(a + 1, b + 1))
    for one, two in itertools.pairwise(sorted(found)):
        assert one[1] <= two[0]


def test_rewards_that_are_no_numbers() -> None:
    assert low_reward_spans([-1.0, math.nan, -1.0], threshold=0.0) == [(0, 1, -1.0), (2, 3, -1.0)]
    assert low_reward_spans([0.1, -math.inf, 0.1, -0.5], threshold=-0.1)[0] == (1, 4, -math.inf)
    assert low_reward_spans([-0.5, math.inf, -0.5], threshold=-0.1) == [(0, 1, -0.5), (2, 3, -0.5)]
    assert low_reward_spans([math.nan, math.nan]) == []
    assert least_rewarded([0.5, math.nan, -1.0, -math.inf, -1.0]) == [3, 2, 4, 0]


def test_limits_and_bad_arguments() -> None:
    rewards = [-1.0, 4.0, -2.0, 4.0, -3.0]
    assert low_reward_spans(rewards, threshold=0.0, limit=2) == [Span(4, 5, -3.0), Span(2, 3, -2.0)]
    assert least_rewarded(rewards, 2) == [4, 2]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold must be finite"):
            low_reward_spans(rewards, threshold=bad)
    for limited in (low_reward_spans, least_rewarded):
        with pytest.raises(ValueError, match="limit must be 0 or more, got -1"):
            limited(rewards, limit=-1)
        with pytest.raises(TypeError, match="limit must be an int, got float"):
            limited(rewards, limit=1.0)


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_auroc() -> None:
    assert auroc([3, 1, 2], [T, F, F]) == 1.0
    assert auroc([1, 1, 2], [T, F, F]) == 0.25
    assert auroc([5, 4, 3, 2], [T, F, T, F]) == 0.75
    assert auroc([0.0] * 4, [T, F, F, F]) == 0.5
    for scores, flags in (([1.0], [T]), ([1.0, 2.0], [F, F])):
        with pytest.raises(ValueError, match="both kinds"):
            auroc(scores, flags)
    with pytest.raises(ValueError, match="NaN at token 1"):
        auroc([1.0, math.nan], [T, F])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_share_of_pairs_in_the_right_order(tokens: list[tuple[int, bool]]) -> None:
    positive = [s for s, p in tokens if p]
    negative = [s for s, p in tokens if not p]
    if positive and negative:
        share = sum((a > b) + 0.5 * (a == b) for a in positive for b in negative) / (len(positive) * len(negative))
        assert auroc(*zip(*tokens, strict=True)) == pytest.approx(share)


def test_hit_at_k() -> None:
    scores, flags = [5, 4, 3, 2], [F, F, T, F]
    assert [hit_at_k(scores, flags, k) for k in (1, 2, 3, 4, 9)] == [0, 0, 1, 1, 1]
    assert hit_at_k([1, 1, 1, 1], flags, 1) == 0.25
    assert hit_at_k([9, 1, 1, 1], flags, 2) == pytest.approx(1 / 3)
    assert hit_at_k([1.0], [F], 3) == 0.0
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        hit_at_k(scores, flags, 0)
    with pytest.raises(ValueError, match="NaN at token 0"):
        hit_at_k([math.nan, 1.0], [F, T])


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 4))
def test_ties_count_as_their_average_over_all_orders(tokens: list[tuple[int, bool]], k: int) -> None:
    hits = [
        any(p for _, p in sorted(order, key=lambda token: -token[0])[:k]) for order in itertools.permutations(tokens)
    ]
    assert hit_at_k(*zip(*tokens, strict=True), k) == pytest.approx(sum(hits) / len(hits))


def test_second_error_recall() -> None:
    flags = [F, T, T, F, T, F]
    assert second_error_recall([0, 9, 8, 2, 3, 1], flags) == 1.0
    assert second_error_recall([0, 9, 8, 3, 2, 1], flags) == 0.0
    assert second_error_recall([0, 9, 8, 3, 2, 1], flags, k=2) == 1.0
    # Everything after the first error suspected alike: the second is found by chance alone.
    assert second_error_recall([0, 1, 1, 1, 1, 1], flags) == pytest.approx(1 / 3)
    assert second_error_recall([1, 2, 3], [F, T, T]) is None  # one error of two tokens
    assert second_error_recall([1, 2, 3], [F, F, F]) is None
    assert credit.error_spans(flags) == [(1, 3), (4, 5)] and credit.error_spans([T]) == [(0, 1)]


def test_detection() -> None:
    found = detection(
        [[3, 1, 2, 0], [1, 5, 2, 4], [9, 9], [9, 8], [1, 5, 2, 4, 3]],
        [[T, F, F, F], [T, F, F, F], [F, F], [T, T], [F, T, F, T, F]],
    )
    assert found is not None
    assert found.auroc == pytest.approx((1 + 0 + 1) / 3)
    assert found.hit_at_1 == pytest.approx(2 / 3) and found.hit_at_3 == pytest.approx(2 / 3)
    assert found.second_error_recall == 1.0 and (found.answers, found.answers_with_two) == (3, 1)
    assert detection([[1.0]], [[False]]) is None
    with pytest.raises(ValueError, match=r"shorter|longer"):
        detection([[1.0, 2.0]], [[True, False, False]])


def test_random_scores_are_at_chance() -> None:
    rng = random.Random(0)
    flags = [[i in (3, 9) for i in range(12)] for _ in range(4000)]
    found = detection([[rng.random() for _ in answer] for answer in flags], flags)
    chance = detection([[0.0] * 12 for _ in flags], flags)
    assert chance is not None and found is not None
    assert (chance.auroc, chance.hit_at_1, chance.second_error_recall) == (
        0.5,
        pytest.approx(1 / 6),
        pytest.approx(1 / 11),
    )
    for name in ("auroc", "hit_at_1", "hit_at_3", "second_error_recall"):
        assert getattr(found, name) == pytest.approx(getattr(chance, name), abs=0.02)


def test_ranked_right_and_mean() -> None:
    assert credit.ranked_right([(1, 0), (0, 1), (2, 2), (3, 1)]) == 0.625
    assert credit.mean([1, 2, 6]) == 3
