"""The element types of ONNX tensors, as integers or as the fields of floats."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from autocompress.export.coding.ranges import Ints
from autocompress.export.coding.stream import malformed

Numbers = NDArray[np.uint64]


@final
@dataclass(frozen=True)
class IntegerType:
    """Integers of `bits` bits; those under 8 bits share bytes, the first in the low bits."""

    code: int
    bits: int
    signed: bool

    def read(self, data: bytes, count: int) -> Ints:
        """The integers of raw_data; flat."""
        if self.bits >= 8:
            kind = "i" if self.signed else "u"
            return np.frombuffer(data, f"<{kind}{self.bits // 8}").astype(np.int64)
        packed = np.frombuffer(data, np.uint8).astype(np.int64)
        shifts = np.arange(0, 8, self.bits, dtype=np.int64)
        values = ((packed[:, None] >> shifts) & ((1 << self.bits) - 1)).reshape(-1)[:count]
        half = 1 << (self.bits - 1)
        return (values ^ half) - half if self.signed else values

    def write(self, values: Ints) -> bytes:
        """The inverse of `read`.

        Raises:
            ExportError: a value is outside the type's range.
        """
        low = -(1 << (self.bits - 1)) if self.signed else 0
        if values.size and (int(values.min()) < low or int(values.max()) - low >> self.bits):
            raise malformed("a value outside its type's range")
        if self.bits >= 8:
            kind = "i" if self.signed else "u"
            return values.astype(f"<{kind}{self.bits // 8}").tobytes()
        per_byte = 8 // self.bits
        padded = np.zeros(-(-len(values) // per_byte) * per_byte, np.int64)
        padded[: len(values)] = values & ((1 << self.bits) - 1)
        shifts = np.arange(0, 8, self.bits, dtype=np.int64)
        packed: Ints = (padded.reshape(-1, per_byte) << shifts).sum(1)
        return packed.astype(np.uint8).tobytes()


@final
@dataclass(frozen=True)
class FloatType:
    """Floats of a sign, `exponent` bits and the rest mantissa."""

    code: int
    bits: int
    exponent: int

    @property
    def low_bits(self) -> int:
        """Bits of mantissa and sign."""
        return self.bits - self.exponent

    def read(self, data: bytes) -> Numbers:
        """The floats' bits as numbers, sign last: exponent, mantissa, sign."""
        raw = np.frombuffer(data, f"<u{self.bits // 8}").astype(np.uint64)
        sign = raw >> np.uint64(self.bits - 1)
        numbers: Numbers = ((raw << np.uint64(1)) & self._mask) | sign
        return numbers

    def write(self, numbers: Numbers) -> bytes:
        """The inverse of `read`."""
        sign = (numbers & np.uint64(1)) << np.uint64(self.bits - 1)
        raw: NDArray[Any] = ((numbers >> np.uint64(1)) | sign).astype(f"<u{self.bits // 8}")
        return raw.tobytes()

    @property
    def _mask(self) -> Any:
        return np.uint64((1 << self.bits) - 1)


INTEGERS = (
    IntegerType(TensorProto.UINT8, 8, False),
    IntegerType(TensorProto.INT8, 8, True),
    IntegerType(TensorProto.UINT16, 16, False),
    IntegerType(TensorProto.INT16, 16, True),
    IntegerType(TensorProto.INT32, 32, True),
    IntegerType(TensorProto.UINT32, 32, False),
    IntegerType(TensorProto.INT64, 64, True),
    IntegerType(TensorProto.BOOL, 8, False),
    IntegerType(TensorProto.FLOAT8E4M3FN, 8, False),
    IntegerType(TensorProto.FLOAT8E4M3FNUZ, 8, False),
    IntegerType(TensorProto.FLOAT8E5M2, 8, False),
    IntegerType(TensorProto.FLOAT8E5M2FNUZ, 8, False),
    IntegerType(TensorProto.UINT4, 4, False),
    IntegerType(TensorProto.INT4, 4, True),
    IntegerType(TensorProto.FLOAT4E2M1, 4, False),
    # UINT2 and INT2, which the oldest supported onnx does not name.
    IntegerType(25, 2, False),
    IntegerType(26, 2, True),
)
FLOATS = (
    FloatType(TensorProto.FLOAT, 32, 8),
    FloatType(TensorProto.FLOAT16, 16, 5),
    FloatType(TensorProto.BFLOAT16, 16, 8),
    FloatType(TensorProto.DOUBLE, 64, 11),
)
# Bytes without a meaning; no ONNX type has this number.
UNTYPED = 0
_TYPES: dict[int, IntegerType | FloatType] = {x.code: x for x in (*INTEGERS, *FLOATS)}


def element_type(code: int) -> IntegerType | FloatType | None:
    """The type with an ONNX number; None for those whose bytes are coded without a meaning."""
    return _TYPES.get(code)


def byte_size(code: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's raw_data; an untyped tensor's shape is its number of bytes."""
    kind = element_type(code)
    return -(-prod(shape) * (kind.bits if kind else 8) // 8)
