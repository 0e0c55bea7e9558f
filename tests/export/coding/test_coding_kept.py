"""What files share is coded once, and containers are the same as ever."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from onnx_files import model_of, raw_tensor

from autocompress.errors import ExportError
from autocompress.export.coding import decode_model, encode_file, encode_model, kept
from autocompress.export.coding.beside import Coding
from autocompress.export.coding.kept import KeptTensors

ROWS = 96


def floats(name: str, seed: int, rows: int = ROWS):
    values = np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)
    return raw_tensor(name, TensorProto.FLOAT, values.shape, values.tobytes())


ORIGINAL = model_of(floats("table", 0), floats("weight", 1), floats("few", 2, 3))
CANDIDATE = model_of(floats("renamed", 0), floats("weight", 3), floats("few", 2, 3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    coded: list[tuple[int, ...]] = []
    pack = kept.pack_tensor

    def count(data: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        coded.append((len(data), *shape))
        return pack(data, code, shape)

    monkeypatch.setattr(kept, "pack_tensor", count)
    return coded


def encoded(model: bytes, folder: Path, name: str) -> bytes:
    source, target = folder / f"{name}.onnx", folder / f"{name}.acz"
    source.write_bytes(model)
    encode_file(source, target, KeptTensors(folder / "coded", ORIGINAL))
    return target.read_bytes()


def test_containers_are_the_same_and_shared_tensors_are_coded_once(
    tmp_path: Path, counted: list[tuple[int, ...]]
) -> None:
    large = (ROWS * 64 * 4, ROWS, 64)
    assert encoded(ORIGINAL, tmp_path, "original") == encode_model(ORIGINAL)
    assert counted.count(large) == 2
    counted.clear()
    container = encoded(CANDIDATE, tmp_path, "candidate")
    assert container == encode_model(CANDIDATE)
    assert decode_model(container) == CANDIDATE
    # One of two large ones is the original's; small ones are not worth a file.
    assert counted.count(large) == 1
    assert len(list((tmp_path / "coded").iterdir())) == 2


def test_a_damaged_file_is_not_taken(tmp_path: Path) -> None:
    encoded(ORIGINAL, tmp_path, "original")
    for path in (tmp_path / "coded").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    assert encoded(ORIGINAL, tmp_path, "again") == encode_model(ORIGINAL)


def test_a_tensor_that_does_not_come_back_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "unpack_tensor", lambda packed, code, shape: b"")
    with pytest.raises(ExportError, match="does not give its contents back"):
        encoded(ORIGINAL, tmp_path, "original")
    assert not (tmp_path / "coded").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_process_keeps_what_it_shares_with_the_original(tmp_path: Path, there: bool) -> None:
    original, model = tmp_path / "original.onnx", tmp_path / "model.onnx"
    model.write_bytes(CANDIDATE)
    if there:
        original.write_bytes(ORIGINAL)
    for checked in (False, True):
        target = model.with_suffix(f".{checked}")
        coding = Coding(model, target, os.sched_getaffinity(0), original, checked=checked)
        assert coding.wait() == len(encode_model(CANDIDATE))
    assert len(list((tmp_path / "coded").glob("*"))) == there
