"""What is needed to measure an ONNX file of any origin: its inputs and its size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from autocompress.errors import MeasurementError
from autocompress.measure.session import Array
from autocompress.onnx_sizes import noted_sizes

_INTEGERS = np.integer


def open_model(path: Path) -> onnx.ModelProto:
    """The model of a file, without weights that lie in other files.

    Raises:
        MeasurementError: there is no such file, or it is no ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as cause:
        # protobuf's own errors have no common base.
        raise MeasurementError(
            f"This is no readable ONNX file: {cause}", given=path, allowed="a file made by onnx"
        ) from cause
    if not model.graph.output:
        raise MeasurementError("This is no ONNX file: it has no outputs.", given=path)
    return model


def model_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the files that hold its weights, if there are any."""
    found = {path}
    for tensor in open_model(path).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                found.add(path.parent / entry.value)
    return sum(file.stat().st_size for file in found)


def random_inputs(
    model: onnx.ModelProto, batch_size: int, sizes: Mapping[str, int], seed: int
) -> list[Array]:
    """Inputs of the types and shapes that a model asks for.

    Floats are standard normal, integers and booleans are one: a valid token, and a mask that hides
    nothing.

    Args:
        model: its inputs' first axes are the batch.
        batch_size: the size of the first axis, unless the model fixes it.
        sizes: of the other axes that the model leaves open, by their names; by default those that
            the file notes.
        seed: of the values.

    Raises:
        MeasurementError: an axis is open and has no size, or an input is no tensor of numbers.
    """
    generator = np.random.default_rng(seed)
    weights = {tensor.name for tensor in model.graph.initializer}
    known = {**noted_sizes(model), **sizes}
    inputs = []
    for value in model.graph.input:
        if value.name not in weights:
            shape = _shape(value, batch_size, known)
            inputs.append(_values(value, shape, generator))
    return inputs


def _shape(value: onnx.ValueInfoProto, batch_size: int, sizes: Mapping[str, int]) -> list[int]:
    shape = []
    for axis, size in enumerate(value.type.tensor_type.shape.dim):
        if size.HasField("dim_value"):
            shape.append(size.dim_value)
        elif size.dim_param in sizes:
            shape.append(sizes[size.dim_param])
        elif axis == 0:
            shape.append(batch_size)
        else:
            raise MeasurementError(
                "The model leaves the size of an axis open.",
                given=f"input {value.name}, axis {axis}, called '{size.dim_param}'",
                allowed=f"sizes for {', '.join(sizes) or 'no axis'} were given",
                advice=f"give its size, as in --size {size.dim_param or 'NAME'}=64, or real "
                "inputs with --inputs FILE.npz",
            )
    return shape


def _values(value: onnx.ValueInfoProto, shape: list[int], generator: np.random.Generator) -> Array:
    kind: Any = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if np.issubdtype(kind, np.floating):
        return generator.standard_normal(shape).astype(kind)
    if np.issubdtype(kind, _INTEGERS) or kind == np.bool_:
        return np.ones(shape, kind)
    raise MeasurementError(
        "Random values cannot be made for an input.",
        given=f"{value.name} of type {kind}",
        allowed="floats, integers, booleans",
        advice="give real inputs with --inputs FILE.npz",
    )
