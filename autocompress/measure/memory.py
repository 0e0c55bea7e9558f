"""Peak memory of a model: bytes that loading and running it adds to a fresh process."""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from autocompress.device import DeviceProfile
from autocompress.errors import MeasurementError
from autocompress.measure.arrays import read_arrays, rows_of, write_arrays
from autocompress.measure.child import Beat, Handler, Request, Setup, serve
from autocompress.measure.client import Inputs, Subject
from autocompress.measure.gpu_memory import GpuMemory
from autocompress.measure.host import host_of
from autocompress.measure.host_interface import Host
from autocompress.measure.lock import hold
from autocompress.measure.runtimes import runtime_for

_RUNS = 5
_LOCK_WAIT_S = 600.0
# What otherwise differs from process to process: which thread got which arena, the allocator's
# own moving thresholds, thread stacks of numpy's BLAS, the sizes of hash tables.
_REPEATABLE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


@final
@dataclass(frozen=True)
class PeakMemory:
    """What loading a model and running it takes, above the bare runtime.

    Attributes:
        resident_bytes: peak resident memory of the process.
        gpu_bytes: peak GPU memory of the process; None if it has none or it is not told.
        gpu_reason: why a GPU's memory is not told; else empty.
    """

    resident_bytes: int
    gpu_bytes: int | None
    gpu_reason: str = ""


def peak_memory(
    subject: Subject, inputs: Inputs, profile: DeviceProfile, host: Host | None = None
) -> PeakMemory:
    """Peak memory of loading a model and running it, above the bare runtime.

    A fresh process starts the runtime, notes its resident memory, loads the model and runs it
    five times on the first `batch_size` rows; the peak minus what was noted is returned. It holds
    weights, activations, the runtime's arenas and the code that the model makes it touch. For
    devices of kind `cuda`, the GPU memory that the driver books on the process is read every few
    milliseconds meanwhile; see `gpu_memory.GpuMemory`.

    Args:
        subject: an ONNX file in one of the profile's runtimes.
        inputs: one array per model input, or the path of an .npz file of them.
        profile: the device; its `hang_limit_s` is the time limit.
        host: where the device is; None for what the profile says.

    Raises:
        MeasurementError: the model fails, crashes the runtime or hangs.
        DeviceError: the runtime, the GPU or the profile's cores are not available.
    """
    if not subject.model.is_file():
        raise MeasurementError("There is no such file to measure.", given=subject.model)
    profile.runtime(subject.runtime)
    host = host or host_of(profile)
    with tempfile.TemporaryDirectory(prefix="autocompress-memory-") as name:
        folder = Path(name)
        batch = folder / "batch.npz"
        arrays = read_arrays(inputs) if isinstance(inputs, Path) else inputs
        rows_of(arrays, "inputs")
        write_arrays(batch, [array[: profile.batch_size] for array in arrays])
        request = {
            "model": host.put(subject.model),
            "runtime": subject.runtime,
            "inputs": host.put(batch),
        }
        child = host.start("autocompress.measure.memory", folder, _REPEATABLE)
        try:
            answer = child.ask(request, profile.measuring.hang_limit_s)
        finally:
            child.stop()
    return PeakMemory(**answer)


def make_handler(setup: Setup) -> Handler:
    """The handler of this child's one kind of request."""

    def handle(request: Request, beat: Beat) -> dict[str, Any]:
        settings = setup.profile.runtime(request["runtime"])
        runtime = runtime_for(settings)
        runtime.check_available(settings)
        inputs = [np.ascontiguousarray(array) for array in read_arrays(Path(request["inputs"]))]
        with hold(setup.lock_keys, _LOCK_WAIT_S, beat), _gpu_memory(setup) as gpu:
            runtime.start(settings, setup.placement)
            gc.collect()
            gc.disable()
            if gpu is not None:
                gpu.start()
            before = _start_peak()
            session = runtime.load(Path(request["model"]), settings, setup.placement)
            for _ in range(_RUNS):
                session.run(inputs)
            resident_bytes = max(_peak() - before, 0)
            if gpu is None:
                return asdict(PeakMemory(resident_bytes, None))
            return asdict(PeakMemory(resident_bytes, *gpu.peak()))

    return handle


@contextmanager
def _gpu_memory(setup: Setup) -> Iterator[GpuMemory | None]:
    """The watch on the profile's GPU; None for devices without."""
    if setup.profile.kind != "cuda":
        yield None
        return
    gpu = GpuMemory(setup.profile.gpu)
    try:
        yield gpu
    finally:
        gpu.close()


def _start_peak() -> int:
    """Forget the peak so far, where permitted; resident bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Without it the peak of the imports counts as the start, which they end at.
        return _peak()
    return _status("VmRSS") or _peak()


def _peak() -> int:
    """Peak resident bytes since `_start_peak`, else of the whole process."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


if __name__ == "__main__":
    serve(make_handler)
