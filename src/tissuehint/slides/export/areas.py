"""Areas of the classes of a mapped slide."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tissuehint.files import write_text
from tissuehint.labels import LabelSpace
from tissuehint.slides.export.class_map import ClassMap, windows

COLUMNS = ("class", "pixels", "mm2", "percent_of_tissue")


class AreaRow(NamedTuple):
    """Area of one class.

    Args:
        name: the class.
        pixels: pixels of the map.
        mm2: the same in square millimetres.
        percent: share of the tissue, in per cent; None for white (no tissue) and where there is no tissue at all.
    """

    name: str
    pixels: int
    mm2: float
    percent: float | None


def area_rows(classes: ClassMap, labels: LabelSpace, um_per_px: float) -> list[AreaRow]:
    """Areas of the classes, in their order; pixels without a class (``labels.ignore``) are nowhere.

    Args:
        classes: (H,W) uint8 class indices.
        labels: the classes.
        um_per_px: side of a map pixel in micrometres.

    Returns:
        A row per class, white last where there is one. The per cents of the tissue classes sum to 100.

    Example:
        >>> space = LabelSpace(("gland", "stroma", "white"), white=2)
        >>> [row.percent for row in area_rows(np.array([[0, 0, 0, 1, 2, 255]], np.uint8), space, 0.5)]
        [75.0, 25.0, None]
    """
    counts = np.zeros(256, np.int64)
    for rows, columns in windows(classes):
        counts += np.bincount(np.asarray(classes[rows, columns]).reshape(-1), minlength=256)
    tissue = int(counts[: labels.num_tissue].sum())
    found = []
    for index, name in enumerate(labels.names):
        count = int(counts[index])
        share = 100 * count / tissue if tissue and index < labels.num_tissue else None
        found.append(AreaRow(name, count, count * um_per_px**2 / 1e6, share))
    return found


def write_areas(path: Path, rows: Iterable[AreaRow]) -> None:
    """Write ``areas.csv`` atomically: 4 decimals of a per cent, 6 digits of square millimetres."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        share = "" if row.percent is None else f"{row.percent:.4f}"
        writer.writerow([row.name, row.pixels, f"{row.mm2:.6g}", share])
    write_text(path, text.getvalue())
