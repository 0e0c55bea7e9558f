"""How long a training will take, judged by those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class _Training:
    kind: str
    macs: int
    seconds_per_step: float


@final
class Pace:
    """Seconds per step of the trainings of one process, scaled by multiply-accumulates."""

    def __init__(self) -> None:
        self._trainings: list[_Training] = []

    def note(self, kind: str, macs: int, steps: int, seconds: float) -> None:
        """Remember a training; one without steps or time says nothing.

        Args:
            kind: trainings of one kind do the same in a step.
            macs: of the network, per sample.
        """
        if steps > 0 and seconds > 0 and macs > 0:
            self._trainings.append(_Training(kind, macs, seconds / steps))

    def seconds(self, kind: str, macs: int, steps: int) -> float | None:
        """What a training will take: as the one nearest in MACs, of its kind if there is one.

        None before any training.
        """
        if steps == 0:
            return 0.0
        known = [t for t in self._trainings if t.kind == kind] or self._trainings
        if not known:
            return None
        # Of equally near ones the last: what else the machine does changes with time.
        near = min(reversed(known), key=lambda t: abs(math.log(macs / t.macs)))
        return near.seconds_per_step * steps * macs / near.macs
