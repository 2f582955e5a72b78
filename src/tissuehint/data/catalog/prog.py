"""ProG: glands in prostate tissue, the RINGS data of Salvi et al., whole images or patches of Feng et al."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tissuehint.data.catalog.base import SPLITS, CatalogEntry, Splits, layout_error, make_dataset, record_id
from tissuehint.data.catalog.grouping import assign, by_group, split_groups
from tissuehint.data.catalog.layouts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    TRAIN_FOLDERS,
    TaggedPatches,
    empty_tags_notes,
    filled,
    find_root,
    pair_masks,
    subfolder,
    threshold,
)
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

LABELS = LabelSpace(("non-gland", "gland"), ((68, 0, 83), (254, 230, 35)))
COUNTS = {"train": 36000, "val": 8244, "test": 9756}
# 1500 images; each gives 36 patches of 224 px, which divides the published patch counts
RATIO = {"train": 1000, "val": 229, "test": 271}
LAYOUT = """
patches: train/<name>[11].png, {val,test}/img/<name>.png with {val,test}/mask/<name>.png (or valid/)
whole images: images/<name>.png with masks/<name>.png
"""

_PATIENT = re.compile(r"(?:^|[^a-z])(?:p|pt|pat|patient|case)[ _-]?0*(\d+)(?![0-9])", re.IGNORECASE)


def patient(stem: str) -> str | None:
    """Patient of a file name such as ``P12_3`` or ``patient-012_a``; None where it names none.

    Example:
        >>> patient("P12_3"), patient("patient-012_a[11]"), patient("0045[10]")
        ('patient_12', 'patient_12', None)
    """
    found = _PATIENT.search(stem)
    return f"patient_{found.group(1)}" if found else None


# file-name bits: non-gland, gland
PATCHES = TaggedPatches(LABELS, (0, 1), LAYOUT, decode=threshold, group=patient)


def read_prog(root: Path, scheme: str) -> TissueDataset:
    """Read ProG, split by patient or in the folders of the patch release."""
    root = find_root(root, _ready)
    patches = any((root / name).is_dir() for name in TRAIN_FOLDERS)
    if scheme == "official":
        splits = PATCHES.read(root)
        return make_dataset("prog", LABELS, splits, empty_tags_notes(splits), COUNTS)
    if patches:
        splits, notes = _keep_apart(PATCHES.read(root), root)
        return make_dataset("prog", LABELS, splits, [*notes, *empty_tags_notes(splits)])
    splits = _whole_images(root)
    return make_dataset("prog", LABELS, splits, ["split by patient, 1000:229:271 images"])


def _ready(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in (*TRAIN_FOLDERS, *IMAGE_FOLDERS))


def _known_patients(records: list[Record], fix: str) -> None:
    for record in records:
        if record.group is None:
            rule = "names no patient (P<n>, patient<n> or case<n>), the scheme 'patient' needs one"
            raise InputError(str(record.image), rule, fix)


def _whole_images(root: Path) -> Splits:
    if not any((root / name).is_dir() for name in IMAGE_FOLDERS):
        raise layout_error(root, "has neither a train folder nor an images folder", LAYOUT)
    images = filled(subfolder(root, IMAGE_FOLDERS, LAYOUT), LAYOUT)
    pairs = pair_masks(images, subfolder(root, MASK_FOLDERS, LAYOUT))
    records = [
        Record(record_id(image.stem), image, mask, group=patient(image.stem), decode=threshold) for image, mask in pairs
    ]
    _known_patients(records, "name the patient in the file, or sort the images into the patch layout")
    groups = by_group(records)
    strata = {name: Counter({"images": len(members)}) for name, members in groups.items()}
    return assign(groups, split_groups(strata, RATIO))


def _keep_apart(splits: Splits, root: Path) -> tuple[Splits, list[str]]:
    """Each patient keeps the patches of one split; only the folders that hold a patient are open to it.

    Training patches have no mask and cannot be moved to val or test, so what a patient has elsewhere is left out.
    """
    everything = [record for name in SPLITS for record in splits[name]]
    _known_patients(everything, "read the official folders with the scheme 'official'")
    sizes: dict[str, Counter[str]] = {}
    for name in SPLITS:
        for record in splits[name]:
            sizes.setdefault(str(record.group), Counter())[name] += 1
    home = _homes(sizes)
    kept = {name: tuple(record for record in splits[name] if home[str(record.group)] == name) for name in SPLITS}
    for name in SPLITS:
        if not kept[name]:
            rule = f"keeps no {name} patch when patients are kept apart"
            raise InputError(root, rule, "read the official folders with the scheme 'official'")
    left = len(everything) - sum(len(records) for records in kept.values())
    notes = ["split by patient: a patient found in several official folders keeps the patches of one"]
    return kept, [*notes, f"{left} of {len(everything)} patches are left out for it"] if left else notes


def _homes(sizes: dict[str, Counter[str]]) -> dict[str, str]:
    """One split per patient: the one, of those that hold it, that lacks most patients; largest patients first."""
    share = {name: RATIO[name] / sum(RATIO.values()) * len(sizes) for name in SPLITS}
    taken: Counter[str] = Counter()
    home = {}
    for name in sorted(sizes, key=lambda name: (len(sizes[name]), -sizes[name].total(), name)):
        home[name] = max(sizes[name], key=lambda split: (1 - taken[split] / share[split], split))
        taken[home[name]] += 1
    return home


ENTRY = CatalogEntry(
    name="prog",
    title="ProG, prostate glands (RINGS)",
    labels=LABELS,
    splits=("patient", "official"),
    hints=("tags",),
    licence="as stated on the Mendeley Data record h8bdwrtnr5",
    citation=(
        "Salvi et al., A hybrid deep learning approach for gland segmentation in prostate histopathological images,"
        " Artificial Intelligence in Medicine 115, 2021"
    ),
    layout=LAYOUT,
    reader=read_prog,
    counts=COUNTS,
    published={
        "gland": {"miou": 0.8769, "dice_from_miou": 0.9344},
        "gland, full masks": {"miou": 0.8959, "dice_from_miou": 0.9451},
        "oeem": {"miou": 0.8456, "dice_from_miou": 0.9163},
    },
)
