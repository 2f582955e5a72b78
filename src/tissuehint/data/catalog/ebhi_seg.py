"""EBHI-Seg: glands in enteroscope biopsies of the colon, six diagnoses."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tissuehint.data.catalog.base import CatalogEntry, Splits, layout_error, make_dataset, record_id
from tissuehint.data.catalog.grouping import assign, by_group, split_groups
from tissuehint.data.catalog.layouts import filled, find_root, masks_by_stem, threshold
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

LABELS = LabelSpace(("non-gland", "gland"), ((64, 128, 0), (0, 64, 128)))
CLASSES = ("Adenocarcinoma", "High-grade IN", "Low-grade IN", "Normal", "Polyp", "Serrated adenoma")
# the only sum of official label counts that gives the 1169 images of Feng et al.: 637 + 474 + 58
GLAND_PAPER_CLASSES = ("Low-grade IN", "Polyp", "Serrated adenoma")
SEVEN_ONE_TWO = {"train": 7, "val": 1, "test": 2}
CASE_TABLE = "split_by_case.csv"
LAYOUT = """
<class>/image/<case>-<slide>-400-<n>.png
<class>/label/<case>-<slide>-400-<n>.png
split_by_case.csv (class, file, case, split; optional)
"""

Key = tuple[str, str]  # class folder, stem


def read_ebhi_seg(root: Path, scheme: str) -> TissueDataset:
    """Read EBHI-Seg, split by case."""
    root = find_root(root, lambda folder: any((folder / name).is_dir() for name in CLASSES))
    chosen = GLAND_PAPER_CLASSES if scheme == "gland_paper" else CLASSES
    folders = [name for name in chosen if (root / name).is_dir()]
    if not folders:
        raise layout_error(root, f"has none of the class folders {', '.join(chosen)}", LAYOUT)
    records, notes = _records(root, folders)
    absent = [name for name in chosen if name not in folders]
    notes += [f"this copy lacks the class folders {', '.join(absent)}"] if absent else []
    if scheme == "gland_paper":
        notes.append("the three classes of the gland paper by their counts (reconstructed), 7:1:2 by case")
        return make_dataset("ebhi_seg", LABELS, _seven_one_two(records), notes)
    table = _read_case_table(root / CASE_TABLE)
    if table:
        splits, more = _by_table(records, table, root / CASE_TABLE)
        return make_dataset("ebhi_seg", LABELS, splits, [*notes, *more])
    notes.append(f"no {CASE_TABLE}: split 7:1:2 by case, stratified by class")
    return make_dataset("ebhi_seg", LABELS, _seven_one_two(records), notes)


def _case(stem: str) -> str:
    """The case of an image: the first field, without regard to case, since GTXC2014134 also occurs as GTxc2014134."""
    return stem.split("-")[0].upper()


def _records(root: Path, folders: Sequence[str]) -> tuple[dict[Key, Record], list[str]]:
    records: dict[Key, Record] = {}
    without: list[str] = []
    for folder in folders:
        for part in ("image", "label"):
            if not (root / folder / part).is_dir():
                raise layout_error(root / folder / part, "is missing", LAYOUT)
        masks = masks_by_stem(root / folder / "label")
        for image in filled(root / folder / "image", LAYOUT):
            if image.stem not in masks:
                without.append(f"{folder}/{image.name}")
                continue
            record = Record(
                record_id(folder, image.stem), image, masks[image.stem], group=_case(image.stem), decode=threshold
            )
            if (folder, image.stem) in records:
                raise InputError(image, f"has the same name as {records[folder, image.stem].image}", "remove one")
            records[folder, image.stem] = record
    if not records:
        raise layout_error(root / folders[0] / "label", "has no mask for any image", LAYOUT)
    counts = Counter(folder for folder, _ in records)
    notes = ["images by class: " + ", ".join(f"{name} {counts[name]}" for name in folders)]
    if without:  # the release itself has two
        notes.append(f"{len(without)} images have no label and are left out: {', '.join(without[:5])}")
    return records, notes


def _strata(records: Iterable[tuple[Key, Record]]) -> dict[str, Counter[str]]:
    strata: dict[str, Counter[str]] = {}
    for (folder, _), record in records:
        strata.setdefault(str(record.group), Counter())[folder] += 1
    return strata


def _seven_one_two(records: dict[Key, Record]) -> Splits:
    return assign(by_group(records.values()), split_groups(_strata(records.items()), SEVEN_ONE_TWO))


def _read_case_table(path: Path) -> dict[Key, str]:
    """``train`` or ``val`` of each image; empty without a file."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
        reader = csv.DictReader(handle, skipinitialspace=True)
        lacking = [name for name in ("class", "file", "split") if name not in (reader.fieldnames or ())]
        if lacking:
            raise InputError(f"{path}:1", f"has no column '{lacking[0]}'", "restore the header class,file,case,split")
        table = {}
        for number, row in enumerate(reader, start=2):
            folder, file, split = ((row[name] or "").strip() for name in ("class", "file", "split"))
            if split not in ("train", "val"):
                raise InputError(f"{path}:{number}", f"has the split '{split}'", "write train or val")
            table[folder, Path(file).stem] = split
    return table


def _by_table(records: dict[Key, Record], table: dict[Key, str], path: Path) -> tuple[Splits, list[str]]:
    """The listed validation cases become the test split; an eighth of the training cases becomes validation."""
    for key, record in records.items():
        if key not in table:
            raise InputError(path, f"has no row for {record.image}", f"add one, or remove {CASE_TABLE}")
    test = tuple(record for key, record in records.items() if table[key] == "val")
    tested = {record.group for record in test}
    rest = [(key, record) for key, record in records.items() if table[key] == "train"]
    usable = [(key, record) for key, record in rest if record.group not in tested]
    home = split_groups(_strata(usable), {"train": 7, "val": 1})
    splits = assign(by_group(record for _, record in usable), home)
    notes = [f"test is the val list of {CASE_TABLE}; val is an eighth of its train cases, stratified by class"]
    if len(usable) < len(rest):
        notes.append(
            f"{len(rest) - len(usable)} train images are left out: their case is in test under a name that differs in"
            " upper and lower case only"
        )
    return {**splits, "test": tuple(sorted(test, key=lambda record: record.id))}, notes


ENTRY = CatalogEntry(
    name="ebhi_seg",
    title="EBHI-Seg, enteroscope biopsy histopathological images for segmentation",
    labels=LABELS,
    splits=("case", "gland_paper"),
    hints=(),
    licence="CC BY 4.0",
    citation=(
        "Shi et al., EBHI-Seg: A novel enteroscope biopsy histopathological hematoxylin and eosin image dataset for"
        " image segmentation tasks, Frontiers in Medicine 10, 2023"
    ),
    layout=LAYOUT,
    reader=read_ebhi_seg,
    published={
        "gland": {"miou": 0.7736, "dice_from_miou": 0.8724},
        "gland, full masks": {"miou": 0.7843, "dice_from_miou": 0.8789},
        "oeem": {"miou": 0.7579, "dice_from_miou": 0.8626},
    },
)
