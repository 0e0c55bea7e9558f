"""Predictions of a whole split by several workers, with the settings that are timed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np

from autocompress.device import DeviceProfile
from autocompress.measure.arrays import read_arrays, rows_of
from autocompress.measure.client import Subject, Worker
from autocompress.measure.host import host_of
from autocompress.measure.host_interface import Host
from autocompress.measure.session import Array


@final
class ScoringPool:
    """As many workers as the device's cores hold, each with the profile's threads.

    More threads in one worker would be another setting than the one that is timed: another order of
    sums, and another accuracy. A context manager; use it from one thread.

    Args:
        profile: the device. A GPU, and a device elsewhere, get one worker.
        cores: the cores that the device gives.
        scratch: a folder for files on their way to and from the children.
        host: where the device is; None for what the profile says.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        cores: tuple[int, ...],
        scratch: Path,
        host: Host | None = None,
    ) -> None:
        self._scratch = scratch
        self._host = host or host_of(profile)
        self._profiles = _side_by_side(profile, cores) if self._host.here else [profile]
        # A worker's child dies with the thread that started it: each keeps to its own.
        self._threads = [ThreadPoolExecutor(1) for _ in self._profiles]
        self._workers: list[Worker | None] = [None] * len(self._profiles)
        self._parts: dict[Path, list[Path]] = {}

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for thread, worker in zip(self._threads, self._workers, strict=True):
            if worker is not None:
                thread.submit(worker.close).result()
            thread.shutdown()

    def predict(self, subject: Subject, inputs: Path, batch_size: int) -> tuple[Array, ...]:
        """Run a whole split; see `Worker.predict`.

        Args:
            subject: a model in a runtime.
            inputs: an .npz file, as `Worker.store` gives it.
            batch_size: rows per run.
        """
        parts = self._split(inputs, batch_size)
        jobs = [
            self._threads[i].submit(self._predict_part, i, subject, part, batch_size)
            for i, part in enumerate(parts)
        ]
        # All are waited for, so that none still runs when an error is raised.
        errors = [e for job in jobs if (e := job.exception()) is not None]
        if errors:
            raise errors[0]
        outputs = [job.result() for job in jobs]
        return tuple(np.concatenate(column) for column in zip(*outputs, strict=True))

    def _predict_part(
        self, index: int, subject: Subject, part: Path, batch_size: int
    ) -> tuple[Array, ...]:
        return self._worker(index).predict(subject, part, batch_size)

    def _worker(self, index: int) -> Worker:
        # One that pins its children elsewhere is another host.
        host = None if self._host.here else self._host
        worker = self._workers[index] or Worker(self._profiles[index], self._scratch, host)
        self._workers[index] = worker
        return worker

    def _split(self, inputs: Path, batch_size: int) -> list[Path]:
        """The split in as many parts as there are workers, whole batches in each but the last."""
        if inputs not in self._parts:
            arrays = read_arrays(inputs)
            batches = -(-rows_of(arrays, inputs) // batch_size)
            each = -(-batches // len(self._profiles)) * batch_size
            starts = range(0, rows_of(arrays, inputs), each)
            self._parts[inputs] = [
                self._threads[0].submit(self._store, [a[s : s + each] for a in arrays]).result()
                for s in starts
            ]
        return self._parts[inputs]

    def _store(self, arrays: list[Any]) -> Path:
        return self._worker(0).store(arrays)


def _side_by_side(profile: DeviceProfile, cores: tuple[int, ...]) -> list[DeviceProfile]:
    threads = profile.threads
    if profile.kind != "cpu":
        return [profile]
    groups = [cores[i : i + threads] for i in range(0, len(cores) - threads + 1, threads)]
    return [profile.model_copy(update={"cores": group}) for group in groups] or [profile]
