"""Levels made from members of the front, at about their cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from optuna.distributions import IntDistribution

from autocompress.search.samplers.context import SamplerContext
from autocompress.search.samplers.moves import (
    Budget,
    Levels,
    Mask,
    Ranges,
    change_few,
    cross,
    graded,
    repair,
    switch_levels,
)
from autocompress.search.samplers.parents import Parents

_CROSSOVER = 0.3
_FRESH = 0.05
_SWITCH = 0.5


@final
@dataclass(frozen=True, eq=False)
class Offspring:
    """How levels are varied in one search space.

    Attributes:
        space: parameters in the order of the levels.
        context: predicted cost and unordered parameters.
    """

    space: Mapping[str, IntDistribution]
    context: SamplerContext

    @property
    def ranges(self) -> Ranges:
        """What levels there are."""
        highest = [(d.high - d.low) // d.step for d in self.space.values()]
        ordered = [name not in self.context.unordered for name in self.space]
        return Ranges(np.array(highest, np.int64), np.array(ordered, np.bool_))

    def draw(self, parents: Parents, rng: np.random.Generator) -> Levels:
        """Levels of a mutant, a cross of two neighbours or, rarely, graded ones."""
        kind = rng.random()
        if kind < _FRESH:
            return graded(self.ranges, rng)
        member = parents.draw(rng)
        parent = parents.levels(member)
        neighbour = parents.neighbour(member, rng) if kind < _FRESH + _CROSSOVER else None
        if neighbour is None:
            return self._mutant(parent, rng)
        other = parents.levels(neighbour)
        free = np.ones(len(parent), np.bool_)
        return self._repaired(cross(parent, other, rng), free, (parent, other), rng)

    def values(self, levels: Levels) -> dict[str, int]:
        """The parameters' values that levels stand for."""
        pairs = zip(self.space.items(), levels.tolist(), strict=True)
        return {name: d.low + d.step * level for (name, d), level in pairs}

    def _mutant(self, parent: Levels, rng: np.random.Generator) -> Levels:
        ranges = self.ranges
        if rng.random() < _SWITCH:
            changed = switch_levels(parent, ranges, rng)
            if not np.array_equal(changed, parent):
                # What was changed stays so: the nearest way back would be to undo it.
                return self._repaired(changed, changed == parent, (parent,), rng)
        # Not repaired, or else no mutant would move along the front.
        return change_few(parent, ranges, rng)

    def _repaired(
        self, levels: Levels, free: Mask, parents: tuple[Levels, ...], rng: np.random.Generator
    ) -> Levels:
        predicted = self.context.cost
        if predicted is None:
            return levels
        costs = [predicted(self.values(p)) for p in parents]
        if not all(math.isfinite(c) and c > 0 for c in costs):
            return levels
        budget = Budget(lambda x: predicted(self.values(x)), min(costs), max(costs))
        return repair(levels, free, budget, self.ranges, rng)
