"""A temporary folder that goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import final
from weakref import finalize

# Kinds of folders: of what measures on a node, of what builds, and of Tune's own files.
NODE, WORKSHOP, TUNE = "node", "workshop", "tune"
_MADE = "autocompress-new-"


@final
class OwnFolder:
    """A folder of this process's own.

    Ray kills its processes, which then delete nothing: so each holds a lock on its folder, and
    who makes a folder, or calls `tidy`, first deletes the ones whose lock nobody holds any more.

    Args:
        kind: `NODE`, `WORKSHOP` or `TUNE`, part of its name.
    """

    def __init__(self, kind: str) -> None:
        _tidy(kind)
        made = Path(tempfile.mkdtemp(prefix=_MADE))
        # Locked before it has a name that others tidy.
        handle = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(_prefix(kind) + made.name.removeprefix(_MADE)))
        self._end = finalize(self, _remove, self.path, handle)

    def remove(self) -> None:
        """Delete it with all that is in it; nothing, if that was done before."""
        self._end()


def tidy() -> None:
    """Delete this user's folders, of all kinds, whose processes have ended."""
    for kind in (NODE, WORKSHOP, TUNE):
        _tidy(kind)


def _tidy(kind: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(_prefix(kind) + "*"):
        # Another process may be tidying as well.
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid() and path.is_dir():
                _remove_unheld(path)


def _remove_unheld(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)


def _remove(path: Path, handle: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(handle)


def _prefix(kind: str) -> str:
    return f"autocompress-{kind}-"
