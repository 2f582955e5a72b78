"""Small data sets in memory with classes that are easy to tell apart: a few training steps learn something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tissuehint.data import weak
from tissuehint.data.module import DataConfig, TissueData
from tissuehint.data.records import Record, TissueDataset
from tissuehint.data.samples import Batch
from tissuehint.data.training_sets import to_tensor
from tissuehint.data.transforms import Augmentation
from tissuehint.labels import LabelSpace

NO_AUGMENTATION = Augmentation(flip=False, rotate=False, brightness=0, contrast=0, saturation=0, hue=0)

# stains well apart from each other, all darker than any white threshold in use (grey 200 of 255)
_STAINS = np.array([(150, 50, 120), (60, 70, 160), (190, 120, 150), (90, 120, 90), (120, 60, 60), (70, 140, 150)])
_POINTS = 2


def fake_labels(*, white: bool = True, tissue: int = 3) -> LabelSpace:
    """A label space of up to six tissue classes, with or without white.

    Example:
        >>> fake_labels(tissue=2).names
        ('tissue_0', 'tissue_1', 'white')
    """
    names = tuple(f"tissue_{index}" for index in range(tissue))
    return LabelSpace((*names, "white"), white=tissue) if white else LabelSpace(names)


def fake_picture(
    labels: LabelSpace, height: int, width: int, number: int, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Picture ``number`` of an endless series, and its mask.

    One tissue class, or two side by side, in an order that goes through all pairs; every third picture has a white
    band along its lower border (a quarter of the height) where the label space has white. Each class has its stain and
    its stripes.

    Returns:
        (H,W,3) uint8 RGB and (H,W) uint8 class indices.
    """
    generator = np.random.default_rng([seed, number])
    left, step = number % labels.num_tissue, number // labels.num_tissue % labels.num_tissue
    mask = np.full((height, width), left, np.uint8)
    mask[:, width // 2 :] = (left + step) % labels.num_tissue
    rows, columns = np.indices((height, width))
    stripes = 20 * np.sin((rows + (mask.astype(int) + 1) * columns) / (2 + mask))
    picture = _STAINS[mask] + stripes[:, :, None] + generator.normal(0, 6, (height, width, 3))
    if labels.white is not None and number % 3 == 2:
        mask[3 * height // 4 :] = labels.white
        picture[3 * height // 4 :] = 245 + generator.normal(0, 2, (height - 3 * height // 4, width, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), mask


def fake_record(
    labels: LabelSpace, name: str, height: int, width: int, number: int, *, seed: int = 0, mask: bool = True
) -> Record:
    """A record in memory with tags, points and proportions, and with its mask where ``mask`` is true."""
    picture, truth = fake_picture(labels, height, width, number, seed)
    return Record(
        name,
        picture,
        truth if mask else None,
        weak.tags_from_mask(truth, labels),
        weak.points_from_mask(truth, labels, _POINTS, seed=number, erosion=1),
        weak.proportions_from_mask(truth, labels),
        group=f"case_{number // 2}",
        um_per_px=0.5,
    )


def fake_dataset(
    labels: LabelSpace,
    *,
    count: tuple[int, int, int] = (8, 2, 2),
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    masks: bool = True,
) -> TissueDataset:
    """Train, val and test records in memory.

    Args:
        labels: the classes.
        count: images in train, val and test.
        size: side, or (height, width), in pixels.
        seed: of the noise.
        masks: False leaves every record without mask, as in a data set that has hints only.
    """
    height, width = (size, size) if isinstance(size, int) else size
    splits: dict[str, tuple[Record, ...]] = {}
    first = 0
    for split, number in zip(("train", "val", "test"), count, strict=True):
        splits[split] = tuple(
            fake_record(labels, f"{split}_{index}", height, width, first + index, seed=seed, mask=masks)
            for index in range(number)
        )
        first += number
    return TissueDataset("fake", labels, splits, ("fake tissue",))


def fake_data(dataset: TissueDataset, seed: int = 0, *, augmentation: Augmentation = NO_AUGMENTATION) -> TissueData:
    """The data module of a fake data set: whole images, loaded in the training process."""
    return TissueData(dataset, DataConfig(source="fake", workers=0, augmentation=augmentation), seed)


def fake_batch(
    labels: LabelSpace, *, count: int = 4, height: int = 64, width: int = 64, first: int = 0, seed: int = 0
) -> Batch:
    """A batch with all three hints and without masks.

    Args:
        labels: the classes.
        count: B.
        height, width: of the images in pixels.
        first: number of the first picture in the series.
        seed: of the noise.
    """
    records = [fake_record(labels, f"fake_{n}", height, width, n, seed=seed) for n in range(first, first + count)]
    tags, points, shares = [], [], []
    for record in records:
        assert record.tags is not None
        assert record.points is not None
        assert record.proportions is not None
        tags.append(torch.from_numpy(record.tags.values).float())
        points.append(torch.from_numpy(record.points.rows))
        shares.append(torch.from_numpy(record.proportions.values).float())
    images = torch.stack([to_tensor(record.read_image()) for record in records])
    return Batch([record.id for record in records], images, torch.stack(tags), points, torch.stack(shares))


def write_fake_folder(folder: Path, labels: LabelSpace, *, masks: bool = True, size: int = 64) -> Path:
    """Write a fake data set in the layout of ``data.source: folder``; returns the folder."""
    from tissuehint.data.folder import write_folder

    write_folder(fake_dataset(labels, size=size, masks=masks), folder)
    return folder
