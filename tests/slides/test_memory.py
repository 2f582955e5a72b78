"""Freed memory goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

from tissuehint.slides import memory
from tissuehint.slides.memory import PacedRelease, release_memory

GNU = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


HOLES = """
from pathlib import Path
import numpy as np
from tissuehint.slides.memory import release_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
# small enough for the heap; the last one is kept, so that it cannot shrink from its end
arrays = [np.ones(60_000, np.uint8) for _ in range(4000)]
full = resident() - before
last = arrays[-1]
del arrays
held = resident() - before
assert release_memory()
print(full, held, resident() - before)
"""


@pytest.mark.skipif(not GNU, reason="needs the GNU C library")
class TestRelease:
    def test_holes_in_the_heap_are_given_back(self):
        # in a process of its own: the heap of this one may have holes already
        found = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=120)
        full, held, left = map(int, found.stdout.split())
        assert full > 200e6
        assert held > 0.8 * full
        assert left < 0.2 * full

    def test_threads_share_a_heap(self):
        script = "import threading, ctypes\n"
        script += "from tissuehint.slides.memory import one_heap\n"
        script += "assert one_heap()\n"
        script += "import numpy as np\n"
        script += "kept = []\n"
        script += "work = [threading.Thread(target=lambda: kept.append(np.ones(50_000))) for _ in range(8)]\n"
        script += "[one.start() for one in work]; [one.join() for one in work]\n"
        script += "ctypes.CDLL(None).malloc_stats()\n"
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
        assert found.stderr.count("Arena") == 1

    def test_not_more_often_than_asked(self, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
        release = PacedRelease(2.0)
        told = []
        for clock[0] in (101.0, 102.5, 103.0, 104.0, 104.6):
            told.append(release())
        assert told == [False, True, False, False, True]


def test_other_libraries_give_back_by_themselves(monkeypatch):
    monkeypatch.setattr(memory, "_trim", lambda: None)
    assert not release_memory()
