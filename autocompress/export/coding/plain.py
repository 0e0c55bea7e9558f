"""Bytes without a known meaning: stored, as a histogram, or by LZMA."""

from __future__ import annotations

import numpy as np

from autocompress.export.coding.histogram import code_histogram, entropy_bytes
from autocompress.export.coding.integers import LARGEST_TENSOR, Method, allowed_symbols
from autocompress.export.coding.ranges import Ints, Reader, Writer
from autocompress.export.coding.stream import (
    ByteReader,
    compress,
    decompress,
    malformed,
    may_shrink,
    varint,
)

# Nearer to eight bits a byte, an adaptive histogram costs more to learn than it saves.
_WORTHWHILE = 0.998


def pack_bytes(data: bytes, *, histogram: bool = True, bound: int | None = None) -> bytes:
    """The smallest coding of bytes; at most one byte longer than they.

    Args:
        histogram: whether to try this method too.
        bound: of no interest is a coding of more bytes than this.
    """
    found = [bytes([Method.STORED]) + data]
    if histogram and 0 < len(data) <= LARGEST_TENSOR:
        found += _histogram(np.frombuffer(data, np.uint8).astype(np.int64))
    if may_shrink(data, min(len(x) for x in found) if bound is None else bound):
        packed = compress(data)
        found.append(bytes([Method.LZMA]) + varint(len(packed)) + packed)
    return min(found, key=len)


def _histogram(symbols: Ints) -> list[bytes]:
    if entropy_bytes(symbols) > _WORTHWHILE * len(symbols):
        return []
    alphabet = int(symbols.max()) + 1
    writer = Writer()
    code_histogram(writer, symbols, len(symbols), alphabet)
    stream = writer.finish()
    if len(symbols) > allowed_symbols(len(stream)):
        return []
    return [bytes([Method.HISTOGRAM, alphabet - 1]) + varint(len(stream)) + stream]


def unpack_bytes(source: ByteReader, size: int) -> bytes:
    """The inverse of `pack_bytes`.

    Raises:
        ExportError: the source is malformed.
    """
    method = source.byte()
    if method == Method.STORED:
        return source.take(size)
    if method == Method.HISTOGRAM and size <= LARGEST_TENSOR:
        alphabet = source.byte() + 1
        length = source.varint(source.left)
        if size > allowed_symbols(length):
            raise malformed(f"{size} symbols in {length} bytes")
        symbols = code_histogram(Reader(source.take(length)), None, size, alphabet)
        return symbols.astype(np.uint8).tobytes()
    if method == Method.LZMA:
        return decompress(source.take(source.varint(source.left)), size)
    raise malformed(f"method {method} for bytes")
