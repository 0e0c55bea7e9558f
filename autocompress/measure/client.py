"""`Worker`: predictions and paired latencies of ONNX files, taken in a child process."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

from autocompress.device import DeviceProfile, Fingerprint, make_fingerprint
from autocompress.errors import MeasurementError
from autocompress.measure.arrays import content_key, read_arrays, write_arrays
from autocompress.measure.energy import MeterReport
from autocompress.measure.energy_statistics import EnergySamples
from autocompress.measure.host import host_of
from autocompress.measure.host_interface import Child, Host
from autocompress.measure.latency import PairedLatency, paired_latency
from autocompress.measure.paired_energy import PairedEnergy, energy_stopping, paired_energy
from autocompress.measure.sampling import Samples
from autocompress.measure.session import Array, NodeTime

Inputs = Sequence[Array] | Path
_MODULE = "autocompress.measure.worker"
# A final measurement takes this share of its time limit at least.
_FINAL_SHARE = 1 / 3
_FINAL_ROUNDS = 60
# A search stops sampling as soon as its target allows: its rounds are a pair of blocks.
_SEARCH_ROUND_S = 0.012


@final
@dataclass(frozen=True)
class Subject:
    """What is measured: an ONNX file in one of the profile's runtimes, given by its full name."""

    model: Path
    runtime: str


@final
class Worker:
    """Measures ONNX files in a child process that is pinned and holds the device's lock.

    The child is free of PyTorch, unless that is the runtime.

    The child starts with the first request and again after a crash or hang; it dies with this
    process. Use one worker from one thread: on Linux the child also dies with the thread that
    started it. Other workers' requests on the same cores wait for each other.

    Inputs are arrays, one per model input, or the path of an .npz file of them. Arrays are
    written to the scratch folder once per content and stay there for later workers; the child
    keeps the last few splits and models in memory. For a large split, `store` it once and pass
    the path: arrays are hashed anew on every call.

    Args:
        profile: the device, its runtimes and its measuring limits.
        scratch: a folder for files on their way to and from the child; made if missing.
        host: where the device is; None for what the profile says.
        lock_wait_s: how long a request may wait for another process to leave the device.

    Raises:
        DeviceError: the profile asks for cores, a GPU or a runtime that the device lacks.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        scratch: Path,
        host: Host | None = None,
        *,
        lock_wait_s: float = 600.0,
    ) -> None:
        self._profile = profile
        self._lock_wait_s = lock_wait_s
        self._scratch = scratch.resolve()
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._host = host or host_of(profile)
        self._facts = self._host.facts(self._scratch)
        self._fingerprint = make_fingerprint(profile, self._facts)
        self._own = Path(tempfile.mkdtemp(prefix="worker-", dir=self._scratch))
        self._child: Child | None = None
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
    def fingerprint(self) -> Fingerprint:
        """What this worker's figures may be compared with."""
        return self._fingerprint

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores that the device gives, this worker's own among them."""
        return self._facts.cores

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

    def predict(self, subject: Subject, inputs: Inputs, batch_size: int) -> tuple[Array, ...]:
        """Run a whole split.

        Args:
            subject: a model in a runtime.
            inputs: one array per model input, first axis the samples.
            batch_size: rows per run; the last run may have fewer.

        Returns:
            Every output of the model, shape (samples, ...).

        Raises:
            MeasurementError: the model fails, crashes the runtime, or makes no progress for
                `hang_limit_s`; or another process keeps the device.
            DeviceError: the runtime is not available.
        """
        if batch_size < 1:
            raise MeasurementError("A batch needs rows.", given=batch_size, allowed=">= 1")
        outputs = self._own / "outputs.npz"
        request = {
            "operation": "predict",
            **self._named(subject),
            "inputs": self._host.put(self._path_of(inputs)),
            "batch_size": batch_size,
            "outputs": self._host.result(outputs),
        }
        with self._one_request:
            self._ask(request, self._profile.measuring.hang_limit_s)
            try:
                self._host.fetch(outputs)
                return read_arrays(outputs)
            finally:
                outputs.unlink(missing_ok=True)

    def compare(
        self,
        baseline: Subject,
        candidate: Subject,
        inputs: Inputs,
        *,
        final: bool = False,
        seed: int,
    ) -> PairedLatency:
        """Time a candidate against the baseline, in turn; see `sampling.sample_pairs`.

        Args:
            baseline: the uncompressed network, in the profile's first runtime.
            candidate: a model with the same inputs.
            inputs: one array per model input; the profile's `batch_size` first rows are used.
            final: use the profile's tighter limits for final results.
            seed: seed of the bootstrap.

        Raises:
            MeasurementError: a model fails, crashes the runtime or hangs; or another process
                keeps the device.
            DeviceError: a runtime is not available.
        """
        limits = self._profile.measuring
        target = limits.final_target_half_width if final else limits.target_half_width
        time_limit_s = limits.final_time_limit_s if final else limits.time_limit_s
        rounds = _FINAL_ROUNDS if final else math.ceil(time_limit_s / _SEARCH_ROUND_S)
        stopping = {
            "target_half_width": target,
            "time_limit_s": time_limit_s,
            "seed": seed,
            "least_s": time_limit_s * _FINAL_SHARE if final else 0.0,
            "rounds_in_limit": rounds,
        }
        request = {
            "operation": "compare",
            "baseline": self._named(baseline),
            "candidate": self._named(candidate),
            "inputs": self._host.put(self._path_of(inputs)),
            "stopping": stopping,
        }
        with self._one_request:
            answer = self._ask(request, time_limit_s + limits.hang_limit_s)
        return paired_latency(Samples(**answer), self._fingerprint.id, target, seed)

    def energy(
        self,
        baseline: Subject,
        candidate: Subject,
        inputs: Inputs,
        *,
        final: bool = False,
        seed: int,
    ) -> PairedEnergy:
        """Meter a candidate against the baseline, in turn; see `energy.sample_energy`.

        Args:
            baseline: the uncompressed network, in the profile's first runtime.
            candidate: a model with the same inputs.
            inputs: one array per model input; the profile's `batch_size` first rows are used.
            final: use the profile's time limit for final results, and more windows.
            seed: seed of the bootstrap and of the gaps between windows.

        Raises:
            MeasurementError: a model fails, crashes the runtime or hangs; the meter fails; or
                another process keeps the device.
            DeviceError: there is no meter, or a runtime is not available.
        """
        stopping = energy_stopping(self._profile.energy, final, seed)
        request = {
            "operation": "energy",
            "baseline": self._named(baseline),
            "candidate": self._named(candidate),
            "inputs": self._host.put(self._path_of(inputs)),
            "stopping": asdict(stopping),
        }
        with self._one_request:
            answer = self._ask(request, self._profile.measuring.hang_limit_s)
        return paired_energy(EnergySamples.from_dict(answer), self._fingerprint.id, stopping)

    def profile(self, subject: Subject, inputs: Inputs, runs: int) -> tuple[NodeTime, ...]:
        """The runtime's own profile of a model: the nodes that it ran, in order.

        Args:
            subject: a model in a runtime.
            inputs: one array per model input; the profile's `batch_size` first rows are used.
            runs: how often to run; times are robust means over these.

        Raises:
            MeasurementError: the model fails, crashes the runtime or hangs; or the runtime has no
                profile.
            DeviceError: the runtime is not available.
        """
        request = {
            "operation": "profile",
            **self._named(subject),
            "inputs": self._host.put(self._path_of(inputs)),
            "runs": runs,
        }
        with self._one_request:
            answer = self._ask(request, self._profile.measuring.hang_limit_s)
        return tuple(NodeTime.from_dict(node) for node in answer["nodes"])

    def meter(self) -> MeterReport:
        """Which energy meter the device has, or why it has none; takes about a second."""
        with self._one_request:
            answer = self._ask({"operation": "meter"}, self._profile.measuring.hang_limit_s)
        return MeterReport(**answer)

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
            self._child = self._host.start(_MODULE, self._own)
        return self._child.ask({**request, "lock_wait_s": self._lock_wait_s}, silence_s)

    def _named(self, subject: Subject) -> dict[str, Any]:
        self._profile.runtime(subject.runtime)
        return {"model": self._host.put(_existing(subject.model)), "runtime": subject.runtime}

    def _path_of(self, inputs: Inputs) -> Path:
        return _existing(inputs) if isinstance(inputs, Path) else self.store(inputs)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MeasurementError("There is no such file to measure.", given=path)
    return path.resolve()
