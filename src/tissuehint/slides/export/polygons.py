"""From a class map to the outlines of its regions: valid polygons that fit together, made block by block.

A region is what hangs together over the sides of pixels (4-connected). A block of the map is cut into the polygons of
its regions, background included, so that they cover it. Where three or four of them meet, each gets a vertex: then
the outline between two polygons is the same line in both, and simplifying it keeps them fitted together. The frame of
a block is left as it is, and so the pieces of a region in neighbouring blocks fit as well. All vertices are corners of
pixels, whole numbers: areas are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import features

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE, LabelSpace
from tissuehint.slides.ahead import ahead
from tissuehint.slides.export.class_map import ClassMap, windows
from tissuehint.slides.memory import PacedRelease

BLOCK = 2048  # map px
THREADS = 2  # more wait for each other, and each holds a block
TOLERANCE = 1.5  # map px; takes most steps out of slanted outlines, and 0.2 % of the pixels change class
MIN_AREA = 16.0  # map px; at 1 um/px less than a cell
OUTSIDE = IGNORE - 1  # of a block; no class
CODE, NOTHING = 256, -1  # a piece and its class in one number: CODE * piece + class

Geometries = NDArray[Any]  # of shapely objects


class TissuePolygon(NamedTuple):
    """A region of one class.

    Args:
        geometry: x = column, y = row of the map, in px from the upper left corner of pixel (0, 0).
        label: class index.
    """

    geometry: shapely.Polygon
    label: int


def tissue_polygons(
    classes: ClassMap,
    labels: LabelSpace,
    *,
    tolerance: float = TOLERANCE,
    min_area: float = MIN_AREA,
    block: int = BLOCK,
) -> Iterator[TissuePolygon]:
    """Polygons of the 4-connected regions of the tissue classes, as they are finished.

    A region is given as soon as the last block that it reaches is done; memory holds a few blocks, and the regions that
    reach from the blocks done into those to come. White and unmapped pixels have no polygons. With ``tolerance`` and
    ``min_area`` 0, painting the polygons gives the map back, whatever the size of the blocks.

    Args:
        classes: (H,W) uint8 class indices.
        labels: the classes.
        tolerance: outlines lose details of about this size, in map px (Visvalingam-Whyatt: a vertex goes where the
            triangle with its neighbours has an area below ``tolerance**2``); 0 keeps every corner.
        min_area: polygons and holes with an area below it (map px, after simplification) are left out: a speck inside
            another region becomes part of that, one between regions leaves a gap. 0 keeps all.
        block: largest side of a block in map px.

    Yields:
        Valid polygons that do not overlap, in an order that the map and the blocks alone decide.

    Raises:
        InputError: ``tolerance`` or ``min_area`` is negative or infinite, or ``block`` below 1.
    """
    for name, value, least in (("tolerance", tolerance, 0), ("min_area", min_area, 0), ("block", block, 1)):
        if not least <= value < float("inf"):
            raise InputError(f"{name} {value}", f"is not a number from {least} up", "give pixels of the map")
    return _polygons(classes, labels, tolerance, min_area, block)


def _polygons(
    classes: ClassMap, labels: LabelSpace, tolerance: float, min_area: float, block: int
) -> Iterator[TissuePolygon]:
    height, width = classes.shape
    joints, release = _Joints(width, min_area), PacedRelease()

    def cut_block(place: tuple[slice, slice]) -> _Cut:
        values = np.asarray(classes[place])
        values = np.where(values < labels.num_tissue, values, np.uint8(IGNORE))
        return _cut(values, (place[0].start, place[1].start), tolerance, min_area)

    with ThreadPoolExecutor(THREADS) as pool:
        for (rows, columns), cut in ahead(pool, windows(classes, block), cut_block, THREADS):
            inside = _Sides(rows.start > 0, columns.start > 0, rows.stop < height, columns.stop < width)
            tissue = cut.labels < labels.num_tissue
            crossing = tissue & cut.reaching(inside)
            large = shapely.area(cut.polygons) >= min_area
            for index in np.flatnonzero(tissue & ~crossing & large):
                yield TissuePolygon(cut.polygons[index], int(cut.labels[index]))
            joints.add(cut, crossing, columns, inside)
            yield from joints.finished()
            release()


class _Sides(NamedTuple):
    """Something for each side of a block."""

    top: bool
    left: bool
    bottom: bool
    right: bool


class _Cut(NamedTuple):
    """A block in pieces, from 0: those along its top, left, bottom and right; polygon and class of each piece."""

    frame: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    polygons: Geometries
    labels: NDArray[np.uint8]

    def reaching(self, sides: _Sides) -> NDArray[np.bool_]:
        """(pieces,) whether each has a pixel in the outermost row or column of one of these sides."""
        reached = np.zeros(len(self.labels), bool)
        for line in itertools.compress(self.frame, sides):
            reached[line] = True
        return reached


def _cut(values: NDArray[np.uint8], corner: tuple[int, int], tolerance: float, min_area: float) -> _Cut:
    """Polygons of the regions of a block, at their place on the map, simplified inside, without small holes."""
    (top, left), (height, width) = corner, values.shape
    if (values == values[0, 0]).all():  # most blocks of a slide are empty
        frame = shapely.box(left, top, left + width, top + height)
        across, down = np.zeros(width, np.int64), np.zeros(height, np.int64)
        return _Cut((across, down, across, down), np.array([frame]), values[:1, 0])
    # the background is cut too, so that its outline is one between two polygons
    found = list(features.shapes(values, connectivity=4))
    outlines = [shape["coordinates"] for shape, _ in found]
    rings = list(itertools.chain.from_iterable(outlines))
    points = np.array(list(itertools.chain.from_iterable(rings)), np.float64)
    ends, parts = _offsets(rings), _offsets(outlines)
    # pieces in the order of their first pixels, whose upper left corners are vertices
    first = np.minimum.reduceat(points[:, 1] * (width + 1) + points[:, 0], ends[parts[:-1]])
    order = np.argsort(first)
    rank = np.argsort(order)
    frame = _frame(points, ends, rank[np.repeat(np.arange(len(parts) - 1), np.diff(parts))], values.shape)
    points, ends = _with_junctions(points, ends, values)
    points += left, top
    exact = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, (ends, parts))[order]
    labels = np.array([value for _, value in found], np.uint8)[order]
    return _Cut(frame, _without_small_holes(_simplified(exact, tolerance), min_area), labels)


def _frame(
    points: NDArray[np.float64], ends: NDArray[np.int64], pieces: NDArray[np.int64], shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Piece of each pixel along the top, left, bottom and right of a block.

    Args:
        points: (P,2) x, y of the corners of all rings; the last one of a ring is its first.
        ends: (R+1,) where each ring begins, and the end of the last.
        pieces: (R,) piece of each ring.
        shape: (height, width) of the block.
    """
    piece = np.repeat(pieces, np.diff(ends))[:-1]
    start, end = points[:-1].astype(np.int64), points[1:].astype(np.int64)
    within = np.ones(len(start), bool)
    within[ends[1:-1] - 1] = False
    # the outlines that run along a side cover it once
    lines = []
    for axis, place in ((1, 0), (0, 0), (1, shape[0]), (0, shape[1])):
        along = within & (start[:, axis] == place) & (end[:, axis] == place)
        one, other = start[along, 1 - axis], end[along, 1 - axis]
        order = np.argsort(np.minimum(one, other))
        lines.append(np.repeat(piece[along][order], np.abs(one - other)[order]))
    return lines[0], lines[1], lines[2], lines[3]


def _offsets(parts: list[Any]) -> NDArray[np.int64]:
    """Where each part begins when they are laid end to end, and the end of the last one."""
    return np.cumsum([0, *map(len, parts)])


def _with_junctions(
    points: NDArray[np.float64], ends: NDArray[np.int64], values: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Add a vertex to an outline wherever it goes straight on past a corner where three or four regions meet.

    Args:
        points: (P,2) x, y of the corners of all rings; the last one of a ring is its first.
        ends: (R+1,) where each ring begins, and the end of the last.
        values: (h,w) class of each pixel; neighbours of the same class are in the same region.

    Returns:
        ``points`` and ``ends`` with the added vertices.
    """
    padded = np.pad(values, 1, constant_values=OUTSIDE)
    across, down = padded[:, 1:] != padded[:, :-1], padded[1:] != padded[:-1]
    meeting = across[1:].astype(np.uint8) + across[:-1] + down[:, 1:] + down[:, :-1] >= 3
    corners = points.astype(np.int32)
    sides = np.roll(corners, -1, axis=0) - corners
    sides[ends[1:] - 1] = 0
    # walk along every side pixel by pixel, and keep its first corner and the junctions
    lengths = np.maximum(np.abs(sides).sum(1), 1)
    starts = np.append(0, np.cumsum(lengths))
    walked = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    steps = np.repeat(corners, lengths, axis=0) + walked[:, None] * np.repeat(np.sign(sides), lengths, axis=0)
    kept = (walked == 0) | meeting[steps[:, 1], steps[:, 0]]
    return steps[kept].astype(np.float64), np.append(0, np.cumsum(kept))[starts[ends]]


def _simplified(polygons: Geometries, tolerance: float) -> Geometries:
    """Polygons that cover a block, with simpler outlines between them; the frame of the block stays."""
    if not tolerance:
        return polygons
    simple: Geometries = shapely.coverage_simplify(polygons, tolerance, simplify_boundary=False)
    # what a version of GEOS gets wrong may cost vertices, not the validity of the file
    return simple if shapely.is_valid(simple).all() else polygons


def _without_small_holes(polygons: Geometries, min_area: float) -> Geometries:
    """Fill the holes with an area below ``min_area``."""
    if not min_area:
        return polygons
    filled = polygons.copy()
    for index in np.flatnonzero(shapely.get_num_interior_rings(polygons)):
        shell, *holes = shapely.get_rings(polygons[index])
        large = shapely.area(shapely.polygons(holes)) >= min_area
        if not large.all():
            filled[index] = shapely.Polygon(shell, list(itertools.compress(holes, large)))
    return filled


class _Joints:
    """The regions that reach from the blocks done into those to come: a forest of their pieces.

    A piece is known by its code, ``CODE * number + class``.

    Args:
        width: columns of the map.
        min_area: holes and regions with an area below it are left out.
    """

    def __init__(self, width: int, min_area: float) -> None:
        self._min_area = min_area
        self._parents: dict[int, int] = {}
        self._regions: dict[int, list[tuple[int, bytes]]] = {}  # codes and WKB of the pieces, by the least code
        self._next = 0
        # codes of the pixels above and to the left of what comes, where these are still to be joined
        self._above = np.full(width, NOTHING, np.int64)
        self._beside = self._above[:0]

    def add(self, cut: _Cut, crossing: NDArray[np.bool_], columns: slice, inside: _Sides) -> None:
        """Join the crossing pieces of the next block to those above and to the left of it.

        Args:
            cut: the block.
            crossing: (pieces,) tissue that reaches other blocks.
            columns: columns of the block.
            inside: the sides that it shares with other blocks.
        """
        codes = CODE * np.arange(self._next, self._next + len(crossing)) + cut.labels
        codes[~crossing] = NOTHING
        self._next += len(crossing)
        for code, piece in zip(codes[crossing].tolist(), shapely.to_wkb(cut.polygons[crossing]), strict=True):
            self._parents[code] = code
            self._regions[code] = [(code, piece)]
        if inside.top:
            self._join(self._above[columns], codes[cut.frame[0]])
        if inside.left:
            self._join(self._beside, codes[cut.frame[1]])
        self._above[columns] = codes[cut.frame[2]] if inside.bottom else NOTHING
        self._beside = codes[cut.frame[3]] if inside.right else self._beside[:0]

    def finished(self) -> Iterator[TissuePolygon]:
        """Whole regions that no block to come can reach, in the order in which they began; they are forgotten."""
        waiting = set(map(self._root, np.union1d(self._above, self._beside).tolist()))
        for root in sorted(self._regions.keys() - waiting):
            region = self._regions.pop(root)
            for code, _ in region:
                del self._parents[code]
            pieces = shapely.from_wkb([piece for _, piece in region])
            del region  # of a region all over the slide this is much
            polygon = _joined(pieces, self._min_area)
            if polygon.area >= self._min_area:
                yield TissuePolygon(polygon, root % CODE)

    def _join(self, codes: NDArray[np.int64], others: NDArray[np.int64]) -> None:
        """Make one region of two that lie side by side and have the same class."""
        touching = (codes != NOTHING) & (others != NOTHING) & (codes % CODE == others % CODE)
        for code, other in np.unique(np.stack([codes, others], 1)[touching], axis=0).tolist():
            first, second = sorted((self._root(code), self._root(other)))
            if first != second:
                self._parents[second] = first
                short, long = sorted((self._regions[first], self._regions.pop(second)), key=len)
                long += short
                self._regions[first] = long

    def _root(self, code: int) -> int:
        """Least code of the region."""
        root = code
        while self._parents.get(root, root) != root:
            root = self._parents[root]
        while code != root:
            self._parents[code], code = root, self._parents[code]
        return root


def _joined(pieces: Geometries, min_area: float) -> shapely.Polygon:
    """One polygon of pieces that lie side by side in several blocks.

    A hole of a piece does not reach the frame of its block, and so is one of the whole; only shells are joined.
    """
    if len(pieces) == 1:
        return pieces[0]
    whole = shapely.union_all(shapely.polygons(shapely.get_exterior_ring(pieces)))
    (whole,) = _without_small_holes(np.array([whole]), min_area)
    shell, *holes = shapely.get_rings(whole)
    for piece in pieces[shapely.get_num_interior_rings(pieces) > 0]:
        holes += list(shapely.get_rings(piece)[1:])
    return shapely.Polygon(shell, holes)
