"""WSSS4LUAD: lung adenocarcinoma, tumour, stroma and normal tissue, image tags for training."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.catalog.base import CatalogEntry, layout_error, make_dataset, record_id, tags_from_name
from tissuehint.data.catalog.grouping import assign, by_group, split_groups
from tissuehint.data.catalog.layouts import empty_tags_notes, filled, find_root, masks_by_stem, missing_mask, pair_masks
from tissuehint.data.records import Record, TissueDataset, as_indices, read_codes
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

LABELS = LabelSpace(
    ("tumour", "stroma", "normal", "white"), ((0, 64, 128), (64, 128, 0), (243, 152, 0), (255, 255, 255)), white=3
)
ORDER = (0, 1, 2)  # file-name bits: tumour, stroma, normal
WHITE = 3
UM_PER_PX = 1.0  # 10x, nominal
TRAINING, VALIDATION, TESTING = "1.training", "2.validation", "3.testing"
COUNTS = {"train": 10091, "val": 40, "test": 80}
LAYOUT = """
1.training/<patient>-<x>-<y>-[1, 0, 0].png
2.validation/img/<n>.png
2.validation/mask/<n>.png
2.validation/background-mask/<n>.png
3.testing/{img,mask,background-mask}/<n>.png
"""


def with_background(codes: NDArray[np.uint8], background: Path) -> NDArray[np.uint8]:
    """The mask with white wherever the background mask is 1.

    Raises:
        InputError: the background mask is unreadable, has another size, or a value beside 0 and 1.
    """
    white = read_codes(background)
    if white.shape != codes.shape:
        rule = f"is {white.shape[0]} x {white.shape[1]} pixels, its mask {codes.shape[0]} x {codes.shape[1]}"
        raise InputError(background, rule, "give both the size of the image")
    if white.max(initial=0) > 1:
        rule = f"has value {white.max()}, background masks are 0 (tissue) and 1 (white)"
        raise InputError(background, rule, "restore the official file")
    return np.where(white == 1, np.uint8(WHITE), codes)


def read_wsss4luad(root: Path, scheme: str) -> TissueDataset:
    """Read WSSS4LUAD in its official folders, or the validation regions shared out to train and val."""
    root = find_root(root, lambda folder: (folder / VALIDATION).is_dir())
    val, test = _regions(root, VALIDATION), _regions(root, TESTING)
    if scheme == "regions":
        return _from_regions([*val], test)
    if not (root / TRAINING).is_dir():
        raise layout_error(root / TRAINING, "is missing", LAYOUT)
    train = tuple(_patch(path) for path in filled(root / TRAINING, LAYOUT))
    splits = {"train": train, "val": val, "test": test}
    return make_dataset("wsss4luad", LABELS, splits, empty_tags_notes(splits), COUNTS)


def _patch(path: Path) -> Record:
    tags = tags_from_name(path, ORDER, LABELS)
    patient = path.stem.split("-")[0]
    return Record(record_id("training", path.stem), path, tags=tags, group=patient, um_per_px=UM_PER_PX)


def _regions(root: Path, folder: str) -> tuple[Record, ...]:
    base = root / folder
    for part in ("img", "mask"):
        if not (base / part).is_dir():
            raise layout_error(base / part, "is missing", LAYOUT)
    whites = masks_by_stem(base / "background-mask") if (base / "background-mask").is_dir() else None
    records = []
    for image, mask in pair_masks(filled(base / "img", LAYOUT), base / "mask"):
        if whites is not None and image.stem not in whites:
            raise missing_mask(image, base / "background-mask")
        # the masks of some copies already say 3 for white, those of others leave it to the background mask
        decode = as_indices if whites is None else partial(with_background, background=whites[image.stem])
        records.append(
            Record(record_id(folder.split(".")[1], image.stem), image, mask, um_per_px=UM_PER_PX, decode=decode)
        )
    return tuple(records)


def _from_regions(regions: list[Record], test: tuple[Record, ...]) -> TissueDataset:
    strata = {}
    for record in regions:
        present = np.unique(record.read_mask(LABELS))
        strata[record.id] = Counter({LABELS.names[label]: 1 for label in present if label < LABELS.num_tissue})
    home = split_groups(strata, {"train": 8, "val": 2})
    splits = {**assign(by_group(regions), home), "test": test}
    counts = {name: Counter(kind for record in splits[name] for kind in strata[record.id]) for name in ("train", "val")}
    shown = "; ".join(
        f"{name} {', '.join(f'{kind} in {number[kind]}' for kind in LABELS.tissue)}" for name, number in counts.items()
    )
    notes = [
        f"train and val are {len(splits['train'])} and {len(splits['val'])} of the official validation regions, not"
        " the official training patches: not comparable with published scores",
        f"regions by class: {shown}",
        "regions carry no patient, so patients may overlap",
    ]
    if len(test) != COUNTS["test"]:
        notes.append(f"this copy has {len(test)} of the {COUNTS['test']} published test images")
    return make_dataset("wsss4luad", LABELS, splits, notes)


ENTRY = CatalogEntry(
    name="wsss4luad",
    title="WSSS4LUAD, Grand Challenge on weakly supervised tissue segmentation of lung adenocarcinoma",
    labels=LABELS,
    splits=("official", "regions"),
    hints=("tags",),
    licence="non-commercial, no redistribution",
    citation="Han et al., WSSS4LUAD: Grand Challenge on weakly-supervised tissue semantic segmentation for lung"
    " adenocarcinoma, arXiv 2204.06455, 2022",
    layout=LAYOUT,
    reader=read_wsss4luad,
    um_per_px=UM_PER_PX,
    counts=COUNTS,
)
