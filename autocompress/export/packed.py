"""Weights that are stored small and become float tensors when the model is loaded.

A function of the ONNX file unpacks them: one node per layer, which writes the tensor that the
layer reads. All that it reads is constant, so a runtime computes it once, at load: ONNX Runtime
does at every optimization level but `none`. `DequantizeLinear` would be kept and run each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.export.codes import WeightCodes, check_codewords
from autocompress.export.edit import put_first, swap_initializers, use_domain
from autocompress.export.exporter import StoredCodebook
from autocompress.export.skeleton import WeightSite

DOMAIN = "autocompress"
# How the initializers that store a weight are called after the float one.
_SUFFIXES = ("", "_quantized", "_scale", "_zero_point", "_codes", "_codebook")


def stored_weight_bytes(model: onnx.ModelProto, initializer: str) -> int:
    """Bytes of a layer's weight in a file: integers, scales and codebooks, biases left out.

    Args:
        initializer: the weight's name in the float model.
    """
    names = {f"{initializer}{suffix}" for suffix in _SUFFIXES}
    return sum(numpy_helper.to_array(i).nbytes for i in model.graph.initializer if i.name in names)


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes of 2 or 4 bits in bytes, the first in the lowest bits; any shape to (n,)."""
    each = 8 // bits
    flat: NDArray[np.uint8] = codes.astype(np.uint8).reshape(-1)
    columns = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    packed: NDArray[np.uint8] = np.zeros(len(columns), np.uint8)
    for place in range(each):
        packed |= columns[:, place] << np.uint8(place * bits)
    return packed


def storage_bits(bits: int) -> int:
    """Bits that a stored code takes: 3 take 4, and 7 take 8, so that none straddles two bytes."""
    return {3: 4, 7: 8}.get(bits, bits)


def store_integers(model: onnx.ModelProto, weights: Sequence[WeightCodes]) -> None:
    """Store weights as integers of 8, 4 or 2 bits that are unpacked at load, in place."""
    functions = [_integer_function(weight) for weight in weights]
    calls = [
        _Call(
            weight.initializer,
            weight.shape[::-1] if weight.axis else weight.shape,
            {"_quantized": _packed_codes(weight), "_scale": weight.scale},
            function,
        )
        for weight, function in zip(weights, functions, strict=True)
    ]
    _unpack_at_load(model, calls)


def store_codebooks(
    model: onnx.ModelProto, weights: Sequence[tuple[WeightSite, StoredCodebook]]
) -> None:
    """Store weights as codewords that are looked up at load, in place.

    Raises:
        ExportError: a weight is not what its codewords say.
    """
    values = {i.name: i for i in model.graph.initializer}
    calls = []
    for site, stored in weights:
        check_codewords(values[site.initializer], site.axis, stored)
        bits = stored.how.code_bits
        codes: NDArray[Any] = stored.codes
        codes = pack(codes, bits) if bits < 8 else codes.astype(f"uint{bits}")
        shape = tuple(values[site.initializer].dims)
        tensors = {"_codes": codes, "_codebook": stored.codebook, "_scale": stored.scale}
        calls.append(
            _Call(
                site.initializer,
                shape[::-1] if site.axis else shape,
                tensors,
                _codebook_function(bits, site.axis),
            )
        )
    _unpack_at_load(model, calls)


@final
@dataclass(frozen=True)
class _Call:
    """A weight, its shape with output channels first, what is stored of it, and its function."""

    initializer: str
    shape: tuple[int, ...]
    tensors: Mapping[str, NDArray[Any]]
    function: onnx.FunctionProto


def _unpack_at_load(model: onnx.ModelProto, calls: Sequence[_Call]) -> None:
    added: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    functions: dict[str, onnx.FunctionProto] = {}
    for call in calls:
        functions.setdefault(call.function.name, call.function)
        named = {f"{call.initializer}{s}": tensor for s, tensor in call.tensors.items()}
        # Layers of one shape share it.
        shape = "shape_" + "x".join(map(str, call.shape))
        arrays = {**named, shape: np.array(call.shape, np.int64)}
        added += [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in arrays.items()]
        name = call.initializer
        nodes.append(
            helper.make_node(
                call.function.name, list(arrays), [name], f"{name}_unpack", domain=DOMAIN
            )
        )
    for function in functions.values():
        function.opset_import.extend(e for e in model.opset_import if e.domain == "")
        model.functions.append(function)
    if calls:
        use_domain(model, DOMAIN)
    put_first(model.graph, nodes)
    swap_initializers(model.graph, {call.initializer for call in calls}, added)


def _packed_codes(weight: WeightCodes) -> NDArray[Any]:
    bits = storage_bits(weight.bits)
    return weight.codes if bits == 8 else pack(weight.codes + 2 ** (bits - 1), bits)


def _integer_function(weight: WeightCodes) -> onnx.FunctionProto:
    bits = storage_bits(weight.bits)
    group_size = weight.group_size if weight.scale.shape[1] > 1 else None
    body = _Body()
    if bits == 8:
        rows = body.rows(body.cast("codes", onnx.TensorProto.FLOAT))
    else:
        codes = body.cast(body.unpacked("codes", bits), onnx.TensorProto.FLOAT)
        offset = body.constant(np.float32(2 ** (bits - 1)))
        rows = body.rows(body.node("Sub", (codes, offset)))
    scale = "scale" if group_size is None else body.columns("scale", rows, group_size)
    name = f"Int{bits}" + (f"Group{group_size}" if group_size else "")
    product = body.node("Mul", (rows, scale))
    return body.function(name, ("codes", "scale", "shape"), product, weight.axis)


def _codebook_function(bits: int, axis: int) -> onnx.FunctionProto:
    body = _Body()
    codes = body.unpacked("codes", bits) if bits < 8 else "codes"
    index = body.cast(codes, onnx.TensorProto.INT32)
    rows = body.rows(body.node("Gather", ("codebook", index)))
    product = body.node("Mul", (rows, "scale"))
    inputs = ("codes", "codebook", "scale", "shape")
    return body.function(f"Codebook{bits}", inputs, product, axis)


@final
class _Body:
    """The nodes of a function that makes a weight of the input `shape`, output channels first."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []

    def node(
        self, operator: str, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None
    ) -> str:
        """Add a node; the name of its output."""
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **(attributes or {})))
        return output

    def constant(self, value: Any) -> str:
        """Add a constant tensor; its name."""
        return self.node("Constant", (), {"value": numpy_helper.from_array(np.asarray(value))})

    def cast(self, values: str, to: int) -> str:
        """The values as another type."""
        return self.node("Cast", (values,), {"to": to})

    def unpacked(self, packed: str, bits: int) -> str:
        """Codes of 2 or 4 bits, one per byte, shape (bytes, 8 / bits)."""
        shifts = self.constant((np.arange(8 // bits) * bits).astype(np.uint8))
        column = self.node("Unsqueeze", (packed, self._ints(-1)))
        shifted = self.node("BitShift", (column, shifts), {"direction": "RIGHT"})
        return self.node("BitwiseAnd", (shifted, self.constant(np.uint8(2**bits - 1))))

    def rows(self, values: str) -> str:
        """Values in the weight's order, without those that filled the last byte: (out, in)."""
        count = self.node("ReduceProd", ("shape",), {"keepdims": 1})
        flat = self.node("Reshape", (values, self._ints(-1)))
        flat = self.node("Slice", (flat, self._ints(0), count))
        return self.node("Reshape", (flat, self._rows_shape()))

    def columns(self, scale: str, rows: str, group_size: int) -> str:
        """A scale per weight, (out, in), from one per group of columns, (out, groups)."""
        wide = self.node("Unsqueeze", (scale, self._ints(2)))
        wide = self.node("Expand", (wide, self._ints(1, 1, group_size)))
        wide = self.node("Reshape", (wide, self._rows_shape()))
        width = self.node("Shape", (rows,), {"start": 1, "end": 2})
        return self.node("Slice", (wide, self._ints(0), width, self._ints(1)))

    def function(
        self, name: str, inputs: tuple[str, ...], rows: str, axis: int
    ) -> onnx.FunctionProto:
        """The function that gives rows the weight's shape, its output channels on an axis."""
        if axis:
            weight, name = self.node("Transpose", (rows,), {"perm": [1, 0]}), f"{name}Transposed"
        else:
            weight = self.node("Reshape", (rows, "shape"))
        return helper.make_function(DOMAIN, name, list(inputs), [weight], self._nodes, [])

    def _rows_shape(self) -> str:
        out = self.node("Slice", ("shape", self._ints(0), self._ints(1)))
        return self.node("Concat", (out, self._ints(-1)), {"axis": 0})

    def _ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))
