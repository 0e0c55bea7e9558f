"""How a file rounds what its layers read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from autocompress.measure.explain.graph import FileGraph, FileNode

_ACTIVATIONS: Final = (
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Gelu",
    "Softplus", "Mish", "PRelu", "Swish",
)  # fmt: skip
_ROUNDING: Final = ("QuantizeLinear", "DequantizeLinear")
# The integers that a rounding of each type may give.
_INTEGERS: Final = {"uint8": (0, 255), "int8": (-128, 127)}


@final
@dataclass(frozen=True)
class Rounding:
    """How the values at a layer's two ends are rounded.

    Attributes:
        input_type: `uint8`, `int8`, ..., or `float` if nothing rounds the input.
        output_type: likewise.
        input_shared: whether others read the same rounded input.
        output_shared: whether several read its rounded output.
        after: operators between the layer and its rounding, or those that read it in float.
        absorbed: whether the rounding's range leaves nothing to do for the operators between.
        nodes: keys of the nodes that round and unround at both ends.
    """

    input_type: str = "float"
    output_type: str = "float"
    input_shared: bool = False
    output_shared: bool = False
    after: tuple[str, ...] = ()
    absorbed: bool = True
    nodes: tuple[str, ...] = ()


UNROUNDED: Final = Rounding()


def rounding_of(graph: FileGraph, node: FileNode) -> Rounding:
    """What is rounded before and after a node that reads and writes float values."""
    before = graph.maker(node.inputs[0])
    unrounds = before is not None and before.operator == "DequantizeLinear"
    between, reader = _chain(graph, node.outputs[0])
    nodes = []
    if before is not None and unrounds:
        earlier = graph.maker(before.inputs[0])
        nodes += [n.key for n in (earlier, before) if n is not None and n.operator in _ROUNDING]
    if reader is not None:
        nodes.append(reader.key)
        after = tuple(n.operator for n in between)
    else:
        found = between[:1] or graph.readers(node.outputs[0])
        after = tuple(dict.fromkeys(n.operator for n in found))
    return Rounding(
        input_type=integer_type(graph, before) if before is not None and unrounds else "float",
        output_type=integer_type(graph, reader) if reader is not None else "float",
        input_shared=before is not None and unrounds and _uses(graph, before.inputs[0]) > 1,
        output_shared=reader is not None and _uses(graph, reader.outputs[0]) > 1,
        after=after,
        absorbed=reader is None or all(_is_void(graph, n, reader) for n in between),
        nodes=tuple(nodes),
    )


def integer_type(graph: FileGraph, rounding: FileNode) -> str:
    """The integers of a `QuantizeLinear` or `DequantizeLinear`; unsigned if it does not say."""
    zero_point = rounding.inputs[2] if len(rounding.inputs) > 2 else ""
    constant = graph.constants.get(zero_point) or graph.constants.get(rounding.inputs[0])
    return constant.type if constant is not None else "uint8"


def _chain(graph: FileGraph, name: str) -> tuple[list[FileNode], FileNode | None]:
    """The activations that follow a value, and the rounding at their end if there is one."""
    between: list[FileNode] = []
    reader = graph.sole_reader(name)
    while reader is not None and reader.operator in _ACTIVATIONS:
        between.append(reader)
        reader = graph.sole_reader(reader.outputs[0])
    rounds = reader is not None and reader.operator == "QuantizeLinear"
    return between, reader if rounds else None


def _uses(graph: FileGraph, integers: str) -> int:
    """How many nodes read rounded values, directly or in float."""
    total = 0
    for reader in graph.readers(integers):
        unrounds = reader.operator == "DequantizeLinear"
        total += len(graph.readers(reader.outputs[0])) if unrounds else 1
    return total


def _is_void(graph: FileGraph, activation: FileNode, rounding: FileNode) -> bool:
    """Whether a rounding cuts off all that an activation would."""
    kind = integer_type(graph, rounding)
    scale = _scalar(graph, rounding.inputs[1])
    zero_point = _scalar(graph, rounding.inputs[2]) if len(rounding.inputs) > 2 else 0.0
    if kind not in _INTEGERS or scale is None or zero_point is None:
        return False
    low, high = (scale * (end - zero_point) for end in _INTEGERS[kind])
    if activation.operator == "Relu":
        return low >= 0
    if activation.operator == "Clip":
        ends = [_scalar(graph, name) if name else None for name in activation.inputs[1:3]]
        least, most = (*ends, None, None)[:2]
        return (least is None or low >= least) and (most is None or high <= most * (1 + 1e-6))
    return False


def _scalar(graph: FileGraph, name: str) -> float | None:
    constant = graph.constants.get(name)
    if constant is None or constant.values is None or constant.values.size != 1:
        return None
    return float(constant.values.reshape(-1)[0])
