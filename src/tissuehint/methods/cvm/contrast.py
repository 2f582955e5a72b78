"""Correlation and contrast maps: what a few labelled points say about every pixel (paper, Eq. 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from tissuehint.errors import InputError

ETA = 0.6  # paper, Fig. 3b: the best of four values
# a map whose values span less than this says nothing about where the target is
FLAT = 1e-6
# feature vectors are divided by at least this length
SHORT = 1e-8
# values of one block of point pairs, so that many points on a large map do not fill the memory
BLOCK = 2**25


def correlation_maps(features: Tensor, points: Tensor) -> Tensor:
    r"""Cosine similarity of every place with each point.

    .. math:: S_p(i,j) = \frac{f_p^\top a_{ij}}{\|f_p\|_2 \|a_{ij}\|_2}

    Args:
        features: (C,H,W) feature map.
        points: (P,2) int rows of (row, column) at feature resolution.

    Returns:
        (P,H,W) in [-1,1], at least float32; 0 where a feature vector is zero.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 4.

    Raises:
        InputError: features that are not finite or not (C,H,W), points outside the map.
    """
    _check_features(features)
    _check_points(features, points, "points")
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()  # 1e-8 is 0 in half precision
    flat = features.flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=0)
    if not bool(norms.isfinite().all()):  # cheaper than asking each value
        raise InputError("features", "have a value that is NaN or infinite", "check the weights of the encoder")
    rows, columns = points.long().unbind(1)  # int16 and uint8 would overflow
    places = rows * features.shape[2] + columns
    products = flat[:, places].T @ flat
    cosines: Tensor = products / norms[places, None].clamp_min(SHORT) / norms.clamp_min(SHORT)
    return cosines.clamp(-1, 1).view(len(points), *features.shape[1:])


def contrast_maps(features: Tensor, targets: Tensor, others: Tensor, eta: float = ETA) -> Tensor:
    r"""For each in-target point, the mean of its contrast maps with all out-of-target points.

    .. math::
        C_{p,q} = \mathcal N\left(\mathrm{ReLU}(S_p - \eta S_q)^2\right), \qquad z_p = \frac{1}{|Q|} \sum_{q} C_{p,q}

    with the correlation maps S of Eq. 4 and :math:`\mathcal N` the scaling of a map from its smallest and largest value
    to 0 and 1. A constant map becomes 0: it has no contrast. Nothing is changed in place.

    Args:
        features: (C,H,W) feature map.
        targets: (P,2) int rows of (row, column) of in-target points, at feature resolution.
        others: (Q,2) the same of out-of-target points.
        eta: weight of the out-of-target correlation, in [0,1]; 0 uses the targets alone.

    Returns:
        (P,H,W) in [0,1], the z_p of Eq. 6.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 5 and the definition below Eq. 6.

    Raises:
        InputError: features that are not finite or not (C,H,W); no point on one side; points outside the map; the same
            point on both sides; eta outside [0,1].

    Example:
        >>> features = torch.zeros(2, 4, 6)
        >>> features[0, :, :3], features[1, :, 3:] = 1, 1
        >>> contrast_maps(features, torch.tensor([[1, 1]]), torch.tensor([[2, 5]]))[0, 0].tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta {eta}", "is not in 0..1", "the paper uses 0.6")
    for name, points in (("in-target", targets), ("out-of-target", others)):
        if not len(points):
            raise InputError(f"{name} points", "are missing", "give at least one point on each side")
    _check_features(features)
    _check_points(features, targets, "in-target points")
    _check_points(features, others, "out-of-target points")
    maps = correlation_maps(features, torch.cat([targets, others]))
    positive, negative = maps[: len(targets)], maps[len(targets) :]
    same = (targets[:, None] == others[None]).all(2)
    if bool(same.any()):
        row, column = targets[same.any(1)][0].tolist()
        raise InputError(f"point ({row}, {column})", "is both in and out of the target", "keep one of the two")
    size = max(1, BLOCK // negative.numel())
    return torch.cat([_mean_contrast(block, negative, eta) for block in torch.split(positive, size)])


def unit_range(maps: Tensor, smallest_range: float = FLAT) -> Tensor:
    r"""Scale each map so that its smallest value is 0 and its largest 1: the :math:`\mathcal N` of Eq. 5 and 7.

    Args:
        maps: (...,H,W).
        smallest_range: a map whose values span less becomes 0, where the plain formula would divide by almost nothing.
    """
    if not maps.numel():
        return maps
    flat = maps.flatten(-2)  # reductions over one axis are several times faster
    low, high = flat.amin(-1)[..., None, None], flat.amax(-1)[..., None, None]
    span = high - low
    return (maps - low) / span.clamp_min(smallest_range) * (span >= smallest_range)


def _mean_contrast(positive: Tensor, negative: Tensor, eta: float) -> Tensor:
    difference = (positive[:, None] - eta * negative[None]).clamp_min_(0)
    return unit_range(difference.square_()).mean(1)


def _check_features(features: Tensor) -> None:
    if features.ndim != 3 or not features.is_floating_point():
        rule = f"have shape {tuple(features.shape)} and type {features.dtype}, not (C,H,W) and float"
        raise InputError("features", rule, "give one feature map at a time")


def _check_points(features: Tensor, points: Tensor, name: str) -> None:
    height, width = features.shape[1:]
    if points.ndim != 2 or points.shape[1] != 2 or points.is_floating_point():
        rule = f"have shape {tuple(points.shape)} and type {points.dtype}, not (P,2) and integer"
        raise InputError(name, rule, "give rows of (row, column)")
    inside = (points >= 0).all(1) & (points[:, 0] < height) & (points[:, 1] < width)
    if not bool(inside.all()):
        row, column = points[~inside][0].tolist()
        rule = f"is outside the map of {height} x {width} (height x width)"
        raise InputError(f"point ({row}, {column})", rule, "give points at feature resolution, counted from 0")
