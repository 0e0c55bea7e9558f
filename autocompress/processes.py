"""Processes that do not outlive those that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Let this process be killed when its parent ends, where the system can do that.

    Args:
        parent: the parent's process id; 0 if it is on another machine.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the call above.
    if parent and os.getppid() != parent:
        os._exit(1)
