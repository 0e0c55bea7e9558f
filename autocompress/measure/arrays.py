"""Arrays on their way to and from a child process: uncompressed .npz files, order kept."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.errors import MeasurementError
from autocompress.measure.session import Array

_CHUNK = 1 << 20


def write_arrays(path: Path, arrays: Sequence[Array]) -> None:
    """Write arrays to an .npz file that appears at once or not at all."""
    handle, name = tempfile.mkstemp(suffix=".npz", prefix=".unfinished-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, *arrays)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_arrays(path: Path) -> tuple[Array, ...]:
    """The arrays of an .npz file, in the order in which they were written.

    Raises:
        MeasurementError: the file is missing, is no .npz file or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return tuple(data[name] for name in data.files)
    except (OSError, ValueError, AttributeError) as cause:
        raise MeasurementError(
            f"The arrays cannot be read: {cause}",
            given=path,
            allowed="an .npz file of plain arrays, one per model input",
        ) from cause


def content_key(arrays: Sequence[Array]) -> str:
    """Thirty-two hexadecimal digits that stand for the arrays' types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def file_key(path: Path) -> tuple[str, int, int]:
    """Path, time of change and size: equal as long as a file has not been written anew."""
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size


def content_name(path: Path) -> str:
    """A name that stands for a file's content and shows where it came from."""
    digest = hashlib.blake2b(digest_size=12)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"{digest.hexdigest()}-{plain_name(path.name)}"


def plain_name(name: str) -> str:
    """The end of a name, with its suffix, in characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-60:]


def rows_of(inputs: Sequence[Array], given: Any) -> int:
    """The common length of the inputs' first axis.

    Raises:
        MeasurementError: there is no input, or the inputs' first axes differ or are empty.
    """
    rows = {array.shape[0] if array.ndim else 0 for array in inputs}
    if len(rows) != 1 or 0 in rows:
        raise MeasurementError(
            "Model inputs need one common first axis, the batch.",
            given=f"{given}: shapes {[array.shape for array in inputs]}",
            allowed="arrays with the same number of rows, at least one",
        )
    return rows.pop()
