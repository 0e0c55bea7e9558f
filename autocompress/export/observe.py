"""Values of a float model's tensors on calibration data, by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from autocompress.errors import ExportError


def run_float(
    model: onnx.ModelProto, inputs: Sequence[NDArray[Any]], tensors: Sequence[str]
) -> list[NDArray[np.float32]]:
    """Run a model and read some inner tensors beside its outputs.

    Args:
        inputs: one array per model input, batch in dimension 0.
        tensors: names of inner tensors.

    Returns:
        The outputs, then the tensors in the order given.

    Raises:
        ExportError: ONNX Runtime does not load or run the model.
    """
    names = [output.name for output in model.graph.output]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inner = [t for t in dict.fromkeys(tensors) if t not in names and not _is_input(model, t)]
    for name in inner:
        watched.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}
        values = dict(zip([*names, *inner], session.run([*names, *inner], feed), strict=True))
    except Exception as cause:
        # ONNX Runtime raises its own bare exceptions for every kind of fault in a model.
        raise ExportError(f"ONNX Runtime cannot run the model: {cause}") from cause
    values |= feed
    return [values[name] for name in (*names, *tensors)]


def _is_input(model: onnx.ModelProto, tensor: str) -> bool:
    return any(i.name == tensor for i in model.graph.input)
