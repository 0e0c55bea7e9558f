"""ONNX Runtime's own static int8 at its best: what the stock tool gives."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from autocompress.errors import ExportError

_BATCH = 32


@final
class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, names: Sequence[str], inputs: Sequence[NDArray[Any]]) -> None:
        self._batches = (
            {n: x[start : start + _BATCH] for n, x in zip(names, inputs, strict=True)}
            for start in range(0, len(inputs[0]), _BATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def stock_int8(
    original: Path, target: Path, names: Sequence[str], inputs: Sequence[NDArray[Any]]
) -> None:
    """Quantize a float ONNX file by the stock tool and write the result.

    Pre-processed, per-channel weights, unsigned activations: its best setting on x86 CPUs.

    Args:
        names: the model's input names.
        inputs: calibration inputs in that order, batch in dimension 0.

    Raises:
        ExportError: the tool fails on this network.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            prepared, result = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
            quant_pre_process(str(original), str(prepared))
            quantize_static(
                str(prepared), str(result), _Reader(names, inputs), quant_format=QuantFormat.QDQ,
                per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            result.replace(target)
    except Exception as cause:
        # The stock tool raises whatever its passes meet; the reference point is then left out.
        raise ExportError(
            f"ONNX Runtime's static quantizer fails on this network: {cause}"
        ) from cause
    finally:
        root.setLevel(level)
