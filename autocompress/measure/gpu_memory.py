"""GPU memory of this process, as NVIDIA's driver books it by process."""

from __future__ import annotations

import os
import threading
from typing import final

from autocompress.device.nvml_gpu import NvmlGpu

_POLL_S = 0.002


@final
class GpuMemory:
    """Watches how much memory of one GPU this process has; `close` it.

    A peak that lasts less than about two milliseconds can be missed; runtimes keep what they have
    once taken, so theirs last.

    Make it before the runtime is started. In a container the driver tells the host's process ids;
    then this process is the one that was not there yet.

    Args:
        index: the GPU, as the CUDA runtimes count.

    Raises:
        DeviceError: there is no NVIDIA driver, or no such GPU.
    """

    def __init__(self, index: int) -> None:
        self._gpu = NvmlGpu(index)
        self._strangers = set(self._gpu.process_bytes()) - {os.getpid()}
        self._before = 0
        self._peak: int | None = None
        self._error: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def start(self) -> None:
        """Count from here: what the bare runtime has is not the model's."""
        self._before = self._own_bytes() or 0
        self._thread.start()

    def peak(self) -> tuple[int | None, str]:
        """Peak bytes since `start`, above what there was then; or None, and why."""
        self._done.set()
        self._thread.join()
        self._note()
        where = f"GPU {self._gpu.index} ({self._gpu.name})"
        if self._error is not None:
            return (
                None,
                f"the driver does not tell the processes of {where}: {self._error}",
            )
        if self._peak is None:
            return None, (
                f"the driver lists no memory of the measuring process on {where}: it used none, or "
                "processes are hidden (a container with its own process ids, MIG, Windows)"
            )
        return max(self._peak - self._before, 0), ""

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._gpu.close()

    def _own_bytes(self) -> int | None:
        listed = self._gpu.process_bytes()
        if os.getpid() in listed:
            return listed[os.getpid()]
        new = [pid for pid in listed if pid not in self._strangers]
        return listed[new[0]] if len(new) == 1 else None

    def _note(self) -> None:
        try:
            now = self._own_bytes()
        # Whatever the driver raises is told in the end.
        except Exception as error:
            self._error = error
            return
        if now is not None:
            self._peak = max(self._peak or 0, now)

    def _poll(self) -> None:
        while not self._done.wait(_POLL_S):
            self._note()
