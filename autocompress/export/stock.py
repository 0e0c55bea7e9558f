"""ONNX Runtime's own quantizer: what the stock tool gives."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from autocompress.device import DeviceProfile
from autocompress.errors import ExportError
from autocompress.graph import Layer
from autocompress.graph.recurrent import Recurrent

_BATCH = 32
_METHODS = (
    ("minmax", CalibrationMethod.MinMax),
    ("percentile", CalibrationMethod.Percentile),
    ("entropy", CalibrationMethod.Entropy),
)


@final
@dataclass(frozen=True)
class StockOptions:
    """Options of the stock tool; the defaults are its best setting for convolutions on x86 CPUs.

    Attributes:
        mode: whether ranges of activations are fixed or taken anew at each run.
        per_channel: one weight scale per output channel, else one per tensor.
        signed_activations: of static ranges; dynamic ones are always unsigned.
        calibration: how static ranges are found; entropy, by the tool's own settings, compares
            histograms of as many bins as there are integers and so cuts next to nothing.
        reduce_range: weights of 7 bits, for kernels whose sums saturate.
    """

    mode: Literal["static", "dynamic"] = "static"
    per_channel: bool = True
    signed_activations: bool = False
    calibration: Literal["minmax", "percentile", "entropy"] = "minmax"
    reduce_range: bool = False


def advised_options(
    network: nn.Module, layers: Sequence[Layer], device: DeviceProfile
) -> StockOptions:
    """The setting that the tool's documentation advises for a network on a device.

    Ranges are taken anew at each run for recurrent networks and transformers, told by linear layers
    with several positions; they are fixed for all others.

    Args:
        layers: all that the network has.
    """
    tokens = sum(x.macs for x in layers if x.kind == "linear" and x.positions > 1)
    rest = sum(x.macs for x in layers) - tokens
    recurrent = any(isinstance(module, (nn.RNNBase, Recurrent)) for module in network.modules())
    return StockOptions(
        "dynamic" if recurrent or tokens > rest else "static",
        reduce_range=device.integer_weight_bits < 8,
    )


@final
class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of equal size: histograms of the tool need tensors of one shape."""

    def __init__(self, names: Sequence[str], inputs: Sequence[NDArray[Any]]) -> None:
        size = min(_BATCH, len(inputs[0]))
        self._batches = (
            {n: x[start : start + size] for n, x in zip(names, inputs, strict=True)}
            for start in range(0, len(inputs[0]) - size + 1, size)
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)


def stock_quantize(
    model: onnx.ModelProto, target: Path, inputs: Sequence[NDArray[Any]], options: StockOptions
) -> None:
    """Quantize a float model by the stock tool, after its pre-processing, and write the result.

    Args:
        inputs: calibration inputs in the order of the model's, batch in dimension 0.

    Raises:
        ExportError: the tool fails on this network.
    """
    try:
        with _quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
            original, prepared, result = (Path(folder) / f"{n}.onnx" for n in "abc")
            onnx.save(model, original)
            # Its symbolic shapes give up on what transformers compute from an open length, and
            # leave files in the working directory; without them the result is the same.
            quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
            names = [entry.name for entry in model.graph.input]
            _quantize(prepared, result, _Reader(names, inputs), options)
            result.replace(target)
    except Exception as cause:
        # The stock tool raises whatever its passes meet.
        raise ExportError(
            f"ONNX Runtime's {options.mode} quantizer fails on this network: {cause}"
        ) from cause


def _quantize(source: Path, target: Path, reader: _Reader, options: StockOptions) -> None:
    if options.mode == "dynamic":
        quantize_dynamic(
            str(source), str(target), per_channel=options.per_channel, weight_type=QuantType.QInt8,
            reduce_range=options.reduce_range,
        )  # fmt: skip
        return
    activations = QuantType.QInt8 if options.signed_activations else QuantType.QUInt8
    quantize_static(
        str(source), str(target), reader, quant_format=QuantFormat.QDQ,
        per_channel=options.per_channel, activation_type=activations, weight_type=QuantType.QInt8,
        calibrate_method=dict(_METHODS)[options.calibration], reduce_range=options.reduce_range,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tool from printing advice; its errors say what matters."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
