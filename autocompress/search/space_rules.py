"""What a search space file says about single targets: exclusions, fixed decisions and ties."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from autocompress.config import Grid, SearchSpace
from autocompress.device import DeviceProfile
from autocompress.errors import ConfigError, PlanError
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision, make_decision
from autocompress.techniques import (
    BlockTechnique,
    GroupTechnique,
    LayerTechnique,
    Technique,
    technique_named,
    technique_of,
)
from autocompress.techniques.technique import NETWORK, Stage

Place = tuple[Stage, str]
# By a technique's name the decisions that a file offers, from the mildest to the strongest.
Offers = Mapping[str, tuple[Decision, ...]]
# So many names are listed in a message.
_SHOWN = 12


@final
@dataclass(frozen=True)
class Rules:
    """What a search space file says about single targets of a network on a device.

    Raises:
        ConfigError: it spares targets a technique that there is not.
    """

    graph: NetworkGraph
    space: SearchSpace
    device: DeviceProfile

    def __post_init__(self) -> None:
        for name in itertools.chain(*self.space.exclude_techniques.values()):
            technique_named(name)

    def excludes(self, technique: Technique, target: str) -> bool:
        """Whether the file keeps a technique from a target; a block goes with all its layers."""
        spared = [
            p for p, names in self.space.exclude_techniques.items() if technique.name in names
        ]
        inner = self.graph.block(target).layers if isinstance(technique, BlockTechnique) else ()
        return any(_matches(name, (*self.space.exclude, *spared)) for name in (target, *inner))

    def choices(
        self, technique: Technique, target: str, offered: tuple[Decision, ...]
    ) -> tuple[Decision, ...]:
        """The decisions that make sense for a target, none if it is excluded."""
        if self.excludes(technique, target):
            return ()
        if isinstance(technique, BlockTechnique):
            return technique.choices(self.graph.block(target), offered, self.device)
        if isinstance(technique, GroupTechnique):
            return technique.choices(self.graph.group(target), offered, self.device)
        if isinstance(technique, LayerTechnique):
            layer = self.graph.layer(target)
            if layer.kind not in technique.kinds:
                return ()
            # Each once: what an explicit value and a replaced one come to may be the same.
            meant = dict.fromkeys(on_device(technique, d, self.device) for d in offered)
            return technique.choices(layer, tuple(meant), self.device)
        return technique.choices(self.graph, offered, self.device)


def on_device(technique: Technique, decision: Decision, device: DeviceProfile) -> Decision:
    """A decision as a device's kernels need it."""
    if isinstance(technique, LayerTechnique):
        return technique.on_device(decision, device)
    return decision


def targets_of(technique: Technique, graph: NetworkGraph) -> tuple[str, ...]:
    """Names of all that a technique may work on."""
    if isinstance(technique, BlockTechnique):
        return tuple(b.name for b in graph.blocks)
    if isinstance(technique, GroupTechnique):
        return tuple(g.name for g in graph.groups if g.prunable)
    if isinstance(technique, LayerTechnique):
        return tuple(x.name for x in graph.layers if x.compressible)
    return (NETWORK,)


def fixed_decisions(rules: Rules) -> dict[Place, Decision]:
    """What is fixed for a stage and target; decisions that change nothing among them.

    Raises:
        ConfigError: a pattern that matches nothing, a decision that is not valid, is excluded or
            does not suit its target, or two decisions that exclude each other.
    """
    found: dict[Place, Decision] = {}
    for pattern, techniques in rules.space.fix.items():
        for name, fields in techniques.items():
            technique = technique_named(name)
            named = _decision(technique, fields, f"fix of '{pattern}'")
            decision = on_device(technique, named, rules.device)
            for target in _matching(pattern, targets_of(technique, rules.graph), f"fix, {name}"):
                _check_fixed(rules, target, decision)
                place = (technique.stage, target)
                if found.setdefault(place, decision) != decision:
                    raise ConfigError(
                        f"Two decisions are fixed for {target} at one stage.",
                        given=f"{_text(found[place])}; {_text(decision)}",
                        allowed="one decision per target and stage",
                    )
    quantized = [target for stage, target in found if stage is Stage.QUANTIZE]
    if quantizes_all(found) and len(quantized) > 1:
        raise ConfigError(
            "A quantizer of the whole network is fixed, and precisions of single layers are.",
            given=", ".join(quantized[:_SHOWN]),
            allowed="one of both",
        )
    return found


def _check_fixed(rules: Rules, target: str, decision: Decision) -> None:
    technique = technique_of(decision)
    if rules.excludes(technique, target):
        raise ConfigError(
            f"{target} is fixed for {technique.name} and excluded from it.",
            given=_text(decision),
            allowed="one of both",
        )
    if is_identity(decision) or rules.choices(technique, target, (decision,)):
        return
    able = [
        t for t in targets_of(technique, rules.graph) if rules.choices(technique, t, (decision,))
    ]
    raise ConfigError(
        f"A decision is fixed for {target}, which it does not suit on this device.",
        given=_text(decision),
        allowed=f"it suits {_listed(able)}",
        advice="take another value, or a pattern that matches only what it suits",
    )


def quantizes_all(fixed: Mapping[Place, Decision]) -> bool:
    """Whether a quantizer of the whole network is fixed."""
    decision = fixed.get((Stage.QUANTIZE, NETWORK))
    return decision is not None and not is_identity(decision)


def ties(rules: Rules) -> list[list[str]]:
    """The names of each tie's layers, channel groups and blocks, in this and in their order.

    Raises:
        ConfigError: a pattern that matches nothing, or a target in two ties.
    """
    groups = [g.name for g in rules.graph.groups if g.prunable]
    layers = [x.name for x in rules.graph.layers if x.compressible]
    blocks = [b.name for b in rules.graph.blocks]
    names = list(dict.fromkeys([*layers, *groups, *blocks]))
    matched = [{n for p in tie for n in _matching(p, names, "tie")} for tie in rules.space.tie]
    found = [[name for name in names if name in tie] for tie in matched]
    for one, other in itertools.combinations(found, 2):
        if both := [name for name in one if name in other]:
            raise ConfigError(
                "A target stands in two ties.",
                given=_listed(both),
                allowed="each target in one tie",
                advice="join the two lists, or narrow their patterns",
            )
    return found


def common_decisions(
    rules: Rules, stage: Stage, members: Sequence[str], offered: Offers
) -> tuple[Decision, ...]:
    """The decisions that suit each of some tied targets, from the mildest to the strongest.

    Of those that come to the same for one target, as two ratios do that leave it equally many
    channels, all stay that differ for the target which tells the most apart.

    Raises:
        ConfigError: there is none.
    """
    found: tuple[Decision, ...] = ()
    for name, decisions in offered.items():
        technique = technique_named(name)
        if technique.stage is stage and set(members) <= set(targets_of(technique, rules.graph)):
            suit = [d for d in decisions if all(rules.choices(technique, t, (d,)) for t in members)]
            distinct = [rules.choices(technique, t, tuple(suit)) for t in members]
            found += max(distinct, key=len)
    if not found:
        raise ConfigError(
            "Tied targets have no decision in common.",
            given=f"{_listed(members)} at stage {stage.name.lower()}",
            allowed="targets that one decision at least of the search space suits",
            advice="tie fewer targets, or name more values",
        )
    return found


def offered_decisions(
    technique: Technique, grids: Sequence[Grid], space: str
) -> tuple[Decision, ...]:
    """Every combination of the values that a space names, as decisions, each once.

    Raises:
        ConfigError: a value that the technique refuses.
    """
    return tuple(dict.fromkeys(d for grid in grids for d in _of_grid(technique, grid, space)))


def _of_grid(technique: Technique, grid: Grid, space: str) -> list[Decision]:
    """The combinations of one grid.

    Those that the technique refuses are left out, if each value is in one that it takes.
    """
    found: list[Decision] = []
    refused = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        try:
            found.append(make_decision(technique.decision, chosen))
        except PlanError as complaint:
            refused.append((chosen, complaint))
    for chosen, reason in refused:
        if any(all(getattr(d, k, None) != v for d in found) for k, v in chosen.items()):
            raise _refused(reason, f"The search space '{space}'") from reason
    return found


def _decision(technique: Technique, fields: dict[str, object], place: str) -> Decision:
    try:
        return make_decision(technique.decision, fields)
    except PlanError as reason:
        raise _refused(reason, f"The {place}") from reason


def _refused(reason: PlanError, place: str) -> ConfigError:
    return ConfigError(
        f"{place} has a value that its technique refuses. {reason.what}",
        given=reason.given,
        allowed=reason.allowed,
    )


def is_identity(decision: Decision) -> bool:
    """Whether a decision changes nothing."""
    return decision == technique_of(decision).identity


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _matching(pattern: str, names: Sequence[str], place: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"A pattern of the search space matches nothing ({place}).",
            given=pattern,
            allowed=_listed(names),
        )
    return found


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return (
        ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        or "nothing in this network"
    )


def _text(decision: Decision) -> str:
    return f"{decision.technique} {decision.model_dump(mode='json')}"
