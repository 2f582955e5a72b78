"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

PAUSE = 1.5  # seconds between two times: each takes some hundredths of one


def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of the GNU C library; None with any other."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found


class Release:
    """Gives freed memory back to the system, at most once in ``PAUSE`` seconds.

    Threads that read pictures and a network that computes them leave holes of a few MB in the heap of the GNU C
    library, which it keeps: a slide of 20,000 px took twice the memory that it needed, and a larger one more. Other
    libraries of C give back by themselves; there this does nothing.
    """

    def __init__(self, pause: float = PAUSE) -> None:
        self.pause = pause
        self._trim = _trim()
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether memory was given back."""
        now = time.monotonic()
        if self._trim is None or now - self._last < self.pause:
            return False
        self._trim(0)
        self._last = time.monotonic()
        return True
