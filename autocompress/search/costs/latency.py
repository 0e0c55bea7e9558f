"""Latency as a sum over layers and what links them, from a dozen files profiled in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from autocompress.build import Builder
from autocompress.graph import NetworkGraph
from autocompress.measure.client import Worker
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.costs.layer_shapes import (
    Droppable,
    LayerState,
    ShapedLayer,
    droppable,
    shaped_layers,
)
from autocompress.search.costs.layer_times import (
    Boundary,
    FileRow,
    LayerTimes,
    NodeRow,
    PrecisionClass,
    fit_layer_times,
    precision_class,
)
from autocompress.search.costs.probes import Link, Probe, Probes, Probing, probe
from autocompress.search.space import Space
from autocompress.techniques.technique import Stage

# Multiply-accumulates in a class take so long as a share of those in floats; of common CPUs.
_CLASS_TIME: Final[Mapping[PrecisionClass, float]] = {
    "float": 1.0, "stored": 1.0, "static": 0.45, "dynamic": 0.6,
}  # fmt: skip


def latency_costs(
    graph: NetworkGraph, space: Space, builder: Builder, worker: Worker, probing: Probing
) -> FactoredSum:
    """Milliseconds of a plan's file: a factor for every layer, link and block, in this order.

    Training, whole-network techniques and single weights that are pruned cost nothing here.

    Args:
        worker: best made with `quick_profile`; the probes' latencies are most of the time.

    Raises:
        MeasurementError: the runtime has no profile of its nodes, or it does not tell layers;
            take `macs_costs` then.
        ExportError: the original cannot be exported.
    """
    shaped = shaped_layers(graph, space, probing.multiple)
    found = probe(shaped, space, builder, worker, probing)
    return fitted_costs(shaped, found, droppable(graph, space))


def fitted_costs(
    shaped: Sequence[ShapedLayer], probes: Probes, blocks: Sequence[Droppable] = ()
) -> FactoredSum:
    """The sum that fits some probes best.

    Args:
        blocks: those that may be taken out.

    Raises:
        MeasurementError: there is nothing to fit.
    """
    files = [_file_row(shaped, blocks, probes.links, p) for p in probes.probes]
    nodes = [row for p in probes.probes for row in _node_rows(shaped, p)]
    times = fit_layer_times(nodes, files)
    by_name = {layer.layer.name: layer for layer in shaped}
    linked = [_link_factor(by_name[x.first], by_name[x.second], x, times) for x in probes.links]
    layers = [_layer_factor(layer, times) for layer in shaped]
    others = [_block_factor(block, times) for block in blocks]
    return FactoredSum(
        times.constant_ms, (*layers, *(f for f in (*linked, *others) if f.values.any()))
    )


def macs_costs(graph: NetworkGraph, space: Space, multiple: int, original_ms: float) -> FactoredSum:
    """A guess without any profile: multiply-accumulates by precision, in the original's latency."""
    per_mac = original_ms / graph.macs
    factors = []
    for shaped in shaped_layers(graph, space, multiple):
        values = [
            per_mac
            * _CLASS_TIME[precision_class(state.quantize)]
            * sum(p.macs for p in state.parts)
            for state in map(shaped.state, shaped.combinations())
        ]
        table = np.array(values, dtype=np.float64).reshape(shaped.table_shape)
        factors.append(Factor(shaped.layer.name, shaped.parameters, table))
    return FactoredSum(0.0, tuple(factors))


def _layer_factor(shaped: ShapedLayer, times: LayerTimes) -> Factor:
    name = shaped.layer.name
    values = [times.layer_ms(name, shaped.state(values)) for values in shaped.combinations()]
    table = np.array(values, dtype=np.float64).reshape(shaped.table_shape)
    return Factor(name, shaped.parameters, table)


def _block_factor(block: Droppable, times: LayerTimes) -> Factor:
    values = [times.block_ms(block.elements), *[0.0] * block.parameter.highest]
    return Factor(block.block.name, (block.parameter.name,), np.array(values))


def _link_factor(first: ShapedLayer, second: ShapedLayer, link: Link, times: LayerTimes) -> Factor:
    """Over the first layer's output channels, what both are quantized to, and whether they stay."""
    prunings = [p.parameter for p in first.prunings if any(out for _, out in p.lost)]
    roundings = [layer.parameter(Stage.QUANTIZE) for layer in (first, second)]
    further = (*roundings, first.drop, second.drop)
    own = {p.name: p for p in (*prunings, *(r for r in further if r is not None))}
    shape = [p.highest + 1 for p in own.values()]
    values = []
    for combination in itertools.product(*map(range, shape)):
        indices = dict(zip(own, combination, strict=True))
        found = _boundaries(first.chosen(indices), second.chosen(indices), link)
        values.append(sum(map(times.boundary_ms, found)))
    name = f"{link.first} {'+' if link.summed else '->'} {link.second}"
    return Factor(name, tuple(own), np.array(values, dtype=np.float64).reshape(shape))


def _boundaries(first: LayerState, second: LayerState, link: Link) -> list[Boundary]:
    """The boundary between two layers; none where one of them is gone."""
    if not first.parts or not second.parts:
        return []
    kinds = precision_class(first.quantize), precision_class(second.quantize)
    return [Boundary(kinds, first.parts[-1].out_elements, link.summed)]


def _file_row(
    shaped: Sequence[ShapedLayer],
    blocks: Sequence[Droppable],
    links: Sequence[Link],
    probe: Probe,
) -> FileRow:
    states = {s.layer.name: s.chosen(probe.values) for s in shaped}
    boundaries = [b for x in links for b in _boundaries(states[x.first], states[x.second], x)]
    in_blocks = sum(block.elements for block in blocks if block.kept(probe.values))
    return FileRow(tuple(states.items()), tuple(boundaries), probe.milliseconds, in_blocks)


def _node_rows(shaped: Sequence[ShapedLayer], probe: Probe) -> list[NodeRow]:
    states = {s.layer.name: s.chosen(probe.values) for s in shaped}
    return [
        NodeRow(name, states[name].parts[i], precision_class(states[name].quantize), milliseconds)
        for name, i, milliseconds in probe.parts
    ]
