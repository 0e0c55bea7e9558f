"""Bytes of a plan's file and of its download, as sums over layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from autocompress.graph import NetworkGraph
from autocompress.plan import Decision
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.costs.layer_shapes import (
    LayerState,
    PartShape,
    ShapedLayer,
    droppable,
    shaped_layers,
)
from autocompress.search.costs.layer_times import precision_class
from autocompress.search.space import Space
from autocompress.techniques import LayerTechnique, technique_of
from autocompress.techniques.weight_prune import (
    WeightPrune,
    kept_sparsity,
    pattern_sparsity,
)

# What a layer more, and one that is rounded, add to a file's graph; seen in this package's files.
_PART_BYTES: Final = 170
_ROUNDED_BYTES: Final = 545
# Its name is in those of ten values and nodes.
_ROUNDED_NAMES: Final = 10
# A rounded layer's bias has scales, and both have zero points.
_ROUNDED_CHANNEL_BYTES: Final = 5
_BIAS_BYTES: Final = 4
_FLOAT_BITS: Final = 32.0

Bits = Mapping[Decision | None, float]


def file_costs(
    graph: NetworkGraph, space: Space, multiple: int, original_bytes: int
) -> FactoredSum:
    """Bytes of a plan's ONNX file, one factor per layer: weights, scales, biases, nodes.

    A factor per block that may be taken out follows, of what is in it beside its layers.

    Every layer is taken to have a bias in the file, as batch norms are folded into it.

    Args:
        multiple: the device's `channel_multiple`.
        original_bytes: of the original's file; what its layers do not explain is the constant.
    """
    shaped = shaped_layers(graph, space, multiple)
    layers = [_factor(x, lambda name, state: _file_bytes(name, state, multiple)) for x in shaped]
    return _costs([*layers, *_others(graph, space, _FLOAT_BITS)], original_bytes)


def download_costs(
    graph: NetworkGraph,
    space: Space,
    multiple: int,
    original_bytes: int,
    bits_per_weight: Bits,
) -> FactoredSum:
    """Bytes of a plan's coded container, one factor per layer, then one per block.

    Args:
        multiple: the device's `channel_multiple`.
        original_bytes: of the original's container; what its layers do not explain is the constant.
        bits_per_weight: coded bits of a weight, by what it is quantized to; the key None is for
            float weights. Without a key for a decision the bytes that the file has are taken, and
            32 bits for floats.
    """
    shaped = shaped_layers(graph, space, multiple)

    def coded(name: str, state: LayerState) -> float:
        bits = bits_per_weight.get(state.quantize)
        if bits is None and state.quantize is None:
            bits = _FLOAT_BITS
        return sum(
            (
                _stored(part, state.quantize, multiple)
                if bits is None
                else part.weights * _density(state) * bits / 8
            )
            for part in state.parts
        ) + _bias_bytes(state)

    others = _others(graph, space, bits_per_weight.get(None, _FLOAT_BITS))
    return _costs([*(_factor(x, coded) for x in shaped), *others], original_bytes)


def _factor(layer: ShapedLayer, measure: Callable[[str, LayerState], float]) -> Factor:
    name = layer.layer.name
    values = [measure(name, layer.state(choice)) for choice in layer.combinations()]
    table = np.array(values, dtype=np.float64).reshape(layer.table_shape)
    return Factor(name, layer.parameters, table)


def _others(graph: NetworkGraph, space: Space, bits: float) -> list[Factor]:
    """What blocks hold beside their layers: norms that are not part of one, bare parameters."""
    return [
        Factor(
            x.block.name,
            (x.parameter.name,),
            np.array([x.block.other_weights * bits / 8, *[0.0] * x.parameter.highest]),
        )
        for x in droppable(graph, space)
    ]


def _costs(factors: Sequence[Factor], original: float) -> FactoredSum:
    return FactoredSum(original - sum(factor.at({}) for factor in factors), tuple(factors))


def _file_bytes(name: str, state: LayerState, multiple: int) -> float:
    fixed = _ROUNDED_BYTES + _ROUNDED_NAMES * len(name)
    rounded = precision_class(state.quantize) != "float"
    # Those of a single node are in the constant.
    nodes = _PART_BYTES * (len(state.parts) - 1)
    for part in state.parts:
        nodes += (fixed + _ROUNDED_CHANNEL_BYTES * part.out_channels) if rounded else 0
    weights = sum(_stored(part, state.quantize, multiple) for part in state.parts)
    return weights + nodes + _bias_bytes(state)


def _stored(part: PartShape, decision: Decision | None, multiple: int) -> int:
    """Bytes of a part's weight in the file, scales and codebooks included."""
    technique = None if decision is None else technique_of(decision)
    if decision is None or not isinstance(technique, LayerTechnique):
        return 4 * part.weights
    return technique.stored_bytes(part.layer("part"), decision, multiple)


def _bias_bytes(state: LayerState) -> int:
    """Of the last part: the others of a decomposed layer have none."""
    return _BIAS_BYTES * sum(part.out_channels for part in state.parts[-1:])


def _density(state: LayerState) -> float:
    """The share of weights that are not zero: a container hardly stores zeros."""
    sparse = state.sparsify
    if not isinstance(sparse, WeightPrune):
        return 1.0
    found = pattern_sparsity(sparse.pattern)
    return 1 - (kept_sparsity(sparse.sparsity) if found is None else found)
