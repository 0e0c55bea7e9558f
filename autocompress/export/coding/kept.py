"""Coded tensors that are kept, for files that share them.

Candidates of one network share most of their tensors: what was not changed, and what the same
decision changed in the same way. Mixing contexts takes microseconds for every number: a minute for
a float embedding of half a file.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import final

from autocompress.export.coding.container import CONTAINER_VERSION
from autocompress.export.coding.tensors import pack_tensor, unpack_tensor
from autocompress.files import write_whole

# Smaller tensors are coded as fast as they are looked up.
_LEAST_BYTES = 1 << 14
_LARGEST_FOLDER = 1 << 30
_CRC_BYTES = 4


@final
@dataclass(frozen=True)
class _Known:
    """Where a coded tensor is kept, what it was, and whether it was seen to decode to that."""

    path: Path
    data: bytes
    proven: bool


@final
class KeptTensors:
    """Codes tensors, each once, and decodes each once; afterwards they are read from a folder.

    Args:
        folder: made if something is kept; processes may share it.
        largest_bytes: beyond this, `prune` deletes what was not used for longest.
    """

    def __init__(self, folder: Path, largest_bytes: int = _LARGEST_FOLDER) -> None:
        self._folder, self._largest_bytes = folder, largest_bytes
        self._known: dict[bytes, _Known] = {}

    def pack(self, data: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        """See `pack_tensor`."""
        if len(data) < _LEAST_BYTES:
            return pack_tensor(data, code, shape)
        path = self._folder / _key(data, code, shape)
        packed, proven = _read(path) or (pack_tensor(data, code, shape), None)
        if proven is None:
            _write(path, packed, proven=False)
        self._known[packed] = _Known(path, data, bool(proven))
        return packed

    def unpack(self, packed: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        """See `unpack_tensor`; what was once decoded to what `pack` was given is taken as that."""
        known = self._known.get(packed)
        if known is None:
            return unpack_tensor(packed, code, shape)
        if known.proven:
            return known.data
        data = unpack_tensor(packed, code, shape)
        if data == known.data:
            _write(known.path, packed, proven=True)
        return data

    def prune(self) -> None:
        """Delete what was not used for longest, until the folder is within its limit."""
        files = []
        for path in self._folder.glob("*"):
            # Another process may have deleted it.
            try:
                status = path.stat()
            except OSError:
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in files) - self._largest_bytes
        for _, size, path in sorted(files):
            if left <= 0:
                break
            path.unlink(missing_ok=True)
            left -= size


def _key(data: bytes, code: int, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr((CONTAINER_VERSION, code, shape)).encode())
    digest.update(data)
    return digest.hexdigest()


def _write(path: Path, packed: bytes, *, proven: bool) -> None:
    content = packed + bytes([proven])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content + _crc(content))


def _read(path: Path) -> tuple[bytes, bool] | None:
    """What is kept, and whether it is proven; None if it is not there or damaged."""
    try:
        os.utime(path)
        whole = path.read_bytes()
    except OSError:
        return None
    content = whole[:-_CRC_BYTES]
    if not content or _crc(content) != whole[-_CRC_BYTES:]:
        return None
    return content[:-1], bool(content[-1])


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CRC_BYTES, "little")
