"""BCSS-WSSS: breast cancer patches with image tags, made from BCSS by Han et al."""

from __future__ import annotations

from pathlib import Path

from tissuehint.data.catalog.base import CatalogEntry, make_dataset
from tissuehint.data.catalog.grouping import tcga_patient
from tissuehint.data.catalog.layouts import TaggedPatches, empty_tags_notes
from tissuehint.data.records import TissueDataset
from tissuehint.labels import LabelSpace

# mask codes 0..4 are these indices; code 4 is white, unlabelled and excluded area in one
LABELS = LabelSpace(
    ("tumour", "stroma", "lymphocytic infiltrate", "necrosis", "white"),
    ((255, 0, 0), (0, 255, 0), (0, 0, 255), (153, 0, 255), (255, 255, 255)),
    white=4,
)
COUNTS = {"train": 23422, "val": 3418, "test": 4986}
LAYOUT = """
train/<slide>+<n>[1101].png (or train/img/)
val/img/<name>.png with val/mask/<name>.png (or valid/)
test/img/<name>.png with test/mask/<name>.png
"""
# file-name bits: tumour, stroma, lymphocytic infiltrate, necrosis
PATCHES = TaggedPatches(LABELS, (0, 1, 2, 3), LAYOUT, group=tcga_patient)


def read_bcss_wsss(root: Path, scheme: str) -> TissueDataset:
    """Read BCSS-WSSS in its official folders."""
    splits = PATCHES.read(root)
    notes = ["mask index 4 is white, unlabelled and excluded area together, not white alone"]
    return make_dataset("bcss_wsss", LABELS, splits, [*notes, *empty_tags_notes(splits)], COUNTS)


ENTRY = CatalogEntry(
    name="bcss_wsss",
    title="BCSS-WSSS, breast cancer semantic segmentation with patch-level labels",
    labels=LABELS,
    splits=("official",),
    hints=("tags",),
    licence="made from BCSS (CC0 1.0); ask the authors for the terms of the derived patches",
    citation=(
        "Han et al., Multi-layer pseudo-supervision for histopathology tissue semantic segmentation using patch-level"
        " classification labels, Medical Image Analysis 80, 2022"
    ),
    layout=LAYOUT,
    reader=read_bcss_wsss,
    mean=(0.70623304, 0.47791372, 0.66791496),
    std=(0.19820057, 0.22564577, 0.1736589),
    counts=COUNTS,
    published={
        "lpd": {"miou": 0.7196, "dice_mean": 0.8356},
        "pbip": {"miou": 0.6954, "fwiou": 0.7452, "dice_from_miou": 0.8203},
        "mlps": {"miou": 0.6517, "fwiou": 0.6965, "dice_from_miou": 0.7891},
    },
)
