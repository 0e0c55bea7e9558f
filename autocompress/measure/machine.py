"""What the operating system says of the measuring cores: their clock, and who else uses them."""

from __future__ import annotations

import math
import os
import resource
import statistics as exact
from collections.abc import Sequence
from pathlib import Path
from typing import final

# user, nice, system, irq, softirq, steal: all but idle and waiting for disks.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
# Shorter than this, the kernel's coarse tick says nothing.
_SHORTEST_S = 0.2


@final
class CoreTime:
    """How much of some cores' time goes to other programs, from now on.

    Time that a hypervisor takes away (steal) counts as others'.

    Args:
        cores: those that this process runs on, and no other.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = tuple(cores)
        self._start = self._read()

    def share_of_others(self) -> float:
        """Share of the cores' time, 0 to 1, since this object was made; NaN where not told."""
        now = self._read()
        if now is None or self._start is None:
            return math.nan
        busy, total, own = (after - before for after, before in zip(now, self._start, strict=True))
        if total < _SHORTEST_S:
            return math.nan
        return min(max((busy - own) / total, 0.0), 1.0)

    def _read(self) -> tuple[float, float, float] | None:
        """Busy seconds and all seconds of the cores, and this process's own."""
        try:
            lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        busy = total = 0.0
        for line in lines:
            name, *texts = line.split()
            if name in {f"cpu{core}" for core in self._cores}:
                # The last two, guests, are in the first two already.
                ticks = [int(text) for text in texts[:8]]
                busy += sum(ticks[i] for i in _BUSY_FIELDS if i < len(ticks)) / tick
                total += sum(ticks) / tick
        own = resource.getrusage(resource.RUSAGE_SELF)
        return busy, total, own.ru_utime + own.ru_stime


def clock_mhz(cores: Sequence[int]) -> float | None:
    """The mean current clock of some cores in MHz; None where the system does not tell."""
    clocks = []
    for core in cores:
        frequency = Path(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
        try:
            clocks.append(int(frequency.read_text()) / 1000)
        except (OSError, ValueError):
            return _clock_from_cpuinfo(cores)
    return exact.fmean(clocks) if clocks else None


def _clock_from_cpuinfo(cores: Sequence[int]) -> float | None:
    clocks, core = [], -1
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "processor":
                core = int(value)
            elif key.strip() == "cpu MHz" and core in cores:
                clocks.append(float(value))
    except (OSError, ValueError):
        return None
    return exact.fmean(clocks) if clocks else None
