"""What files share is coded once, and containers are the same as ever."""

from __future__ import annotations

import os
import signal
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
from autocompress.export.coding.beside import Coding, Codings
from autocompress.export.coding.container import encode_with_sizes
from autocompress.export.coding.kept import KeptTensors

ROWS = 64


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
from autocompress.export.coding.beside import Coding, Codings
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


def begin(model: Path, checked: bool) -> Coding:
    return Coding(model, model.with_suffix(".acz"), os.sched_getaffinity(0), checked=checked)


def child_of(coding: Coding) -> subprocess.Popen[str]:
    assert coding._child is not None
    return coding._child


@pytest.fixture
def large(tmp_path: Path) -> Path:
    source = tmp_path / "large.onnx"
    # Half a minute of work.
    source.write_bytes(model_of(floats("table", 0, 120_000)))
    return source


def test_a_killed_coder_is_told_from_a_file_that_cannot_be_coded(large: Path) -> None:
    codings = Codings(begin)
    coding = codings.start(large, checked=False)
    child_of(coding).send_signal(signal.SIGTERM)
    with pytest.raises(ExportError, match=r"signal 15 \(Terminated\)"):
        coding.wait()
    assert coding.killed
    again = codings.start(large, checked=False)
    assert again is not coding and not again.killed
    codings.close()
    large.write_bytes(b"no model")
    bad = begin(large, False)
    with pytest.raises(ExportError, match="cannot be coded"):
        bad.wait()
    assert not bad.killed


def test_a_container_that_nobody_wants_any_more_is_given_up(large: Path) -> None:
    codings = Codings(begin)
    with pytest.raises(ValueError, match="hung"), codings.wanted(large) as coding:
        raise ValueError("The model hung.")
    child = child_of(coding)
    assert child.returncode == -signal.SIGKILL
    assert child.stderr is not None and child.stderr.closed
    # What was begun for another measurement is still waited for.
    with codings.wanted(large) as first:
        pass
    with pytest.raises(ValueError, match="hung"), codings.wanted(large) as second:
        raise ValueError("The model hung.")
    assert first is second and not first.ended
    codings.close()
    assert first.ended


def test_cancelling_leaves_nothing_of_a_coder_that_has_ended(tmp_path: Path) -> None:
    source = tmp_path / "first.onnx"
    source.write_bytes(FIRST)
    coding = begin(source, False)
    child = child_of(coding)
    while not coding.ended:
        time.sleep(0.01)
    coding.cancel()
    assert child.returncode == 0
    assert child.stderr is not None and child.stderr.closed
