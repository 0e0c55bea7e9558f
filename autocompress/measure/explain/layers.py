"""The layers of an ONNX file: nodes that multiply by constant weights, and what the file wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, final

import numpy as np

from autocompress.measure.explain.graph import Constant, FileGraph, FileNode
from autocompress.measure.explain.rounding import UNROUNDED, Rounding, rounding_of

# Where each operator takes its weight.
_WEIGHT_INPUT: Final = {
    "Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "ConvInteger": 1, "MatMulInteger": 1,
    "QLinearConv": 3, "QLinearMatMul": 3, "MatMulNBits": 1, "QGemm": 3, "FusedConv": 1,
    "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QConv": 3,
}  # fmt: skip
_DYNAMIC: Final = ("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul")
_STATIC: Final = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat")
# Operators that only move weights about.
_MOVING: Final = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten")

Scheme = Literal["float", "static", "dynamic", "weights only", "blocks"]


@final
@dataclass(frozen=True)
class Layer:
    """A layer of the file; a layer that is called several times has several nodes.

    Attributes:
        name: of its weight without `.weight` and what quantizers append; else its node's.
        operator: `Conv`, `Gemm`, ...
        nodes: keys of the nodes that compute it, with those that scale an integer result.
        weight_nodes: keys of the nodes that make its weight and bias from constants.
        weight_type: the stored weight's, such as `float32`, `int8`, or a function's name.
        in_channels: 0 if not known.
        groups: of a convolution.
        scheme: what the file wants: integers with fixed ranges (`static`) or ranges of each run
            (`dynamic`), integer weights for a float layer (`weights only`), or `blocks` of 4 bits.
        rounding: how the file rounds its input and output.
        axis: of the weight's scales; None if there is one for all or it is not told.
        zero_point: whether the weight's rounding gives a zero point.
    """

    name: str
    operator: str
    nodes: tuple[str, ...]
    weight_nodes: tuple[str, ...]
    weight_type: str
    out_channels: int
    in_channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    scheme: Scheme = "float"
    rounding: Rounding = UNROUNDED
    axis: int | None = None
    zero_point: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the file wants it computed in integers."""
        return self.scheme in ("static", "dynamic", "blocks")

    @property
    def weights(self) -> int:
        """How many weights it has; 0 if not known."""
        return self.out_channels * self.in_channels * int(np.prod(self.kernel)) // self.groups

    @property
    def label(self) -> str:
        """What it is, for people: `Conv 3x3, 32 to 64 channels`."""
        size = "x".join(map(str, self.kernel))
        grouped = f", {self.groups} groups" if self.groups > 1 else ""
        widths = f", {self.in_channels} to {self.out_channels}" if self.in_channels else ""
        return f"{self.operator}{' ' + size if size else ''}{widths}{grouped}"


def layers_of(graph: FileGraph) -> tuple[Layer, ...]:
    """The layers of a file, in its order."""
    found: dict[str, Layer] = {}
    for node in graph.nodes:
        layer = _layer(graph, node)
        if layer is None:
            continue
        if layer.name in found:
            first = found[layer.name]
            weight_nodes = tuple(dict.fromkeys((*first.weight_nodes, *layer.weight_nodes)))
            layer = replace(first, nodes=(*first.nodes, *layer.nodes), weight_nodes=weight_nodes)
        found[layer.name] = layer
    return tuple(found.values())


def _layer(graph: FileGraph, node: FileNode) -> Layer | None:
    place = _WEIGHT_INPUT.get(node.operator)
    if place is None or len(node.inputs) <= place:
        return None
    source = _trace(graph, node.inputs[place])
    if source is None:
        return None
    name = layer_name(source.initializer, node.key)
    out_channels, in_channels, kernel = _sizes(node, source)
    bias = _trace(graph, node.inputs[-1]) if len(node.inputs) > place + 1 else None
    scaling = _scaling(graph, node) if node.operator in _DYNAMIC else ()
    rounding = rounding_of(graph, node)
    bits = node.attributes.get("bits") or 4
    return Layer(
        name=name,
        operator=node.operator,
        nodes=(node.key, *(other.key for other in scaling)),
        weight_nodes=tuple(n.key for n in (*source.nodes, *(bias.nodes if bias else ()))),
        weight_type=source.type if node.operator != "MatMulNBits" else f"int{bits}",
        out_channels=out_channels,
        in_channels=in_channels,
        kernel=kernel,
        groups=int(node.attributes.get("group") or 1),
        scheme=_scheme(node, source, rounding),
        rounding=rounding,
        axis=source.axis,
        zero_point=source.zero_point,
    )


def layer_name(initializer: str, key: str) -> str:
    """What a layer is called: by its weight if that is named as PyTorch names them."""
    before, mark, _ = initializer.partition(".weight")
    return before if mark and before else key


@final
@dataclass(frozen=True)
class _Source:
    """Where a weight comes from.

    Attributes:
        nodes: those that make it of constants, from the layer backwards.
        shape: as the layer reads it; output channels first if `outputs_first`.
        rounded: whether it is stored in integers that `DequantizeLinear` reads.
    """

    initializer: str
    type: str
    shape: tuple[int, ...]
    nodes: tuple[FileNode, ...]
    rounded: bool = False
    outputs_first: bool = False
    axis: int | None = None
    zero_point: bool = True


def _trace(graph: FileGraph, name: str) -> _Source | None:
    """Follow a value back to the constant that it is made of; None if it is computed of inputs."""
    nodes: list[FileNode] = []
    rounded: FileNode | None = None
    while name not in graph.constants:
        maker = graph.maker(name)
        if maker is None or not maker.inputs:
            return None
        nodes.append(maker)
        if maker.domain not in ("", "ai.onnx", "com.microsoft"):
            return _packed(graph, maker, tuple(nodes))
        if maker.operator == "DequantizeLinear":
            rounded = maker
        elif maker.operator not in (*_MOVING, "QuantizeLinear"):
            return None
        name = maker.inputs[0]
    constant = graph.constants[name]
    shape = constant.shape
    for node in reversed(nodes):
        if node.operator == "Transpose":
            order = node.attributes.get("perm") or range(len(shape))[::-1]
            shape = tuple(shape[i] for i in order)
    scales = graph.constants.get(rounded.inputs[1]) if rounded else None
    return _Source(
        initializer=name,
        type=constant.type,
        shape=shape,
        nodes=tuple(nodes),
        rounded=rounded is not None,
        axis=_axis(rounded, scales, len(shape)) if rounded and scales else None,
        zero_point=rounded is None or len(rounded.inputs) > 2,
    )


def _axis(rounded: FileNode, scales: Constant, dimensions: int) -> int | None:
    if int(np.prod(scales.shape)) <= 1:
        return None
    axis = rounded.attributes.get("axis")
    return int(1 if axis is None else axis) % max(dimensions, 1)


def _packed(graph: FileGraph, maker: FileNode, nodes: tuple[FileNode, ...]) -> _Source | None:
    """A weight that a function of the file's own unpacks; it is told the weight's shape."""
    constants = [graph.constants.get(name) for name in maker.inputs]
    if not constants or any(constant is None for constant in constants):
        return None
    told = constants[-1].values if constants[-1] and constants[-1].type == "int64" else None
    shape = tuple(int(size) for size in told) if told is not None and told.ndim == 1 else ()
    return _Source(maker.inputs[0], maker.operator, shape, nodes, outputs_first=True)


def _sizes(node: FileNode, source: _Source) -> tuple[int, int, tuple[int, ...]]:
    """Output channels, input channels and the kernel's size; zeros for what is not known."""
    if node.operator == "MatMulNBits":
        return int(node.attributes.get("N") or 0), int(node.attributes.get("K") or 0), ()
    shape = source.shape
    if len(shape) < 2:
        return 0, 0, ()
    groups = int(node.attributes.get("group") or 1)
    if node.operator == "ConvTranspose":
        return shape[1] * groups, shape[0], shape[2:]
    if "Conv" in node.operator:
        return shape[0], shape[1] * groups, shape[2:]
    first = source.outputs_first or bool(node.attributes.get("transB"))
    return (shape[0], shape[1], ()) if first else (shape[-1], shape[-2], ())


def _scheme(node: FileNode, source: _Source, rounding: Rounding) -> Scheme:
    if node.operator == "MatMulNBits":
        return "blocks"
    if node.operator in _DYNAMIC:
        return "dynamic"
    if node.operator in _STATIC:
        return "static"
    if source.outputs_first or source.rounded:
        return "static" if rounding.input_type != "float" else "weights only"
    return "float"


def _scaling(graph: FileGraph, node: FileNode) -> Sequence[FileNode]:
    """The nodes that turn an integer product into float: Cast, two Mul and perhaps an Add."""
    result: list[FileNode] = []
    reader = graph.sole_reader(node.outputs[0])
    while reader is not None and reader.operator in ("Cast", "Mul", "Add"):
        others = [graph.maker(name) for name in reader.inputs]
        scales = [m for m in others if m is not None and m.operator == "Mul" and m not in result]
        constant = any(name in graph.constants for name in reader.inputs)
        moved = any(m is not None and m.operator == "Reshape" for m in others)
        if reader.operator == "Add" and not (constant or moved):
            break
        result += [*scales, reader]
        if reader.operator == "Add":
            break
        reader = graph.sole_reader(reader.outputs[0])
    return result
