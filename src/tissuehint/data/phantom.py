"""Synthetic H&E-like tissue with exact ground truth, for demonstrations, tests and teaching.

Five classes: glands with lumen, stroma fibres, lymphocyte fields, necrosis, white. Stain strength and hue vary from
patient to patient and the tone of each class from image to image, so that texture, not colour, tells them apart.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.folder import write_folder
from tissuehint.data.phantom_texture import Stain
from tissuehint.data.phantom_tissue import PHANTOM_LABELS, Tissue
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError

__all__ = ["PHANTOM_LABELS", "Tissue", "make_tissue", "phantom_dataset", "write_phantom"]

SPLITS = ("train", "val", "test")
# Every class of an image covers at least this share of it.
SMALLEST_AREA = 0.04
# A class is tagged from this share of the image on; below SMALLEST_AREA, so tags name exactly the classes present.
TAG_THRESHOLD = 0.01
POINTS_PER_CLASS = 2
IMAGES_PER_PATIENT = 4
SMALLEST_SIDE = 32
ATTEMPTS = 60
# How many classes an image has, and how often.
CLASS_COUNTS = (0.3, 0.35, 0.25, 0.1)


def make_tissue(
    height: int,
    width: int,
    *,
    seed: int | Sequence[int],
    classes: Sequence[str] | None = None,
    um_per_px: float = 0.5,
    stain: Stain | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One image of synthetic tissue and its exact mask.

    Regions are where the random smooth field of a class is the largest; glands are whole cells of a bent Voronoi
    partition. Dyes absorb by Beer-Lambert, ``rgb = light * exp(-concentrations @ densities)``.

    Args:
        height: pixels, at least 32.
        width: pixels, at least 32.
        seed: one number or several; the same seed gives the same pixels.
        classes: names that occur, each on at least 4 % of the image; None draws 1 to 4, at least one of them tissue.
        um_per_px: pixel size in micrometres, 0.1 to 4; structures have the size they have in real tissue.
        stain: colours; None draws them from the seed.

    Returns:
        (H,W,3) uint8 RGB image and (H,W) uint8 mask with the class indices of ``PHANTOM_LABELS``.

    Raises:
        InputError: a frame that is too small, no or unknown classes, a pixel size out of range, a negative seed, or a
            frame in which the classes found no room.

    Example:
        >>> image, mask = make_tissue(64, 96, seed=7, classes=("gland", "white"))
        >>> image.shape, mask.shape, sorted(set(mask.ravel().tolist()))
        ((64, 96, 3), (64, 96), [0, 4])
    """
    wanted = _check(height, width, um_per_px, classes)
    _check_seed(seed)
    generator = np.random.default_rng(seed)
    drawn_stain = Stain.random(generator)
    for _ in range(ATTEMPTS):
        chosen = _draw_classes(generator) if wanted is None else wanted
        tissue, share = Tissue.random(generator, chosen, height * um_per_px, width * um_per_px)
        if share < 1.25 * SMALLEST_AREA:
            continue
        image, mask = tissue.render(0, 0, height, width, um_per_px, stain or drawn_stain)
        area = np.bincount(mask.ravel(), minlength=PHANTOM_LABELS.num_classes) / mask.size
        if area[list(chosen)].min() >= SMALLEST_AREA:
            return image, mask
    names = ", ".join(PHANTOM_LABELS.names[label] for label in wanted or ())
    rule = f"no room for {names} of {SMALLEST_AREA:.0%} each in {height} x {width} pixels of {um_per_px} um"
    raise InputError("phantom tissue", rule, "take a larger image, a larger pixel or fewer classes")


def phantom_dataset(
    count: tuple[int, int, int] = (60, 20, 20), size: int = 224, seed: int = 0, *, um_per_px: float = 0.5
) -> TissueDataset:
    """A data set of synthetic tissue in memory, with tags, points, proportions and exact masks.

    Tags name the classes on at least 1 % of the image, two points lie inside each tissue class, proportions are exact
    shares of the tissue area. Four images at a time share a patient, that is a stain; no patient is in two splits.
    From two images on, a split has every class and an image with a single tag.

    Args:
        count: number of train, val and test images, 0 or more each.
        size: side of the square images in pixels.
        seed: the same seed gives the same data set.
        um_per_px: pixel size in micrometres.

    Returns:
        A data set with ids like ``phantom_train_0003`` and groups like ``patient_01``.

    Raises:
        InputError: counts that are not three numbers of 0 or more, and as ``make_tissue`` says.
    """
    if len(count) != len(SPLITS) or min(count) < 0 or sum(count) == 0:
        rule = f"is {tuple(count)}, not three numbers of 0 or more"
        raise InputError("phantom count", rule, "give the number of train, val and test images")
    _check_seed(seed)
    splits: dict[str, tuple[Record, ...]] = {}
    patients = 0
    for place, (split, number) in enumerate(zip(SPLITS, count, strict=True)):
        plan = _plan(number, np.random.default_rng([seed, place]))
        records = []
        for index, classes in enumerate(plan):
            patient = patients + index // IMAGES_PER_PATIENT
            stain = Stain.random(np.random.default_rng([seed, len(SPLITS), patient]))
            image, mask = make_tissue(
                size, size, seed=(seed, place, index), classes=classes, um_per_px=um_per_px, stain=stain
            )
            name, group = f"phantom_{split}_{index:04d}", f"patient_{patient + 1:02d}"
            records.append(_record(name, image, mask, group, um_per_px, seed=seed))
        patients += -(-number // IMAGES_PER_PATIENT)
        splits[split] = tuple(records)
    note = f"synthetic tissue, seed {seed}, {size} x {size} pixels of {um_per_px} um, masks exact"
    return TissueDataset("phantom", PHANTOM_LABELS, splits, (note,))


def write_phantom(
    folder: Path,
    *,
    count: tuple[int, int, int] = (60, 20, 20),
    size: int = 224,
    seed: int = 0,
    um_per_px: float = 0.5,
) -> None:
    """Write ``phantom_dataset`` as a folder of your own data would look; the folder is whole or absent.

    ``images/<id>.png``, ``masks/<id>.png`` (palette), ``labels.csv`` (image, split, group, tag:<class>...,
    proportion:<class>...), ``points.csv`` (image, row, column, class), ``classes.json`` (the label space) and
    ``notes.txt``: the layout that ``data.folder`` describes.

    Raises:
        InputError: the target is a file or a folder with something in it, and as ``phantom_dataset`` says.
        OSError: as the file system says; nothing half-written is left.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(folder, "is not empty", "give a new or an empty folder")
    dataset = phantom_dataset(count, size, seed, um_per_px=um_per_px)
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name[:80]}.", suffix=".part", dir=parent))
    try:
        write_folder(dataset, part)
        # mkdtemp makes private folders; take the rights that a plain mkdir gave to images/
        part.chmod((part / "images").stat().st_mode & 0o777)
        if folder.is_dir():
            folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _record(
    name: str, image: NDArray[np.uint8], mask: NDArray[np.uint8], group: str, um_per_px: float, seed: int
) -> Record:
    from tissuehint.data.weak import image_seed, points_from_mask, proportions_from_mask, tags_from_mask

    return Record(
        name,
        image,
        mask,
        tags_from_mask(mask, PHANTOM_LABELS, threshold=TAG_THRESHOLD),
        points_from_mask(mask, PHANTOM_LABELS, POINTS_PER_CLASS, seed=image_seed(seed, name)),
        proportions_from_mask(mask, PHANTOM_LABELS),
        group,
        um_per_px,
    )


def _plan(number: int, generator: np.random.Generator) -> list[tuple[str, ...]]:
    """Classes of each image of a split: the first two cover all classes and a single tag, the rest is drawn."""
    tissue = [PHANTOM_LABELS.tissue[index] for index in generator.permutation(PHANTOM_LABELS.num_tissue)]
    plan: list[tuple[str, ...]] = [(tissue[0],), (*tissue[1:], "white")]
    while len(plan) < number:
        plan.append(tuple(PHANTOM_LABELS.names[label] for label in _draw_classes(generator)))
    order = generator.permutation(number)
    return [plan[index] for index in order]


def _draw_classes(generator: np.random.Generator) -> tuple[int, ...]:
    """One to four class indices in order, never white alone."""
    while True:
        number = int(generator.choice(len(CLASS_COUNTS), p=CLASS_COUNTS)) + 1
        chosen = np.sort(generator.choice(PHANTOM_LABELS.num_classes, number, replace=False))
        if chosen[0] < PHANTOM_LABELS.num_tissue:
            return tuple(int(label) for label in chosen)


def _check(height: int, width: int, um_per_px: float, classes: Sequence[str] | None) -> tuple[int, ...] | None:
    if min(height, width) < SMALLEST_SIDE:
        rule = f"is {height} x {width} pixels, the smallest side is {SMALLEST_SIDE}"
        raise InputError("phantom image", rule, "ask for a larger image")
    if not 0.1 <= um_per_px <= 4:
        raise InputError(f"um_per_px {um_per_px}", "is not in 0.1..4", "give micrometres per pixel, 0.5 is 20x")
    if classes is None:
        return None
    if not classes:
        raise InputError("phantom classes", "are none", f"name some of {', '.join(PHANTOM_LABELS.names)}")
    return tuple(sorted({PHANTOM_LABELS.index(name) for name in classes}))


def _check_seed(seed: int | Sequence[int]) -> None:
    if np.min(seed) < 0:
        raise InputError(f"seed {seed}", "is negative", "give 0 or more")
