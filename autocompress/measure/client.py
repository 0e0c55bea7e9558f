"""`Worker`: predictions and paired latencies of ONNX files, taken in a child process."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

from autocompress.device import DeviceProfile, fingerprint
from autocompress.errors import MeasurementError
from autocompress.measure.arrays import content_key, read_arrays, write_arrays
from autocompress.measure.child import Setup
from autocompress.measure.process import ChildProcess
from autocompress.measure.sampling import generator_for
from autocompress.measure.session import Array
from autocompress.measure.statistics import Circumstances, PairedLatency, paired_latency

Inputs = Sequence[Array] | Path
_MODULE = "autocompress.measure.worker"


@final
class Worker:
    """Measures ONNX files in a child process that is pinned, lock-holding and free of PyTorch.

    The child starts with the first request and again after a crash or hang; it dies with this
    process. Use one worker from one thread: on Linux the child also dies with the thread that
    started it. Other workers' requests on the same cores wait for each other.

    Inputs are arrays, one per model input, or the path of an .npz file of them. Arrays are
    written to the scratch folder once per content and stay there for later workers; the child
    keeps the last few splits and models in memory. For a large split, `store` it once and pass
    the path: arrays are hashed anew on every call.

    Args:
        profile: the device, its runtime and its measuring limits.
        scratch: a folder for files on their way to and from the child; made if missing.
        lock_wait_s: how long a request may wait for another process to leave the device.

    Raises:
        DeviceError: the profile asks for cores or a runtime that this machine lacks.
    """

    def __init__(
        self, profile: DeviceProfile, scratch: Path, *, lock_wait_s: float = 600.0
    ) -> None:
        self._profile = profile
        self._setup = Setup(os.getpid(), profile.runtime, profile.pinned_cores())
        self._device = fingerprint(profile).id
        self._lock_wait_s = lock_wait_s
        self._scratch = scratch.resolve()
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._own = Path(tempfile.mkdtemp(prefix="worker-", dir=self._scratch))
        self._child: ChildProcess | None = None
        self._one_request = threading.Lock()
        self._closed = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def device(self) -> str:
        """The id of the device's fingerprint."""
        return self._device

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is no child."""
        return self._child.pid if self._child is not None and self._child.running else None

    def store(self, inputs: Sequence[Array]) -> Path:
        """Write arrays to the scratch folder, unless they are there, and return their path."""
        path = self._scratch / f"inputs-{content_key(inputs)}.npz"
        if not path.is_file():
            write_arrays(path, inputs)
        return path

    def predict(self, model: Path, inputs: Inputs, batch_size: int) -> tuple[Array, ...]:
        """Run a whole split.

        Args:
            model: an ONNX file.
            inputs: one array per model input, first axis the samples.
            batch_size: rows per run; the last run may have fewer.

        Returns:
            Every output of the model, shape (samples, ...).

        Raises:
            MeasurementError: the model fails, crashes the runtime, or makes no progress for
                `hang_limit_s`; or another process keeps the device.
            DeviceError: the profile's provider is not available.
        """
        if batch_size < 1:
            raise MeasurementError("A batch needs rows.", given=batch_size, allowed=">= 1")
        outputs = self._own / "outputs.npz"
        request = {
            "operation": "predict",
            "model": str(_existing(model)),
            "inputs": str(self._path_of(inputs)),
            "batch_size": batch_size,
            "outputs": str(outputs),
        }
        with self._one_request:
            self._ask(request, self._profile.measuring.hang_limit_s)
            try:
                return read_arrays(outputs)
            finally:
                outputs.unlink(missing_ok=True)

    def compare(
        self, baseline: Path, candidate: Path, inputs: Inputs, *, final: bool = False, seed: int
    ) -> PairedLatency:
        """Time a candidate against the baseline, in turn; see `sampling.sample_pairs`.

        Args:
            baseline: the ONNX file of the uncompressed network.
            candidate: an ONNX file with the same inputs.
            inputs: one array per model input; the profile's `batch_size` first rows are used.
            final: use the profile's tighter limits for final results.
            seed: seed of the bootstrap.

        Raises:
            MeasurementError: a model fails, crashes the runtime or hangs; or another process
                keeps the device.
            DeviceError: the profile's provider is not available.
        """
        limits = self._profile.measuring
        target = limits.final_target_half_width if final else limits.target_half_width
        time_limit_s = limits.final_time_limit_s if final else limits.time_limit_s
        stopping = {"target_half_width": target, "time_limit_s": time_limit_s, "seed": seed}
        request = {
            "operation": "compare",
            "baseline": str(_existing(baseline)),
            "model": str(_existing(candidate)),
            "inputs": str(self._path_of(inputs)),
            "batch_size": self._profile.batch_size,
            "stopping": stopping,
        }
        with self._one_request:
            answer = self._ask(request, time_limit_s + limits.hang_limit_s)
        where = Circumstances(
            device=self._device,
            load_average=answer["load_average"],
            clock_mhz=answer["clock_mhz"],
            elapsed_s=answer["elapsed_s"],
            target_half_width=target,
        )
        generator = generator_for(seed, len(answer["baseline_ms"]))
        return paired_latency(answer["baseline_ms"], answer["candidate_ms"], generator, where)

    def close(self) -> None:
        """End the child and remove this worker's own files; stored inputs stay."""
        self._closed = True
        if self._child is not None:
            self._child.stop()
            self._child = None
        shutil.rmtree(self._own, ignore_errors=True)

    def _ask(self, request: dict[str, Any], silence_s: float) -> dict[str, Any]:
        if self._closed:
            raise MeasurementError("The worker has been closed.", advice="make a new Worker")
        if self._child is None or not self._child.running:
            if self._child is not None:
                self._child.stop()
                self._child.remove_stderr()
            self._child = ChildProcess(_MODULE, self._setup, self._own)
        return self._child.ask({**request, "lock_wait_s": self._lock_wait_s}, silence_s)

    def _path_of(self, inputs: Inputs) -> Path:
        return _existing(inputs) if isinstance(inputs, Path) else self.store(inputs)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MeasurementError("There is no such file to measure.", given=path)
    return path.resolve()
