"""Levels of a search space that save no time by a latency table; they are dropped and listed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from autocompress.config import Objective
from autocompress.device import DeviceProfile
from autocompress.graph import ChannelGroup, NetworkGraph
from autocompress.measure.table.joint import Meeting, begin_of, end_of
from autocompress.measure.table.table import Table
from autocompress.plan import Decision
from autocompress.search.levels import Span, group_times, kept_channels, layer_time
from autocompress.search.space import Parameter, Space
from autocompress.search.variants import Variant
from autocompress.techniques import pruning_ratio_of
from autocompress.techniques.precision import Precision
from autocompress.techniques.technique import Stage

# With any other objective a level may pay in something else than time.
_JUDGED = frozenset({"metric", "latency"})
# Times that differ by less are equal, however well they are known.
_SMALLEST_GAIN = 0.01


@final
@dataclass(frozen=True)
class Thinned:
    """A search space without the levels that do not pay, and why each was dropped."""

    space: Space
    reasons: tuple[str, ...]


def thin_space(
    space: Space,
    graph: NetworkGraph,
    variants: Sequence[Variant],
    table: Table,
    profile: DeviceProfile,
) -> Thinned:
    """Drop levels that are not faster than the next milder one, by entries that were measured.

    Pruning levels are judged with all else unpruned, in every variant, and are dropped if none is
    faster for it. Precisions are judged layer by layer. A level of which an entry is missing stays.

    Args:
        variants: see `find_variants`.
    """
    parameters: list[Parameter] = []
    reasons: list[str] = []
    for parameter in space.parameters:
        dropped: Mapping[Decision, str] = {}
        if parameter.tied:
            # What does not pay for one of several targets may pay for the others.
            pass
        elif parameter.stage is Stage.PRUNE:
            group = next((g for g in graph.groups if g.name == parameter.target), None)
            if group is not None:
                dropped = _slow_prunings(parameter, group, variants, table, profile)
        elif parameter.stage is Stage.QUANTIZE:
            dropped = _slow_precisions(parameter, variants, table)
        reasons += dropped.values()
        kept = tuple(d for d in parameter.decisions if d not in dropped)
        if kept:
            parameters.append(replace(parameter, decisions=kept))
    return Thinned(replace(space, parameters=tuple(parameters)), tuple(reasons))


def latency_alone(objectives: Sequence[Objective]) -> bool:
    """Whether a level that saves no time saves nothing that the search goes by."""
    return "latency" in objectives and set(objectives) <= _JUDGED


def is_faster(new: Span, old: Span) -> bool:
    """Whether the new time is under the old one by more than the noise of both."""
    noise = math.hypot(new.noise_ms, old.noise_ms)
    return old.latency_ms - new.latency_ms > max(noise, _SMALLEST_GAIN * old.latency_ms)


def _slow_prunings(
    parameter: Parameter,
    group: ChannelGroup,
    variants: Sequence[Variant],
    table: Table,
    profile: DeviceProfile,
) -> dict[Decision, str]:
    pruning = [d for d in parameter.decisions if pruning_ratio_of(d)]
    decisions = {d: kept_channels(group, d, profile) for d in pruning}
    sizes = sorted(set(decisions.values()), reverse=True)
    times = [group_times(variant, group, sizes, table) for variant in variants]
    reasons: dict[int, str] = {}
    milder = group.size
    for kept in sizes:
        known = [(t[milder], t[kept]) for t in times if milder in t and kept in t]
        if len(known) < len(times) or any(is_faster(new, old) for old, new in known):
            milder = kept
            continue
        texts = ", ".join(
            f"{v.name} {old.latency_ms:.4f} -> {new.latency_ms:.4f} ms"
            for v, (old, new) in zip(variants, known, strict=True)
        )
        reasons[kept] = f"{group.name} {milder} -> {kept} channels: {texts}, no faster"
    return {d: reasons[kept] for d, kept in decisions.items() if kept in reasons}


def _slow_precisions(
    parameter: Parameter, variants: Sequence[Variant], table: Table
) -> dict[Decision, str]:
    dropped: dict[Decision, str] = {}
    layer = parameter.target
    milder = variants[0]
    for variant in variants[1:]:
        if variant.precision not in parameter.decisions or layer not in variant.quantized:
            continue
        assert isinstance(variant.precision, Precision)
        old, new = layer_time(milder, layer, table), layer_time(variant, layer, table)
        if old is None or new is None:
            continue
        spared = _conversions(variant, layer, table)
        if is_faster(new, replace(old, latency_ms=old.latency_ms + spared)):
            milder = variant
            continue
        dropped[variant.precision] = (
            f"{layer} at {variant.name}: {milder.name} {old.latency_ms:.4f} ms -> "
            f"{new.latency_ms:.4f} ms, no faster"
        )
    return dropped


def _conversions(variant: Variant, layer: str, table: Table) -> float:
    """What it would cost to convert for this layer alone, were its neighbours as in the variant."""
    cost = 0.0
    for edge in variant.cut.edges:
        producer, consumer = variant.cut.blocks[edge.producer], variant.cut.blocks[edge.consumer]
        tensor = producer.output_types[edge.output]
        ends = (end_of(producer), begin_of(consumer))
        here = [variant.layers[edge.producer] == layer, variant.layers[edge.consumer] == layer]
        floats = [
            end.removeprefix("integer ") if own else end
            for end, own in zip(ends, here, strict=True)
        ]
        if any(here) and edge.input in consumer.main_inputs:
            cost += max(
                table.meeting(Meeting.between(floats[0], floats[1], tensor)).latency_ms, 0.0
            )
    return cost
