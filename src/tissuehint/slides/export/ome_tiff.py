"""A class map as a tiled, pyramidal OME-TIFF: class indices with a palette.

What reads it: tifffile and tiffslide read all levels and the class indices; Bio-Formats, and QuPath through it, should
by the specification that this follows. OpenSlide has no OME-TIFF reader and takes it for a generic tiled TIFF: level 0
in the class colours, with the right micrometres per pixel. Levels are SubIFDs, as OME-TIFF wants them; in the main
chain of pages, where OpenSlide would find them, other readers would take them for further images.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from tissuehint.errors import InputError
from tissuehint.files import atomic_path
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export.class_map import ClassMap

TILE = 512
COMPRESSION = "zlib"  # every reader has it
NAMESPACE = "tissuehint/classes"
LARGEST_CLASSIC = 2**32 - 2**26  # bytes; offsets of a classic TIFF have 32 bits
BUFFER = 2**24  # bytes of tiles that are compressed at a time
ACROSS = 8  # tiles that are read at a time

Pixels = NDArray[np.uint8]


def write_ome_tiff(
    path: Path,
    classes: ClassMap,
    labels: LabelSpace,
    placement: Placement,
    *,
    tile: int = TILE,
    compression: str | None = COMPRESSION,
) -> None:
    """Write a class map as an OME-TIFF, atomically and tile by tile.

    Each level halves the one above (an odd size is rounded up) until one tile holds it. A pixel is the most frequent
    class of the four above it, never a mixture. Of equally frequent ones a class comes before ``labels.ignore``, so
    that thin tissue stays in view (its edge towards unmapped pixels moves out by up to a pixel of the level: measure on
    level 0); between classes the upper left pixel decides, which favours none.

    A quarter of the map goes through a nameless temporary file beside ``path``, compressed; memory holds a few tiles.
    The OME-XML has a MapAnnotation "tissuehint/classes" with ``labels`` (``LabelSpace.to_dict``) and ``placement`` as
    JSON. The same map gives the same bytes.

    Args:
        path: file to write.
        classes: (H,W) uint8 class indices.
        labels: the classes.
        placement: how the map lies on the slide; ``um_per_px`` becomes PhysicalSizeX, PhysicalSizeY and the resolution.
        tile: side of the tiles in px, a multiple of 16.
        compression: as tifffile names it; None for none.

    Raises:
        InputError: another ``tile``, a map without pixels.
    """
    height, width = classes.shape
    if tile < 16 or tile % 16:
        raise InputError(f"tile {tile}", "is not a multiple of 16", "use 256 or 512")
    if not height or not width:
        raise InputError(f"class map of {height} x {width} px", "has no pixels", "map something")
    shapes = _level_shapes(height, width, tile)
    bytes_at_most = sum((rows + tile) * (columns + tile) for rows, columns in shapes)
    options: dict[str, Any] = {
        "dtype": np.uint8,
        "tile": (tile, tile),
        "compression": compression,
        "photometric": "palette",
        "colormap": np.ascontiguousarray(labels.colour_table().T.astype(np.uint16) * 257),
        "resolutionunit": "CENTIMETER",
        "software": "tissuehint",
        "buffersize": BUFFER,
    }
    with (
        atomic_path(path) as part,
        tempfile.TemporaryFile(dir=path.parent) as spool,
        tifffile.TiffWriter(part, ome=True, bigtiff=bytes_at_most > LARGEST_CLASSIC) as file,
    ):
        quarters: _Quarters | None = None
        for level, shape in enumerate(shapes):
            smaller = _Quarters(spool, tile, -(-shape[1] // tile))
            tiles = _map_tiles(classes, tile) if quarters is None else quarters.tiles(shape)
            density = 1e4 / placement.um_per_px / 2**level  # px per cm
            file.write(
                _spooled(tiles, smaller, labels.ignore) if level < len(shapes) - 1 else tiles,
                shape=shape,
                resolution=(density, density),
                subifds=len(shapes) - 1 if quarters is None else None,
                subfiletype=0 if quarters is None else 1,
                metadata=_metadata(shape, labels, placement) if quarters is None else None,
                **options,
            )
            quarters = smaller


def halved(pixels: Pixels, ignore: int) -> Pixels:
    """(h/2,w/2): the most frequent of each 2 x 2 of ``pixels`` (h,w), h and w even; see ``write_ome_tiff`` for ties."""
    if (pixels == pixels[0, 0]).all():  # most tiles of a slide
        return pixels[::2, ::2]
    corners = [np.ascontiguousarray(pixels[row::2, column::2]) for row in (0, 1) for column in (0, 1)]
    # two votes for each other pixel of the class, one for being a class at all
    votes = [(corner != ignore).view(np.uint8) for corner in corners]
    for one, other in itertools.combinations(range(4), 2):
        agreeing = (corners[one] == corners[other]).view(np.uint8) << 1
        votes[one] += agreeing
        votes[other] += agreeing
    best, most = corners[0], votes[0]
    for corner, count in zip(corners[1:], votes[1:], strict=True):
        best = np.where(count > most, corner, best)
        most = np.maximum(count, most)
    return best


def _level_shapes(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    shapes = [(height, width)]
    while max(shapes[-1]) > tile:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return shapes


def _map_tiles(classes: ClassMap, tile: int) -> Iterator[Pixels]:
    """Whole tiles of level 0, row by row."""
    height, width = classes.shape
    for top in range(0, height, tile):
        for left in range(0, width, ACROSS * tile):
            strip = np.asarray(classes[top : min(top + tile, height), left : min(left + ACROSS * tile, width)])
            for column in range(0, strip.shape[1], tile):
                yield _whole(strip[:, column : column + tile], tile)


def _whole(pixels: Pixels, tile: int) -> Pixels:
    """Fill up a tile at the edge of the map with its last row and column, so that halving sees nothing foreign."""
    height, width = pixels.shape
    return np.pad(pixels, ((0, tile - height), (0, tile - width)), mode="edge")


def _spooled(tiles: Iterator[Pixels], quarters: _Quarters, ignore: int) -> Iterator[Pixels]:
    for tile in tiles:
        quarters.append(halved(tile, ignore))
        yield tile


class _Quarters:
    """The next level while this one is written: each tile, halved, compressed in a file.

    Args:
        file: where they go; other levels share it.
        tile: side of the tiles.
        across: tiles in a row of this level.
    """

    def __init__(self, file: IO[bytes], tile: int, across: int) -> None:
        self._file, self._tile, self._across = file, tile, across
        self._places: list[tuple[int, int]] = []  # offset and length of each, row by row

    def append(self, quarter: Pixels) -> None:
        """Add the next one."""
        packed = zlib.compress(quarter.tobytes(), 1)
        self._places.append((self._file.seek(0, 2), len(packed)))
        self._file.write(packed)

    def tiles(self, shape: tuple[int, int]) -> Iterator[Pixels]:
        """Whole tiles of the next level, row by row.

        Args:
            shape: of that level.
        """
        tile, half = self._tile, self._tile // 2
        for top in range(0, shape[0], tile):
            for left in range(0, shape[1], tile):
                pixels = np.empty((min(tile, shape[0] - top), min(tile, shape[1] - left)), np.uint8)
                for row in range(0, pixels.shape[0], half):
                    for column in range(0, pixels.shape[1], half):
                        place = pixels[row : row + half, column : column + half]
                        quarter = self._quarter((top + row) // half, (left + column) // half)
                        place[:] = quarter[: place.shape[0], : place.shape[1]]
                yield _whole(pixels, tile)

    def _quarter(self, row: int, column: int) -> Pixels:
        offset, length = self._places[row * self._across + column]
        self._file.seek(offset)
        half = self._tile // 2
        return np.frombuffer(zlib.decompress(self._file.read(length)), np.uint8).reshape(half, half)


def _metadata(shape: tuple[int, int], labels: LabelSpace, placement: Placement) -> dict[str, Any]:
    """What tifffile makes the OME-XML of."""
    content = {"labels": json.dumps(labels.to_dict()), "placement": json.dumps(asdict(placement))}
    names = ", ".join(f"{index} {name}" for index, name in enumerate(labels.names))
    return {
        "axes": "YX",
        "Name": "classes",
        "Creator": "tissuehint",
        # a random one would make each writing of a file another file
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{NAMESPACE} {shape} {content}")),
        "Description": f"Tissue classes: {names}; {labels.ignore} where nothing was mapped",
        "PhysicalSizeX": placement.um_per_px,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": placement.um_per_px,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": "class"},
        "MapAnnotation": {"Namespace": NAMESPACE, "Value": content},
    }
