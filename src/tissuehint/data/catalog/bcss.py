"""BCSS: regions of 151 breast cancer slides with 22 mask codes, merged to four classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tissuehint.data.catalog.base import CatalogEntry, Splits, make_dataset, record_id
from tissuehint.data.catalog.grouping import assign, by_group, split_groups, tcga_patient
from tissuehint.data.catalog.layouts import MASK_FOLDERS, code_table, filled, find_root, pair_masks, subfolder
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.labels import IGNORE, LabelSpace

LABELS = LabelSpace(
    ("tumour", "stroma", "inflammatory infiltrate", "necrosis"), ((255, 0, 0), (0, 255, 0), (0, 0, 255), (153, 0, 255))
)
# meta/gtruth_codes.tsv of the release
CODE_NAMES = (
    "outside_roi",
    "tumor",
    "stroma",
    "lymphocytic_infiltrate",
    "necrosis_or_debris",
    "glandular_secretions",
    "blood",
    "exclude",
    "metaplasia_NOS",
    "fat",
    "plasma_cells",
    "other_immune_infiltrate",
    "mucoid_material",
    "normal_acinus_or_duct",
    "lymphatics",
    "undetermined",
    "nerve",
    "skin_adnexa",
    "blood_vessel",
    "angioinvasion",
    "dcis",
    "other",
)
MERGE = {
    "tumor": 0,
    "angioinvasion": 0,
    "dcis": 0,
    "stroma": 1,
    "lymphocytic_infiltrate": 2,
    "plasma_cells": 2,
    "other_immune_infiltrate": 2,
    "necrosis_or_debris": 3,
}
CODES = {code: MERGE.get(name, IGNORE) for code, name in enumerate(CODE_NAMES)}
# a code beyond the table must not pass for a class; 22..254 stay and are reported
DECODE = code_table(CODES)
UM_PER_PX = 0.25
IMAGE_FOLDERS = ("rgbs_colorNormalized", "rgbs", "images", "img")
# tissue source sites that Amgad et al. keep for testing
TEST_SITES = ("OL", "LL", "E2", "EW", "GM", "S3")
LAYOUT = """
rgbs_colorNormalized/<TCGA name>.png (or rgbs/, images/)
masks/<TCGA name>.png, codes 0..21
"""


def read_bcss(root: Path, scheme: str) -> TissueDataset:
    """Read the BCSS regions, with the test sites of the authors or split by patient."""
    root = find_root(root, lambda folder: any((folder / name).is_dir() for name in IMAGE_FOLDERS))
    images = filled(subfolder(root, IMAGE_FOLDERS, LAYOUT), LAYOUT)
    pairs = pair_masks(images, subfolder(root, MASK_FOLDERS[::-1], LAYOUT))
    records = [_record(image, mask) for image, mask in pairs]
    notes = ["mask codes merged to four classes; outside_roi, exclude and all rarer tissues are ignored"]
    if len(records) != 151:
        notes.append(f"this copy has {len(records)} of the 151 published regions")
    if scheme == "patient":
        notes.append("split 7:1:2 by patient")
        return make_dataset("bcss", LABELS, _shared_out(records, {"train": 7, "val": 1, "test": 2}), notes)
    test = tuple(record for record in records if str(record.group).split("-")[1] in TEST_SITES)
    rest = [record for record in records if str(record.group).split("-")[1] not in TEST_SITES]
    notes.append(f"test holds the sites {', '.join(TEST_SITES)}; val is an eighth of the other patients")
    return make_dataset("bcss", LABELS, {**_shared_out(rest, {"train": 7, "val": 1}), "test": test}, notes)


def _record(image: Path, mask: Path) -> Record:
    patient = tcga_patient(image.stem)
    if patient is None:
        raise InputError(image, "has no TCGA patient at the start of its name", "restore the official file name")
    return Record(record_id(image.stem), image, mask, group=patient, um_per_px=UM_PER_PX, decode=DECODE)


def _shared_out(records: list[Record], ratio: dict[str, float]) -> Splits:
    groups = by_group(records)
    strata = {patient: Counter({"regions": len(members)}) for patient, members in groups.items()}
    return assign(groups, split_groups(strata, ratio))


ENTRY = CatalogEntry(
    name="bcss",
    title="BCSS, breast cancer semantic segmentation (regions)",
    labels=LABELS,
    splits=("site", "patient"),
    hints=(),
    licence="CC0 1.0",
    citation=(
        "Amgad et al., Structured crowdsourcing enables convolutional segmentation of histology images,"
        " Bioinformatics 35, 2019"
    ),
    layout=LAYOUT,
    reader=read_bcss,
    um_per_px=UM_PER_PX,
    published={
        "pbip": {"miou": 0.5528, "fwiou": 0.5630, "dice_from_miou": 0.7120},
        "sam-path, full masks": {"miou": 0.6327, "fwiou": 0.6335},
    },
)
