"""Clocks that time the steps of a run, one per kind of device."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, final

import torch

from autocompress.measure.runtimes.torch_graph.node import Target


class Clock(ABC):
    """Times the intervals between ticks."""

    @abstractmethod
    def start(self) -> None:
        """Begin a new series."""

    @abstractmethod
    def tick(self) -> None:
        """End an interval, and begin the next."""

    @abstractmethod
    def intervals_ms(self) -> list[float]:
        """The intervals since `start`, one per tick."""


@final
class HostClock(Clock):
    """For a CPU, whose operators are finished when they return."""

    def __init__(self) -> None:
        self._times_ns: list[int] = []

    def start(self) -> None:
        """Begin a new series."""
        self._times_ns = [time.perf_counter_ns()]

    def tick(self) -> None:
        """End an interval."""
        self._times_ns.append(time.perf_counter_ns())

    def intervals_ms(self) -> list[float]:
        """The intervals since `start`."""
        return [(after - before) / 1e6 for before, after in pairwise(self._times_ns)]


@final
class CudaClock(Clock):
    """For a GPU: events in its stream, so that the intervals add up to the whole run.

    An interval holds the time in which the GPU waits for the host to launch the step's kernels.
    Kernel times alone would leave out what small networks spend most of their time on, and
    waiting for the device after each step would add time that no run spends.
    """

    def __init__(self) -> None:
        self._events: list[Any] = []

    def start(self) -> None:
        """Begin a new series once the GPU is idle."""
        torch.cuda.synchronize()
        self._events = []
        self.tick()

    def tick(self) -> None:
        """End an interval."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def intervals_ms(self) -> list[float]:
        """The intervals since `start`."""
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(self._events)]


def clock_of(target: Target) -> Clock:
    """The clock of a target's device."""
    return CudaClock() if target.device.type == "cuda" else HostClock()
