"""What a search could change in a network, module by module, and why it leaves the rest alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

from autocompress.config import SearchSpace, load_experiment, load_search_space
from autocompress.device import DeviceProfile, load_profile
from autocompress.errors import ExportError
from autocompress.graph import Block, ChannelGroup, NetworkGraph, trace
from autocompress.graph.blocks import is_within
from autocompress.graph.owners import Owner, find_owners
from autocompress.search.arrange import arranged
from autocompress.search.prepare import make_exporter
from autocompress.search.progress import Progress
from autocompress.search.space import Space, open_space, unused_values
from autocompress.search.space_rules import Rules
from autocompress.techniques import (
    BlockTechnique,
    GroupTechnique,
    LayerTechnique,
    technique_named,
    technique_of,
)
from autocompress.techniques.technique import NETWORK
from autocompress.workload import check_workload, load_workload

_DIVIDING = "low_rank"


@final
@dataclass(frozen=True)
class ModuleRow:
    """A module that owns parameters.

    Attributes:
        weight_share: of the network's parameters.
        macs_share: of all multiply-accumulates that are known; None where it is not known.
        techniques: of the search space, that can be applied to it or to channels that it makes.
        reason: why there is none; or why some technique of the space is not among them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_share: float
    macs_share: float | None
    techniques: tuple[str, ...]
    reason: str


@final
@dataclass(frozen=True)
class GroupRow:
    """A channel group: its size in channels or heads, and what can be done to it or why not."""

    name: str
    size: int
    heads: bool
    techniques: tuple[str, ...]
    reason: str


@final
@dataclass(frozen=True)
class BlockRow:
    """A residual block that could be taken out.

    Attributes:
        layers: how many are in it.
        weight_share: of the network's parameters, norms and the like among them.
        macs_share: of its layers, of all multiply-accumulates that are known.
        techniques: of the search space, that take it out.
        reason: why there is none.
    """

    name: str
    layers: int
    weight_share: float
    macs_share: float
    techniques: tuple[str, ...]
    reason: str


@final
@dataclass(frozen=True)
class Inspection:
    """What a search could change in a network.

    Attributes:
        blocks: residual blocks that the network can do without.
        network_techniques: those that work on the network as a whole.
        unused: values of the search space that nothing takes.
        notes: what could not be found out, and what a search would refuse.
    """

    modules: tuple[ModuleRow, ...]
    groups: tuple[GroupRow, ...]
    blocks: tuple[BlockRow, ...]
    network_techniques: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def weight_share(self) -> float:
        """Share of the parameters that some technique can be applied to."""
        return sum(row.weight_share for row in self.modules if row.techniques)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(path: Path, progress: Progress) -> Inspection:
    """Look at an experiment's network; nothing is measured, and nothing is written.

    Raises:
        AutocompressError: whatever is wrong with experiment, device, workload or network. A network
            that cannot be exported is looked at all the same.
    """
    experiment = load_experiment(path)
    space = load_search_space(experiment.search_space, path)
    profile = load_profile(experiment.device, path)
    progress.stage("load workload")
    workload = load_workload(experiment.workload, path)
    progress.stage("check workload")
    notes = list(check_workload(workload))
    workload = arranged(workload)
    progress.stage("trace network")
    graph = trace(workload.network, workload.example_inputs)
    progress.stage("export network")
    try:
        graph = graph.leaving(make_exporter(workload, graph).faults)
    except ExportError as reason:
        notes.append(f"A search refuses this network. {reason.what}")
    owners = find_owners(workload.network, workload.example_inputs, graph)
    found = inspect_network(graph, owners, space, profile)
    return replace(found, notes=(*notes, *found.notes))


def inspect_network(
    graph: NetworkGraph, owners: Sequence[Owner], space: SearchSpace, device: DeviceProfile
) -> Inspection:
    """What a search space could change in a network that was traced.

    Args:
        graph: with the faults that the export has found.
        owners: every module of the network that owns parameters.

    Raises:
        ConfigError: the search space cannot be used as written.
    """
    built = open_space(graph, space, device)
    rules = Rules(graph, space, device)
    taken = _taken(built)
    weights = sum(owner.weights for owner in owners) or 1
    macs = sum(owner.macs or 0 for owner in owners) or 1
    made = _made_by(graph, taken)
    modules = []
    for owner in owners:
        own = () if owner.reason else taken.get(owner.name, ())
        techniques = tuple(dict.fromkeys((*made.get(owner.name, ()), *own)))
        share = None if owner.macs is None else owner.macs / macs
        reason = owner.reason or _layer_reason(rules, owner, own)
        modules.append(
            ModuleRow(
                owner.name, owner.kind, owner.shape, owner.weights / weights, share, techniques,
                reason,
            )
        )  # fmt: skip
    groups = tuple(_group_row(rules, group, taken) for group in graph.groups)
    blocks: list[BlockRow] = []
    for block in graph.blocks:
        inner = [owner for owner in owners if is_within(f"{owner.name}.", [block.name])]
        shares = (
            sum(owner.weights for owner in inner) / weights,
            sum(owner.macs or 0 for owner in inner) / macs,
        )
        blocks.append(_block_row(rules, block, shares, taken.get(block.name, ())))
    unused, whole = tuple(unused_values(space, built, device)), taken.get(NETWORK, ())
    return Inspection(tuple(modules), groups, tuple(blocks), whole, unused, graph.notes)


def _taken(space: Space) -> dict[str, tuple[str, ...]]:
    """Names of the techniques that each target may get."""
    found: dict[str, dict[str, None]] = {}
    for step in space.steps():
        technique = technique_of(step.decision)
        # A channel group may be called as the layer that makes it.
        place = _group_place(step.target) if isinstance(technique, GroupTechnique) else step.target
        found.setdefault(place, {})[technique.name] = None
    return {target: tuple(names) for target, names in found.items()}


def _group_place(name: str) -> str:
    return f"group {name}"


def _made_by(graph: NetworkGraph, taken: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Techniques that remove channels of a layer's output, by the layer's name."""
    layers = {layer.name for layer in graph.layers}
    return {
        member.module: taken[_group_place(group.name)]
        for group in graph.groups
        if _group_place(group.name) in taken
        for member in group.members
        if member.side == "out" and member.module in layers
    }


def _layer_reason(rules: Rules, owner: Owner, own: Sequence[str]) -> str:
    """Why a layer gets no technique of the search space, or not all of them."""
    offered = [technique_named(name) for name in rules.space.techniques]
    kinds = [t for t in offered if isinstance(t, LayerTechnique)]
    if owner.undivided and any(t.name == _DIVIDING for t in kinds):
        return f"no {_DIVIDING}: {owner.undivided}"
    if own or not kinds:
        return ""
    if all(rules.excludes(t, owner.name) for t in kinds):
        return "the search space excludes it"
    return "no value of the search space suits it and the device, or all is fixed"


def _group_row(rules: Rules, group: ChannelGroup, taken: dict[str, tuple[str, ...]]) -> GroupRow:
    techniques = taken.get(_group_place(group.name), ())
    reason = group.reason
    offered = [technique_named(name) for name in rules.space.techniques]
    kinds = [t for t in offered if isinstance(t, GroupTechnique)]
    if not reason and not techniques:
        reason = "no value of the search space suits it"
        if not kinds:
            reason = "no technique of the search space removes channels"
        elif all(rules.excludes(t, group.name) for t in kinds):
            reason = "the search space excludes it"
    return GroupRow(group.name, group.size, bool(group.heads), techniques, reason)


def _block_row(
    rules: Rules, block: Block, shares: tuple[float, float], techniques: tuple[str, ...]
) -> BlockRow:
    offered = [technique_named(name) for name in rules.space.techniques]
    kinds = [t for t in offered if isinstance(t, BlockTechnique)]
    reason = ""
    if not techniques:
        reason = "no value of the search space suits it, or it is fixed"
        if not kinds:
            reason = "no technique of the search space takes blocks out"
        elif all(rules.excludes(t, block.name) for t in kinds):
            reason = "the search space excludes it, or a layer in it"
    return BlockRow(block.name, len(block.layers), *shares, techniques, reason)
