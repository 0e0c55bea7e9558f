"""`Recorder`: reads a meter in a thread while the caller works."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import final

import numpy as np

from autocompress.errors import MeasurementError
from autocompress.measure.meters.meter import Meter
from autocompress.measure.meters.trace import Trace


@final
class Recorder:
    """Reads a meter from the start of a `with` block to its end, and once at either.

    A thread, because a power sensor that is read only between two runs sees the device idle.

    Raises:
        MeasurementError: the meter failed meanwhile.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._times: list[float] = []
        self._values: list[float] = []
        self._error: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Recorder:
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        # What went wrong in the block itself must not be hidden.
        if error is not None:
            return
        self._read()
        if self._error is not None:
            raise MeasurementError(
                f"The energy meter failed: {self._error}",
                given=self._meter.facts.scope,
                advice="measure again, or choose another `energy.meter` in the device profile",
            ) from self._error

    @property
    def trace(self) -> Trace:
        """All readings so far."""
        return Trace(np.array(self._times), np.array(self._values))

    def _read(self) -> None:
        if self._error is not None:
            return
        try:
            value = float(self._meter.read())
        # Whatever a driver raises must reach the thread that measures.
        except Exception as error:
            self._error = error
            return
        self._values.append(value)
        self._times.append(time.monotonic())

    def _poll(self) -> None:
        while not self._done.wait(self._meter.facts.poll_s):
            self._read()
