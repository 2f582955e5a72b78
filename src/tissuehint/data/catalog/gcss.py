"""GCSS: gastric cancer patches, as PBIP uses them (4 bits) and as WaWeHis releases them (6 bits, GCSS-WSSS).

Both go back to 100 regions of TCGA-STAD whose masks number tumour 1, lymphoid stroma 2, desmoplastic stroma 3, smooth
muscle 4, necrosis 5 and others 6. Neither derived release publishes a table of names.
"""

from __future__ import annotations

from pathlib import Path

from tissuehint.data.catalog.base import CatalogEntry, make_dataset
from tissuehint.data.catalog.grouping import tcga_patient
from tissuehint.data.catalog.layouts import TaggedPatches, code_table, empty_tags_notes
from tissuehint.data.records import TissueDataset
from tissuehint.labels import LabelSpace

# PBIP prints the last class as one name for smooth muscle and necrosis; index 4 for white is reconstructed
LABELS = LabelSpace(
    ("tumour", "lymphoid stroma", "desmoplastic stroma", "smooth muscle or necrosis", "white"),
    ((255, 0, 0), (64, 128, 0), (0, 255, 255), (255, 165, 0), (255, 255, 255)),
    white=4,
)
COUNTS = {"train": 20000, "val": 2500, "test": 2500}
LAYOUT = """
train/<name>[1101].png
val/img/<name>.png with val/mask/<name>.png (or valid/)
test/img/<name>.png with test/mask/<name>.png
"""
PATCHES = TaggedPatches(LABELS, (0, 1, 2, 3), LAYOUT, group=tcga_patient)

# white is bit 0 and code 0 in the files, and the last class here
LABELS_WSSS = LabelSpace(
    ("tumour", "lymphoid stroma", "desmoplastic stroma", "smooth muscle", "necrosis", "white"),
    ((255, 0, 0), (64, 128, 0), (0, 255, 255), (255, 165, 0), (68, 0, 83), (255, 255, 255)),
    white=5,
)
CODES_WSSS = {0: 5, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
BITS_WSSS = (None, 0, 1, 2, 3, 4)
LAYOUT_WSSS = """
train/<name>[011001].png
val/img/<name>.png with val/mask/<name>.png (or valid/)
test/img/<name>.png with test/mask/<name>.png
"""
PATCHES_WSSS = TaggedPatches(LABELS_WSSS, BITS_WSSS, LAYOUT_WSSS, decode=code_table(CODES_WSSS), group=tcga_patient)


def read_gcss(root: Path, scheme: str) -> TissueDataset:
    """Read the GCSS patches of PBIP."""
    splits = PATCHES.read(root)
    notes = ["the cropping of these patches is unpublished; white as mask index 4 is reconstructed"]
    return make_dataset("gcss", LABELS, splits, [*notes, *empty_tags_notes(splits)], COUNTS)


def read_gcss_wsss(root: Path, scheme: str) -> TissueDataset:
    """Read GCSS-WSSS; white moves from bit and code 0 to the last class."""
    splits = PATCHES_WSSS.read(root)
    notes = [
        "class names follow the numbers of the source regions; the release itself publishes numbers only",
        "the published code sets predictions to white where the truth is white: protocol ignore_white",
    ]
    return make_dataset("gcss_wsss", LABELS_WSSS, splits, [*notes, *empty_tags_notes(splits)])


ENTRY = CatalogEntry(
    name="gcss",
    title="GCSS, gastric cancer patches of PBIP",
    labels=LABELS,
    splits=("official",),
    hints=("tags",),
    licence="the source regions are Apache-2.0 as published by their authors; the patches state none",
    citation=(
        "Shi et al., Semi-supervised pixel contrastive learning framework for tissue segmentation in"
        " histopathological image, IEEE JBHI 27(1), 2022; patches of PBIP, CVPR 2025"
    ),
    layout=LAYOUT,
    reader=read_gcss,
    counts=COUNTS,
    published={
        "pbip": {"miou": 0.5510, "fwiou": 0.5705, "dice_from_miou": 0.7105},
        "sam-path, full masks": {"miou": 0.5878, "fwiou": 0.5901},
    },
)

ENTRY_WSSS = CatalogEntry(
    name="gcss_wsss",
    title="GCSS-WSSS, gastric cancer patches of WaWeHis",
    labels=LABELS_WSSS,
    splits=("official",),
    hints=("tags",),
    licence="the source regions are Apache-2.0 as published by their authors; the patches state none",
    citation=(
        "Shi et al., Semi-supervised pixel contrastive learning framework for tissue segmentation in"
        " histopathological image, IEEE JBHI 27(1), 2022; patches of WaWeHis, IEEE TMI"
    ),
    layout=LAYOUT_WSSS,
    reader=read_gcss_wsss,
)
