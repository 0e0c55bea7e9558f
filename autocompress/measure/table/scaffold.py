"""What a bench model has besides copies of a block: earlier layers in miniature, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.measure.session import Array
from autocompress.measure.table.block import TensorType

_BYTES = (TensorProto.UINT8, TensorProto.INT8)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_IMAGE_RANK, _POOLED_RANK = 4, 3
_DEFAULT_OPSET = 17
_IR_VERSION = 10


@final
class Scaffold:
    """Collects a model's nodes and constants.

    Args:
        generator: of random weights.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._constants: list[onnx.TensorProto] = []
        self._samples: dict[TensorType, list[str]] = {}
        self.nodes: list[onnx.NodeProto] = []

    def keep(self, name: str, value: Array) -> str:
        """Store a constant; its name."""
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def model(self, inputs: Sequence[TensorType], opsets: Sequence[tuple[str, int]]) -> bytes:
        """The serialized model; its outputs are the samples, joined by type."""
        nodes, outputs = list(self.nodes), []
        for number, (kind, names) in enumerate(self._samples.items()):
            nodes.append(helper.make_node("Concat", names, [f"o{number}"], axis=0))
            shape = (kind.shape[0] * len(names), *kind.shape[1:])
            outputs.append(TensorType(kind.element, shape))
        return finished_model(nodes, self._constants, inputs, outputs, opsets)

    def earlier_layer(self, name: str, made: str, kind: TensorType) -> str:
        """Something small that reads a tensor and gives another of its type; the other's name.

        For an image it is a 1 x 1 convolution, in integers if the tensor is of bytes, because a
        runtime keeps an image in the layout in which a layer made it.
        """
        image = len(kind.shape) == _IMAGE_RANK
        if kind.element in _BYTES:
            return self._convolve_bytes(name, made, kind) if image else self._regrid(name, made)
        if kind.element == TensorProto.FLOAT and image:
            kernel = self.keep(f"{made}_kernel", self._kernel(kind.shape[1]))
            self.nodes.append(helper.make_node("Conv", [name, kernel], [made]))
            return made
        if kind.element in _FLOATS:
            dtype = helper.tensor_dtype_to_np_dtype(kind.element)
            shift = self.keep(f"{made}_shift", np.asarray(self._generator.normal(), dtype))
            self.nodes.append(helper.make_node("Add", [name, shift], [made]))
            return made
        return name

    def sample(self, name: str, kind: TensorType, number: int) -> None:
        """Make a few values of a tensor part of the model's outputs.

        Another `number` takes them in another way, or a runtime would merge samples of one tensor.
        """
        sample, rank = f"{name}_sample{number}", len(kind.shape)
        if rank >= _POOLED_RANK and kind.element in (*_BYTES, *_FLOATS):
            spatial = kind.shape[2:]
            strides = [size + number for size in spatial]
            ones = [1] * len(spatial)
            self.nodes.append(
                helper.make_node("MaxPool", [name], [sample], kernel_shape=ones, strides=strides)
            )
            shape: tuple[int, ...] = (*kind.shape[:2], *ones)
        elif rank:
            # Slices of all values would be turned into one split.
            begin = number % max(kind.shape[-1] - 1, 1)
            ends = {"from": begin, "to": begin + 1, "axis": rank - 1}
            bounds = [self.keep(f"{sample}_{k}", np.array([v], np.int64)) for k, v in ends.items()]
            self.nodes.append(helper.make_node("Slice", [name, *bounds], [sample]))
            shape = (*kind.shape[:-1], 1)
        else:
            one = self.keep(f"{sample}_shape", np.array([1], np.int64))
            self.nodes.append(helper.make_node("Reshape", [name, one], [sample]))
            shape = (1,)
        self._samples.setdefault(TensorType(kind.element, shape), []).append(sample)

    def _kernel(self, channels: int) -> Array:
        kernel = self._generator.standard_normal((channels, channels, 1, 1), np.float32)
        scaled: Array = kernel / np.float32(np.sqrt(channels))
        return scaled

    def _convolve_bytes(self, name: str, made: str, kind: TensorType) -> str:
        channels = kind.shape[1]
        grid = [
            self.keep(f"{made}_scale", np.float32(0.02)),
            self.keep(f"{made}_zero", np.zeros((), helper.tensor_dtype_to_np_dtype(kind.element))),
        ]
        kernel = np.clip(self._kernel(channels) * 40, -127, 127).astype(np.int8)
        weight = [
            self.keep(f"{made}_weight", kernel),
            self.keep(f"{made}_weight_scale", np.full(channels, 0.025, np.float32)),
        ]
        read, kernel_read, written = (f"{made}_{end}" for end in ("read", "kernel", "float"))
        self.nodes += [
            helper.make_node("DequantizeLinear", [name, *grid], [read]),
            helper.make_node("DequantizeLinear", weight, [kernel_read], axis=0),
            helper.make_node("Conv", [read, kernel_read], [written]),
            helper.make_node("QuantizeLinear", [written, *grid], [made]),
        ]
        return made

    def _regrid(self, name: str, made: str) -> str:
        """Integers of one scale as integers of another."""
        scales = [
            self.keep(f"{made}_{end}", np.float32(self._generator.uniform(0.01, 0.02)))
            for end in ("from", "to")
        ]
        self.nodes += [
            helper.make_node("DequantizeLinear", [name, scales[0]], [f"{made}_read"]),
            helper.make_node("QuantizeLinear", [f"{made}_read", scales[1]], [made]),
        ]
        return made


def finished_model(
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    inputs: Sequence[TensorType],
    outputs: Sequence[TensorType],
    opsets: Sequence[tuple[str, int]],
) -> bytes:
    """A serialized model with inputs `i0`, `i1`, ... and outputs `o0`, `o1`, ...

    The model's own inputs are `rows0`, ... of one row each.
    """
    shapes = [
        numpy_helper.from_array(np.array(kind.shape, np.int64), f"shape{i}")
        for i, kind in enumerate(inputs)
    ]
    unpacked = [
        helper.make_node("Reshape", [f"rows{i}", f"shape{i}"], [f"i{i}"])
        for i, _ in enumerate(inputs)
    ]
    graph = helper.make_graph(
        [*unpacked, *nodes],
        "bench",
        [_info(f"rows{i}", TensorType(k.element, (1, *k.shape))) for i, k in enumerate(inputs)],
        [_info(f"o{i}", kind) for i, kind in enumerate(outputs)],
        [*constants, *shapes],
    )
    versions = {"": _DEFAULT_OPSET, **dict(opsets)}
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())


def _info(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind.element, list(kind.shape))
