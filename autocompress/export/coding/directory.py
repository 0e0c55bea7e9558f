"""What was cut out of a file, and where: columns of varints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from autocompress.export.coding.elements import byte_size
from autocompress.export.coding.stream import ByteReader, malformed, varint

_MOST_DIMENSIONS = 16
_LARGEST_CODE = 255


@final
@dataclass(frozen=True)
class Cut:
    """A tensor that was cut out.

    Args:
        gap: bytes of the file between the cut before and this one.
        code: ONNX's number of the element type, or `elements.UNTYPED`.
        shape: of the tensor.
        coded_bytes: of its coding.
    """

    gap: int
    code: int
    shape: tuple[int, ...]
    coded_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes that were cut out."""
        return byte_size(self.code, self.shape)


def pack_directory(cuts: Sequence[Cut]) -> bytes:
    """The directory's bytes; columns, since equal columns compress well."""
    columns = [
        [len(cuts)],
        [cut.gap for cut in cuts],
        [cut.code for cut in cuts],
        [len(cut.shape) for cut in cuts],
        [size for cut in cuts for size in cut.shape],
        [cut.coded_bytes for cut in cuts],
    ]
    return b"".join(varint(value) for column in columns for value in column)


def unpack_directory(data: bytes, total: int, coded: int) -> tuple[Cut, ...]:
    """The inverse of `pack_directory`.

    Args:
        total: bytes that the cuts must have together.
        coded: bytes that their codings may have together; none is empty.

    Raises:
        ExportError: the directory is malformed or has another total.
    """
    source = ByteReader(data)
    most = 1 << 62
    count = source.varint(coded)
    gaps = [source.varint(most) for _ in range(count)]
    codes = [source.varint(_LARGEST_CODE) for _ in range(count)]
    ranks = [source.varint(_MOST_DIMENSIONS) for _ in range(count)]
    shapes = [_shape(source, rank, total) for rank in ranks]
    sizes = [source.varint(most) for _ in range(count)]
    source.end()
    cuts = tuple(Cut(*row) for row in zip(gaps, codes, shapes, sizes, strict=True))
    if sum(cut.file_bytes for cut in cuts) != total:
        raise malformed("tensors of other sizes than their file")
    return cuts


def _shape(source: ByteReader, rank: int, total: int) -> tuple[int, ...]:
    shape, size = [], 1
    for _ in range(rank):
        # The smallest type has four elements to a byte.
        length = source.varint(4 * total)
        size *= length
        if not length or size > 4 * total:
            raise malformed("a tensor larger than its file")
        shape.append(length)
    return tuple(shape)
