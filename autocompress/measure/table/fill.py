"""Random values for a block's constants, such that runtimes fuse it as they fuse the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from autocompress.measure.session import Array
from autocompress.measure.table.block import HEAVY_OPERATORS, Block, Constant, TensorType
from autocompress.measure.table.canonical import QUANTIZERS, SCALE

_STEP = 0.02
_BIAS = 2
_SMALL_BIAS = 1000


def random_constants(block: Block, generator: np.random.Generator) -> dict[str, Array]:
    """A value for every constant of a block, by name.

    Activations keep about their size from layer to layer, so that copies can follow each other.
    Where weight and input of a layer are dequantized, its bias has the product of their scales:
    runtimes fuse it only then.
    """
    values = {f"c{i}": _draw(c, generator) for i, c in enumerate(block.constants)}
    for node in block.nodes:
        if node.operator in QUANTIZERS:
            values[node.inputs[SCALE]] = _scale(block, node.inputs[:2], generator)
    for node in block.nodes:
        if node.operator in HEAVY_OPERATORS:
            _fit_bias_scale(block, node.inputs, values)
    return values


def random_input(kind: TensorType, generator: np.random.Generator) -> Array:
    """A tensor that any operator takes: bytes at random, normal floats, and ones as indices."""
    dtype = helper.tensor_dtype_to_np_dtype(kind.element)
    if dtype.kind == "f":
        return generator.standard_normal(kind.shape).astype(dtype)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        return _integers(dtype, kind.shape, generator)
    return np.ones(kind.shape, dtype)


def _draw(constant: Constant, generator: np.random.Generator) -> Array:
    kind = constant.type
    dtype = helper.tensor_dtype_to_np_dtype(kind.element)
    if constant.values is not None:
        if len(constant.values) == 1:
            return np.full(kind.shape, constant.values[0], dtype)
        return np.asarray(constant.values).astype(dtype).reshape(kind.shape)
    if dtype.kind == "f":
        if len(kind.shape) < 2:
            return generator.uniform(0.5, 1.5, kind.shape).astype(dtype)
        columns = max(kind.elements / kind.shape[0], 1.0)
        scaled: Array = (generator.standard_normal(kind.shape) / np.sqrt(columns)).astype(dtype)
        return scaled
    if kind.element == onnx.TensorProto.INT32:
        return generator.integers(-_SMALL_BIAS, _SMALL_BIAS, kind.shape, dtype)
    return _integers(dtype, kind.shape, generator)


def _integers(
    dtype: np.dtype[Any], shape: tuple[int, ...], generator: np.random.Generator
) -> Array:
    if dtype.kind not in "iu":
        return np.ones(shape, dtype)
    info = np.iinfo(dtype)
    # Runtimes take weights as symmetric, without the lowest value.
    return generator.integers(max(info.min, -info.max), info.max, shape, dtype, endpoint=True)


def _scale(block: Block, inputs: tuple[str, ...], generator: np.random.Generator) -> Array:
    kind = block.constants[int(inputs[SCALE][1:])].type
    dtype = helper.tensor_dtype_to_np_dtype(kind.element)
    base, data = _STEP, block.constant(inputs[0])
    if data is not None and len(data.type.shape) > 1:
        base = 1 / (64 * np.sqrt(max(data.type.elements / data.type.shape[0], 1.0)))
    return (base * generator.uniform(0.9, 1.1, kind.shape)).astype(dtype)


def _fit_bias_scale(block: Block, inputs: tuple[str, ...], values: dict[str, Array]) -> None:
    makers = block.makers()
    sources = [makers.get(name) for name in inputs]
    if len(sources) <= _BIAS or any(n is None or n.operator not in QUANTIZERS for n in sources):
        return
    data, weight, bias = (n.inputs[SCALE] for n in sources[: _BIAS + 1] if n is not None)
    values[bias] = (values[data] * values[weight].reshape(-1)).astype(values[bias].dtype)
