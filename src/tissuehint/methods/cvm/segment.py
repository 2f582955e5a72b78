"""Segmentation of one image from a few points, without training: contrast maps and the variational solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points
from tissuehint.methods.cvm.contrast import ETA, contrast_maps, unit_range
from tissuehint.methods.cvm.features import ENCODER_LEVELS, encoder_features, stain_features
from tissuehint.ops.variational import segment_two_phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tissuehint.nn.encoders import Encoder

Rule = Literal["difference", "per-point"]

# longest side, px, at which an image is looked at
SIDE = 512
# an encoder sees it this much larger: its finest map is coarser by its stride
ENCODER_ZOOM = 2
# Eq. 6; docs/how-to/segment.md has the measurements behind them
DATA_WEIGHT = {"difference": 1.0, "per-point": 3.0}
EDGE_FACTOR, EDGE_SIGMA = 10.0, 1.0
# averages of u whose values span less are a consensus, not a contrast: the scaling of Eq. 7 is left out
CONSENSUS = 1e-3
# share of the evidence in the choice of a class where the solutions are level
TIE = 1e-3


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a few points say about an image of H x W px that was looked at in h x w places.

    Attributes:
        mask: (H,W) uint8 class indices.
        tissue_map: (K,H,W) float32 in [0,1], sums to 1 over the classes.
        certainty: (H,W) float32, ``exp(-2 h)`` with h the entropy (natural logarithm) of the tissue map: 1 where it is
            sure, 1/K^2 where all classes are level (the weight w of the paper's Sec. 3.4).
        contrast: for each class the contrast maps of its points against those of all others, (P_k,h,w) in [0,1].
        solutions: (K,h,w) in [0,1], the solution u of each class before they are made to sum to 1.
    """

    mask: NDArray[np.uint8]
    tissue_map: Tensor
    certainty: Tensor
    contrast: tuple[Tensor, ...]
    solutions: Tensor


def segment_image(
    image: NDArray[np.uint8],
    points: Points,
    labels: LabelSpace,
    *,
    encoder: Encoder | None = None,
    levels: Sequence[int] = ENCODER_LEVELS,
    side: int = SIDE,
    eta: float = ETA,
    rule: Rule = "difference",
    data_weight: float | None = None,
    edge_factor: float = EDGE_FACTOR,
) -> Segmentation:
    """Segment an image from points of at least two classes.

    The image is made smaller where it is longer than ``side``, ``stain_features`` and ``encoder_features`` describe its
    places, ``segment_features`` decides about them, and the solutions are enlarged bilinearly to the image.

    Args:
        image: (H,W,3) uint8, red green blue.
        points: rows of (row, column, class), px of the image; each class needs one at least.
        labels: the classes.
        encoder: its maps are compared together with the stains; None compares the stains alone.
        levels: pyramid levels of the encoder, 0 the finest.
        side: longest side, px, at which the image is looked at; an encoder sees it twice as large where it is.
        eta: weight of the out-of-target correlation (Eq. 5), in [0,1].
        rule: see ``segment_features``.
        data_weight: lambda of Eq. 6; None is 1 for the rule ``difference``, 3 for ``per-point``.
        edge_factor: how much cheaper a boundary is at an edge of the map; 0 makes all places equal.

    Returns:
        The segmentation.

    Raises:
        InputError: an image of another shape or type; fewer than two classes, a class without points, points outside
            the image, points of two classes in one place; an image in which the points are alike.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 4 to 7, without its network.

    Example:
        >>> image = np.full((40, 60, 3), 250, np.uint8)
        >>> image[:, 30:] = 120, 60, 150
        >>> points = Points([(20, 10, 0), (20, 50, 1)])
        >>> segment_image(image, points, LabelSpace(("slide", "tissue"))).mask[0, ::10]
        array([0, 0, 0, 1, 1, 1], dtype=uint8)
    """
    _check(image, points, labels)
    seen = _shrunk(image, side)
    features = stain_features(seen)
    if encoder is not None:
        size = (seen.shape[0], seen.shape[1])
        maps = encoder_features(encoder, _shrunk(image, ENCODER_ZOOM * side), size, levels)
        features = torch.cat([features.to(maps), maps])
    cells = _cells(points, image, seen, labels)
    classes = torch.from_numpy(points.rows[:, 2])
    evidence, contrast, solutions = segment_features(
        features,
        cells.to(features.device),
        classes.to(features.device),
        labels.num_classes,
        eta=eta,
        rule=rule,
        data_weight=data_weight,
        edge_factor=edge_factor,
    )
    u, weighed = (_at_image_size(each.cpu(), image) for each in (solutions, evidence))
    tissue_map = _probabilities(u)
    # the evidence only speaks where the solutions are level
    mask = (u + TIE * weighed).argmax(0).numpy().astype(np.uint8)
    return Segmentation(mask, tissue_map, _certainty(tissue_map), contrast, solutions)


def segment_features(
    features: Tensor,
    cells: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    eta: float = ETA,
    rule: Rule = "difference",
    data_weight: float | None = None,
    edge_factor: float = EDGE_FACTOR,
    edge_sigma: float = EDGE_SIGMA,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    r"""Solve the two-phase model for each class against the rest.

    Each class k has contrast maps z_p (Eq. 5) of its points against those of all others, and their mean scaled to
    [0,1], :math:`\hat z^k`. Two rules make a solution of them:

    * ``difference``: one map that is 1/2 where a class and its strongest rival are level, and means fixed at its ends,

      .. math:: e^k = \tfrac12 \bigl(1 + \hat z^k - \max_{j \ne k} \hat z^j\bigr), \qquad
                u^k = \arg\min_u \int g |\nabla u| + \lambda \int \bigl[(e^k - 1)^2 - (e^k)^2\bigr] u,

      so that both sides are heard, and the problem is convex as a whole. With two classes, one solution is the
      other's complement.
    * ``per-point``: the paper's Eq. 6 and 7 for every class, :math:`u^k = \mathcal N(\mathrm{mean}_p\, u_p)`, u_p the
      solution for z_p with its own means. It suits features that a network has learnt from the points.

    Args:
        features: (C,h,w).
        cells: (P,2) int rows of (row, column) in the features.
        classes: (P,) int, each in 0..K-1.
        num_classes: K, at least 2; each class needs a point.
        eta: weight of the out-of-target correlation, in [0,1].
        rule: ``difference`` or ``per-point``.
        data_weight: lambda; None is 1 for ``difference`` and 3 for ``per-point``.
        edge_factor: of the edge weight g.
        edge_sigma: of the edge weight g, cells.

    Returns:
        evidence (K,h,w) in [0,1], the e^k; the contrast maps of each class, (P_k,h,w) in [0,1]; solutions (K,h,w).

    Raises:
        InputError: features that are not finite, places outside them or of two classes, no point on one side, an
            unknown rule, or the same evidence everywhere.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 4 to 7; the rule ``difference`` is tissuehint's own.
    """
    if rule not in get_args(Rule):
        raise InputError(f"rule '{rule}'", f"is not one of {', '.join(get_args(Rule))}", "use one of these")
    weight = DATA_WEIGHT[rule] if data_weight is None else data_weight
    of_class = [classes == index for index in range(num_classes)]
    contrast = tuple(contrast_maps(features, cells[own], cells[~own], eta) for own in of_class)
    evidence = _evidence(torch.stack([unit_range(maps.mean(0)) for maps in contrast]))
    if float(evidence.amax() - evidence.amin()) < CONSENSUS:
        rule_broken = "look alike in all of the image: there is nothing to tell the classes apart by"
        raise InputError("points", rule_broken, "check that the image is not of one colour, or mark other places")
    solve = partial(segment_two_phase, data_weight=weight, edge_factor=edge_factor, edge_sigma=edge_sigma)
    if rule == "per-point":
        solved = [solve(maps).u.mean(0) for maps in contrast]
        return evidence, contrast, torch.stack([_scaled(u) for u in solved])
    # of two classes one is the complement of the other
    asked = evidence[1:] if num_classes == 2 else evidence
    ends = torch.tensor([1.0, 0.0], device=features.device).expand(len(asked), 2)
    solutions = solve(asked, means=ends).u
    return evidence, contrast, torch.cat([1 - solutions, solutions]) if num_classes == 2 else solutions


def _evidence(means: Tensor) -> Tensor:
    """(K,h,w) in [0,1]: above 1/2 where a class has more contrast than its strongest rival."""
    first, second = means.topk(2, dim=0).values
    rival = torch.where(means == first, second, first)
    return (1 + means - rival) / 2


def _scaled(u: Tensor) -> Tensor:
    """Eq. 7; a consensus stays as it is, since scaling would make a boundary of nothing."""
    return u if float(u.amax() - u.amin()) < CONSENSUS else unit_range(u)


def _probabilities(u: Tensor) -> Tensor:
    """(K,H,W) to sum 1 over the classes; all are level where none has any."""
    total = u.sum(0, keepdim=True)
    return torch.where(total < CONSENSUS, 1 / len(u), u / total.clamp_min(CONSENSUS))


def _certainty(tissue_map: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(tissue_map).sum(0)
    return (-2 * entropy).exp()


def _check(image: NDArray[np.uint8], points: Points, labels: LabelSpace) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        rule = f"has shape {image.shape} and type {image.dtype}, not (H,W,3) and uint8"
        raise InputError("image", rule, "give one image, red green blue in 0..255")
    points.check_inside(image.shape[0], image.shape[1], labels)
    if labels.num_classes < 2:
        raise InputError(f"class '{labels.names[0]}'", "is the only one", "mark points of something else, too")
    for index, name in enumerate(labels.names):
        if not (points.rows[:, 2] == index).any():
            raise InputError(f"class '{name}'", "has no points", "mark at least one point of each class")


def _shrunk(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    if side < 1:
        raise InputError(f"side {side} px", "is not positive", f"write {SIDE}")
    height, width = image.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _cells(points: Points, image: NDArray[np.uint8], seen: NDArray[np.uint8], labels: LabelSpace) -> Tensor:
    """(P,2) places of points in the image as it is looked at; refuses places that two classes claim."""
    size = np.array(seen.shape[:2])
    factor = size / np.array(image.shape[:2])
    cells = np.minimum(((points.rows[:, :2] + 0.5) * factor).astype(np.int64), size - 1)  # of the centre of a pixel
    owner: dict[tuple[int, int], int] = {}
    for (y, x), (row, column, label) in zip(cells.tolist(), points.rows.tolist(), strict=True):
        other = owner.setdefault((y, x), label)
        if other != label:
            px = math.ceil(1 / factor.min())
            rule = f"is {labels.names[label]} and {labels.names[other]} at once (places of {px} px are looked at)"
            raise InputError(f"point (row {row}, column {column})", rule, "move one of the two away, or enlarge --side")
    return torch.from_numpy(cells)


def _at_image_size(maps: Tensor, image: NDArray[np.uint8]) -> Tensor:
    """(K,h,w) to (K,H,W)."""
    size = (image.shape[0], image.shape[1])
    return maps if maps.shape[1:] == size else F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
