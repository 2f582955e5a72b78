r"""From maps of overlapping windows to one map: a weighted mean, block by block, each block written once.

p(x) = sum_i w(x - x_i) p_i(x - x_i) / sum_i w(x - x_i) over the windows i that see the pixel x; w rises linearly over
the overlap from the border of a window. What the windows of a block say of its neighbours' pixels waits on disk until
their turn, so that every window is computed once, memory does not grow with the slide, and a killed run goes on.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tissuehint.files import atomic_path
from tissuehint.slides.tiles import Tiling

#: Where the parts beyond a core lie: block offsets (row, column).
NEIGHBOURS = {"right": (0, 1), "below": (1, 0), "corner": (1, 1)}


def blend_weights(side: int, overlap: int) -> Tensor:
    """W (side,side) in (0,1]: 1 in the middle, falling linearly towards the border over the overlap.

    Example:
        >>> blend_weights(5, 2)[2].tolist()
        [0.25, 0.75, 1.0, 0.75, 0.25]
    """
    ramp = max(1, min(overlap, side // 2))
    inside = torch.arange(side, dtype=torch.float32) + 0.5
    rise = (torch.minimum(inside, side - inside) / ramp).clamp(max=1.0)
    return rise[:, None] * rise[None, :]


class BlockSum:
    """Weighted sums over the pixels that the windows of a block see.

    Args:
        tiling: of the map.
        row, column: the block.
        channels: K.
        device: where to add.
        memory: sums of a block that is done, which are overwritten; None takes new memory.
    """

    def __init__(
        self,
        tiling: Tiling,
        row: int,
        column: int,
        channels: int,
        device: torch.device,
        memory: Tensor | None = None,
    ) -> None:
        self.tiling, self.row, self.column = tiling, row, column
        self.core = tiling.core(row, column)
        height, width = self.core.shape
        # beyond the core only where there is a next block
        self.height = height + (tiling.overlap if row < tiling.block_rows - 1 else 0)
        self.width = width + (tiling.overlap if column < tiling.block_columns - 1 else 0)
        # the sums of K channels, and of the weights as the last one
        size = channels + 1, self.height, self.width
        if memory is None or memory.numel() < math.prod(size):
            memory = torch.empty(math.prod(size), device=device)
        self.memory = memory
        self.sums = memory[: math.prod(size)].view(size).zero_()
        self.weights = blend_weights(tiling.side, tiling.overlap).to(device)

    def add(self, maps: Tensor, tops: list[int], lefts: list[int]) -> None:
        """Add windows.

        Args:
            maps: (N,K,side,side).
            tops, lefts: their corners in px of the map.
        """
        weighted = maps * self.weights
        for part, top, left in zip(weighted, tops, lefts, strict=True):
            row, column = top - self.core.top, left - self.core.left
            height, width = min(part.shape[1], self.height - row), min(part.shape[2], self.width - column)
            place = self.sums[:, row : row + height, column : column + width]
            place[:-1] += part[:, :height, :width]
            place[-1] += self.weights[:height, :width]

    def take(self, sums: Tensor) -> None:
        """Add what an earlier block left for the upper left part of this one, (K+1,h,w)."""
        self.sums[:, : sums.shape[1], : sums.shape[2]] += sums.to(self.sums.device)

    def seen(self) -> Tensor:
        """Where any window of this block or of those before was added, (h,w) bool, of the core."""
        height, width = self.core.shape
        return self.sums[-1, :height, :width] > 0

    def likeliest(self) -> Tensor:
        """Class of the greatest sum, (h,w) uint8, of the core; the first of equal ones. No mean is needed for it."""
        height, width = self.core.shape
        first, *others = self.sums[:-1, :height, :width]
        best, classes = first.clone(), torch.zeros_like(first, dtype=torch.uint8)
        # class by class: many times faster than argmax on the CPU
        for label, sums in enumerate(others, 1):
            classes.masked_fill_(sums > best, label)
            torch.maximum(best, sums, out=best)
        return classes

    def mean(self) -> Tensor:
        """Probabilities (K,h,w) of the core, 0 where no window was added."""
        height, width = self.core.shape
        sums = self.sums[:, :height, :width]
        return sums[:-1] / sums[-1].clamp_min(1e-12)

    def beyond(self) -> dict[str, Tensor]:
        """The parts that belong to the next blocks: ``right``, ``below``, ``corner``, where these exist."""
        height, width = self.core.shape
        parts = {
            "right": self.sums[:, :height, width:],
            "below": self.sums[:, height:, :width],
            "corner": self.sums[:, height:, width:],
        }
        return {name: part for name, part in parts.items() if part.numel()}


class Waiting:
    """Sums that wait on disk for the block that they belong to.

    Args:
        folder: for them alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, row: int, column: int, parts: dict[str, Tensor]) -> None:
        """Keep what block (row, column) says of its neighbours, exactly."""
        for name, part in parts.items():
            if bool((part[-1] > 0).any()):
                packed = io.BytesIO()
                np.save(packed, part.cpu().numpy())
                # written by Python, which notices a full disk: numpy's own writing may lose the end without a word
                with atomic_path(self._file(row, column, name)) as file:
                    file.write_bytes(packed.getbuffer())

    def fetch(self, row: int, column: int) -> list[Tensor]:
        """What earlier blocks left for block (row, column), always in the same order."""
        found = []
        for name, (down, right) in NEIGHBOURS.items():
            file = self._file(row - down, column - right, name)
            if file.is_file():
                found.append(torch.from_numpy(np.load(file)))
        return found

    def forget(self, row: int, column: int) -> None:
        """Remove what block (row, column) has used."""
        for name, (down, right) in NEIGHBOURS.items():
            self._file(row - down, column - right, name).unlink(missing_ok=True)

    def _file(self, row: int, column: int, name: str) -> Path:
        return self.folder / f"{row}_{column}_{name}.npy"
