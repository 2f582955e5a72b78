"""Camelyon16 crops as CVM uses them: 4096-px crops at 20x with tumour masks and a few points.

CVM does not publish its list of crops, so the layout is ours: masks and points may live on a smaller grid (CVM: 256).
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.catalog.base import CatalogEntry, Splits, make_dataset, record_id
from tissuehint.data.catalog.grouping import assign, by_group, split_groups
from tissuehint.data.catalog.layouts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    filled,
    find_root,
    pair_masks,
    subfolder,
    threshold,
)
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points

LABELS = LabelSpace(("normal", "tumour"), ((0, 158, 115), (213, 94, 0)))
NORMAL, TUMOUR = 0, 1
UM_PER_PX = 0.5  # 20x, nominal: the two scanners differ
FOLDS = 4
LAYOUT = """
images/<slide>_<x>_<y>.png
masks/<slide>_<x>_<y>.png, 0 normal, 1 or 255 tumour, of the size of the image or a whole fraction of it
points/<slide>_<x>_<y>.json, {"pos": [[row, column], ...], "neg": [...]} in pixels of the mask (optional)
"""


def enlarge(codes: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Binary mask at image size: each mask pixel becomes factor x factor image pixels."""
    binary = threshold(codes)
    return binary.repeat(factor, axis=0).repeat(factor, axis=1)


def read_camelyon16(root: Path, scheme: str) -> TissueDataset:
    """Read Camelyon16 crops; one of four folds of slides is test, the rest is split 4:1."""
    root = find_root(root, lambda folder: any((folder / name).is_dir() for name in IMAGE_FOLDERS))
    images = filled(subfolder(root, IMAGE_FOLDERS, LAYOUT), LAYOUT)
    points = root / "points"
    pairs = pair_masks(images, subfolder(root, MASK_FOLDERS, LAYOUT))
    records = [_record(image, mask, points if points.is_dir() else None) for image, mask in pairs]
    notes = [f"{scheme} of {FOLDS} by slide, the other folds split 4:1 into train and val"]
    notes.append("the crops of CVM are unpublished: not the same crops as in its paper")
    return make_dataset("camelyon16", LABELS, _fold(records, int(scheme.removeprefix("fold_"))), notes)


def _record(image: Path, mask: Path, points: Path | None) -> Record:
    parts = image.stem.rsplit("_", 2)
    if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
        raise InputError(image, "is not named <slide>_<x>_<y>", "name it by slide and upper left corner")
    height, width = Record("image", image).size()
    grid = Record("mask", mask).size()
    factor = height // grid[0]
    if factor < 1 or (grid[0] * factor, grid[1] * factor) != (height, width):
        rule = f"mask is {grid[0]} x {grid[1]} pixels, its image {height} x {width}, not a whole multiple"
        raise InputError(mask, rule, "give the mask at image size or a whole fraction of it")
    return Record(
        record_id(image.stem),
        image,
        mask,
        points=None if points is None else _read_points(points / f"{image.stem}.json", image, grid, factor),
        group=parts[0],
        um_per_px=UM_PER_PX,
        decode=partial(enlarge, factor=factor),
    )


def _read_points(path: Path, image: Path, grid: tuple[int, int], factor: int) -> Points:
    """Points in image pixels, at the centres of the mask pixels that the file names."""
    fix = 'write {"pos": [[row, column], ...], "neg": [...]}'
    if not path.is_file():
        raise InputError(image, f"has no points file {path}", "add it, or remove the points folder")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(path, f"is no JSON file ({error})", fix) from None
    if not isinstance(content, dict) or not {"pos", "neg"} <= content.keys():
        raise InputError(path, "lacks the keys pos and neg", fix)
    rows = []
    for key, label in (("neg", NORMAL), ("pos", TUMOUR)):
        for pair in content[key] if isinstance(content[key], list) else [None]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(type(value) is int for value in pair):
                raise InputError(path, f"'{key}' has {pair!r}, points are two whole numbers", fix)
            if not (0 <= pair[0] < grid[0] and 0 <= pair[1] < grid[1]):
                rule = f"'{key}' has {pair}, outside the mask of {grid[0]} x {grid[1]} pixels"
                raise InputError(path, rule, "give row and column in pixels of the mask")
            rows.append((pair[0] * factor + factor // 2, pair[1] * factor + factor // 2, label))
    return Points(rows)


def _fold(records: list[Record], number: int) -> Splits:
    groups = by_group(records)
    names = {f"fold_{index}": 1.0 for index in range(1, FOLDS + 1)}
    fold = split_groups(_sizes(groups), names)
    rest = {slide: members for slide, members in groups.items() if fold[slide] != f"fold_{number}"}
    home = dict.fromkeys(groups, "test") | split_groups(_sizes(rest), {"train": 4, "val": 1})
    return assign(groups, home)


def _sizes(groups: dict[str, list[Record]]) -> dict[str, Counter[str]]:
    return {slide: Counter({"crops": len(members)}) for slide, members in groups.items()}


ENTRY = CatalogEntry(
    name="camelyon16",
    title="Camelyon16 crops with points",
    labels=LABELS,
    splits=("fold_1", "fold_2", "fold_3", "fold_4"),
    hints=("points",),
    licence="CC0 1.0 (Camelyon16)",
    citation=(
        "Ehteshami Bejnordi et al., Diagnostic assessment of deep learning algorithms for detection of lymph node"
        " metastases in women with breast cancer, JAMA 318, 2017; crops after CVM, CVPR 2023"
    ),
    layout=LAYOUT,
    reader=read_camelyon16,
    um_per_px=UM_PER_PX,
    published={
        "cvm": {"dice": 0.735, "accuracy": 0.918, "kappa": 0.657, "auc": 0.944},
        "partial cross-entropy": {"dice": 0.563, "accuracy": 0.784, "kappa": 0.398, "auc": 0.877},
        "full masks": {"dice": 0.802, "accuracy": 0.934, "kappa": 0.742, "auc": 0.978},
    },
)
