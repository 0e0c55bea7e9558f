"""Small residual networks, float and int8, as exporters write them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


class Builder:
    """Collects nodes and constants of a model with input `x` and output `y`."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.draw = np.random.default_rng(seed).standard_normal

    def keep(self, name: str, value: object, dtype: type = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def conv(self, read: str, name: str, channels: tuple[int, int], *, int8: bool = False) -> str:
        c_in, c_out = channels
        weight = self.draw((c_out, c_in, 3, 3), np.float32)
        if not int8:
            inputs = [
                read,
                self.keep(f"{name}.weight", weight),
                self.keep(f"{name}.bias", [0.1] * c_out),
            ]
            return self.add("Conv", inputs, f"{name}_conv", kernel_shape=[3, 3], pads=[1] * 4)
        scale = np.full(c_out, 0.02, np.float32)
        stored = [
            self.keep(f"{name}.weight_quantized", np.clip(weight / 0.02, -127, 127), np.int8),
            self.keep(f"{name}.weight_scale", scale),
        ]
        bias = [
            self.keep(f"{name}_bias_quantized", [3] * c_out, np.int32),
            self.keep(f"{name}_bias_scale", scale * np.float32(0.05)),
        ]
        kernel = self.add("DequantizeLinear", stored, f"{name}.weight", axis=0)
        shift = self.add("DequantizeLinear", bias, f"{name}_bias", axis=0)
        inputs = [read, kernel, shift]
        return self.add("Conv", inputs, f"{name}_conv", kernel_shape=[3, 3], pads=[1] * 4)

    def pair(self, read: str) -> str:
        """Quantize and dequantize a tensor."""
        if not any(c.name == "scale" for c in self.constants):
            self.keep("scale", 0.05)
            self.keep("zero", 0, np.uint8)
        grid = ["scale", "zero"]
        made = self.add("QuantizeLinear", [read, *grid], f"{read}_quantized")
        return self.add("DequantizeLinear", [made, *grid], f"{read}_dequantized")

    def model(self, x: list[int | str], y: list[int | str], opset: int = 18) -> onnx.ModelProto:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "test", [value("x", FLOAT, x)], [value("y", FLOAT, y)], self.constants
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def residual(width: int = 16, inner: int = 32, *, int8: bool = False) -> onnx.ModelProto:
    """A stem, one residual block and a head: 1 -> width -> inner -> width (+), pooled, to 10."""
    b = Builder()

    def rounded(name: str) -> str:
        return b.pair(name) if int8 else name

    stem = b.add("Relu", [b.conv(rounded("x"), "stem", (1, width), int8=int8)], "stem_relu")
    stem = rounded(stem)
    first = b.add("Relu", [b.conv(stem, "conv1", (width, inner), int8=int8)], "conv1_relu")
    second = rounded(b.conv(rounded(first), "conv2", (inner, width), int8=int8))
    total = rounded(b.add("Relu", [b.add("Add", [second, stem], "sum")], "sum_relu"))
    axes = b.keep("axes", [2, 3], np.int64)
    pooled = b.add("ReduceMean", [total, axes], "pooled", keepdims=1)
    flat = b.add("Reshape", [pooled, b.keep("shape", [-1, width], np.int64)], "flat")
    weight = b.keep("head.weight", b.draw((10, width), np.float32))
    b.add("Gemm", [flat, weight, b.keep("head.bias", [0.0] * 10)], "y", transB=1)
    return b.model(["batch", 1, 8, 8], ["batch", 10])
