"""The classifier that tag methods read class maps from: encoder, attention, 1x1 classifier, pooling."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.attention import REDUCTION
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.encoders import build_encoder, check_side, pad_to_multiple
from tissuehint.nn.pyramid_pooling import SCALES, Fusion, PoolingName, PyramidFusionPooling, check_scales, weighted_maps
from tissuehint.nn.receptive_field import cell_centres, moved
from tissuehint.nn.stage_attention import AttentionName, StageAttention


class ClassMaps(NamedTuple):
    """What a tag method sees in images.

    Args:
        maps: (B,C,h,w) class scores, the part above 0 speaks for the class; h x w cells that together cover the image,
            no more and no less (``ClassMapNetwork`` says how, where cells reach over the border).
        logits: (B,C); sigmoid gives the predicted presence.
    """

    maps: Tensor
    logits: Tensor


class PooledMaps(NamedTuple):
    """Class maps and what the pooling made of them, on the cells of the encoder that lie in the image.

    Args:
        class_maps: F (B,C,h,w), not rectified.
        fused: P' (B,C,h,w) of ``PyramidFusionPooling``; None where the pooling is the mean.
        weighted: (B,C,h,w) whose mean over the cells is ``logits``: F itself, or the summand of Eq. 9.
        logits: (B,C).
    """

    class_maps: Tensor
    fused: Tensor | None
    weighted: Tensor
    logits: Tensor


class ClassMapSettings(BaseModel):
    """What a classifier with class maps is made of.

    Args:
        encoder: any timm or transformers backbone, or ``resnet38d``.
        levels: how many of the coarsest pyramid levels are concatenated before the classifier (OEEM: 3), at the
            resolution of the finest of them.
        dropout: on the features, before the classifier.
        centred: bring the cells of every level to the middle of the pixels that they stand for; those of most CNNs look
            up to half a cell above and to the left of it (``nn.receptive_field``). Published codes do not.
        attention: behind stages of the encoder: ``none``, ``criss_cross``, ``criss_cross_twice``, or
            ``consistency_correlation`` (criss-cross, position, criss-cross; Feng et al. 2025).
        attention_levels: the levels of the encoder's pyramid that attention stands behind, -1 is the coarsest; the
            paper's stages 4, 5 and 6 are -4, -3 and -2 of ``resnet38d``.
        attention_reduction: queries and keys have channels / reduction channels (released code: 8, paper: 4).
        pooling: from class maps to logits: ``average`` (Zhou et al. 2016), or ``pyramid_fusion`` (Feng et al. 2025).
        pyramid_scales: cells a side of the grids of ``pyramid_fusion``, increasing.
        pyramid_fusion: how ``pyramid_fusion`` joins them: ``sign_preserving`` (Eq. 5-8) or ``average`` (Table 4).
        maps_from: which maps are read behind ``pyramid_fusion``: ``merged``, ReLU(P') ReLU(F), the part of Eq. 9 that
            speaks for a class; ``class_maps``, F, the class map of Eq. 4 of a network that was trained through the
            pyramid (what the released code reads); or ``pyramid``, P'. The average has F alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: EncoderConfig = EncoderConfig()
    levels: int = Field(default=1, ge=1, le=4)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    centred: bool = False
    attention: AttentionName = "none"
    attention_levels: tuple[int, ...] = (-3, -2, -1)
    attention_reduction: int = Field(default=REDUCTION, ge=1)
    pooling: PoolingName = "average"
    pyramid_scales: tuple[int, ...] = SCALES
    pyramid_fusion: Fusion = "sign_preserving"
    maps_from: Literal["merged", "class_maps", "pyramid"] = "merged"

    @field_validator("attention_levels")
    @classmethod
    def _some_level(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("names no level; write attention: none for a network without")
        return value

    @field_validator("pyramid_scales")
    @classmethod
    def _pyramid(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        try:
            check_scales(value)
        except InputError as error:
            raise ValueError(f"{error.rule}; {error.fix}") from None
        return value


class ClassMapNetwork(nn.Module):
    """Class maps F_c(q) = sum_k w_ck f_k(q) and image logits pooled from them.

    With ``pooling: average`` z_c = mean over the cells q of F_c(q) (Zhou et al. 2016, Eq. 1 and 2: a linear classifier
    applied per cell before the mean gives the same logits and the map at the same time). With ``pyramid_fusion`` the
    cells are weighed by the fused pyramid (Feng et al. 2025, Eq. 9), and the map that is read is that of ``maps_from``.

    Args:
        config: encoder, levels, dropout, attention, pooling.
        num_tissue: C, number of tissue classes.
    """

    def __init__(self, config: ClassMapSettings, num_tissue: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder)
        self.levels = min(config.levels, len(self.encoder.channels))
        self._moves = (0.0,) * self.levels  # of each level, in its cells
        if config.centred:
            pairs = zip(cell_centres(self.encoder), self.encoder.strides, strict=True)
            self._moves = tuple(0.5 - centre / stride for centre, stride in pairs)[-self.levels :]
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(sum(self.encoder.channels[-self.levels :]), num_tissue, 1, bias=False)
        self.pooling: PyramidFusionPooling | None = None
        self.maps_from = config.maps_from
        if config.pooling == "pyramid_fusion":
            # Feng et al. 2025, Experimental Settings; the logits are quadratic in the class maps, and hardly move at
            # first where these are small
            nn.init.xavier_uniform_(self.classifier.weight)
            self.pooling = PyramidFusionPooling(num_tissue, config.pyramid_scales, fusion=config.pyramid_fusion)
        self.attention: StageAttention | None = None
        if config.attention != "none":
            self.attention = StageAttention(
                self.encoder, config.attention, config.attention_levels, config.attention_reduction
            )

    def forward(self, images: Tensor) -> ClassMaps:
        """(B,3,H,W) in [0,1] to class maps (B,C,h,w) and logits (B,C).

        h and w are H / stride and W / stride where the encoder's largest stride divides H and W. Else the last cells
        reach over the image; the maps are then enlarged and cut to (H,W), so that they always cover exactly the image.
        """
        maps, cells = self._maps(images)
        pooled = self._pool(maps[..., : cells[0], : cells[1]])
        if pooled.fused is None or self.maps_from == "class_maps":
            return ClassMaps(self._on_image(maps, images), pooled.logits)
        read = pooled.fused if self.maps_from == "pyramid" else pooled.weighted
        beyond = (0, maps.shape[-1] - cells[1], 0, maps.shape[-2] - cells[0])
        if any(beyond):  # the pyramid is of the image alone
            read = F.pad(read, beyond, mode="replicate")
        return ClassMaps(self._on_image(read, images), pooled.logits)

    def pooled(self, images: Tensor) -> PooledMaps:
        """What the logits of images (B,3,H,W) are made of, for those who want to look at it."""
        maps, cells = self._maps(images)
        return self._pool(maps[..., : cells[0], : cells[1]])

    def _maps(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """F on the cells of the padded image, and how many rows and columns of them reach into the image."""
        height, width = images.shape[-2:]
        check_side(height, width)
        features = self.encoder(pad_to_multiple(images, self.encoder.multiple))[-self.levels :]
        features = [moved(each, cells) if cells else each for each, cells in zip(features, self._moves, strict=True)]
        size = features[0].shape[-2:]
        level = [features[0]] + [
            F.interpolate(feature, size, mode="bilinear", align_corners=False) for feature in features[1:]
        ]
        maps: Tensor = self.classifier(self.dropout(torch.cat(level, 1)))
        stride = self.encoder.strides[-self.levels]
        return maps, (-(-height // stride), -(-width // stride))

    def _pool(self, maps: Tensor) -> PooledMaps:
        if self.pooling is None:
            return PooledMaps(maps, None, maps, maps.mean((2, 3)))
        fused = self.pooling.fuse(maps)
        weighted = weighted_maps(maps, fused)
        return PooledMaps(maps, fused, weighted, weighted.mean((2, 3)))

    def _on_image(self, maps: Tensor, images: Tensor) -> Tensor:
        """Maps of the padded image, cut to the image where it was padded."""
        height, width = images.shape[-2:]
        multiple = self.encoder.multiple
        padded = (height + -height % multiple, width + -width % multiple)
        if padded == (height, width):
            return maps
        return F.interpolate(maps, padded, mode="bilinear", align_corners=False)[..., :height, :width]
