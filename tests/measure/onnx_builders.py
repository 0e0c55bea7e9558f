"""Small ONNX files for the tests of the runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, numpy_helper

Array = NDArray[Any]
BATCH = "batch"


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[str | int]],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 21,
    types: Mapping[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model; inputs are float32 unless `types` says otherwise, outputs of any type."""
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(n, (types or {}).get(n, TensorProto.FLOAT), shape)
            for n, shape in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    domains = {"": opset} | {f.domain: 1 for f in functions}
    domains |= {node.domain: 1 for node in nodes if node.domain}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
    return _typed(model)


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime asks for the outputs' types, which it can find out itself."""
    inferred = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    for place, output in enumerate(inferred.graph.output):
        if output.type.WhichOneof("value") is None:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
        model.graph.output[place].CopyFrom(output)
    return model


def save(model: onnx.ModelProto, folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def reference(path: Path, inputs: Sequence[Array]) -> list[Array]:
    """What ONNX Runtime computes node by node: fused kernels of some CPUs cut large sums."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def convolutions() -> onnx.ModelProto:
    """Convolution, activation, pooling, sum, flatten, linear layer."""
    nodes = [
        helper.make_node("Conv", ["x", "k1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "first_relu"),
        helper.make_node("Conv", ["r1", "k2"], ["c2"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["s"], "sum"),
        helper.make_node("MaxPool", ["s"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"], "head", transB=1),
    ]
    constants = {
        "k1": draw(8, 3, 3, 3, seed=1),
        "b1": draw(8, seed=2),
        "k2": draw(8, 8, 3, 3, seed=3),
        "w": draw(5, 8 * 16 * 16, seed=4),
        "b": draw(5, seed=5),
    }
    return build(nodes, {"x": [BATCH, 3, 32, 32]}, ["y"], constants)


def two_inputs() -> onnx.ModelProto:
    """Inputs whose order is not that of their names; the difference tells them apart."""
    nodes = [
        helper.make_node("MatMul", ["z", "w"], ["h"], "product"),
        helper.make_node("Sub", ["h", "a"], ["y"], "difference"),
        helper.make_node("Neg", ["a"], ["n"], "negative"),
    ]
    shapes = {"z": [BATCH, 6], "a": [BATCH, 4]}
    return build(nodes, shapes, ["y", "n"], {"w": draw(6, 4, seed=1)})


def rounded_convolution() -> onnx.ModelProto:
    """A convolution on 8-bit integers between roundings, its weights stored as integers.

    Of 7 bits, since integer kernels of some CPUs cut large sums.
    """
    constants = {
        "s_x": np.float32(0.03),
        "z_x": np.uint8(128),
        "k": np.random.default_rng(1).integers(-63, 64, (16, 8, 3, 3)).astype(np.int8),
        "s_k": np.random.default_rng(2).uniform(0.002, 0.004, 16).astype(np.float32),
        "z_k": np.zeros(16, np.int8),
        "s_y": np.float32(0.05),
        "z_y": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s_x", "z_x"], ["q"], "round_in"),
        helper.make_node("DequantizeLinear", ["q", "s_x", "z_x"], ["d"], "unround_in"),
        helper.make_node("DequantizeLinear", ["k", "s_k", "z_k"], ["w"], "unround_k", axis=0),
        helper.make_node("Conv", ["d", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "s_y", "z_y"], ["e"], "round_out"),
        helper.make_node("DequantizeLinear", ["e", "s_y", "z_y"], ["y"], "unround_out"),
    ]
    return build(nodes, {"x": [BATCH, 8, 24, 24]}, ["y"], constants)


def packed_linear() -> onnx.ModelProto:
    """A linear layer whose weight a function of the file makes of 4-bit codes."""
    body = [
        helper.make_node("Constant", [], ["shift"], value=_tensor(np.array([0, 4], np.uint8))),
        helper.make_node("Constant", [], ["mask"], value=_tensor(np.uint8(15))),
        helper.make_node("Constant", [], ["offset"], value=_tensor(np.float32(8))),
        helper.make_node("Constant", [], ["last"], value=_tensor(np.array([-1]))),
        helper.make_node("Unsqueeze", ["codes", "last"], ["column"]),
        helper.make_node("BitShift", ["column", "shift"], ["shifted"], direction="RIGHT"),
        helper.make_node("BitwiseAnd", ["shifted", "mask"], ["low"]),
        helper.make_node("Cast", ["low"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["number", "offset"], ["centred"]),
        helper.make_node("Reshape", ["centred", "shape"], ["rows"]),
        helper.make_node("Mul", ["rows", "scale"], ["weight"]),
    ]
    opset = [helper.make_opsetid("", 21)]
    unpack = helper.make_function(
        "test.packed", "Unpack", ["codes", "scale", "shape"], ["weight"], body, opset
    )
    codes = np.random.default_rng(1).integers(0, 256, 10 * 64).astype(np.uint8)
    constants = {
        "codes": codes,
        "scale": np.random.default_rng(2).uniform(0.01, 0.1, (10, 1)).astype(np.float32),
        "shape": np.array([10, 128]),
        "bias": draw(10, seed=3),
    }
    nodes = [
        helper.make_node("Unpack", ["codes", "scale", "shape"], ["w"], "u", domain="test.packed"),
        helper.make_node("Gemm", ["x", "w", "bias"], ["y"], "linear", transB=1),
    ]
    return build(nodes, {"x": [BATCH, 128]}, ["y"], constants, functions=[unpack])


def function_of_inputs() -> onnx.ModelProto:
    """A function of the file that reads the model's input."""
    body = [
        helper.make_node("Neg", ["v"], ["n"]),
        helper.make_node("Add", ["n", "c"], ["out"]),
    ]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("test.own", "Minus", ["v", "c"], ["out"], body, opset)
    nodes = [helper.make_node("Minus", ["x", "c"], ["y"], "minus", domain="test.own")]
    constants = {"c": draw(4, seed=1)}
    return build(nodes, {"x": [BATCH, 4]}, ["y"], constants, functions=[function])


def _tensor(value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value))
