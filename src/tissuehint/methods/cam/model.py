"""The network of the CAM baseline: encoder, bias-free 1x1 classifier, global average pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.methods.base import ClassMaps
from tissuehint.methods.cam.config import CAMConfig
from tissuehint.nn.encoders import build_encoder, check_side, pad_to_multiple


class CAMNetwork(nn.Module):
    """Class maps F_c(q) = sum_k w_ck f_k(q) and logits z_c = mean over pixels q of F_c(q).

    Zhou et al. 2016, Eq. 1 and 2: with a linear classifier behind global average pooling, applying it per pixel before
    the pooling gives the same logits and the map at the same time.

    Args:
        config: encoder, levels, dropout.
        num_tissue: C, number of tissue classes.
    """

    def __init__(self, config: CAMConfig, num_tissue: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder)
        self.levels = min(config.levels, len(self.encoder.channels))
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(sum(self.encoder.channels[-self.levels :]), num_tissue, 1, bias=False)

    def forward(self, images: Tensor) -> ClassMaps:
        """(B,3,H,W) in [0,1] to class maps (B,C,h,w) and logits (B,C).

        h and w are H / stride and W / stride where the encoder's largest stride divides H and W. Else the last cells
        reach over the image; the maps are then enlarged and cut to (H,W), so that they always cover exactly the image.
        """
        height, width = images.shape[-2:]
        check_side(height, width)
        padded = pad_to_multiple(images, self.encoder.multiple)
        features = self.encoder(padded)[-self.levels :]
        size = features[0].shape[-2:]
        level = [features[0]] + [
            F.interpolate(feature, size, mode="bilinear", align_corners=False) for feature in features[1:]
        ]
        maps = self.classifier(self.dropout(torch.cat(level, 1)))
        stride = self.encoder.strides[-self.levels]
        logits = maps[..., : -(-height // stride), : -(-width // stride)].mean((2, 3))
        if padded.shape != images.shape:
            maps = F.interpolate(maps, padded.shape[-2:], mode="bilinear", align_corners=False)[..., :height, :width]
        return ClassMaps(maps, logits)
