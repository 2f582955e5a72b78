"""Polygons as GeoJSON that QuPath opens; ``tissuehint.data.qupath`` reads such files.

QuPath measures x to the right and y down, in pixels of level 0, from the corner of the slide's bounds. It reads
``objectType``, ``classification`` (name and colour), ``measurements`` as an object of numbers and ``isLocked`` from
the properties of a feature, and from version 0.4 on opens ``.geojson.gz`` as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from tissuehint.files import atomic_path
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export.polygons import Geometries, TissuePolygon

DECIMALS, MORE_DECIMALS = 2, 6  # of a level-0 pixel
AREA = "area mm2"
PART = 10_000  # vertices that are text at a time
BUFFER = 2**18  # bytes that are packed at a time


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

    Polygons are taken, written and forgotten some at a time. Coordinates are [x, y] in level-0 pixels, rounded to 2
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
        for batch in _batches(polygons):
            geometries = _on_slide(np.array([polygon.geometry for polygon in batch]), placement, corner)
            codes = shapely.to_wkb(geometries, byte_order=1)
            for polygon, geometry, code in zip(batch, geometries, codes, strict=True):
                count += 1
                file.write(b",\n" if count > 1 else b"\n")
                name = labels.names[polygon.label]
                content = hashlib.sha1(f"{count} {name} ".encode() + code)
                identity = uuid.UUID(bytes=content.digest()[:16], version=5)
                area = polygon.geometry.area * placement.um_per_px**2 / 1e6
                properties = {
                    "objectType": kind,
                    "classification": {"name": name, "color": list(labels.colours[polygon.label])},
                    "measurements": {AREA: float(f"{area:.6g}")},
                    "isLocked": False,
                }
                for part in _feature(identity, geometry, properties):
                    file.write(part.encode("ascii"))
        file.write(b"\n]}\n")
    return count


def _batches(polygons: Iterable[TissuePolygon]) -> Iterator[list[TissuePolygon]]:
    """Polygons of about ``PART`` vertices at a time."""
    batch: list[TissuePolygon] = []
    vertices = 0
    for polygon in polygons:
        batch.append(polygon)
        vertices += int(shapely.get_num_coordinates(polygon.geometry))
        if vertices >= PART:
            yield batch
            batch, vertices = [], 0
    if batch:
        yield batch


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        # no name and no time in the header: they would differ from run to run
        packed = gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0)
        # many short writes are as slow as packing them
        with packed, io.BufferedWriter(packed, BUFFER) as buffered:
            yield buffered


def _feature(identity: uuid.UUID, geometry: shapely.Polygon, properties: dict[str, Any]) -> Iterator[str]:
    """Text of a feature in parts: one polygon may have millions of vertices."""
    yield f'{{"type": "Feature", "id": "{identity}", "geometry": {{"type": "Polygon", "coordinates": ['
    points, rings = shapely.get_coordinates(shapely.get_rings(geometry), return_index=True)
    for count, ring in enumerate(np.split(points, np.flatnonzero(np.diff(rings)) + 1)):
        parts = (json.dumps(ring[start : start + PART].tolist())[1:-1] for start in range(0, len(ring), PART))
        yield ", [" if count else "["
        yield next(parts)
        for part in parts:
            yield f", {part}"
        yield "]"
    # ASCII: QuPath reads the file in the encoding of the computer
    yield f']}}, "properties": {json.dumps(properties)}}}'


def _on_slide(polygons: Geometries, placement: Placement, corner: tuple[float, float]) -> Geometries:
    """Polygons (N,) in level-0 pixels from the corner, rounded, their exteriors counter-clockwise."""

    def placed(points: NDArray[np.float64], decimals: int) -> NDArray[np.float64]:
        rows, columns = placement.to_slide(points[:, 1], points[:, 0])
        # zero is added so that none is -0.0
        return np.asarray(np.stack([columns - corner[1], rows - corner[0]], 1).round(decimals) + 0.0, np.float64)

    rounded: Geometries = shapely.transform(polygons, partial(placed, decimals=DECIMALS))
    broken = ~shapely.is_valid(rounded)
    if broken.any():
        rounded[broken] = shapely.transform(polygons[broken], partial(placed, decimals=MORE_DECIMALS))
    oriented: Geometries = shapely.orient_polygons(rounded)
    return oriented
