"""Mixed precision in the file: quantize/dequantize pairs around the layers that run in int8.

ONNX Runtime fuses a layer whose input, weight and output are dequantized and quantized again into
one integer kernel; activations are unsigned, since its x86 kernels are fastest with those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.errors import ExportError
from autocompress.export.exporter import FloatModel
from autocompress.export.observe import run_float

_INTEGER_OPERATORS = ("Conv", "Gemm", "MatMul")
_FUSED_ACTIVATIONS = ("Relu", "Clip")
# Shares of the observed range that are tried as the representable one.
_CLIP_RATIOS = np.linspace(0.5, 1.0, 26)
_SAMPLED_VALUES = 50_000
_SMALLEST_SCALE = 1e-12


@final
@dataclass(frozen=True)
class QuantizedModel:
    """A model with integer layers, and how many of them there are."""

    model: onnx.ModelProto
    integer_layers: int


@final
@dataclass(frozen=True)
class _Range:
    scale: np.float32
    zero_point: np.uint8


def quantize(floating: FloatModel, inputs: Sequence[NDArray[Any]]) -> QuantizedModel:
    """Make a float model's chosen layers integer.

    Args:
        floating: with the weight scales of those layers; none leaves the model as it is.
        inputs: calibration inputs, from which activation ranges are taken.

    Raises:
        ExportError: a layer to be quantized is no convolution or matrix product in the graph.
    """
    if not floating.scales:
        return QuantizedModel(floating.graph.model, 0)
    model = onnx.ModelProto()
    model.CopyFrom(floating.graph.model)
    rewriter = _Rewriter(model.graph, floating.scales)
    observed = run_float(model, inputs, rewriter.tensors)[len(model.graph.output) :]
    ranges = {
        name: activation_range(value)
        for name, value in zip(rewriter.tensors, observed, strict=True)
    }
    axes = {site.initializer: site.axis for site in floating.graph.sites.values()}
    rewriter.rewrite(ranges, axes)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as cause:
        raise ExportError(f"The quantized ONNX file is invalid: {cause}") from cause
    return QuantizedModel(model, len(floating.scales))


def activation_range(values: NDArray[np.float32]) -> _Range:
    """The 8-bit grid with the least squared error on observed values; zero is exact.

    Args:
        values: any shape; of more than 50,000 a random sample, always the same, is looked at.
    """
    flat = values.reshape(-1)
    low, high = min(float(flat.min()), 0.0), max(float(flat.max()), 0.0)
    if flat.size > _SAMPLED_VALUES:
        # Not evenly spaced: a stride that divides the width would see some features only.
        flat = flat[np.random.default_rng(0).integers(flat.size, size=_SAMPLED_VALUES)]
    sample = flat.astype(np.float64)
    best, best_error = _Range(np.float32(1.0), np.uint8(0)), np.inf
    for ratio in _CLIP_RATIOS:
        scale = max((high - low) * ratio / 255.0, _SMALLEST_SCALE)
        zero_point = float(np.clip(np.round(-low * ratio / scale), 0, 255))
        grid = np.clip(np.round(sample / scale) + zero_point, 0, 255)
        error = float(np.square((grid - zero_point) * scale - sample).sum())
        if error < best_error:
            best, best_error = _Range(np.float32(scale), np.uint8(zero_point)), error
    return best


class _Rewriter:
    """Finds which tensors become integers, and rewrites the graph in place."""

    def __init__(self, graph: onnx.GraphProto, scales: Mapping[str, NDArray[np.float32]]) -> None:
        self._graph = graph
        self._scales = scales
        self._outputs = {o.name for o in graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._layers = [
            node for node in graph.node
            if node.op_type in _INTEGER_OPERATORS and node.input[1] in scales
        ]  # fmt: skip
        missing = set(scales) - {node.input[1] for node in self._layers}
        if missing:
            raise ExportError(
                "A weight to be quantized is not read by a convolution or matrix product.",
                given=", ".join(sorted(missing)),
            )
        # Tensors that an integer kernel writes: they exist as integers only.
        self._made_as_integers = {
            self._activated(node) for node in self._layers
            if node.op_type == "Conv" or self._activated(node) not in self._outputs
        }  # fmt: skip
        chosen = {node.input[0] for node in self._layers} | self._made_as_integers
        self._sums: list[onnx.NodeProto] = []
        for node in graph.node:
            # In the graph's order, so that sums of sums are found.
            inputs, output = set(node.input), self._activated(node)
            if node.op_type == "Add" and inputs <= chosen and inputs & self._made_as_integers:
                self._sums.append(node)
                self._made_as_integers.add(output)
                chosen.add(output)
        self.tensors = sorted(chosen)
        # Integer results that leave the model: dequantized, they keep the output's name.
        self._leaving = self._outputs & self._made_as_integers

    def _activated(self, node: onnx.NodeProto) -> str:
        """The tensor that a node's fused kernel writes: after a sole activation that reads it."""
        name = str(node.output[0])
        bias = self._readers.get(name, [])
        if node.op_type == "MatMul" and len(bias) == 1 and self._is_bias(bias[0]):
            name = str(bias[0].output[0])
        readers = self._readers.get(name, [])
        if (
            len(readers) == 1
            and readers[0].op_type in _FUSED_ACTIVATIONS
            and (name not in self._outputs)
        ):
            return str(readers[0].output[0])
        return name

    def _is_bias(self, node: onnx.NodeProto) -> bool:
        initializers = {i.name for i in self._graph.initializer}
        return node.op_type == "Add" and any(name in initializers for name in node.input)

    def rewrite(self, ranges: Mapping[str, _Range], axes: Mapping[str, int]) -> None:
        values = {i.name: i for i in self._graph.initializer}
        added: list[onnx.TensorProto] = []
        pairs: dict[str, list[onnx.NodeProto]] = {}
        for name, grid in ranges.items():
            pair = self._activation_pair(name, grid, added)
            pairs[pair[0].input[0]] = pair
        weight_scales = self._weight_scales(ranges, values)
        weight_nodes: list[onnx.NodeProto] = []
        done = set[str]()
        for node in self._layers:
            weight = str(node.input[1])
            bias = str(node.input[2]) if len(node.input) > 2 and node.input[2] else ""
            grid = ranges[node.input[0]]
            scale = weight_scales[weight]
            if weight not in done:
                weight_nodes.append(_integer_weight(values.pop(weight), scale, axes[weight], added))
                done.add(weight)
            node.input[1] = f"{weight}_dequantized"
            if bias in values and node.op_type != "MatMul":
                scales = scale * grid.scale
                # Named after the node: a shared layer's bias has another scale at each call.
                name = f"{node.output[0]}_bias"
                weight_nodes.append(_integer_bias(name, values[bias], scales, added))
                node.input[2] = f"{name}_dequantized"
        self._redirect(set(ranges) - self._leaving)
        used = {name for node in self._graph.node for name in node.input}
        del self._graph.initializer[:]
        self._graph.initializer.extend([v for n, v in values.items() if n in used] + added)
        self._insert(pairs, weight_nodes)

    def _weight_scales(
        self, ranges: Mapping[str, _Range], values: Mapping[str, onnx.TensorProto]
    ) -> dict[str, NDArray[np.float32]]:
        """The weights' scales, raised where a bias would overflow 32 bits, and never zero.

        A layer that is called several times has one scale for all calls.
        """
        scales = {
            weight: np.maximum(np.asarray(scale, np.float32), np.float32(_SMALLEST_SCALE))
            for weight, scale in self._scales.items()
        }
        for node in self._layers:
            if len(node.input) > 2 and node.input[2] in values:
                bias = np.abs(numpy_helper.to_array(values[node.input[2]]))
                smallest = bias / (float(ranges[node.input[0]].scale) * 2.0**30)
                raised = np.maximum(scales[node.input[1]], smallest)
                scales[node.input[1]] = np.asarray(raised, np.float32)
        return scales

    def _activation_pair(
        self, name: str, grid: _Range, added: list[onnx.TensorProto]
    ) -> list[onnx.NodeProto]:
        scale, zero = f"{name}_scale", f"{name}_zero_point"
        added += [
            numpy_helper.from_array(np.asarray(grid.scale), scale),
            numpy_helper.from_array(np.asarray(grid.zero_point), zero),
        ]
        integer, back, source = f"{name}_quantized", f"{name}_dequantized", name
        if name in self._leaving:
            back, source = name, f"{name}_float"
            for node in self._graph.node:
                node.output[:] = [source if output == name else output for output in node.output]
        return [
            helper.make_node("QuantizeLinear", [source, scale, zero], [integer], f"{name}_q"),
            helper.make_node("DequantizeLinear", [integer, scale, zero], [back], f"{name}_dq"),
        ]

    def _redirect(self, quantized: set[str]) -> None:
        """Let nodes read the dequantized tensor where that keeps the integer kernels together.

        Everybody reads what an integer kernel made; other tensors keep their float form, and only
        integer layers and sums read the other.
        """
        integer_nodes = {id(node) for node in (*self._layers, *self._sums)}
        for node in self._graph.node:
            for i, name in enumerate(node.input):
                everybody = name in self._made_as_integers
                if name in quantized and (everybody or id(node) in integer_nodes):
                    node.input[i] = f"{name}_dequantized"

    def _insert(
        self, pairs: Mapping[str, list[onnx.NodeProto]], weight_nodes: Sequence[onnx.NodeProto]
    ) -> None:
        nodes = list(weight_nodes)
        for entry in self._graph.input:
            nodes += pairs.get(entry.name, [])
        for node in self._graph.node:
            nodes.append(node)
            for output in node.output:
                nodes += pairs.get(output, [])
        del self._graph.node[:]
        self._graph.node.extend(nodes)


def _integer_weight(
    weight: onnx.TensorProto, scale: NDArray[np.float32], axis: int, added: list[onnx.TensorProto]
) -> onnx.NodeProto:
    value = numpy_helper.to_array(weight)
    shape = [1] * value.ndim
    shape[axis] = -1
    codes = np.clip(np.round(value / scale.reshape(shape)), -127, 127).astype(np.int8)
    names = [f"{weight.name}_quantized", f"{weight.name}_scale", f"{weight.name}_zero_point"]
    arrays: tuple[NDArray[Any], ...] = (codes, scale, np.zeros(len(scale), np.int8))
    added += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
    return helper.make_node(
        "DequantizeLinear", names, [f"{weight.name}_dequantized"], f"{weight.name}_dq", axis=axis
    )


def _integer_bias(
    name: str, bias: onnx.TensorProto, scale: NDArray[np.float32], added: list[onnx.TensorProto]
) -> onnx.NodeProto:
    value = numpy_helper.to_array(bias).astype(np.float64)
    codes = np.round(value / scale.astype(np.float64)).astype(np.int32)
    names = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
    arrays: tuple[NDArray[Any], ...] = (
        codes, scale.astype(np.float32), np.zeros(len(scale), np.int32),
    )  # fmt: skip
    added += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
    return helper.make_node(
        "DequantizeLinear", names, [f"{name}_dequantized"], f"{name}_dq", axis=0
    )
