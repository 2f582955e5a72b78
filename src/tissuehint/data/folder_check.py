"""Every problem of a data folder in one pass, with file and line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.folder_layout import IMAGES, LABELS, MASKS, Entry, parse_folder
from tissuehint.data.records import Image, Mask, read_codes, read_image
from tissuehint.data.tables import Problem, check_points
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

__all__ = ["Problem", "check_folder"]

TAG_CONTRADICTION = 0.05
"""Share of the image that a class covers in the mask while its tag is 0; below it, tags with a threshold differ."""
PROPORTION_CONTRADICTION = 0.25
"""Difference between a proportion and the mask that no estimate by eye explains."""
_CONTRADICTION_FIX = "correct the hint or the mask"


def check_folder(root: Path) -> list[Problem]:
    """Find all problems of a data folder; never stops at the first.

    Every listed image and its mask is decoded in full. Tables, classes and points are parsed by the code that
    ``read_folder`` uses; a folder without errors here is one that it reads.

    Args:
        root: the folder, laid out as docs/how-to/own-data.md says.

    Returns:
        Errors and warnings: tables and layout first, then image by image. Empty for a folder without problems.
    """
    problems: list[Problem] = []
    contents = parse_folder(root, problems)
    masked = any(entry.record.mask is not None for entry in contents.entries)
    check = partial(_check_entry, root=root, labels=contents.labels, masked=masked)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding leaves the interpreter lock
        for found in pool.map(check, contents.entries):
            problems += found
    return list(dict.fromkeys(problems))


def _check_entry(entry: Entry, *, root: Path, labels: LabelSpace | None, masked: bool) -> list[Problem]:
    problems: list[Problem] = []
    image = _read(entry.record.image, f"{IMAGES}/{entry.image}", "image", problems)
    size = None if image is None else (image.shape[0], image.shape[1])
    if labels is not None:
        check_points(entry.points, size, labels, problems)
    path = entry.record.mask
    if isinstance(path, Path):
        place = path.relative_to(root).as_posix()
        mask = _read(path, place, "mask", problems)
        if mask is not None and size is not None and mask.shape != size:
            rule = f"is {mask.shape[0]} x {mask.shape[1]} pixels (height x width), its image {size[0]} x {size[1]}"
            problems.append(Problem(place, None, "mask", rule, "give a mask of the size of its image"))
        if mask is not None and labels is not None and _check_values(mask, place, labels, problems):
            problems += _contradictions(entry, mask, labels)
    elif masked and entry.split != "train":
        rule = f"is a {entry.split} image without a mask: it cannot be scored"
        fix = f"add it to {MASKS}/, or put the image into train"
        problems.append(Problem(f"{IMAGES}/{entry.image}", None, "image", rule, fix, "warning"))
    return problems


def _read(source: Path | Image | Mask, place: str, kind: str, problems: list[Problem]) -> Image | Mask | None:
    if not isinstance(source, Path):
        return source
    try:
        return read_image(source) if kind == "image" else read_codes(source)
    except InputError as error:
        problems.append(Problem(place, None, kind, error.rule.removeprefix("mask "), error.fix))
    except Exception as error:  # one file that breaks its decoder must not hide the problems of the others
        rule = f"cannot be decoded ({type(error).__name__}: {error})"
        problems.append(Problem(place, None, kind, rule, "replace the file"))
    return None


def _check_values(mask: Mask, place: str, labels: LabelSpace, problems: list[Problem]) -> bool:
    """Whether all mask values are classes or ignore."""
    values, counts = np.unique(mask, return_counts=True)
    known = (values < labels.num_classes) | (values == labels.ignore)
    if set(values.tolist()) == {0, labels.ignore}:
        rule = f"has the values 0 and {labels.ignore} only, and {labels.ignore} means unlabelled"
        fix = f"write 1 where you mean class '{labels.names[min(1, labels.num_classes - 1)]}'"
        problems.append(Problem(place, None, "mask", rule, fix, "warning"))
    if known.all():
        return True
    found = ", ".join(f"{v} ({n} px)" for v, n in zip(values[~known][:5], counts[~known][:5], strict=True))
    more = f" and {(~known).sum() - 5} more" if (~known).sum() > 5 else ""
    rule = f"has values that are no class: {found}{more}; classes are 0..{labels.num_classes - 1}"
    fix = f"write class indices, {labels.ignore} for unlabelled; name all classes in classes.json"
    problems.append(Problem(place, None, "mask", rule, fix))
    return False


def _contradictions(entry: Entry, mask: Mask, labels: LabelSpace) -> Iterator[Problem]:
    """Warnings where a hint and the mask of its image don't agree."""
    counts = np.bincount(mask[mask != labels.ignore].reshape(-1), minlength=labels.num_classes)
    rules = [*_tag_contradictions(entry, counts, mask.size, labels), *_proportion_contradictions(entry, counts, labels)]
    for rule in rules:
        yield Problem(LABELS, entry.line, f"image '{entry.image}'", rule, _CONTRADICTION_FIX, "warning")
    for point in entry.points:
        inside = point.row < mask.shape[0] and point.column < mask.shape[1]
        value = int(mask[point.row, point.column]) if inside else labels.ignore
        if value not in (point.label, labels.ignore):
            rule = f"is {labels.names[point.label]}, but the mask has {labels.names[value]} there"
            yield Problem(point.file, point.line, point.subject, rule, _CONTRADICTION_FIX, "warning")


def _tag_contradictions(entry: Entry, counts: NDArray[np.int64], pixels: int, labels: LabelSpace) -> Iterator[str]:
    total = int(counts.sum())
    if entry.record.tags is None or not total:
        return
    for name, tag, count in zip(labels.tissue, entry.record.tags.values, counts, strict=False):
        if not tag and count / total > TAG_CONTRADICTION:
            yield f"has no tag '{name}', but its mask has {count / total:.0%} of it"
        if tag and not count and total == pixels:
            yield f"has tag '{name}', but its mask has none of it"


def _proportion_contradictions(entry: Entry, counts: NDArray[np.int64], labels: LabelSpace) -> Iterator[str]:
    tissue = counts[: labels.num_tissue]
    if entry.record.proportions is None or not tissue.any():
        return
    for name, given, share in zip(labels.tissue, entry.record.proportions.values, tissue / tissue.sum(), strict=True):
        if abs(given - share) > PROPORTION_CONTRADICTION:
            yield f"has {given:.0%} '{name}', but its mask {share:.0%} of the tissue"
