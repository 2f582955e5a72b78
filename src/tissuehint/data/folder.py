"""Your own data: a folder of images with a table of hints, read, written and simulated.

The layout is that of docs/how-to/own-data.md; ``folder_check`` lists everything that breaks it.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tissuehint.data.folder_layout import (
    CLASSES,
    IMAGES,
    LABELS,
    MASKS,
    NOTES,
    POINTS,
    SPLITS,
    FolderContents,
    parse_folder,
)
from tissuehint.data.records import Record, TissueDataset
from tissuehint.data.tables import POINT_COLUMNS, PROPORTION, TABLE_COLUMNS, TAG, Problem, check_points, refuse
from tissuehint.data.weak import DEFAULT_EROSION, image_seed, points_from_mask, proportions_from_mask, tags_from_mask
from tissuehint.errors import InputError
from tissuehint.files import atomic_path, write_json, write_palette_png, write_text
from tissuehint.labels import LabelSpace


def read_folder(root: Path) -> TissueDataset:
    """Read a data folder: images, a table of hints, and masks and points where there are some.

    Images are decoded when they are used, not here. An image is named by its path below ``images/`` with or without
    suffix; its id is that path without suffix, folders joined by two underscores.

    Args:
        root: folder with ``images/`` and ``labels.csv``.

    Returns:
        The data set, named as the folder, with the splits train, val and test (``valid`` is read as ``val``).

    Raises:
        InputError: the first error, with file and line; where there are more, their number and how to list them.
    """
    problems: list[Problem] = []
    contents = parse_folder(root, problems)
    _check_points_inside(contents, problems)
    advice = f" ({{count}} errors in all, 'tissuehint data check {root}' lists them)"
    refuse(problems, root, advice)
    if contents.labels is None:
        rule = "does not say which classes there are"
        raise InputError(root / LABELS, rule, f"name them in tag: or proportion: columns or in {CLASSES}")
    splits = {split: tuple(entry.record for entry in contents.entries if entry.split == split) for split in SPLITS}
    return TissueDataset(root.resolve().name, contents.labels, splits, contents.notes)


def write_folder(dataset: TissueDataset, root: Path) -> None:
    """Write a data set as a data folder that ``read_folder`` reads back.

    Image files are copied as they are, images in memory become PNG; masks become palette PNG of class indices. Every
    file is written whole or not at all, and ``labels.csv`` comes last, so a folder that has one is complete.

    Args:
        dataset: what to write.
        root: the new folder.

    Raises:
        InputError: the folder has a ``labels.csv`` already; an image or a mask is broken.
        OSError: a full disk.
    """
    if (root / LABELS).exists():
        raise InputError(root / LABELS, "exists already", "give another folder, or remove the file first")
    for _, record in _records(dataset):
        _write_image(record, root / IMAGES / _image_name(record))
        if record.mask is not None:
            mask = record.read_mask(dataset.labels)
            write_palette_png(root / MASKS / f"{record.id}.png", mask, dataset.labels.palette())
    write_json(root / CLASSES, dataset.labels.to_dict())
    if dataset.notes:
        write_text(root / NOTES, "".join(f"{note}\n" for note in dataset.notes))
    if any(record.points is not None for _, record in _records(dataset)):
        write_points_table(root / POINTS, dataset)
    write_labels_table(root / LABELS, dataset)


def write_labels_table(path: Path, dataset: TissueDataset) -> None:
    """Write ``labels.csv`` atomically: image, split, group, tags, proportions, pixel size.

    Columns of a hint are there where at least one image has it; cells are empty where an image has none.

    Args:
        path: file to write.
        dataset: images and hints.
    """
    labels = dataset.labels
    tagged = any(record.tags is not None for _, record in _records(dataset))
    measured = any(record.proportions is not None for _, record in _records(dataset))
    image, split, group, um_per_px = TABLE_COLUMNS
    header = [image, split, group]
    header += [TAG + name for name in labels.tissue] if tagged else []
    header += [PROPORTION + name for name in labels.tissue] if measured else []
    rows = [[*header, um_per_px]]
    for split, record in _records(dataset):
        row = [_image_name(record), split, record.group or ""]
        row += _tag_cells(record, labels) if tagged else []
        row += _proportion_cells(record, labels) if measured else []
        rows.append([*row, "" if record.um_per_px is None else f"{record.um_per_px:.10g}"])
    write_text(path, _csv(rows))


def write_points_table(path: Path, dataset: TissueDataset) -> None:
    """Write ``points.csv`` atomically: image, row, column, class name, one point a row.

    Args:
        path: file to write.
        dataset: images and points.
    """
    rows = [list(POINT_COLUMNS)]
    for _, record in _records(dataset):
        for row, column, label in () if record.points is None else record.points.rows:
            rows.append([_image_name(record), str(row), str(column), dataset.labels.names[label]])
    write_text(path, _csv(rows))


def weaken(
    dataset: TissueDataset,
    out: Path,
    *,
    tag_threshold: float = 0.0,
    points_per_class: int = 2,
    erosion: int = DEFAULT_EROSION,
    round_to: float | None = None,
    noise: float | None = None,
    seed: int = 0,
) -> None:
    """Simulate all hints from the masks of a data set and write it, hints and masks and images, as a data folder.

    Tags, points and proportions come from ``tags_from_mask``, ``points_from_mask`` and ``proportions_from_mask``; hints
    that the data set had are dropped. An image without tissue gets no proportions. The seed of an image depends on
    ``seed`` and its id alone, so the hints of an image stay the same when others come or go. ``notes.txt`` says how
    the hints were made.

    Args:
        dataset: every record needs a mask.
        out: new folder.
        tag_threshold: share of the image area that a class must exceed.
        points_per_class: points in each class of each image.
        erosion: px between a point and the border of its class, where there is room.
        round_to: step of the proportions, None for exact ones.
        noise: of the proportions, see ``proportions_from_mask``.
        seed: of points and noise.

    Raises:
        InputError: a record without mask, an option out of range, a folder that has a ``labels.csv`` already.
        OSError: a full disk.
    """
    if (out / LABELS).exists():
        raise InputError(out / LABELS, "exists already", "give another folder, or remove the file first")
    labels = dataset.labels

    def hinted(record: Record) -> Record:
        if record.mask is None:
            fix = "take only images that have masks"
            raise InputError(record.id, "has no mask to derive hints from", fix)
        mask = record.read_mask(labels)
        own_seed = image_seed(seed, record.id)
        proportions = None
        if (mask < labels.num_tissue).any():
            proportions = proportions_from_mask(mask, labels, round_to=round_to, noise=noise, seed=own_seed)
        tags = tags_from_mask(mask, labels, tag_threshold)
        points = points_from_mask(mask, labels, points_per_class, seed=own_seed, erosion=erosion)
        return replace(record, tags=tags, points=points, proportions=proportions)

    splits = {split: tuple(hinted(record) for record in records) for split, records in dataset.splits.items()}
    note = (
        f"hints simulated from masks (seed {seed}): tags above {tag_threshold:.0%} of the area; {points_per_class} "
        f"points per class, erosion {erosion} px; proportions rounded to {round_to or 'nothing'}, noise {noise or 0:g}"
    )
    write_folder(replace(dataset, splits=splits, notes=(*dataset.notes, note)), out)


def _check_points_inside(contents: FolderContents, problems: list[Problem]) -> None:
    if contents.labels is None:
        return
    for entry in contents.entries:
        if not entry.points:
            continue
        try:
            size = entry.record.size()
        except InputError as error:
            problems.append(Problem(f"{IMAGES}/{entry.image}", None, "image", error.rule, error.fix))
            continue
        check_points(entry.points, size, contents.labels, problems)


def _records(dataset: TissueDataset) -> Iterator[tuple[str, Record]]:
    for split, records in dataset.splits.items():
        for record in records:
            yield split, record


def _image_name(record: Record) -> str:
    return record.id + (record.image.suffix.lower() if isinstance(record.image, Path) else ".png")


def _write_image(record: Record, target: Path) -> None:
    with atomic_path(target) as part:
        if isinstance(record.image, Path):
            if not record.image.is_file():
                raise InputError(record.image, "does not exist", "check the path")
            shutil.copyfile(record.image, part)
        else:
            from PIL import Image

            Image.fromarray(record.image).save(part, format="PNG")


def _tag_cells(record: Record, labels: LabelSpace) -> list[str]:
    return [""] * labels.num_tissue if record.tags is None else [str(value) for value in record.tags.values]


def _proportion_cells(record: Record, labels: LabelSpace) -> list[str]:
    if record.proportions is None:
        return [""] * labels.num_tissue
    return [f"{value:.10g}" for value in record.proportions.values]


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
