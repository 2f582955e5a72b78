"""Class maps for the tests of what a mapped slide is written as."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tissuehint.labels import LabelSpace

LABELS = LabelSpace(("gland", "stroma", "necrosis", "white"), white=3)
VALUES = (0, 1, 2, 3, 255)

maps = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.sampled_from(VALUES))


class Watched:
    """A class map that remembers which windows were read, and refuses large ones."""

    def __init__(self, values: np.ndarray, most: int, chunks: tuple[int, int] | None = None) -> None:
        self.shape, self.chunks = values.shape, chunks
        self.windows: list[tuple[slice, slice]] = []
        self._values, self._most = values, most

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        found = self._values[key]
        assert found.size <= self._most, f"{found.shape} at a time"
        self.windows.append(key)
        return found


def blobs(side: int, seed: int = 0, classes: int = 4) -> np.ndarray:
    """(side, side) smooth regions of some 20 px."""
    coarse = np.random.default_rng(seed).random((classes, side // 8 + 2, side // 8 + 2))
    ramp = (np.arange(side) + 0.5) / 8
    low, part = ramp.astype(int), ramp % 1
    for _ in range(2):
        coarse = coarse[:, low] * (1 - part)[:, None] + coarse[:, low + 1] * part[:, None]
        coarse = coarse.transpose(0, 2, 1)
    return coarse.argmax(0).astype(np.uint8)
