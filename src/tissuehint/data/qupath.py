"""Annotations from QuPath, exported as GeoJSON: points, and regions of a class."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tissuehint.data.tables import LARGEST_PIXEL, LabelledPoint, Problem, as_points, check_points, refuse
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points

GZIP = b"\x1f\x8b"
_POINT_KINDS = ("Point", "MultiPoint")


def points_from_geojson(path: Path, labels: LabelSpace) -> Points:
    """Points of a GeoJSON file that QuPath exported, in pixels of the image.

    QuPath measures x to the right and y down from the upper left corner of the image, with fractions; a point lies
    in the pixel (row, column) = (floor y, floor x). The class is ``properties.classification.name`` (or ``names``, of
    which QuPath makes ``A: B``). Read are a FeatureCollection, a bare list of features and a single feature, with
    geometries Point and MultiPoint. Annotations of other shapes (the outline of a region, say) are skipped: they say
    more than points and are no point hints.

    Args:
        path: the file.
        labels: the classes; class names must be theirs.

    Returns:
        Points in the order of the file.

    Raises:
        InputError: no GeoJSON, a point without class or of an unknown class, a pixel of two classes, a place that is
            no pixel, no point at all.
    """
    problems: list[Problem] = []
    points = parse_geojson(path, str(path), labels, problems)
    check_points(points, None, labels, problems)
    refuse(problems)
    return as_points(points)


@dataclass(frozen=True)
class Annotation:
    """What someone drew on a slide.

    Args:
        label: its class, as QuPath names it (``A: B`` for derived ones); None where it has none.
        geometry: GeoJSON geometry; [x, y] in level-0 pixels from the corner that the file measures from.
        place: which one of the file, for messages.
    """

    label: str | None
    geometry: dict[str, Any]
    place: str


def read_annotations(path: Path) -> list[Annotation]:
    """All annotations of a file that QuPath exported, GeoJSON or gzipped GeoJSON, in their order.

    Raises:
        InputError: no GeoJSON; a feature without geometry.
    """
    found = []
    for number, feature in enumerate(read_features(path), 1):
        geometry = feature.get("geometry")
        if not isinstance(geometry, dict) or not isinstance(geometry.get("type"), str):
            rule = f"feature {number} has no geometry"
            raise InputError(path, rule, "export annotations as GeoJSON from QuPath")
        found.append(Annotation(class_name(feature), geometry, f"feature {number}"))
    return found


def read_features(path: Path) -> list[dict[str, Any]]:
    """Features of a GeoJSON file, gzipped or not: of a FeatureCollection, a bare list, or a single one.

    Raises:
        InputError: no file, no GeoJSON.
    """
    problems: list[Problem] = []
    content = _json(path, str(path), problems)
    refuse(problems)
    return _features(content, str(path))


def parse_geojson(path: Path, file: str, labels: LabelSpace, problems: list[Problem]) -> list[LabelledPoint]:
    """Points of a QuPath export; what is wrong is added to ``problems`` under the name ``file``."""
    content = _json(path, file, problems)
    if content is None:
        return []
    try:
        features = _features(content, file)
    except InputError as error:
        problems.append(Problem(file, None, "file", error.rule, error.fix))
        return []
    known = len(problems)
    found = []
    for number, feature in enumerate(features, 1):
        found += list(_points(feature, f"feature {number}", file, labels, problems))
    if not found and len(problems) == known:
        rule = f"has no points in {len(features)} features"
        problems.append(Problem(file, None, "file", rule, "mark points with the point tool and export them"))
    return found


def _json(path: Path, file: str, problems: list[Problem]) -> Any:
    fix = "export annotations as GeoJSON from QuPath"
    try:
        content = path.read_bytes()
        if content[:2] == GZIP:
            content = gzip.decompress(content)
        return json.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        problems.append(Problem(file, None, "file", "does not exist", "check the path"))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Problem(file, None, "file", f"cannot be read ({reason})", "check the file"))
    except UnicodeDecodeError:
        problems.append(Problem(file, None, "file", "is not UTF-8", fix))
    except json.JSONDecodeError as error:
        problems.append(Problem(file, error.lineno, "file", f"is no JSON ({error.msg})", fix))
    except (RecursionError, ValueError) as error:
        problems.append(Problem(file, None, "file", f"cannot be parsed ({error})", fix))
    return None


def _features(content: Any, file: str) -> list[dict[str, Any]]:
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    elif isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    if not isinstance(content, list) or not all(isinstance(feature, dict) for feature in content):
        rule = "is no FeatureCollection, list of features or feature"
        raise InputError(file, rule, "export annotations as GeoJSON from QuPath")
    return content


def _points(
    feature: dict[str, Any], name: str, file: str, labels: LabelSpace, problems: list[Problem]
) -> Iterator[LabelledPoint]:
    geometry = feature.get("geometry")
    if not isinstance(geometry, dict) or geometry.get("type") not in _POINT_KINDS:
        return
    label = _label(feature, name, file, labels, problems)
    coordinates = geometry.get("coordinates")
    places = [coordinates] if geometry["type"] == "Point" else coordinates
    for place in places if isinstance(places, list) else [places]:
        pixel = _pixel(place)
        if pixel is None:
            rule = f"has the place {json.dumps(place)[:60]}, places are [x, y] from 0"
            problems.append(Problem(file, None, name, rule, "move the point into the image"))
        elif label is not None:
            subject = f"{name}, point (row {pixel[0]}, column {pixel[1]})"
            yield LabelledPoint(file, None, subject, *pixel, label)


def _label(feature: dict[str, Any], name: str, file: str, labels: LabelSpace, problems: list[Problem]) -> int | None:
    found = class_name(feature)
    if not found:
        fix = f"set its class in QuPath to one of {', '.join(labels.names)}"
        problems.append(Problem(file, None, name, "is a point without a class", fix))
        return None
    if found not in labels.names:
        rule = f"has class '{found}', classes are {', '.join(labels.names)}"
        problems.append(Problem(file, None, name, rule, "use one of these names"))
        return None
    return labels.names.index(found)


def class_name(feature: dict[str, Any]) -> str | None:
    """Class of a feature as QuPath shows it (``A: B`` for derived ones); None where it has none."""
    properties = feature.get("properties")
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if not isinstance(classification, dict):
        return None
    found = classification.get("name")
    if found is None and isinstance(classification.get("names"), list):
        found = ": ".join(str(part) for part in classification["names"])
    return str(found).strip() or None if found else None


def _pixel(place: Any) -> tuple[int, int] | None:
    """(row, column) of an [x, y] place, a z beside it is not needed; None where it is none."""
    if not isinstance(place, list) or len(place) < 2:
        return None
    x, y = place[:2]
    if not all(isinstance(value, int | float) and 0 <= value <= LARGEST_PIXEL for value in (x, y)):
        return None
    return math.floor(y), math.floor(x)
