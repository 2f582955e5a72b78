"""TissueData: a data set with its recipe, ready for training, inference and scoring."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.utils.data import DataLoader

from tissuehint.data.patches import PatchGrid
from tissuehint.data.records import Record, TissueDataset, read_codes
from tissuehint.data.samples import Sample, collate
from tissuehint.data.training_sets import Draws, HintSet, MaskSet, RoundSampler, TrainingSet, build_hint_set
from tissuehint.data.transforms import Augmentation
from tissuehint.errors import InputError
from tissuehint.labels import IGNORE, LabelSpace

DATA_VARIABLE = "TISSUEHINT_DATA"
Supervision = Literal["tags", "points", "proportions"]


class PhantomConfig(BaseModel):
    """Size of a synthetic data set.

    Args:
        train, val, test: images of each split.
        size: side in pixels.
        seed: of the tissue; the same seed gives the same images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train: int = Field(default=96, ge=1)
    val: int = Field(default=24, ge=0)
    test: int = Field(default=32, ge=1)
    size: int = Field(default=224, ge=64)
    seed: int = 0


class WeakConfig(BaseModel):
    """How hints are simulated from masks where a data set does not bring them.

    Args:
        tag_threshold: a class is tagged if it covers more than this fraction of the image.
        points_per_class: labelled points for each class present.
        erosion: points keep this distance in pixels from the border of their region.
        round_to: proportions are rounded to multiples of this; None keeps them exact.
        noise: spread of the Dirichlet noise on proportions; None adds none.
        seed: of points and noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tag_threshold: float = Field(default=0.0, ge=0, lt=1)
    points_per_class: int = Field(default=3, ge=1)
    erosion: int = Field(default=3, ge=0)
    round_to: float | None = Field(default=None, gt=0, le=0.5)
    noise: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)


class DataConfig(BaseModel):
    """Which images, which hints, which patches.

    Args:
        source: ``phantom``, ``folder`` or a name of the catalog (``tissuehint data list``).
        root: folder of the data set; ``~`` and ``$VARIABLES`` are expanded. None takes the folder of that name below
            the environment variable TISSUEHINT_DATA.
        split: name of a split scheme of the data set; None takes its first.
        labels: ``masks`` trains the fully supervised ceiling alone; None takes the hint the method needs.
        patches: windows that stage 1 sees; None feeds whole images, smaller ones mirrored to the largest of a batch.
        weak: simulation of hints from masks.
        augmentation: of training samples.
        train_limit: use only the first so many training images.
        train_fraction: use only this share of the training images, drawn at random; at least one image, halves rounded
            up. Single images are drawn, also where the data set knows patients. Smaller shares are parts of larger ones
            with the same seed. All stages and the ceiling train on the same images.
        train_fraction_seed: of that draw; None takes ``weak.seed``.
        workers: processes that load data; None takes 2, or as many as there are cores where there are fewer. 0 loads in
            the training process.
        cache_mb: decoded images are kept in memory if they all fit in this many megabytes.
        phantom: size of the synthetic data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str
    root: str | None = None
    split: str | None = None
    labels: Literal["masks"] | None = None
    patches: PatchGrid | None = None
    weak: WeakConfig = WeakConfig()
    augmentation: Augmentation = Augmentation()
    train_limit: int | None = Field(default=None, ge=1)
    train_fraction: float | None = Field(default=None, gt=0, le=1)
    train_fraction_seed: int | None = Field(default=None, ge=0)
    workers: int | None = Field(default=None, ge=0)
    cache_mb: int = Field(default=1024, ge=0)
    phantom: PhantomConfig = PhantomConfig()

    @model_validator(mode="after")
    def _one_choice_of_images(self) -> DataConfig:
        if self.train_limit is not None and self.train_fraction is not None:
            raise ValueError("train_limit and train_fraction both choose training images: give one of them")
        return self

    def folder(self) -> Path:
        """Where the data set lies.

        Raises:
            InputError: no root given and TISSUEHINT_DATA not set.
        """
        if self.root is not None:
            return Path(os.path.expandvars(self.root)).expanduser()
        base = os.environ.get(DATA_VARIABLE)
        if not base:
            fix = "give -o data.root=FOLDER"
            if self.source != "folder":
                fix += f", or set {DATA_VARIABLE} to the folder that holds {self.source}"
            raise InputError(f"data.source {self.source}", "has no data.root", fix)
        names = (self.source, self.source.replace("_", "-"))
        found = next((Path(base) / name for name in names if (Path(base) / name).is_dir()), None)
        return found or Path(base) / self.source

    def worker_count(self) -> int:
        """Processes that load data."""
        return min(2, os.cpu_count() or 1) if self.workers is None else self.workers


def load_dataset(config: DataConfig) -> TissueDataset:
    """The data set of a recipe.

    Raises:
        InputError: unknown source, missing folder, another layout.
    """
    if config.source == "phantom":
        from tissuehint.data.phantom import phantom_dataset

        sizes = config.phantom
        return phantom_dataset((sizes.train, sizes.val, sizes.test), sizes.size, sizes.seed)
    if config.source == "folder":
        from tissuehint.data.folder import read_folder

        return read_folder(config.folder())
    from tissuehint.data import catalog

    entry = catalog.get(config.source)
    return catalog.read(entry.name, config.folder(), config.split)


def draw_fraction(records: Sequence[Record], fraction: float, seed: int) -> tuple[Record, ...]:
    """A share of the images at random: round(fraction N) of N, halves up, and at least one.

    Each image has a place in the draw that is a function of seed and id alone, so that a smaller share is part of a
    larger one, whatever the order of the records.

    Args:
        records: images; patients or cases play no part.
        fraction: in (0, 1].
        seed: the same seed gives the same images.

    Returns:
        The drawn records, in the order in which they were given.
    """
    from tissuehint.data.weak import image_seed

    # decimal: as binary numbers .145 * 100 is below 14.5
    share = Decimal(str(fraction)) * len(records)
    count = max(1, int(share.to_integral_value(ROUND_HALF_UP)))
    places = sorted(range(len(records)), key=lambda place: (image_seed(seed, records[place].id), records[place].id))
    return tuple(records[place] for place in sorted(places[:count]))


@dataclass
class PixelReader:
    """Pixels of a record, from memory where they are kept.

    Args:
        kept: decoded images by record id.
    """

    kept: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        """Forked workers share the memory; spawned ones (macOS, Windows) read files instead of each getting a copy."""
        return {"kept": {}}

    def __call__(self, record: Record) -> NDArray[np.uint8]:
        """(H,W,3) uint8."""
        pixels = self.kept.get(record.id)
        return record.read_image() if pixels is None else pixels


@dataclass(frozen=True)
class TrueMasks:
    """Reads the true mask of a record, for the fully supervised ceiling; unlabelled pixels are 255."""

    labels: LabelSpace

    def __call__(self, record: Record) -> NDArray[np.uint8]:
        """(H,W) uint8."""
        return _with_255(record.read_mask(self.labels), self.labels)


@dataclass(frozen=True)
class PseudoMasks:
    """Reads the pseudo mask of a record from the folder where stage 1 wrote it; unlabelled pixels are 255."""

    folder: Path
    labels: LabelSpace

    def __call__(self, record: Record) -> NDArray[np.uint8]:
        """(H,W) uint8."""
        return _with_255(read_codes(self.folder / f"{record.id}.png"), self.labels)


def _with_255(mask: NDArray[np.uint8], labels: LabelSpace) -> NDArray[np.uint8]:
    """Crops and losses ignore 255, whatever the masks of the data set write."""
    return mask if labels.ignore == IGNORE else np.where(mask == labels.ignore, np.uint8(IGNORE), mask)


class TissueData(L.LightningDataModule):
    """A data set as the stages of a run use it.

    Args:
        dataset: records and labels.
        config: the ``data`` part of the recipe.
        seed: of order and augmentation.
    """

    def __init__(self, dataset: TissueDataset, config: DataConfig, seed: int = 0) -> None:
        super().__init__()
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.read = PixelReader()
        self._train = self._chosen()
        self._training: tuple[TrainingSet, int, int] | None = None
        self._validation: HintSet | None = None
        if self._fits_in_memory():
            self._fill_cache()

    @property
    def labels(self) -> LabelSpace:
        """Classes of the data set."""
        return self.dataset.labels

    def records(self, split: str) -> tuple[Record, ...]:
        """Records of a split; of the training split those that ``train_limit`` or ``train_fraction`` leaves."""
        return self._train if split == "train" else tuple(self.dataset.splits.get(split, ()))

    def with_masks(self, split: str) -> list[Record]:
        """Records of a split that can be scored."""
        return [record for record in self.records(split) if record.mask is not None]

    def hints(self, split: str, supervision: Supervision) -> HintSet:
        """Items of a split with the wanted hint, simulated from masks where the data set has none."""
        records: Sequence[Record] = self.records(split)
        if self.config.patches is None or supervision == "points":
            records = [self.with_hint(record, supervision) for record in records]
            # a mask that gives no hint has no tissue
            records = [each for each in records if getattr(each, supervision) is not None or each.mask is None]
        patches = self.config.patches
        return build_hint_set(
            records, self.labels, patches, self.read, supervision=supervision, estimate=self.estimated
        )

    def estimated(self, shares: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        """The exact shares (C,) of the image or window ``name`` as ``data.weak`` has them: with noise, rounded."""
        from tissuehint.data import weak

        rules = self.config.weak
        seed = weak.image_seed(rules.seed, name)
        return weak.estimated_shares(shares, round_to=rules.round_to, noise=rules.noise, seed=seed)

    def with_hint(self, record: Record, supervision: Supervision) -> Record:
        """The record with its image-level hint, simulated from the mask where the data set has none.

        A mask without tissue gives no proportions.
        """
        from tissuehint.data import weak

        if getattr(record, supervision) is not None or record.mask is None:
            return record
        rules, mask = self.config.weak, record.read_mask(self.labels)
        seed = weak.image_seed(rules.seed, record.id)
        if supervision == "tags":
            return replace(record, tags=weak.tags_from_mask(mask, self.labels, rules.tag_threshold))
        if supervision == "points":
            count = rules.points_per_class
            points = weak.points_from_mask(mask, self.labels, count, seed=seed, erosion=rules.erosion)
            return replace(record, points=points)
        if not (mask < self.labels.num_tissue).any():
            return record
        shares = weak.proportions_from_mask(mask, self.labels, round_to=rules.round_to, noise=rules.noise, seed=seed)
        return replace(record, proportions=shares)

    def check_masks(self) -> None:
        """Read every mask once: a broken one would else be met when hours of training are done.

        Raises:
            InputError: a mask that cannot be read, of another size than its image, or with a value that is no class.
        """
        records = [record for record in self._every_record() if record.mask is not None]
        with ThreadPoolExecutor(max_workers=4) as pool:  # decoding leaves the interpreter lock
            for _ in pool.map(lambda record: record.read_mask(self.labels).shape, records):
                pass

    def true_masks(self, side: int | None) -> MaskSet:
        """Crops (None: whole images) with the true masks: the fully supervised ceiling only."""
        return MaskSet(self.records("train"), self.read, TrueMasks(self.labels), side)

    def pseudo_masks(self, folder: Path, side: int | None) -> MaskSet:
        """Crops (None: whole images) with the pseudo masks that stand in ``folder``, named by sample id."""
        return MaskSet(self.records("train"), self.read, PseudoMasks(folder, self.labels), side)

    def train_on(
        self, training_set: TrainingSet, *, batch_size: int, round_steps: int, validation: HintSet | None = None
    ) -> TissueData:
        """Say what the next fit draws from.

        Args:
            training_set: items.
            batch_size: over all devices.
            round_steps: optimiser steps between two validations and checkpoints.
            validation: items of the validation loss, or None.
        """
        self._training = (training_set, batch_size, round_steps)
        self._validation = validation
        return self

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of one round; the trainer sets the round through the sampler."""
        assert self._training is not None, "call train_on first"
        training_set, batch_size, steps = self._training
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = RoundSampler(
            len(training_set), batch_size=batch_size, steps=steps, seed=self.seed, rank=rank, world=world
        )
        draws = Draws(training_set, self.config.augmentation, self.seed)
        return self._loader(draws, sampler, batch_size // world)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Batches of the validation loss, at most 256 items spread over the split."""
        if self._validation is None or self._training is None:
            return []
        count = len(self._validation)
        kept = np.unique(np.linspace(0, count - 1, min(count, 256)).astype(int))
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # as many items in every process, some of them twice: without any, it would leave the others waiting
        even = np.resize(kept, -(-len(kept) // world) * world)
        draws = [(int(index), 0) for index in even[rank::world]]
        return self._loader(Draws(self._validation, None, self.seed), draws, max(1, self._training[1] // world))

    def _loader(self, draws: Draws, sampler: RoundSampler | list[tuple[int, int]], size: int) -> DataLoader[Sample]:
        workers = self.config.worker_count()
        return DataLoader(
            draws,
            batch_size=size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def _chosen(self) -> tuple[Record, ...]:
        config, records = self.config, tuple(self.dataset.splits.get("train", ()))
        if config.train_fraction is None:
            return records[: config.train_limit]
        seed = config.weak.seed if config.train_fraction_seed is None else config.train_fraction_seed
        return draw_fraction(records, config.train_fraction, seed)

    def _every_record(self) -> list[Record]:
        return [record for split in ("train", "val", "test") for record in self.records(split)]

    def _fits_in_memory(self) -> bool:
        budget = self.config.cache_mb * 1e6
        for record in self._every_record():
            height, width = record.size()
            budget -= 3 * height * width
            if budget < 0:
                return False
        return True

    def _fill_cache(self) -> None:
        records = [record for record in self._every_record() if isinstance(record.image, Path)]
        with ThreadPoolExecutor(max_workers=4) as pool:
            for record, pixels in zip(records, pool.map(Record.read_image, records), strict=True):
                self.read.kept[record.id] = pixels
