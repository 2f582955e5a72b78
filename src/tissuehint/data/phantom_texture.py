"""Texture of synthetic H&E tissue as functions of position.

Every function takes positions in micrometres on an endless plane and a key, and gives the same value there whatever
the frame around it: a tile of a slide equals the crop of the whole. All lengths in this file are micrometres; stain
concentrations are without unit (1 is a fully stained structure).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Singles = NDArray[np.float32]
Integers = NDArray[np.int64]

# Optical density of haematoxylin and eosin in red, green, blue. Macenko et al., ISBI 2009, reference slide.
HAEMATOXYLIN = (0.5626, 0.7201, 0.4062)
EOSIN = (0.2159, 0.8012, 0.5581)

LYMPHOCYTE_SPACING = 7.0
SPINDLE_SPACING = 15.0
GHOST_SPACING = 10.5
DEBRIS_SPACING = 3.6
GLAND_NUCLEUS_SPACING = 4.3
# No nucleus reaches further than this from its centre: the margin of a frame.
REACH = 9.0


def stream(key: int, number: int) -> int:
    """Key of an independent random stream: ``number`` counts the uses of ``key``."""
    return (key * 0x9E3779B1 + (number + 1) * 0x7FEB352D) & 0xFFFFFFFF


def uniform(rows: Integers, columns: Integers, key: int) -> Singles:
    """Uniform numbers in [0,1) at integer positions: a hash, so no state and no order of calls.

    The finaliser of MurmurHash3 over the two coordinates and the key, upper 24 bits.
    """
    value = rows.astype(np.uint32) * np.uint32(0x9E3779B1)
    value = (value ^ (value >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    value = value + columns.astype(np.uint32) * np.uint32(0x85EBCA77) + np.uint32(key)
    value ^= value >> np.uint32(16)
    value *= np.uint32(0x85EBCA6B)
    value ^= value >> np.uint32(13)
    value *= np.uint32(0xC2B2AE35)
    value ^= value >> np.uint32(16)
    result: Singles = (value >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return result


def noise(rows: Floats, columns: Floats, wavelength: float, key: int) -> Singles:
    """Value noise in [0,1): random numbers on a lattice of ``wavelength``, smoothly interpolated.

    Args:
        rows: positions, any shape; (H,1) together with columns (1,W) takes a faster way to the same values.
        columns: positions that broadcast with ``rows``.
        wavelength: lattice step.
        key: random stream.
    """
    row, row_part = _lattice(rows, wavelength)
    column, column_part = _lattice(columns, wavelength)
    if row.size == 0 or column.size == 0:
        return np.zeros(np.broadcast_shapes(rows.shape, columns.shape), np.float32)
    top, left = int(row.min()), int(column.min())
    grid = uniform(
        np.arange(top, int(row.max()) + 2)[:, None], np.arange(left, int(column.max()) + 2)[None, :], stream(key, 0)
    )
    row -= top
    column -= left
    if rows.ndim == 2 and rows.shape[1] == 1 and columns.ndim == 2 and columns.shape[0] == 1:
        lines = grid[row[:, 0]] + (grid[row[:, 0] + 1] - grid[row[:, 0]]) * row_part
        start = lines[:, column[0]]
        result: Singles = start + (lines[:, column[0] + 1] - start) * column_part
        return result
    width = grid.shape[1]
    flat, place = grid.ravel(), row * width + column
    upper, lower = flat[place], flat[place + 1]
    first = upper + (flat[place + width] - upper) * row_part
    second = lower + (flat[place + width + 1] - lower) * row_part
    mixed: Singles = first + (second - first) * column_part
    return mixed


def _lattice(position: Floats, wavelength: float) -> tuple[Integers, Singles]:
    scaled = position * (1.0 / wavelength)
    whole = np.floor(scaled)
    part = (scaled - whole).astype(np.float32)
    return whole.astype(np.int64), part * part * (3 - 2 * part)


def step(value: Singles, low: float | Floats, high: float | Floats) -> Singles:
    """0 below ``low``, 1 above ``high``, linear between."""
    part: Singles = np.clip((value - low) / (high - low), 0, 1).astype(np.float32)
    return part


@dataclass(frozen=True)
class Stain:
    """How a laboratory stained and scanned: the same for all images of a patient.

    Beer-Lambert: ``rgb = light * exp(-(concentrations @ densities))``.

    Args:
        densities: (2,3) optical density of haematoxylin and eosin at concentration 1.
        light: (3,) grey value of the empty slide.
    """

    densities: NDArray[np.float64]
    light: NDArray[np.float64]

    @classmethod
    def random(cls, generator: np.random.Generator) -> Stain:
        """A stain with random strength and hue of both dyes."""
        directions = np.array([HAEMATOXYLIN, EOSIN]) + generator.normal(0, 0.045, (2, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        strength = np.exp(generator.uniform(-0.35, 0.35, (2, 1)))
        return cls(directions * strength, generator.uniform(234, 250) + generator.uniform(-4, 3, 3))

    def colour(self, haematoxylin: Singles, eosin: Singles, brightness: Singles) -> Singles:
        """(H,W,3) grey values of concentrations (H,W) under light of relative ``brightness`` (H,W)."""
        picture = np.empty((*haematoxylin.shape, 3), np.float32)
        densities = self.densities.astype(np.float32)
        for channel in range(3):
            density = haematoxylin * densities[0, channel] + eosin * densities[1, channel]
            picture[..., channel] = np.exp(-density) * brightness * np.float32(self.light[channel])
        return picture


@dataclass(frozen=True)
class Tones:
    """What varies from image to image within a class, so that mean colour says little about the class.

    Args:
        haematoxylin: (5,) concentration between the nuclei, by class.
        eosin: (5,) concentration between the nuclei, by class.
        dark: (5,) strength of the nuclei, by class.
        direction: main direction of the fibres in radians.
        size: scale of the gland nuclei.
        thickness: of the epithelium, um.
        density: share of lymphocyte places that are taken.
    """

    haematoxylin: NDArray[np.float32]
    eosin: NDArray[np.float32]
    dark: NDArray[np.float32]
    direction: float
    size: float
    thickness: float
    density: float

    @classmethod
    def random(cls, generator: np.random.Generator) -> Tones:
        """Tones of one image."""
        # rows: haematoxylin, eosin, strength of nuclei; columns: classes. Wide and overlapping on purpose.
        low = np.array([[0.16, 0.10, 0.10, 0.14, 0.0], [0.42, 0.48, 0.35, 0.42, 0.006], [0.8, 0.9, 0.8, 0.5, 0]])
        high = np.array([[0.62, 0.55, 0.40, 0.58, 0.012], [0.90, 1.05, 0.72, 0.95, 0.02], [1.3, 1.3, 1.3, 1.0, 0]])
        haematoxylin, eosin, dark = generator.uniform(low, high).astype(np.float32)
        return cls(
            haematoxylin,
            eosin,
            dark,
            float(generator.uniform(0, np.pi)),
            float(generator.uniform(0.85, 1.1)),
            float(generator.uniform(10.5, 13.5)),
            float(generator.uniform(0.62, 0.97)),
        )


@dataclass(frozen=True)
class Nuclei:
    """Ellipses: centres, half axes (long, short), direction of the long axis, haematoxylin at the core and the rim.

    All arrays are (N,); ``angle`` is in radians from the column axis towards the row axis.
    """

    rows: Floats
    columns: Floats
    long: Singles
    short: Singles
    angle: Singles
    core: Singles
    rim: Singles

    def select(self, chosen: NDArray[np.bool_]) -> Nuclei:
        """Those of a boolean choice (N,)."""
        return Nuclei(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Scatter:
    """Points of a jittered lattice inside a box: at most one a lattice cell, none overlapping by chance alone.

    Args:
        spacing: lattice step.
        key: random stream.
        box: (top, left, bottom, right).
        jitter: largest shift as a share of the lattice step.
    """

    spacing: float
    key: int
    box: tuple[float, float, float, float]
    jitter: float = 0.3

    def points(self) -> tuple[Floats, Floats]:
        """Rows and columns, (N,) each."""
        row, column = self._cells()
        offset = 0.5 * (row % 2)
        rows = (row + 0.5 + self.jitter * (2 * self.random(0) - 1)) * (self.spacing * 0.87)
        columns = (column + 0.5 + offset + self.jitter * (2 * self.random(1) - 1)) * self.spacing
        return rows.astype(np.float64), columns.astype(np.float64)

    def random(self, number: int, low: float = 0.0, high: float = 1.0) -> Singles:
        """(N,) uniform numbers of the points; ``number`` names the property (0 and 1 are the position)."""
        value = uniform(*self._cells(), stream(self.key, number))
        return np.float32(low) + np.float32(high - low) * value

    def _cells(self) -> tuple[Integers, Integers]:
        top, left, bottom, right = self.box
        rows = np.arange(int(top // (self.spacing * 0.87)) - 1, int(bottom // (self.spacing * 0.87)) + 2)
        columns = np.arange(int(left // self.spacing) - 2, int(right // self.spacing) + 2)
        row, column = np.meshgrid(rows, columns, indexing="ij")
        return row.ravel(), column.ravel()


def paint_nuclei(
    rows: Floats, columns: Floats, nuclei: Nuclei, uneven: Singles, um_per_px: float
) -> tuple[Singles, Singles]:
    """Haematoxylin and coverage of a set of ellipses; where they overlap the darker one shows.

    Args:
        rows: (H,1) positions of the frame.
        columns: (1,W) positions of the frame.
        nuclei: what to draw.
        uneven: (H,W) noise in [0,1) that makes outlines irregular.
        um_per_px: step of the frame.

    Returns:
        Two (H,W) maps: haematoxylin concentration, and coverage in [0,1].
    """
    height, width = rows.shape[0], columns.shape[1]
    dark = np.zeros(height * width, np.float32)
    cover = np.zeros(height * width, np.float32)
    if nuclei.rows.size:
        reach = int(np.ceil((float(nuclei.long.max()) * 1.15 + 0.8) / um_per_px))
        window = np.arange(-reach, reach + 1)
        row = np.rint((nuclei.rows - rows[0, 0]) / um_per_px).astype(np.int64)[:, None, None] + window[:, None]
        column = np.rint((nuclei.columns - columns[0, 0]) / um_per_px).astype(np.int64)[:, None, None] + window
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = np.broadcast_to(row * width + column, inside.shape)[inside]
        owner = np.broadcast_to(np.arange(nuclei.rows.size)[:, None, None], inside.shape)[inside]
        down = (rows.ravel()[place // width] - nuclei.rows[owner]).astype(np.float32)
        right = (columns.ravel()[place % width] - nuclei.columns[owner]).astype(np.float32)
        cosine, sine = np.cos(nuclei.angle)[owner], np.sin(nuclei.angle)[owner]
        short = nuclei.short[owner]
        distance = np.hypot(
            (right * cosine + down * sine) / nuclei.long[owner], (down * cosine - right * sine) / short
        ) * (0.86 + 0.28 * uneven.ravel()[place])
        covered = np.clip((1 - distance) * short / (0.9 * um_per_px + 0.25) + 0.5, 0, 1)
        core = nuclei.core[owner]
        value = covered * (core + (nuclei.rim[owner] - core) * np.minimum(distance, 1) ** 3)
        np.maximum.at(dark, place, value)
        np.maximum.at(cover, place, covered)
    return dark.reshape(height, width), cover.reshape(height, width)


@dataclass(frozen=True)
class GlandCells:
    """The plane cut into gland-sized cells: Voronoi cells of a jittered lattice, bent by noise.

    Args:
        spacing: mean diameter of a gland.
        key: random stream.
    """

    spacing: float
    key: int

    def centre(self, row: Integers, column: Integers) -> tuple[Floats, Floats]:
        """Centres of lattice cells, in the bent plane."""
        down = row + 0.5 + 0.29 * (2 * uniform(row, column, stream(self.key, 0)) - 1)
        right = column + 0.5 + 0.5 * (row % 2) + 0.29 * (2 * uniform(row, column, stream(self.key, 1)) - 1)
        return down * self.spacing, right * self.spacing

    def bend(self, rows: Floats, columns: Floats) -> tuple[Floats, Floats]:
        """Positions in the bent plane."""
        down = noise(rows, columns, 0.55 * self.spacing, stream(self.key, 2)) - np.float32(0.5)
        right = noise(rows, columns, 0.55 * self.spacing, stream(self.key, 3)) - np.float32(0.5)
        return rows + 0.34 * self.spacing * down, columns + 0.34 * self.spacing * right

    def unbend(self, rows: Floats, columns: Floats) -> tuple[Floats, Floats]:
        """Inverse of ``bend`` by fixed-point iteration."""
        straight_rows, straight_columns = rows, columns
        for _ in range(4):
            bent_rows, bent_columns = self.bend(straight_rows, straight_columns)
            straight_rows = straight_rows + rows - bent_rows
            straight_columns = straight_columns + columns - bent_columns
        return straight_rows, straight_columns

    def nearest(self, rows: Floats, columns: Floats) -> tuple[Integers, Integers]:
        """Lattice row and column of the cell that owns each position of the bent plane."""
        base_row = np.floor(rows / self.spacing).astype(np.int64)
        base_column = np.floor(columns / self.spacing).astype(np.int64)
        downs, rights, top, left = self._table(base_row, base_column, 1)
        width = downs.shape[1]
        base = (base_row - top) * width + (base_column - left)
        best, owner = np.full(rows.shape, np.inf, np.float32), base.copy()
        for shift in [row * width + column for row in (-1, 0, 1) for column in (-1, 0, 1)]:
            place = base + shift
            down, right = downs.ravel()[place] - rows, rights.ravel()[place] - columns
            distance = (down * down + right * right).astype(np.float32)
            closer = distance < best
            best[closer] = distance[closer]
            owner[closer] = place[closer]
        return owner // width + top, owner % width + left

    def depth(self, rows: Floats, columns: Floats, row: Integers, column: Integers) -> Singles:
        """Distance from the border of the own cell, corners rounded: a soft minimum over the eight neighbours.

        ``-k log sum exp(-d/k)`` with k = spacing / 22 and d the distances from the bisectors.
        """
        softness = np.float32(self.spacing / 22)
        downs, rights, top, left = self._table(row, column, 1)
        width = downs.shape[1]
        base = (row - top) * width + (column - left)
        own_down, own_right = downs.ravel()[base], rights.ravel()[base]
        away_down, away_right = (rows - own_down).astype(np.float32), (columns - own_right).astype(np.float32)
        total = np.zeros(away_down.shape, np.float32)
        for shift in [i * width + j for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]:
            down = (downs.ravel()[base + shift] - own_down).astype(np.float32)
            right = (rights.ravel()[base + shift] - own_right).astype(np.float32)
            length = np.hypot(down, right)
            border = length / 2 - (away_down * down + away_right * right) / length
            total += np.exp(-border / softness)
        result: Singles = -softness * np.log(total)
        return result

    def nuclei(self, row: Integers, column: Integers, size: float, dark: float) -> Nuclei:
        """Nuclei of the epithelial ring of the cells (N,): near the border, long axis across it."""
        count = int(np.pi * (self.spacing - 5) / GLAND_NUCLEUS_SPACING)
        number = np.arange(count)
        row, column = np.repeat(row, count), np.repeat(column, count)
        which = np.tile(number, row.size // count) + 1000 * column

        def random(name: int, low: float, high: float) -> Singles:
            return np.float32(low) + np.float32(high - low) * uniform(row, which, stream(self.key, 10 + name))

        turn = 2 * np.pi * (np.tile(number, row.size // count) + random(0, -0.3, 0.3)) / count
        down, right = np.sin(turn), np.cos(turn)
        centre_row, centre_column = self.centre(row, column)
        wanted = random(1, 4.2, 7.4)
        travelled = np.full(row.shape, 0.2 * self.spacing)
        for _ in range(7):
            place = centre_row + travelled * down, centre_column + travelled * right
            travelled = np.maximum(travelled + self.depth(*place, row, column) - wanted, 0)
        rows, columns = self.unbend(centre_row + travelled * down, centre_column + travelled * right)
        core = random(2, 0.75, 1.15) * np.float32(dark)
        return Nuclei(
            rows,
            columns,
            random(3, 3.0, 4.4) * np.float32(size),
            random(4, 1.7, 2.4) * np.float32(size),
            (turn + random(5, -0.35, 0.35)).astype(np.float32),
            core,
            core * np.float32(1.25),
        ).select(random(6, 0, 1) < 0.95)

    def _table(self, row: Integers, column: Integers, border: int) -> tuple[Floats, Floats, int, int]:
        top, left = int(row.min()) - border, int(column.min()) - border
        rows = np.arange(top, int(row.max()) + border + 1)[:, None]
        columns = np.arange(left, int(column.max()) + border + 1)[None, :]
        return (*self.centre(rows, columns), top, left)
