"""The least loss under several budgets at once, proven, by mixed-integer linear programming."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import ConfigError, SearchError
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.seeding.elimination import Eliminator
from autocompress.search.seeding.lagrangian import Lagrangian
from autocompress.search.seeding.program import Program

_MOST_SOLVES = 10
_ROUNDING = 1e-9  # relative to the sums' sizes


@final
@dataclass(frozen=True)
class ExactSolution:
    """The best plan that was found, and how much better another one could be.

    Attributes:
        indices: the value of every parameter that is in the loss or a cost.
        loss: in the loss's unit.
        costs: one per budget, each within it.
        bound: no plan within the budgets has a loss below it.
        proven: whether the plan is optimal; if not, the time limit was hit.
    """

    indices: dict[str, int]
    loss: float
    costs: tuple[float, ...]
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """How far the loss may be from the optimum, in the loss's unit."""
        return max(0.0, self.loss - self.bound)


def solve_exactly(
    loss: FactoredSum,
    costs: Sequence[FactoredSum],
    budgets: Sequence[float],
    time_limit_s: float,
) -> ExactSolution:
    """The plan of the least loss with every cost within its budget.

    The relaxed program gives each budget a price. With the prices, a plan is found that keeps the
    budgets, and every table entry goes for which no plan's Lagrangian bound is below that plan's
    loss; so do entries that another one for the same shared values beats in all sums. What is
    left is solved by branch and cut (HiGHS). Plans whose costs are within a relative 1e-6 of a
    budget may be missed; a budget is never exceeded.

    Args:
        loss: what is to be small.
        costs: sums over the same space, such as latency and bytes.
        budgets: one per cost, in its unit; infinity for none.
        time_limit_s: about how many seconds until the best plan so far is returned.

    Raises:
        ConfigError: numbers of costs and budgets differ, or tables contradict each other.
        SearchError: a budget that no plan meets, with the least value that can be reached; or no
            plan within the time limit.
    """
    if len(costs) != len(budgets):
        raise ConfigError(
            "Every cost needs one budget.", given=f"{len(costs)} costs, {len(budgets)} budgets"
        )
    deadline = time.monotonic() + time_limit_s
    task = _Task(loss, tuple(costs), tuple(float(b) for b in budgets), Eliminator((loss, *costs)))
    _check_each(task)
    everything = np.ones(task.structure.size, dtype=np.bool_)
    program = Program((loss, *costs), task.structure, everything)
    prices = program.prices(budgets, _left(deadline))
    known = None if prices is None else _priced(task, prices)
    if known is None or prices is None:
        best = _solved(task, program, None, deadline)
    else:
        kept, bound = _promising(task, prices, known.loss)
        known = replace(known, bound=bound)
        best = _solved(task, Program((loss, *costs), task.structure, kept), known, deadline)
    if best is None:
        raise _no_plan(task, program, deadline)
    return best


@final
@dataclass(frozen=True, eq=False)
class _Task:
    loss: FactoredSum
    costs: tuple[FactoredSum, ...]
    budgets: tuple[float, ...]
    structure: Eliminator

    def solution(self, indices: dict[str, int], bound: float, proven: bool) -> ExactSolution:
        costs = tuple(cost.value(indices) for cost in self.costs)
        return ExactSolution(indices, self.loss.value(indices), costs, bound, proven)

    def excess(self, solution: ExactSolution) -> list[float]:
        return [max(0.0, c - b) for c, b in zip(solution.costs, self.budgets, strict=True)]


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.1)


def _check_each(task: _Task) -> None:
    for k, (cost, budget) in enumerate(zip(task.costs, task.budgets, strict=True)):
        cheapest = task.structure.named(task.structure.minimise(task.structure.flat(cost)))
        if not cost.value(cheapest) <= budget:
            raise _unreachable(k, budget, cost.value(cheapest))


def _priced(task: _Task, prices: NDArray[np.float64]) -> ExactSolution | None:
    """A plan within the budgets: of the priced costs' sum, under ever tighter budgets of it."""
    used = [k for k, price in enumerate(prices) if price > 0]
    factors = [
        Factor(f.name, f.parameters, f.values * prices[k])
        for k in used
        for f in task.costs[k].factors
    ]
    constant = sum(prices[k] * task.costs[k].constant for k in used)
    lagrangian = Lagrangian(task.loss, FactoredSum(float(constant), tuple(factors)))
    budget = float(sum(prices[k] * task.budgets[k] for k in used))
    slack = budget - lagrangian.cheapest.cost
    for share in (0.0, 1e-9, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        plan = lagrangian.solve(budget - share * slack)
        solution = task.solution(plan.indices, -math.inf, False)
        if not any(task.excess(solution)):
            return solution
    return None


def _promising(
    task: _Task, prices: NDArray[np.float64], loss: float
) -> tuple[NDArray[np.bool_], float]:
    """Which table entries may be in a plan of at most a loss, and a bound of every plan's loss."""
    structure = task.structure
    if not structure.exact:
        return np.ones(structure.size, dtype=np.bool_), -math.inf
    flat, constant = structure.flat(task.loss), task.loss.constant
    for price, cost, budget in zip(prices, task.costs, task.budgets, strict=True):
        if price > 0:
            flat = flat + price * structure.flat(cost)
            constant += price * (cost.constant - budget)
    bounds = structure.marginals(flat) + constant
    tolerance = _ROUNDING * (abs(loss) + abs(constant) + 1e-300)
    lowest = float(bounds.min(initial=constant if not bounds.size else math.inf))
    return bounds <= loss + tolerance, lowest


def _solved(
    task: _Task, program: Program, known: ExactSolution | None, deadline: float
) -> ExactSolution | None:
    """The program's plan or the known one, whichever is better."""
    limits = list(task.budgets)
    for _ in range(_MOST_SOLVES):
        found = program.solve(limits, _left(deadline))
        if found is None:
            return known
        solution = task.solution(found.indices, found.bound, found.proven)
        excess = task.excess(solution)
        if not any(excess):
            break
        # The solver keeps budgets up to a relative 1e-6 only.
        limits = [limit - 2 * e for limit, e in zip(limits, excess, strict=True)]
    else:
        return known
    if known is None:
        return solution
    better = min(solution, known, key=lambda plan: plan.loss)
    bound = min(better.loss, max(solution.bound, known.bound))
    return replace(better, bound=bound, proven=solution.proven)


def _unreachable(k: int, budget: float, least: float) -> SearchError:
    return SearchError(
        f"No plan is within budget {k + 1}.",
        given=f"{budget:.6g}",
        allowed=f"at least {least:.6g}, the least value that can be reached",
        advice="raise the budget, or add stronger choices to the search space",
    )


def _no_plan(task: _Task, program: Program, deadline: float) -> SearchError:
    """Names the first budget that cannot be met with the others."""
    for k, budget in enumerate(task.budgets):
        others = [math.inf if i == k else b for i, b in enumerate(task.budgets)]
        found = program.solve(others, max(_left(deadline), 1.0), objective=1 + k)
        if found is not None and found.proven and task.costs[k].value(found.indices) > budget:
            return _unreachable(k, budget, task.costs[k].value(found.indices))
    return SearchError(
        "No plan was found that meets all budgets.",
        given=task.budgets,
        advice="raise the budgets or the time limit",
    )
