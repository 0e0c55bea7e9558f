"""Where tensors' contents lie inside an ONNX file: protobuf read without building objects.

Offsets into the file as it is are what makes decoding exact for files of any origin: fields in any
order, unknown fields, and lengths in odd encodings stay in the rest of the file, untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import final

import onnx
from onnx import TensorProto

from autocompress.errors import ExportError
from autocompress.export.coding.elements import UNTYPED, byte_size, element_type
from autocompress.export.coding.integers import LARGEST_TENSOR

# Tensors under this many bytes stay in the rest, which is compressed as a whole.
SMALLEST_CUT = 96
_LARGEST_PIECE = 1 << 28
_DEPTH = 48
_MOST_DIMENSIONS = 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Which fields of which message lead to tensors (onnx.proto).
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _DOUBLE_DATA = 1, 2, 4, 8, 9, 10
_PACKED = {_FLOAT_DATA: TensorProto.FLOAT, _DOUBLE_DATA: TensorProto.DOUBLE}


@final
@dataclass(frozen=True)
class Span:
    """The contents of a tensor, or of some of its rows, in a file.

    Args:
        code: ONNX's number of the element type, or `elements.UNTYPED`.
        shape: of the rows; of untyped contents the number of bytes.
    """

    name: str
    code: int
    shape: tuple[int, ...]
    start: int
    stop: int


@final
@dataclass
class _Tensor:
    name: str = ""
    code: int = UNTYPED
    shape: list[int] = field(default_factory=list)
    contents: list[tuple[int, int, int]] = field(default_factory=list)


class _WireError(Exception):
    pass


def check_onnx(data: bytes) -> onnx.ModelProto:
    """The parsed file.

    Raises:
        ExportError: it is no ONNX model.
    """
    try:
        model = onnx.ModelProto()
        model.ParseFromString(data)
    except Exception as cause:
        # Protobuf's implementations differ in what they raise.
        raise _no_onnx(len(data)) from cause
    if not (model.HasField("graph") and model.ir_version):
        raise _no_onnx(len(data))
    return model


def external_tensors(model: onnx.ModelProto) -> int:
    """How many of a model's initializers lie in other files."""
    external = TensorProto.EXTERNAL
    return sum(tensor.data_location == external for tensor in model.graph.initializer)


def find_spans(data: bytes) -> tuple[Span, ...]:
    """Contents of at least 96 bytes of all tensors, in file order, none overlapping.

    A file that this reader does not understand has none: it is then compressed as a whole.
    """
    try:
        spans = list(_message(data, 0, len(data), "model", 0))
    except _WireError:
        return ()
    return tuple(piece for span in spans for piece in _pieces(span))


def _message(data: bytes, start: int, stop: int, kind: str, depth: int) -> Iterator[Span]:
    if depth > _DEPTH:
        raise _WireError
    if kind == "tensor":
        yield from _tensor(data, start, stop)
        return
    children = _CHILDREN[kind]
    for number, wire, first, last in _fields(data, start, stop):
        if wire == _BYTES and number in children:
            yield from _message(data, first, last, children[number], depth + 1)


def _tensor(data: bytes, start: int, stop: int) -> Iterator[Span]:
    tensor = _Tensor()
    for number, wire, first, last in _fields(data, start, stop):
        if number == _DIMS:
            at = first
            while at < last:
                value, at = _varint(data, at, last)
                tensor.shape.append(value)
        elif number == _DATA_TYPE and wire == _VARINT:
            tensor.code = _varint(data, first, last)[0]
        elif number == _NAME and wire == _BYTES:
            tensor.name = data[first:last].decode("utf-8", "replace")
        elif number in (_RAW_DATA, *_PACKED) and wire == _BYTES:
            tensor.contents.append((number, first, last))
    for number, first, last in tensor.contents:
        if last - first < SMALLEST_CUT:
            continue
        code, shape = tensor.code, tuple(tensor.shape)
        fits = len(shape) <= _MOST_DIMENSIONS and byte_size(code, shape) == last - first
        if not fits or element_type(code) is None or _PACKED.get(number, code) != code:
            code, shape = UNTYPED, (last - first,)
        yield Span(tensor.name, code, shape, first, last)


def _pieces(span: Span) -> Iterator[Span]:
    """Whole rows of a large tensor, few enough to be coded at once."""
    size = prod(span.shape)
    if span.code == UNTYPED:
        most = _LARGEST_PIECE
    elif size <= LARGEST_TENSOR:
        yield span
        return
    else:
        most = LARGEST_TENSOR
    row = size // span.shape[0]
    # Four rows of the smallest type fill whole bytes.
    rows = most // row // 4 * 4
    shape = span.shape
    if not rows:
        shape, row, rows = (size,), 1, most
    start = span.start
    for first in range(0, shape[0], rows):
        piece = (min(rows, shape[0] - first), *shape[1:])
        stop = start + byte_size(span.code, piece)
        yield Span(span.name, span.code, piece, start, stop)
        start = stop


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and stop of the value of each field of a message."""
    at = start
    while at < stop:
        tag, at = _varint(data, at, stop)
        wire = tag & 7
        if wire == _VARINT:
            last = _varint(data, at, stop)[1]
        elif wire == _BYTES:
            size, at = _varint(data, at, stop)
            last = at + size
        elif wire in (_FIXED64, _FIXED32):
            last = at + (8 if wire == _FIXED64 else 4)
        else:
            raise _WireError
        if last > stop:
            raise _WireError
        yield tag >> 3, wire, at, last
        at = last


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise _WireError


def _no_onnx(size: int) -> ExportError:
    return ExportError(
        "This is no ONNX model.",
        given=f"{size} bytes without a readable graph",
        allowed="a file as torch.onnx, onnx.save or autocompress wrote it",
        advice="encode the .onnx file itself, not an archive of it",
    )
