"""How this process returns memory to the system: late, as networks need the same again at once."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, see its <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_LARGEST = 2**31 - 1
_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let large blocks that were freed serve the next request, instead of going to the system.

    By default glibc maps every block of more than 32 MiB anew, and the system clears it page by
    page: for the activations of a batch that takes twice as long as to compute them. Blocks of
    2 GiB and more are still mapped. With other allocators nothing changes.

    Returns:
        Whether the allocator is glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        # Threads' own arenas cannot hold large blocks.
        _ARENA_MAX: 1,
        _MMAP_THRESHOLD: _LARGEST,
        _TRIM_THRESHOLD: _LARGEST,
        _TOP_PAD: _PAD,
    }
    taken = [bool(mallopt(name, value)) for name, value in settings.items()]
    return all(taken)
