"""What a sampler may know of a search beside the study's trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from optuna.trial import FrozenTrial

Constraints = Callable[[FrozenTrial], Sequence[float]]
Cost = Callable[[Mapping[str, int]], float]


@final
@dataclass(frozen=True)
class SamplerContext:
    """Hard limits and a predicted cost; each may be left out.

    Attributes:
        constraints: how far a trial exceeds each limit; 0 or less is within it. Best relative to
            the limit, since excesses are added up. Optuna asks when a trial completes or is
            pruned, before its values are set: user attributes and parameters must do.
        cost: predicted cost of parameter values, in any unit, such as a latency in ms.
        unordered: names of parameters whose levels have no order, such as the runtime.
    """

    constraints: Constraints | None = None
    cost: Cost | None = None
    unordered: frozenset[str] = frozenset()
