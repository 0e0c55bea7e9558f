"""The cache of a latency table: one file of JSON lines per device and runtime, only added to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from autocompress.errors import MeasurementError
from autocompress.files import user_cache
from autocompress.measure.table.block import Block, TensorType
from autocompress.measure.table.joint import Meeting

_FORMAT = 1


@final
@dataclass(frozen=True)
class Entry:
    """What one block takes, what two blocks take more than each alone, or what any run takes.

    Attributes:
        key: see `Block.key`, `Meeting.key` and `overhead_key`.
        latency_ms: may be below zero: by about the noise for a block, and by more for a meeting of
            two blocks that a runtime fuses.
        noise_ms: half-width of its 95 % interval.
        block: None for a meeting and for the overhead of a run.
        meeting: None for all else.
        apart_ms: the sum of what the two blocks that meet take alone.
    """

    key: str
    latency_ms: float
    noise_ms: float
    block: Block | None = None
    meeting: Meeting | None = None
    apart_ms: float = 0.0

    @property
    def miss(self) -> float:
        """By what share of what two blocks take together the sum of both alone misses it."""
        together = max(self.apart_ms + self.latency_ms, 1e-9)
        return abs(self.latency_ms) / together


def overhead_key(inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> str:
    """What the overhead of a run is kept under."""
    return f"run {','.join(t.text for t in inputs)} -> {','.join(t.text for t in outputs)}"


def cache_path(runtime_id: str) -> Path:
    """Where the entries of a device and runtime are kept.

    Args:
        runtime_id: see `Fingerprint.runtime_id`.
    """
    return user_cache() / "latency" / f"{runtime_id}.jsonl"


@final
class Store:
    """Entries on disk; every added one is there when the call returns, also after a kill.

    Any number of processes may add to a file. Of entries with one key the last counts.

    Args:
        path: made, with its folder, when the first entry is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> dict[str, Entry]:
        """All entries by key; a line that was torn by a kill is left out.

        Raises:
            MeasurementError: the file cannot be read.
        """
        try:
            text = self.path.read_bytes() if self.path.is_file() else b""
        except OSError as cause:
            raise MeasurementError(
                f"The latency table's cache cannot be read: {cause}", given=self.path
            ) from cause
        return {entry.key: entry for entry in _read_lines(text)}

    def add(self, entry: Entry) -> None:
        """Add an entry.

        Raises:
            MeasurementError: the file cannot be written.
        """
        line = _line(entry)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                # Released when the file is closed, or the process ends.
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(_after_torn_line(file.fileno()) + line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            raise MeasurementError(
                f"The latency table's cache cannot be written: {cause}",
                given=self.path,
                advice="set XDG_CACHE_HOME to a folder that can be written to",
            ) from cause


def _after_torn_line(handle: int) -> bytes:
    """A line feed, if the file ends in the middle of a line."""
    size = os.fstat(handle).st_size
    return b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""


def _read_lines(text: bytes) -> Iterator[Entry]:
    for line in text.split(b"\n"):
        try:
            data = json.loads(line)
            if data["format"] == _FORMAT:
                yield _entry(data)
        except (ValueError, KeyError, TypeError, IndexError):
            continue


def _line(entry: Entry) -> str:
    data: dict[str, Any] = {
        "format": _FORMAT,
        "key": entry.key,
        "latency_ms": entry.latency_ms,
        "noise_ms": entry.noise_ms,
    }
    if entry.block is not None:
        data["block"] = json.loads(entry.block.to_json())
    if entry.meeting is not None:
        tensor = entry.meeting.tensor
        data["meeting"] = [entry.meeting.kind, tensor.element, tensor.shape]
        data["apart_ms"] = entry.apart_ms
    return json.dumps(data, separators=(",", ":"))


def _entry(data: Mapping[str, Any]) -> Entry:
    block, meeting = data.get("block"), data.get("meeting")
    return Entry(
        str(data["key"]),
        float(data["latency_ms"]),
        float(data["noise_ms"]),
        None if block is None else Block.from_json(json.dumps(block)),
        None
        if meeting is None
        else Meeting(str(meeting[0]), TensorType(int(meeting[1]), tuple(meeting[2]))),
        float(data.get("apart_ms", 0.0)),
    )
