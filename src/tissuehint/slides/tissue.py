"""Where there is tissue on a slide: a classical mask on a coarse grid, editable as GeoJSON.

Stained tissue absorbs colours unequally, glass, dust, frames and grey noise do not. So the measure is the spread of
the optical density over red, green and blue, ``max - min`` of ``-log10(value / light)``: 0 for grey of any brightness,
about 0.005 for glass, 0.03 for pale and 0.1 to 0.4 for usual stains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field
from rasterio.features import rasterize, shapes
from scipy import ndimage
from skimage.filters import threshold_otsu

from tissuehint.data.qupath import class_name, read_features
from tissuehint.errors import InputError
from tissuehint.files import write_text
from tissuehint.slides.coordinates import Box, Origin, Placement
from tissuehint.slides.reader import Slide

Bool = NDArray[np.bool_]

CLASS_NAME = "Tissue"
OUTLINE = (0, 158, 60)
#: Rows of the grid that are read at a time: memory stays that of the mask.
STRIP = 256
#: Longest side of the picture from which the light is estimated.
LIGHT_SIDE = 512
#: Without glass on the slide, the light is this grey value.
DEFAULT_LIGHT = 245.0
EXPORT = "export tissue annotations from QuPath as GeoJSON"


class TissueConfig(BaseModel):
    """How tissue is found. Densities are optical densities, decadic, relative to the light of the slide.

    Args:
        um_per_px: pixel size of the grid in micrometres.
        longest: the grid is made coarser where its longest side would have more pixels than this.
        threshold: spread of the density over the colours from which a pixel is tissue; None finds it by Otsu's method
            and keeps it within ``floor`` and ``ceiling``, so that a slide of glass or of tissue alone is not split.
        floor: lowest threshold that Otsu's method may choose.
        ceiling: highest.
        dark: grey value; where no colour is brighter there is a frame, a fold of the label or black ink.
        ink: how much denser red may be than green; more is blue or green pen. None for stains that look like that
            (Alcian blue, say).
        closing_um: gaps up to twice this wide are closed, in micrometres.
        hole_um2: holes smaller than this are filled, in square micrometres.
        min_area_um2: pieces smaller than this are left out, in square micrometres.
        margin_um: the mask is grown by this, in micrometres.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    um_per_px: float = Field(default=8.0, gt=0, le=100)
    longest: int = Field(default=2048, ge=16)
    threshold: float | None = Field(default=None, gt=0)
    floor: float = Field(default=0.02, gt=0)
    ceiling: float = Field(default=0.06, gt=0)
    dark: int = Field(default=50, ge=0, le=255)
    ink: float | None = Field(default=0.05, gt=0)
    closing_um: float = Field(default=24.0, ge=0)
    hole_um2: float = Field(default=200_000.0, ge=0)
    min_area_um2: float = Field(default=20_000.0, ge=0)
    margin_um: float = Field(default=16.0, ge=0)


@dataclass(frozen=True, eq=False)
class Tissue:
    """Tissue of a slide.

    Args:
        mask: (H,W), true where there is tissue.
        placement: how its pixels lie on the slide.
        bounds: what was scanned, in level-0 pixels; GeoJSON may measure from its corner.
    """

    mask: Bool
    placement: Placement
    bounds: Box
    _sums: NDArray[np.uint32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        height, width = self.mask.shape
        sums = np.zeros((height + 1, width + 1), np.uint32)
        np.cumsum(self.mask, 0, out=sums[1:, 1:])
        np.cumsum(sums[1:, 1:], 1, out=sums[1:, 1:])
        object.__setattr__(self, "_sums", sums)

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in square millimetres."""
        return float(self._sums[-1, -1]) * self.placement.um_per_px**2 / 1e6

    def share(self, box: Box) -> float:
        """Share of a box (level-0 pixels) that is tissue, by area; outside the mask there is none."""
        return float(self.shares(box.top, box.left, box.height, box.width))

    def shares(self, tops: ArrayLike, lefts: ArrayLike, heights: ArrayLike, widths: ArrayLike) -> NDArray[np.float64]:
        """As ``share``, for many boxes at once: four arrays that broadcast with each other, level-0 pixels."""
        top, left = (np.asarray(values, np.float64) for values in (tops, lefts))
        bottom, right = top + np.asarray(heights), left + np.asarray(widths)
        (first, before), (last, behind) = self.placement.to_map(top, left), self.placement.to_map(bottom, right)
        covered = (
            self._sum(last, behind) - self._sum(first, behind) - self._sum(last, before) + self._sum(first, before)
        )
        # differences of large sums leave 1e-9 or so where there is nothing, or everything
        return np.asarray(np.round(covered / ((last - first) * (behind - before)), 7))

    def _sum(self, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tissue above and left of positions of the map: bilinear between the corners of pixels, which is exact."""
        rows, columns = np.clip(rows, 0, self.mask.shape[0]), np.clip(columns, 0, self.mask.shape[1])
        row = np.minimum(rows.astype(np.int64), self.mask.shape[0] - 1)
        column = np.minimum(columns.astype(np.int64), self.mask.shape[1] - 1)
        down, right = rows - row, columns - column
        sums = self._sums
        upper = sums[row, column] * (1 - right) + sums[row, column + 1] * right
        lower = sums[row + 1, column] * (1 - right) + sums[row + 1, column + 1] * right
        return np.asarray(upper * (1 - down) + lower * down)

    def at(self, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether the places with these level-0 rows (h,) and columns (w,) are tissue, (h,w); outside the mask none."""
        (lines, places), (height, width) = self.placement.to_map(rows, columns), self.mask.shape
        line, place = np.floor(lines).astype(np.int64), np.floor(places).astype(np.int64)
        inside = ((line >= 0) & (line < height))[:, None] & ((place >= 0) & (place < width))[None, :]
        found: NDArray[np.bool_] = self.mask[line.clip(0, height - 1)[:, None], place.clip(0, width - 1)[None, :]]
        return np.asarray(found & inside)

    def picture(self, slide: Slide, longest: int = 2048) -> NDArray[np.uint8]:
        """The slide with the outline of the tissue, for checking: (H,W,3) uint8, longest side at most ``longest``."""
        height, width = self.mask.shape
        share = min(longest / max(height, width), 1.0)
        size = max(round(height * share), 1), max(round(width * share), 1)
        picture = slide.resample(self.placement.box(0, 0, height, width), *size).copy()
        rows = np.minimum(((np.arange(size[0]) + 0.5) * height / size[0]).astype(int), height - 1)
        columns = np.minimum(((np.arange(size[1]) + 0.5) * width / size[1]).astype(int), width - 1)
        mask = self.mask[rows][:, columns]
        thick = max(round(max(size) / 500), 1)
        picture[mask & ~ndimage.binary_erosion(mask, iterations=thick)] = OUTLINE
        return picture

    def to_geojson(self, path: Path, origin: Origin = "slide") -> None:
        """Write the outline for QuPath, atomically: one annotation of class Tissue for each connected piece.

        Args:
            path: file to write.
            origin: from where x (right) and y (down) are measured, in level-0 pixels.
        """
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": CLASS_NAME, "color": list(OUTLINE)},
                },
            }
            for rings in self._polygons(origin)
        ]
        write_text(path, json.dumps({"type": "FeatureCollection", "features": features}) + "\n")

    def _polygons(self, origin: Origin) -> Iterator[list[list[list[float]]]]:
        """Rings of each 4-connected piece: outline first, then holes; points are [x, y]."""
        top, left = (self.bounds.top, self.bounds.left) if origin == "bounds" else (0.0, 0.0)
        for geometry, _ in shapes(self.mask.astype(np.uint8), mask=self.mask, connectivity=4):
            rings = []
            for ring in geometry["coordinates"]:
                columns, rows = np.asarray(ring, np.float64).T
                down, right = self.placement.to_slide(rows, columns)
                rings.append(np.stack([right - left, down - top], 1).round(3).tolist())
            yield rings

    @classmethod
    def from_geojson(
        cls, path: Path, slide: Slide, config: TissueConfig | None = None, origin: Origin = "slide"
    ) -> Tissue:
        """Read what ``to_geojson`` wrote, or QuPath after editing it.

        A pixel of the grid is tissue if its centre lies in a polygon. Polygons and multipolygons of class Tissue and
        those without a class count, everything else is skipped.

        Args:
            path: GeoJSON, a FeatureCollection, a list of features or one feature.
            slide: the slide.
            config: gives the grid; None takes the defaults.
            origin: from where the file measures.

        Raises:
            InputError: no file, no GeoJSON, no such polygon, coordinates that are no points, polygons that all lie
                outside the slide, a slide without microns per pixel.
        """
        placement, shape = _grid(slide, config or TissueConfig())
        top, left = slide.corner(origin)
        polygons = []
        for name, rings in _read_polygons(Path(path)):
            placed = []
            for ring in rings:
                points = _points(path, name, ring)
                rows, columns = placement.to_map(points[:, 1] + top, points[:, 0] + left)
                placed.append(np.stack([columns, rows], 1).tolist())
            polygons.append({"type": "Polygon", "coordinates": placed})
        mask = rasterize(polygons, out_shape=shape, fill=0, default_value=1, dtype=np.uint8).astype(bool)
        if not mask.any():
            rule = f"has {len(polygons)} polygons, all beside the slide of {slide.shape[0]} x {slide.shape[1]} pixels"
            raise InputError(path, rule, "export it from the same slide, in pixels of its full size")
        return cls(mask, placement, slide.bounds)


def find_tissue(slide: Slide, config: TissueConfig | None = None) -> Tissue:
    """The tissue of a slide, within its bounds.

    Args:
        slide: the slide.
        config: thresholds; None takes the defaults.

    Returns:
        A mask, empty if there is no tissue.

    Raises:
        InputError: a slide without microns per pixel, or one that is damaged.
    """
    config = config or TissueConfig()
    placement, shape = _grid(slide, config)
    spread, other = _measure(slide, placement, shape, config)
    mask = spread > _threshold(spread[~other], config)
    pixel = placement.um_per_px**2
    mask = _without_small(mask, config.min_area_um2 / pixel / 4)
    mask = _closed(mask, config.closing_um / placement.um_per_px)
    mask |= _holes(mask, config.hole_um2 / pixel)
    mask = _without_small(mask & ~_without_small(other, config.min_area_um2 / pixel), config.min_area_um2 / pixel)
    return Tissue(_grown(mask, config.margin_um / placement.um_per_px), placement, slide.bounds)


def _grid(slide: Slide, config: TissueConfig) -> tuple[Placement, tuple[int, int]]:
    """A grid over the bounds of the slide."""
    bounds = slide.bounds
    scale = max(config.um_per_px / slide.um_per_px, max(bounds.height, bounds.width) / config.longest)
    shape = math.ceil(bounds.height / scale - 1e-9), math.ceil(bounds.width / scale - 1e-9)
    return Placement(scale * slide.um_per_px, scale, bounds.top, bounds.left), shape


def _measure(
    slide: Slide, placement: Placement, shape: tuple[int, int], config: TissueConfig
) -> tuple[NDArray[np.float32], Bool]:
    """Spread of the density over the colours (H,W), smoothed, and where it says nothing: frames and ink."""
    spread, other = np.empty(shape, np.float32), np.empty(shape, bool)
    light = _light(slide)
    for top in range(0, shape[0], STRIP):
        rows = slice(top, min(top + STRIP, shape[0]))
        box = placement.box(top, 0, rows.stop - top, shape[1])
        pixels = slide.resample(box, rows.stop - top, shape[1])
        density = np.log10((light + 1) / (pixels + np.float32(1))).clip(0)
        spread[rows] = density.max(2) - density.min(2)
        other[rows] = pixels.max(2) < config.dark
        if config.ink is not None:
            other[rows] |= density[..., 0] - density[..., 1] > config.ink
    # frames have no colour, but in the dark a grey value more or less looks like one
    spread[other] = 0
    return np.asarray(ndimage.gaussian_filter(spread, 1.0), np.float32), other


def _light(slide: Slide) -> NDArray[np.float32]:
    """Grey values (3,) of empty glass: the median of bright and almost grey places."""
    bounds = slide.bounds
    share = min(LIGHT_SIDE / max(bounds.height, bounds.width), 1.0)
    pixels = slide.resample(bounds, max(round(bounds.height * share), 1), max(round(bounds.width * share), 1))
    pixels = pixels.reshape(-1, 3)
    darkest, brightest = pixels.min(1), pixels.max(1)
    # pure white is what lies outside the scan
    glass = (darkest >= 200) & (brightest - darkest <= 20) & (darkest < 255)
    if glass.mean() < 0.01:
        return np.full(3, DEFAULT_LIGHT, np.float32)
    return np.asarray(np.median(pixels[glass], 0), np.float32)


def _threshold(spread: NDArray[np.float32], config: TissueConfig) -> float:
    if config.threshold is not None:
        return config.threshold
    if spread.size == 0 or spread.min() == spread.max():
        return config.floor
    found: float = threshold_otsu(spread)  # type: ignore[no-untyped-call]
    return float(np.clip(found, config.floor, max(config.floor, config.ceiling)))


def _without_small(mask: Bool, pixels: float) -> Bool:
    """Without 4-connected pieces of fewer than ``pixels``."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= pixels
    large[0] = False
    kept: Bool = large[labels]
    return kept


def _holes(mask: Bool, pixels: float) -> Bool:
    """Holes of fewer than ``pixels``; what reaches the border is no hole."""
    labels, _ = ndimage.label(~mask)
    small = np.bincount(labels.ravel()) < pixels
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[border] = False
    small[0] = False
    holes: Bool = small[labels]
    return holes


def _closed(mask: Bool, radius: float) -> Bool:
    """Closing with a disk; the border counts as what lies at it."""
    reach = round(radius)
    if reach < 1:
        return mask
    padded = np.pad(mask, reach, mode="edge")
    closed: Bool = ndimage.binary_closing(padded, _disk(reach))[reach:-reach, reach:-reach]
    return closed


def _disk(radius: int) -> Bool:
    steps = np.arange(-radius, radius + 1)
    inside: Bool = np.hypot(steps[:, None], steps[None, :]) <= radius
    return inside


def _grown(mask: Bool, radius: float) -> Bool:
    reach = round(radius)
    if reach < 1:
        return mask
    grown: Bool = ndimage.binary_dilation(mask, _disk(reach))
    return grown


def _read_polygons(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Name and rings of each polygon that stands for tissue.

    Raises:
        InputError: no file, no GeoJSON, no polygon.
    """
    features = read_features(path)
    found, others = 0, 0
    for number, feature in enumerate(features, 1):
        geometry = feature.get("geometry")
        if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
            continue
        if class_name(feature) not in (None, CLASS_NAME):
            others += 1
            continue
        kind, coordinates = geometry["type"], geometry.get("coordinates")
        for rings in [coordinates] if kind == "Polygon" else coordinates or [None]:
            if not isinstance(rings, list) or not rings:
                raise InputError(f"{path}, feature {number}", f"is a {kind} without coordinates", EXPORT)
            found += 1
            yield f"feature {number}", rings
    if not found:
        rule = f"has no polygon of class {CLASS_NAME} or without class ({others} of other classes)"
        raise InputError(path, rule, f"draw tissue and set its class to {CLASS_NAME}")


def _points(path: Path, name: str, ring: Any) -> NDArray[np.float64]:
    """(N,2) x and y of a ring."""
    try:
        points = np.asarray([point[:2] for point in ring], np.float64)
    except (TypeError, ValueError):
        points = np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1:] != (2,) or len(points) < 4 or not np.isfinite(points).all():
        rule = f"has the ring {json.dumps(ring)[:60]}, rings are four or more points [x, y], the last as the first"
        raise InputError(f"{path}, {name}", rule, EXPORT)
    return points
