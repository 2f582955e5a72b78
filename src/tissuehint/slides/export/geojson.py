"""Polygons as GeoJSON that QuPath opens; ``tissuehint.data.qupath`` reads such files.

QuPath measures x to the right and y down, in pixels of level 0, from the corner of the slide's bounds. It reads
``objectType``, ``classification`` (name and colour), ``measurements`` as an object of numbers and ``isLocked`` from
the properties of a feature, and from version 0.4 on opens ``.geojson.gz`` as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np
import shapely

from tissuehint.files import atomic_path
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export.polygons import TissuePolygon

DECIMALS, MORE_DECIMALS = 2, 6  # of a level-0 pixel
AREA = "area mm2"
PART = 10_000  # vertices that are text at a time


def write_geojson(
    path: Path,
    polygons: Iterable[TissuePolygon],
    labels: LabelSpace,
    placement: Placement,
    *,
    corner: tuple[float, float] = (0.0, 0.0),
    kind: Literal["annotation", "detection"] = "annotation",
) -> int:
    """Write polygons as a GeoJSON FeatureCollection, one feature a line, atomically.

    Polygons are taken, written and forgotten one by one. Coordinates are [x, y] in level-0 pixels, rounded to 2
    decimals (6 where 2 would make a polygon invalid). In these, exterior rings turn counter-clockwise and holes
    clockwise as RFC 7946 has it; on the screen, where y goes down, it looks the other way round. The ids follow from
    the content: the same polygons give the same bytes.

    Args:
        path: file to write; gzip where its name ends in ``.gz``.
        polygons: what ``tissue_polygons`` gives, in map pixels.
        labels: the classes: names and colours.
        placement: how the map lies on the slide.
        corner: (top, left) from where to measure, in level-0 pixels: ``Slide.corner(origin)``.
        kind: the objects in QuPath. Detections cannot be edited, but QuPath handles many thousands of them faster.

    Returns:
        Number of polygons written.
    """
    count = 0
    with atomic_path(path) as unfinished, _writing(unfinished) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for count, polygon in enumerate(polygons, 1):
            file.write(b",\n" if count > 1 else b"\n")
            for part in _feature(polygon, count, labels, placement, corner, kind):
                file.write(part.encode("ascii"))
        file.write(b"\n]}\n")
    return count


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        # no name and no time in the header: they would differ from run to run
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
            yield packed  # type: ignore[misc]


def _feature(
    polygon: TissuePolygon,
    number: int,
    labels: LabelSpace,
    placement: Placement,
    corner: tuple[float, float],
    kind: str,
) -> Iterator[str]:
    """Text of a feature in parts: one polygon may have millions of vertices."""
    geometry = _on_slide(polygon.geometry, placement, corner)
    name = labels.names[polygon.label]
    content = hashlib.sha1(f"{number} {name} ".encode() + shapely.to_wkb(geometry, byte_order=1))
    area = polygon.geometry.area * placement.um_per_px**2 / 1e6
    properties = {
        "objectType": kind,
        "classification": {"name": name, "color": list(labels.colours[polygon.label])},
        "measurements": {AREA: float(f"{area:.6g}")},
        "isLocked": False,
    }
    identity = uuid.UUID(bytes=content.digest()[:16], version=5)
    yield f'{{"type": "Feature", "id": "{identity}", "geometry": {{"type": "Polygon", "coordinates": ['
    for count, ring in enumerate([geometry.exterior, *geometry.interiors]):
        points = shapely.get_coordinates(ring)
        parts = (json.dumps(points[start : start + PART].tolist())[1:-1] for start in range(0, len(points), PART))
        yield ", [" if count else "["
        yield next(parts)
        for part in parts:
            yield f", {part}"
        yield "]"
    # ASCII: QuPath reads the file in the encoding of the computer
    yield f']}}, "properties": {json.dumps(properties)}}}'


def _on_slide(polygon: shapely.Polygon, placement: Placement, corner: tuple[float, float]) -> shapely.Polygon:
    """The polygon in level-0 pixels from the corner, rounded, its exterior counter-clockwise."""
    points = shapely.get_coordinates(polygon)
    rows, columns = placement.to_slide(points[:, 1], points[:, 0])
    placed = np.stack([columns - corner[1], rows - corner[0]], 1)
    for decimals in (DECIMALS, MORE_DECIMALS):
        # zero is added so that none is -0.0
        rounded = shapely.set_coordinates(shapely.from_wkb(shapely.to_wkb(polygon)), np.round(placed, decimals) + 0.0)
        if rounded.is_valid:
            break
    return shapely.orient_polygons(rounded)
