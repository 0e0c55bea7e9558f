"""Peak memory of a model: resident bytes that loading and running it adds to a fresh process."""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.device import DeviceProfile
from autocompress.errors import MeasurementError
from autocompress.measure.arrays import read_arrays, rows_of, write_arrays
from autocompress.measure.child import Beat, Handler, Request, Setup, serve
from autocompress.measure.client import Inputs
from autocompress.measure.lock import core_keys, hold
from autocompress.measure.process import ChildProcess
from autocompress.measure.runtime import runtime_for

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


def peak_memory_bytes(model: Path, inputs: Inputs, profile: DeviceProfile) -> int:
    """Peak resident memory of loading a model and running it, above the bare runtime.

    A fresh process imports the runtime, notes its resident memory, loads the model and runs it
    five times on the first `batch_size` rows; the peak minus what was noted is returned. It holds
    weights, activations, the runtime's arenas and the code that the model makes it touch.

    Args:
        model: an ONNX file.
        inputs: one array per model input, or the path of an .npz file of them.
        profile: the device and its runtime; its `hang_limit_s` is the time limit.

    Raises:
        MeasurementError: the model fails, crashes the runtime or hangs.
        DeviceError: the profile's runtime, provider or cores are not available.
    """
    if not model.is_file():
        raise MeasurementError("There is no such file to measure.", given=model)
    setup = Setup(os.getpid(), profile.runtime, profile.pinned_cores())
    with tempfile.TemporaryDirectory(prefix="autocompress-memory-") as name:
        folder = Path(name)
        batch = folder / "batch.npz"
        arrays = read_arrays(inputs) if isinstance(inputs, Path) else inputs
        rows_of(arrays, "inputs")
        write_arrays(batch, [array[: profile.batch_size] for array in arrays])
        request = {"model": str(model.resolve()), "inputs": str(batch)}
        child = ChildProcess("autocompress.measure.memory", setup, folder, _REPEATABLE)
        try:
            answer = child.ask(request, profile.measuring.hang_limit_s)
        finally:
            child.stop()
    return int(answer["peak_memory_bytes"])


def make_handler(setup: Setup) -> Handler:
    """The handler of this child's one kind of request."""
    runtime = runtime_for(setup.runtime)
    runtime.check_available(setup.runtime)

    def handle(request: Request, beat: Beat) -> dict[str, Any]:
        inputs = [np.ascontiguousarray(array) for array in read_arrays(Path(request["inputs"]))]
        with hold(core_keys(setup.cores), _LOCK_WAIT_S, beat):
            gc.collect()
            gc.disable()
            before = _start_peak()
            session = runtime.load(Path(request["model"]), setup.runtime)
            for _ in range(_RUNS):
                session.run(inputs)
            return {"peak_memory_bytes": max(_peak() - before, 0)}

    return handle


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
