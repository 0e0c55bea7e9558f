"""Small ONNX files and profiles for the tests of the explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocompress.device import OnnxRuntimeCpuSettings, OpenVinoSettings, RuntimeSettings
from autocompress.measure.explain.breakdown import break_down
from autocompress.measure.explain.changes import match_layers
from autocompress.measure.explain.findings import Case
from autocompress.measure.explain.graph import FileGraph, graph_of
from autocompress.measure.session import NodeTime

CHANNELS = 16
ONNXRUNTIME = OnnxRuntimeCpuSettings(name="onnxruntime")
OPENVINO = OpenVinoSettings(name="openvino")
Array = NDArray[Any]


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any],
    shape: Sequence[str | int] = ("batch", CHANNELS, 8, 8),
    opset: int = 21,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model with one float input `x` and one float output `y` of free shape."""
    free = [None] * len(shape)
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, free)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    domains = {"": opset} | {node.domain: 1 for node in nodes if node.domain}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def weight(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / 10


def chain(widths: Sequence[int], *, activation: str = "Relu") -> onnx.ModelProto:
    """Convolutions of 3x3, `l0`, `l1`, ..., each with a bias and an activation."""
    nodes, constants, value = [], {}, "x"
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        constants[f"l{place}.weight"] = weight(outputs, inputs, 3, 3, seed=place)
        constants[f"l{place}.bias"] = weight(outputs)
        last = place == len(widths) - 2
        nodes += [
            helper.make_node(
                "Conv", [value, f"l{place}.weight", f"l{place}.bias"], [f"c{place}"],
                f"conv{place}", pads=[1, 1, 1, 1],
            ),
            helper.make_node(activation, [f"c{place}"], ["y" if last else f"a{place}"],
                             f"act{place}"),
        ]  # fmt: skip
        value = f"a{place}"
    return model_of(nodes, constants, ("batch", widths[0], 8, 8))


@dataclass(frozen=True)
class Rounded:
    """How a layer `l` (node `layer`) is quantized: by default so that it runs in integers.

    `input_type` and the like are NumPy's types; `between` is an operator before the rounding;
    `read_by` is one that reads the output in float; `shared` adds the rounded input to the output.
    """

    operator: str = "Conv"
    input_type: type = np.uint8
    output_type: type = np.uint8
    zero_point: int = 0
    weight_type: type = np.int8
    weight_zero_point: bool = True
    axis: int = 0
    between: str = ""
    read_by: str = ""
    shared: bool = False

    def model(self) -> onnx.ModelProto:
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, Any] = {"scale": np.float32(0.05)}
        for end, kind in (("x", self.input_type), ("z", self.output_type)):
            constants[f"{end}_zero"] = np.array(self.zero_point if end == "z" else 0, kind)
        convolves = self.operator == "Conv"
        sizes = (CHANNELS, CHANNELS, 3, 3) if convolves else (CHANNELS, CHANNELS)
        constants["l.weight_quantized"] = np.full(sizes, 3, self.weight_type)
        constants["l.weight_scale"] = np.full(CHANNELS, 0.01, np.float32)
        stored = ["l.weight_quantized", "l.weight_scale"]
        if self.weight_zero_point:
            constants["l.weight_zero"] = np.zeros(CHANNELS, self.weight_type)
            stored.append("l.weight_zero")
        attributes: dict[str, Any] = {"pads": [1] * 4} if convolves else {}
        attributes |= {"transB": 1} if self.operator == "Gemm" else {}
        rounding = ["scale", "x_zero"]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", *rounding], ["xq"], "x_q"),
            helper.make_node("DequantizeLinear", ["xq", *rounding], ["xd"], "x_dq"),
            helper.make_node("DequantizeLinear", stored, ["wd"], "l_dq", axis=self.axis),
            helper.make_node(self.operator, ["xd", "wd"], ["c"], "layer", **attributes),
        ]
        value = "c"
        if self.between:
            nodes.append(helper.make_node(self.between, ["c"], ["b"], "between"))
            value = "b"
        if self.read_by:
            nodes.append(helper.make_node(self.read_by, [value], ["y"], "reader"))
        else:
            ends = ["scale", "z_zero"]
            made = "z" if self.shared else "y"
            nodes += [
                helper.make_node("QuantizeLinear", [value, *ends], ["zq"], "z_q"),
                helper.make_node("DequantizeLinear", ["zq", *ends], [made], "z_dq"),
            ]
        if self.shared:
            nodes.append(helper.make_node("Add", ["xd", "z"], ["y"], "sum"))
        return model_of(nodes, constants, ("batch", CHANNELS, *((8, 8) if convolves else ())))

    def inputs(self) -> list[Array]:
        return [np.ones((1, CHANNELS, *((8, 8) if self.operator == "Conv" else ())), np.float32)]


def node(
    operator: str,
    milliseconds: float,
    origins: Sequence[str] = (),
    *,
    kernel: str = "CPU",
    kind: str = "float32",
    output: str = "",
    name: str = "",
) -> NodeTime:
    """A node of a profile whose first value is of a type."""
    return NodeTime(
        name=name or operator,
        operator=operator,
        kernel=kernel,
        milliseconds=milliseconds,
        inputs=(f"{kind}[1,16,8,8]",),
        outputs=(f"{output or kind}[1,16,8,8]",),
        origins=tuple(origins),
    )


def case_of(
    before: tuple[onnx.ModelProto | FileGraph, Sequence[NodeTime]],
    after: tuple[onnx.ModelProto | FileGraph, Sequence[NodeTime]],
    *,
    runtime: RuntimeSettings = ONNXRUNTIME,
    tile: int = 16,
) -> Case:
    """A case whose latencies are the profiles' sums."""
    sides = []
    for model, nodes in (before, after):
        graph = model if isinstance(model, FileGraph) else graph_of(model)
        sides.append(break_down(graph, nodes, sum(n.milliseconds for n in nodes)))
    return Case(runtime, sides[0], sides[1], match_layers(*sides), tile)
