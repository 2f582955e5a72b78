"""Diversity of the prototypes of a class: losses that make them look at different places, and how far they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.nn.prototypes import check_counts, precise_type

SHARE = 0.2  # of a region's pixels that count as active for a prototype


class Coverage(NamedTuple):
    """How the prototypes of each class share its regions.

    Args:
        coverage: (N,) float64, share of a region that at least one prototype is active in; NaN without a region.
        overlap: (N,) float64, mean intersection over union of two prototypes' active pixels; NaN without a region or a
            second prototype.
    """

    coverage: Tensor
    overlap: Tensor


def jeffreys_diversity_loss(
    features: Tensor,
    prototypes: Tensor,
    regions: Tensor,
    *,
    temperature: float = 0.1,
    min_pixels: int | None = None,
) -> Tensor:
    r"""Prototypes of a class should look at different pixels of its region: Jeffreys form.

    In an image, with :math:`\Omega_c` the pixels of class c,

    .. math::
        v_{ck}(p) = \operatorname{softmax}_{p \in \Omega_c} \frac{\cos(F(p), P_{ck})}{\tau}, \qquad
        L_c = \operatorname{mean}_{k < k'} e^{-D(v_{ck}, v_{ck'})}, \qquad D(u, v) = KL(u \| v) + KL(v \| u)

    and the loss is the mean of :math:`L_c` over the classes present in the image, then over the images that have one.
    In (0,1]; 1 where all prototypes of a class look at the same pixels.

    Source: LPD (arXiv 2512.05922), released code, with one softmax in place of two and with a temperature, without
    which the distributions are flat (the defects are listed in ``methods/lpd/README.md``).

    Args:
        features: (B,D,H,W), any length.
        prototypes: (N,K,D), any length.
        regions: (B,H,W) integers: the class of each pixel in 0..N-1, -1 for none. No gradient.
        temperature: tau, above 0.
        min_pixels: a class is present where its region has at least so many pixels; None is 2 K. With one pixel all
            distributions are the same, whatever the prototypes.

    Returns:
        Scalar; 0 with zero gradient where no class is present, or where K is 1.

    Raises:
        InputError: shapes that do not fit, regions that are no classes, a temperature that is not above 0, min_pixels
            below 1.

    Example:
        >>> features = torch.eye(2)[None, :, None].repeat(1, 1, 1, 3)  # pixels of two kinds, in turn
        >>> regions = torch.zeros(1, 1, 6, dtype=torch.long)
        >>> apart, alike = torch.eye(2)[None], torch.ones(1, 2, 2)
        >>> [round(float(jeffreys_diversity_loss(features, each, regions)), 4) for each in (apart, alike)]
        [0.0, 1.0]
    """
    _check(features, prototypes, regions)
    if not temperature > 0:
        raise InputError(f"temperature {temperature}", "is not above 0", "use .1")
    classes, most = prototypes.shape[:2]
    least = 2 * most if min_pixels is None else min_pixels
    if least < 1:
        raise InputError(f"min_pixels {least}", "is below 1", "use 2 K, the default")
    inside = _inside(regions, classes)
    images, chosen = (inside.sum(2) >= least).nonzero(as_tuple=True)
    if most < 2 or not len(images):
        return _nothing(features, prototypes)
    with _full_precision(features):
        scores = (_cosines(features, prototypes) / temperature)[images, chosen]  # (M,K,P)
        return _mean_of_images(_alikeness(scores, ~inside[images, chosen][:, None]), images)


def _alikeness(scores: Tensor, outside: Tensor) -> Tensor:
    """(M,) mean over the pairs of prototypes of exp(-D), from scores (M,K,P), some of whose pixels are outside."""
    weights = scores.masked_fill(outside, float("-inf")).softmax(2)
    # sum over p of (u - v) (log u - log v): the normalisers of u and v drop out, for u and v have the same sum
    products = weights @ scores.transpose(1, 2)
    own = products.diagonal(dim1=1, dim2=2)
    divergence = own[:, :, None] + own[:, None] - products - products.transpose(1, 2)
    number = scores.shape[1]
    first, second = torch.triu_indices(number, number, 1, device=scores.device)
    return (-divergence[:, first, second].clamp_min(0)).exp().mean(1)


def correlation_diversity_loss(
    features: Tensor, prototypes: Tensor, regions: Tensor, *, window: int = 7, min_mass: float = 0.05
) -> Tensor:
    r"""Prototypes of a class should look at different places of its region: correlation form.

    With :math:`m` the indicator of the region of class c, and :math:`A_w` the mean over a window of w x w pixels
    (outside of the image stands 0),

    .. math::
        a_k = \frac{A_w[\cos(F, P_{ck})\, m]}{A_w[m]} \ \text{where}\ A_w[m] > m_0, \qquad
        L_c = \frac{1}{K (K - 1)} \sum_{k \ne k'} \operatorname{corr}(a_k, a_{k'})^2

    with the plain correlation over these positions, of which there must be two. The mean of :math:`L_c` over the
    classes of an image, then over the images that have one. In [0,1]; correlation of either sign counts.

    Source: LPD (arXiv 2512.05922), first release of the code, without its division by the number of positions, which
    makes the loss vanish.

    Args:
        features: as ``jeffreys_diversity_loss``.
        prototypes: as ``jeffreys_diversity_loss``.
        regions: as ``jeffreys_diversity_loss``.
        window: w, an odd number of pixels.
        min_mass: m_0, the share of a window that must lie in the region.

    Returns:
        Scalar; 0 with zero gradient where no class has two positions, or where K is 1.

    Raises:
        InputError: shapes that do not fit, regions that are no classes, an even window or one below 1.
    """
    _check(features, prototypes, regions)
    if window < 1 or window % 2 == 0:
        raise InputError(f"window {window}", "is no odd number from 1 on", "use 7")
    classes, most = prototypes.shape[:2]
    inside = _inside(regions, classes)
    size = regions.shape[1:]
    precise = precise_type(features)
    mass = _window_means(inside.reshape(-1, *size).to(precise), window).reshape(inside.shape)
    kept = mass > min_mass
    images, chosen = (kept.sum(2) >= 2).nonzero(as_tuple=True)
    if most < 2 or not len(images):
        return _nothing(features, prototypes)
    with _full_precision(features):
        masked = _cosines(features, prototypes)[images, chosen] * inside[images, chosen][:, None]
        means = _window_means(masked.reshape(-1, *size), window).reshape(masked.shape)
        smooth = means / (mass[images, chosen][:, None] + 1e-8)
        return _mean_of_images(_squared_correlations(smooth, kept[images, chosen][:, None].to(precise)), images)


def _squared_correlations(values: Tensor, places: Tensor) -> Tensor:
    """(M,) mean over the pairs of rows of (M,K,P) of their squared correlation over the places (M,1,P) that are 1."""
    number, most = places.sum(2, keepdim=True), values.shape[1]
    central = values * places
    for _ in range(2):  # what rounding leaves of a constant row would count as a shape of its own
        central = (central - central.sum(2, keepdim=True) / number) * places
    unit = central / (torch.linalg.vector_norm(central, dim=2, keepdim=True) + 1e-8)
    squares = (unit @ unit.transpose(1, 2)).square()
    others: Tensor = squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)
    return others / (most * (most - 1))


@torch.no_grad()
def prototype_coverage(maps: Tensor, regions: Tensor, counts: Sequence[int], *, share: float = SHARE) -> Coverage:
    r"""How much of its region the prototypes of a class see together, and how much two of them see the same.

    A prototype is active in the :math:`\lceil` share n :math:`\rceil` of the n pixels of the region where its map is
    largest (of equal ones the first in reading order). Coverage is the share of the region where any prototype of the
    class is active; overlap the mean over the pairs of prototypes of their intersection over union. Each is the mean
    over the images whose region has at least 2 K pixels.

    K prototypes that look at the same pixels have coverage ``share`` and overlap 1; the largest coverage is
    min(1, K share).

    Args:
        maps: (B,L,H,W) of the prototypes, classes in order.
        regions: (B,H,W) integers, as ``jeffreys_diversity_loss``.
        counts: prototypes of each class.
        share: in (0,1].

    Returns:
        Coverage and overlap of each class.

    Raises:
        InputError: shapes that do not fit, counts that do not make up L, a share outside of (0,1].
    """
    if maps.ndim != 4 or regions.ndim != 3 or (len(maps), *maps.shape[2:]) != tuple(regions.shape):
        rule = f"do not fit regions of shape {tuple(regions.shape)}"
        raise InputError(f"maps of shape {tuple(maps.shape)}", rule, "give (B,L,H,W) and (B,H,W)")
    check_counts(counts, maps.shape[1])
    if not 0 < share <= 1:
        raise InputError(f"share {share}", "is not in (0,1]", "use .2")
    inside = _inside(regions, len(counts))
    coverage, overlap, first = list[float](), list[float](), 0
    for number, count in enumerate(counts):
        found = _of_class(maps[:, first : first + count].flatten(2), inside[:, number], share)
        coverage.append(found[0])
        overlap.append(found[1])
        first += count
    return Coverage(torch.tensor(coverage, dtype=torch.float64), torch.tensor(overlap, dtype=torch.float64))


def _of_class(maps: Tensor, inside: Tensor, share: float) -> tuple[float, float]:
    """Coverage and overlap of one class from its maps (B,K,P) and its region (B,P)."""
    number, count = inside.sum(1), maps.shape[1]
    enough = number >= 2 * count
    if not enough.any():
        return math.nan, math.nan
    maps, inside, number = maps[enough].double(), inside[enough], number[enough]
    order = maps.masked_fill(~inside[:, None], float("-inf")).argsort(dim=2, descending=True, stable=True)
    rank = order.argsort(dim=2)
    limit = (number.double() * share).ceil().long()
    active = (rank < limit[:, None, None]).double()  # (B,K,P)
    coverage = (active.amax(1).sum(1) / number).mean()
    if count < 2:
        return float(coverage), math.nan
    both = active @ active.transpose(1, 2)
    shares = both / (2 * limit[:, None, None] - both)
    first, second = torch.triu_indices(count, count, 1)
    return float(coverage), float(shares[:, first, second].mean())


def _cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """(B,N,K,P) for the P pixels of an image."""
    cells = _unit(features.to(precise_type(features)).flatten(2), 1)
    return torch.einsum("bdp,nkd->bnkp", cells, _unit(prototypes.to(cells), 2))


def _unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors of length 1; those of length 0 stay, with a gradient that stays finite in half precision too."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 0, length, 1.0)


def _full_precision(features: Tensor) -> torch.autocast:
    """Differences of products that are large at a small temperature need their digits."""
    return torch.autocast(features.device.type, enabled=False)


def _inside(regions: Tensor, classes: int) -> Tensor:
    """(B,N,P) bool: which pixels belong to each class."""
    flat = regions.flatten(1)
    if flat.numel() and not -1 <= int(flat.min()) <= int(flat.max()) < classes:
        rule = f"hold {int(flat.min())} to {int(flat.max())}; {classes} classes are 0 to {classes - 1}, and -1 for none"
        raise InputError("regions", rule, "give the class of each pixel")
    return flat[:, None] == torch.arange(classes, device=regions.device)[:, None]


def _window_means(maps: Tensor, window: int) -> Tensor:
    """(M,H,W) averaged over windows of a given side; outside stands 0, and counts."""
    return F.avg_pool2d(maps[:, None], window, stride=1, padding=window // 2)[:, 0]


def _mean_of_images(values: Tensor, images: Tensor) -> Tensor:
    """Values (M,) of classes to their mean over the classes of each image, then over the images (M,) that occur."""
    number = torch.bincount(images)
    return (values / number[images]).sum() / (number > 0).sum()


def _nothing(features: Tensor, prototypes: Tensor) -> Tensor:
    """0 with zero gradient."""
    precise = precise_type(features)
    return features[:0].to(precise).sum() + prototypes[:0].to(precise).sum()


def _check(features: Tensor, prototypes: Tensor, regions: Tensor) -> None:
    if features.ndim != 4:
        rule = "are not (B,D,H,W)"
        raise InputError(f"features of shape {tuple(features.shape)}", rule, "give the features of a batch of images")
    if prototypes.ndim != 3 or prototypes.shape[2] != features.shape[1]:
        rule = f"are not (N,K,{features.shape[1]}), which these features need"
        raise InputError(f"prototypes of shape {tuple(prototypes.shape)}", rule, "give the prototypes of all classes")
    wanted = (len(features), *features.shape[2:])
    if tuple(regions.shape) != wanted or regions.is_floating_point():
        rule = f"are not integers of shape {wanted}, which these features need"
        found = f"regions of shape {tuple(regions.shape)} and type {regions.dtype}"
        raise InputError(found, rule, "give the class of each pixel, -1 for none")
