"""An endless plane of synthetic tissue: which class lies where, and what it looks like.

Lengths are micrometres, stain concentrations without unit. Class indices are those of ``PHANTOM_LABELS``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.phantom_texture import (
    DEBRIS_SPACING,
    GHOST_SPACING,
    LYMPHOCYTE_SPACING,
    REACH,
    SPINDLE_SPACING,
    Floats,
    GlandCells,
    Integers,
    Nuclei,
    Scatter,
    Singles,
    Stain,
    Tones,
    noise,
    paint_nuclei,
    step,
    stream,
    uniform,
)
from tissuehint.labels import LabelSpace

PHANTOM_LABELS = LabelSpace(
    ("gland", "stroma", "lymphocytes", "necrosis", "white"),
    ((213, 94, 0), (0, 158, 115), (0, 114, 178), (204, 121, 167), (255, 255, 255)),
    white=4,
)
GLAND, STROMA, LYMPHOCYTES, NECROSIS, WHITE = range(5)

Bool = NDArray[np.bool_]
Box = tuple[float, float, float, float]

# Octaves of the region fields: (share of the wavelength, weight).
REGION_OCTAVES = ((1.0, 1.0), (0.42, 0.3), (0.13, 0.06))
COARSE = 44
BLUR = 0.28


@dataclass(frozen=True)
class Tissue:
    """A plane of tissue whose class areas are balanced over one extent.

    Args:
        key: random stream of everything that depends on position.
        classes: class indices that occur.
        bias: one number per class that is added to its region field; a larger one gives a larger area.
        wavelength: size of the regions.
        lean: (row, column) slope of the white region field, so that white lies at an edge.
        glands: cells of the glands.
        tones: look of this image.
    """

    key: int
    classes: tuple[int, ...]
    bias: tuple[float, ...]
    wavelength: float
    lean: tuple[float, float]
    glands: GlandCells
    tones: Tones

    @classmethod
    def random(
        cls, generator: np.random.Generator, classes: tuple[int, ...], height: float, width: float
    ) -> tuple[Tissue, float]:
        """A random plane for an extent of ``height`` x ``width`` um.

        Returns:
            The tissue, and the smallest share of a class in the extent, on a coarse grid.
        """
        extent = min(height, width)
        key = int(generator.integers(2**32))
        spacing = min(float(generator.uniform(42, 60)), max(0.55 * extent, 26.0))
        angle = float(generator.uniform(0, 2 * np.pi))
        slope = float(generator.choice([0.0, 1.2, 2.2])) / max(height, width)
        tissue = cls(
            key,
            classes,
            (0.0,) * len(classes),
            float(generator.uniform(0.45, 0.8)) * extent,
            (slope * np.sin(angle), slope * np.cos(angle)),
            GlandCells(spacing, stream(key, 1)),
            Tones.random(generator),
        )
        target = 0.35 / len(classes) + 0.65 * generator.dirichlet([3.0] * len(classes))
        return tissue._balanced(target, height, width)

    def _balanced(self, target: Floats, height: float, width: float) -> tuple[Tissue, float]:
        """Find the biases that give the classes their target areas, glands as whole cells."""
        rows = (np.arange(COARSE)[:, None] + 0.5) * (height / COARSE)
        columns = (np.arange(COARSE)[None, :] + 0.5) * (width / COARSE)
        fields = self._fields(rows, columns).reshape(len(self.classes), -1)
        cell, centres = np.zeros(0, np.int64), np.zeros((len(self.classes), 0), np.float32)
        if GLAND in self.classes:
            owner = np.stack(self.glands.nearest(*self.glands.bend(rows, columns))).reshape(2, -1)
            cells, cell = np.unique(owner, axis=1, return_inverse=True)
            centres = self._fields(*self.glands.centre(cells[0], cells[1]))
        bias, best, smallest = np.zeros(len(self.classes), np.float32), np.zeros(len(self.classes)), -1.0
        for turn in range(60):
            winner = self._choose(fields, bias, self._gland_wins(centres, bias)[cell] if cell.size else None)
            share = np.bincount(winner, minlength=5)[list(self.classes)] / winner.size
            if share.min() > smallest:
                best, smallest = bias.astype(np.float64), float(share.min())
            bias = (bias + (0.9 - 0.013 * turn) * (target - share)).astype(np.float32)
        balanced = replace(self, bias=tuple(float(value) for value in best))
        return balanced, smallest

    def _fields(self, rows: Floats, columns: Floats) -> Singles:
        """(K, ...) region field of each class of ``classes``, without bias."""
        fields = []
        for label in self.classes:
            field = np.zeros(np.broadcast_shapes(rows.shape, columns.shape), np.float32)
            for number, (scale, weight) in enumerate(REGION_OCTAVES):
                source = stream(self.key, 20 + 8 * label + number)
                place = (rows, columns) if number == 2 else _turned(rows, columns, 0.5 + 0.8 * label)
                field += np.float32(weight) * noise(*place, scale * self.wavelength, source)
            if label == WHITE and any(self.lean):
                field += (rows * self.lean[0] + columns * self.lean[1]).astype(np.float32)
            fields.append(field)
        return np.stack(fields)

    def _gland_wins(self, fields: Singles, bias: NDArray[np.float32]) -> Bool:
        """Where gland has the largest biased field, from fields (K, ...)."""
        biased = fields + bias.reshape(-1, *[1] * (fields.ndim - 1))
        wins: Bool = biased.argmax(0) == self.classes.index(GLAND)
        return wins

    def _choose(self, fields: Singles, bias: NDArray[np.float32], gland: Bool | None) -> NDArray[np.uint8]:
        """Class per position: gland where its cell is one, elsewhere the best of the other classes."""
        biased = fields + bias.reshape(-1, *[1] * (fields.ndim - 1))
        labels = np.asarray(self.classes, np.uint8)
        if gland is None:
            single: NDArray[np.uint8] = labels[biased.argmax(0)]
            return single
        if len(self.classes) == 1:
            return np.full(fields.shape[1:], GLAND, np.uint8)
        biased[self.classes.index(GLAND)] = -np.inf
        winner: NDArray[np.uint8] = labels[biased.argmax(0)]
        winner[gland] = GLAND
        return winner

    def _gland_cells(self, row: Integers, column: Integers) -> Bool:
        """Whether cells of the gland lattice are glands: gland wins at their centre."""
        return self._gland_wins(self._fields(*self.glands.centre(row, column)), np.asarray(self.bias, np.float32))

    def classes_at(self, rows: Floats, columns: Floats) -> NDArray[np.uint8]:
        """Class index at positions that broadcast with each other."""
        return self._map(rows, columns)[0]

    def _map(self, rows: Floats, columns: Floats) -> tuple[NDArray[np.uint8], _Owner | None]:
        fields, bias = self._fields(rows, columns), np.asarray(self.bias, np.float32)
        if GLAND not in self.classes or fields[0].size == 0:
            return self._choose(fields, bias, None), None
        bent = self.glands.bend(rows, columns)
        row, column = self.glands.nearest(*bent)
        top, left = int(row.min()), int(column.min())
        table = self._gland_cells(
            np.arange(top, int(row.max()) + 1)[:, None], np.arange(left, int(column.max()) + 1)[None, :]
        )
        return self._choose(fields, bias, table[row - top, column - left]), _Owner(*bent, row, column)

    def render(
        self, top: int, left: int, height: int, width: int, um_per_px: float, stain: Stain
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image and mask of a frame; a frame equals the crop of any larger one.

        Args:
            top: first pixel row, at ``um_per_px``.
            left: first pixel column.
            height: rows.
            width: columns.
            um_per_px: pixel size.
            stain: colours.

        Returns:
            (H,W,3) uint8 image and (H,W) uint8 class indices.
        """
        from scipy.ndimage import gaussian_filter

        margin = 4
        row = np.arange(top - margin, top + height + margin)[:, None]
        column = np.arange(left - margin, left + width + margin)[None, :]
        rows, columns = row * um_per_px, column * um_per_px
        mask, owner = self._map(rows, columns)
        haematoxylin, eosin = self._ground(rows, columns, mask, owner)
        grain = noise(rows, columns, 1.3, stream(self.key, 2))
        box = (rows[0, 0] - REACH, columns[0, 0] - REACH, rows[-1, 0] + REACH, columns[0, -1] + REACH)
        on_tissue = mask != WHITE
        for nuclei in self._nuclei(box):
            dark, cover = (on_tissue * part for part in paint_nuclei(rows, columns, nuclei, grain, um_per_px))
            haematoxylin += dark * (0.62 + 0.76 * grain) - 0.8 * haematoxylin * cover
            eosin -= 0.5 * eosin * np.minimum(cover, dark)
        sigma = min(BLUR / um_per_px, 0.9)
        haematoxylin = gaussian_filter(haematoxylin, sigma, truncate=3.5)
        eosin = gaussian_filter(eosin, sigma, truncate=3.5)
        light = 0.965 + 0.07 * noise(rows, columns, 260.0, stream(self.key, 3))
        picture = stain.colour(haematoxylin, eosin, np.minimum(light, 1).astype(np.float32))
        for channel in range(3):
            first = uniform(row, column, stream(self.key, 4 + channel))
            picture[..., channel] += 5 * (first + uniform(column, row, stream(self.key, 8 + channel)) - 1)
        image = np.rint(np.clip(picture, 0, 255)).astype(np.uint8)
        inner = slice(margin, -margin)
        return np.ascontiguousarray(image[inner, inner]), np.ascontiguousarray(mask[inner, inner])

    def _ground(
        self, rows: Floats, columns: Floats, mask: NDArray[np.uint8], owner: _Owner | None
    ) -> tuple[Singles, Singles]:
        """Haematoxylin and eosin of everything but nuclei, (H,W) each."""
        haematoxylin, eosin = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        for label, texture in ((STROMA, self._stroma), (LYMPHOCYTES, self._lymphoid), (NECROSIS, self._necrotic)):
            where = mask == label
            if where.any():
                blue, pink = texture(rows, columns)
                haematoxylin[where], eosin[where] = blue[where], pink[where]
        where = mask == WHITE
        haematoxylin[where], eosin[where] = self.tones.haematoxylin[WHITE], self.tones.eosin[WHITE]
        where = mask == GLAND
        if owner is not None and where.any():
            place = (np.broadcast_to(rows, mask.shape)[where], np.broadcast_to(columns, mask.shape)[where])
            haematoxylin[where], eosin[where] = self._glandular(*place, owner.select(where))
        return haematoxylin, eosin

    def _across(self, rows: Floats, columns: Floats) -> Floats:
        """Coordinate across the fibres: their course is its level lines."""
        direction, key = self.tones.direction, stream(self.key, 50)
        wave = 26 * noise(rows, columns, 62.0, stream(key, 0)) + 7 * noise(rows, columns, 17.0, stream(key, 1))
        across: Floats = rows * np.cos(direction) - columns * np.sin(direction) + wave
        return across

    def _stroma(self, rows: Floats, columns: Floats) -> tuple[Singles, Singles]:
        key = stream(self.key, 51)
        across = self._across(rows, columns)
        along = rows * np.sin(self.tones.direction) + columns * np.cos(self.tones.direction)
        bundle = noise(across, along * 0.13, 5.2, stream(key, 0))
        fibril = noise(across, along * 0.06, 1.9, stream(key, 1))
        density = noise(rows, columns, 38.0, stream(key, 2))
        cleft = step(bundle + 0.35 * density, 0.16, 0.40)
        strength = (0.42 + 0.55 * bundle + 0.45 * fibril) * (0.25 + 0.75 * cleft) * (0.8 + 0.4 * density)
        return self.tones.haematoxylin[STROMA] * (0.3 + 0.7 * strength), self.tones.eosin[STROMA] * strength * 1.15

    def _lymphoid(self, rows: Floats, columns: Floats) -> tuple[Singles, Singles]:
        key = stream(self.key, 52)
        mesh = noise(rows, columns, 3.1, stream(key, 0)) * 0.6 + noise(rows, columns, 9.0, stream(key, 1)) * 0.4
        strength = 0.35 + 1.1 * step(mesh, 0.25, 0.75)
        return self.tones.haematoxylin[LYMPHOCYTES] * strength, self.tones.eosin[LYMPHOCYTES] * strength

    def _necrotic(self, rows: Floats, columns: Floats) -> tuple[Singles, Singles]:
        key = stream(self.key, 53)
        cloud = noise(rows, columns, 21.0, stream(key, 2))
        swirl = (
            rows + 3 * noise(rows, columns, 4.5, stream(key, 3)),
            columns + 3 * noise(rows, columns, 5.0, stream(key, 4)),
        )
        grain = noise(*swirl, 1.5, stream(key, 0))
        clump = noise(*swirl, 3.9, stream(key, 1))
        hole = step(0.5 * clump + 0.3 * grain + 0.5 * cloud, 0.30, 0.46)
        strength = (0.22 + 0.9 * grain * (0.45 + clump) + 0.35 * cloud) * (0.18 + 0.82 * hole)
        dust = step(grain * clump, 0.40, 0.75) * 0.35
        return self.tones.haematoxylin[NECROSIS] * strength + dust, self.tones.eosin[NECROSIS] * strength

    def _glandular(self, rows: Floats, columns: Floats, owner: _Owner) -> tuple[Singles, Singles]:
        """Basement membrane, epithelium and lumen by the distance from the border of the cell; (N,) positions."""
        key = stream(self.key, 54)
        depth = self.glands.depth(owner.bent_rows, owner.bent_columns, owner.row, owner.column)
        own = uniform(owner.row, owner.column, stream(key, 0))
        ragged = noise(rows, columns, 4.0, stream(key, 1))
        foam = noise(rows, columns, 2.4, stream(key, 2))
        fine = noise(rows, columns, 1.1, stream(key, 3))
        top = self.tones.thickness + 2.5 * own + 3.2 * (ragged - 0.5)
        inside = step(depth, 1.3, 2.3)
        lumen = step(depth, top - 0.5, top + 0.6)
        brush = np.exp(-(((depth - top + 0.9) / 0.8) ** 2))
        apical = step(depth, 7.0, top)
        vacuole = apical * step(foam + 0.4 * own, 0.55, 0.85)
        body = (0.75 + 0.5 * fine) * (1 - 0.55 * vacuole)
        blue = self.tones.haematoxylin[GLAND] * body * (1.25 - 0.5 * apical) + 0.12 * brush
        pink = self.tones.eosin[GLAND] * body + 0.22 * brush
        blue = blue * inside + self.tones.haematoxylin[STROMA] * 0.5 * (1 - inside)
        pink = pink * inside + self.tones.eosin[STROMA] * (0.35 + 0.7 * ragged) * (1 - inside)
        secretion = 0.03 + 0.35 * step(own, 0.55, 0.75) * step(0.3 * foam + 0.7 * ragged, 0.35, 0.85)
        blue = blue * (1 - lumen) + 0.12 * secretion * lumen
        pink = pink * (1 - lumen) + secretion * lumen
        return blue, pink

    def _nuclei(self, box: Box) -> list[Nuclei]:
        """Nuclei whose centres lie in their own class, by kind."""
        kinds = []
        if GLAND in self.classes:
            kinds.append(self._gland_nuclei(box))
        for label, nuclei in (
            (STROMA, self._spindles),
            (LYMPHOCYTES, self._lymphocytes),
            (NECROSIS, self._ghosts),
            (NECROSIS, self._debris),
        ):
            if label in self.classes:
                found = nuclei(box)
                kinds.append(found.select(self.classes_at(found.rows, found.columns) == label))
        return kinds

    def _gland_nuclei(self, box: Box) -> Nuclei:
        spacing = self.glands.spacing
        row = np.arange(int(box[0] // spacing) - 2, int(box[2] // spacing) + 3)
        column = np.arange(int(box[1] // spacing) - 2, int(box[3] // spacing) + 3)
        row, column = (part.ravel() for part in np.meshgrid(row, column, indexing="ij"))
        chosen = self._gland_cells(row, column) if len(self.classes) > 1 else np.ones(row.shape, bool)
        row, column = row[chosen], column[chosen]
        if row.size == 0:
            nothing = np.zeros(0, np.float32)
            return Nuclei(np.zeros(0), np.zeros(0), nothing, nothing, nothing, nothing, nothing)
        return self.glands.nuclei(row, column, self.tones.size, float(self.tones.dark[GLAND]))

    def _spindles(self, box: Box) -> Nuclei:
        scatter = Scatter(SPINDLE_SPACING, stream(self.key, 60), box, 0.45)
        rows, columns = scatter.points()
        down = self._across(rows + 0.5, columns) - self._across(rows - 0.5, columns)
        right = self._across(rows, columns + 0.5) - self._across(rows, columns - 0.5)
        angle = np.arctan2(-right, down) + scatter.random(2, -0.12, 0.12)
        core = scatter.random(3, 0.8, 1.2) * self.tones.dark[STROMA]
        nuclei = Nuclei(
            rows,
            columns,
            scatter.random(4, 4.2, 7.5),
            scatter.random(5, 0.8, 1.35),
            angle.astype(np.float32),
            core,
            core,
        )
        return nuclei.select(scatter.random(6) < 0.72)

    def _lymphocytes(self, box: Box) -> Nuclei:
        scatter = Scatter(LYMPHOCYTE_SPACING, stream(self.key, 61), box, 0.2)
        radius = scatter.random(2, 2.5, 3.3)
        core = scatter.random(3, 1.0, 1.6) * self.tones.dark[LYMPHOCYTES]
        angle = scatter.random(4, 0, 3.14)
        nuclei = Nuclei(*scatter.points(), radius * scatter.random(5, 1.0, 1.15), radius, angle, core, core * 0.95)
        return nuclei.select(scatter.random(6) < self.tones.density)

    def _ghosts(self, box: Box) -> Nuclei:
        scatter = Scatter(GHOST_SPACING, stream(self.key, 62), box, 0.4)
        radius = scatter.random(2, 2.2, 3.8)
        core = scatter.random(3, 0.15, 0.4) * self.tones.dark[NECROSIS]
        angle = scatter.random(4, 0, 3.14)
        nuclei = Nuclei(*scatter.points(), radius * scatter.random(5, 1.0, 1.4), radius, angle, core, core * 1.8)
        return nuclei.select(scatter.random(6) < 0.6)

    def _debris(self, box: Box) -> Nuclei:
        scatter = Scatter(DEBRIS_SPACING, stream(self.key, 63), box, 0.45)
        rows, columns = scatter.points()
        cluster = noise(rows, columns, 17.0, stream(self.key, 64))
        radius = scatter.random(2, 0.45, 1.1)
        core = scatter.random(3, 0.8, 1.8) * self.tones.dark[NECROSIS]
        angle = scatter.random(4, 0, 3.14)
        nuclei = Nuclei(rows, columns, radius * scatter.random(5, 1.0, 1.7), radius, angle, core, core)
        return nuclei.select(scatter.random(6) < 0.12 + 0.75 * step(cluster, 0.5, 0.8))


def _turned(rows: Floats, columns: Floats, angle: float) -> tuple[Floats, Floats]:
    """Rotated positions, so that the lattice of the noise shows in no region border."""
    return rows * np.cos(angle) - columns * np.sin(angle), rows * np.sin(angle) + columns * np.cos(angle)


@dataclass(frozen=True)
class _Owner:
    """Bent position and gland cell of frame positions."""

    bent_rows: Floats
    bent_columns: Floats
    row: Integers
    column: Integers

    def select(self, where: Bool) -> _Owner:
        return _Owner(self.bent_rows[where], self.bent_columns[where], self.row[where], self.column[where])
