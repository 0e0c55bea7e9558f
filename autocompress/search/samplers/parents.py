"""Which members of the front have offspring."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.search.samplers.archive import Members, Values
from autocompress.search.samplers.moves import Levels

_FEASIBLE = 0.9
_NEAREST = 4


def crowding_distance(costs: Values) -> Values:
    """How far apart a point's neighbours on the front are, summed over objectives as shares.

    Source: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
    Transactions on Evolutionary Computation 6, 2002, section III.B.

    Args:
        costs: shape (points, objectives); an infinity counts as the largest finite figure.

    Returns:
        Shape (points,); infinite for the best and the worst in an objective that varies.
    """
    scaled = _scaled(costs)
    distance: Values = np.zeros(len(costs))
    for column in scaled.T[np.ptp(scaled, axis=0) > 0]:
        order = np.argsort(column, kind="stable")
        distance[order[1:-1]] += column[order[2:]] - column[order[:-2]]
        distance[order[[0, -1]]] = np.inf
    return distance


@final
class Parents:
    """A front to draw from: sparsely covered regions are preferred, and feasible members.

    Members with the same figures count as one, or else plans that make no difference would have
    most of the offspring.
    """

    def __init__(self, front: Members) -> None:
        self.front = front
        points = np.column_stack([front.costs, front.violations])
        distinct, group = np.unique(points, axis=0, return_inverse=True)
        self._group: NDArray[np.int64] = group.reshape(-1)
        self._violations: Values = distinct[:, -1]
        self._scaled = _scaled(distinct[:, :-1])
        self._feasible = np.flatnonzero(self._violations <= 0)
        self._infeasible = np.flatnonzero(self._violations > 0)
        # Crowded by its like only: those beyond the limits don't crowd those within.
        self._distance: Values = np.zeros(len(distinct))
        if len(self._feasible):
            self._distance[self._feasible] = crowding_distance(distinct[self._feasible, :-1])

    def draw(self, rng: np.random.Generator) -> int:
        """Index of a member: the winner of a tournament of two points.

        Nine in ten are within the limits, if any are; of those beyond, the nearer one wins.
        """
        within = len(self._feasible) and (not len(self._infeasible) or rng.random() < _FEASIBLE)
        pool = self._feasible if within else self._infeasible
        merit = self._distance if within else -self._violations
        first, second = rng.choice(pool, size=2)
        return self._member(int(second if merit[second] > merit[first] else first), rng)

    def neighbour(self, member: int, rng: np.random.Generator) -> int | None:
        """Another member, one of the four whose figures are nearest; None if there is none."""
        point = self._group[member]
        distances = np.linalg.norm(self._scaled - self._scaled[point], axis=1)
        distances[point] = np.inf
        if len(distances) < 2:
            return None
        nearest = np.argsort(distances, kind="stable")[: min(_NEAREST, len(distances) - 1)]
        return self._member(int(rng.choice(nearest)), rng)

    def levels(self, member: int) -> Levels:
        """A member's levels, shape (parameters,)."""
        levels: Levels = self.front.levels[member]
        return levels

    def _member(self, point: int, rng: np.random.Generator) -> int:
        return int(rng.choice(np.flatnonzero(self._group == point)))


def _scaled(costs: Values) -> Values:
    """Every objective as a share of its range, shape (points, objectives)."""
    scaled: Values = np.zeros_like(costs)
    for column, result in zip(costs.T, scaled.T, strict=True):
        finite = column[np.isfinite(column)]
        if len(finite) and np.ptp(finite) > 0:
            low, high = finite.min(), finite.max()
            result[:] = (np.clip(column, low, high) - low) / (high - low)
    return scaled
