"""Small chains of convolutions, float and int8, for the latency table's tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.device import DeviceProfile, MeasuringSettings, OnnxRuntimeCpuSettings
from autocompress.measure.any_file import random_inputs
from autocompress.measure.session import Array


def chain(
    channels: Sequence[int], *, kernel: int = 3, size: int = 8, seed: int = 0, prefix: str = ""
) -> onnx.ModelProto:
    """A chain of padded convolutions, each with a bias and a Relu."""
    draw = np.random.default_rng(seed).standard_normal
    nodes, weights, value = [], [], f"{prefix}x"
    for place, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
        name, made = f"{prefix}layer{place}", f"{prefix}y{place}"
        scale = np.float32((c_in * kernel**2) ** -0.5)
        shape = (c_out, c_in, kernel, kernel)
        weights += [
            numpy_helper.from_array(draw(shape, np.float32) * scale, f"{name}.weight"),
            numpy_helper.from_array(draw(c_out, np.float32), f"{name}.bias"),
        ]
        pads = [kernel // 2] * 4
        inputs = [value, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"{made}_conv"], name=name, pads=pads))
        nodes.append(helper.make_node("Relu", [f"{made}_conv"], [made]))
        value = made
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", count, size, size])
        for name, count in ((f"{prefix}x", channels[0]), (value, channels[-1]))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with quantized inputs, outputs and weights around every convolution."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    nodes, extra = [], [
        numpy_helper.from_array(np.float32(0.05), "scale"),
        numpy_helper.from_array(np.uint8(128), "zero"),
        numpy_helper.from_array(np.float32(0.01), "weight_scale"),
        numpy_helper.from_array(np.int8(0), "weight_zero"),
    ]  # fmt: skip
    kept = []
    for node in graph.node:
        if node.op_type == "Conv":
            source, weight = node.input[0], node.input[1]
            codes = np.clip(np.round(values[weight] / 0.01), -127, 127).astype(np.int8)
            extra.append(numpy_helper.from_array(codes, f"{weight}_quantized"))
            kept.append(weight)
            nodes += [
                helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{source}_q"]),
                helper.make_node("DequantizeLinear", [f"{source}_q", "scale", "zero"],
                                 [f"{source}_dq"]),
                helper.make_node("DequantizeLinear",
                                 [f"{weight}_quantized", "weight_scale", "weight_zero"],
                                 [f"{weight}_dq"]),
            ]  # fmt: skip
            node.input[0], node.input[1] = f"{source}_dq", f"{weight}_dq"
        nodes.append(node)
    rest = [i for i in graph.initializer if i.name not in kept]
    new = helper.make_graph(nodes, "int8", graph.input, graph.output, [*rest, *extra])
    return helper.make_model(new, opset_imports=made.opset_import, ir_version=10)


def inputs_of(model: onnx.ModelProto) -> list[Array]:
    return random_inputs(model, 1, {}, 0)


def timer_profile() -> DeviceProfile:
    """Limits that a test can wait for."""
    return DeviceProfile(
        version=2,
        name="test",
        kind="cpu",
        runtimes=(OnnxRuntimeCpuSettings(name="onnxruntime"),),
        kernels={},
        measuring=MeasuringSettings(
            target_half_width=0.2,
            time_limit_s=0.4,
            final_target_half_width=0.2,
            final_time_limit_s=0.4,
            hang_limit_s=20,
        ),
    )
