"""`Block`: a piece of an ONNX graph that a runtime runs as one kernel or a few, without its values.

Two blocks are equal when nothing tells their run times apart: operators, attributes, connections,
types and shapes, and those few values that decide which kernel runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import onnx
from onnx import AttributeProto, TensorProto, helper

# Operators that are worth a kernel of their own; a block starts at each.
HEAVY_OPERATORS = frozenset(
    (
        "Attention", "AveragePool", "Conv", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "Gemm",
        "GlobalAveragePool", "GlobalMaxPool", "LSTM", "MatMul", "MatMulInteger", "MatMulNBits",
        "MaxPool", "MultiHeadAttention", "QGemm", "QLinearConv", "QLinearMatMul", "RNN", "Resize",
    )
)  # fmt: skip
# The operator that a runtime takes into the kernel that reads its result.
READER = "DequantizeLinear"
_READABLE = (
    AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS,
)  # fmt: skip


@final
@dataclass(frozen=True)
class TensorType:
    """What a tensor is: `element` is one of ONNX's data types, the shape has no unknowns."""

    element: int
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        bits = {int(TensorProto.UINT4): 4, int(TensorProto.INT4): 4}.get(self.element)
        if bits is not None:
            return (self.elements * bits + 7) // 8
        size: int = helper.tensor_dtype_to_np_dtype(self.element).itemsize
        return self.elements * size

    @property
    def text(self) -> str:
        """Such as `float[1,32,28,28]`."""
        name = TensorProto.DataType.Name(self.element).lower()
        return f"{name}[{','.join(map(str, self.shape))}]"


@final
@dataclass(frozen=True)
class Constant:
    """A constant tensor.

    Attributes:
        values: flattened, where they decide what runs; None where any will do. A single value
            stands for a whole tensor of it.
    """

    type: TensorType
    values: tuple[float, ...] | None


@final
@dataclass(frozen=True)
class BlockNode:
    """An operator of a block; values are named `i0` (inputs), `c0` (constants) and `t0`.

    Attributes:
        attributes: name and value as JSON text, sorted by name.
    """

    operator: str
    domain: str
    attributes: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def protos(self) -> list[AttributeProto]:
        """The attributes as ONNX has them."""
        return [attribute_from_text(name, text) for name, text in self.attributes]


@final
@dataclass(frozen=True)
class Block:
    """A piece of a graph; see the module.

    Attributes:
        opsets: versions of the operator domains that it uses, sorted.
        inputs: tensors that are computed elsewhere, in the order of their first use.
        nodes: in an order in which they can run.
        outputs: names of the values that are read elsewhere.
        output_types: their types.
    """

    opsets: tuple[tuple[str, int], ...]
    inputs: tuple[TensorType, ...]
    constants: tuple[Constant, ...]
    nodes: tuple[BlockNode, ...]
    outputs: tuple[str, ...]
    output_types: tuple[TensorType, ...]

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits; equal for equal blocks."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def lead(self) -> BlockNode:
        """The node that the block starts at: its heavy one, else the first that does some work."""
        heavy = [n for n in self.nodes if n.operator in HEAVY_OPERATORS]
        working = [n for n in self.nodes if n.operator != READER]
        return (*heavy, *working, *self.nodes)[0]

    @property
    def main_inputs(self) -> frozenset[int]:
        """Which of the inputs the lead reads; the others are read by what follows it."""
        return frozenset(int(name[1:]) for name in self.upstream if name.startswith("i"))

    @cached_property
    def upstream(self) -> frozenset[str]:
        """Names of all values that the lead's result depends on, the lead's inputs among them."""
        makers, found = self.makers(), set[str]()
        stack = [name for name in self.lead.inputs if name]
        while stack:
            name = stack.pop()
            if name and name not in found:
                found.add(name)
                stack += makers[name].inputs if name in makers else ()
        return frozenset(found)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.type.bytes for constant in self.constants)

    def makers(self) -> dict[str, BlockNode]:
        """The node that makes each value."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    def constant(self, name: str) -> Constant | None:
        """The constant of a name; None for other values."""
        return self.constants[int(name[1:])] if name.startswith("c") else None

    def to_json(self) -> str:
        """One line of JSON, the same for equal blocks."""
        return json.dumps(
            {
                "opsets": self.opsets,
                "inputs": [_row(t) for t in self.inputs],
                "constants": [[*_row(c.type), c.values] for c in self.constants],
                "nodes": [
                    [n.operator, n.domain, n.attributes, n.inputs, n.outputs] for n in self.nodes
                ],
                "outputs": self.outputs,
                "output_types": [_row(t) for t in self.output_types],
            },
            separators=(",", ":"),
        )

    @staticmethod
    def from_json(text: str) -> Block:
        """Read back what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the text is no block.
        """
        return _from_data(json.loads(text))


def _row(tensor: TensorType) -> tuple[int, tuple[int, ...]]:
    return tensor.element, tensor.shape


def _type(row: Sequence[Any]) -> TensorType:
    return TensorType(int(row[0]), tuple(map(int, row[1])))


def _from_data(data: Mapping[str, Any]) -> Block:
    return Block(
        opsets=tuple((str(domain), int(version)) for domain, version in data["opsets"]),
        inputs=tuple(map(_type, data["inputs"])),
        constants=tuple(
            Constant(_type(row), None if row[2] is None else tuple(row[2]))
            for row in data["constants"]
        ),
        nodes=tuple(
            BlockNode(
                operator, domain, tuple((str(k), str(v)) for k, v in attributes),
                tuple(inputs), tuple(outputs),
            )
            for operator, domain, attributes, inputs, outputs in data["nodes"]
        ),
        outputs=tuple(data["outputs"]),
        output_types=tuple(map(_type, data["output_types"])),
    )  # fmt: skip


def attribute_text(attribute: AttributeProto) -> str:
    """An attribute's value as JSON text."""
    if attribute.type in _READABLE:
        value = helper.get_attribute_value(attribute)
        return json.dumps(list(value) if isinstance(value, Sequence) else value)
    if attribute.type == AttributeProto.STRING:
        return json.dumps(attribute.s.decode("utf-8", "replace"))
    return json.dumps({"proto": base64.b64encode(attribute.SerializeToString()).decode()})


def attribute_from_text(name: str, text: str) -> AttributeProto:
    """Read back what `attribute_text` wrote."""
    value = json.loads(text)
    if isinstance(value, dict):
        proto: AttributeProto = AttributeProto.FromString(base64.b64decode(value["proto"]))
        return proto
    if value == []:
        return helper.make_attribute(name, value, attr_type=onnx.AttributeProto.INTS)
    return helper.make_attribute(name, value)
