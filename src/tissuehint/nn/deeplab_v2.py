"""DeepLab-v2: a dilated residual network and atrous spatial pyramid pooling.

Chen, Papandreou, Kokkinos, Murphy, Yuille: DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs. IEEE TPAMI 40(4), 2018, arXiv:1606.00915.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.encoders import load_timm_weights, timm_pyramid
from tissuehint.nn.weights import LoadedWeights

RATES = (6, 12, 18, 24)  # section 4.1, "ASPP-L"
OUTPUT_STRIDE = 8  # section 3.1
PAPER_SCALES = (1.0, 0.75, 0.5)  # section 3.2, multi-scale inputs
INITIAL_STD = 0.01  # of new layers, as in the authors' released networks


class AtrousPyramid(nn.Module):
    r"""Atrous spatial pyramid pooling (ASPP), section 3.2 and figure 4, in its form for residual networks.

    One 3x3 atrous convolution per rate looks at the same map, and the class scores are summed:

    .. math:: y = \sum_{r} (b_r + w_r *_r x)

    where :math:`*_r` is convolution with r - 1 zeros between the taps (equation 1), so that branch r sees
    2r + 1 cells of the map, 8 (2r + 1) px of the image.

    Args:
        channels: of the map.
        num_classes: K.
        rates: r, in cells of the map.
    """

    def __init__(self, channels: int, num_classes: int, rates: Sequence[int] = RATES) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, num_classes, kernel_size=3, padding=rate, dilation=rate) for rate in rates
        )
        for branch in self.branches:
            assert isinstance(branch, nn.Conv2d)
            nn.init.normal_(branch.weight, std=INITIAL_STD)
            assert branch.bias is not None
            nn.init.zeros_(branch.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B,channels,h,w) to class scores (B,K,h,w)."""
        return torch.stack([branch(features) for branch in self.branches]).sum(dim=0)


class DeepLabV2(nn.Module):
    """DeepLab-v2 with a residual trunk of output stride 8.

    The last two stages of the trunk don't stride; their 3x3 convolutions have rates 2 and 4 instead (section 3.1).
    Class scores are upsampled bilinearly to the image. The fully connected CRF of the paper is not part of the
    network. Batch normalisation is trained, where the authors' released networks keep it as pretrained.

    Args:
        encoder: trunk (``resnet101`` in the paper; any timm network that dilates to output stride 8), its weights.
        num_classes: K.
        rates: of the four branches.
        scales: of the multi-scale inputs; (1,) for one, ``PAPER_SCALES`` for the paper's three: the scores of
            the rescaled images are upsampled to the image and the maximum over scales is taken at every position.

    Attributes:
        encoder: the trunk.
        weights: what was read into the trunk, or None.

    Raises:
        InputError: a trunk without a dilated form, bad rates or scales, and as ``build_encoder``.

    Example:
        >>> import torch
        >>> network = DeepLabV2(EncoderConfig(name="resnet18"), num_classes=4)
        >>> network(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 4, 64, 96])
    """

    multiple = OUTPUT_STRIDE

    def __init__(
        self,
        encoder: EncoderConfig,
        num_classes: int,
        rates: Sequence[int] = RATES,
        scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if not rates or min(rates) < 1:
            raise InputError(f"rates {list(rates)}", "are positive whole numbers", f"use {list(RATES)} as in the paper")
        if not scales or min(scales) <= 0:
            raise InputError(f"scales {list(scales)}", "are positive numbers", f"use {list(PAPER_SCALES)} or [1]")
        self.scales = tuple(scales)
        dilated = encoder.model_copy(update={"output_stride": OUTPUT_STRIDE})
        self.encoder: Any = timm_pyramid(dilated, features_only=True)
        self.weights: LoadedWeights | None = load_timm_weights(self.encoder, dilated)
        information: Any = self.encoder.feature_info
        if information.reduction()[-1] != OUTPUT_STRIDE or getattr(self.encoder, "output_fmt", "NCHW") == "NHWC":
            rule = f"has no dilated form of output stride {OUTPUT_STRIDE}"
            raise InputError(f"encoder '{encoder.name}'", rule, "use resnet101, as in the paper")
        self.aspp = AtrousPyramid(information.channels()[-1], num_classes, rates)

    @property
    def segmentation_head(self) -> nn.Module:
        """The classifier, under the name that it has in segmentation_models_pytorch; it runs once per scale."""
        return self.aspp

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B,3,H,W), H and W multiples of 8, to logits (B,K,H,W)."""
        size = images.shape[-2:]
        scores = [
            F.interpolate(self.coarse(rescale(images, scale)), size, mode="bilinear", align_corners=False)
            for scale in self.scales
        ]
        return torch.stack(scores).amax(dim=0) if len(scores) > 1 else scores[0]

    def coarse(self, images: Tensor) -> Tensor:
        """Normalised images (B,3,H,W) to class scores (B,K,H/8,W/8), before upsampling and fusion."""
        scores: Tensor = self.aspp(self.encoder(images)[-1])
        return scores


def rescale(images: Tensor, scale: float) -> Tensor:
    """Resize (B,C,H,W) by ``scale``, to the next multiple of 8 above, so that maps and images stay aligned."""
    if scale == 1:
        return images
    height, width = (-(-int(side * scale) // OUTPUT_STRIDE) * OUTPUT_STRIDE for side in images.shape[-2:])
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
