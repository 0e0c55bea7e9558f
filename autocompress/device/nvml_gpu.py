"""One NVIDIA GPU through NVML: which one, and which processes use it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from autocompress.errors import DeviceError

_REMEDY = "an NVIDIA GPU with its driver (libnvidia-ml), for a profile of kind `cuda`"


@final
class NvmlGpu:
    """An opened GPU; `close` it.

    Args:
        index: the GPU as the CUDA runtimes count, so after `CUDA_VISIBLE_DEVICES`.

    Raises:
        DeviceError: there is no NVIDIA driver, or no such GPU.
    """

    def __init__(self, index: int) -> None:
        import pynvml

        self.index = index
        self.nvml: Any = pynvml
        visible = visible_gpu(index, os.environ)
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as cause:
            raise _unavailable(index, cause) from cause
        try:
            self.handle: Any = _handle(pynvml, visible)
            name = pynvml.nvmlDeviceGetName(self.handle)
        except pynvml.NVMLError as cause:
            pynvml.nvmlShutdown()
            raise _unavailable(index, cause) from cause
        # The binding gave bytes before version 12.
        self.name = name.decode() if isinstance(name, bytes) else str(name)

    def process_bytes(self) -> dict[int, int | None]:
        """GPU memory of every process that has some, by process id; None where it is not told.

        In a container the ids are often those of the host.
        """
        used: dict[int, int | None] = {}
        for list_processes in (
            self.nvml.nvmlDeviceGetComputeRunningProcesses,
            self.nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            try:
                processes = list_processes(self.handle)
            except (self.nvml.NVMLError_NotSupported, self.nvml.NVMLError_NoPermission):
                continue
            # A process that computes and draws stands in both lists with all its memory.
            used |= {process.pid: process.usedGpuMemory for process in processes}
        return used

    def close(self) -> None:
        """Give the driver's library back."""
        self.nvml.nvmlShutdown()


def visible_gpu(index: int, environment: Mapping[str, str]) -> int | str:
    """The driver's name of a GPU that CUDA calls `index`: its own index, or an identifier.

    Args:
        index: as CUDA counts.
        environment: may hold `CUDA_VISIBLE_DEVICES`, which makes CUDA count otherwise.

    Raises:
        DeviceError: CUDA sees no GPU of that index.
    """
    variable = environment.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return index
    # CUDA ignores all that follows the first entry that is not a device.
    names = re.match(r"\s*((\d+|(GPU|MIG)-[\w/-]+)\s*,?\s*)*", variable)
    entries = [name.strip() for name in names.group().split(",")] if names else []
    entries = [entry for entry in entries if entry]
    if index >= len(entries):
        raise DeviceError(
            "CUDA does not see the device profile's GPU.",
            given=f"gpu {index}, CUDA_VISIBLE_DEVICES={variable!r}",
            allowed=f"a GPU below {len(entries)}",
            advice="correct `gpu` in the device profile, or CUDA_VISIBLE_DEVICES",
        )
    return int(entries[index]) if entries[index].isdecimal() else entries[index]


def others(listed: Iterable[int], own: int) -> tuple[int, ...]:
    """Those processes of a driver's list that are not this one.

    Args:
        listed: process ids.
        own: this process's id.
    """
    rest = sorted(set(listed))
    if own in rest:
        rest.remove(own)
        return tuple(rest)
    # In a container the driver tells the host's ids: one that is not seen here is this process.
    strangers = [pid for pid in rest if not Path(f"/proc/{pid}").exists()]
    return tuple(pid for pid in rest if pid not in strangers[:1])


def _handle(nvml: Any, gpu: int | str) -> Any:
    if isinstance(gpu, int):
        return nvml.nvmlDeviceGetHandleByIndex(gpu)
    return nvml.nvmlDeviceGetHandleByUUID(gpu)


def _unavailable(index: int, cause: Exception) -> DeviceError:
    return DeviceError(
        f"The device profile's GPU does not answer: {cause}",
        given=f"gpu {index}",
        allowed="an NVIDIA GPU of this machine",
        advice=_REMEDY,
    )
