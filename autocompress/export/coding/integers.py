"""Tensors of integers: the smallest of several codings, and its inverse.

A coded tensor starts with a byte that names its method; then come the method's parameters, the
length of its stream, and the stream.
"""

from __future__ import annotations

from enum import IntEnum, unique
from math import prod
from typing import final

import numpy as np

from autocompress.export.coding.histogram import (
    LARGEST_ALPHABET,
    code_histogram,
    entropy_bytes,
)
from autocompress.export.coding.layout import Layout, layouts
from autocompress.export.coding.ordered import code_ordered
from autocompress.export.coding.ranges import Ints, Reader, Writer
from autocompress.export.coding.steps import LARGEST_MAGNITUDE, step_size
from autocompress.export.coding.stream import ByteReader, malformed, unzigzag, varint, zigzag

# The range coder is never asked for more symbols than this per byte: decoding takes time in
# proportion to the file, whatever it says. Emptier tensors are left to LZMA.
SYMBOLS_PER_BYTE = 1024
# Larger tensors are coded in pieces, so that working memory stays bounded.
LARGEST_TENSOR = 1 << 24
_FREE_SYMBOLS = 256
_LARGEST_VALUE = 1 << 61
_TRIAL = 6144


@final
@unique
class Method(IntEnum):
    """How a tensor is coded; the values stand in files and never change."""

    STORED = 0
    LZMA = 1
    ORDERED = 2
    ORDERED_SWAPPED = 3
    HISTOGRAM = 4
    PALETTE = 5
    SPARSE = 6
    PLANES = 7


def pack_integers(values: Ints, shape: tuple[int, ...], *, one_sided: bool = False) -> bytes | None:
    """The smallest coding of a tensor of integers; None if none can hold it.

    Args:
        values: flat.
        shape: of the tensor.
        one_sided: also try to measure all values from the largest one: for exponents.
    """
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    found: list[bytes] = []
    if max(abs(low), abs(high)) > _LARGEST_VALUE:
        return None
    if high - low < LARGEST_MAGNITUDE:
        centre = int(np.partition(values, values.size // 2)[values.size // 2]) if values.size else 0
        centres = (centre, high) if one_sided else (centre,)
        layout, centre = _best_order(values, shape, centres)
        found += _ordered(values, layout, centre)
    if high - low < LARGEST_ALPHABET:
        symbols = values - low
        bound = min((len(x) for x in found), default=1 << 62)
        if not values.size or entropy_bytes(symbols) < bound:
            found += _histogram(symbols, low, high - low + 1)
    return min(found, key=len, default=None)


def unpack_integers(source: ByteReader, shape: tuple[int, ...]) -> Ints:
    """The inverse of `pack_integers`: the flat tensor.

    Raises:
        ExportError: the source is malformed.
    """
    method = source.byte()
    count = prod(shape)
    if method == Method.HISTOGRAM:
        low = unzigzag(source.varint(2 * _LARGEST_VALUE))
        alphabet = source.varint(LARGEST_ALPHABET)
        if not alphabet:
            raise malformed("an empty alphabet")
        return code_histogram(_stream(source, count), None, count, alphabet) + low
    if method not in (Method.ORDERED, Method.ORDERED_SWAPPED):
        raise malformed(f"method {method} for integers")
    swapped = method == Method.ORDERED_SWAPPED
    if swapped and len(shape) < 2:
        raise malformed("a vector cannot be transposed")
    centre = unzigzag(source.varint(2 * _LARGEST_VALUE))
    largest = source.varint(LARGEST_MAGNITUDE)
    if not largest:
        return np.full(count, centre, np.int64)
    step = source.varint(LARGEST_MAGNITUDE)
    if not step:
        raise malformed("a step of zero")
    stream = _stream(source, count)
    return code_ordered(stream, None, Layout(shape, swapped), step, largest) + centre


def allowed_symbols(size: int) -> int:
    """The most symbols that so many bytes may stand for."""
    return _FREE_SYMBOLS + SYMBOLS_PER_BYTE * size


def _stream(source: ByteReader, count: int) -> Reader:
    size = source.varint(source.left)
    if count > allowed_symbols(size):
        raise malformed(f"{count} symbols in {size} bytes")
    return Reader(source.take(size))


def _ordered(values: Ints, layout: Layout, centre: int) -> list[bytes]:
    shifted = values - centre
    largest, step = int(abs(shifted).max(initial=0)), step_size(abs(shifted))
    method = Method.ORDERED_SWAPPED if layout.swapped else Method.ORDERED
    head = bytes([method]) + varint(zigzag(centre)) + varint(largest)
    if not largest:
        return [head]
    writer = Writer()
    code_ordered(writer, shifted, layout, step, largest)
    return _with_stream(head + varint(step), writer, values.size)


def _histogram(symbols: Ints, low: int, alphabet: int) -> list[bytes]:
    writer = Writer()
    code_histogram(writer, symbols, len(symbols), alphabet)
    head = bytes([Method.HISTOGRAM]) + varint(zigzag(low)) + varint(alphabet)
    return _with_stream(head, writer, len(symbols))


def _with_stream(head: bytes, writer: Writer, count: int) -> list[bytes]:
    """The coded tensor, unless it is so small that its reader would refuse it."""
    stream = writer.finish()
    return [head + varint(len(stream)) + stream] if count <= allowed_symbols(len(stream)) else []


def _best_order(
    values: Ints, shape: tuple[int, ...], centres: tuple[int, ...]
) -> tuple[Layout, int]:
    """The layout and centre that code a corner of the tensor in the fewest bytes."""
    options = [(swapped, c) for swapped in (x.swapped for x in layouts(shape)) for c in centres]
    if len(options) == 1:
        return Layout(shape, options[0][0]), options[0][1]
    corner, size = _corner(values, shape)
    sizes = [sum(map(len, _ordered(corner, Layout(size, swapped), c))) for swapped, c in options]
    swapped, centre = options[sizes.index(min(sizes))]
    return Layout(shape, swapped), centre


def _corner(values: Ints, shape: tuple[int, ...]) -> tuple[Ints, tuple[int, ...]]:
    if len(shape) < 2:
        return values[:_TRIAL], (min(len(values), _TRIAL),)
    rest = max(1, prod(shape[2:]))
    share = max(1, round((_TRIAL / rest) ** 0.5))
    rows = min(shape[0], max(share, _TRIAL // max(1, rest * shape[1])))
    columns = min(shape[1], max(share, _TRIAL // (rest * rows)))
    corner = values.reshape(shape)[:rows, :columns]
    return np.ascontiguousarray(corner).reshape(-1), (rows, columns, *shape[2:])
