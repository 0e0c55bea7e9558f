"""Every quantized layer of a float model in the form in which it ships."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import onnx
from numpy.typing import NDArray

from autocompress.device import DeviceProfile
from autocompress.errors import ExportError
from autocompress.export.codes import WeightCodes, weight_codes
from autocompress.export.dynamic import run_dynamically
from autocompress.export.edit import TABLE_OPERATOR, constant_tensors, layers_of
from autocompress.export.exporter import FloatModel, StoredIntegers
from autocompress.export.nbits import BITS, GROUP_SIZE, OPERATOR, use_kernel
from autocompress.export.observe import observe
from autocompress.export.packed import store_codebooks, store_integers
from autocompress.export.qdq import StaticLayer, StaticRewriter

# How a layer runs. Emulated: inputs are rounded, the arithmetic is in floating point. Storage
# only: the weight is small in the file and a float tensor once the model is loaded.
Label = Literal[
    "int8", "int8 dynamic", "int8 emulated", "int16 emulated", "4-bit kernel", "storage only"
]
_INTEGER_LABELS: tuple[Label, ...] = ("int8", "int8 dynamic")
_WEIGHT_BITS = (2, 3, 4, 7, 8, 32)
_FLOAT = 32


@final
@dataclass(frozen=True)
class QuantizedModel:
    """A model as it ships.

    Attributes:
        labels: by layer name, how each layer that is not a plain float one is stored and run.
    """

    model: onnx.ModelProto
    labels: Mapping[str, Label]

    @property
    def integer_layers(self) -> int:
        """How many layers run on integer kernels of 8 bits."""
        return sum(label in _INTEGER_LABELS for label in self.labels.values())


def quantize(
    floating: FloatModel, inputs: Sequence[NDArray[Any]], device: DeviceProfile
) -> QuantizedModel:
    """Give a float model's chosen layers their integers and codewords.

    Args:
        floating: without a chosen layer it stays as it is.
        inputs: calibration inputs, from which ranges of activations are taken.
        device: whose kernels are used.

    Raises:
        ExportError: a layer is to run as no runtime can, its weight does not lie on its grid, or
            it is no convolution or matrix product in the graph.
    """
    chosen = {name: stored for name, stored in floating.integers.items() if not _is_float(stored)}
    layers = {site.initializer: layer for layer, site in floating.graph.sites.items()}
    missing = sorted((chosen.keys() | floating.codebooks.keys()) - layers.keys())
    if missing:
        raise ExportError("No layer has the weight to be quantized.", given=", ".join(missing))
    model = onnx.ModelProto()
    model.CopyFrom(floating.graph.model)
    operators = _operators(model.graph, chosen)
    labels = {name: _label(layers[name], s, operators[name], device) for name, s in chosen.items()}
    if chosen or floating.codebooks:
        _rewrite(model, floating, inputs, labels)
    labels |= dict.fromkeys(floating.codebooks, "storage only")
    return QuantizedModel(model, {layers[name]: label for name, label in labels.items()})


def _operators(graph: onnx.GraphProto, weights: Iterable[str]) -> dict[str, set[str]]:
    """By a weight's name what reads it; a product with a constant is part of a table."""
    constant = constant_tensors(graph)

    def kind(node: onnx.NodeProto) -> str:
        return TABLE_OPERATOR if node.input[0] in constant else str(node.op_type)

    return {name: {kind(n) for n in layers_of(graph, name, tables=True)} for name in weights}


def _rewrite(
    model: onnx.ModelProto, floating: FloatModel, inputs: Sequence[NDArray[Any]],
    labels: Mapping[str, Label],
) -> None:  # fmt: skip
    sites = {site.initializer: site for site in floating.graph.sites.values()}
    values = {i.name: i for i in model.graph.initializer}
    codes = {
        name: weight_codes(values[name], sites[name].axis, floating.integers[name])
        for name in labels if floating.integers[name].how.bits < _FLOAT
    }  # fmt: skip
    static = [
        StaticLayer(name, floating.integers[name], codes[name] if label == "int8" else None)
        for name, label in labels.items()
        if label in ("int8", "int8 emulated", "int16 emulated")
    ]
    rewriter = StaticRewriter(model.graph, static)
    rewriter.rewrite(observe(floating.graph.model, inputs, rewriter.tensors)).insert(model)
    by_label: dict[Label, list[WeightCodes]] = {}
    for name, weight in codes.items():
        by_label.setdefault(labels[name], []).append(weight)
    run_dynamically(model, by_label.get("int8 dynamic", []))
    use_kernel(model, by_label.get("4-bit kernel", []))
    store_integers(model, [*by_label.get("storage only", []), *by_label.get("int16 emulated", [])])
    store_codebooks(model, [(sites[name], s) for name, s in floating.codebooks.items()])
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as cause:
        raise ExportError(f"The quantized ONNX file is invalid: {cause}") from cause


def _is_float(stored: StoredIntegers) -> bool:
    return stored.how.bits == stored.how.activation_bits == _FLOAT


def _label(layer: str, stored: StoredIntegers, operators: set[str], device: DeviceProfile) -> Label:
    """How a layer will run.

    Raises:
        ExportError: no runtime can run it so.
    """
    how = stored.how
    _check(layer, stored, table=TABLE_OPERATOR in operators)
    if how.dynamic and how.activation_bits < _FLOAT:
        return "int8 dynamic"
    if how.activation_bits == 8:
        return "int8" if how.bits < _FLOAT else "int8 emulated"
    if how.activation_bits == 16:
        return "int16 emulated"
    linear = not operators & {"Conv", TABLE_OPERATOR} and BITS in device.kernels.get(OPERATOR, ())
    if linear and (how.bits, how.group_size) == (BITS, GROUP_SIZE):
        return "4-bit kernel"
    return "storage only"


def _check(layer: str, stored: StoredIntegers, *, table: bool) -> None:
    how = stored.how
    wrong: tuple[tuple[bool, object, object], ...] = (
        (how.bits not in _WEIGHT_BITS, f"weights of {how.bits} bits", _WEIGHT_BITS),
        (
            how.activation_bits not in (8, 16, _FLOAT),
            f"inputs of {how.activation_bits} bits", (8, 16, _FLOAT),
        ),
        (
            how.dynamic and (how.activation_bits, how.bits == _FLOAT) != (8, False),
            f"dynamic inputs of {how.activation_bits} bits with weights of {how.bits}",
            "dynamic inputs of 8 bits with integer weights",
        ),
        (
            table and how.activation_bits < _FLOAT,
            f"an embedding with inputs of {how.activation_bits} bits",
            "an embedding's inputs are numbers of entries: only its weights have bits",
        ),
        (
            how.dynamic and how.signed, "dynamic signed inputs",
            "dynamic inputs are unsigned: ONNX defines `DynamicQuantizeLinear` so",
        ),
        (
            how.activation_bits == 8 and stored.scale.shape[1] > 1,
            f"8-bit inputs with weight scales for groups of {how.group_size} columns",
            "one scale per output channel, or floating-point inputs",
        ),
    )  # fmt: skip
    for is_wrong, given, allowed in wrong:
        if is_wrong:
            raise ExportError(
                f"Layer '{layer}' is to run as no runtime can.", given=given, allowed=allowed,
                advice="change the layer's `precision` in the search space",
            )  # fmt: skip
