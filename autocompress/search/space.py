"""The search space of one network: a list of ordered choices, each for one target and stage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

from autocompress.config import SearchSpace
from autocompress.device import DeviceProfile
from autocompress.errors import ConfigError, PlanError
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision, Plan, Step, make_decision
from autocompress.techniques import (
    GroupTechnique,
    LayerTechnique,
    Technique,
    consistent,
    technique_named,
)
from autocompress.techniques.technique import NETWORK, Stage


@final
@dataclass(frozen=True)
class Parameter:
    """One choice: what is done to one target at one stage, from nothing (0) to the last decision.

    Techniques of the same stage exclude each other for a target: their decisions stand one after
    another, each technique's from the mildest to the strongest.
    """

    stage: Stage
    target: str
    decisions: tuple[Decision, ...]

    @property
    def name(self) -> str:
        """The parameter's name in the study."""
        return f"{self.target}|{self.stage.name.lower()}"

    @property
    def highest(self) -> int:
        """The largest index; index 0 leaves the target as it is."""
        return len(self.decisions)


@final
@dataclass(frozen=True)
class Space:
    """All choices that there are for a network on a device."""

    parameters: tuple[Parameter, ...]

    def plan(self, indices: Mapping[str, int]) -> Plan:
        """The plan that parameter values stand for; a parameter that is not named is 0.

        Steps that would have nothing to work on, or that exclude each other, are left out (see
        `techniques.consistent`): several values may stand for the same plan.
        """
        steps = []
        for parameter in self.parameters:
            index = indices.get(parameter.name, 0)
            if index:
                steps.append(Step(parameter.target, parameter.decisions[index - 1]))
        return consistent(Plan(tuple(steps)))

    @property
    def size(self) -> float:
        """How many combinations of values there are."""
        total = 1.0
        for parameter in self.parameters:
            total *= parameter.highest + 1
        return total


def build_space(graph: NetworkGraph, space: SearchSpace, device: DeviceProfile) -> Space:
    """The choices that a search space file leaves for a network on a device.

    Raises:
        ConfigError: an unknown technique, a value outside a technique's range, or nothing to
            choose from.
    """
    found: dict[tuple[Stage, str], tuple[Decision, ...]] = {}
    for name, fields in space.techniques.items():
        technique = technique_named(name)
        offered = _offered(technique, fields, space.name)
        for target, decisions in _choices(technique, graph, offered, device).items():
            if decisions and not _excluded(target, space.exclude):
                key = (technique.stage, target)
                found[key] = found.get(key, ()) + decisions
    if not found:
        raise ConfigError(
            f"The search space '{space.name}' leaves nothing to choose for this network.",
            given=f"{len(graph.layers)} layers, techniques {', '.join(space.techniques)}",
            advice="name more techniques or values, or exclude fewer layers",
        )
    return Space(tuple(Parameter(stage, target, d) for (stage, target), d in found.items()))


def unused_values(space: SearchSpace, built: Space) -> list[str]:
    """Values that a search space file names and no layer, group or network takes, as texts."""
    taken = [d for p in built.parameters for d in p.decisions]
    return [
        f"{name} {field} {value}"
        for name, fields in space.techniques.items()
        for field, values in fields.items()
        for value in values
        if not any(d.technique == name and getattr(d, field) == value for d in taken)
    ]


def _choices(
    technique: Technique, graph: NetworkGraph, offered: tuple[Decision, ...], device: DeviceProfile
) -> dict[str, tuple[Decision, ...]]:
    if isinstance(technique, GroupTechnique):
        return {g.name: technique.choices(g, offered, device) for g in graph.groups}
    if isinstance(technique, LayerTechnique):
        return {x.name: technique.choices(x, offered, device) for x in graph.layers}
    return {NETWORK: technique.choices(graph, offered, device)}


def _offered(
    technique: Technique, fields: Mapping[str, Sequence[Any]], space: str
) -> tuple[Decision, ...]:
    """Every combination of the values that a space names, as decisions.

    Combinations that the technique refuses are left out, if each value is in one that it takes.
    """
    found: list[Decision] = []
    refused: list[tuple[dict[str, Any], PlanError]] = []
    for values in itertools.product(*fields.values()):
        chosen = dict(zip(fields, values, strict=True))
        try:
            found.append(make_decision(technique.decision, chosen))
        except PlanError as complaint:
            refused.append((chosen, complaint))
    for chosen, reason in refused:
        if any(all(getattr(d, k, None) != v for d in found) for k, v in chosen.items()):
            raise ConfigError(
                f"The search space '{space}' has a value that its technique refuses. {reason.what}",
                given=reason.given,
                allowed=reason.allowed,
            ) from reason
    return tuple(found)


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
