"""The least loss under one budget, by a price on the cost (a Lagrange multiplier)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.search.costs.factored import FactoredSum
from autocompress.search.seeding.elimination import Eliminator

_Array = NDArray[np.float64]
_ROUNDING = 1e-12  # relative; a gain below it is none
_MOST_STEPS = 100


@final
@dataclass(frozen=True)
class Solution:
    """A plan with its summed loss and cost.

    Attributes:
        indices: the value of every parameter that is in the loss or the cost.
        loss: in the loss's unit.
        cost: in the cost's unit.
        feasible: whether the cost is within the budget; if not, no plan's is.
    """

    indices: dict[str, int]
    loss: float
    cost: float
    feasible: bool


def minimise(terms: FactoredSum) -> dict[str, int]:
    """The values of the parameters at a sum's minimum; of equal plans always the same.

    Exact by variable elimination (Bertele and Brioschi, 1972), unless a table of more than 2^21
    entries would be needed: then local minima from two starts (see `Eliminator`).

    Raises:
        ConfigError: tables that contradict each other or are not finite.
    """
    eliminator = Eliminator((terms,))
    return eliminator.named(eliminator.minimise(eliminator.flat(terms)))


def sweep(loss: FactoredSum, cost: FactoredSum, budgets: Sequence[float]) -> list[Solution]:
    """For every budget the plan of the least loss that was found (see `Lagrangian.solve`).

    Raises:
        ConfigError: tables that contradict each other or are not finite.
    """
    lagrangian = Lagrangian(loss, cost)
    return [lagrangian.solve(budget) for budget in budgets]


def frontier(loss: FactoredSum, cost: FactoredSum, points: int) -> list[Solution]:
    """The distinct plans for `points` budgets from the cheapest plan's cost to the unchanged one's.

    The budgets are a geometric series, or an arithmetic one if the cheapest cost is not positive.

    Raises:
        ConfigError: tables that contradict each other or are not finite.
    """
    lagrangian = Lagrangian(loss, cost)
    least, most = lagrangian.cheapest.cost, cost.value({})
    space = np.geomspace if least > 0 else np.linspace
    # The ends are set, since the series may miss them by a rounding error.
    budgets = [least, *space(least, most, max(points, 2))[1:-1].tolist(), most]
    found: list[Solution] = []
    for budget in budgets:
        solution = lagrangian.solve(budget)
        if all(solution.indices != other.indices for other in found):
            found.append(solution)
    return found


@final
class Lagrangian:
    """Solves one loss and cost for any budgets; what it found for one budget serves the next.

    Args:
        loss: what is to be small.
        cost: what has a budget.
        like: solver for sums of the same parameters in the same factors, whose order of
            elimination is used again.
    """

    def __init__(
        self, loss: FactoredSum, cost: FactoredSum, like: Lagrangian | None = None
    ) -> None:
        self.loss = loss
        self.cost = cost
        self._eliminator: Eliminator = like._eliminator if like else Eliminator((loss, cost))
        self._moves: _Moves = like._moves if like else _Moves(self._eliminator)
        self._flat_loss = self._eliminator.flat(loss)
        self._flat_cost = self._eliminator.flat(cost)
        self._known: dict[float, Solution] = {}

    def reweighted(self, coefficients: Sequence[float]) -> Lagrangian:
        """The same with every loss factor times its coefficient; keeps what was worked out."""
        return Lagrangian(self.loss.scaled(coefficients, self.loss.constant), self.cost, self)

    @property
    def cheapest(self) -> Solution:
        """A plan of the least cost that there is."""
        return self._at_price(math.inf)

    def solve(self, budget: float) -> Solution:
        """The plan of the least loss with a cost within the budget, as far as prices find it.

        Every price on the cost gives a plan that is best for its own cost (Everett, 1963). The
        price is bisected along the convex hull of losses and costs: the chord of the best plans
        below and above the budget gives the next price, until no plan is below the chord. From
        both plans, changes of one parameter at a time use what is left of the budget. Optimal if
        the budget is the cost of a corner of the hull and the elimination is exact.

        Returns:
            The cheapest plan, not feasible, if its cost is above the budget.
        """
        low = self.cheapest
        if not low.cost <= budget:
            return replace(low, feasible=False)
        high = self._at_price(0.0)
        if high.cost <= budget:
            return self._filled(high, budget)
        for _ in range(_MOST_STEPS):
            price = (low.loss - high.loss) / (high.cost - low.cost)
            if price <= 0:
                break
            found = self._at_price(price)
            below = low.loss - found.loss + price * (low.cost - found.cost)
            if below <= _ROUNDING * (abs(low.loss) + price * abs(low.cost)):
                break
            low, high = (found, high) if found.cost <= budget else (low, found)
        repaired = self._cheapened(high, budget)
        plans = [self._filled(plan, budget) for plan in (low, repaired) if plan.cost <= budget]
        return min(plans, key=lambda plan: (plan.loss, plan.cost))

    def _at_price(self, price: float) -> Solution:
        if price not in self._known:
            free = math.isinf(price)
            weighted = self._flat_cost if free else self._flat_loss + price * self._flat_cost
            self._known[price] = self._solution(self._eliminator.minimise(weighted))
        return self._known[price]

    def _solution(self, values: Sequence[int]) -> Solution:
        indices = self._eliminator.named(values)
        return Solution(indices, self.loss.value(indices), self.cost.value(indices), True)

    def _filled(self, plan: Solution, budget: float) -> Solution:
        """Changes one parameter at a time, the largest fall of the loss first, within a budget."""
        slack = _ROUNDING * abs(budget)
        while True:
            values = list(plan.indices.values())
            loss, cost = self._changes(values)
            better = (loss < 0) | ((loss == 0) & (cost < 0))
            where = np.flatnonzero(better & (plan.cost + cost <= budget + slack))
            for move in where[np.lexsort((cost[where], loss[where]))]:
                changed = self._solution(self._moves.applied(values, int(move)))
                # Sums of differences carry rounding errors; the sums themselves decide.
                if changed.cost <= budget and (changed.loss, changed.cost) < (plan.loss, plan.cost):
                    plan = changed
                    break
            else:
                return plan

    def _cheapened(self, plan: Solution, budget: float) -> Solution:
        """Changes one parameter at a time, the least loss per saved cost first, to a budget."""
        values, total = list(plan.indices.values()), plan.cost
        while total > budget:
            loss, cost = self._changes(values)
            where = np.flatnonzero(cost < -_ROUNDING * abs(total))
            if not where.size:
                break
            saved = np.minimum(-cost[where], total - budget)  # more than needed is no gain
            move = int(where[np.lexsort((-saved, loss[where] / saved))[0]])
            values, total = self._moves.applied(values, move), total + float(cost[move])
        return self._solution(values)

    def _changes(self, values: Sequence[int]) -> tuple[_Array, _Array]:
        entries = self._moves.entries(values)
        return (
            self._moves.differences(self._flat_loss, entries, values),
            self._moves.differences(self._flat_cost, entries, values),
        )


@final
class _Moves:
    """All changes of one parameter at once; move = parameter * most values + new value."""

    def __init__(self, eliminator: Eliminator) -> None:
        rows = []
        for table, scope in enumerate(eliminator.scopes):
            stride = 1
            for p in reversed(scope):
                rows.append((p, table, stride))
                stride *= eliminator.sizes[p]
        rows.sort()
        matrix = np.array(rows, dtype=np.intp).reshape(-1, 3)
        self._parameter, self._table, self._stride = matrix.T
        self._first = np.flatnonzero(np.diff(self._parameter, prepend=-1))
        self._start = np.array(eliminator.starts[:-1], dtype=np.intp)
        self._sizes = np.array(eliminator.sizes, dtype=np.intp)
        self._most = int(self._sizes.max(initial=1))
        self._value = np.arange(self._most)

    def entries(self, values: Sequence[int]) -> NDArray[np.intp]:
        """Positions of the entries that each (parameter, table) would have at each value."""
        here = self._stride * np.asarray(values, dtype=np.intp)[self._parameter]
        at = self._start.copy()
        np.add.at(at, self._table, here)
        value = np.minimum(self._value, self._sizes[self._parameter, None] - 1)
        return np.asarray((at[self._table] - here)[:, None] + self._stride[:, None] * value)

    def differences(self, flat: _Array, entries: NDArray[np.intp], values: Sequence[int]) -> _Array:
        """How a sum changes with each move, shape (moves,); values beyond the last change 0."""
        if not self._first.size:
            return np.zeros(0)
        totals = np.add.reduceat(flat[entries], self._first, axis=0)
        here = totals[np.arange(len(totals)), np.asarray(values, dtype=np.intp)]
        beyond = self._value >= self._sizes[:, None]
        return np.asarray(np.where(beyond, 0.0, totals - here[:, None]).ravel())

    def applied(self, values: Sequence[int], move: int) -> list[int]:
        """The values after a move."""
        parameter, value = divmod(move, self._most)
        return [*values[:parameter], value, *values[parameter + 1 :]]
