"""One tensor's contents to bytes and back, by the kind of its elements."""

from __future__ import annotations

from math import prod

from autocompress.export.coding.elements import IntegerType, byte_size, element_type
from autocompress.export.coding.floats import pack_floats, unpack_floats
from autocompress.export.coding.integers import (
    LARGEST_TENSOR,
    Method,
    pack_integers,
    unpack_integers,
)
from autocompress.export.coding.plain import pack_bytes, unpack_bytes
from autocompress.export.coding.stream import ByteReader, malformed

_PLAIN = (Method.STORED, Method.LZMA)


def pack_tensor(data: bytes, code: int, shape: tuple[int, ...]) -> bytes:
    """The smallest coding of a tensor's contents; at most one byte longer than they.

    Args:
        data: little-endian as in raw_data, `byte_size(code, shape)` long.
        code: ONNX's number of the element type.
    """
    kind = element_type(code)
    coded: bytes | None = None
    if isinstance(kind, IntegerType):
        values = kind.read(data, prod(shape))
        # Spare bits of the last byte may hold anything in a file of another tool.
        if kind.write(values) == data:
            coded = pack_integers(values, shape)
    elif kind is not None:
        coded = pack_floats(kind.read(data), shape, kind)
    if coded is not None and coded[0] in _PLAIN:
        coded = None
    bound = None if coded is None else len(coded)
    plain = pack_bytes(data, histogram=kind is None, bound=bound)
    return plain if coded is None or len(plain) < len(coded) else coded


def unpack_tensor(packed: bytes, code: int, shape: tuple[int, ...]) -> bytes:
    """The inverse of `pack_tensor`.

    Raises:
        ExportError: `packed` is malformed.
    """
    source = ByteReader(packed)
    kind = element_type(code)
    size = byte_size(code, shape)
    if kind is None or source.peek() in _PLAIN:
        data = unpack_bytes(source, size)
    elif prod(shape) > LARGEST_TENSOR:
        raise malformed(f"a tensor of {prod(shape)} elements in one piece")
    elif isinstance(kind, IntegerType):
        data = kind.write(unpack_integers(source, shape))
    else:
        data = kind.write(unpack_floats(source, shape, kind))
    source.end()
    return data


def method_name(packed: bytes) -> str:
    """What a coded tensor's method is called in reports."""
    return Method(packed[0]).name.lower()
