"""What a device rewards: int8 against float kernels and the noise floor, all of it measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.device import DeviceProfile
from autocompress.measure.client import Subject, Worker
from autocompress.measure.latency import PairedLatency
from autocompress.measure.session import Array

_OPSET, _IR_VERSION = 17, 10
_CHANNELS, _SIDE, _WIDTH = 64, 14, 256
# Several layers in a row, so that the conversions at both ends weigh as little as in a network.
_LAYERS = 4


@final
@dataclass(frozen=True)
class ProbeReport:
    """Paired latencies of small int8 and float graphs on a device.

    Attributes:
        runtime: full name of the runtime that ran them.
        convolution: four 3x3 convolutions of 64 channels at 14x14, int8 against fp32.
        matmul: four products with 256x256 weights, int8 against fp32.
        noise: the fp32 convolutions against themselves.
    """

    runtime: str
    convolution: PairedLatency
    matmul: PairedLatency
    noise: PairedLatency

    @property
    def noise_floor(self) -> float:
        """The largest distance from 1 in the interval of a model's ratio to itself."""
        return max(self.noise.speedup_high - 1, 1 - self.noise.speedup_low)

    @property
    def int8_pays(self) -> dict[str, bool]:
        """For `Conv` and `MatMul`: whether int8 is faster by more than the noise floor."""
        pairs = {"Conv": self.convolution, "MatMul": self.matmul}
        return {name: pair.speedup_low > 1 + self.noise_floor for name, pair in pairs.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields and verdicts, ready for JSON."""
        return {
            "runtime": self.runtime,
            "convolution": self.convolution.to_dict(),
            "matmul": self.matmul.to_dict(),
            "noise": self.noise.to_dict(),
            "noise_floor": self.noise_floor,
            "int8_pays": self.int8_pays,
        }


def probe(profile: DeviceProfile, runtime: str, scratch: Path, seed: int) -> ProbeReport:
    """Measure what int8 brings in one of a device's runtimes, and how far timings can be trusted.

    Args:
        profile: the device; its search limits bound each of the three measurements.
        runtime: full name of one of its runtimes.
        scratch: a folder for the small graphs.
        seed: seed of weights, inputs and the bootstrap.

    Raises:
        DeviceError: the profile asks for what this machine lacks.
        MeasurementError: the runtime fails on the graphs, or the device stays in use.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    image = (profile.batch_size, _CHANNELS, _SIDE, _SIDE)
    rows = (profile.batch_size, _WIDTH, _WIDTH)
    kernels = _weights((_CHANNELS, _CHANNELS, 3, 3), _CHANNELS * 9, generator)
    matrices = _weights((_WIDTH, _WIDTH), _WIDTH, generator)
    models = {
        "conv-fp32": float_chain("Conv", image, kernels),
        # A second file, because two loads of one model differ in their memory layout too.
        "conv-fp32-again": float_chain("Conv", image, kernels),
        "conv-int8": int8_chain("Conv", image, kernels),
        "matmul-fp32": float_chain("MatMul", rows, matrices),
        "matmul-int8": int8_chain("MatMul", rows, matrices),
    }
    paths = {name: scratch / f"probe-{name}.onnx" for name in models}
    for name, model in models.items():
        onnx.save(model, paths[name])
    with Worker(profile, scratch) as worker:

        def pair(baseline: str, candidate: str, shape: tuple[int, ...]) -> PairedLatency:
            inputs = [generator.standard_normal(shape, dtype=np.float32)]
            sides = (Subject(paths[baseline], runtime), Subject(paths[candidate], runtime))
            return worker.compare(*sides, inputs, seed=seed)

        return ProbeReport(
            runtime=runtime,
            convolution=pair("conv-fp32", "conv-int8", image),
            matmul=pair("matmul-fp32", "matmul-int8", rows),
            noise=pair("conv-fp32", "conv-fp32-again", image),
        )


def float_chain(operator: str, shape: tuple[int, ...], weights: Sequence[Array]) -> onnx.ModelProto:
    """A chain of `Conv` or `MatMul` nodes in fp32.

    Args:
        operator: `Conv` (3x3, padded by one) or `MatMul`.
        shape: the shape of input and output.
        weights: one array per node, float32.
    """
    nodes: list[onnx.NodeProto] = []
    initializers, value = [], "input"
    for index, weight in enumerate(weights):
        initializers.append(numpy_helper.from_array(weight, f"weight{index}"))
        output = "output" if index == len(weights) - 1 else f"value{index}"
        nodes.append(_node(operator, [value, f"weight{index}"], output))
        value = output
    return _model(nodes, initializers, shape)


def int8_chain(operator: str, shape: tuple[int, ...], weights: Sequence[Array]) -> onnx.ModelProto:
    """The same chain between quantize/dequantize pairs, the form that runtimes fuse into int8.

    Activations are uint8 per tensor in [-8, 8], weights int8 per output channel.
    """
    scale = numpy_helper.from_array(np.float32(8 / 128), "activation_scale")
    zero = numpy_helper.from_array(np.uint8(128), "activation_zero_point")
    nodes: list[onnx.NodeProto] = []
    initializers = [scale, zero]
    value = _quantized("input", "input_dequantized", nodes)
    axis = 0 if operator == "Conv" else 1
    for index, weight in enumerate(weights):
        name = f"weight{index}"
        initializers.extend(_int8_weight(weight, axis, name))
        parts = [f"{name}_int8", f"{name}_scale", f"{name}_zero_point"]
        nodes.append(helper.make_node("DequantizeLinear", parts, [name], axis=axis))
        nodes.append(_node(operator, [value, name], f"value{index}"))
        last = index == len(weights) - 1
        value = _quantized(
            f"value{index}", "output" if last else f"value{index}_dequantized", nodes
        )
    return _model(nodes, initializers, shape)


def _weights(shape: tuple[int, ...], fan_in: int, generator: np.random.Generator) -> list[Array]:
    # Activations keep their variance from layer to layer: no denormals, no saturation.
    deviation = np.float32(fan_in**-0.5)
    return [generator.standard_normal(shape, dtype=np.float32) * deviation for _ in range(_LAYERS)]


def _node(operator: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    if operator == "Conv":
        return helper.make_node(operator, inputs, [output], kernel_shape=[3, 3], pads=[1] * 4)
    return helper.make_node(operator, inputs, [output])


def _quantized(value: str, output: str, nodes: list[onnx.NodeProto]) -> str:
    parameters = ["activation_scale", "activation_zero_point"]
    quantized = f"{value}_uint8"
    nodes.append(helper.make_node("QuantizeLinear", [value, *parameters], [quantized]))
    nodes.append(helper.make_node("DequantizeLinear", [quantized, *parameters], [output]))
    return output


def _int8_weight(weight: Array, axis: int, name: str) -> list[onnx.TensorProto]:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / 127
    values = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return [
        numpy_helper.from_array(values, f"{name}_int8"),
        numpy_helper.from_array(scale.reshape(-1).astype(np.float32), f"{name}_scale"),
        numpy_helper.from_array(np.zeros(scale.size, np.int8), f"{name}_zero_point"),
    ]


def _model(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    shape: tuple[int, ...],
) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("input", "output")
    ]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return model
