"""Integer layers whose inputs' range is taken anew at each run.

The inputs' integers are unsigned, as `DynamicQuantizeLinear` makes them. Linear layers become one
fused kernel in ONNX Runtime. Convolutions become `ConvInteger`, whose kernel for signed weights is
several times slower than that for unsigned ones, so weights are shifted by 128 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.errors import ExportError
from autocompress.export.codes import WeightCodes
from autocompress.export.edit import layers_of, plain_product, replace_nodes, swap_initializers

_SHIFT = 128
_SHIFT_NAME = "unsigned_weight_zero_point"


def run_dynamically(model: onnx.ModelProto, weights: Sequence[WeightCodes]) -> None:
    """Let layers with one scale per output channel run in integers, in place.

    Raises:
        ExportError: a matrix product is no plain linear layer, or a bias is computed.
    """
    graph = model.graph
    values = {i.name: i for i in graph.initializer}
    replacements: dict[str, list[onnx.NodeProto]] = {}
    rounded = set[str]()
    added: list[onnx.TensorProto] = []
    places = {node.output[0]: place for place, node in enumerate(graph.node) if node.output}
    found = [(w, node) for w in weights for node in layers_of(graph, w.initializer)]
    # In the graph's order, so that an input is rounded before the first of its readers.
    for weight, node in sorted(found, key=lambda pair: places[pair[1].output[0]]):
        nodes = []
        if node.input[0] not in rounded:
            rounded.add(node.input[0])
            nodes.append(_round_input(node.input[0]))
        if node.op_type == "Conv":
            nodes += _convolution(node, weight, values, added)
        else:
            nodes += _product(node, weight, added)
        replacements[node.output[0]] = nodes
    replace_nodes(graph, replacements)
    swap_initializers(graph, {w.initializer for w in weights}, added)


def _round_input(name: str) -> onnx.NodeProto:
    return helper.make_node("DynamicQuantizeLinear", [name], _rounded(name), f"{name}_dynamic_q")


def _rounded(name: str) -> list[str]:
    """Integers, scale and zero point of a tensor."""
    return [f"{name}_dynamic", f"{name}_dynamic_scale", f"{name}_dynamic_zero_point"]


def _product(
    node: onnx.NodeProto, weight: WeightCodes, added: list[onnx.TensorProto]
) -> list[onnx.NodeProto]:
    codes, scale = f"{weight.initializer}_quantized", f"{weight.initializer}_scale"
    added += [
        numpy_helper.from_array(np.ascontiguousarray(weight.codes.T), codes),
        numpy_helper.from_array(weight.scale.reshape(-1), scale),
    ]
    integers, input_scale, zero_point = _rounded(node.input[0])
    product = "MatMulInteger", [integers, codes, zero_point]
    return _scaled(node, product, (input_scale, scale), plain_product(node))


def _convolution(
    node: onnx.NodeProto, weight: WeightCodes,
    values: Mapping[str, onnx.TensorProto], added: list[onnx.TensorProto],
) -> list[onnx.NodeProto]:  # fmt: skip
    codes, scale = f"{weight.initializer}_quantized", f"{weight.initializer}_scale"
    unsigned = (weight.as_stored().astype(np.int16) + _SHIFT).astype(np.uint8)
    by_channel = [-1, *(1 for _ in weight.shape[2:])]
    arrays: dict[str, NDArray[Any]] = {
        codes: unsigned,
        scale: weight.scale.reshape(by_channel),
        _SHIFT_NAME: np.array(_SHIFT, np.uint8),
    }
    bias = str(node.input[2]) if len(node.input) > 2 else ""
    if bias:
        if bias not in values:
            raise ExportError("A convolution's bias is no constant.", given=bias)
        shaped = f"{node.output[0]}_bias"
        arrays[shaped] = numpy_helper.to_array(values[bias]).reshape(by_channel)
        bias = shaped
    added += [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    integers, input_scale, zero_point = _rounded(node.input[0])
    product = "ConvInteger", [integers, codes, zero_point, _SHIFT_NAME]
    return _scaled(node, product, (input_scale, scale), bias)


def _scaled(
    node: onnx.NodeProto, product: tuple[str, list[str]], scales: tuple[str, str], bias: str
) -> list[onnx.NodeProto]:
    """An integer product in a layer's place, as float numbers."""
    name = str(node.output[0])
    integer = helper.make_node(product[0], product[1], [f"{name}_int32"], f"{name}_integer")
    if node.op_type == "Conv":
        integer.attribute.extend(node.attribute)
    steps = [
        ("Cast", [f"{name}_int32"], f"{name}_cast"),
        ("Mul", list(scales), f"{name}_steps"),
        ("Mul", [f"{name}_cast", f"{name}_steps"], f"{name}_product"),
        ("Add", [f"{name}_product", bias], f"{name}_sum"),
    ]
    steps = steps if bias else steps[:-1]
    nodes = [helper.make_node(kind, inputs, [out], out) for kind, inputs, out in steps]
    nodes[0].attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))
    nodes[-1].output[0] = name
    return [integer, *nodes]
