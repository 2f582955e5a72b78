"""Shared by all tests: one thread a process, no deadline for generated examples, an image that says where it is."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pytest runs one process per core

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("tissuehint", deadline=None)
settings.load_profile("tissuehint")


@pytest.fixture(scope="session")
def coded():
    """Maker of (image, mask): (H,W,3) uint8 whose red, green, blue are row, column and class; (H,W) uint8 classes."""

    def make(height: int, width: int, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
        mask = np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)
        rows, columns = np.indices((height, width))
        return np.stack([rows, columns, mask], 2).astype(np.uint8), mask

    return make
