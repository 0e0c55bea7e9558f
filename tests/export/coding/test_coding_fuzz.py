from __future__ import annotations

import contextlib
import time
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx_files import container_of, sealed, small_model

from autocompress.errors import ExportError
from autocompress.export.coding import decode_model, describe, encode_model
from autocompress.export.coding.directory import Cut
from autocompress.export.coding.integers import Method
from autocompress.export.coding.stream import compress, varint
from autocompress.export.coding.tensors import pack_tensor, unpack_tensor

INT8, INT4, FLOAT = TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT


@cache
def small_container() -> bytes:
    return encode_model(small_model())


def refused(container: bytes) -> None:
    began = time.process_time()
    with pytest.raises(ExportError):
        decode_model(container, 1 << 24)
    assert time.process_time() - began < 5


def test_every_truncation_is_refused() -> None:
    container = small_container()
    for size in range(len(container)):
        refused(container[:size])
    refused(container + b"\0")


def test_every_flipped_bit_is_refused() -> None:
    container = small_container()
    for place in range(len(container)):
        for bit in range(8):
            changed = bytearray(container)
            changed[place] ^= 1 << bit
            refused(bytes(changed))


def test_another_magic_or_version_is_named() -> None:
    container = small_container()
    with pytest.raises(ExportError, match="no coded model"):
        decode_model(b"\x89PNG" + container[4:])
    with pytest.raises(ExportError, match="version 2"):
        decode_model(container[:4] + b"\x02" + container[5:])


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)
    refused(b"\x93ACZ\x01" + data)
    refused(sealed(b"\x93ACZ\x01" + data))


# Streams after a tensor's method byte: parameters that no encoder writes.
_STREAM = varint(40) + bytes(range(40))
_HOSTILE = {
    "empty": b"",
    "no method": b"\xff",
    "far centre": bytes([Method.ORDERED]) + varint(1 << 61) + varint(3) + varint(1) + _STREAM,
    "huge magnitude": bytes([Method.ORDERED]) + varint(0) + varint(1 << 34) + varint(1) + _STREAM,
    "more magnitude": bytes([Method.ORDERED]) + varint(0) + varint(1 << 60) + varint(1) + _STREAM,
    "no step": bytes([Method.ORDERED]) + varint(0) + varint(3) + varint(0) + _STREAM,
    "huge step": bytes([Method.ORDERED]) + varint(0) + varint(9) + varint(1 << 34) + _STREAM,
    "swapped": bytes([Method.ORDERED_SWAPPED]) + varint(0) + varint(3) + varint(1) + _STREAM,
    "no alphabet": bytes([Method.HISTOGRAM]) + varint(0) + varint(0) + _STREAM,
    "huge alphabet": bytes([Method.HISTOGRAM]) + varint(0) + varint(1 << 40) + _STREAM,
    "far alphabet": bytes([Method.HISTOGRAM]) + varint(1 << 60) + varint(200) + _STREAM,
    "long stream": bytes([Method.ORDERED]) + varint(0) + varint(3) + varint(1) + varint(1 << 50),
    "endless number": bytes([Method.ORDERED]) + b"\xff" * 40,
    "bad lzma": bytes([Method.LZMA]) + varint(20) + bytes(20),
    "long lzma": bytes([Method.LZMA]) + varint(1 << 40),
    "other lzma": bytes([Method.LZMA]) + varint(len(compress(b"x"))) + compress(b"x"),
    "short store": bytes([Method.STORED]) + b"abc",
    "palette": bytes([Method.PALETTE]) + varint(0),
    "nested palette": bytes([Method.PALETTE]) * 100,
    "sparse": bytes([Method.SPARSE, Method.HISTOGRAM]) + varint(0) + varint(3) + _STREAM,
    "planes": bytes([Method.PLANES, Method.LZMA]) + bytes([Method.LZMA]) + varint(9) + bytes(9),
}


@pytest.mark.parametrize(
    ("code", "shape"),
    [(INT8, (40, 50)), (INT4, (41,)), (FLOAT, (4, 5, 3, 3)), (99, (100,)), (INT8, (1, 1, 8192))],
)
@pytest.mark.parametrize("what", _HOSTILE)
def test_hostile_tensors_with_right_checksums_are_refused(
    what: str, code: int, shape: tuple[int, ...]
) -> None:
    data = _HOSTILE[what]
    refused(container_of([(Cut(2, code, shape, len(data)), data)]))


def test_hostile_sizes_with_right_checksums_are_refused() -> None:
    stored = bytes([Method.STORED]) + bytes(100)
    cut = Cut(2, INT8, (100,), len(stored))
    large = 1 << 60
    for wrong in (
        {"file": large}, {"file": 3}, {"rest": large}, {"rest": 0}, {"directory": large},
        {"directory": 0}, {"section_1": large}, {"section_1": 0}, {"section_2": large},
        {"section_2": 7}, {"file": (1 << 24) - 1, "rest": (1 << 24) - 101},
        {"text": b""}, {"text": b"\x00"}, {"text": b"\x09" + bytes(50)}, {"digest": bytes(16)},
    ):  # fmt: skip
        refused(container_of([(cut, stored)], wrong))
    for bad in (
        Cut(large, INT8, (100,), len(stored)),
        Cut(2, INT8, (1 << 30, 1 << 30), len(stored)),
        Cut(2, INT8, (100, 0), len(stored)),
        Cut(2, INT8, (1,) * 40, len(stored)),
        Cut(2, 1000, (100,), len(stored)),
        Cut(2, INT8, (100,), large),
        Cut(2, INT8, (), len(stored)),
    ):
        refused(container_of([(bad, stored)]))
    nothing = Cut(0, 99, (1,), 0)
    refused(container_of([(nothing, b"")] * 1000 + [(cut, stored)]))
    refused(container_of([(cut, stored)] * 40, {"directory": 1}, b"r" * 200))


def test_a_small_container_of_a_large_file_is_refused_soon() -> None:
    shape = (1 << 20, 15)
    for head in (
        bytes([Method.ORDERED]) + varint(0) + varint(3) + varint(1) + _STREAM,
        bytes([Method.HISTOGRAM]) + varint(0) + varint(9) + _STREAM,
    ):
        refused(container_of([(Cut(1, INT8, shape, len(head)), head)]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changed_tensors_never_do_harm(data: st.DataObject) -> None:
    """Whatever the bytes after the checksum: an ExportError, or contents of the right size."""
    code, dtype = data.draw(st.sampled_from([(INT8, np.int8), (FLOAT, np.float32)]))
    shape = (7, 9)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    values = np.round(generator.laplace(size=shape) * 2).astype(dtype)
    if data.draw(st.booleans()):
        values = (values + generator.normal(size=shape)).astype(dtype)
    packed = bytearray(pack_tensor(values.tobytes(), code, shape))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ExportError):
        assert len(unpack_tensor(bytes(packed), code, shape)) == values.nbytes


def test_describing_checks_as_decoding_does() -> None:
    with pytest.raises(ExportError):
        describe(small_container()[:-1])
