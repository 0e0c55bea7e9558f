"""Containers of judged points, which are made beside what is measured."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import final

from autocompress.errors import ExportError, OutOfTimeError
from autocompress.evaluate import Evaluator
from autocompress.export.coding.beside import Coding

# Each takes a process, and the memory for a file and its container.
_MOST_AT_ONCE = 4

Done = Callable[[str, Coding, float], None]


@final
class FinalCodes:
    """Makes containers in the order in which they are asked for, a few at once.

    Args:
        evaluator: codes.
        done: called with a candidate's name, its coding that has ended, and the seconds that were
            spent on waiting for it.
    """

    def __init__(self, evaluator: Evaluator, done: Done) -> None:
        self._evaluator, self._done = evaluator, done
        self._waiting: deque[tuple[str, Path]] = deque()
        self._under_way: dict[str, Coding] = {}
        self._at_once = min(_MOST_AT_ONCE, len(os.sched_getaffinity(0)))

    def __len__(self) -> int:
        """How many are not made yet."""
        return len(self._waiting) + len(self._under_way)

    def __contains__(self, candidate: object) -> bool:
        """Whether a candidate's container was asked for and is not made yet."""
        return candidate in self._under_way or any(n == candidate for n, _ in self._waiting)

    def add(self, candidate: str, model: Path) -> None:
        """Ask for a candidate's container, to be made of its file."""
        self._waiting.append((candidate, model))
        self.look()

    def look(self) -> None:
        """Take in what has ended, and begin what there is room for."""
        for candidate in [name for name, coding in self._under_way.items() if coding.ended]:
            self._take(candidate, 0.0)
        while self._waiting and len(self._under_way) < self._at_once:
            candidate, model = self._waiting.popleft()
            self._under_way[candidate] = self._evaluator.start_coding(model, checked=True)

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait for the one that was begun first; whether it ended within so many seconds."""
        candidate, coding = next(iter(self._under_way.items()))
        begin = time.monotonic()
        try:
            # Whoever takes it is told of its failure.
            with suppress(ExportError):
                coding.wait(limit_s)
        except OutOfTimeError:
            return False
        self._take(candidate, time.monotonic() - begin)
        self.look()
        return True

    def _take(self, candidate: str, waited_s: float) -> None:
        self._done(candidate, self._under_way.pop(candidate), waited_s)
