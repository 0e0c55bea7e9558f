"""Lossless coding of ONNX files for download: smaller files, bit for bit the same models."""

from autocompress.export.coding.container import (
    DEFAULT_LIMIT_BYTES,
    CodedSizes,
    TensorSize,
    decode_model,
    describe,
    encode_model,
)
from autocompress.export.coding.files import CODED_SUFFIX, decode_file, encode_file, load_coded

__all__ = [
    "CODED_SUFFIX",
    "DEFAULT_LIMIT_BYTES",
    "CodedSizes",
    "TensorSize",
    "decode_file",
    "decode_model",
    "describe",
    "encode_file",
    "encode_model",
    "load_coded",
]
