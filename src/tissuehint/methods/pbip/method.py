"""PBIP as a weak method."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.data.module import TissueData
from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import MethodConfig
from tissuehint.methods.pbip.bank import Bank
from tissuehint.methods.pbip.bank_files import inputs_digest, load_or_build, read_bank, sub_class_pictures
from tissuehint.methods.pbip.config import PBIPConfig
from tissuehint.methods.prototypes import PrototypeMethod
from tissuehint.nn.prototype_network import LevelMaps


class PBIP(PrototypeMethod):
    """Cluster single-tissue patches into prototypes, train a classifier whose class maps are similarities to them.

    What a class map cuts out of an image must look like the prototypes of its class to a frozen encoder, what it leaves
    like those of other classes.

    Source: Tang et al., Prototype-Based Image Prompting for Weakly Supervised Histopathological Image Segmentation,
    CVPR 2025.
    """

    Config: ClassVar[type[MethodConfig]] = PBIPConfig
    config: PBIPConfig
    bank_prototypes: Tensor
    bank_center: Tensor

    def __init__(self, config: PBIPConfig, labels: LabelSpace) -> None:
        super().__init__(config, labels, config.bank.counts(labels))
        self.register_buffer("bank_prototypes", torch.zeros(sum(self.counts), self.dim))
        self.register_buffer("bank_center", torch.zeros(self.dim))
        # training images, so not saved with the model, which may go where they may not
        self._bank_images: Tensor | None = None

    def prototypes(self) -> Tensor:
        """(L,D) of the image bank, unit vectors; they are not trained, but their projections are."""
        return self.bank_prototypes

    def encode(self, pictures: Tensor) -> Tensor:
        """Vectors (b,D) of normalised pictures in the space of the bank."""
        features = self.image_encoder.encode(pictures)
        return F.normalize(features, dim=1) - self.bank_center if self.config.bank.center else features

    def prepare(self, data: TissueData, cache: Path) -> None:
        """Build the image bank from the training patches, or read it where ``cache`` has that of the same inputs."""
        items = data.hints("train", self.supervision)
        bank = load_or_build(cache, items, data.labels, self.config.bank, self.image_encoder, self.device)
        self._take(bank, cache)

    def read(self, cache: Path, data: TissueData) -> None:
        """Take the bank that ``prepare`` left in ``cache``, and make none.

        Raises:
            InputError: there is none, or it was made from other images, tags, settings or encoder weights than those of
                now.
        """
        kept = read_bank(cache)
        if kept is None:
            raise InputError(cache, "holds no image bank", "run the recipe again under another name (-o name=...)")
        items = data.hints("train", self.supervision)
        if kept[1] != inputs_digest(items, data.labels, self.config.bank, self.image_encoder):
            rule = "holds a bank of other training images, tags or encoder weights than those of now"
            raise InputError(cache, rule, "give the recipe and another name (-o name=...) to make a new one")
        self._take(kept[0], cache)

    def explained(self, batch: Batch, seen: LevelMaps) -> dict[str, Tensor]:
        """As ``PrototypeMethod.explain``, and the bank where it is at hand (in a run, not in a saved model).

        ``bank_images`` (B,3L,h,w): for each prototype a strip of the training images nearest to its centre, RGB in
        [0,1]; channels 3l, 3l+1, 3l+2 are those of channel l of ``prototypes``. The same for every image.
        """
        found = super().explained(batch, seen)
        if self._bank_images is not None:
            strips = self._bank_images.to(self.device).flatten(0, 1)
            found["bank_images"] = strips.expand(len(batch.images), -1, -1, -1)
        return found

    def _take(self, bank: Bank, cache: Path) -> None:
        self.bank_prototypes.copy_(bank.prototypes)
        self.bank_center.copy_(bank.center)
        self._bank_images = sub_class_pictures(cache, bank)

    @staticmethod
    def read_bank(cache: Path) -> Bank:
        """The bank that ``prepare`` left in a folder.

        Raises:
            InputError: there is none.
        """
        kept = read_bank(cache)
        if kept is None:
            raise InputError(cache, "holds no image bank", "run the recipe, or tissuehint bank score")
        return kept[0]
