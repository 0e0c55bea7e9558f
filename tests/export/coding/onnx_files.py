"""ONNX files of many origins, and containers by hand, for the coding tests."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.export.coding.directory import Cut, pack_directory
from autocompress.export.coding.stream import compress, varint

KINDS = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE,
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT64, TensorProto.BOOL, TensorProto.INT4, TensorProto.UINT4,
    TensorProto.FLOAT8E4M3FN, TensorProto.COMPLEX64,
)  # fmt: skip
_BITS = {
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8,
    TensorProto.BOOL: 8, TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16, TensorProto.INT16: 16, TensorProto.FLOAT: 32, TensorProto.INT32: 32,
}  # fmt: skip


def raw_tensor(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape)
    tensor.raw_data = data
    return tensor


def random_tensor(name: str, kind: int, shape: tuple[int, ...]) -> TensorProto:
    size = -(-int(np.prod(shape)) * _BITS.get(kind, 64) // 8)
    data = np.random.default_rng(kind).binomial(255, 0.5, size).astype(np.uint8)
    return raw_tensor(name, kind, shape, data.tobytes())


def model_of(*initializers: TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> bytes:
    side = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    chain = (*nodes, helper.make_node("Identity", ["x"], ["y"]))
    graph = helper.make_graph(chain, "graph", [side], [out], initializer=initializers)
    return helper.make_model(graph).SerializeToString()


def small_model() -> bytes:
    """A matrix of small integers, one of floats, and a constant."""
    generator = np.random.default_rng(0)
    weight = np.clip(np.round(generator.laplace(size=(12, 20))), -127, 127).astype(np.int8)
    floats = generator.normal(size=(6, 10)).astype(np.float32)
    constant = numpy_helper.from_array(np.arange(40, dtype=np.int64), "steps")
    return model_of(
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(floats, "floats"),
        nodes=(helper.make_node("Constant", [], ["c"], value=constant),),
    )


def container_of(
    tensors: list[tuple[Cut, bytes]],
    wrong: Mapping[str, int | bytes] | None = None,
    rest: bytes = b"rest",
) -> bytes:
    """A container with right checksums and whatever contents; `wrong` replaces header fields."""
    changed = dict(wrong or {})
    directory = pack_directory([cut for cut, _ in tensors])
    section_1, section_2 = compress(directory + rest), b"".join(data for _, data in tensors)
    fields: dict[str, int | bytes] = {
        "file": len(rest) + sum(cut.file_bytes for cut, _ in tensors),
        "directory": len(directory),
        "rest": len(rest),
        "section_1": len(section_1),
        "section_2": len(section_2),
        "digest": hashlib.sha256(b"anything").digest()[:16],
    }
    section_1 = bytes(changed.pop("text", section_1))
    fields |= changed
    header = b"".join(x if isinstance(x, bytes) else varint(x) for x in fields.values())
    return sealed(b"\x93ACZ\x01" + header) + sealed(section_1) + sealed(section_2)


def sealed(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(4, "little")
