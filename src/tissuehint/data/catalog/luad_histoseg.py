"""LUAD-HistoSeg: lung adenocarcinoma patches with image tags, by Han et al."""

from __future__ import annotations

from pathlib import Path

from tissuehint.data.catalog.base import CatalogEntry, make_dataset
from tissuehint.data.catalog.layouts import TaggedPatches, empty_tags_notes
from tissuehint.data.records import TissueDataset
from tissuehint.labels import LabelSpace

# order of the release, in file names and masks; the PBIP paper lists another one
LABELS = LabelSpace(
    ("tumour epithelium", "necrosis", "lymphocytes", "tumour-associated stroma", "white"),
    ((205, 51, 51), (0, 255, 0), (65, 105, 225), (255, 165, 0), (255, 255, 255)),
    white=4,
)
UM_PER_PX = 1.0  # 10x, nominal
COUNTS = {"train": 16678, "val": 300, "test": 307}
LAYOUT = """
train/<patient>-<x>-<y>-[1 0 0 1].png (or training/)
val/img/<name>.png with val/mask/<name>.png (or valid/)
test/img/<name>.png with test/mask/<name>.png
"""


def patient(stem: str) -> str | None:
    """Patient of a file name ``<patient>-<x>-<y>``.

    Example:
        >>> patient("1031280-2300-27920-[1 0 0 1]"), patient("12")
        ('1031280', None)
    """
    first, *rest = stem.split("-")
    return first if len(rest) >= 2 and first.isalnum() else None


# file-name bits: tumour epithelium, necrosis, lymphocytes, tumour-associated stroma
PATCHES = TaggedPatches(LABELS, (0, 1, 2, 3), LAYOUT, group=patient, um_per_px=UM_PER_PX)


def read_luad_histoseg(root: Path, scheme: str) -> TissueDataset:
    """Read LUAD-HistoSeg in its official folders."""
    splits = PATCHES.read(root)
    return make_dataset("luad_histoseg", LABELS, splits, empty_tags_notes(splits), COUNTS)


ENTRY = CatalogEntry(
    name="luad_histoseg",
    title="LUAD-HistoSeg, lung adenocarcinoma with patch-level labels",
    labels=LABELS,
    splits=("official",),
    hints=("tags",),
    licence="not stated by the release; ask the authors",
    citation=(
        "Han et al., Multi-layer pseudo-supervision for histopathology tissue semantic segmentation using patch-level"
        " classification labels, Medical Image Analysis 80, 2022"
    ),
    layout=LAYOUT,
    reader=read_luad_histoseg,
    mean=(0.73429191, 0.50502165, 0.69164956),
    std=(0.18846453, 0.22774934, 0.15521939),
    um_per_px=UM_PER_PX,
    counts=COUNTS,
    published={
        "pbip": {"miou": 0.7644, "fwiou": 0.7519, "dice_from_miou": 0.8664},
        "mlps": {"miou": 0.7354, "fwiou": 0.7315, "dice_from_miou": 0.8475},
    },
)
