"""What every level of a search space takes by a latency table, all else unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from autocompress.device import DeviceProfile
from autocompress.errors import MeasurementError
from autocompress.graph import ChannelGroup, NetworkGraph
from autocompress.graph.groups import kept_size
from autocompress.measure.table.block import Block
from autocompress.measure.table.channels import Channels, channels_of, with_channels
from autocompress.measure.table.table import Table
from autocompress.plan import Decision
from autocompress.search.space import Space
from autocompress.search.variants import Variant
from autocompress.techniques import pruning_ratio_of
from autocompress.techniques.technique import Stage


@final
@dataclass(frozen=True)
class Span:
    """How long some blocks take, with the half-width of the 95 % interval."""

    latency_ms: float
    noise_ms: float


def level_blocks(
    space: Space, graph: NetworkGraph, variants: Sequence[Variant], profile: DeviceProfile
) -> tuple[Block, ...]:
    """The blocks that all of `thin_space` needs in the table, each once."""
    found = {block.key: block for variant in variants for block in variant.cut.blocks}
    for group in graph.groups:
        for kept in kept_sizes(space, group, profile):
            for variant in variants:
                changed = pruned_blocks(variant, group, kept)
                found |= {block.key: block for block in (changed or {}).values()}
    return tuple(found.values())


def kept_sizes(space: Space, group: ChannelGroup, profile: DeviceProfile) -> tuple[int, ...]:
    """Channel counts that a space offers for a group, the mildest first."""
    sizes = {
        kept_channels(group, decision, profile)
        for parameter in space.parameters
        if parameter.stage is Stage.PRUNE and group.name in parameter.targets
        for decision in parameter.decisions
        if pruning_ratio_of(decision)
    }
    return tuple(sorted(sizes, reverse=True))


def group_times(
    variant: Variant, group: ChannelGroup, sizes: Sequence[int], table: Table
) -> dict[int, Span]:
    """What the blocks that a group runs through take together, by channel count.

    A count for which one of them was not measured, or that cannot be had alone, is left out.

    Args:
        sizes: channel counts below the group's; its own is added.
    """
    changes = {kept: pruned_blocks(variant, group, kept) for kept in sizes}
    touched = sorted({index for changed in changes.values() for index in changed or {}})
    found: dict[int, Span] = {}
    for kept, changed in ((group.size, {}), *changes.items()):
        if changed is not None and touched:
            blocks = [changed.get(i, variant.cut.blocks[i]) for i in touched]
            span = _total(blocks, table)
            found |= {} if span is None else {kept: span}
    return found


def pruned_blocks(variant: Variant, group: ChannelGroup, kept: int) -> dict[int, Block] | None:
    """The blocks of a variant that change if a group keeps so many channels, by index.

    None if the cut shows no way to thin the group alone.
    """
    counts = _counts(group, kept)
    changed: dict[int, Block] = {}
    made: dict[str, Block] = {}
    outputs: dict[str, int] = {}
    for index, (placed, layer) in enumerate(zip(variant.cut.placed, variant.layers, strict=True)):
        old = channels_of(placed.block)
        reads_changed = [name for name in placed.inputs if name in made]
        if not reads_changed and not counts.keys() & {(layer, "in"), (layer, "out")}:
            continue
        if old is None:
            return None
        new = Channels(
            old.inputs - counts.get((layer, "in"), 0), old.outputs - counts.get((layer, "out"), 0)
        )
        if not layer and reads_changed:
            count = outputs[reads_changed[0]]
            new = Channels(count, count)
        try:
            block = placed.block if new == old else with_channels(placed.block, new)
        except MeasurementError:
            return None
        for name, kind in zip(placed.inputs, block.inputs, strict=True):
            if name in made and kind not in made[name].output_types:
                return None
        if block != placed.block:
            changed[index] = block
            made |= dict.fromkeys(placed.outputs, block)
            outputs |= dict.fromkeys(placed.outputs, new.outputs)
    return changed


def _counts(group: ChannelGroup, kept: int) -> dict[tuple[str, str], int]:
    """How many channels each side of each module loses."""
    return {
        (member.module, member.side): (group.size - kept) * member.per_channel
        for member in group.members
    }


def kept_channels(group: ChannelGroup, decision: Decision, profile: DeviceProfile) -> int:
    """The channels that a decision leaves of a group."""
    step = group.step(profile.channel_multiple)
    return kept_size(group.size, pruning_ratio_of(decision), step)


def _total(blocks: Sequence[Block], table: Table) -> Span | None:
    entries = [table.lookup(block) for block in blocks]
    known = [entry for entry in entries if entry is not None]
    if len(known) < len(entries):
        return None
    return Span(sum(e.latency_ms for e in known), math.hypot(*(e.noise_ms for e in known)))


def layer_time(variant: Variant, layer: str, table: Table) -> Span | None:
    """What a layer's blocks take in a variant; None if one was not measured."""
    blocks = [
        b for b, name in zip(variant.cut.blocks, variant.layers, strict=True) if name == layer
    ]
    return _total(blocks, table) if blocks else None


@final
@dataclass(frozen=True)
class LayerRow:
    """What a layer takes in every variant, unpruned, in ms; None where it was not measured."""

    layer: str
    channels: str
    latency_ms: dict[str, float | None]


@final
@dataclass(frozen=True)
class GroupRow:
    """What the blocks of a channel group take at one channel count, as `LayerRow`."""

    group: str
    size: int
    kept: int
    latency_ms: dict[str, float | None]


def layer_rows(graph: NetworkGraph, variants: Sequence[Variant], table: Table) -> list[LayerRow]:
    """Every layer, the slowest first."""
    rows = []
    for layer in graph.layers:
        spans = {v.name: layer_time(v, layer.name, table) for v in variants}
        times = {name: None if s is None else s.latency_ms for name, s in spans.items()}
        kernel = "x".join(map(str, layer.kernel_size))
        text = f"{layer.in_channels} -> {layer.out_channels}{f', {kernel}' if kernel else ''}"
        rows.append(LayerRow(layer.name, text, times))
    return sorted(rows, key=lambda row: -max(t or 0.0 for t in row.latency_ms.values()))


def group_rows(
    space: Space,
    graph: NetworkGraph,
    variants: Sequence[Variant],
    table: Table,
    profile: DeviceProfile,
) -> list[GroupRow]:
    """Every level of every channel group, its full size first."""
    rows = []
    for group in graph.groups:
        sizes = kept_sizes(space, group, profile)
        times = {v.name: group_times(v, group, sizes, table) for v in variants}
        for kept in (group.size, *sizes) if sizes else ():
            latency_ms = {n: t[kept].latency_ms if kept in t else None for n, t in times.items()}
            rows.append(GroupRow(group.name, group.size, kept, latency_ms))
    return rows
