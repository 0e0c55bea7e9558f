"""Weights and biases as the integer kernels behind static ranges read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.export.codes import WeightCodes
from autocompress.export.edit import put_first, swap_initializers
from autocompress.export.ranges import Grid

_SMALLEST_SCALE = 1e-12


def store_for_kernels(
    graph: onnx.GraphProto, layers: Sequence[tuple[onnx.NodeProto, WeightCodes, Grid]]
) -> None:
    """Store weights as int8 and biases as int32 behind `DequantizeLinear`, in place.

    Args:
        layers: nodes, their weights and the grids of their inputs.
    """
    values = {i.name: i for i in graph.initializer}
    scales = _weight_scales(layers, values)
    weights = {weight.initializer: weight for _, weight, _ in layers}
    added: list[onnx.TensorProto] = []
    products = {weight.initializer for node, weight, _ in layers if node.op_type == "Gemm"}
    nodes = [_integer_weight(w, scales[n], n in products, added) for n, w in weights.items()]
    for node, weight, grid in layers:
        if _has_bias(node, values):
            # Named after the node: a shared layer's bias has another scale at each call.
            name, bias = f"{node.output[0]}_bias", values[node.input[2]]
            scale = scales[weight.initializer][:, 0] * grid.scale
            nodes.append(_integer_bias(name, bias, scale, added))
            node.input[2] = f"{name}_dequantized"
    put_first(graph, nodes)
    swap_initializers(graph, weights.keys(), added)


def _has_bias(node: onnx.NodeProto, values: Mapping[str, onnx.TensorProto]) -> bool:
    return node.op_type != "MatMul" and len(node.input) > 2 and node.input[2] in values


def _weight_scales(
    layers: Sequence[tuple[onnx.NodeProto, WeightCodes, Grid]],
    values: Mapping[str, onnx.TensorProto],
) -> dict[str, NDArray[np.float32]]:
    """The weights' scales, raised where a bias would overflow 32 bits, and never zero.

    A layer that is called several times has one scale for all calls.
    """
    scales = {
        weight.initializer: np.maximum(weight.scale, np.float32(_SMALLEST_SCALE))
        for _, weight, _ in layers
    }
    for node, weight, grid in layers:
        if _has_bias(node, values):
            bias = np.abs(numpy_helper.to_array(values[node.input[2]]).astype(np.float64))
            smallest = (bias / (float(grid.scale) * 2.0**30))[:, None]
            known = scales[weight.initializer]
            if len(known) == 1:
                smallest = smallest.max(keepdims=True)
            scales[weight.initializer] = np.maximum(known, smallest).astype(np.float32)
    return scales


def _integer_weight(
    weight: WeightCodes, scale: NDArray[np.float32], zeros: bool, added: list[onnx.TensorProto]
) -> onnx.NodeProto:
    """Writes the tensor that was the float initializer.

    Args:
        zeros: give zero points, without which ONNX Runtime fuses no Gemm; they are zero anyway.
    """
    codes = weight.codes
    if not np.array_equal(scale, weight.scale):
        codes = np.round(codes * (weight.scale.astype(np.float64) / scale)).astype(np.int8)
    stored = replace(weight, codes=codes).as_stored()
    name = weight.initializer
    names = [f"{name}_quantized", f"{name}_scale"]
    scales = _per_channel(scale[:, 0], len(codes))
    added += [
        numpy_helper.from_array(stored, names[0]),
        numpy_helper.from_array(scales, names[1]),
    ]
    if zeros:
        # Layers of one width share them.
        names.append(f"zero_points_{'x'.join(map(str, scales.shape))}")
        added.append(numpy_helper.from_array(np.zeros(scales.shape, np.int8), names[2]))
    return helper.make_node("DequantizeLinear", names, [name], f"{name}_dq", axis=weight.axis)


def _integer_bias(
    name: str, bias: onnx.TensorProto, scale: NDArray[np.float32], added: list[onnx.TensorProto]
) -> onnx.NodeProto:
    value = numpy_helper.to_array(bias).astype(np.float64)
    codes = np.round(value / scale.astype(np.float64)).astype(np.int32)
    names = [f"{name}_quantized", f"{name}_scale"]
    added += [
        numpy_helper.from_array(codes, names[0]),
        numpy_helper.from_array(_per_channel(scale.astype(np.float32), len(codes)), names[1]),
    ]
    return helper.make_node(
        "DequantizeLinear", names, [f"{name}_dequantized"], f"{name}_dq", axis=0
    )


def _per_channel(scale: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """One scale per channel, or a scalar where there is one for all."""
    return scale.reshape(()) if len(scale) < channels else scale
