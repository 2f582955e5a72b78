"""Slides as the page gets them: plain JSON values."""

from __future__ import annotations

from typing import Any

from tissuehint.slides.view.opened import OpenedMap
from tissuehint.slides.view.pyramid import TILE
from tissuehint.slides.view.record import PICTURES, SlideRecord


def card(record: SlideRecord) -> dict[str, Any]:
    """What the list shows of a slide."""
    return {
        "key": record.key,
        "name": record.name,
        "state": record.state,
        "error": record.error,
        "version": record.version,
        "pictures": [name for name in PICTURES if record.file(name) is not None],
        "classes": _classes(record),
        "tissue_mm2": _tissue(record),
    }


def details(opened: OpenedMap) -> dict[str, Any]:
    """What the viewer needs of a slide; lengths in level-0 pixels where they name no unit."""
    record, geometry, pyramid = opened.record, opened.geometry, opened.pyramid
    return {
        **card(record),
        "file": geometry.file_name,
        "model": record.model,
        "height": geometry.height,
        "width": geometry.width,
        "um_per_px": geometry.um_per_px,
        "map_um_per_px": geometry.placement.um_per_px,
        "corner": {"x": geometry.corner[1], "y": geometry.corner[0]},
        "tile": TILE,
        "first_level": pyramid.first,
        "last_level": pyramid.last,
        "pixels": opened.pixels.source,
        "probabilities": opened.probabilities is not None,
        "notes": opened.notes,
    }


def _classes(record: SlideRecord) -> list[dict[str, Any]]:
    if record.geometry is None:
        return []
    labels = record.geometry.labels
    areas = {area.name: area for area in record.areas}
    rows = []
    for index, (name, colour) in enumerate(zip(labels.names, labels.colours, strict=True)):
        area = areas.get(name)
        rows.append(
            {
                "index": index,
                "name": name,
                "colour": "#{:02x}{:02x}{:02x}".format(*colour),
                "painted": index < labels.num_tissue,
                "mm2": None if area is None else area.mm2,
                "percent": None if area is None else area.percent,
            }
        )
    return rows


def _tissue(record: SlideRecord) -> float | None:
    """Area of all tissue classes, None where it is not known."""
    if record.geometry is None:
        return None
    tissue = set(record.geometry.labels.tissue)
    known = [area.mm2 for area in record.areas if area.name in tissue and area.mm2 is not None]
    return sum(known) if known else None
