"""The canonical form of a block: names, and all values that change no run time, taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from autocompress.measure.table.block import (
    HEAVY_OPERATORS,
    Block,
    BlockNode,
    Constant,
    TensorType,
    attribute_text,
)
from autocompress.measure.table.shapes import type_of

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
SCALE, ZERO_POINT = 1, 2
# Shapes, axes and pads are shorter.
_LONGEST_KEPT = 64
_DIGITS = 6
_INDICES = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)


def canonical_block(
    makers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
    types: Mapping[str, TensorType],
    opsets: Mapping[str, int],
    outputs: Sequence[str],
) -> tuple[Block, tuple[str, ...]]:
    """A block in canonical form, and the model's names of its inputs.

    Args:
        makers: the node that makes each value inside the block; others come from outside.
        constants: the model's.
        types: of all tensors.
        opsets: version by domain.
        outputs: values that are read elsewhere.

    Raises:
        MeasurementError: a tensor's type is not known.
    """
    walk = _Walk(makers, constants, types)
    for name in outputs:
        walk.visit(name)
    domains = sorted({node.domain for node in walk.nodes} & opsets.keys())
    block = Block(
        opsets=tuple((domain, opsets[domain]) for domain in domains),
        inputs=tuple(type_of(types, name) for name in walk.inputs),
        constants=tuple(walk.constants),
        nodes=tuple(walk.nodes),
        outputs=tuple(walk.names[name] for name in outputs),
        output_types=tuple(type_of(types, name) for name in outputs),
    )
    return block, tuple(walk.inputs)


@final
class _Walk:
    """Visits what a value is made of, first things first, and numbers what it meets."""

    def __init__(
        self,
        makers: Mapping[str, onnx.NodeProto],
        constants: Mapping[str, onnx.TensorProto],
        types: Mapping[str, TensorType],
    ) -> None:
        self._makers, self._constants, self._types = makers, constants, types
        self.names: dict[str, str] = {"": ""}
        self.inputs: list[str] = []
        self.constants: list[Constant] = []
        self.nodes: list[BlockNode] = []
        # Scales that are equal let a runtime move integers as they are.
        self._same: dict[object, str] = {}

    def visit(self, name: str) -> None:
        if name in self.names:
            return
        node = self._makers.get(name)
        if node is None:
            self.names[name] = f"i{len(self.inputs)}"
            self.inputs.append(name)
            return
        for place, read in enumerate(node.input):
            if read in self._constants:
                self._take_constant(read, node, place)
            else:
                self.visit(read)
        for output in node.output:
            if output:
                self.names[output] = f"t{len(self.names)}"
        attributes = sorted((a.name, attribute_text(a)) for a in node.attribute)
        self.nodes.append(
            BlockNode(
                node.op_type, node.domain, tuple(attributes),
                tuple(self.names[read] for read in node.input),
                tuple(self.names[made] if made else "" for made in node.output),
            )
        )  # fmt: skip

    def _take_constant(self, name: str, node: onnx.NodeProto, place: int) -> None:
        if name in self.names:
            return
        tensor = self._constants[name]
        kind = TensorType(tensor.data_type, tuple(tensor.dims))
        values = _kept_values(tensor, kind, node, place)
        same: object = name
        if kind.elements == 1:
            same = (kind, float(numpy_helper.to_array(tensor).reshape(-1)[0]))
        elif values is not None and len(values) == 1:
            same = (kind, values)
        if same not in self._same:
            self._same[same] = f"c{len(self.constants)}"
            self.constants.append(Constant(kind, values))
        self.names[name] = self._same[same]


def _kept_values(
    tensor: onnx.TensorProto, kind: TensorType, node: onnx.NodeProto, place: int
) -> tuple[float, ...] | None:
    """Values that decide which kernel runs or what shapes come out; None for all others."""
    quantizes = node.op_type in QUANTIZERS
    if quantizes and place == ZERO_POINT:
        return (_zero_point(numpy_helper.to_array(tensor)),)
    if quantizes or (node.op_type in HEAVY_OPERATORS and kind.element not in _INDICES):
        return None
    values = numpy_helper.to_array(tensor).reshape(-1)
    if values.dtype.kind in "iub" and values.size <= _LONGEST_KEPT:
        return tuple(int(v) for v in values)
    if values.size == 1:
        return (float(f"{float(values[0]):.{_DIGITS}g}"),)
    return None


def _zero_point(values: NDArray[np.integer[Any]]) -> int:
    """The zero point where it is the lowest value or zero, which kernels make use of, else one
    between.
    """
    lowest = int(np.iinfo(values.dtype).min)
    highest = int(np.iinfo(values.dtype).max)
    for special in (0, lowest):
        if (values == special).all():
            return special
    return (highest - lowest) // 2 if lowest == 0 else 1
