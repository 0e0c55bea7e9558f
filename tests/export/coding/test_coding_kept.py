"""What files share is coded once, and containers are the same as ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from onnx_files import model_of, raw_tensor

from autocompress.errors import ExportError, OutOfTimeError
from autocompress.export.coding import decode_model, encode_file, encode_model, kept
from autocompress.export.coding.beside import Coding
from autocompress.export.coding.container import encode_with_sizes
from autocompress.export.coding.kept import KeptTensors

ROWS = 96


def floats(name: str, seed: int, rows: int = ROWS):
    values = np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)
    return raw_tensor(name, TensorProto.FLOAT, values.shape, values.tobytes())


LARGE = (ROWS * 64 * 4, ROWS, 64)
FIRST = model_of(floats("table", 0), floats("weight", 1), floats("few", 2, 3))
SECOND = model_of(floats("renamed", 0), floats("weight", 3), floats("few", 2, 3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """Bytes and shapes of tensors that were coded and decoded."""
    pack, unpack = kept.pack_tensor, kept.unpack_tensor
    counts: dict[str, list[tuple[int, ...]]] = {"coded": [], "decoded": []}

    def count_pack(data: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        counts["coded"].append((len(data), *shape))
        return pack(data, code, shape)

    def count_unpack(packed: bytes, code: int, shape: tuple[int, ...]) -> bytes:
        data = unpack(packed, code, shape)
        counts["decoded"].append((len(data), *shape))
        return data

    monkeypatch.setattr(kept, "pack_tensor", count_pack)
    monkeypatch.setattr(kept, "unpack_tensor", count_unpack)
    return counts


def encoded(model: bytes, folder: Path, name: str) -> bytes:
    source, target = folder / f"{name}.onnx", folder / f"{name}.acz"
    source.write_bytes(model)
    encode_file(source, target, KeptTensors(folder / "coded"))
    return target.read_bytes()


def test_containers_are_the_same_and_shared_tensors_are_coded_and_decoded_once(
    tmp_path: Path, counted: dict[str, list[tuple[int, ...]]]
) -> None:
    assert encoded(FIRST, tmp_path, "first") == encode_model(FIRST)
    assert [counted[kind].count(LARGE) for kind in counted] == [2, 2]
    container = encoded(SECOND, tmp_path, "second")
    assert container == encode_model(SECOND)
    assert decode_model(container) == SECOND
    # Small ones are not worth a file.
    assert [counted[kind].count(LARGE) for kind in counted] == [3, 3]
    assert len(list((tmp_path / "coded").iterdir())) == 3


def test_what_was_only_coded_is_decoded_when_it_is_checked(
    tmp_path: Path, counted: dict[str, list[tuple[int, ...]]]
) -> None:
    encode_with_sizes(FIRST, KeptTensors(tmp_path / "coded").pack)
    assert [counted[kind].count(LARGE) for kind in counted] == [2, 0]
    assert encoded(FIRST, tmp_path, "first") == encode_model(FIRST)
    assert [counted[kind].count(LARGE) for kind in counted] == [2, 2]
    encoded(FIRST, tmp_path, "first")
    assert [counted[kind].count(LARGE) for kind in counted] == [2, 2]


@pytest.mark.parametrize("damage", ["changed", "cut", "emptied"])
def test_a_damaged_file_is_not_taken(tmp_path: Path, damage: str) -> None:
    encoded(FIRST, tmp_path, "first")
    for path in (tmp_path / "coded").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"changed": content, "cut": content[:4], "emptied": b""}[damage])
    assert encoded(FIRST, tmp_path, "again") == encode_model(FIRST)


def test_a_tensor_that_does_not_come_back_is_refused_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "unpack_tensor", lambda packed, code, shape: b"")
    for _ in range(2):
        with pytest.raises(ExportError, match="SHA-256"):
            encoded(FIRST, tmp_path, "first")


def test_what_was_not_used_for_longest_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    encoded(FIRST, tmp_path, "first")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    # Uses one of the first file's two, and adds one.
    encoded(SECOND, tmp_path, "second")
    sizes = sorted(path.stat().st_size for path in folder.iterdir())
    KeptTensors(folder, sum(sizes) - 1).prune()
    assert len(list(folder.iterdir())) == 2
    assert all(path.stat().st_mtime > 0 for path in folder.iterdir())
    KeptTensors(folder, 0).prune()
    assert not list(folder.iterdir())
    KeptTensors(tmp_path / "none").prune()


def test_processes_share_what_they_keep(tmp_path: Path) -> None:
    for name, model in (("first", FIRST), ("second", SECOND)):
        source = tmp_path / f"{name}.onnx"
        source.write_bytes(model)
        for checked in (False, True):
            target = source.with_suffix(".acz")
            coding = Coding(source, target, os.sched_getaffinity(0), checked=checked)
            assert coding.wait() == coding.wait() == len(encode_model(model))
            coding.cancel()
    assert len(list((tmp_path / "coded").iterdir())) == 3


_ABANDONED = """
import os, sys
from pathlib import Path
from autocompress.export.coding.beside import Coding
source = Path(sys.argv[1])
Coding(source, source.with_suffix(".acz"), os.sched_getaffinity(0), checked=False)
os._exit(0)
"""


def test_a_coding_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    source = tmp_path / "large.onnx"
    # Half a minute of work.
    source.write_bytes(model_of(floats("table", 0, 120_000)))
    subprocess.run([sys.executable, "-c", _ABANDONED, str(source)], check=True)
    deadline = time.monotonic() + 20.0
    while any(str(source) in line for line in _command_lines()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["large.onnx"]


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
    return found


def test_waiting_may_be_limited_and_gone_on_with(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(FIRST)
    coding = Coding(source, source.with_suffix(".acz"), os.sched_getaffinity(0), checked=True)
    # Python alone takes longer to start.
    with pytest.raises(OutOfTimeError, match="not coded in time"):
        coding.wait(0.0)
    assert coding.wait() == len(encode_model(FIRST))
    assert coding.ended
