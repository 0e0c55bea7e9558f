from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from autocompress.pareto import (
    hypervolume,
    knee,
    non_dominated,
    surely_dominated,
    undecided_pairs,
)

Array = NDArray[np.float64]
NAN = float("nan")


def grids(low: int = -20, high: int = 20) -> st.SearchStrategy[Array]:
    """Whole numbers, so that ties are frequent and monotone maps are exact."""
    shapes = st.tuples(st.integers(1, 12), st.integers(1, 4))
    return shapes.flatmap(
        lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(low, high).map(float))
    )


def signs(values: Array, data: st.DataObject) -> list[bool]:
    return data.draw(st.lists(st.booleans(), min_size=values.shape[1], max_size=values.shape[1]))


def brute_force(values: Array, maximise: list[bool]) -> list[bool]:
    cost = np.where(maximise, -values, values)
    return [not any((a <= b).all() and (a < b).any() for a in cost) for b in cost]


@settings(max_examples=100, deadline=None)
@given(grids(), st.data())
def test_front_is_what_the_definition_says(values: Array, data: st.DataObject) -> None:
    maximise = signs(values, data)
    assert non_dominated(values, maximise=maximise).tolist() == brute_force(values, maximise)


@settings(max_examples=60, deadline=None)
@given(grids(), st.data())
def test_front_ignores_order_and_monotone_maps(values: Array, data: st.DataObject) -> None:
    maximise = signs(values, data)
    mask = non_dominated(values, maximise=maximise)
    order = np.array(data.draw(st.permutations(range(len(values)))))
    assert (non_dominated(values[order], maximise=maximise) == mask[order]).all()
    assert (non_dominated(values**3 + 7, maximise=maximise) == mask).all()
    assert (non_dominated(-np.exp(values), maximise=[not m for m in maximise]) == mask).all()


@settings(max_examples=60, deadline=None)
@given(grids(), st.data())
def test_a_point_with_nan_changes_nothing(values: Array, data: st.DataObject) -> None:
    maximise = signs(values, data)
    unknown = np.full((1, values.shape[1]), -100.0 if not maximise[0] else 100.0)
    unknown[0, -1] = NAN
    more = np.vstack([unknown, values])
    mask = non_dominated(more, maximise=maximise)
    assert not mask[0]
    assert (mask[1:] == non_dominated(values, maximise=maximise)).all()
    assert not surely_dominated(more, more, maximise=maximise)[0]
    corner = np.where(maximise, -30.0, 30.0)
    assert hypervolume(more, corner, maximise=maximise) == pytest.approx(
        hypervolume(values, corner, maximise=maximise)
    )
    assert knee(more, maximise=maximise) == knee(values, maximise=maximise) + 1


@settings(max_examples=60, deadline=None)
@given(grids(), st.data())
def test_hypervolume_grows_with_points_and_with_better_ones(
    values: Array, data: st.DataObject
) -> None:
    maximise = signs(values, data)
    corner = np.where(maximise, -10.0, 10.0)
    whole = hypervolume(values, corner, maximise=maximise)
    assert hypervolume(values[1:], corner, maximise=maximise) <= whole * (1 + 1e-12)
    better = np.where(maximise, values + 1, values - 1)
    assert hypervolume(better, corner, maximise=maximise) >= whole * (1 - 1e-12)
    front = values[non_dominated(values, maximise=maximise)]
    assert hypervolume(front, corner, maximise=maximise) == pytest.approx(whole)


def test_hypervolume_by_hand() -> None:
    points = [[1, 3], [2, 2], [3, 1], [3, 3], [9, 0], [-np.inf, 0]]
    assert hypervolume(points, [4, 4], maximise=[False, False]) == 6
    assert hypervolume([[1], [2]], [4], maximise=[False]) == 3
    assert hypervolume([[0.9, 1.0]], [0.5, 2.0], maximise=[True, False]) == pytest.approx(0.4)
    assert hypervolume(np.empty((0, 2)), [4, 4], maximise=[False, False]) == 0


@settings(max_examples=100, deadline=None)
@given(grids(), st.data())
def test_surely_dominated_holds_wherever_the_truth_lies(values: Array, data: st.DataObject) -> None:
    maximise = signs(values, data)
    half = hnp.arrays(np.float64, values.shape, elements=st.sampled_from([0.0, 1.0, 4.0]))
    below, above = data.draw(half), data.draw(half)
    low, high = values - below, values + above
    sure = surely_dominated(low, high, maximise=maximise)
    where = data.draw(
        hnp.arrays(np.float64, values.shape, elements=st.sampled_from([0.0, 0.25, 1.0]))
    )
    truth = low + where * (high - low)
    assert not (sure & non_dominated(truth, maximise=maximise)).any()
    exact = surely_dominated(values, values, maximise=maximise)
    assert (exact == ~non_dominated(values, maximise=maximise)).all()
    assert (sure <= exact).all()


def test_overlapping_intervals_leave_doubt() -> None:
    low, high = [[0.90, 1.0], [0.90, 1.1], [0.90, 1.4]], [[0.90, 1.2], [0.90, 1.3], [0.90, 1.5]]
    assert surely_dominated(low, high, maximise=[True, False]).tolist() == [False, False, True]


@settings(max_examples=100, deadline=None)
@given(grids(), st.data())
def test_only_undecided_pairs_of_the_front_depend_on_where_the_truth_lies(
    values: Array, data: st.DataObject
) -> None:
    maximise = signs(values, data)
    half = hnp.arrays(np.float64, values.shape, elements=st.sampled_from([0.0, 1.0, 4.0]))
    low, high = values - data.draw(half), values + data.draw(half)
    sure = surely_dominated(low, high, maximise=maximise)
    pairs = {tuple(pair) for pair in undecided_pairs(low, high, maximise=maximise).tolist()}

    def order(first: Array, second: Array) -> tuple[bool, ...]:
        front = non_dominated(np.stack([first, second]), maximise=maximise)
        return tuple(front.tolist())

    best, worst = np.where(maximise, high, low), np.where(maximise, low, high)
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            # These two are the extremes of what the order of two points can be.
            depends = order(best[i], worst[j]) != order(worst[i], best[j])
            assert ((i, j) in pairs) == (depends and not sure[i] and not sure[j])


def test_points_with_nan_or_without_uncertainty_are_in_no_pair() -> None:
    low, high = [[0.9, 1.0], [0.9, NAN], [0.9, 1.1]], [[0.9, 1.2], [0.9, 1.3], [0.9, 1.3]]
    assert undecided_pairs(low, high, maximise=[True, False]).tolist() == [[0, 2]]
    assert undecided_pairs(low, low, maximise=[True, False]).shape == (0, 2)


@settings(max_examples=100, deadline=None)
@given(grids(), st.data())
def test_knee_is_on_the_front_whatever_the_order_and_scale(
    values: Array, data: st.DataObject
) -> None:
    maximise = signs(values, data)
    found = knee(values, maximise=maximise)
    assert non_dominated(values, maximise=maximise)[found]
    order = np.array(data.draw(st.permutations(range(len(values)))))
    again = order[knee(values[order], maximise=maximise)]
    assert (values[again] == values[found]).all()
    scaled = values * 4 - 3
    assert (scaled[knee(scaled, maximise=maximise)] == scaled[found]).all()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0.9, 1.0]], 0),
        ([[0.5, 1.0], [0.9, 4.0]], 1),
        ([[0.9, 1.0], [0.9, 1.0], [0.8, 2.0]], 0),
        ([[0.92, 8.0], [0.91, 3.0], [0.90, 1.2], [0.60, 1.0]], 2),
        ([[NAN, 0.1], [0.92, 8.0], [0.91, 2.0], [0.6, 1.0], [np.inf, 0.0]], 2),
        ([[1.0, 4.0], [0.2, 3.2], [0.0, 0.0]], 0),
        ([[-1e308, -1e308], [1e308, 1e308], [0.9e308, -0.9e308]], 2),
    ],
    ids=["one", "two", "twins", "bend", "unknown", "hollow", "huge"],
)
def test_knee_by_hand(points: list[list[float]], expected: int) -> None:
    assert knee(points, maximise=[True, False]) == expected


def test_knee_of_three_objectives() -> None:
    points = [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0.2, 0.2, 0.2], [0.1, 0.9, 0.5]]
    assert knee(points, maximise=[False, False, False]) == 3


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        non_dominated([[1, 2]], maximise=[False])
    with pytest.raises(ValueError, match="shape"):
        hypervolume([[1, 2]], [1], maximise=[False, True])
    with pytest.raises(ValueError, match="finite"):
        hypervolume([[1, 2]], [1, NAN], maximise=[False, True])
    with pytest.raises(ValueError, match="above"):
        surely_dominated([[1, 2]], [[0, 2]], maximise=[False, True])
    with pytest.raises(ValueError, match="shape"):
        surely_dominated([[1, 2]], [[1, 2], [3, 4]], maximise=[False, True])
    with pytest.raises(ValueError, match="finite"):
        knee([[NAN, 1]], maximise=[False, True])
    assert not len(non_dominated(np.empty((0, 2)), maximise=[False, True]))
