"""The interface that every energy meter implements, and what it says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True)
class MeterFacts:
    """What a meter covers and how it must be read.

    Attributes:
        name: `nvml`, `rapl`, `sysfs` or `zeus`.
        scope: what its figures cover, such as `GPU 0 (NVIDIA H100), whole board`.
        reads: `counter` if `read` gives millijoules so far, `power` if milliwatts now.
        update_period_s: how often its value changes.
        poll_s: how often it is to be read during a window.
        settle_s: how long after a change of load its value still tells of the time before.
        counts_cpu: whether all that runs on the machine's CPU is in its figures.
    """

    name: str
    scope: str
    reads: Literal["counter", "power"]
    update_period_s: float
    poll_s: float
    settle_s: float
    counts_cpu: bool


@final
@dataclass(frozen=True)
class Missing:
    """Why a meter cannot be used here, and what would provide it."""

    what: str
    remedy: str


class Meter(ABC):
    """An opened energy meter; `close` it. Any one thread at a time may read it."""

    @property
    @abstractmethod
    def facts(self) -> MeterFacts:
        """What it covers and how it must be read."""

    @abstractmethod
    def read(self) -> float:
        """Millijoules so far (never falling), or milliwatts now; see `MeterFacts.reads`.

        Raises:
            Exception: whatever the driver or the system raises.
        """

    @abstractmethod
    def temperature_c(self) -> float | None:
        """Temperature of what is metered, in degrees Celsius; None where it is not told."""

    @abstractmethod
    def other_processes(self) -> int:
        """How many other processes use what is metered, as far as its driver tells; else 0."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was opened."""
