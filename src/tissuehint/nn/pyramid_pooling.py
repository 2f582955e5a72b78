"""Multi-scale pyramid fusion pooling: from class maps to image logits, coarse to fine, in both signs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError

SCALES = (2, 4, 8, 16)  # Feng et al. 2025, text before Eq. 6

PoolingName = Literal["average", "pyramid_fusion"]
Fusion = Literal["sign_preserving", "average"]


class PyramidFusionPooling(nn.Module):
    r"""Pools class maps F at several resolutions and lets their fusion weigh the cells of F.

    With the ReLU :math:`\delta`, and :math:`P_\tau` the mean of F over the cells of a :math:`\tau \times \tau` grid,
    enlarged bilinearly to the size of F:

    .. math::
        S(a, b) &= \sigma(\mathrm{Conv}_{3 \times 3}(\delta(a) \,\|\, \delta(b))) \\
        Pos_k &= S(P'_k, P_{k+1}), \qquad Neg_k = S(-P'_k, -P_{k+1}) \\
        P'_{k+1} &= \tfrac12 \big(\delta(P'_k) Pos_k^1 + \delta(P_{k+1}) Pos_k^2\big)
                  - \tfrac12 \big(\delta(-P'_k) Neg_k^1 + \delta(-P_{k+1}) Neg_k^2\big) \\
        z_c &= \mathrm{mean}_{h,w} \big(\delta(P'_c)\,\delta(F_c) - \delta(-P'_c)\,\delta(-F_c)\big)

    where k counts the scales from coarse to fine, P' starts as the coarsest :math:`P_\tau` and ends as that of the
    finest, and the two channels of Pos and Neg are weights of the two maps, the same for all classes. The sigmoid of
    Eq. 9 is left to the loss: :math:`z` are logits. F comes before any ReLU: with its negative part cut off (as in the
    released code) no logit could be below 0, so no class could be predicted absent.

    Source: Feng et al., AAAI 2025, Eq. 5-9 and Table 4.

    Args:
        num_classes: C.
        scales: cells a side of the grids, increasing. A grid may be finer than the map.
        fusion: ``sign_preserving`` (Eq. 5-8), or the plain mean of all :math:`P_\tau` (``average``, Table 4).

    Attributes:
        positive: for each fusion step the bias-free 3x3 convolution 2C -> 2 of Pos; empty for ``average``.
        negative: the same for Neg.

    Raises:
        InputError: num_classes below 1, or scales that are empty, below 1 or not increasing.

    Example:
        >>> pooling = PyramidFusionPooling(2)
        >>> logits, fused = pooling(torch.randn(3, 2, 14, 14))
        >>> logits.shape, fused.shape
        (torch.Size([3, 2]), torch.Size([3, 2, 14, 14]))
    """

    def __init__(self, num_classes: int, scales: Sequence[int] = SCALES, *, fusion: Fusion = "sign_preserving") -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"num_classes {num_classes}", "is not at least 1", "give the data set's number of classes")
        check_scales(scales)
        self.scales = tuple(scales)
        self.fusion = fusion
        steps = len(self.scales) - 1 if fusion == "sign_preserving" else 0
        self.positive, self.negative = (
            nn.ModuleList(nn.Conv2d(2 * num_classes, 2, 3, padding=1, bias=False) for _ in range(steps))
            for _ in range(2)
        )

    def forward(self, class_maps: Tensor) -> tuple[Tensor, Tensor]:
        """Class maps F (B,C,H,W), not rectified, to logits z (B,C) and the fused map P' (B,C,H,W)."""
        fused = self.fuse(class_maps)
        return weighted_maps(class_maps, fused).mean((2, 3)), fused

    def fuse(self, class_maps: Tensor) -> Tensor:
        """P' (B,C,H,W) of class maps F (B,C,H,W)."""
        levels = [self._level(class_maps, scale) for scale in self.scales]
        if self.fusion == "average":
            return torch.stack(levels).mean(0)
        fused = levels[0]
        for level, positive, negative in zip(levels[1:], self.positive, self.negative, strict=True):
            fused = (_half(fused, level, positive) - _half(-fused, -level, negative)) / 2
        return fused

    @staticmethod
    def _level(class_maps: Tensor, scale: int) -> Tensor:
        pooled = F.adaptive_avg_pool2d(class_maps, scale)
        return F.interpolate(pooled, class_maps.shape[-2:], mode="bilinear", align_corners=False)


def weighted_maps(class_maps: Tensor, fused: Tensor) -> Tensor:
    """What each cell adds to the logit: ReLU(P') ReLU(F) - ReLU(-P') ReLU(-F), the summand of Eq. 9.

    P' F where both have the same sign, with that sign, and 0 elsewhere. Its positive part is the merged class map that
    pseudo masks are made from.

    Args:
        class_maps: F (B,C,H,W).
        fused: P' (B,C,H,W).
    """
    return F.relu(fused) * F.relu(class_maps) - F.relu(-fused) * F.relu(-class_maps)


def check_scales(scales: Sequence[int]) -> None:
    """Raise ``InputError`` for scales that are no pyramid."""
    rising = all(low < high for low, high in pairwise(scales))
    if not scales or min(scales) < 1 or not rising:
        rule = "are no increasing list of whole numbers above 0"
        raise InputError(f"pyramid scales {list(scales)}", rule, f"give for example {list(SCALES)}")


def _half(first: Tensor, second: Tensor, convolution: nn.Module) -> Tensor:
    """One sign of Eq. 8, before the division by 2: ReLU(a) S^1 + ReLU(b) S^2 with S of Eq. 5."""
    first, second = F.relu(first), F.relu(second)
    weights: Tensor = convolution(torch.cat([first, second], 1)).sigmoid()
    return first * weights[:, :1] + second * weights[:, 1:]
