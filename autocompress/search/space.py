"""The search space of one network: a list of ordered choices, each for one target and stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from autocompress.config import SearchSpace
from autocompress.device import DeviceProfile
from autocompress.errors import ConfigError
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision, Plan, Step
from autocompress.search.space_rules import (
    Offers,
    Place,
    Rules,
    common_decisions,
    fixed_decisions,
    is_identity,
    offered_decisions,
    on_device,
    quantizes_all,
    targets_of,
    ties,
)
from autocompress.techniques import (
    BlockTechnique,
    Technique,
    consistent,
    technique_named,
    technique_of,
)
from autocompress.techniques.technique import NETWORK, Stage


@final
@dataclass(frozen=True)
class Parameter:
    """One choice: what is done to one target at one stage, from nothing (0) to the last decision.

    Techniques of the same stage exclude each other for a target: their decisions stand one after
    another, each technique's from the mildest to the strongest.

    Attributes:
        target: the layer, the channel group, the block, or `network`; of tied ones the first.
        tied: further targets, of the same kind, that take the same decision.
    """

    stage: Stage
    target: str
    decisions: tuple[Decision, ...]
    tied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name in the study."""
        return f"{self.target}|{self.stage.name.lower()}"

    @property
    def targets(self) -> tuple[str, ...]:
        """All that the choice is about."""
        return (self.target, *self.tied)

    @property
    def drops(self) -> bool:
        """Whether it takes blocks out."""
        return isinstance(technique_of(self.decisions[0]), BlockTechnique)

    @property
    def highest(self) -> int:
        """The largest index; index 0 leaves the targets as they are."""
        return len(self.decisions)


@final
@dataclass(frozen=True)
class Space:
    """All choices that there are for a network on a device.

    Attributes:
        fixed: steps of every plan, about which there is no choice.
    """

    parameters: tuple[Parameter, ...]
    fixed: tuple[Step, ...] = ()

    def plan(self, indices: Mapping[str, int]) -> Plan:
        """The plan that parameter values stand for; a parameter that is not named is 0.

        Steps that would have nothing to work on, or that exclude each other, are left out (see
        `techniques.consistent`): several values may stand for the same plan.
        """
        steps = list(self.fixed)
        for parameter in self.parameters:
            index = indices.get(parameter.name, 0)
            if index:
                steps += [Step(t, parameter.decisions[index - 1]) for t in parameter.targets]
        return consistent(Plan(tuple(steps)))

    def steps(self) -> Iterator[Step]:
        """Every step that a plan of this space may have."""
        yield from self.fixed
        for parameter in self.parameters:
            for target in parameter.targets:
                yield from (Step(target, decision) for decision in parameter.decisions)

    def by_target(self) -> dict[tuple[Stage, str], Parameter]:
        """Parameters by stage and target, under the names of all targets that they are about."""
        return {(p.stage, target): p for p in self.parameters for target in p.targets}

    @property
    def size(self) -> float:
        """How many combinations of values there are."""
        total = 1.0
        for parameter in self.parameters:
            total *= parameter.highest + 1
        return total


def build_space(graph: NetworkGraph, space: SearchSpace, device: DeviceProfile) -> Space:
    """The choices that a search space file leaves for a network on a device.

    Where single layers have a fixed precision no quantizer of the whole network is offered, and
    where such a quantizer is fixed no layer has a choice of its own.

    Raises:
        ConfigError: an unknown technique, a value outside a technique's range, a pattern of `fix`
            or `tie` that matches nothing or asks for what cannot be done, or nothing to choose
            from.
    """
    built = open_space(graph, space, device)
    if not built.parameters:
        left = [layer for layer in graph.layers if layer.reason]
        raise ConfigError(
            f"The search space '{space.name}' leaves nothing to choose for this network.",
            given=f"{len(graph.layers)} layers, techniques {', '.join(space.techniques)}"
            + (f"; {len(left)} layers cannot be changed: {left[0].reason}" if left else ""),
            advice="name more techniques or values, or exclude or fix fewer layers; "
            "`autocompress inspect` shows what each layer can take",
        )
    return built


def open_space(graph: NetworkGraph, space: SearchSpace, device: DeviceProfile) -> Space:
    """As `build_space`; there may be nothing to choose from.

    Raises:
        ConfigError: see `build_space`.
    """
    rules = Rules(graph, space, device)
    fixed = fixed_decisions(rules)
    offers = [(technique_named(name), grids) for name, grids in space.techniques.items()]
    offered = {t.name: offered_decisions(t, grids, space.name) for t, grids in offers}
    found: dict[Place, tuple[Decision, ...]] = {}
    for technique, _ in offers:
        for target in targets_of(technique, graph):
            place = (technique.stage, target)
            decisions = rules.choices(technique, target, offered[technique.name])
            if decisions and place not in fixed and not _void(place, fixed):
                found[place] = found.get(place, ()) + decisions
    steps = [Step(target, decision) for (_, target), decision in fixed.items()]
    parameters = _parameters(rules, found, offered)
    return Space(parameters, tuple(s for s in steps if not is_identity(s.decision)))


def unused_values(space: SearchSpace, built: Space, device: DeviceProfile) -> list[str]:
    """Values that a search space file names and no layer, group or network takes, as texts."""
    taken = [d for p in built.parameters for d in p.decisions]

    def used(technique: Technique, offered: Sequence[Decision], field: str, value: object) -> bool:
        named = [d for d in offered if getattr(d, field) == value]
        meant = {getattr(on_device(technique, d, device), field) for d in named} | {value}
        return any(d.technique == technique.name and getattr(d, field) in meant for d in taken)

    unused = []
    for name, grids in space.techniques.items():
        technique = technique_named(name)
        for grid in grids:
            offered = offered_decisions(technique, [grid], space.name)
            unused += [
                f"{name} {field} {value}"
                for field, values in grid.items()
                for value in values
                if not used(technique, offered, field, value)
            ]
    return list(dict.fromkeys(unused))


def _void(place: Place, fixed: Mapping[Place, Decision]) -> bool:
    """Whether a choice would come to nothing, or undo a step that is fixed, in every plan."""
    if quantizes_all(fixed):
        return place[0] in (Stage.QUANTIZE, Stage.RETRAIN)
    single = any(s is Stage.QUANTIZE and t != NETWORK for s, t in fixed)
    return single and place == (Stage.QUANTIZE, NETWORK)


def _parameters(
    rules: Rules,
    found: Mapping[Place, tuple[Decision, ...]],
    offered: Offers,
) -> tuple[Parameter, ...]:
    """One parameter per stage and target, or per stage and tie; a tie stands at its first."""
    tied: dict[Place, list[str]] = {}
    blocks = {block.name for block in rules.graph.blocks}
    for names in ties(rules):
        # Blocks are another kind of target than the groups that lose channels at their stage.
        for stage, whole in itertools.product(Stage, (False, True)):
            members = [t for t in names if (stage, t) in found and (t in blocks) is whole]
            tied |= {(stage, target): members for target in members if len(members) > 1}
    parameters = []
    for (stage, target), decisions in found.items():
        first, *rest = tied.get((stage, target), [target])
        if target == first:
            shared = common_decisions(rules, stage, [first, *rest], offered) if rest else decisions
            parameters.append(Parameter(stage, target, shared, tuple(rest)))
    return tuple(parameters)
