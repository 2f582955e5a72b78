"""Boundary IoU: overlap of the bands inside the contours of truth and prediction.

Source: Cheng, Girshick, Dollár, Berg, Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation", CVPR 2021. The band width changes the value strongly, so a number is comparable only with numbers of the
same distance; say it with the number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE
from tissuehint.metrics.confusion import Array, check_classes, host_pair, ratio

# share of the image diagonal, Cheng et al. 2021, section 4
DIAGONAL_SHARE = 0.02


def boundary_distance(height: int, width: int) -> int:
    """Default band width d = max(1, round(0.02 * sqrt(H^2 + W^2))) in pixels.

    Args:
        height: H, pixels.
        width: W, pixels.

    Example:
        >>> boundary_distance(224, 224)
        6
    """
    return max(1, round(DIAGONAL_SHARE * math.hypot(height, width)))


def boundary_iou(prediction: Array, target: Array, num_classes: int, distance: float | None = None) -> Array:
    r"""Boundary IoU of each class, counts pooled over the batch.

    The band G_d of a class mask G is G minus its erosion by d steps of a 3x3 square: the pixels of G that lie within
    (chessboard) distance d of a pixel that is not G.

    .. math:: bIoU_c = \frac{|G_d \cap P_d|}{|G_d \cup P_d|}

    Outside the image counts as not G (zero padding before eroding), so pixels at the image border are in the band.
    Pixels whose target is 255 are treated as outside the image too: they are counted nowhere, and pixels of truth and
    prediction next to them are in the band.

    Args:
        prediction: (H,W) or (B,H,W) class indices, integer NumPy array or torch tensor.
        target: true class indices, same kind and shape, 255 = ignore.
        num_classes: C, at most 255.
        distance: d in whole pixels, at least 1; None for ``boundary_distance(H, W)``; infinity gives plain IoU.

    Returns:
        (C,) float64 in [0,1], NaN where the class is absent from truth and prediction; an array for arrays, a tensor
        for tensors.

    Raises:
        InputError: shapes that differ or are not images, a value that is no class, more than 255 classes, a distance
            that is not a whole number of at least 1.

    Example:
        >>> truth = np.zeros((8, 8), np.uint8)
        >>> truth[2:6, 2:6] = 1
        >>> shifted = np.roll(truth, 1, axis=1)
        >>> boundary_iou(shifted, truth, num_classes=2, distance=1).round(3)
        array([0.731, 0.333])
    """
    return boundary_iou_from_counts(boundary_counts(prediction, target, num_classes, distance))


def boundary_counts(prediction: Array, target: Array, num_classes: int, distance: float | None = None) -> Array:
    """Pixels in intersection and union of the bands, to be added over a split.

    Args and errors are those of ``boundary_iou``.

    Returns:
        (2,C) int64: row 0 intersection, row 1 union; ``boundary_iou_from_counts`` makes scores of a sum.
    """
    predicted, true = _batch(prediction, target)
    predicted_band, true_band = _bands(predicted, true, num_classes, distance)
    return _as_given(_counts(predicted_band, true_band, num_classes), prediction)


def boundary_iou_from_counts(counts: Array) -> Array:
    """(C,) float64 boundary IoU of summed (2,C) ``boundary_counts``; NaN where the union is empty."""
    if isinstance(counts, np.ndarray):
        return ratio(counts[0], counts[1])
    return counts[0].double() / counts[1].double()


def boundary_iou_per_image(prediction: Array, target: Array, num_classes: int, distance: float | None = None) -> Array:
    """As ``boundary_iou``, but (B,C), each image for itself.

    The mean over images is a second convention in use; the pooled value is the default of this library.
    """
    predicted, true = _batch(prediction, target)
    predicted_band, true_band = _bands(predicted, true, num_classes, distance)
    rows = [_counts(one, other, num_classes) for one, other in zip(predicted_band, true_band, strict=True)]
    counts = np.stack(rows) if rows else np.zeros((0, 2, num_classes), np.int64)
    return _as_given(ratio(counts[:, 0], counts[:, 1]), prediction)


def _batch(prediction: Array, target: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    predicted, true = host_pair(prediction, target)
    if predicted.ndim not in (2, 3):
        rule = "is one class map (H,W) or a batch (B,H,W)"
        raise InputError(f"prediction of shape {predicted.shape}", rule, "remove or merge the other axes")
    return predicted.reshape(-1, *predicted.shape[-2:]), true.reshape(-1, *true.shape[-2:])


def _bands(
    predicted: NDArray[Any], true: NDArray[Any], num_classes: int, distance: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Class index inside the band of that class, C elsewhere; of prediction and truth, (B,H,W) each."""
    if not 1 <= num_classes <= IGNORE:
        raise InputError(f"num_classes {num_classes}", f"is 1 to {IGNORE}", "give the number of classes")
    valid = true != IGNORE
    if valid.all():
        check_classes(predicted, true, num_classes, IGNORE)
    else:
        check_classes(predicted[valid], true[valid], num_classes, IGNORE)
    steps = _steps(distance, *true.shape[-2:])
    # C stands for "outside": ignored pixels, which thereby are no class and end the classes beside them
    maps = np.stack([predicted.astype(np.uint8), true.astype(np.uint8)])
    maps[:, ~valid] = num_classes
    return _without_interior(maps[0], steps, num_classes), _without_interior(maps[1], steps, num_classes)


def _steps(distance: float | None, height: int, width: int) -> int:
    """Whole number of erosion steps; more than the image holds changes nothing."""
    wanted = boundary_distance(height, width) if distance is None else distance
    if not wanted >= 1 or (math.isfinite(wanted) and wanted != int(wanted)):
        rule = "is a whole number of pixels, at least 1, or infinity"
        raise InputError(f"boundary distance {distance}", rule, "give 2, 4 or 6, say")
    return int(min(wanted, max(height, width)))


def _without_interior(maps: NDArray[np.uint8], steps: int, num_classes: int) -> NDArray[np.uint8]:
    """Replace by C the pixels that survive the erosion of their class.

    d steps of a 3x3 square are one step of a (2d+1) x (2d+1) square. A pixel survives where that window lies in the
    image and holds one value, that is where its minimum equals its maximum: both filters serve all classes at once
    and take the same time for every d.
    """
    height, width = maps.shape[-2:]
    side = 2 * steps + 1
    if side > min(height, width):
        return maps
    from scipy import ndimage

    # the window lies in the image only for these centres, so what the filters assume outside never counts
    centres = (..., slice(steps, height - steps), slice(steps, width - steps))
    low, high = maps, maps
    for axis in (-1, -2):
        low = ndimage.minimum_filter1d(low, side, axis=axis)
        high = ndimage.maximum_filter1d(high, side, axis=axis)
    band = maps.copy()
    band[centres] = np.where(low[centres] == high[centres], num_classes, maps[centres])
    return band


def _counts(predicted: NDArray[np.uint8], true: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    size = num_classes + 1
    counts = np.bincount((true.astype(np.intp) * size + predicted).ravel(), minlength=size**2).reshape(size, size)
    both = np.diagonal(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - both
    return np.stack([both, union])[:, :num_classes].astype(np.int64)


def _as_given(values: NDArray[Any], given: Array) -> Array:
    if isinstance(given, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values).to(given.device)
