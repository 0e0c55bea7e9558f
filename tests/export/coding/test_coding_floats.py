from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from autocompress.export.coding.elements import FLOATS, FloatType, byte_size
from autocompress.export.coding.tensors import method_name, pack_tensor, unpack_tensor

SHAPE = (64, 48, 3, 3)


def coded(data: bytes, code: int, shape: tuple[int, ...]) -> tuple[str, float]:
    """Method, and coded bytes as a share of the file's."""
    packed = pack_tensor(data, code, shape)
    assert unpack_tensor(packed, code, shape) == data
    return method_name(packed), len(packed) / len(data)


def gaussian(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def test_plain_floats_save_their_exponents() -> None:
    method, share = coded(gaussian().tobytes(), TensorProto.FLOAT, SHAPE)
    assert method == "planes" and share < 0.86


@pytest.mark.parametrize(
    ("code", "bits", "most"),
    [(TensorProto.FLOAT16, np.float16, 0.9), (TensorProto.BFLOAT16, None, 0.72)],
)
def test_half_floats_save_their_exponents(code: int, bits: type | None, most: float) -> None:
    values = gaussian() * 0.02
    if bits is None:
        data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype(bits).tobytes()
    method, share = coded(data, code, SHAPE)
    assert method == "planes" and share < most


def test_float_grids_cost_as_much_as_their_integers() -> None:
    steps = np.clip(np.round(gaussian() * 1.5), -7, 7).astype(np.int64)
    values = (steps * np.float32(0.0173)).astype(np.float32)
    method, share = coded(values.tobytes(), TensorProto.FLOAT, SHAPE)
    whole = pack_tensor(steps.astype(np.int8).tobytes(), TensorProto.INT8, SHAPE)
    assert method == "palette"
    assert share * values.nbytes < len(whole) + 100


def test_sparse_floats_pay_for_what_is_there() -> None:
    values = np.where(np.random.default_rng(1).random(SHAPE) < 0.2, gaussian(), 0)
    method, share = coded(values.astype(np.float32).tobytes(), TensorProto.FLOAT, SHAPE)
    assert method == "sparse"
    # A fifth of the values, and 0.72 bits per position.
    assert share < 0.2 * 0.87 + 0.72 / 32 + 0.002


@st.composite
def tensors(draw: st.DrawFn) -> tuple[FloatType, tuple[int, ...], bytes]:
    kind = draw(st.sampled_from(FLOATS))
    shape = tuple(draw(st.lists(st.integers(1, 10), min_size=1, max_size=4)))
    size = prod(shape)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = kind.bits // 8
    # All bit patterns: infinities, several NaNs, denormals and both zeros among them.
    raw = generator.integers(0, 256, (size, width), dtype=np.uint8)
    if draw(st.booleans()):
        raw[generator.random(size) < 0.6] = 0
    if draw(st.booleans()):
        raw[:, -1] = draw(st.sampled_from([0, 63, 127, 128, 255]))
    few = draw(st.sampled_from([0, 1, 2, 5]))
    if few:
        raw = raw[generator.integers(0, min(few, size), size)]
    return kind, shape, raw.tobytes()


@settings(max_examples=30, deadline=None)
@given(tensors())
def test_every_float_tensor_comes_back(tensor: tuple[FloatType, tuple[int, ...], bytes]) -> None:
    kind, shape, data = tensor
    assert len(data) == byte_size(kind.code, shape)
    assert kind.write(kind.read(data)) == data
    packed = pack_tensor(data, kind.code, shape)
    assert unpack_tensor(packed, kind.code, shape) == data
    assert len(packed) <= len(data) + 1
