"""GlaS: glands in colon sections, the Gland Segmentation Challenge of MICCAI 2015.

Masks hold instance numbers; every instance is gland. OEEM numbers the classes non-gland 0, gland 1, Feng et al. the
other way round; here gland is 1.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.catalog.base import CatalogEntry, Splits, layout_error, make_dataset
from tissuehint.data.catalog.grouping import assign, by_group, split_groups
from tissuehint.data.catalog.layouts import find_root, masks_by_stem, missing_mask
from tissuehint.data.records import Record, TissueDataset, list_images
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

LABELS = LabelSpace(("non-gland", "gland"), ((64, 128, 0), (0, 64, 128)))
UM_PER_PX = 0.62
LAST_TRAIN_IMAGE = 70  # train_71 .. train_85 are validation in OEEM and Feng et al.
COUNTS = {"train": 70, "val": 15, "test": 80}
LAYOUT = """
train_<1..85>.bmp with train_<n>_anno.bmp
testA_<1..60>.bmp with testA_<n>_anno.bmp
testB_<1..20>.bmp with testB_<n>_anno.bmp
Grade.csv (name, patient ID, grade)
"""

_NAME = re.compile(r"(train|testA|testB)_(\d+)", re.IGNORECASE)


def instances_are_gland(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """1 where an instance number stands, 0 elsewhere."""
    return (codes > 0).astype(np.uint8)


def read_glas(root: Path, scheme: str) -> TissueDataset:
    """Read GlaS with the split of the papers, or with one that keeps patients apart."""
    root = find_root(root, lambda folder: any(_NAME.fullmatch(path.stem) for path in list_images(folder)))
    images = sorted(
        (path for path in list_images(root) if _NAME.fullmatch(path.stem)), key=lambda path: _order(path.stem)
    )
    if not images:
        raise layout_error(root, "has no image train_<n>, testA_<n> or testB_<n>", LAYOUT)
    table = _read_grades(root / "Grade.csv")
    masks = masks_by_stem(root)
    records = [_record(path, masks, table, root) for path in images]
    if scheme == "paper":
        counts = {name: COUNTS[name] for name in ("train", "val")}  # the notes say more about test
        return make_dataset("glas", LABELS, _paper(records), _paper_notes(records, table), counts)
    if not table:
        raise layout_error(root / "Grade.csv", "is missing, the scheme 'patient' takes the patients from it", LAYOUT)
    return _by_patient(records, table)


def _order(stem: str) -> tuple[str, int]:
    prefix, number = stem.split("_")
    return prefix.lower(), int(number)


def _record(image: Path, masks: dict[str, Path], table: dict[str, tuple[str, str]], root: Path) -> Record:
    stem = f"{image.stem}_anno"
    if stem not in masks:
        raise missing_mask(image, root, stem)
    if table and image.stem.lower() not in table:
        raise InputError(root / "Grade.csv", f"has no row for {image.stem}", "add its patient and grade")
    patient = table[image.stem.lower()][0] if table else None
    return Record(image.stem, image, masks[stem], group=patient, um_per_px=UM_PER_PX, decode=instances_are_gland)


def _read_grades(path: Path) -> dict[str, tuple[str, str]]:
    """Patient and grade by lower-case image name; empty without a file. The official file has stray spaces."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
        rows = [[cell.strip() for cell in row] for row in csv.reader(handle)]
    header = [cell.lower() for cell in rows[0]] if rows else []
    name = _column(path, header, "name", lambda cell: cell == "name")
    patient = _column(path, header, "patient ID", lambda cell: cell.startswith("patient"))
    grade = _column(path, header, "grade", lambda cell: cell.startswith("grade"))
    table = {}
    for number, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) <= max(name, patient, grade) or not row[name] or not row[patient] or not row[grade]:
            raise InputError(f"{path}:{number}", "lacks a name, a patient or a grade", "fill the row in")
        table[row[name].lower()] = (row[patient], row[grade].lower())
    return table


def _column(path: Path, header: list[str], name: str, fits: Callable[[str], bool]) -> int:
    for index, cell in enumerate(header):
        if fits(cell):
            return index
    raise InputError(f"{path}:1", f"has no column '{name}'", "restore the header 'patient ID,name,grade'")


def _paper(records: list[Record]) -> Splits:
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for record in records:
        prefix, number = _order(record.id)
        split = "test" if prefix != "train" else "train" if number <= LAST_TRAIN_IMAGE else "val"
        splits[split].append(record)
    return {name: tuple(members) for name, members in splits.items()}


def _paper_notes(records: list[Record], table: dict[str, tuple[str, str]]) -> list[str]:
    parts = Counter(_order(record.id)[0] for record in records)
    notes = ["split of the papers: train_1..70, train_71..85, testA and testB"]
    if parts["testa"] < 60 or parts["testb"] < 20:
        notes.append(f"test holds {parts['testa']} of 60 testA and {parts['testb']} of 20 testB images")
    if not table:
        notes.append("no Grade.csv: patients are unknown, and in the official release they overlap between splits")
    return notes


def _by_patient(records: list[Record], table: dict[str, tuple[str, str]]) -> TissueDataset:
    """Patients from the table, not from the images at hand: a copy without testB gets the same split of patients."""
    strata: dict[str, Counter[str]] = {}
    for patient, grade in table.values():
        strata.setdefault(patient, Counter())[grade] += 1
    home = split_groups(strata, COUNTS)
    splits = assign(by_group(records), home)
    patients = sorted(home, key=lambda patient: (len(patient), patient))
    shown = "; ".join(f"{name} {', '.join(p for p in patients if home[p] == name)}" for name in splits)
    note = f"split by patient, stratified by grade, over all {len(records)} images at hand: {shown}"
    return make_dataset("glas", LABELS, splits, [f"{note}; not comparable with scores on testA and testB"])


ENTRY = CatalogEntry(
    name="glas",
    title="GlaS, Gland Segmentation in Colon Histology Images Challenge",
    labels=LABELS,
    splits=("paper", "patient"),
    hints=(),
    licence="research only, no redistribution",
    citation=(
        "Sirinukunwattana et al., Gland segmentation in colon histology images: The GlaS challenge contest,"
        " Medical Image Analysis 35, 2017"
    ),
    layout=LAYOUT,
    reader=read_glas,
    mean=(0.787, 0.511, 0.785),
    std=(0.167, 0.248, 0.131),
    um_per_px=UM_PER_PX,
    counts=COUNTS,
    published={
        "gland": {"miou": 0.8044, "dice_from_miou": 0.8916},
        "gland, full masks": {"miou": 0.8062, "dice_from_miou": 0.8927},
        "oeem": {"miou": 0.7648, "dice_from_miou": 0.8667},
    },
)
