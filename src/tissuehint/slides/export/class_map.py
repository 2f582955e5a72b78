"""A class map that does not fit in memory, and how it is gone through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

WINDOW = 2048  # px; a window of it and its 64-bit counts stay below 50 MB


class ClassMap(Protocol):
    """(H,W) uint8 class indices: a zarr array, a numpy array, or a ``GrowingMap``, which lets its readers wait."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W)."""
        ...

    def __getitem__(self, key: Any, /) -> Any:
        """Pixels as a numpy array, by a pair of slices."""
        ...


def windows(classes: ClassMap, side: int = WINDOW) -> Iterator[tuple[slice, slice]]:
    """Windows (rows, columns) that cover a map once, row by row, at most ``side`` px wide and high.

    Where the map has chunks that are not larger, windows are made of whole ones, so that each is decoded once.
    """
    chunks = getattr(classes, "chunks", None) or (1, 1)
    height, width = classes.shape
    down, across = (max(1, side // chunk) * min(side, chunk) for chunk in chunks)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield slice(top, min(top + down, height)), slice(left, min(left + across, width))
