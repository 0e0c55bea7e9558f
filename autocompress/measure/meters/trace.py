"""Readings of a meter over time, and the mean power that they tell of (pure functions).

A counter that moves in steps says at the moment of a step exactly how much was drawn until then,
and nothing in between. So the mean power of a window is taken between its first and last step:
energy over time, both from the same two moments. The error is that of the moments, at most half
the time between two readings, and without bias; reading at a window's ends would be wrong by up to
a whole step at each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from autocompress.errors import MeasurementError

FloatArray = npt.NDArray[np.float64]

_FEWEST_STEPS = 2


@final
@dataclass(frozen=True)
class Trace:
    """Readings of one meter.

    Attributes:
        times_s: when they were taken, rising, shape (readings,).
        values: millijoules so far or milliwatts, shape (readings,).
    """

    times_s: FloatArray
    values: FloatArray


def update_period_s(trace: Trace) -> float | None:
    """The median time between two changes of value; None with fewer than three changes."""
    changes = trace.times_s[_changed(trace)]
    return float(np.median(np.diff(changes))) if len(changes) > _FEWEST_STEPS else None


def mean_power_mw(trace: Trace, reads: Literal["counter", "power"], period_s: float) -> float:
    """Mean power over a trace in milliwatts.

    Args:
        trace: readings that began and ended under the load of interest.
        reads: whether the values are a counter's millijoules or milliwatts.
        period_s: how often the meter's value changes; only a counter needs it.

    Raises:
        MeasurementError: a counter fell, or moved fewer than twice; or there is only one reading.
    """
    if reads == "counter":
        return _counter_power_mw(trace, period_s)
    return _sampled_power_mw(trace)


def _counter_power_mw(trace: Trace, period_s: float) -> float:
    steps = _changed(trace)
    if np.any(np.diff(trace.values) < 0):
        raise MeasurementError(
            "The energy counter fell during a measurement.",
            given=f"from {trace.values.max():.0f} mJ",
            advice="measure again; a driver that was loaded anew starts from zero",
        )
    if len(steps) < _FEWEST_STEPS:
        raise MeasurementError(
            "The energy counter stands still.",
            given=f"{len(steps)} steps in {np.ptp(trace.times_s):.2f} s, one each {period_s:.3f} s",
            allowed=f"at least {_FEWEST_STEPS} steps",
            advice="choose another `energy.meter` in the device profile",
        )
    # A step came after the reading before it, and no longer ago than a period.
    before = np.minimum(np.diff(trace.times_s)[steps - 1], period_s)
    moments = trace.times_s[steps] - before / 2
    drawn = trace.values[steps[-1]] - trace.values[steps[0]]
    return float(drawn / (moments[-1] - moments[0]))


def _sampled_power_mw(trace: Trace) -> float:
    """Time average by the trapezoid rule."""
    widths = np.diff(trace.times_s)
    if not widths.sum() > 0:
        raise MeasurementError(
            "The power sensor was read only once in a window.",
            given=f"{len(trace.values)} readings",
            advice="choose another `energy.meter` in the device profile",
        )
    heights = (trace.values[1:] + trace.values[:-1]) / 2
    return float(np.sum(widths * heights) / widths.sum())


def _changed(trace: Trace) -> npt.NDArray[np.intp]:
    """Indices of readings that differ from the one before."""
    return np.flatnonzero(np.diff(trace.values)) + 1


def poll(
    read: Callable[[], float],
    seconds: float,
    every_s: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Trace:
    """Read a meter for some time.

    Args:
        read: the meter's `read`.
        seconds: for how long.
        every_s: the pause between two readings.
        now: the current time in seconds.
        sleep: waits for some seconds.
    """
    times, values = [now()], [read()]
    while times[-1] - times[0] < seconds:
        sleep(every_s)
        values.append(read())
        times.append(now())
    return Trace(np.array(times), np.array(values, dtype=np.float64))
