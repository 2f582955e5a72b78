"""The tissue of a synthetic slide: a function of the place, so that any window of it can be rendered alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.phantom_texture import Floats, Integers, Singles, Stain, noise, stream
from tissuehint.data.phantom_tissue import PHANTOM_LABELS, WHITE, Tissue

# Side of the rendered square of each class, in pixels.
TEXTURE = 1024
# Which class wins is decided at the corners of cells of this many pixels; inside them the fields are bilinear.
CELL = 16
# Octaves of the fields: (share of the wavelength, weight).
OCTAVES = ((1.0, 1.0), (0.42, 0.45), (0.15, 0.18), (0.05, 0.07))
# Regions of one class are about this wide, in micrometres, on slides that have room for it.
REGION = 900.0
# The coarse grid on which the share of blank glass is balanced.
BALANCE = 192


@dataclass(frozen=True)
class SlideTissue:
    """What a phantom slide shows; any window can be rendered alone and equals the crop of a larger one.

    Args:
        height, width: pixels.
        um_per_px: pixel size in micrometres.
        key: random stream of the fields.
        wavelength: width of the regions, in micrometres.
        threshold: field value above which there is tissue.
        textures: (5,T,T,3) uint8, one square per class.
    """

    height: int
    width: int
    um_per_px: float
    key: int
    wavelength: float
    threshold: float
    textures: NDArray[np.uint8] = field(repr=False)

    @classmethod
    def random(
        cls, height: int, width: int, *, seed: int = 0, um_per_px: float = 0.5, blank: float = 0.4
    ) -> SlideTissue:
        """A slide of ``height`` x ``width`` pixels, of which about ``blank`` is glass without tissue."""
        generator = np.random.default_rng([seed, 8])
        stain = Stain.random(generator)
        side = min(TEXTURE, max(height, width))
        textures = np.empty((PHANTOM_LABELS.num_classes, side, side, 3), np.uint8)
        for label in range(PHANTOM_LABELS.num_classes):
            tissue, _ = Tissue.random(generator, (label,), side * um_per_px, side * um_per_px)
            textures[label], _ = tissue.render(0, 0, side, side, um_per_px, stain)
        shortest = min(height, width) * um_per_px
        wavelength = min(REGION, 0.4 * shortest)
        slide = cls(height, width, um_per_px, int(generator.integers(2**32)), wavelength, 0.0, textures)
        rows = (np.arange(BALANCE)[:, None] + 0.5) * (height * um_per_px / BALANCE)
        columns = (np.arange(BALANCE)[None, :] + 0.5) * (width * um_per_px / BALANCE)
        threshold = float(np.quantile(slide._tissue_field(rows, columns), blank))
        limits = {0.0: -np.inf, 1.0: np.inf}
        return cls(**{**slide.__dict__, "threshold": limits.get(blank, threshold)})

    def render(self, top: int, left: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(H,W,3) uint8 image and (H,W) uint8 class indices of a window inside the slide."""
        mask = self.classes(top, left, height, width)
        rows = _mirrored(top, height, self.textures.shape[1])
        columns = _mirrored(left, width, self.textures.shape[2])
        image = np.empty((height, width, 3), np.uint8)
        present = np.flatnonzero(np.bincount(mask.ravel(), minlength=PHANTOM_LABELS.num_classes))
        for label in present:
            texture = self.textures[label][rows][:, columns]
            if present.size == 1:
                return np.ascontiguousarray(texture), mask
            where = mask == label
            np.copyto(image, texture, where=where[..., None])
        return image, mask

    def window(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """(H,W,3) uint8 image of a window inside the slide."""
        return self.render(top, left, height, width)[0]

    def classes(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """(H,W) uint8 class indices of a window inside the slide, those of ``PHANTOM_LABELS``.

        Fields are random at the corners of cells and bilinear inside, so a cell whose corners agree is of one class.
        """
        row, column = top // CELL, left // CELL
        cells = ((top + height - 1) // CELL - row + 1, (left + width - 1) // CELL - column + 1)
        step = CELL * self.um_per_px
        rows = (row + np.arange(cells[0] + 1))[:, None] * step
        columns = (column + np.arange(cells[1] + 1))[None, :] * step
        fields = np.stack([self._tissue_field(rows, columns), *self._class_fields(rows, columns)])
        corner = self._winner(fields)
        same = (corner[:-1, :-1] == corner[1:, :-1]) & (corner[:-1, :-1] == corner[:-1, 1:])
        mixed = np.nonzero(~(same & (corner[:-1, :-1] == corner[1:, 1:])))
        blocks = np.repeat(np.repeat(corner[:-1, :-1], CELL, 0), CELL, 1)
        if mixed[0].size:
            view = blocks.reshape(cells[0], CELL, cells[1], CELL)
            view[mixed[0], :, mixed[1], :] = self._winner(_bilinear(fields, *mixed))
        inner = slice(top - row * CELL, top - row * CELL + height), slice(left - column * CELL, None)
        return np.ascontiguousarray(blocks[inner][:, :width])

    def _winner(self, fields: Singles) -> NDArray[np.uint8]:
        """Class of each place from (5, ...) fields: that of tissue, then of each tissue class."""
        winner: NDArray[np.uint8] = fields[1:].argmax(0).astype(np.uint8)
        winner[fields[0] <= self.threshold] = WHITE
        return winner

    def _tissue_field(self, rows: Floats, columns: Floats) -> Singles:
        """Large where there is tissue: random blobs that thin out towards the edge of the slide."""
        extent = self.height * self.um_per_px, self.width * self.um_per_px
        away = np.maximum(np.abs(2 * rows / extent[0] - 1), np.abs(2 * columns / extent[1] - 1))
        wavelength = min(4 * self.wavelength, 0.35 * max(extent))
        field: Singles = _octaves(rows, columns, wavelength, stream(self.key, 0)) - 0.9 * (away**4).astype(np.float32)
        return field

    def _class_fields(self, rows: Floats, columns: Floats) -> list[Singles]:
        return [
            _octaves(rows, columns, self.wavelength, stream(self.key, 1 + n)) for n in range(PHANTOM_LABELS.num_tissue)
        ]


def _mirrored(start: int, count: int, period: int) -> Integers | slice:
    """Positions on an endless axis brought into 0..period-1 by mirroring; a slice, which is faster, where one can."""
    places = np.arange(start, start + count) % (2 * period)
    places = np.minimum(places, 2 * period - 1 - places)
    first, last = int(places[0]), int(places[-1])
    if abs(last - first) != count - 1:
        return places
    return slice(first, last + 1) if last >= first else slice(first, last - 1 if last else None, -1)


def _octaves(rows: Floats, columns: Floats, wavelength: float, key: int) -> Singles:
    """A smooth random field; each octave is turned, so that no lattice shows in the borders of regions."""
    total = np.zeros(np.broadcast_shapes(rows.shape, columns.shape), np.float32)
    for number, (scale, weight) in enumerate(OCTAVES):
        angle = 0.4 + 0.9 * number
        turned = rows * np.cos(angle) - columns * np.sin(angle), rows * np.sin(angle) + columns * np.cos(angle)
        total += np.float32(weight) * noise(*turned, scale * wavelength, stream(key, number))
    return total


def _bilinear(fields: Singles, row: Integers, column: Integers) -> Singles:
    """(K, N, CELL, CELL) values of fields (K,R,C) at the pixel centres of the cells (N,)."""
    part = ((np.arange(CELL) + 0.5) / CELL).astype(np.float32)
    down, right = part[:, None], part[None, :]
    corners = [fields[:, row + i, column + j][..., None, None] for i in (0, 1) for j in (0, 1)]
    upper = corners[0] + (corners[1] - corners[0]) * right
    lower = corners[2] + (corners[3] - corners[2]) * right
    values: Singles = upper + (lower - upper) * down
    return values
