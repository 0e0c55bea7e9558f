"""Pareto fronts as pure functions on arrays: dominance, hypervolume and the knee.

`values` is always a float array of shape (points, objectives). `maximise` says for each objective
whether larger is better; it has no default, because a forgotten sign gives a plausible wrong front.
A point with a NaN is unknown: it is on no front, dominates nothing and adds no hypervolume.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

# Distances of normalised fronts (0 to 1) that differ by less are the same.
_SAME = 1e-9


def non_dominated(values: ArrayLike, *, maximise: Sequence[bool]) -> NDArray[np.bool_]:
    """Mask of the Pareto front.

    Args:
        values: shape (points, objectives).
        maximise: shape (objectives,).

    Returns:
        Shape (points,). Equal points are on the front together; a point with a NaN never is.

    Raises:
        ValueError: the shapes do not match.
    """
    cost = _as_costs(values, maximise)
    known = np.flatnonzero(~np.isnan(cost).any(axis=1))
    mask = np.zeros(len(cost), dtype=np.bool_)
    # moocore >= 0.1.10 is allowed, which crashes on one objective and on no point.
    if len(known) and cost.shape[1] == 1:
        mask[known] = cost[known, 0] == cost[known, 0].min()
    elif len(known):
        mask[known] = moocore.is_nondominated(cost[known], keep_weakly=True)
    return mask


def hypervolume(values: ArrayLike, reference: ArrayLike, *, maximise: Sequence[bool]) -> float:
    """Volume between the front and a reference point, in the product of the objectives' units.

    Args:
        values: shape (points, objectives); points that hold a NaN or an infinity add nothing, nor
            do points that are not better than the reference in every objective.
        reference: shape (objectives,), finite; the worst corner.
        maximise: shape (objectives,).

    Raises:
        ValueError: the shapes do not match, or the reference is not finite.
    """
    cost = _as_costs(values, maximise)
    corner = _as_costs(np.atleast_2d(np.asarray(reference, dtype=np.float64)), maximise)[0]
    if not np.isfinite(corner).all():
        raise ValueError(f"the reference must be finite, not {reference!r}")
    inside = cost[np.isfinite(cost).all(axis=1) & (cost < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    if cost.shape[1] == 1:
        return float(corner[0] - inside.min())
    return float(moocore.hypervolume(inside, ref=corner))


def surely_dominated(
    low: ArrayLike, high: ArrayLike, *, maximise: Sequence[bool]
) -> NDArray[np.bool_]:
    """Mask of the points that are dominated wherever in their intervals the true values lie.

    Point a dominates b beyond doubt if a's worst is no worse than b's best in every objective, and
    better in at least one. An objective that is known exactly has `low == high`.

    Args:
        low: lower ends, shape (points, objectives).
        high: upper ends, same shape.
        maximise: shape (objectives,).

    Returns:
        Shape (points,). A point with a NaN neither dominates nor is known to be dominated, so it
        is False here: mask it out with `non_dominated` or `isnan`.

    Raises:
        ValueError: the shapes do not match, or an interval is upside down.
    """
    best, worst = _best_and_worst(low, high, maximise)
    return np.asarray(_dominance(worst, best).any(axis=0), dtype=np.bool_)


def undecided_pairs(
    low: ArrayLike, high: ArrayLike, *, maximise: Sequence[bool]
) -> NDArray[np.intp]:
    """Pairs of points whose order, and with it the front, depends on where the true values lie.

    One of the two dominates the other for some true values within the intervals and not for
    others, and none of them is dominated beyond doubt by any point.

    Args:
        low: lower ends, shape (points, objectives).
        high: upper ends, same shape.
        maximise: shape (objectives,).

    Returns:
        Indices, shape (pairs, 2), the smaller one first, in ascending order; no point with a NaN.

    Raises:
        ValueError: the shapes do not match, or an interval is upside down.
    """
    best, worst = _best_and_worst(low, high, maximise)
    alive: NDArray[np.bool_] = np.logical_not(_dominance(worst, best).any(axis=0))
    # The values of two points are independent: each may be at its best while the other is not.
    possible = _dominance(best, worst) & alive[:, None] & alive[None, :]
    return np.argwhere(np.triu(possible | possible.T, k=1))


def knee(values: ArrayLike, *, maximise: Sequence[bool]) -> int:
    """Index of the front's knee: the point that bulges farthest towards the ideal.

    The front is scaled to [0, 1] between its ideal and its nadir; the knee has the largest signed
    distance from the hyperplane through the best point of each objective (the chord, for two).
    Source: I. Das, "On characterizing the 'knee' of the Pareto curve", Structural Optimization 18,
    1999; why a user wants it: J. Branke et al., "Finding knees in multi-objective optimization",
    PPSN 2004.

    An objective that is equal along the front is left out. Where no point bulges (two points, a
    straight or hollow front), the one nearest to the ideal is taken, then the one that is best in
    the first objective, the second, and so on. The result does not depend on the points' order,
    save that of equal points the first is taken.

    Args:
        values: shape (points, objectives); points with a NaN or an infinity are passed over.
        maximise: shape (objectives,).

    Raises:
        ValueError: no point is finite, or the shapes do not match.
    """
    cost = _as_costs(values, maximise)
    cost[~np.isfinite(cost).all(axis=1)] = np.nan
    front = np.flatnonzero(non_dominated(cost, maximise=[False] * cost.shape[1]))
    if not len(front):
        raise ValueError("a knee needs at least one point with finite values")
    points = cost[front]
    ideal = points.min(axis=0)
    # Halved, so that the span of two huge values of opposite sign does not overflow.
    span = points.max(axis=0) / 2 - ideal / 2
    varying = span > 0
    if not varying.any():
        return int(front[0])
    scaled = (points[:, varying] / 2 - ideal[varying] / 2) / span[varying]
    distance = _distance_to_plane(scaled)
    radius = np.linalg.norm(scaled, axis=1)
    near = np.flatnonzero(distance >= distance.max() - _SAME)
    near = near[radius[near] <= radius[near].min() + _SAME]
    order = np.lexsort(points[near].T[::-1])
    return int(front[near[order[0]]])


def _best_and_worst(
    low: ArrayLike, high: ArrayLike, maximise: Sequence[bool]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The intervals' ends as costs, each of shape (points, objectives)."""
    first, second = _as_costs(low, maximise), _as_costs(high, maximise)
    if first.shape != second.shape:
        raise ValueError(f"low has shape {first.shape}, high has {second.shape}")
    if (np.asarray(low, dtype=np.float64) > np.asarray(high, dtype=np.float64)).any():
        raise ValueError("an interval's low end is above its high end")
    return np.minimum(first, second), np.maximum(first, second)


def _dominance(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether `first[i]` dominates `second[j]`, at [i, j]; a NaN on either side never does."""
    no_worse = np.ones((len(first), len(second)), np.bool_)
    better = np.zeros_like(no_worse)
    for mine, other in zip(first.T, second.T, strict=True):
        no_worse &= mine[:, None] <= other[None, :]
        better |= mine[:, None] < other[None, :]
    return no_worse & better


def _distance_to_plane(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed distance of each point, towards the ideal at 0, from the plane of the best points."""
    objectives = scaled.shape[1]
    best = [np.lexsort((scaled.sum(axis=1), scaled[:, k]))[0] for k in range(objectives)]
    normal: NDArray[np.float64] = np.ones(objectives)
    if objectives > 2 and np.linalg.matrix_rank(scaled[best]) == objectives:
        solved = np.linalg.solve(scaled[best], np.ones(objectives))
        # A plane that leans away from an axis would call a worse point closer to the ideal.
        if (solved > 0).all():
            normal = np.asarray(solved, dtype=np.float64)
    return np.asarray((1.0 - scaled @ normal) / np.linalg.norm(normal), dtype=np.float64)


def _as_costs(values: ArrayLike, maximise: Sequence[bool]) -> NDArray[np.float64]:
    """A copy of the values with every objective minimised, shape (points, objectives)."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(maximise) or not len(maximise):
        raise ValueError(
            f"values must have shape (points, {len(maximise)}) for the {len(maximise)} objectives"
            f" of maximise, not {array.shape}"
        )
    cost: NDArray[np.float64] = array.copy()
    cost[:, np.asarray(maximise, dtype=np.bool_)] *= -1
    return cost
