"""The points of one image, with classes that the file itself names: a CSV table, or annotations exported by QuPath."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tissuehint.data.qupath import parse_geojson
from tissuehint.data.tables import (
    POINT_COLUMNS,
    LabelledPoint,
    Problem,
    Row,
    as_points,
    check_columns,
    check_points,
    points_of,
    read_table,
    refuse,
)
from tissuehint.errors import InputError
from tissuehint.labels import IGNORE, LabelSpace, Points

IMAGE, *COLUMNS = POINT_COLUMNS
GEOJSON_SUFFIXES = (".geojson", ".json")


def read_point_file(path: Path, size: tuple[int, int]) -> tuple[Points, LabelSpace]:
    """Points of one image and their classes, in the order in which the file names them first.

    A file whose name ends in ``.geojson`` or ``.json`` is an export of QuPath, in pixels of the image (see
    ``data.qupath.points_from_geojson``); any other is a CSV table with the columns ``row``, ``column`` and ``class``,
    pixels counted from 0 at the upper left corner, classes by name.

    Args:
        path: the file.
        size: (height, width) of the image, px.

    Returns:
        The points, and a label space of the classes that have points, without a white class.

    Raises:
        InputError: the first rule that the file breaks, with file and line: a broken table or GeoJSON, a point without
            class or outside the image, a pixel of two classes, no points, points of one class only.
    """
    problems: list[Problem] = []
    file = str(path)
    if path.suffix.lower() in GEOJSON_SUFFIXES:
        names = list(dict.fromkeys(_geojson_classes(path)))
        labels = _label_space(file, names)
        found = parse_geojson(path, file, labels, problems)
    else:
        found, labels = _table_points(path, file, problems)
    check_points(found, size, labels, problems)
    refuse(problems)
    if not found:
        raise InputError(path, "has no points", "mark a few points of each class")
    if labels.num_classes < 2:
        rule = f"has points of one class only, '{labels.names[0]}'"
        raise InputError(path, rule, "mark a few points of what is something else, too")
    return as_points(found), labels


def _label_space(file: str, names: list[str]) -> LabelSpace:
    if len(names) > IGNORE:
        raise InputError(file, f"names {len(names)} classes, masks hold at most {IGNORE}", "use fewer classes")
    # a file without any class breaks a rule of its own, which its reader says, with these names as a proposal
    return LabelSpace(tuple(names) or ("target", "other"))


def _table_points(path: Path, file: str, problems: list[Problem]) -> tuple[list[LabelledPoint], LabelSpace]:
    table = read_table(path, file, problems)
    if table is not None:
        check_columns(table, COLUMNS, COLUMNS, problems)
    # what is wrong with the file as a whole makes its rows say anything
    refuse(problems)
    if table is None:
        raise AssertionError("a table that cannot be read has a problem")
    rows = []
    for row in table.rows:
        if row.cells["class"]:
            rows.append(Row(row.line, {**row.cells, IMAGE: path.stem}))
        else:
            problems.append(Problem(file, row.line, "class of a point", "is empty", "name the class"))
    labels = _label_space(file, list(dict.fromkeys(row.cells["class"] for row in rows)))
    of_one_image = replace(table, columns=POINT_COLUMNS, rows=tuple(rows))
    return points_of(of_one_image, labels, problems).get(path.stem, []), labels


def _geojson_classes(path: Path) -> Iterator[str]:
    """Class names of point features in their order; nothing where the file cannot be read: its reader says why."""
    try:
        content: Any = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict):
        content = content.get("features", [content])
    for feature in content if isinstance(content, list) else []:
        name = _class_of(feature)
        if name:
            yield name


def _class_of(feature: Any) -> str | None:
    value = feature if isinstance(feature, dict) else {}
    geometry, properties = value.get("geometry"), value.get("properties")
    if not isinstance(geometry, dict) or geometry.get("type") not in ("Point", "MultiPoint"):
        return None
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if not isinstance(classification, dict):
        return None
    name, names = classification.get("name"), classification.get("names")
    if name is None and isinstance(names, list):
        return ": ".join(str(part) for part in names)
    return name if isinstance(name, str) else None
