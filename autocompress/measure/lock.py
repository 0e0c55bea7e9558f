"""A lock per core (or other device part) that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from autocompress.errors import DeviceError

_POLL_S = 0.05


def lock_folder() -> Path:
    """This user's folder of lock files on this machine; made if it is not there.

    Raises:
        DeviceError: the folder belongs to another user or cannot be made.
    """
    # A temporary folder, because a home folder may be shared by several machines.
    folder = Path(tempfile.gettempdir()) / f"autocompress-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat().st_uid
    except OSError as cause:
        raise DeviceError(
            f"The folder for device locks cannot be made: {cause}",
            given=folder,
            advice="set TMPDIR to a folder that can be written to",
        ) from cause
    if owner != os.getuid():
        raise DeviceError(
            "The folder for device locks belongs to another user.",
            given=folder,
            advice="set TMPDIR to a folder of your own",
        )
    return folder


def core_keys(cores: Sequence[int]) -> tuple[str, ...]:
    """Lock keys of CPU cores; overlapping sets of cores share a key and exclude each other."""
    return tuple(f"core-{core}" for core in sorted(set(cores)))


@contextmanager
def hold(
    keys: Sequence[str], wait_s: float, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the locks of all `keys` until the block or the process ends, however it ends.

    Args:
        keys: names of device parts; taken in sorted order, so that no two holders deadlock.
        wait_s: how long to wait for all of them together.
        waiting: called again and again while waiting.

    Raises:
        DeviceError: another process still holds one after `wait_s`; its pid is named.
    """
    deadline = time.monotonic() + wait_s
    with ExitStack() as stack:
        for key in sorted(set(keys)):
            name = re.sub(r"[^A-Za-z0-9._-]", "_", key)
            stack.enter_context(_hold_one(lock_folder() / f"{name}.lock", deadline, waiting))
        yield


@contextmanager
def _hold_one(path: Path, deadline: float, waiting: Callable[[], None]) -> Iterator[None]:
    # Lock files are never deleted: a deleted one could be held by two processes at once.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(handle):
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
                raise DeviceError(
                    "The device is in use by another measurement.",
                    given=f"{path.stem}, held by process {holder or '(unknown)'}",
                    advice="wait until that process has ended, or end it",
                )
            waiting()
            time.sleep(_POLL_S)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
        try:
            yield
        finally:
            # Unlocked by name, as a forked child may still have the file open.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
