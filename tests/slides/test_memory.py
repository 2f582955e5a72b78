"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from tissuehint.slides import memory
from tissuehint.slides.memory import Release

GNU = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not GNU, reason="needs the GNU C library")
class TestRelease:
    def test_holes_in_the_heap_are_given_back(self):
        before = resident()
        # small enough for the heap; every second one is kept, so that it cannot shrink from its end
        arrays = [np.ones(8000, np.uint8) for _ in range(20_000)]
        kept = arrays[::2]
        full = resident() - before
        del arrays
        assert full > 100e6
        assert Release(0)()
        assert resident() - before < 0.75 * full
        assert len(kept) == 10_000

    def test_not_more_often_than_asked(self, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
        release = Release(2.0)
        told = []
        for clock[0] in (101.0, 102.5, 103.0, 104.0, 104.6):
            told.append(release())
        assert told == [False, True, False, False, True]


def test_other_libraries_give_back_by_themselves(monkeypatch):
    monkeypatch.setattr(memory, "_trim", lambda: None)
    assert not Release(0)()
