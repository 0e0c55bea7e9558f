"""Coded tensors that are kept, for files that share them.

Candidates of one network share what was not changed, such as a float embedding of half the file,
and mixing contexts takes microseconds for every number: a minute for such a table.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import final

from autocompress.errors import ExportError
from autocompress.export.coding.container import CONTAINER_VERSION
from autocompress.export.coding.tensors import pack_tensor, unpack_tensor
from autocompress.export.coding.wire import find_spans
from autocompress.files import write_whole

# Smaller tensors are coded as fast as they are looked up.
_LEAST_BYTES = 1 << 14
_CRC_BYTES = 4


@final
class KeptTensors:
    """Codes tensors; those of one file are coded and decoded once, and then read from a folder.

    Args:
        folder: made if something is kept.
        shared: the ONNX file whose tensors are kept.
    """

    def __init__(self, folder: Path, shared: bytes) -> None:
        self._folder = folder
        self._wanted = {
            _key(shared[span.start : span.stop], span.code, span.shape)
            for span in find_spans(shared)
            if span.stop - span.start >= _LEAST_BYTES
        }
        self._proven: dict[bytes, bytes] = {}

    def pack(self, data: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        """See `pack_tensor`.

        Raises:
            ExportError: a tensor that is to be kept does not decode to what it was.
        """
        key = _key(data, code, shape) if len(data) >= _LEAST_BYTES else ""
        if key not in self._wanted:
            return pack_tensor(data, code, shape)
        path = self._folder / key
        packed = _read(path)
        if packed is None:
            packed = pack_tensor(data, code, shape)
            if unpack_tensor(packed, code, shape) != data:
                raise ExportError(
                    "A coded tensor does not give its contents back.",
                    given=f"element type {code}, shape {shape}",
                    advice="report this with the file: it is a defect of autocompress",
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, packed + _crc(packed))
        self._proven[packed] = data
        return packed

    def unpack(self, packed: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        """See `unpack_tensor`; what `pack` kept was decoded then and is not decoded again."""
        known = self._proven.get(packed)
        return unpack_tensor(packed, code, shape) if known is None else known


def _key(data: bytes, code: int, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr((CONTAINER_VERSION, code, shape)).encode())
    digest.update(data)
    return digest.hexdigest()


def _crc(packed: bytes) -> bytes:
    return zlib.crc32(packed).to_bytes(_CRC_BYTES, "little")


def _read(path: Path) -> bytes | None:
    """What is kept; None if it is not there or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    packed = content[:-_CRC_BYTES]
    return packed if _crc(packed) == content[-_CRC_BYTES:] else None
