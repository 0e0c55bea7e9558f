"""Containers as files, and ready sessions from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import ExportError
from autocompress.export.coding.container import (
    DEFAULT_LIMIT_BYTES,
    CodedSizes,
    decode_model,
    encode_with_sizes,
)
from autocompress.export.coding.kept import KeptTensors
from autocompress.export.coding.tensors import pack_tensor, unpack_tensor
from autocompress.files import write_whole

if TYPE_CHECKING:
    import onnxruntime

CODED_SUFFIX = ".acz"


def encode_file(source: Path, target: Path, kept: KeptTensors | None = None) -> CodedSizes:
    """Write an ONNX file as a container, decoded once to be sure.

    Tensors that the ONNX file keeps in other files are not taken in; the sizes count them.

    Args:
        kept: codes the tensors; those that it keeps were decoded when they were coded.

    Raises:
        ExportError: `source` cannot be read or is no ONNX model.
    """
    data = _read(source)
    pack, unpack = (kept.pack, kept.unpack) if kept else (pack_tensor, unpack_tensor)
    container, sizes = encode_with_sizes(data, pack)
    limit = max(len(data), DEFAULT_LIMIT_BYTES)
    if decode_model(container, limit, unpack) != data:
        raise ExportError(
            "The container does not give the file back; nothing was written.",
            given=source,
            advice="report this with the file: it is a defect of autocompress",
        )
    _write(target, container)
    return sizes


def decode_file(source: Path, target: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> int:
    """Write a container's ONNX file, bit for bit.

    Returns:
        Bytes of the file.

    Raises:
        ExportError: `source` cannot be read or is malformed, or its file larger than the limit.
    """
    data = decode_model(_read(source), limit_bytes)
    _write(target, data)
    return len(data)


def load_coded(
    path: Path, threads: int = 1, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> onnxruntime.InferenceSession:
    """A session of a container's model, decoded in memory.

    Args:
        threads: that run one operator.

    Raises:
        ExportError: as `decode_file`, or ONNX Runtime refuses the model.
    """
    import onnxruntime

    data = decode_model(_read(path), limit_bytes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as cause:
        # ONNX Runtime's errors have no common type.
        raise ExportError(
            f"ONNX Runtime cannot load the decoded model: {cause}",
            given=path,
            advice="tensors in files beside the model cannot be loaded from a container",
        ) from cause


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as cause:
        raise ExportError(
            f"The file cannot be written: {cause}", given=path, advice="give another --out"
        ) from cause


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise ExportError(f"The file cannot be read: {cause}", given=path) from cause
