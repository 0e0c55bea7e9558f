"""Tensors of floats: palettes, zeros apart, or exponents apart from mantissas; bit for bit.

Sign and mantissa of trained weights are nearly noise; what can be saved is in the exponents (as in
ZipNN, M. Hershcovitch et al., arXiv:2411.05239), in zeros and in values that repeat.
"""

from __future__ import annotations

from math import prod

import numpy as np

from autocompress.export.coding.elements import FloatType, Numbers
from autocompress.export.coding.integers import Method, pack_integers, unpack_integers
from autocompress.export.coding.plain import pack_bytes, unpack_bytes
from autocompress.export.coding.ranges import Ints
from autocompress.export.coding.stream import ByteReader, malformed, varint

_LARGEST_PALETTE = 1 << 12
# Values that a palette's entry must stand for on average.
_PALETTE_GAIN = 3
_SPARSE_SHARE = 0.05


def pack_floats(numbers: Numbers, shape: tuple[int, ...], kind: FloatType) -> bytes:
    """The smallest coding of a tensor of floats.

    Args:
        numbers: as `FloatType.read` gives them, flat.
    """
    found = [_planes(numbers, shape, kind)]
    palette = _palette(numbers, shape, kind)
    if palette is not None:
        # A palette has no rival where it applies, unless it is nearly as long as the tensor.
        found.append(palette)
    zeros = int((numbers == 0).sum())
    if palette is None and _SPARSE_SHARE * numbers.size < zeros < numbers.size:
        sparse = _sparse(numbers, shape, kind)
        found += [] if sparse is None else [sparse]
    return min(found, key=len)


def unpack_floats(source: ByteReader, shape: tuple[int, ...], kind: FloatType) -> Numbers:
    """The inverse of `pack_floats`.

    Raises:
        ExportError: the source is malformed.
    """
    method = source.byte()
    if method == Method.PLANES:
        return _unpack_planes(source, shape, kind)
    if method == Method.PALETTE:
        size = source.varint(_LARGEST_PALETTE)
        values = np.cumsum(_unpack_planes(source, (size,), kind), dtype=np.uint64)
        values = _from_order(values & np.uint64((1 << kind.bits) - 1), kind)
        places = unpack_integers(source, shape)
        if not within(places, size):
            raise malformed("a palette's place that is not there")
        result: Numbers = values[places]
        return result
    if method == Method.SPARSE:
        mask = unpack_integers(source, shape)
        if not within(mask, 2):
            raise malformed("a mask that is neither zero nor one")
        result = np.zeros(mask.size, np.uint64)
        result[mask == 1] = _unpack_planes(source, (int(mask.sum()),), kind)
        return result
    raise malformed(f"method {method} for floats")


def _palette(numbers: Numbers, shape: tuple[int, ...], kind: FloatType) -> bytes | None:
    # A look at a part first: sorting every tensor of noise would take longer than coding it.
    if len(np.unique(numbers[: 4 * _LARGEST_PALETTE])) > _LARGEST_PALETTE:
        return None
    values, places = np.unique(_to_order(numbers, kind), return_inverse=True)
    if len(values) > min(_LARGEST_PALETTE, numbers.size // _PALETTE_GAIN):
        return None
    packed = pack_integers(places.reshape(-1).astype(np.int64), shape)
    if packed is None:
        return None
    steps = np.diff(values, prepend=np.uint64(0))
    head = bytes([Method.PALETTE]) + varint(len(values))
    return head + _planes(steps, (len(values),), kind)[1:] + packed


def _sparse(numbers: Numbers, shape: tuple[int, ...], kind: FloatType) -> bytes | None:
    mask = numbers != 0
    packed = pack_integers(mask.astype(np.int64), shape)
    if packed is None:
        return None
    rest = numbers[mask]
    return bytes([Method.SPARSE]) + packed + _planes(rest, (len(rest),), kind)[1:]


def _planes(numbers: Numbers, shape: tuple[int, ...], kind: FloatType) -> bytes:
    exponents = (numbers >> np.uint64(kind.low_bits)).astype(np.int64)
    packed = pack_integers(exponents, shape, one_sided=True)
    if packed is None:
        # Always the same exponent, mostly: a byte per entry compresses to nothing.
        packed = bytes([Method.LZMA]) + pack_bytes(exponents.astype("<u2").tobytes())
    low = (numbers & np.uint64((1 << kind.low_bits) - 1)).astype(np.uint64)
    planes = [
        pack_bytes(((low >> np.uint64(place)) & np.uint64(255)).astype(np.uint8).tobytes())
        for place in range(0, kind.low_bits, 8)
    ]
    return bytes([Method.PLANES]) + packed + b"".join(planes)


def _unpack_planes(source: ByteReader, shape: tuple[int, ...], kind: FloatType) -> Numbers:
    count = prod(shape)
    exponents = _unpack_exponents(source, shape)
    if not within(exponents, 1 << kind.exponent):
        raise malformed("an exponent outside its type's range")
    numbers: Numbers = exponents.astype(np.uint64) << np.uint64(kind.low_bits)
    for place in range(0, kind.low_bits, 8):
        plane = np.frombuffer(unpack_bytes(source, count), np.uint8).astype(np.uint64)
        if plane.size and int(plane.max()) >> (kind.low_bits - place):
            raise malformed("a mantissa outside its type's range")
        numbers |= plane << np.uint64(place)
    return numbers


def _unpack_exponents(source: ByteReader, shape: tuple[int, ...]) -> Ints:
    if source.peek() == Method.LZMA:
        source.byte()
        return np.frombuffer(unpack_bytes(source, 2 * prod(shape)), "<u2").astype(np.int64)
    return unpack_integers(source, shape)


def within(values: Ints, stop: int) -> bool:
    """Whether all values are from 0 to before `stop`."""
    return not values.size or (int(values.min()) >= 0 and int(values.max()) < stop)


def _to_order(numbers: Numbers, kind: FloatType) -> Numbers:
    """Numbers that are sorted as the floats are: negative ones first, descending in magnitude."""
    sign, size = numbers & np.uint64(1), numbers >> np.uint64(1)
    middle = np.uint64(1 << (kind.bits - 1))
    return np.asarray(np.where(sign == 1, middle - np.uint64(1) - size, middle + size), np.uint64)


def _from_order(numbers: Numbers, kind: FloatType) -> Numbers:
    middle = np.uint64(1 << (kind.bits - 1))
    negative = numbers < middle
    size = np.where(negative, middle - np.uint64(1) - numbers, numbers - middle)
    return np.asarray((size << np.uint64(1)) | negative.astype(np.uint64), np.uint64)
