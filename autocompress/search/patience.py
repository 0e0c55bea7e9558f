"""Waiting for what refuses to serve for now: a database that is away, a disk that is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar, final

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
ResultT = TypeVar("ResultT")


def may_pass(error: BaseException | None) -> bool:
    """Whether an error is a disk's or a network's that may have recovered a minute later."""
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, lasting)


@final
class Patience:
    """Makes a call again and again while it is refused for now.

    Args:
        for_now: whether an error is a matter of waiting.
        whose: what is waited for, for the notes.
        limit_s: for so long; then the error is raised.
        note: told once when the waiting begins, and once when it ends.
        clock, pause: seconds that never go back, and how to let them pass.
    """

    def __init__(
        self,
        for_now: Callable[[BaseException], bool],
        whose: str,
        limit_s: float = 600.0,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._for_now, self._whose, self._limit_s, self._note = for_now, whose, limit_s, note
        self._clock, self._pause = clock, pause

    def __call__(self, call: Callable[[], ResultT]) -> ResultT:
        """What the call returns.

        Raises:
            Exception: what the call raised, if it was no matter of waiting or still is refused.
        """
        start, pause_s = self._clock(), _FIRST_PAUSE_S
        while True:
            try:
                result = call()
            except Exception as error:
                if not self._for_now(error) or self._clock() - start > self._limit_s:
                    raise
                if pause_s == _FIRST_PAUSE_S:
                    reason = str(error.__cause__ or error).splitlines()[0]
                    self._note(
                        f"{self._whose} refuses to serve ({reason}); trying again for "
                        f"{self._limit_s / 60:.0f} minutes"
                    )
                self._pause(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if pause_s > _FIRST_PAUSE_S:
                self._note(f"{self._whose} serves again")
            return result
