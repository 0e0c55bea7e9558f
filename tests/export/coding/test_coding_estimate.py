from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from onnx_files import model_of, raw_tensor

from autocompress.export.coding import encode_model
from autocompress.export.coding.estimate import estimate_bytes


def integers(scale: float) -> bytes:
    values = np.random.default_rng(0).laplace(0, scale, (256, 96)).round().clip(-127, 127)
    return values.astype(np.int8).tobytes()


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
def test_integers_take_their_entropy(scale: float) -> None:
    file = model_of(raw_tensor("weight", TensorProto.INT8, (256, 96), integers(scale)))
    assert estimate_bytes(file, 32.0) == pytest.approx(len(encode_model(file)), rel=0.05, abs=300)


def test_packed_integers_are_counted_one_by_one() -> None:
    # Every value as often: four bits each, though all bytes are alike.
    data = bytes(low | high << 4 for low in range(16) for high in range(16))
    file = model_of(raw_tensor("weight", TensorProto.UINT4, (512,), data))
    assert estimate_bytes(file, 32.0) == 256


def test_floats_take_what_is_given_and_no_more_than_they_have() -> None:
    floats = raw_tensor("weight", TensorProto.FLOAT, (50,), bytes(200))
    halves = raw_tensor("half", TensorProto.FLOAT16, (50,), bytes(100))
    shape = raw_tensor("shape", TensorProto.INT64, (64,), bytes(512))
    assert estimate_bytes(model_of(floats, halves, shape), 24.0) == 150 + 100 + 512
