"""What ``tissuehint predict`` says of a slide: ``slide.json`` and ``areas.csv``, checked."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.view.paths import inside

RECORD, CLASSES, PROBABILITIES, AREAS = "slide.json", "classes.ome.tif", "probabilities.zarr", "areas.csv"
PICTURES = ("thumbnail.jpg", "overlay.jpg")
FORMAT = 1
LARGEST_RECORD = 16 * 2**20  # bytes

State = Literal["done", "failed", "running"]


@dataclass(frozen=True)
class ClassArea:
    """A row of ``areas.csv``; None where it says nothing."""

    name: str
    mm2: float | None
    percent: float | None


@dataclass(frozen=True)
class Geometry:
    """A finished slide: what it is, and how its map lies on it.

    Args:
        path: of the slide's file when it was mapped, as text: of another computer, perhaps.
        bytes: of that file.
        height, width: of level 0, px.
        um_per_px: of level 0.
        corner: (top, left) of what was scanned, level-0 px: from where QuPath measures.
        map_height, map_width: of the class map, px.
        placement: of the class map on the slide.
        labels: its classes.
    """

    path: str
    bytes: int
    height: int
    width: int
    um_per_px: float
    corner: tuple[float, float]
    map_height: int
    map_width: int
    placement: Placement
    labels: LabelSpace

    @property
    def file_name(self) -> str:
        """The last part of ``path``; Windows paths are understood everywhere."""
        return self.path.replace("\\", "/").rpartition("/")[2]


@dataclass(frozen=True)
class SlideRecord:
    """A slide of the opened folder.

    Args:
        key: name of its folder, the name in addresses.
        folder: resolved.
        version: changes when ``slide.json`` does.
        name: to be shown.
        state: as recorded; ``failed`` too where the record cannot be used.
        error: why it failed, one line.
        geometry: of finished slides.
        areas: of finished slides, in the order of the file.
        model: name of its run or folder, empty where none is recorded.
    """

    key: str
    folder: Path
    version: str
    name: str
    state: State
    error: str | None = None
    geometry: Geometry | None = None
    areas: tuple[ClassArea, ...] = ()
    model: str = ""

    def file(self, name: str) -> Path | None:
        """A file of this slide, None where there is none or a link leads out of the slide's folder."""
        path = inside(self.folder / name, self.folder)
        return path if path is not None and path.is_file() else None


def read_record(folder: Path, version: str) -> SlideRecord:
    """The record of a slide; never raises: what is damaged is a failed slide, with the reason.

    Args:
        folder: resolved, with a ``slide.json``.
        version: see ``SlideRecord``.
    """
    key = folder.name
    try:
        values = _load(folder)
        name = str(values.get("name") or key)
        state = values["state"]
        if state == "failed":
            return SlideRecord(
                key, folder, version, name, "failed", _line(values.get("error") or "no reason is recorded")
            )
        if state == "running":
            return SlideRecord(key, folder, version, name, "running")
        if state != "done":
            raise InputError(RECORD, f"has state {state!r:.40}", _AGAIN)
        geometry = _geometry(values)
        record = SlideRecord(key, folder, version, name, "done", None, geometry, (), _model(values))
        if record.file(CLASSES) is None:
            raise InputError(CLASSES, "is missing, or leads out of its folder", _AGAIN)
        areas = read_areas(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        told = isinstance(error, InputError) and error.fix in (_AGAIN, _UPDATE)
        reason = str(error) if told else f"{RECORD} is damaged ({_reason(error)}); {_AGAIN}"
        return SlideRecord(key, folder, version, key, "failed", _line(reason))
    return SlideRecord(key, folder, version, name, "done", None, geometry, areas, record.model)


def read_areas(record: SlideRecord) -> tuple[ClassArea, ...]:
    """Rows of ``areas.csv``; empty where there is none.

    Raises:
        InputError: a file that is no such table.
    """
    path = record.file(AREAS)
    if path is None:
        return ()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(
                ClassArea(row["class"], _number(row["mm2"]), _number(row["percent_of_tissue"]))
                for row in csv.DictReader(file)
            )
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(AREAS, f"is damaged ({_reason(error)})", _AGAIN) from None


_AGAIN = "delete the folder of this slide and run tissuehint predict again"
_UPDATE = "update tissuehint"


def _load(folder: Path) -> dict[str, Any]:
    path = inside(folder / RECORD, folder)
    if path is None:
        raise InputError(RECORD, "leads out of its folder", _AGAIN)
    if path.stat().st_size > LARGEST_RECORD:
        raise InputError(RECORD, "is too large to be a record", _AGAIN)
    text = path.read_text(encoding="utf-8")
    values = json.loads(text)
    json.dumps(values, ensure_ascii=False).encode()  # halves of characters, which no answer could hold
    if not isinstance(values, dict):
        raise InputError(RECORD, "is damaged (it holds no object)", _AGAIN)
    if values["format"] > FORMAT:
        raise InputError(RECORD, f"has format {values['format']}, this version reads {FORMAT}", _UPDATE)
    return values


def _geometry(values: dict[str, Any]) -> Geometry:
    slide, of_map = values["slide"], values["map"]
    top, left = (list(slide.get("bounds") or (0, 0)))[:2]
    geometry = Geometry(
        path=str(slide["path"]),
        bytes=int(slide["bytes"]),
        height=_size(slide, "height"),
        width=_size(slide, "width"),
        um_per_px=_length(slide, "um_per_px"),
        corner=(_finite(top), _finite(left)),
        map_height=_size(of_map, "height"),
        map_width=_size(of_map, "width"),
        placement=Placement(
            _length(of_map, "um_per_px"), _length(of_map, "scale"), _finite(of_map["top"]), _finite(of_map["left"])
        ),
        labels=LabelSpace.from_dict(values["labels"]),
    )
    return geometry


def _model(values: dict[str, Any]) -> str:
    model = values.get("model")
    path = model.get("path") or model.get("name") if isinstance(model, dict) else None
    parts = [part for part in str(path or "").replace("\\", "/").split("/") if part]
    return next((part for part in reversed(parts) if part != "model"), "")  # RUN/model is known by its run


def _size(values: dict[str, Any], name: str) -> int:
    number = int(values[name])
    if not 0 < number < 2**31:
        raise ValueError(f"{name} is {number}")
    return number


def _length(values: dict[str, Any], name: str) -> float:
    number = _finite(values[name])
    if number <= 0:
        raise ValueError(f"{name} is {number}")
    return number


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < 1e12:
        raise ValueError(f"{value} is no place on a slide")
    return number


def _number(text: str) -> float | None:
    number = float(text or "nan")
    return number if math.isfinite(number) else None


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)[:120] or type(error).__name__


def _line(text: Any) -> str:
    return " ".join(str(text).split())
