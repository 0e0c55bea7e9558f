from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.search.judge import Interval, Judgement
from autocompress.search.promotion import FrontGain, Judged, Pool

OBJECTIVES = ("metric", "latency")
# Twentieths: the metric from 0.65 to 1 of an original of 0.8, latency as a share of the original's.
inside = st.tuples(st.integers(13, 20), st.integers(2, 20))


def evaluation(make_evaluation: Any, point: tuple[int, int]) -> Any:
    return make_evaluation(f"{point}", point[0] / 20, 20 / point[1])


@settings(max_examples=300, deadline=None)
@given(front=st.lists(inside, max_size=5), point=inside)
def test_a_gain_is_positive_exactly_for_points_that_add_to_the_front(
    make_evaluation: Any, front: list[tuple[int, int]], point: tuple[int, int]
) -> None:
    original = make_evaluation("original", 0.8, 1.0)
    gain = FrontGain([evaluation(make_evaluation, p) for p in front], original, OBJECTIVES)
    found = gain.of([point[0] / 20, point[1] / 20])
    dominated = any(metric >= point[0] and cost <= point[1] for metric, cost in front)
    if dominated:
        assert found <= 1e-12
    else:
        assert found > 1e-9


def test_gains_of_three_objectives(make_evaluation: Any) -> None:
    original = make_evaluation("original", 0.8, 1.0, file_bytes=1000)
    front = [make_evaluation("a", 0.8, 2.0, file_bytes=500)]
    gain = FrontGain(front, original, ("metric", "latency", "file_bytes"))
    assert gain.of([0.79, 0.5, 400]) > 0
    assert gain.of([0.79, 0.5, 500]) == 0
    assert gain.of([0.79, 0.6, 600]) < 0
    # Twice as fast and half as large are worth the same.
    assert gain.of([0.8, 0.25, 500]) == pytest.approx(gain.of([0.8, 0.5, 250]))


def test_a_gain_in_closed_form(make_evaluation: Any) -> None:
    """An empty front: the rectangle between the point and the worst corner."""
    original = make_evaluation("original", 0.8, 1.0)
    gain = FrontGain([], original, OBJECTIVES)
    lost = 1 - math.sqrt(0.05 / 0.2)
    assert gain.of([0.75, 0.5]) == pytest.approx(lost * math.log(1.05 / 0.5))
    better = 1 + math.sqrt(0.05 / 0.2)
    assert gain.of([0.85, 0.5]) == pytest.approx(better * math.log(1.05 / 0.5))
    assert gain.of([0.55, 0.5]) == 0
    assert gain.of([0.75, 1.1]) == 0
    # What is not known counts as the original's.
    assert gain.of([0.75, math.nan]) == gain.of([0.75, 1.0])
    assert gain.of_estimates({"metric": Interval(0.75, 0.7, 0.8)}) == gain.of([0.75, 1.0])


def test_gains_do_not_depend_on_the_unit_of_a_metric_that_is_zero(make_evaluation: Any) -> None:
    original = make_evaluation("original", 0.0, 1.0)
    gains = []
    for unit in (1.0, 1000.0):
        front = [make_evaluation("a", -0.1 * unit, 2.0), make_evaluation("b", -unit, 9.0)]
        gains.append(FrontGain(front, original, OBJECTIVES).of([-0.15 * unit, 0.2]))
    assert gains[0] == pytest.approx(gains[1]) and gains[0] > 0


def test_without_a_gain_it_is_the_additive_epsilon(make_evaluation: Any) -> None:
    original = make_evaluation("original", 0.8, 1.0)
    front = [make_evaluation("a", 0.8, 2.0), make_evaluation("b", 0.75, 4.0)]
    gain = FrontGain(front, original, OBJECTIVES)
    # Behind `a` by ln 1.2 in cost and by the root of its loss in the metric: the smaller counts.
    assert gain.of([0.79, 0.6]) == pytest.approx(-min(math.sqrt(0.01 / 0.2), math.log(1.2)))
    # Behind both: by how much it would have to fall to pass the farthest of them.
    assert gain.of([0.7, 0.6]) == pytest.approx(-(math.sqrt(0.1 / 0.2) - math.sqrt(0.05 / 0.2)))
    behind_a = math.log(0.55 / 0.5)
    behind_b = math.sqrt(0.06 / 0.2) - math.sqrt(0.05 / 0.2)
    assert gain.of([0.74, 0.55]) == pytest.approx(-max(behind_a, behind_b))
    assert gain.of([0.8, 0.5]) == pytest.approx(0)


def judged(number: int, metric: float, latency: float, spread: float = 0.0) -> Judged:
    proposal: Any = SimpleNamespace(candidate=f"plan-{number}", number=number)
    estimates = {
        "metric": Interval(metric, metric - spread, metric + spread),
        "latency": Interval(latency, latency - spread, latency + spread),
    }
    return Judged(proposal, Judgement(estimates, 0.0, 128, dominated=False))


def numbers(waiting: list[Judged]) -> list[int]:
    return [each.proposal.number for each in waiting]


def test_the_pool_gives_the_best_and_drops_the_least(make_evaluation: Any) -> None:
    original = make_evaluation("original", 0.8, 1.0)
    front = [make_evaluation("a", 0.8, 1.25)]
    gain = FrontGain(front, original, OBJECTIVES)
    pool = Pool(2)
    for number, latency in enumerate((0.7, 0.3, 0.6, 0.4, 0.5)):
        pool.add(judged(number, 0.79, latency))
    taken, gone = pool.take(gain, front, OBJECTIVES, anything=False)
    assert taken is not None
    assert taken.proposal.number == 1
    assert numbers(gone) == [2, 0]
    assert len(pool) == 2
    taken, gone = pool.take(gain, front, OBJECTIVES, anything=False)
    assert taken is not None
    assert (taken.proposal.number, gone) == (3, [])
    assert numbers(pool.clear()) == [4]
    assert len(pool) == 0
    assert pool.take(gain, front, OBJECTIVES, anything=True) == (None, [])


def test_what_is_dominated_by_now_leaves_the_pool(make_evaluation: Any) -> None:
    original = make_evaluation("original", 0.8, 1.0)
    measured = [make_evaluation("a", 0.8, 2.0)]
    gain = FrontGain(measured, original, OBJECTIVES)
    pool = Pool(5)
    pool.add(judged(0, 0.7, 0.6))
    # The same estimate, but it may turn out better than what was measured.
    pool.add(judged(1, 0.7, 0.6, spread=0.15))
    taken, gone = pool.take(gain, measured, OBJECTIVES, anything=False)
    assert taken is None
    assert numbers(gone) == [0]
    taken, gone = pool.take(gain, measured, OBJECTIVES, anything=True)
    assert taken is not None
    assert (taken.proposal.number, gone, len(pool)) == (1, [], 0)


def test_equal_gains_go_by_their_order(make_evaluation: Any) -> None:
    gain = FrontGain([], make_evaluation("original", 0.8, 1.0), OBJECTIVES)
    pool = Pool(5)
    for number in range(3):
        pool.add(judged(number, 0.79, 0.5))
    order = [pool.take(gain, [], OBJECTIVES, anything=False)[0] for _ in range(3)]
    assert numbers([each for each in order if each]) == [0, 1, 2]
