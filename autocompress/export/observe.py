"""Values of a float model's tensors on calibration data, by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from autocompress.errors import ExportError
from autocompress.export.ranges import Observed

# Inputs that are run at once: the inner tensors of one run are held in memory together.
_BATCH = 32
_SAMPLED_VALUES = 50_000


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
    session = _session(model, tensors)
    names = [output.name for output in model.graph.output]
    return _run(session, inputs, [*names, *tensors])


def observe(
    model: onnx.ModelProto, inputs: Sequence[NDArray[Any]], tensors: Sequence[str]
) -> dict[str, Observed]:
    """Ranges and sampled values of inner tensors, batch by batch.

    Of a large tensor a random sample, always the same, is kept: not evenly spaced values, since
    a stride that divides the width would see some features only. The smallest and the largest
    value are in it too, so that no calibration believes that cutting them costs nothing.

    Args:
        inputs: one array per model input, batch in dimension 0.
        tensors: names of inner tensors.

    Raises:
        ExportError: ONNX Runtime does not load or run the model.
    """
    session = _session(model, tensors)
    starts = range(0, len(inputs[0]), _BATCH)
    quota = -(-_SAMPLED_VALUES // len(starts))
    lows, highs = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    samples: dict[str, list[NDArray[np.float32]]] = {name: [] for name in tensors}
    for start in starts:
        batch = [x[start : start + _BATCH] for x in inputs]
        for name, value in zip(tensors, _run(session, batch, tensors), strict=True):
            flat = value.reshape(-1)
            # NumPy's minimum, which keeps a NaN.
            lows[name] = float(np.minimum(lows[name], flat.min()))
            highs[name] = float(np.maximum(highs[name], flat.max()))
            if flat.size > quota:
                flat = flat[np.random.default_rng(start).integers(flat.size, size=quota)]
            samples[name].append(flat)
    for name in tensors:
        samples[name].append(np.array([lows[name], highs[name]], np.float32))
    return {
        name: Observed(lows[name], highs[name], np.concatenate(samples[name])) for name in tensors
    }


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> ort.InferenceSession:
    """A session with some inner tensors among its outputs."""
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    for name in dict.fromkeys(tensors):
        if name not in known:
            watched.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    data = watched.SerializeToString()
    # The session has weights of its own.
    del watched
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # As many threads as PyTorch may use: others measure on the other cores.
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as cause:
        # ONNX Runtime raises its own bare exceptions for every kind of fault in a model.
        raise ExportError(f"ONNX Runtime cannot load the model: {cause}") from cause


def _run(
    session: ort.InferenceSession, inputs: Sequence[NDArray[Any]], names: Sequence[str]
) -> list[NDArray[np.float32]]:
    feed = {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}
    wanted = [name for name in dict.fromkeys(names) if name not in feed]
    try:
        found = session.run(wanted, feed) if wanted else []
    except Exception as cause:
        raise ExportError(f"ONNX Runtime cannot run the model: {cause}") from cause
    values = {**dict(zip(wanted, found, strict=True)), **feed}
    return [values[name] for name in names]
