"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

M_ARENA_MAX = -8  # malloc.h
PAUSE = 0.3  # seconds between two times: each takes some hundredths of one


@cache
def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of the GNU C library; None with any other."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found


@cache
def one_heap() -> bool:
    """Threads that begin from now on share a heap, for the rest of the process; whether there was a way to.

    The GNU C library gives threads heaps of their own, and each has its own holes: on a slide of 40,000 px these took
    100 MB, and more the longer it went on.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (OSError, AttributeError, TypeError):
        return False


def release_memory() -> bool:
    """Give freed memory back to the system; whether there was a way to.

    Threads that read pictures and a network that computes them leave holes of a few MB in the heap of the GNU C
    library, which it keeps: a slide of 20,000 px took twice the memory that it needed, and a larger one more. Other
    libraries of C give back by themselves; there this does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
    return trim is not None


class PacedRelease:
    """``release_memory``, at most once in ``pause`` seconds."""

    def __init__(self, pause: float = PAUSE) -> None:
        self.pause = pause
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether memory was given back."""
        if time.monotonic() - self._last < self.pause:
            return False
        given = release_memory()
        self._last = time.monotonic()
        return given
