"""What training draws from: patches with hints (stage 1) and crops with masks (stage 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import Dataset, Sampler

from tissuehint.data.patches import PatchGrid, presence_tags, proportion_rows, white_fractions, windows
from tissuehint.data.records import Record
from tissuehint.data.samples import Sample, crop
from tissuehint.data.transforms import Augmentation, augment, zoom
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

Draw = tuple[int, int]
ImageReader = Callable[[Record], NDArray[np.uint8]]
# from the exact shares (C,) of an item, and its id, to those that a reader would write
Estimate = Callable[[NDArray[np.float64], str], NDArray[np.float64]]


class TrainingSet(Protocol):
    """Items that a training stage draws from."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: Generator) -> Sample:
        """Item ``index``; ``generator`` decides what is random about it, such as the place of a crop."""


@dataclass(frozen=True)
class HintSet:
    """Patches (or whole images) with their hints; masks are not in the samples.

    Args:
        records: images.
        owner: (N,) index into ``records`` of each item.
        corners: (N,2) upper left corner of each item.
        grid: windows, or None for whole images.
        tags: (N,C) uint8, or None.
        proportions: (N,C) float, or None.
        read: how to get the pixels of a record (through a cache).
    """

    records: Sequence[Record]
    owner: NDArray[np.int64]
    corners: NDArray[np.int64]
    grid: PatchGrid | None
    tags: NDArray[np.uint8] | None
    proportions: NDArray[np.float64] | None
    read: ImageReader

    def __len__(self) -> int:
        return len(self.owner)

    def sample(self, index: int, generator: Generator | None = None) -> Sample:
        """Item ``index``; nothing about it is random."""
        record = self.records[self.owner[index]]
        top, left = (int(value) for value in self.corners[index])
        pixels = self.read(record)
        points = None if record.points is None else torch.from_numpy(record.points.rows - [top, left, 0])
        if self.grid is not None:  # cut before the conversion to float: the image may be far larger than the patch
            pixels = pixels[top : top + self.grid.side, left : left + self.grid.side]
        sample = Sample(
            record.id if self.grid is None else window_id(record, top, left),
            to_tensor(pixels),
            None if self.tags is None else torch.from_numpy(self.tags[index]).float(),
            points,
            None if self.proportions is None else torch.from_numpy(self.proportions[index]).float(),
        )
        if self.grid is None:
            return sample
        patch = crop(sample, 0, 0, self.grid.side, self.grid.side)
        side = self.grid.network_side
        return patch if side == self.grid.side else zoom(patch, 0, 0, self.grid.side, self.grid.side, (side, side))


@dataclass(frozen=True)
class GuidedSet:
    """Items with hints, each with the soft target that a method has made for it so far.

    Args:
        items: the items; targets belong to them as they are before augmentation.
        read: from the id of an item to its target (C,h,w) in pixels of the item, or None where it has none; what
            reaches over the lower or right border is cut off.
        channels: C.
    """

    items: HintSet
    read: Callable[[str], Tensor | None]
    channels: int

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int, generator: Generator | None = None) -> Sample:
        """Item ``index`` with its guide at image size; 0 everywhere where there is none."""
        sample = self.items.sample(index)
        size = (sample.image.shape[1], sample.image.shape[2])
        guide = self.read(sample.id)
        if guide is None:
            return replace(sample, guide=torch.zeros(self.channels, *size))
        return replace(sample, guide=guide[:, : size[0], : size[1]])


@dataclass(frozen=True)
class MaskSet:
    """Random square crops of images, or whole images, with their (pseudo) masks.

    Args:
        records: images.
        read: how to get the pixels of a record.
        read_target: how to get its mask, (H,W) class indices, 255 = ignore.
        side: side of a crop in pixels; None gives whole images.
    """

    records: Sequence[Record]
    read: ImageReader
    read_target: ImageReader
    side: int | None

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, generator: Generator) -> Sample:
        """A crop of record ``index`` at a uniformly drawn place, or all of it."""
        record = self.records[index]
        pixels, target = self.read(record), self.read_target(record)
        (height, width), (tall, wide) = target.shape, pixels.shape[:2]
        if (height, width) != (tall, wide):
            rule = f"mask is {height} x {width} pixels (height x width), its image {tall} x {wide}"
            raise InputError(record.id, rule, "give a mask of the size of its image")
        if self.side is None:
            return Sample(record.id, to_tensor(pixels), mask=torch.from_numpy(target.astype(np.int64)))
        top = int(torch.randint(max(height - self.side, 0) + 1, (1,), generator=generator))
        left = int(torch.randint(max(width - self.side, 0) + 1, (1,), generator=generator))
        window = np.s_[top : top + self.side, left : left + self.side]
        mask = torch.from_numpy(np.ascontiguousarray(target[window])).long()
        sample = Sample(record.id, to_tensor(pixels[window]), mask=mask)
        return crop(sample, 0, 0, self.side, self.side)


def window_id(record: Record, top: int, left: int) -> str:
    """Name of the window of a record with this upper left corner."""
    return f"{record.id}_{top}_{left}"


def build_hint_set(
    records: Sequence[Record],
    labels: LabelSpace,
    grid: PatchGrid | None,
    read: ImageReader,
    *,
    supervision: str,
    estimate: Estimate | None = None,
) -> HintSet:
    """Items with the wanted hint: every image that has it, or every kept window of every image.

    Windows of images that carry a mask get tags and proportions simulated from it (``PatchGrid.presence``); without a
    mask only an image with a single tag can be cut, since each of its windows may carry that tag. Windows and images
    without any tissue class are dropped, and so are windows whiter than ``PatchGrid.max_white``.

    Args:
        records: images.
        labels: the classes.
        grid: windows, or None for whole images.
        read: how to get the pixels of a record.
        supervision: the wanted hint.
        estimate: what a reader would make of the exact proportions of a window; None keeps them.

    Raises:
        InputError: an image lacks the hint, or nothing is left.
    """
    owner, corners, tags, shares = [], [], [], []
    for index, record in enumerate(records):
        rows = _whole(record, supervision) if grid is None else _windows_of(record, labels, grid, read, supervision)
        if estimate is not None and grid is not None and record.mask is not None and supervision == "proportions":
            rows = _estimated(rows, record, estimate)
        owner.append(np.full(len(rows.corners), index, np.int64))
        corners.append(rows.corners)
        tags.append(rows.tags)
        shares.append(rows.proportions)
    if not sum(len(part) for part in owner):
        raise InputError("training set", f"has no item with {supervision}", "check the labels and the patch settings")
    return HintSet(
        tuple(records), np.concatenate(owner), np.concatenate(corners), grid, _joined(tags), _joined(shares), read
    )


@dataclass(frozen=True)
class _Rows:
    corners: NDArray[np.int64]
    tags: NDArray[np.uint8] | None = None
    proportions: NDArray[np.float64] | None = None


def _check_hint(record: Record, supervision: str) -> None:
    if getattr(record, supervision) is None:
        fix = f"give {supervision} for every training and validation image, or choose a method for the hints you have"
        raise InputError(record.id, f"has no {supervision}", fix)


def _whole(record: Record, supervision: str) -> _Rows:
    _check_hint(record, supervision)
    keep = 0 if supervision == "tags" and record.tags is not None and not record.tags.values.any() else 1
    return _Rows(
        np.zeros((keep, 2), np.int64),
        None if record.tags is None else record.tags.values[None][:keep],
        None if record.proportions is None else record.proportions.values[None][:keep],
    )


def _windows_of(record: Record, labels: LabelSpace, grid: PatchGrid, read: ImageReader, supervision: str) -> _Rows:
    corners = windows(*record.size(), grid.side, grid.stride)
    if grid.max_white is not None:
        corners = corners[white_fractions(read(record), corners, grid) <= grid.max_white]
    if supervision == "points":
        _check_hint(record, supervision)
        return _Rows(corners)
    if record.mask is None:
        if record.tags is None or record.tags.values.sum() != 1:
            rule = "is cut into patches, but has neither a mask to derive patch tags from nor one single tag"
            raise InputError(record.id, rule, "remove data.patches, or tag the patches themselves")
        shares = record.tags.values.astype(np.float64)
        return _Rows(corners, np.tile(record.tags.values, (len(corners), 1)), np.tile(shares, (len(corners), 1)))
    mask = record.read_mask(labels)
    tags = presence_tags(mask, corners, grid, labels.num_tissue, labels.ignore)
    kept = tags.any(1)
    shares = proportion_rows(mask, corners[kept], grid, labels.num_tissue)
    return _Rows(corners[kept], tags[kept], shares)


def _estimated(rows: _Rows, record: Record, estimate: Estimate) -> _Rows:
    if rows.proportions is None or not len(rows.proportions):
        return rows
    names = [window_id(record, int(top), int(left)) for top, left in rows.corners]
    shares = [estimate(each, name) for each, name in zip(rows.proportions, names, strict=True)]
    return replace(rows, proportions=np.stack(shares))


Value = TypeVar("Value", bound=np.generic)


def _joined(parts: Sequence[NDArray[Value] | None]) -> NDArray[Value] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present and len(present) == len(parts) else None


class Draws(Dataset[Sample]):
    """Augmented samples, each a function of (seed, draw) alone: the same on any worker, rank or resumed run."""

    def __init__(self, training_set: TrainingSet, augmentation: Augmentation | None, seed: int) -> None:
        self.training_set = training_set
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.training_set)

    def __getitem__(self, draw: Draw) -> Sample:
        index, number = draw
        generator = Generator()
        generator.manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> 1))
        sample = self.training_set.sample(index, generator)
        return sample if self.augmentation is None else augment(sample, self.augmentation, generator)


class RoundSampler(Sampler[Draw]):
    """The items of one round of training: an endless shuffled stream, cut into rounds, dealt out to ranks.

    The stream goes through all items in a new order each pass. Round r takes the next ``batch_size * steps`` of it;
    rank k of n takes every n-th item, so that n ranks with batches of ``batch_size / n`` see together what one rank
    with ``batch_size`` sees. A resumed run asks for its round and gets the very same items.

    Args:
        items: number of items.
        batch_size: over all ranks.
        steps: optimiser steps in a round.
        seed: of the order.
        rank, world: this process and the number of processes.
    """

    def __init__(self, items: int, *, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if items < 1:
            raise InputError("training set", "is empty", "check the training split of the data set")
        if batch_size % world:
            raise InputError(f"batch size {batch_size}", f"does not divide among {world} processes", "use a multiple")
        self.items, self.size, self.seed = items, batch_size * steps, seed
        self.rank, self.world = rank, world
        self.round = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer: which round comes next."""
        self.round = epoch

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[Draw]:
        start = self.round * self.size
        order: NDArray[np.int64] | None = None
        current = -1
        for draw in range(start + self.rank, start + self.size, self.world):
            turn, place = divmod(draw, self.items)
            if turn != current:
                current, order = turn, np.random.default_rng([self.seed, turn]).permutation(self.items)
            assert order is not None
            yield int(order[place]), draw


def to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """(H,W,3) uint8 to (3,H,W) float in [0,1]."""
    # a copy: decoded images are read-only, and a window of one is not contiguous
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
