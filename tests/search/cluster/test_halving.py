"""Asynchronous halving, without Tune: who goes on, whatever the order of the results."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from autocompress.search.cluster.halving import Rungs

ROUNDS = 3


class Result:
    def __init__(self, value: float) -> None:
        self.value = value


def upper_half(results: Sequence[Result]) -> list[Result]:
    ordered = sorted(results, key=lambda r: -r.value)
    return ordered[: (len(ordered) + 1) // 2]


def test_the_first_goes_on_and_a_worse_one_waits() -> None:
    rungs: Rungs[Result] = Rungs(ROUNDS, upper_half)
    assert rungs.finish("a", 0, Result(1.0))
    assert not rungs.finish("b", 0, Result(0.5))
    assert rungs.finish("c", 0, Result(2.0))
    # Of four the better two go on: "b" is now one of three that lost.
    assert not rungs.goes_on("b")


def test_who_waits_goes_on_once_worse_ones_have_come() -> None:
    rungs: Rungs[Result] = Rungs(ROUNDS, upper_half)
    rungs.finish("a", 0, Result(3.0))
    assert not rungs.finish("b", 0, Result(2.0))
    rungs.finish("c", 0, Result(1.0))
    assert rungs.goes_on("b")


def test_after_the_last_round_nobody_goes_on() -> None:
    rungs: Rungs[Result] = Rungs(2, upper_half)
    rungs.finish("a", 0, Result(1.0))
    assert not rungs.ended("a")
    assert not rungs.finish("a", 1, Result(1.0))
    assert rungs.ended("a") and not rungs.goes_on("a")


@given(st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=24, unique=True))
def test_the_better_half_of_all_has_gone_on_in_the_end(values: list[float]) -> None:
    """Promoting whoever may go on, in any order of arrival, leaves out nobody of the upper half."""
    rungs: Rungs[Result] = Rungs(ROUNDS, upper_half)
    rounds_of = dict.fromkeys(map(str, range(len(values))), 0)
    for name, value in zip(rounds_of, values, strict=True):
        rungs.finish(name, 0, Result(value))
        rounds_of[name] = 1
    while True:
        able = [n for n, done in rounds_of.items() if done < ROUNDS and rungs.goes_on(n)]
        if not able:
            break
        name = able[0]
        rungs.finish(name, rounds_of[name], Result(values[int(name)]))
        rounds_of[name] += 1
    order = sorted(rounds_of, key=lambda n: -values[int(n)])
    best = order[: (len(order) + 1) // 2]
    assert all(rounds_of[name] >= 2 for name in best)
    assert rounds_of[order[0]] == ROUNDS
    # The lower half was not trained for nothing.
    assert all(rounds_of[name] == 1 for name in order[(len(order) + 1) // 2 :])
