"""Small changes of a plan's levels: pure functions on integer arrays.

Levels are arrays of shape (parameters,), from 0 to each parameter's highest level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.int64]
Mask = NDArray[np.bool_]

# "min(U(1, 3), U(1, 3))" changes at once: Sieberling et al., arXiv:2410.14649, section 3.
_MOST_CHANGES = 3
_ANY_LEVEL = 0.35
_TWO_LEVELS = 0.25
BUDGET_TOLERANCE = 0.03
_REPAIR_STEPS = 32
_REPAIR_PARAMETERS = 4


@final
@dataclass(frozen=True, eq=False)
class Ranges:
    """What levels there are.

    Attributes:
        highest: highest level of each parameter, at least 1; shape (parameters,).
        ordered: whether neighbouring levels are alike, shape (parameters,).
    """

    highest: Levels
    ordered: Mask


@final
@dataclass(frozen=True, eq=False)
class Budget:
    """What levels may cost: from `low` to `high`, in the cost's unit, within the tolerance."""

    cost: Callable[[Levels], float]
    low: float
    high: float

    def excess(self, levels: Levels) -> float:
        """How far the cost is outside, as a share of the bound that it misses; 0 if inside."""
        cost = self.cost(levels)
        if cost < self.low:
            return (self.low - cost) / abs(self.low)
        return (cost - self.high) / abs(self.high) if cost > self.high else 0.0


def uniform(ranges: Ranges, rng: np.random.Generator) -> Levels:
    """Every parameter at any level."""
    return rng.integers(0, ranges.highest + 1)


def graded(ranges: Ranges, rng: np.random.Generator) -> Levels:
    """Every parameter at any level up to one share of its highest, or from it on.

    Uniform draws all compress about as much; these cover a front from end to end.
    """
    share, upwards = rng.random(), rng.random() < 0.5
    low = np.rint(share * ranges.highest).astype(np.int64) if upwards else 0 * ranges.highest
    high = ranges.highest if upwards else np.rint(share * ranges.highest).astype(np.int64)
    drawn = rng.integers(low, high + 1)
    return np.asarray(np.where(ranges.ordered, drawn, uniform(ranges, rng)), np.int64)


def change_few(levels: Levels, ranges: Ranges, rng: np.random.Generator) -> Levels:
    """Change one to three parameters, mostly by one or two levels, sometimes to any other."""
    changed: Levels = levels.copy()
    count = min(_few(rng), len(levels))
    for parameter in rng.choice(len(levels), size=count, replace=False):
        level, highest = int(levels[parameter]), int(ranges.highest[parameter])
        if not ranges.ordered[parameter] or rng.random() < _ANY_LEVEL:
            other = int(rng.integers(highest))
            changed[parameter] = other + (other >= level)
            continue
        step = int(rng.choice([-1, 1])) * _size(rng)
        # At an end, the other way; with two levels only, to the other one.
        reached = [level + step, level - step, level + np.sign(step), level - np.sign(step)]
        changed[parameter] = next(r for r in reached if 0 <= r <= highest)
    return changed


def switch_levels(levels: Levels, ranges: Ranges, rng: np.random.Generator) -> Levels:
    """Raise one parameter and lower another by as many levels, one to three times.

    The sum of the levels is kept (the "level switch" of Sieberling et al., arXiv:2410.14649).
    Where none can be raised with another lowered, the levels are returned unchanged.
    """
    changed: Levels = levels.copy()
    untouched = ranges.ordered.copy()
    for _ in range(_few(rng)):
        raised = np.flatnonzero(untouched & (changed < ranges.highest))
        lowered = np.flatnonzero(untouched & (changed > 0))
        if not len(raised) or not len(lowered):
            break
        up = rng.choice(raised)
        lowered = lowered[lowered != up]
        if not len(lowered):
            break
        down = rng.choice(lowered)
        size = min(_size(rng), int(ranges.highest[up] - changed[up]), int(changed[down]))
        changed[up] += size
        changed[down] -= size
        untouched[[up, down]] = False
    return changed


def cross(first: Levels, second: Levels, rng: np.random.Generator) -> Levels:
    """Every parameter from one of two parents, either as likely."""
    return np.where(rng.random(len(first)) < 0.5, first, second)


def repair(
    levels: Levels, free: Mask, budget: Budget, ranges: Ranges, rng: np.random.Generator
) -> Levels:
    """Lead the cost back into a budget by single levels.

    Of the steps of a few random parameters the one that leads nearest is taken, until the cost is
    within 3 % of the budget or nothing leads nearer; what comes nearest is returned.

    Args:
        free: parameters that may be changed; unordered ones are left alone in any case.
    """
    candidates = np.flatnonzero(free & ranges.ordered)
    excess = budget.excess(levels)
    for _ in range(_REPAIR_STEPS):
        # Written so that a NaN ends it.
        if not excess > BUDGET_TOLERANCE or not len(candidates):
            break
        count = min(_REPAIR_PARAMETERS, len(candidates))
        chosen = rng.choice(candidates, size=count, replace=False)
        neighbours = _neighbours(levels, chosen, ranges)
        excesses = [budget.excess(n) for n in neighbours]
        nearest = int(np.argmin(excesses))
        if excesses[nearest] < excess:
            levels, excess = neighbours[nearest], excesses[nearest]
    return levels


def _neighbours(levels: Levels, parameters: Levels, ranges: Ranges) -> list[Levels]:
    """The levels with one of the parameters one level lower or higher."""
    found = []
    for parameter in parameters:
        for level in (levels[parameter] - 1, levels[parameter] + 1):
            if 0 <= level <= ranges.highest[parameter]:
                neighbour = levels.copy()
                neighbour[parameter] = level
                found.append(neighbour)
    return found


def _few(rng: np.random.Generator) -> int:
    return int(rng.integers(1, _MOST_CHANGES + 1, size=2).min())


def _size(rng: np.random.Generator) -> int:
    return 2 if rng.random() < _TWO_LEVELS else 1
