"""Bytes read with care, varints, and general compression: the container's small parts."""

from __future__ import annotations

import lzma
import zlib
from typing import Any, final

from autocompress.errors import ExportError

# Literal context, literal position and position bits; protobuf mostly likes the first.
_SETTINGS = ((3, 0, 0), (4, 0, 0), (3, 0, 2), (2, 2, 2), (0, 2, 2))
_LARGEST_DICTIONARY = 1 << 26
_SAMPLE = 1 << 15
_NOISE = 0.99
_VARINT_BYTES = 10


def malformed(detail: str) -> ExportError:
    """The error of a container that no encoder wrote."""
    return ExportError(
        "The coded model is malformed.",
        given=detail,
        allowed="a whole file as `encode_model` wrote it",
        advice="fetch or encode the file again",
    )


@final
class ByteReader:
    """Takes bytes from the front; ExportError where there are not enough."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self.left:
            raise malformed(f"{size} bytes expected, {self.left} left")
        self._at += size
        return self._data[self._at - size : self._at]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def peek(self) -> int:
        """The next byte, left where it is."""
        if not self.left:
            raise malformed("a byte expected, none left")
        return self._data[self._at]

    def varint(self, largest: int) -> int:
        """The next number, at most `largest`."""
        value = 0
        for place in range(_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                if value > largest:
                    raise malformed(f"a size of {value} where at most {largest} is possible")
                return value
        raise malformed("a number of more than ten bytes")

    def end(self) -> None:
        """Check that nothing is left."""
        if self.left:
            raise malformed(f"{self.left} bytes too many")


def varint(value: int) -> bytes:
    """A non-negative number, seven bits a byte, low bits first."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def zigzag(value: int) -> int:
    """A signed number as a non-negative one, small for small magnitudes."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)


def compress(data: bytes, *, thorough: bool = False) -> bytes:
    """Raw LZMA without headers, its setting in the first byte.

    Args:
        thorough: try several settings and take the smallest result.
    """
    settings = range(len(_SETTINGS)) if thorough else (0,)
    return min((_compressed(data, k) for k in settings), key=len)


def may_shrink(data: bytes, bound: int) -> bool:
    """Whether a sample says that `compress` could need fewer than `bound` bytes: a quick look."""
    middle = max(0, (len(data) - _SAMPLE) // 2)
    sample = data[middle : middle + _SAMPLE]
    share = len(zlib.compress(sample)) / max(len(sample), 1)
    # LZMA seldom needs less than this share of what zlib needs.
    return share < _NOISE and 0.75 * share * len(data) < bound


def decompress(data: bytes, size: int) -> bytes:
    """The `size` bytes that were compressed.

    Raises:
        ExportError: the data are malformed or of another size.
    """
    if not data or data[0] >= len(_SETTINGS):
        raise malformed("an unknown compression setting")
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(size, data[0]))
        result = decoder.decompress(data[1:], max_length=size + 1)
    except (lzma.LZMAError, EOFError, ValueError) as cause:
        raise malformed(f"LZMA: {cause}") from cause
    if len(result) != size:
        raise malformed("compressed data of another size than declared")
    return result


def _compressed(data: bytes, setting: int) -> bytes:
    filters = _filters(len(data), setting)
    return bytes([setting]) + lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


def _filters(size: int, setting: int) -> list[dict[str, Any]]:
    lc, lp, pb = _SETTINGS[setting]
    dictionary = min(max(1 << (size - 1).bit_length() if size else 0, 1 << 12), _LARGEST_DICTIONARY)
    return [
        {"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": lp, "pb": pb,
         "preset": 9 | lzma.PRESET_EXTREME, "nice_len": 273}
    ]  # fmt: skip
