"""Random plans of a search space, from mild to strong, for checks of predictions."""

from __future__ import annotations

import numpy as np

from autocompress.plan import Plan
from autocompress.search.space import Parameter, Space
from autocompress.techniques import NETWORK
from autocompress.techniques.technique import Stage

# Levels of one plan spread around its strength by so many levels.
_SPREAD = 1.0
_DECOMPOSED = 0.5
# The strongest plans leave most blocks in, or there would be little else to see.
_DROPPED = 0.3
_WHOLE_NETWORK = 0.1
_ATTEMPTS = 50


def random_plans(space: Space, count: int, generator: np.random.Generator) -> tuple[Plan, ...]:
    """Distinct plans that do something, without training; fewer, if the space has no more.

    Each plan draws how hard it prunes, how often it drops blocks and decomposes, and how often it
    quantizes; then each choice draws its level around that.
    """
    found: dict[str, Plan] = {}
    for _ in range(_ATTEMPTS * count):
        if len(found) == count:
            break
        plan = _draw(space, generator)
        if plan.steps:
            found.setdefault(plan.hash, plan)
    return tuple(found.values())


def _draw(space: Space, generator: np.random.Generator) -> Plan:
    strength, quantized = generator.uniform(size=2)
    indices = {
        p.name: _index(p, float(strength), float(quantized), generator)
        for p in space.parameters
        # Training changes no latency.
        if not p.stage.trains
    }
    return space.plan(indices)


def _index(
    parameter: Parameter, strength: float, quantized: float, generator: np.random.Generator
) -> int:
    graded = parameter.stage in (Stage.PRUNE, Stage.SPARSIFY) and not parameter.drops
    if parameter.target != NETWORK and graded:
        level = generator.normal(strength * parameter.highest, _SPREAD)
        return int(np.clip(round(level), 0, parameter.highest))
    if parameter.drops:
        chance = _DROPPED * strength
    elif parameter.target == NETWORK:
        chance = _WHOLE_NETWORK
    elif parameter.stage is Stage.QUANTIZE:
        chance = quantized
    else:
        chance = _DECOMPOSED * strength
    chosen = generator.uniform() < chance
    level = int(generator.integers(1, parameter.highest, endpoint=True))
    return level if chosen else 0
