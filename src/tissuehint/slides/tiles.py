"""Windows over the map of a slide, and the blocks of windows in which it is computed.

Windows of ``side`` px stand at multiples of ``stride`` and overlap by ``side - stride``. A block holds ``block`` x
``block`` of them and owns the map pixels from its first window to the first window of the next block: its core. What
its windows say of pixels beyond belongs to the blocks to the right, below and between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tissuehint.errors import InputError


@dataclass(frozen=True)
class Rectangle:
    """Pixels of a map: rows ``top`` to ``bottom``, columns ``left`` to ``right``, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left


@dataclass(frozen=True)
class Tiling:
    """Windows and blocks of a map.

    Args:
        height, width: of the map in px, at least 1.
        side: of a window in px.
        stride: between windows in px, at most ``side``.
        block: windows along a side of a block.

    Raises:
        InputError: a map without pixels, a stride that leaves gaps, a block without windows.

    Example:
        >>> tiling = Tiling(1000, 700, side=256, stride=192, block=3)
        >>> (tiling.rows, tiling.columns), (tiling.block_rows, tiling.block_columns)
        ((5, 4), (2, 2))
        >>> tiling.core(1, 1)
        Rectangle(top=576, left=576, bottom=1000, right=700)
    """

    height: int
    width: int
    side: int
    stride: int
    block: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise InputError(f"map of {self.height} x {self.width} px", "has no pixels", "check the um per px")
        if not 1 <= self.stride <= self.side:
            rule = f"is not in 1..{self.side}: pixels between windows are lost"
            raise InputError(f"stride {self.stride}", rule, "take a smaller one")
        if self.overlap > self.core_side:
            rule = f"has a core of {self.core_side} px, windows reach {self.overlap} px beyond it"
            raise InputError(f"block of {self.block} windows", rule, "take more windows")

    @property
    def overlap(self) -> int:
        """How far a window reaches into the next one, px."""
        return self.side - self.stride

    @property
    def core_side(self) -> int:
        """Side of a core, px; the last ones reach to the end of the map."""
        return self.block * self.stride

    @property
    def rows(self) -> int:
        """Rows of windows."""
        return _count(self.height, self.side, self.stride)

    @property
    def columns(self) -> int:
        """Columns of windows."""
        return _count(self.width, self.side, self.stride)

    @property
    def block_rows(self) -> int:
        """Rows of blocks."""
        return -(-self.rows // self.block)

    @property
    def block_columns(self) -> int:
        """Columns of blocks."""
        return -(-self.columns // self.block)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All blocks, row by row."""
        for row in range(self.block_rows):
            for column in range(self.block_columns):
                yield row, column

    def core(self, row: int, column: int) -> Rectangle:
        """Map pixels that a block owns; the cores cover each pixel once."""
        top, left = row * self.core_side, column * self.core_side
        bottom = self.height if row == self.block_rows - 1 else top + self.core_side
        right = self.width if column == self.block_columns - 1 else left + self.core_side
        return Rectangle(top, left, bottom, right)

    def windows(self, row: int, column: int) -> NDArray[np.int64]:
        """(N,2) windows of a block, as (row, column) among all windows."""
        rows = np.arange(row * self.block, min((row + 1) * self.block, self.rows))
        columns = np.arange(column * self.block, min((column + 1) * self.block, self.columns))
        return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)

    def corners(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tops (rows,) and lefts (columns,) of all windows in map px."""
        return np.arange(self.rows) * self.stride, np.arange(self.columns) * self.stride


def _count(length: int, side: int, stride: int) -> int:
    return 1 if length <= side else -(-(length - side) // stride) + 1
