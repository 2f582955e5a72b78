"""Losses on (pseudo) masks: logits (B,K,H,W), target (B,H,W) class indices, 255 = ignore; each returns a scalar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    return _weighted(logits, target, ignore_index, purify=True)


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
    return _weighted(logits, target, ignore_index, purify=False)


def _weighted(logits: Tensor, target: Tensor, ignore_index: int, purify: bool) -> Tensor:
    expected = logits.shape[:1] + logits.shape[2:]
    if target.shape != expected:
        raise ValueError(f"target has the shape {tuple(target.shape)}; these logits need {tuple(expected)}")
    if target.is_floating_point():
        raise TypeError(f"target is of {target.dtype}; it holds class indices, give it as torch.int64")
    form = _TwoClasses if logits.shape[1] == 2 else _AnyClasses
    loss: Tensor = form.apply(logits, target, ignore_index, purify)
    return loss


class _Labels(NamedTuple):
    """A target as numbers of the logits' type: on a CPU, comparing or masking int64 maps costs several times more."""

    classes: Tensor  # (B,N) with N = H W; 0 at pixels without label
    labelled: Tensor  # (B,N), 1 or 0
    highest: Tensor  # (B,1), the highest class of each image

    @classmethod
    def read(cls, target: Tensor, scores: Tensor, ignore_index: int) -> Self:
        classes = target.flatten(1).to(scores.dtype)
        labelled = (classes - ignore_index).abs_().clamp_max_(1)
        classes = classes.mul_(labelled)
        lowest, highest = classes.amin(1, keepdim=True), classes.amax(1, keepdim=True)
        extremes = torch.cat((lowest, highest)).flatten().long()
        # cross-entropy's own check that such classes exist: an error, on a GPU an assertion that nothing waits for
        F.nll_loss(scores.new_zeros(len(extremes), scores.shape[1]), extremes, ignore_index=ignore_index)
        return cls(classes, labelled, highest)


def _weights(log_share: Tensor, labels: _Labels, sure: Tensor | None) -> Tensor:
    """The weights w / n (B,N) from log p_t and, for purified labels, max p - min p; 0 at pixels without label.

    exp(-loss) over its mean is a softmax over the labelled pixels times their number, which is also right where the
    network is so far off everywhere that exp(-loss) itself would be 0.
    """
    labelled = labels.labelled
    scores = labelled - 1
    scores = torch.add(log_share, scores, alpha=torch.finfo(scores.dtype).max, out=scores)
    weights = scores.softmax(1)
    weights.mul_(labelled.sum(1, keepdim=True) / weights.sum(1, keepdim=True))  # its sum is 1 but for rounding
    if sure is not None:
        below_highest = torch.mul(labelled, labels.highest, out=scores).sub_(labels.classes)
        one_class = below_highest.amax(1, keepdim=True) == 0
        weights.mul_(sure).lerp_(labelled, one_class.to(weights.dtype))
    return weights.div_(labelled.sum().clamp_min(1))


class _AnyClasses(torch.autograd.Function):
    """The weighted loss; its gradient is w (p - 1[class = t]) / n, since w is a constant."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, purify: bool) -> Tensor:
        scores = _precise(logits)
        labels = _Labels.read(target, scores, ignore_index)
        index = labels.classes.view_as(target).long()[:, None]
        shares = scores.softmax(1)
        largest = shares.amax(1)
        # log p_t = (z_t - max z) + log max p, and max p is at least 1 / K
        log_share = scores.gather(1, index)[:, 0].sub_(scores.amax(1)).add_(largest.log()).flatten(1)
        sure = largest.sub_(shares.amin(1)).flatten(1) if purify else None
        weights = _weights(log_share, labels, sure)
        ctx.save_for_backward(shares, index, weights)
        ctx.dtype = logits.dtype
        return 0 - log_share.mul_(weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        shares, index, weights = ctx.saved_tensors
        weights = (weights * slope).view_as(index)
        return (shares * weights).scatter_add_(1, index, weights.neg_()).to(ctx.dtype), None, None, None


class _TwoClasses(torch.autograd.Function):
    """The same for K = 2, by the margin m of the target over the other class: p_t = sigmoid(m), in fewer passes.

    With s = 1 for class 1 and -1 for class 0, m = s (z_1 - z_0), max p - min p = |2 p_t - 1|, and the gradient of
    z_1 is s w (p_t - 1) / n, that of z_0 its negative.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, purify: bool) -> Tensor:
        scores = _precise(logits)
        labels = _Labels.read(target, scores, ignore_index)
        sign = torch.sub(labels.classes.mul(2), labels.labelled)
        margin = (scores[:, 1] - scores[:, 0]).flatten(1).mul_(sign)
        log_share = F.logsigmoid(margin)
        share = margin.sigmoid_()
        sure = share.mul(2).sub_(1).abs_() if purify else None
        weights = _weights(log_share, labels, sure)
        ctx.save_for_backward(logits, share.sub_(1).mul_(sign).mul_(weights).view_as(target))
        return 0 - log_share.mul_(weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        logits, unit = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        torch.mul(unit, slope, out=gradient[:, 1])
        torch.neg(gradient[:, 1], out=gradient[:, 0])
        return gradient, None, None, None


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


LOSSES: dict[str, SegmentationLoss] = {
    "cross_entropy": cross_entropy,
    "purified": purified_label_loss,
    "reweighted": reweighted_loss,
}
