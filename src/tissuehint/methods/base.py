"""The contract of a method, and what all methods that learn from tags share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import lightning as L
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from tissuehint.data.module import Supervision, TissueData
from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.nn.class_maps import ClassMaps as ClassMaps
from tissuehint.ops.white import white_masks

# probability that the tissue classes share at a white pixel; with 0 the first class would win every such pixel wherever
# white cannot be predicted
TISSUE_UNDER_WHITE = 1e-3
UNREFINED = 1e-12  # weight of tissue maps as they were before the CRF


class MethodConfig(BaseModel):
    """What every method config has: its name. Subclasses add keys; all are frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str


class Training(Protocol):
    """What a run offers to ``WeakMethod.fit``: the budget, a folder, and one Lightning fit at a time."""

    folder: Path
    steps: int
    batch_size: int
    round_steps: int

    def fit(self, module: L.LightningModule, data: TissueData, *, keep_lowest: str | None = None) -> None:
        """Train ``module`` on ``data`` for ``steps`` optimiser steps: log, checkpoints and resume included.

        Args:
            module: what is trained.
            data: after ``train_on``.
            keep_lowest: name of a value that ``module`` logs once a round on validation hints; training ends with the
                weights of the round where it was lowest. None ends with the last weights.
        """

    def phase(
        self, name: str, *, steps: int | None = None, batch_size: int | None = None, round_steps: int | None = None
    ) -> Training:
        """A training that is one of several of a method, in a folder of its own and done once.

        Args:
            name: of the phase, and of its folder.
            steps, batch_size, round_steps: its budget; None takes that of the whole.
        """


class WeakMethod(L.LightningModule, ABC):
    """A system that turns one kind of cheap hint into tissue maps.

    A tissue map is (B,K,H,W) float class probabilities at image size, K = ``labels.num_classes`` (white included where
    the label space has it). Images are (B,3,H,W) float in [0,1], any size from 32 px.

    Args:
        config: frozen, of type ``Config``.
        labels: the classes.

    Attributes:
        supervision: the hint that it learns from.
        Config: type of its config.
        channels_last: train with weights in the memory order that convolutions like best; rounding differs.
    """

    supervision: ClassVar[Supervision]
    Config: ClassVar[type[MethodConfig]]
    channels_last: ClassVar[bool] = False

    def __init__(self, config: MethodConfig, labels: LabelSpace) -> None:
        super().__init__()
        self.config = config
        self.labels = labels

    def prepare(self, data: TissueData, cache: Path) -> None:
        """Make what must exist before training; ``cache`` is a folder of the run directory. Nothing by default."""

    def fit(self, run: Training, data: TissueData) -> None:
        """Train. One Lightning fit by default; overridden where training has phases."""
        training, validation = data.hints("train", self.supervision), None
        if data.records("val"):
            validation = data.hints("val", self.supervision)
        data.train_on(training, batch_size=run.batch_size, round_steps=run.round_steps, validation=validation)
        run.fit(self, data)

    def illustrate(self, data: TissueData, folder: Path) -> None:
        """Leave pictures of what was learned for the report in ``folder``, with ``pictures.json``. None by default."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms by name, scalars already weighted; their sum is trained. Never reads ``batch.masks``."""

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Tissue map (B,K,H,W) of images (B,3,H,W), without labels: what is scored by default and deployed."""

    @abstractmethod
    def label_guided(self, batch: Batch) -> Tensor:
        """Tissue map (B,K,H,W) that may use the hints of the batch; all zero for an image whose hint is empty.

        Makes the pseudo masks of training images. On val or test it looks at their labels: ``oracle`` in every table.
        """

    @abstractmethod
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """Named maps (B,n,h,w) for reports, and what else tells how they come about.

        Values of one pixel (the presence of a class) and those named ``..._images`` are no maps of the image.
        """

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Sum of ``losses``; each term is logged."""
        terms = self.losses(batch)
        total = torch.stack(list(terms.values())).sum()
        self.log("train_loss", total, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(batch))
        if len(terms) > 1:
            named = {f"train_{name}": value for name, value in terms.items()}
            self.log_dict(named, on_step=True, on_epoch=False, batch_size=len(batch))
        return total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Logs the sum of ``losses`` on validation hints."""
        self.log_validation(self.losses(batch), batch)

    def log_validation(self, terms: dict[str, Tensor], batch: Batch) -> None:
        """Log the sum of loss terms as ``val_loss``."""
        total = torch.stack(list(terms.values())).sum()
        self.log("val_loss", total, prog_bar=True, on_epoch=True, batch_size=len(batch), sync_dist=True)

    def total_steps(self) -> int:
        """Optimiser steps of the fit, for learning-rate schedules."""
        return int(self.trainer.estimated_stepping_batches)

    @abstractmethod
    def configure_optimizers(self) -> Any:
        """As in Lightning."""


class TestTimeAugmentation(BaseModel):
    """Views of an image whose maps are averaged: the product of the three lists.

    The default is the plain image alone. Maps have the resolution of the first scale.

    Args:
        flip: add the image mirrored left-right, upside down, and both; ``horizontal`` adds the first alone.
        scales: linear factors of image size.
        intensities: factors of brightness.
    """

    __test__: ClassVar[bool] = False  # the name starts with Test, but pytest need not collect it
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    flip: bool | Literal["horizontal"] = False
    scales: tuple[float, ...] = (1.0,)
    intensities: tuple[float, ...] = (1.0,)

    @field_validator("scales", "intensities")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError(f"{list(value)} needs at least one factor, each above 0")
        return value


class CRFConfig(BaseModel):
    """A dense conditional random field on tissue maps: labels follow the edges of the image (``ops.crf.dense_crf``).

    The numbers are those of the released code of LPD. Lengths are pixels of the image as the network sees it.

    Args:
        gaussian_std: of the smoothness kernel, pixels.
        gaussian_weight: of the smoothness kernel.
        bilateral_std: of the positions in the appearance kernel, pixels.
        colour_std: of the colours in it, in 0..255.
        bilateral_weight: of the appearance kernel.
        iterations: of the mean field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gaussian_std: float = Field(default=15, gt=0)
    gaussian_weight: float = Field(default=30, ge=0)
    bilateral_std: float = Field(default=10, gt=0)
    colour_std: float = Field(default=20, gt=0)
    bilateral_weight: float = Field(default=50, ge=0)
    iterations: int = Field(default=5, ge=1)

    def refine(self, probabilities: Tensor, images: Tensor) -> Tensor:
        """Probabilities (B,C,H,W) of images (B,3,H,W) in [0,1], refined; rows of zeros become uniform."""
        from tissuehint.ops.crf import dense_crf

        total = probabilities.sum(1, keepdim=True)
        given = torch.where(total > 0, probabilities, 1.0)
        settings = self.model_dump(exclude={"colour_std"})
        return dense_crf(given / given.sum(1, keepdim=True), images, colour_std=self.colour_std / 255, **settings)


def kept_shares(refined: Tensor, before: Tensor) -> Tensor:
    """Refined shares, with a trace of those before: the field drives classes that lose below the smallest float."""
    return refined + UNREFINED * before


class WhiteConfig(MethodConfig):
    """What every method has that learns no white class: the rule that finds white, and a refinement of the rest.

    Args:
        crf: refine tissue maps by a dense conditional random field, image by image (window by window, where images are
            cut into patches); null leaves them as they are.
        white_threshold: grey value in 0..255 above which a pixel is white, where the label space has white.
        white_min_area: smaller white spots, in pixels, count as tissue.
    """

    crf: CRFConfig | None = None
    white_threshold: int = Field(default=200, ge=0, le=255)
    white_min_area: int = Field(default=50, ge=0)

    def refine(self, shares: Tensor, images: Tensor) -> Tensor:
        """``crf`` on shares (B,C,H,W) of tissue classes; a class without any share in an image gets none."""
        if self.crf is None:
            return shares
        present = (shares.flatten(2).amax(2) > 0)[:, :, None, None]
        refined = kept_shares(self.crf.refine(shares, images), shares) * present
        return refined / refined.sum(1, keepdim=True).clamp_min(1e-30)

    def split_white(self, shares: Tensor, images: Tensor, labels: LabelSpace) -> Tensor:
        """Give white pixels to the white channel, where the label space has one.

        White pixels (``ops.white``) go to the white channel but for ``TISSUE_UNDER_WHITE``, which keeps the shares of
        the tissue classes in proportion: the protocols that know no white prediction (A and B) ask which tissue is the
        likeliest there.

        Args:
            shares: (B,C,H,W) over tissue classes; an image with 0 everywhere has no hint, and nothing is said about it,
                not even white.
            images: (B,3,H,W) in [0,1].
            labels: the classes.

        Returns:
            (B,K,H,W), K = C, or C + 1 with white.
        """
        if labels.white is None:
            return shares
        white = white_masks(images, threshold=self.white_threshold / 255, min_area=self.white_min_area)[:, None]
        hinted = shares.flatten(1).any(1)[:, None, None, None]
        share = white.to(shares) * hinted * (1 - TISSUE_UNDER_WHITE)
        return torch.cat([shares * (1 - share), share], 1)


class TagConfig(WhiteConfig):
    """What every tag method has.

    Args:
        test_time: augmentation at inference.
        presence_threshold: a class is present in an image if its probability reaches this (WSSS-Tissue: .1, TPRO: .4 on
            BCSS and .15 on LUAD, wsss_gland: .25); the likeliest class always is.
    """

    test_time: TestTimeAugmentation = TestTimeAugmentation()
    presence_threshold: float = Field(default=0.5, ge=0, le=1)


class TagMethod(WeakMethod):
    """Shared by the methods that learn from tags: test-time augmentation, presence gate, maps to probabilities.

    A subclass gives ``class_maps``; the base makes from it ``predict`` (gate from the predicted presence) and
    ``label_guided`` (gate from the tags).
    """

    supervision: ClassVar[Supervision] = "tags"
    config: TagConfig

    @abstractmethod
    def class_maps(self, images: Tensor) -> ClassMaps:
        """Class maps and image logits of images (B,3,H,W), one view."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Multi-label binary cross-entropy on the image logits."""
        logits = self.class_maps(batch.images).logits
        return {"classification": F.binary_cross_entropy_with_logits(logits, batch.need_tags())}

    def predict(self, images: Tensor) -> Tensor:
        """Tissue map with the classes that the network itself finds present."""
        seen = self.augmented(images)
        presence = seen.logits.sigmoid()
        gate = (presence >= self.config.presence_threshold) | (presence == presence.amax(1, keepdim=True))
        return self.tissue_map(seen.maps, gate, images)

    def label_guided(self, batch: Batch) -> Tensor:
        """Tissue map with the tagged classes."""
        tags = batch.need_tags()
        return self.tissue_map(self.augmented(batch.images).maps, tags > 0, batch.images)

    def augmented(self, images: Tensor) -> ClassMaps:
        """Mean of maps and logits over the views of ``config.test_time``, in the frame of the plain image."""
        views = self.config.test_time
        flips: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)]
        flips = flips[: {False: 1, "horizontal": 2, True: 4}[views.flip]]
        size: tuple[int, int] | None = None
        maps, logits = [], []
        for axes, scale, intensity in product(flips, views.scales, views.intensities):
            seen = self.class_maps(_view(images, axes, scale, intensity))
            straight = seen.maps.flip(axes) if axes else seen.maps
            size = size or (straight.shape[-2], straight.shape[-1])
            if straight.shape[-2:] != size:
                straight = F.interpolate(straight, size, mode="bilinear", align_corners=False)
            maps.append(straight)
            logits.append(seen.logits)
        return ClassMaps(torch.stack(maps).mean(0), torch.stack(logits).mean(0))

    def tissue_map(self, maps: Tensor, gate: Tensor, images: Tensor) -> Tensor:
        """From class maps to probabilities.

        M_c = gate_c ReLU(F_c) / max ReLU(F_c), the class activation map of Zhou et al. 2016 scaled to 1 per class;
        p_c = (M_c + eps gate_c) / sum over classes, eps = 1e-4, so that pixels no class speaks for are shared evenly by
        the classes present. White is split off by ``WhiteConfig.split_white``.

        Args:
            maps: (B,C,h,w) from ``class_maps``.
            gate: (B,C) bool, the classes that may occur; an image without any gets zeros.
            images: (B,3,H,W) in [0,1].

        Returns:
            (B,K,H,W), K = C, or C + 1 with white.
        """
        active = self.activation(F.interpolate(maps.float(), images.shape[-2:], mode="bilinear", align_corners=False))
        weights = (active + 1e-4) * gate[:, :, None, None]
        shares = weights / weights.sum(1, keepdim=True).clamp_min(1e-8)
        return self.config.split_white(self.config.refine(shares, images), images, self.labels)

    def activation(self, maps: Tensor) -> Tensor:
        """What of class maps (B,C,H,W) speaks for a class: the part above 0, its largest value scaled to 1."""
        active = F.relu(maps)
        return active / active.amax((2, 3), keepdim=True).clamp_min(1e-8)


def _view(images: Tensor, axes: tuple[int, ...], scale: float, intensity: float) -> Tensor:
    view = images.flip(axes) if axes else images
    if scale != 1:
        height, width = (max(32, round(side * scale)) for side in images.shape[-2:])
        view = F.interpolate(view, (height, width), mode="bilinear", align_corners=False, antialias=scale < 1)
    return (view * intensity).clamp(0, 1) if intensity != 1 else view
