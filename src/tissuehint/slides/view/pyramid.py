"""Tiles of a deep zoom pyramid: which part of a slide each one shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tissuehint.slides.coordinates import Box

TILE = 256  # side of a tile, px; tiles do not overlap


@dataclass(frozen=True)
class Tile:
    """A picture of a part of a slide.

    Pixel (row, column) covers the level-0 rows from ``top + row * step`` to ``top + (row + 1) * step``, and columns
    likewise. The last pixels of a row or column of tiles may reach beyond the slide.

    Args:
        top, left: level-0 pixels.
        rows, columns: its size, px.
        step: level-0 pixels a pixel, a power of two.
    """

    top: int
    left: int
    rows: int
    columns: int
    step: int

    @property
    def box(self) -> Box:
        """What it covers."""
        return Box(float(self.top), float(self.left), float(self.rows * self.step), float(self.columns * self.step))

    def centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Level-0 coordinates of the centres of its pixels: (rows,), (columns,)."""
        return (
            self.top + (np.arange(self.rows, dtype=np.float64) + 0.5) * self.step,
            self.left + (np.arange(self.columns, dtype=np.float64) + 0.5) * self.step,
        )


@dataclass(frozen=True)
class Pyramid:
    """Levels of a slide, each half as fine as the next; the last one shows every pixel.

    Args:
        height, width: of level 0 of the slide, px.

    Example:
        >>> pyramid = Pyramid(700, 1000)
        >>> pyramid.last, pyramid.first
        (10, 8)
        >>> pyramid.tile(10, row=2, column=3)
        Tile(top=512, left=768, rows=188, columns=232, step=1)
    """

    height: int
    width: int

    @property
    def last(self) -> int:
        """The finest level."""
        return max(1, math.ceil(math.log2(max(self.height, self.width))))

    @property
    def first(self) -> int:
        """The coarsest level: the whole slide in one tile."""
        return min(self.last, int(math.log2(TILE)))

    def tile(self, level: int, row: int, column: int) -> Tile | None:
        """A tile by its place, None where there is none."""
        if not self.first <= level <= self.last or row < 0 or column < 0:
            return None
        step = 2 ** (self.last - level)
        top, left = row * TILE * step, column * TILE * step
        if top >= self.height or left >= self.width:
            return None
        rows = min(TILE, math.ceil((self.height - top) / step))
        columns = min(TILE, math.ceil((self.width - left) / step))
        return Tile(top, left, rows, columns, step)
