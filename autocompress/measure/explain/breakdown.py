"""Where a model's time goes: a runtime's profile by layers, and what is not a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from autocompress.measure.explain.graph import FileGraph
from autocompress.measure.explain.layers import Layer, layers_of
from autocompress.measure.session import NodeTime

_ROUNDING: Final = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize")
_CONVERTING: Final = (*_ROUNDING, "Cast", "Convert", "ConvertLike")
_REORDERING: Final = ("ReorderInput", "ReorderOutput", "Reorder", "Transpose")
_COPYING: Final = ("MemcpyFromHost", "MemcpyToHost")
# Operators of ONNX Runtime that compute in integers, beside those called `QLinear...`.
_INTEGER: Final = (
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm",
    "QAttention", "MatMulNBits", "QConv", "FusedMatMulInteger",
)  # fmt: skip
# Runtimes count some of what a profile costs as the node's; a node that does nothing shows it.
_MOST_OVERHEAD: Final = 0.9
_KERNEL_TYPE: Final = re.compile(r"(?:^|[_ ])(i8|u8|i4|u4|bf16|f16|f32)$", re.IGNORECASE)
_TYPE_NAMES: Final = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


@final
@dataclass(frozen=True)
class LayerTime:
    """A layer and the nodes of the profile that computed it.

    Attributes:
        milliseconds: their sum.
        precision: `integers`, `float32`, `float16`, `bfloat16`, or empty if not told.
    """

    layer: Layer
    nodes: tuple[NodeTime, ...]
    milliseconds: float
    precision: str

    @property
    def operators(self) -> tuple[str, ...]:
        """The runtime's operators."""
        return tuple(dict.fromkeys(node.operator for node in self.nodes))

    @property
    def blocked(self) -> bool:
        """Whether ONNX Runtime's blocked kernels for float convolutions ran it."""
        return any(node.kernel.endswith("nchwc") for node in self.nodes)


@final
@dataclass(frozen=True)
class Breakdown:
    """A model's time by what it was spent on; milliseconds of one run.

    Profiling takes time itself. Where the profile's sum is more than the latency, an equal part is
    taken off every node, at most 90 % of the shortest node's time, and what is still too much is
    scaled down; the nodes then add up to the latency. Where it is less, the rest is `between_ms`.

    Attributes:
        latency_ms: measured without a profile.
        profile_ms: the profile's sum, nothing taken off.
        layers: those of the file for which the profile has nodes.
        missing: layers of the file for which it has none.
        conversions: nodes that change types: rounding, unrounding, casts.
        layouts: nodes that the runtime put in to reorder or copy values.
        others: all other nodes.
        between_ms: time outside the nodes.
    """

    graph: FileGraph
    latency_ms: float
    profile_ms: float
    layers: tuple[LayerTime, ...]
    missing: tuple[Layer, ...]
    conversions: tuple[NodeTime, ...]
    layouts: tuple[NodeTime, ...]
    others: tuple[NodeTime, ...]
    between_ms: float

    @property
    def layers_ms(self) -> float:
        """The time of all layers."""
        return sum(time.milliseconds for time in self.layers)

    @property
    def node_count(self) -> int:
        """How many nodes ran."""
        rest = (*self.conversions, *self.layouts, *self.others)
        return len(rest) + sum(len(time.nodes) for time in self.layers)

    def layer(self, name: str) -> LayerTime | None:
        """The time of a layer."""
        return next((time for time in self.layers if time.layer.name == name), None)

    def weight_conversions(self, names: Iterable[str]) -> tuple[NodeTime, ...]:
        """The nodes that turn the weights and biases of some layers into float at every run."""
        wanted = {
            key
            for time in self.layers
            if time.layer.name in set(names)
            for key in time.layer.weight_nodes
        }
        return tuple(n for n in self.conversions if wanted & set(n.origins))


def break_down(graph: FileGraph, nodes: Sequence[NodeTime], latency_ms: float) -> Breakdown:
    """Sort a profile's nodes by what they are for.

    Args:
        graph: the file's.
        nodes: the runtime's profile of it.
        latency_ms: of the model, measured without a profile.
    """
    total = sum(node.milliseconds for node in nodes)
    scaled = _without_overhead(nodes, latency_ms)
    layers = layers_of(graph)
    owners = {key: place for place, layer in enumerate(layers) for key in layer.nodes}
    own: list[list[NodeTime]] = [[] for _ in layers]
    conversions, layouts, others = [], [], []
    for node in scaled:
        place = next((owners[key] for key in node.origins if key in owners), None)
        if node.operator in _COPYING or _reorders(graph, node):
            layouts.append(node)
        elif place is not None and node.operator not in _ROUNDING:
            own[place].append(node)
        elif node.operator in (*_CONVERTING, *_REORDERING) and _changes_type(node):
            conversions.append(node)
        else:
            others.append(node)
    times = [_layer_time(layer, found) for layer, found in zip(layers, own, strict=True) if found]
    return Breakdown(
        graph=graph,
        latency_ms=latency_ms,
        profile_ms=total,
        layers=tuple(times),
        missing=tuple(layer for layer, found in zip(layers, own, strict=True) if not found),
        conversions=tuple(conversions),
        layouts=tuple(layouts),
        others=tuple(others),
        between_ms=max(latency_ms - total, 0.0),
    )


def precision_of(node: NodeTime) -> str:
    """What a node computed in: `integers`, a float type, or empty if the runtime does not tell."""
    if node.operator.startswith("QLinear") or node.operator in _INTEGER:
        return "integers"
    if match := _KERNEL_TYPE.search(node.kernel):
        return _TYPE_NAMES.get(match[1].lower(), "integers")
    kind = node.inputs[0].partition("[")[0] if node.inputs else ""
    return "integers" if kind.startswith(("int", "uint")) else kind


def _layer_time(layer: Layer, nodes: Sequence[NodeTime]) -> LayerTime:
    main = max(nodes, key=lambda node: node.milliseconds)
    total = sum(node.milliseconds for node in nodes)
    return LayerTime(layer, tuple(nodes), total, precision_of(main))


def _without_overhead(nodes: Sequence[NodeTime], latency_ms: float) -> list[NodeTime]:
    """The nodes with times that add up to at most the latency; see `Breakdown`."""
    times = [node.milliseconds for node in nodes]
    total = sum(times)
    if total <= latency_ms:
        return list(nodes)
    each = min((total - latency_ms) / len(times), _MOST_OVERHEAD * min(times))
    rest = total - each * len(times)
    factor = latency_ms / rest if rest > 0 else 0.0
    return [replace(n, milliseconds=(n.milliseconds - each) * factor) for n in nodes]


def _types(values: Sequence[str]) -> list[str]:
    return [value.partition("[")[0] for value in values]


def _reorders(graph: FileGraph, node: NodeTime) -> bool:
    """Whether the runtime put a node in to change the order of values, not their type."""
    if node.operator not in _REORDERING or _types(node.inputs[:1]) != _types(node.outputs[:1]):
        return False
    found = [graph.node(key) for key in node.origins]
    return not any(n is not None and n.operator == "Transpose" for n in found)


def _changes_type(node: NodeTime) -> bool:
    if node.operator in _CONVERTING:
        return True
    return bool(node.inputs) and _types(node.inputs[:1]) != _types(node.outputs[:1])
