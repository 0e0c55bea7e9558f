"""The search space of one network: a list of ordered choices, each for one target."""

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
from autocompress.techniques import GroupTechnique, Technique, technique_named


@final
@dataclass(frozen=True)
class Parameter:
    """One choice: what a technique does to one target, from nothing (0) to its strongest level."""

    technique: Technique
    target: str
    decisions: tuple[Decision, ...]

    @property
    def name(self) -> str:
        """The parameter's name in the study."""
        return f"{self.target}|{self.technique.name}"

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
        """The plan that parameter values stand for; a parameter that is not named is 0."""
        steps = []
        for parameter in self.parameters:
            index = indices.get(parameter.name, 0)
            if index:
                steps.append(Step(parameter.target, parameter.decisions[index - 1]))
        return Plan(tuple(steps))

    @property
    def size(self) -> float:
        """How many plans there are."""
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
    parameters: list[Parameter] = []
    for name, fields in space.techniques.items():
        technique = technique_named(name)
        offered = _offered(technique, fields, space.name)
        if isinstance(technique, GroupTechnique):
            for group in graph.groups:
                if not _excluded(group.name, space.exclude):
                    found = technique.choices(group, offered, device)
                    parameters.append(Parameter(technique, group.name, found))
        else:
            for layer in graph.layers:
                if not _excluded(layer.name, space.exclude):
                    found = technique.choices(layer, offered, device)
                    parameters.append(Parameter(technique, layer.name, found))
    kept = tuple(p for p in parameters if p.decisions)
    if not kept:
        raise ConfigError(
            f"The search space '{space.name}' leaves nothing to choose for this network.",
            given=f"{len(graph.layers)} layers, techniques {', '.join(space.techniques)}",
            advice="name more techniques or values, or exclude fewer layers",
        )
    return Space(kept)


def _offered(
    technique: Technique, fields: Mapping[str, Sequence[Any]], space: str
) -> tuple[Decision, ...]:
    """Every combination of the values that a space names, as decisions."""
    try:
        return tuple(
            make_decision(technique.decision, dict(zip(fields, values, strict=True)))
            for values in itertools.product(*fields.values())
        )
    except PlanError as cause:
        raise ConfigError(
            f"The search space '{space}' has a value that its technique refuses. {cause.what}",
            given=cause.given,
            allowed=cause.allowed,
        ) from cause


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
