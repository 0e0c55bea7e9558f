"""How long a search may go on: trials, seconds, and what must be kept for the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import final


@final
class Budget:
    """Limits of one search over all calls that work in its folder.

    Args:
        trials: finished trials in all; None is no limit.
        time_s: seconds in all, set-up and final judging included; None is no limit.
        spent_s: seconds that earlier calls used.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        trials: int | None,
        time_s: float | None,
        spent_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trials = trials
        self.time_s = time_s
        self._clock = clock
        self._start = clock() - spent_s

    @property
    def spent_s(self) -> float:
        """Seconds used so far."""
        return self._clock() - self._start

    @property
    def remaining_s(self) -> float | None:
        """Seconds left; None without a limit."""
        return None if self.time_s is None else self.time_s - self.spent_s

    def allows_trial(self, finished: int, reserve_s: float) -> bool:
        """Whether another trial may begin when `reserve_s` must be left after it."""
        if self.trials is not None and finished >= self.trials:
            return False
        remaining = self.remaining_s
        return remaining is None or remaining > reserve_s
