"""Losses on (pseudo) masks: logits (B,K,H,W), target (B,H,W) class indices, 255 = ignore; each returns a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tissuehint.labels import IGNORE

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean over the labelled pixels of -log softmax(logits)_target.

    Args:
        logits: (B,K,H,W).
        target: (B,H,W) int64 in 0..K-1, or ``ignore_index``.
        ignore_index: pixels that do not count.

    Returns:
        Scalar; 0 (with zero gradient) where no pixel is labelled, since the mean of nothing would be NaN.
    """
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp_min(1)


LOSSES: dict[str, SegmentationLoss] = {"cross_entropy": cross_entropy}
