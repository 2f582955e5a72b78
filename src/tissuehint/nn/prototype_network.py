"""The classifier whose class maps are similarities to prototypes, level by level. Shared by pbip and lpd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.encoders import build_encoder, check_side, pad_to_multiple
from tissuehint.nn.prototypes import SCALE, Merge, PrototypeProjection, merge_prototypes, similarity_maps

LEVEL_WEIGHTS = (0.1, 1.0, 1.0)  # released codes of PBIP and LPD: l2, l3, l4 (l1 = 0)
FUSION_WEIGHTS = (0.3, 0.3, 0.4)  # released codes of PBIP and LPD: maps of levels 2, 3, 4


class PrototypeSettings(BaseModel):
    """What a classifier by prototypes is made of.

    Args:
        encoder: any timm or transformers backbone; the papers' is ``hf:mit_b1`` of output stride 16, whose patch
            embeddings have the strides [4,2,2,1].
        level_weights: of the classification losses, one for each of the coarsest levels that are used, fine to coarse
            (PBIP's paper: 1, 1, 1; released: .1, 1, 1).
        fusion_weights: of the levels' class maps at inference, as many, fine to coarse.
        similarity: what makes the maps: ``cosine`` to the projected prototypes, or ``convolution``, a 1x1 convolution
            with one channel a class in its place (PBIP, Table 4, without SIM).
        center_prototypes: what is projected are the differences of the prototypes from their mean, scaled to a mean
            length of 1: the prototypes of a frozen encoder lie in a narrow cone, and projections of near equal vectors
            are near equal maps.
        normalize_prototypes: cosines (PBIP, Eq. 2; LPD), or only the pixels' features have length 1 (released PBIP).
        scale: start of the factor on the cosines of each level, from which logits are made.
        learned_scale: train these factors.
        merge: how the maps of the sub-classes become those of a class at inference: ``mean`` (PBIP, Eq. 2), or
            ``softmax``, weighted by themselves (released). Training always takes the mean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: EncoderConfig = EncoderConfig(name="hf:mit_b1", output_stride=16)
    level_weights: tuple[float, ...] = LEVEL_WEIGHTS
    fusion_weights: tuple[float, ...] = FUSION_WEIGHTS
    similarity: Literal["cosine", "convolution"] = "cosine"
    center_prototypes: bool = False
    normalize_prototypes: bool = True
    scale: float = Field(default=SCALE, gt=0)
    learned_scale: bool = True
    merge: Merge = "mean"

    @field_validator("level_weights", "fusion_weights")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) < 0 or sum(value) <= 0:
            raise ValueError(f"{list(value)} needs weights of at least 0, one of them above")
        return value

    @model_validator(mode="after")
    def _one_weight_a_level(self) -> PrototypeSettings:
        if len(self.level_weights) != len(self.fusion_weights):
            raise ValueError(
                f"level_weights {list(self.level_weights)} and fusion_weights {list(self.fusion_weights)} differ in "
                "number; give one of each for every level that is used"
            )
        return self


class LevelMaps(NamedTuple):
    """What the levels see, fine to coarse, on the cells that reach into the image.

    Args:
        similarities: (B,L,h,w) each, cosines (or the channels of the convolution).
        logits: (B,L) each, the factor of the level times the mean of the similarities over the cells.
        scales: the factor of each level.
        features: (B,D,h,w) of the coarsest level.
    """

    similarities: list[Tensor]
    logits: list[Tensor]
    scales: list[Tensor]
    features: Tensor


class PrototypeNetwork(nn.Module):
    """Encoder, projections of the prototypes to the channels of its levels, similarity maps.

    S_i(q,l) = s_i cos(F_i(q), MLP_i(P_l)) and z_i(l) = mean_q S_i(q,l), for each of the coarsest levels i of the
    pyramid.

    Source: Tang et al., PBIP, CVPR 2025, Eq. 2 and Section 3.4; the factors s_i are those of the released code.

    Args:
        config: of the network.
        counts: prototypes of each class; with ``similarity: convolution`` only their number is used, each class has one
            channel.
        dim: D, length of a prototype.

    Raises:
        InputError: all weights on levels that the encoder does not have.

    Attributes:
        counts: prototypes of each class, as the maps have them.
    """

    def __init__(self, config: PrototypeSettings, counts: Sequence[int], dim: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder)
        self.levels = min(len(config.level_weights), len(self.encoder.channels))
        for key in ("level_weights", "fusion_weights"):
            weights = getattr(config, key)
            if sum(weights[-self.levels :]) <= 0:
                rule = f"has weight on levels only that '{config.encoder.name}' lacks, which has {self.levels}"
                raise InputError(f"{key} {list(weights)}", rule, "give the coarsest levels, the last numbers, a weight")
        channels = self.encoder.channels[-self.levels :]
        self.projections, self.convolutions = nn.ModuleList(), nn.ModuleList()
        if config.similarity == "cosine":
            self.counts = tuple(counts)
            self.projections.extend(PrototypeProjection(dim, number) for number in channels)
        else:
            self.counts = (1,) * len(counts)
            self.convolutions.extend(nn.Conv2d(number, len(counts), 1) for number in channels)
        start = config.scale if config.similarity == "cosine" else 1.0
        learned = config.learned_scale and config.similarity == "cosine"
        self.scales = nn.Parameter(torch.full((self.levels,), start), requires_grad=learned)

    def forward(self, images: Tensor, prototypes: Tensor) -> LevelMaps:
        """Images (B,3,H,W) in [0,1] and prototypes (L,D) to the maps of each used level."""
        height, width = images.shape[-2:]
        check_side(height, width)
        features = self.encoder(pad_to_multiple(images, self.encoder.multiple))[-self.levels :]
        strides = self.encoder.strides[-self.levels :]
        features = [
            each[..., : -(-height // stride), : -(-width // stride)]
            for each, stride in zip(features, strides, strict=True)
        ]
        maps = [self._similarities(number, each, prototypes) for number, each in enumerate(features)]
        scales = list(self.scales.unbind())
        logits = [each.mean((2, 3)) * scale for each, scale in zip(maps, scales, strict=True)]
        return LevelMaps(maps, logits, scales, features[-1])

    def class_logits(self, seen: LevelMaps) -> list[Tensor]:
        """(B,N) of each level, means over the prototypes of a class."""
        return [merge_prototypes(each, self.counts) for each in seen.logits]

    def class_maps(self, seen: LevelMaps, how: Merge = "mean") -> list[Tensor]:
        """(B,N,h,w) of each level, with its factor."""
        pairs = zip(seen.similarities, seen.scales, strict=True)
        return [merge_prototypes(each * scale, self.counts, how) for each, scale in pairs]

    def on_image(self, maps: Tensor, images: Tensor, level: int) -> Tensor:
        """Maps of a level so that they cover the image exactly: as they are, or cut where cells reach over it."""
        height, width = images.shape[-2:]
        stride = self.encoder.strides[-self.levels :][level]
        rows, columns = maps.shape[-2] * stride, maps.shape[-1] * stride
        if (rows, columns) == (height, width):
            return maps
        return F.interpolate(maps, (rows, columns), mode="bilinear", align_corners=False)[..., :height, :width]

    def _similarities(self, level: int, features: Tensor, prototypes: Tensor) -> Tensor:
        if self.config.similarity == "convolution":
            maps: Tensor = self.convolutions[level](features)
            return maps
        projected = self.projected(level, prototypes)
        return similarity_maps(features, projected, normalize_prototypes=self.config.normalize_prototypes)

    def projected(self, level: int, prototypes: Tensor) -> Tensor:
        """Prototypes (L,D) in the channels of a level, (L,C)."""
        if self.config.center_prototypes:
            prototypes = prototypes - prototypes.mean(0)
            prototypes = prototypes / prototypes.norm(dim=1).mean().clamp_min(1e-8)
        found: Tensor = self.projections[level](prototypes)
        return found
