"""The limits that a solved plan must keep, as budgets of costs, and what can be reached at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import final

from autocompress.config import Objective
from autocompress.errors import ConfigError, NoFitError, SearchError
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.costs.models import CostModels
from autocompress.search.seeding.lagrangian import minimise
from autocompress.search.seeding.milp import solve_exactly

# Of finding a plan, and of proving that no other one is better.
TIME_LIMIT_S = 10.0
# The solver may miss plans whose costs are within a relative 1e-6 of a budget.
_SLACK = 2e-6
_DIGITS = 4
_ADVICE = "relax a limit, or search a space with stronger choices"


@final
@dataclass(frozen=True)
class Limits:
    """What a solved plan must keep; None is no limit.

    Args:
        max_latency_ms: quiet latency on the device, in milliseconds.
        min_speedup: times faster than the original network in the device's first runtime.
        max_bytes: size of the model file, in bytes.
        max_download_bytes: size of its coded container, in bytes.

    Raises:
        ConfigError: a limit that is not a number above zero.
    """

    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_bytes: int | None = None
    max_download_bytes: int | None = None

    def __post_init__(self) -> None:
        for option, value in self.options().items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    "A limit cannot be used.",
                    given=f"{option} {value}",
                    allowed="a number above zero",
                )

    def options(self) -> dict[str, float]:
        """The limits that are given, by the option of the command line."""
        values = {f"--{f.name.replace('_', '-')}": getattr(self, f.name) for f in fields(self)}
        return {option: value for option, value in values.items() if value is not None}


@final
@dataclass(frozen=True)
class Bound:
    """One limit as a budget of a cost.

    Attributes:
        option: of the command line.
        given: the option's value.
        cost: in ms or bytes.
        budget: in the cost's unit.
        original_ms: of a speed-up, what is divided by the cost; None for other limits.
    """

    option: str
    given: float
    cost: FactoredSum
    budget: float
    original_ms: float | None = None

    def reached(self, cost: float) -> str:
        """The strictest value of the option that a plan of some cost keeps, in words."""
        value = cost + _SLACK * abs(cost)
        if self.original_ms is not None:
            return f"{self.option} {_rounded(self.original_ms / value, math.floor)} or less"
        if self.option == "--max-latency-ms":
            return f"{self.option} {_rounded(value, math.ceil)} or more"
        return f"{self.option} {math.ceil(value)} or more"


def bounds_of(costs: CostModels, limits: Limits, runtime: str) -> list[Bound]:
    """The limits as budgets in a runtime, in the order of `Limits`.

    Raises:
        ConfigError: a limit on what there is no model of.
    """
    objectives: dict[str, Objective] = {
        "--max-latency-ms": "latency",
        "--min-speedup": "latency",
        "--max-bytes": "file_bytes",
        "--max-download-bytes": "download_bytes",
    }
    bounds = []
    for option, given in limits.options().items():
        objective = objectives[option]
        cost = costs.sum_of(objective, runtime)
        if cost is None:
            raise ConfigError(
                f"The run has no model of {objective}.",
                given=f"{option} {given:g}",
                advice=f"name {objective} among the experiment's objectives, and search anew",
            )
        if option == "--min-speedup":
            original_ms = costs.original_ms
            bounds.append(Bound(option, given, cost, original_ms / given, original_ms))
        else:
            bounds.append(Bound(option, given, cost, given))
    return bounds


def no_fit(tasks: Mapping[str, Sequence[Bound]]) -> NoFitError:
    """The error that names the least value that can be reached.

    Args:
        tasks: by runtime the same limits; no plan keeps all of them in any runtime.
    """
    options = list(zip(*tasks.values(), strict=True))
    for same in options:
        least = {bound: bound.cost.value(minimise(bound.cost)) for bound in same}
        if all(value > bound.budget for bound, value in least.items()):
            return NoFitError(
                "No plan of the run's space is predicted to keep a limit.",
                given=f"{same[0].option} {same[0].given:g}",
                allowed=same[0].reached(min(least.values())),
                advice=_ADVICE,
            )
    found = [_beside_others(tasks, k) for k in range(len(options))]
    return NoFitError(
        "No plan of the run's space was found that is predicted to keep all limits together.",
        given=", ".join(f"{same[0].option} {same[0].given:g}" for same in options),
        allowed="; else ".join(filter(None, found)) or None,
        advice=_ADVICE,
    )


def _beside_others(tasks: Mapping[str, Sequence[Bound]], k: int) -> str:
    """What can be reached of one limit while the others are kept; empty if nothing is known."""
    least = []
    for bounds in tasks.values():
        others = [bound for i, bound in enumerate(bounds) if i != k]
        costs, budgets = [b.cost for b in others], [b.budget for b in others]
        try:
            found = solve_exactly(bounds[k].cost, costs, budgets, TIME_LIMIT_S)
        except SearchError:
            continue
        least.append(found.loss)
    return next(iter(tasks.values()))[k].reached(min(least)) if least else ""


def _rounded(value: float, direction: Callable[[float], int]) -> str:
    """Four significant digits, up or down; whole numbers from there on."""
    digits = max(_DIGITS - 1 - math.floor(math.log10(value)), 0)
    return f"{direction(value * 10**digits) / 10**digits:.{digits}f}"
