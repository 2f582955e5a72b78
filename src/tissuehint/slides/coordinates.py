"""Where things lie on a slide: the one place that converts coordinates.

Level-0 pixels as floats, (top, left) order, measured from the upper left corner of the slide; the centre of the first
pixel is (0.5, 0.5). A scanner may state the bounds of what it scanned: QuPath measures from their corner, and files
that go there or come from there say so by their ``Origin``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

#: From where a file measures: the slide's upper left corner, or that of its bounds (as QuPath does).
Origin = Literal["slide", "bounds"]

Number = TypeVar("Number", float, NDArray[np.float64])


@dataclass(frozen=True)
class Box:
    """A rectangle of a slide, in level-0 pixels.

    Args:
        top, left: its upper left corner; may lie outside the slide.
        height, width: above 0.
    """

    top: float
    left: float
    height: float
    width: float

    @property
    def bottom(self) -> float:
        """First row below it."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """First column to the right of it."""
        return self.left + self.width

    def overlap(self, other: Box) -> Box | None:
        """What both cover, or None."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Box(top, left, bottom - top, right - left) if bottom > top and right > left else None


@dataclass(frozen=True)
class Placement:
    """How the pixels of a map lie on a slide.

    Pixel (row, column) of the map covers the level-0 rows from ``top + row * scale`` to ``top + (row + 1) * scale``,
    and columns likewise.

    Args:
        um_per_px: side of a map pixel in micrometres.
        scale: side of a map pixel in level-0 pixels.
        top, left: upper left corner of map pixel (0, 0), in level-0 pixels of the slide.
    """

    um_per_px: float
    scale: float
    top: float = 0.0
    left: float = 0.0

    def to_slide(self, rows: Number, columns: Number) -> tuple[Number, Number]:
        """Map coordinates (corners of pixels are whole numbers) to level-0 (rows, columns)."""
        return self.top + self.scale * rows, self.left + self.scale * columns

    def to_map(self, rows: Number, columns: Number) -> tuple[Number, Number]:
        """Inverse of ``to_slide``."""
        return (rows - self.top) / self.scale, (columns - self.left) / self.scale

    def box(self, top: float, left: float, height: float, width: float) -> Box:
        """A rectangle of the map on the slide."""
        above, beside = self.to_slide(float(top), float(left))
        return Box(above, beside, height * self.scale, width * self.scale)
