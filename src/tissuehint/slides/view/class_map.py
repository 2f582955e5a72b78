"""Class maps of a slide, read tile by tile from ``classes.ome.tif``."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Collection as Group
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.slides.view.cache import Cache
from tissuehint.slides.view.pyramid import Tile
from tissuehint.slides.view.record import Geometry

KEPT = 64 * 2**20  # bytes of decoded tiles that are kept of a map
SMALLEST_LEVEL = 64  # px; how often a smaller level was halved cannot be told from its size
LARGEST_SEGMENT = 2**26  # px, of a tile of the file


@dataclass(frozen=True)
class Level:
    """A page of the pyramid; a pixel of it stands for ``factor`` x ``factor`` pixels of the map."""

    page: Any
    factor: int


class ClassMap:
    """The class map of a slide, opened; threads may share it.

    Only the first page and its sub-images are read: the OME description could name other files.

    Args:
        path: of ``classes.ome.tif``.
        geometry: of the slide.

    Raises:
        InputError: a file that is no class map of this slide.
    """

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self.path, self.geometry = path, geometry
        self._tiff = open_tiff(path)
        weakref.finalize(self, self._tiff.close)
        self._lock = threading.Lock()
        self._segments: Cache[NDArray[np.uint8]] = Cache(KEPT, lambda segment: segment.nbytes)
        self.levels = self._levels()

    def tile(self, tile: Tile) -> NDArray[np.uint8]:
        """(rows, columns) uint8: the class under the centre of each pixel of a tile, ignore beside the map.

        Where a pixel of the tile is coarser than the map, the class is that of the pyramid's next finer level.
        """
        placement = self.geometry.placement
        rows, columns = placement.to_map(*tile.centres())
        fit = [level for level in self.levels if level.factor * placement.scale <= tile.step * 1.0001]
        return self._sample((fit or self.levels[:1])[-1], rows, columns)

    def at(self, row: float, column: float) -> int:
        """The class at a level-0 position, ignore beside the map."""
        above, beside = self.geometry.placement.to_map(row, column)
        return int(self._sample(self.levels[0], np.array([above]), np.array([beside]))[0, 0])

    def _levels(self) -> list[Level]:
        first = self._tiff.pages[0]
        levels, factor, longest = [Level(first, 1)], 1, max(first.shape[:2])
        self._check(first)
        if first.shape != (self.geometry.map_height, self.geometry.map_width):
            size = f"{self.geometry.map_height} x {self.geometry.map_width}"
            raise InputError(self.path, f"is {first.shape}, slide.json says {size}", "predict this slide again")
        for page in first.pages or ():
            if max(page.shape[:2]) < SMALLEST_LEVEL:
                break
            self._check(page)
            factor *= max(1, round(longest / max(page.shape)))
            longest = max(page.shape)
            levels.append(Level(page, factor))
        return levels

    def _check(self, page: Any) -> None:
        if page.dtype != np.uint8 or len(page.shape) != 2:
            raise InputError(self.path, "holds no 8-bit class indices", "predict this slide again")
        if np.prod(page.chunks) > LARGEST_SEGMENT:
            raise InputError(self.path, f"has tiles of {page.chunks} px", "predict this slide again")

    def _sample(self, level: Level, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Classes at map coordinates: (h,), (w,) in, (h,w) out; both rise."""
        geometry, page = self.geometry, level.page
        found = np.full((len(rows), len(columns)), geometry.labels.ignore, np.uint8)
        length, width = page.chunks
        down = _runs(rows, geometry.map_height, level.factor, page.shape[0], length)
        across = _runs(columns, geometry.map_width, level.factor, page.shape[1], width)
        many = -(-page.shape[1] // width)
        for segment_row, to_rows, from_rows in down:
            for segment_column, to_columns, from_columns in across:
                segment = self._segment(page, segment_row * many + segment_column)
                found[to_rows, to_columns] = segment[np.ix_(from_rows, from_columns)]
        return found

    def _segment(self, page: Any, index: int) -> NDArray[np.uint8]:
        return self._segments.get((page.offset, index), lambda: self._decoded(page, index))

    def _decoded(self, page: Any, index: int) -> NDArray[np.uint8]:
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        with self._lock:
            handle = self._tiff.filehandle
            handle.seek(offset)
            data = handle.read(count) if count else None
        try:
            decoded, _, _ = page.decode(data, index)
        except Exception as error:  # each decoder of imagecodecs has its own error
            raise InputError(self.path, f"has a damaged tile ({error})", "predict this slide again") from None
        if decoded is None:  # a tile that was left out holds the file's fill value
            return np.full(page.chunks, page.nodata, np.uint8)
        segment = np.asarray(decoded, np.uint8)
        return segment.reshape(segment.shape[-3:-1])


def open_tiff(path: Path) -> Any:
    """A ``tifffile.TiffFile``.

    Raises:
        InputError: no TIFF.
    """
    try:
        return tifffile.TiffFile(path)
    except (tifffile.TiffFileError, ValueError) as error:
        raise InputError(path, f"is no class map ({error})", "predict this slide again") from None


def png(classes: NDArray[np.uint8], labels: LabelSpace, shown: Group[int]) -> bytes:
    """A picture of classes: those that are shown in their colours, everything else transparent.

    Args:
        classes: (H,W) uint8 class indices.
        labels: their colours; white and ignore are never painted.
        shown: indices of the classes to paint.
    """
    opacity = bytes(255 if index in shown and index < labels.num_tissue else 0 for index in range(256))
    picture = Image.fromarray(classes)
    picture.putpalette(labels.palette())
    out = io.BytesIO()
    picture.save(out, format="PNG", transparency=opacity, compress_level=1)
    return out.getvalue()


def _runs(
    places: NDArray[np.float64], size: int, factor: int, level_size: int, chunk: int
) -> list[tuple[int, slice, NDArray[np.int64]]]:
    """For one axis: which segment, which pixels of the tile it fills, and from where in the segment.

    Args:
        places: (n,) rising map coordinates.
        size: of the map, px.
        factor: map pixels a pixel of the level.
        level_size: of the level, px.
        chunk: of a segment, px.
    """
    pixels = np.floor(places.clip(-1, size)).astype(np.int64)
    first, end = np.searchsorted(pixels, [0, size])
    # an odd size leaves a last half pixel, which some pyramids drop
    pixels = np.minimum(pixels[first:end] // factor, level_size - 1)
    if not len(pixels):
        return []
    segments = pixels // chunk
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    stops = [*starts[1:], len(segments)]
    return [
        (int(segments[start]), slice(first + start, first + stop), pixels[start:stop] - segments[start] * chunk)
        for start, stop in zip(starts, stops, strict=True)
    ]
