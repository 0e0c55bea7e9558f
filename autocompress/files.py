"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def user_cache() -> Path:
    """The project's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autocompress"


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes so that a reader sees the old file or the whole new one, also after a crash."""
    # Threads, and processes of different hosts on a shared disk, may write the same file at once.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write plain values as JSON by `write_whole`."""
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
