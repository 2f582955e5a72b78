"""What CVM trains with: partial cross-entropy on points, uncertainty-weighted divergence from u (paper, Eq. 2, 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# a pixel whose soft target sums to less than this has none (zoomed targets fade out towards their border)
SAID = 0.5


def grid_points(points: Tensor, covered: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Points in the cells of a working grid.

    Cells that points of two classes share are left out: on the grid they are one place with two answers.

    Args:
        points: (P,3) int rows of (row, column, class) in image pixels.
        covered: height and width in image pixels that the grid covers, at least those of the image.
        grid: height and width of the grid.

    Returns:
        (P',3) int64, each row once, sorted.
    """
    if not len(points):
        return points.new_zeros((0, 3), dtype=torch.int64)
    size, cells = points.new_tensor(covered), points.new_tensor(grid)
    places = torch.div((2 * points[:, :2] + 1) * cells, 2 * size, rounding_mode="floor").clamp_min(0)
    rows: Tensor = torch.unique(torch.cat([torch.minimum(places, cells - 1), points[:, 2:]], 1).long(), dim=0)
    _, owner, count = torch.unique(rows[:, :2], dim=0, return_inverse=True, return_counts=True)
    return rows[count[owner] == 1]


def partial_cross_entropy(log_probabilities: Tensor, points: Sequence[Tensor], radius: int = 0) -> Tensor:
    r"""Cross-entropy on the labelled pixels alone.

    .. math:: \mathcal L_{pce} = -\frac{1}{|S|} \sum_{i \in S} \log \hat y_{i, y_i}

    which for two classes is Eq. 3 of the paper. The mean is taken inside each image, then over the images that have a
    point.

    Args:
        log_probabilities: (B,C,h,w).
        points: B tensors (P_b,3) of (row, column, class) in pixels of this grid.
        radius: each point labels the square of side 2 radius + 1 around it, cut at the border; a point whose square
            lies outside labels nothing.

    Returns:
        Scalar; 0 with zero gradient where no image has a point.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 3; squares: Section 5.2.
    """
    height, width = log_probabilities.shape[-2:]
    steps = torch.arange(-radius, radius + 1, device=log_probabilities.device)
    square = torch.cartesian_prod(steps, steps) if radius else steps.new_zeros((1, 2))
    total, images = log_probabilities.sum() * 0.0, 0
    for image, rows in zip(log_probabilities, points, strict=True):
        if not len(rows):
            continue
        places = (rows[:, None, :2] + square).flatten(0, 1)
        classes = rows[:, 2].repeat_interleave(len(square))
        inside = (places >= 0).all(1) & (places[:, 0] < height) & (places[:, 1] < width)
        places, classes = places[inside], classes[inside]
        if not len(places):
            continue
        total = total - image[classes, places[:, 0], places[:, 1]].mean()
        images += 1
    return total / max(images, 1)


def certainty(u: Tensor) -> Tensor:
    r"""How much a pixel of u counts.

    .. math:: w_i = e^{-2 h_i}, \qquad h_i = -\sum_k u_i^k \ln u_i^k

    Args:
        u: (B,C,h,w) probabilities that sum to 1 over C.

    Returns:
        (B,h,w) in [C^-2, 1]: 1 where u is sure of a class; 1/4 where two classes are as likely as each other.

    Source: Zhang et al., CVPR 2023 (CVM), Section 4.2.2; the entropy of C classes is that of two where C = 2.
    """
    return torch.exp(2 * torch.xlogy(u, u).sum(1))


def weighted_kl(log_probabilities: Tensor, u: Tensor) -> Tensor:
    r"""Divergence of the network's output from u, pixels weighted by the certainty of u.

    .. math:: \mathcal L_{wkl} = \frac{1}{|K|} \sum_{i \in K} w_i \sum_k u_i^k \ln \frac{u_i^k}{\hat y_i^k}

    The paper's second line carries a minus sign too many; this is its first line, which is positive. 0 ln 0 is 0, and
    the logarithm of the output comes from its logits: nothing has to be clamped, and a pixel that is surely wrong keeps
    its gradient.

    Args:
        log_probabilities: (B,C,h,w), from which gradients flow.
        u: (B,C,h,w) summing to 1 over C, or to 0 at pixels that don't count; constant.

    Returns:
        Scalar, at least 0; 0 where u says nothing anywhere.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 2 and Section 4.2.2.
    """
    u, said = _settled(u)
    divergence = (torch.xlogy(u, u) - u * log_probabilities).sum(1)
    return (certainty(u) * divergence * said).sum() / said.sum().clamp_min(1)


def hard_cross_entropy(log_probabilities: Tensor, u: Tensor) -> Tensor:
    """Cross-entropy with the likeliest class of u: the paper's ablation without weighted KL (Fig. 3a).

    Args:
        log_probabilities: (B,C,h,w).
        u: (B,C,h,w) summing to 1 over C, or to 0 at pixels that don't count; constant. With two classes this cuts u
            at .5; a tie is the first class.
    """
    u, said = _settled(u)
    chosen = log_probabilities.gather(1, u.argmax(1, keepdim=True))[:, 0]
    return -(chosen * said).sum() / said.sum().clamp_min(1)


def _settled(u: Tensor) -> tuple[Tensor, Tensor]:
    """U scaled to sum 1, without gradient, and the pixels (B,h,w) where it says something."""
    total = u.detach().sum(1)
    said = total > SAID
    return u.detach() / total.clamp_min(SAID)[:, None], said
