"""The container: an ONNX file's tensors each coded by the method that suits it, the rest by LZMA.

    magic (4), version (1)
    sizes of the file, directory, rest, and of the two sections (varints); SHA-256 of the file,
        first 16 bytes; CRC-32 of all of these
    section 1: LZMA of directory and rest; its CRC-32
    section 2: the coded tensors, one after another; its CRC-32

The rest is the file with the coded tensors' contents cut out; the directory says what was cut
where. Every size is checked before memory is taken, every checksum before anything is decoded, and
the SHA-256 says at last that the file is the very same.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from autocompress.errors import ExportError
from autocompress.export.coding.directory import Cut, pack_directory, unpack_directory
from autocompress.export.coding.stream import (
    ByteReader,
    compress,
    decompress,
    malformed,
    varint,
)
from autocompress.export.coding.tensors import method_name, pack_tensor, unpack_tensor
from autocompress.export.coding.wire import check_onnx, external_tensors, find_spans

DEFAULT_LIMIT_BYTES = 1 << 31
# Contents, element type and shape to coded bytes, and coded bytes, type and shape to contents.
Pack = Callable[[bytes, int, tuple[int, ...]], bytes]
Unpack = Callable[[bytes, int, tuple[int, ...]], bytes]
_MAGIC = b"\x93ACZ"
CONTAINER_VERSION = 1
_DIGEST_BYTES = 16
_CRC_BYTES = 4
# No tensor takes more in the directory; each has at least a byte in section 2.
_DIRECTORY_BYTES = 128


@final
@dataclass(frozen=True)
class TensorSize:
    """Where a file's bytes go: one tensor.

    Args:
        name: in the ONNX file.
        method: how it is coded; several, joined by "+", for a large tensor in pieces.
        file_bytes: of its contents in the ONNX file.
        coded_bytes: in the container.
    """

    name: str
    method: str
    file_bytes: int
    coded_bytes: int


@final
@dataclass(frozen=True)
class CodedSizes:
    """Where a container's bytes go.

    Args:
        file_bytes: of the ONNX file.
        coded_bytes: of the container.
        rest_file_bytes: of the graph and the small tensors in the ONNX file.
        rest_coded_bytes: of the same and the directory in the container.
        tensors: in file order.
        external_tensors: tensors that lie in other files, which the container does not hold.
    """

    file_bytes: int
    coded_bytes: int
    rest_file_bytes: int
    rest_coded_bytes: int
    tensors: tuple[TensorSize, ...]
    external_tensors: int

    @property
    def ratio(self) -> float:
        """Times that the container is smaller than the file."""
        return self.file_bytes / self.coded_bytes


@final
@dataclass(frozen=True)
class _Header:
    file: int
    directory: int
    rest: int
    section_1: int
    section_2: int
    digest: bytes

    def pack(self) -> bytes:
        sizes = (self.file, self.directory, self.rest, self.section_1, self.section_2)
        return b"".join(varint(x) for x in sizes) + self.digest


@final
@dataclass(frozen=True)
class _Parts:
    header: _Header
    cuts: tuple[Cut, ...]
    rest: bytes
    coded: tuple[bytes, ...]


def encode_model(onnx_bytes: bytes) -> bytes:
    """An ONNX file as a container; the same bytes for the same file and versions of the packages.

    Tensors that lie in other files (external data) are not taken in.

    Raises:
        ExportError: the bytes are no ONNX model.
    """
    return encode_with_sizes(onnx_bytes)[0]


def encode_with_sizes(onnx_bytes: bytes, pack: Pack = pack_tensor) -> tuple[bytes, CodedSizes]:
    """As `encode_model`, and where the container's bytes go.

    Args:
        pack: codes one tensor; see `pack_tensor`.
    """
    external = external_tensors(check_onnx(onnx_bytes))
    spans = find_spans(onnx_bytes)
    cuts, coded, rest, at = list[Cut](), list[bytes](), bytearray(), 0
    for span in spans:
        packed = pack(onnx_bytes[span.start : span.stop], span.code, span.shape)
        cuts.append(Cut(span.start - at, span.code, span.shape, len(packed)))
        coded.append(packed)
        rest += onnx_bytes[at : span.start]
        at = span.stop
    rest += onnx_bytes[at:]
    directory = pack_directory(cuts)
    section_1, section_2 = compress(directory + bytes(rest), thorough=True), b"".join(coded)
    header = _Header(
        len(onnx_bytes), len(directory), len(rest), len(section_1), len(section_2),
        _digest(onnx_bytes),
    )  # fmt: skip
    sections = (_MAGIC + bytes([CONTAINER_VERSION]) + header.pack(), section_1, section_2)
    container = b"".join(x + zlib.crc32(x).to_bytes(_CRC_BYTES, "little") for x in sections)
    parts = _Parts(header, tuple(cuts), bytes(rest), tuple(coded))
    return container, _sizes(len(container), parts, [span.name for span in spans], external)


def decode_model(
    container: bytes, limit_bytes: int = DEFAULT_LIMIT_BYTES, unpack: Unpack = unpack_tensor
) -> bytes:
    """The ONNX file, bit for bit.

    Args:
        limit_bytes: the largest file that will be made.
        unpack: decodes one tensor; see `unpack_tensor`.

    Raises:
        ExportError: the container is malformed, of a newer version, or its file too large.
    """
    try:
        parts = _open(container, limit_bytes)
        result, at = bytearray(), 0
        for cut, packed in zip(parts.cuts, parts.coded, strict=True):
            result += parts.rest[at : at + cut.gap]
            at += cut.gap
            result += unpack(packed, cut.code, cut.shape)
        result += parts.rest[at:]
        data = bytes(result)
    except MemoryError as cause:
        raise ExportError(
            "The model does not fit into this machine's memory.",
            given=f"a container of {len(container)} bytes",
            advice="decode it on a machine with more memory",
        ) from cause
    if _digest(data) != parts.header.digest:
        raise malformed("the decoded file's SHA-256 is another than the encoded file's")
    return data


def describe(container: bytes, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> CodedSizes:
    """Where a container's bytes go.

    Raises:
        ExportError: as `decode_model`.
    """
    data = decode_model(container, limit_bytes)
    parts, names = _open(container, limit_bytes), [span.name for span in find_spans(data)]
    if len(names) != len(parts.cuts):
        raise malformed("tensors cut where the file has none")
    return _sizes(len(container), parts, names, external_tensors(check_onnx(data)))


def _sizes(coded_bytes: int, parts: _Parts, names: Sequence[str], external: int) -> CodedSizes:
    tensors = _joined(names, parts.cuts, parts.coded)
    header = parts.header
    return CodedSizes(header.file, coded_bytes, header.rest, header.section_1, tensors, external)


def _joined(
    names: Sequence[str], cuts: Sequence[Cut], coded: Sequence[bytes]
) -> tuple[TensorSize, ...]:
    """One entry per tensor; pieces of a large one follow each other."""
    entries: list[TensorSize] = []
    for name, cut, packed in zip(names, cuts, coded, strict=True):
        method, before, after = method_name(packed), cut.file_bytes, len(packed)
        # A piece follows its tensor's last one without a gap; tensors have headers in between.
        if cut.gap == 0 and entries:
            last = entries.pop()
            methods = dict.fromkeys([*last.method.split("+"), method])
            method = "+".join(methods)
            before, after = before + last.file_bytes, after + last.coded_bytes
        entries.append(TensorSize(name, method, before, after))
    return tuple(entries)


def _open(container: bytes, limit_bytes: int) -> _Parts:
    source = ByteReader(container)
    header = _read_header(source, limit_bytes)
    section_1 = _section(source, header.section_1)
    section_2 = ByteReader(_section(source, header.section_2))
    source.end()
    text = decompress(section_1, header.directory + header.rest)
    directory, rest = text[: header.directory], text[header.directory :]
    cuts = unpack_directory(directory, header.file - header.rest, header.section_2)
    if sum(cut.gap for cut in cuts) > header.rest:
        raise malformed("tensors beyond the end of the file")
    coded = tuple(section_2.take(cut.coded_bytes) for cut in cuts)
    section_2.end()
    return _Parts(header, cuts, rest, coded)


def _read_header(source: ByteReader, limit_bytes: int) -> _Header:
    total = source.left
    if source.left < len(_MAGIC) + 1 or source.take(len(_MAGIC)) != _MAGIC:
        raise ExportError(
            "This is no coded model.",
            given=f"{total} bytes with another beginning",
            allowed="a container as `encode_model` wrote it",
        )
    version = source.byte()
    if version != CONTAINER_VERSION:
        raise ExportError(
            "This coded model is of another version.",
            given=f"version {version}",
            allowed=f"version {CONTAINER_VERSION}",
            advice="update autocompress",
        )
    file, directory, rest, section_1, section_2 = (source.varint(1 << 62) for _ in range(5))
    digest = source.take(_DIGEST_BYTES)
    header = _Header(file, directory, rest, section_1, section_2, digest)
    _check_crc(source, _MAGIC + bytes([version]) + header.pack())
    if header.file > limit_bytes:
        raise ExportError(
            "The coded model's file is larger than the limit.",
            given=f"{header.file} bytes",
            allowed=f"{limit_bytes} bytes",
            advice="raise limit_bytes if you trust the container's source",
        )
    if header.rest > header.file:
        raise malformed("a part larger than the whole")
    if header.directory > _DIRECTORY_BYTES * (header.section_2 + 1):
        raise malformed(f"a directory of {header.directory} bytes")
    return header


def _section(source: ByteReader, size: int) -> bytes:
    data = source.take(size)
    _check_crc(source, data)
    return data


def _check_crc(source: ByteReader, data: bytes) -> None:
    if int.from_bytes(source.take(_CRC_BYTES), "little") != zlib.crc32(data):
        raise malformed("a checksum that does not fit")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]
