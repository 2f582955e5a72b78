"""The layout of a data folder, parsed once for reading and for checking.

Everything that can be told without decoding an image is told here; docs/how-to/own-data.md is the contract.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from tissuehint.data.qupath import parse_geojson
from tissuehint.data.records import IMAGE_SUFFIXES, Record
from tissuehint.data.tables import (
    PROPORTION,
    TAG,
    LabelledPoint,
    Problem,
    Row,
    Table,
    as_points,
    check_columns,
    check_label_columns,
    image_of,
    points_of,
    proportions_of,
    read_table,
    tags_of,
)
from tissuehint.errors import InputError
from tissuehint.labels import IGNORE, LabelSpace

IMAGES = "images"
MASKS = "masks"
LABELS = "labels.csv"
CLASSES = "classes.json"
POINTS = "points.csv"
POINTS_FOLDER = "points"
NOTES = "notes.txt"

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"": "train", "train": "train", "val": "val", "valid": "val", "test": "test"}
_LOSSLESS = (".png", ".bmp", ".tif", ".tiff")
_NO_DATA = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Entry:
    """A row of ``labels.csv`` whose image exists.

    Args:
        line: line of the row.
        image: path below ``images/``, with forward slashes.
        split: train, val or test.
        record: image, mask and hints.
        points: the points of the record with the places where they are written.
    """

    line: int
    image: str
    split: str
    record: Record
    points: tuple[LabelledPoint, ...] = ()


@dataclass(frozen=True)
class FolderContents:
    """What a data folder says; ``labels`` is None where its classes cannot be told."""

    labels: LabelSpace | None
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ImageIndex:
    """Image files below a folder by name.

    Args:
        folder: name of the folder, for problems.
        files: file by its path below the folder without suffix.
    """

    folder: str
    files: Mapping[str, Path]

    def find(self, name: str) -> str | None:
        """Key of an image that is named with or without its suffix; the case of the suffix does not matter."""
        name = _normal(PurePosixPath(name).as_posix())
        stem, suffix = _split_suffix(name)
        if suffix and stem in self.files and self.files[stem].suffix.lower() == suffix:
            return stem
        return name if name in self.files else None

    def nearest(self, name: str) -> str | None:
        """Name of a file that differs only in case or suffix, for the fix of an error."""
        found = self._keys_in_lower_case.get(_split_suffix(_normal(name))[0].lower())
        return None if found is None else found + self.files[found].suffix

    @cached_property
    def _keys_in_lower_case(self) -> dict[str, str]:
        return {key.lower(): key for key in self.files}


def parse_folder(root: Path, problems: list[Problem]) -> FolderContents:
    """Parse a data folder without decoding images.

    Args:
        root: the folder.
        problems: what is wrong is added here; parsing goes on as far as it can.

    Returns:
        What could be read.
    """
    nothing = FolderContents(None, (), ())
    if not root.is_dir():
        problems.append(Problem(".", None, f"folder '{root}'", "does not exist", "check the path"))
        return nothing
    images = _index(root, IMAGES, problems)
    masks = _mask_index(root, images, problems)
    if not (root / LABELS).is_file():
        fix = "write one with a column 'image' and one row per image"
        problems.append(Problem(LABELS, None, "table", "is missing", fix))
        return nothing
    table = read_table(root / LABELS, LABELS, problems)
    if table is None:
        return nothing
    labels = _classes(root, table, bool(masks.files), problems)
    entries = list(_entries(table, labels, images, masks, problems))
    if labels is not None:
        points = _points(root, labels, images, {entry.record.id for entry in entries}, problems)
        entries = [_with_points(entry, points.get(entry.record.id, [])) for entry in entries]
    _check_use(table, entries, images, problems)
    return FolderContents(labels, tuple(entries), _notes(root, problems))


def record_id(key: str) -> str:
    """Id of the image at a path below ``images/`` without suffix: folders joined by two underscores."""
    return key.replace("/", "__")


def _index(root: Path, folder: str, problems: list[Problem]) -> ImageIndex:
    """Image files below a folder, subfolders included and hidden files left out."""
    if not (root / folder).is_dir():
        if folder == IMAGES:
            problems.append(Problem(IMAGES, None, "folder", "is missing", "put the images into a folder 'images'"))
        return ImageIndex(folder, {})
    files: dict[str, Path] = {}
    ids: dict[str, str] = {}
    for path in _walk(root / folder):
        name = _normal(path.relative_to(root / folder).as_posix())
        key, suffix = _split_suffix(name)
        place = f"{folder}/{name}"
        if not suffix:
            rule = f"is none of {' '.join(IMAGE_SUFFIXES)} and is left out"
            problems.append(Problem(place, None, "file", rule, "convert or remove it", "warning"))
            continue
        other = ids.setdefault(record_id(key), name)
        if other != name:
            rule = f"has the same name as '{folder}/{other}' but for suffix or folder"
            problems.append(Problem(place, None, "file", rule, "rename or remove one of the two"))
            continue
        files[key] = path
    if folder == IMAGES and not files:
        problems.append(Problem(IMAGES, None, "folder", "has no images", f"add {' '.join(IMAGE_SUFFIXES)} files"))
    return ImageIndex(folder, files)


def _mask_index(root: Path, images: ImageIndex, problems: list[Problem]) -> ImageIndex:
    masks = _index(root, MASKS, problems)
    for key, path in masks.files.items():
        place = path.relative_to(root).as_posix()
        if path.suffix.lower() not in _LOSSLESS:
            rule = "is compressed with loss, which changes class indices"
            problems.append(Problem(place, None, "mask", rule, "save masks as palette or 8-bit grey PNG"))
        if key not in images.files:
            near = images.nearest(key)
            fix = f"did you mean the mask of '{near}'?" if near else f"add '{IMAGES}/{key}' or remove the mask"
            problems.append(Problem(place, None, "mask", "has no image of the same name", fix))
    return masks


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _NO_DATA:
                yield Path(place) / name


def _split_suffix(name: str) -> tuple[str, str]:
    """Name without its suffix, and the suffix in lower case; no suffix where it is none of an image."""
    suffix = PurePosixPath(name).suffix
    if suffix.lower() not in IMAGE_SUFFIXES:
        return name, ""
    return name.removesuffix(suffix), suffix.lower()


def _normal(name: str) -> str:
    # macOS writes file names with accents apart from their letters, spreadsheets don't
    return unicodedata.normalize("NFC", name)


def _classes(root: Path, table: Table, masked: bool, problems: list[Problem]) -> LabelSpace | None:
    path = root / CLASSES
    if path.is_file():
        labels = _read_classes(path, problems)
    else:
        names = tuple(dict.fromkeys(table.classes(TAG) or table.classes(PROPORTION)))
        labels = LabelSpace(names) if all(names) and names else None
        if labels is None and ((root / POINTS).is_file() or (root / POINTS_FOLDER).is_dir() or masked):
            rule = f"is missing, and {LABELS} has no tag: or proportion: columns that name the classes"
            problems.append(Problem(CLASSES, None, "file", rule, 'write {"names": ["...", "..."]}'))
    if labels is not None:
        check_label_columns(table, labels, problems)
    elif "image" not in table.columns:
        check_columns(table, ["image"], table.columns, problems)
    return labels


def _read_classes(path: Path, problems: list[Problem]) -> LabelSpace | None:
    fix = 'write {"names": ["gland", "stroma", "white"], "white": 2}'
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict) or not isinstance(value.get("names"), list):
            problems.append(Problem(CLASSES, None, "file", "has no list 'names'", fix))
            return None
        white, ignore = value.get("white"), value.get("ignore", IGNORE)
        if type(white) not in (int, type(None)) or type(ignore) is not int or not 0 <= ignore <= 255:
            rule = f"has white {white!r} and ignore {ignore!r}, which are an index or null, and a value in 0..255"
            problems.append(Problem(CLASSES, None, "file", rule, fix))
            return None
        return LabelSpace.from_dict(value)
    except json.JSONDecodeError as error:
        problems.append(Problem(CLASSES, error.lineno, "file", f"is no JSON ({error.msg})", fix))
    except InputError as error:
        problems.append(Problem(CLASSES, None, error.subject, error.rule, error.fix))
    except (OSError, TypeError, ValueError) as error:
        problems.append(Problem(CLASSES, None, "file", f"cannot be read ({error})", fix))
    return None


def _entries(
    table: Table, labels: LabelSpace | None, images: ImageIndex, masks: ImageIndex, problems: list[Problem]
) -> Iterator[Entry]:
    lines: dict[str, int] = {}
    groups: dict[str, dict[str, int]] = {}
    for row in table.rows:
        split = _split(row, problems)
        um_per_px = _um_per_px(row, table, problems)
        tags = tags_of(row, table, labels, problems) if labels else None
        proportions = proportions_of(row, table, labels, problems) if labels else None
        group = row.cells.get("group") or None
        if group and split:
            _check_group(group, split, row.line, groups, problems)
        key = _image(row, table, images, lines, problems)
        if key is None or split is None:
            continue
        path = images.files[key]
        record = Record(
            record_id(key), path, masks.files.get(key), tags, None, proportions, group=group, um_per_px=um_per_px
        )
        yield Entry(row.line, key + path.suffix, split, record)


def _image(row: Row, table: Table, images: ImageIndex, lines: dict[str, int], problems: list[Problem]) -> str | None:
    """Key of the image of a row; None where it is missing or had a row before."""
    image = image_of(row, table, problems)
    key = None if image is None else images.find(image)
    if image is None:
        return None
    if key is None:
        near = images.nearest(image)
        fix = f"did you mean '{near}'?" if near else f"add the file to {IMAGES}/ or remove the row"
        problems.append(Problem(LABELS, row.line, f"image '{image}'", f"is not in {IMAGES}/", fix))
        return None
    if key in lines:
        rule = f"stands in line {lines[key]} already"
        problems.append(Problem(LABELS, row.line, f"image '{image}'", rule, "keep one row per image"))
        return None
    lines[key] = row.line
    return key


def _split(row: Row, problems: list[Problem]) -> str | None:
    name = row.cells.get("split", "")
    if name.lower() not in _SPLIT_NAMES:
        rule = "is none of train, val (or valid), test"
        problems.append(Problem(LABELS, row.line, f"split '{name}'", rule, "use one of these; empty is train"))
        return None
    return _SPLIT_NAMES[name.lower()]


def _um_per_px(row: Row, table: Table, problems: list[Problem]) -> float | None:
    cell = row.cells.get("um_per_px", "")
    number = table.number(cell)
    if cell and not (number and number > 0):
        rule = f"is '{cell}', pixel sizes are positive micrometres"
        problems.append(Problem(LABELS, row.line, "um_per_px", rule, "write 0.5 for a 20x scan, or leave it empty"))
        return None
    return number


def _check_group(group: str, split: str, line: int, groups: dict[str, dict[str, int]], problems: list[Problem]) -> None:
    """Warn once for every further split in which a group occurs."""
    splits = groups.setdefault(group, {})
    if splits and split not in splits:
        first, place = next(iter(splits.items()))
        rule = f"is in {split} here and in {first} in line {place}: scores will be too good"
        problems.append(Problem(LABELS, line, f"group '{group}'", rule, "keep a patient in one split", "warning"))
    splits.setdefault(split, line)


def _points(
    root: Path, labels: LabelSpace, images: ImageIndex, ids: set[str], problems: list[Problem]
) -> dict[str, list[LabelledPoint]]:
    """Points by record id, from the table and from the GeoJSON files."""
    found: dict[str, list[LabelledPoint]] = {}
    table = read_table(root / POINTS, POINTS, problems) if (root / POINTS).is_file() else None
    for name, points in (points_of(table, labels, problems) if table is not None else {}).items():
        key = images.find(name)
        if key is None or record_id(key) not in ids:
            rule = f"is not in {LABELS}" if key else f"is not in {IMAGES}/"
            fix = f"add it to {LABELS} or remove its points"
            problems.append(Problem(POINTS, points[0].line, f"image '{name}'", rule, fix))
            continue
        found.setdefault(record_id(key), []).extend(points)
    for path in _walk(root / POINTS_FOLDER):
        if path.suffix.lower() != ".geojson":
            continue
        place = path.relative_to(root).as_posix()
        key = images.find(path.relative_to(root / POINTS_FOLDER).as_posix().removesuffix(path.suffix))
        points = parse_geojson(path, place, labels, problems)
        if key is None or record_id(key) not in ids:
            fix = f"name it as its image, and list that in {LABELS}"
            problems.append(Problem(place, None, "file", f"belongs to no image of {LABELS}", fix))
        elif record_id(key) in found:
            rule = f"gives points to an image that has points in {POINTS} or another file already"
            problems.append(Problem(place, None, "file", rule, "keep one source of points per image"))
        else:
            found[record_id(key)] = points
    return found


def _with_points(entry: Entry, points: list[LabelledPoint]) -> Entry:
    if not points:
        return entry
    return replace(entry, points=tuple(points), record=replace(entry.record, points=as_points(points)))


def _check_use(table: Table, entries: list[Entry], images: ImageIndex, problems: list[Problem]) -> None:
    """Images and rows that are there for nothing."""
    listed = {entry.record.image for entry in entries}
    mentioned = {images.find(row.cells["image"].replace("\\", "/")) for row in table.rows if row.cells.get("image")}
    for key, path in images.files.items():
        if path not in listed and key not in mentioned:
            place = f"{IMAGES}/{key}{path.suffix}"
            rule = f"is not listed in {LABELS} and is left out"
            problems.append(Problem(place, None, "image", rule, "add a row for it or remove it", "warning"))
    if not table.rows:
        problems.append(Problem(LABELS, None, "table", "lists no images", "write one row per image"))
    if entries and not any(entry.split == "train" for entry in entries):
        rule = "has no image in train"
        problems.append(Problem(LABELS, None, "table", rule, "mark images as train, unless you only score", "warning"))
    _check_hints(table, entries, problems)


def _check_hints(table: Table, entries: list[Entry], problems: list[Problem]) -> None:
    rows = {row.line: row for row in table.rows}
    hinted = {entry.line for entry in entries if entry.points or _has_hint_cells(rows[entry.line])}
    if not entries:
        return
    if not hinted:
        masked = any(entry.record.mask is not None for entry in entries)
        rule = "and its folder have no hint: no tags, proportions or points"
        fix = "add tag: columns, proportion: columns or points"
        if masked:
            fix = "add some, or derive them from the masks with 'tissuehint data weaken'"
        problems.append(Problem(LABELS, None, "table", rule, fix, "warning" if masked else "error"))
        return
    for entry in entries:
        tags = entry.record.tags
        if entry.split != "train":
            continue
        if entry.line not in hinted:
            rule = "is a training image without any hint"
            fix = "give it tags, proportions or points, or remove the row"
            problems.append(Problem(LABELS, entry.line, f"image '{entry.image}'", rule, fix, "warning"))
        elif tags is not None and not tags.values.any():
            rule = "has no tag that is 1: no class to learn from it"
            fix = "tag what occurs; leave the cells empty where unknown"
            problems.append(Problem(LABELS, entry.line, f"image '{entry.image}'", rule, fix, "warning"))


def _has_hint_cells(row: Row) -> bool:
    return any(cell for column, cell in row.cells.items() if column.startswith((TAG, PROPORTION)))


def _notes(root: Path, problems: list[Problem]) -> tuple[str, ...]:
    path = root / NOTES
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        problems.append(Problem(NOTES, None, "file", "cannot be read as UTF-8 text", "save it as UTF-8 text"))
        return ()
    return tuple(line.strip() for line in lines if line.strip())
