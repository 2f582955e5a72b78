"""Losses on (pseudo) masks: logits (B,K,H,W), target (B,H,W) class indices, 255 = ignore; each returns a scalar."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
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


def purified_label_loss(logits: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    r"""Cross-entropy that trusts pixels whose label the network finds easy and is sure about.

    .. math::
        L &= \frac{1}{n} \sum_q \ell(q)\, w(q), \qquad
        w(q) = \frac{A(q)}{\mathrm{mean}_{r} A(r)} \Big(\max_c p_c(q) - \min_c p_c(q)\Big) \\
        A(q) &= \frac{e^{-\ell(q)}}{\sum_r e^{-\ell(r)}}, \qquad \ell(q) = -\log p_{t(q)}(q)

    with p the softmax of the logits, t the target, and r running over the labelled pixels of the image of q; n counts
    the labelled pixels of the batch. w is a constant for the gradient. In an image whose labels are all of one class
    w = 1, since there is no other class whose noise could be meant.

    A divided by its mean is finite for any loss map, also a flat one (1 everywhere); the released code divides by
    max A - min A, which is 0 there.

    Source: Feng et al., AAAI 2025, Eq. 10 and 11 (PLF).

    Args:
        logits: (B,K,H,W).
        target: (B,H,W) int64 in 0..K-1, or ``ignore_index``.
        ignore_index: pixels that do not count.

    Returns:
        Scalar; 0 (with zero gradient) where no pixel is labelled.

    Example:
        >>> flat = torch.zeros(1, 2, 4, 4)  # nothing is sure: p = 1/2 everywhere
        >>> halves = torch.tensor([0, 0, 1, 1]).expand(1, 4, 4)
        >>> float(purified_label_loss(flat, halves)), round(float(cross_entropy(flat, halves)), 3)
        (0.0, 0.693)
    """
    log_p = F.log_softmax(logits.float(), 1)
    losses = F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none")
    labelled = target != ignore_index
    with torch.no_grad():
        sure = log_p.amax(1).exp_() - log_p.amin(1).exp_()
        weights = _ease(losses, labelled) * sure
        mixed = _has_two_classes(target, labelled, log_p.shape[1])
        weights = torch.where(mixed[:, None, None], weights, torch.ones_like(weights))
    return (losses * weights).sum() / labelled.sum().clamp_min(1)


def reweighted_loss(logits: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    r"""Cross-entropy that trusts pixels whose label the network finds easy.

    .. math::
        L = \frac{1}{n} \sum_q \ell(q)\, \frac{A(q)}{\mathrm{mean}_r A(r)}, \qquad
        A(q) = \frac{e^{-\ell(q)}}{\sum_r e^{-\ell(r)}}, \qquad \ell(q) = -\log p_{t(q)}(q)

    with r running over the labelled pixels of the image of q, and n the labelled pixels of the batch. The weight is a
    constant for the gradient.

    Source: Li et al., Online Easy Example Mining for Weakly-Supervised Gland Segmentation, MICCAI 2022 (OEEM): the
    variant by the loss map alone, normalised by its mean.

    Args:
        logits: (B,K,H,W).
        target: (B,H,W) int64 in 0..K-1, or ``ignore_index``.
        ignore_index: pixels that do not count.

    Returns:
        Scalar; 0 (with zero gradient) where no pixel is labelled.
    """
    losses = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="none")
    labelled = target != ignore_index
    with torch.no_grad():
        weights = _ease(losses, labelled)
    return (losses * weights).sum() / labelled.sum().clamp_min(1)


def _ease(losses: Tensor, labelled: Tensor) -> Tensor:
    """exp(-loss) over its mean on the labelled pixels of each image, (B,H,W); 0 at pixels without label.

    Through logarithms: where the network is far off everywhere, exp(-loss) itself would be 0.
    """
    scores = torch.where(labelled, -losses, -math.inf).flatten(1)
    count = labelled.flatten(1).sum(1, keepdim=True).clamp_min(1)
    mean = scores.logsumexp(1, keepdim=True) - count.log()
    return (scores - mean.clamp_min(torch.finfo(mean.dtype).min)).exp_().view_as(losses)


def _has_two_classes(target: Tensor, labelled: Tensor, classes: int) -> Tensor:
    """Whether more than one class is labelled, for each image (B,)."""
    lowest = torch.where(labelled, target, classes).flatten(1).amin(1)
    highest = torch.where(labelled, target, -1).flatten(1).amax(1)
    return highest > lowest


LOSSES: dict[str, SegmentationLoss] = {
    "cross_entropy": cross_entropy,
    "purified": purified_label_loss,
    "reweighted": reweighted_loss,
}
