"""Tissue proportions of a prediction, and how far they are from the true ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE, PROPORTION_TOLERANCE
from tissuehint.metrics.binary import as_host
from tissuehint.metrics.confusion import nan_mean, ratio

if TYPE_CHECKING:
    import torch

# a predicted share of 0 would make the divergence infinite
SMALLEST_SHARE = 1e-6


def proportions_of(prediction: NDArray[Any] | torch.Tensor, num_tissue: int) -> NDArray[np.float64]:
    """Share of each tissue class in the tissue area of a class map.

    Args:
        prediction: (H,W) integer class indices; pixels of white (index C) and ignore (255) are not tissue.
        num_tissue: C, number of tissue classes.

    Returns:
        (C,) float64 summing to 1; NaN where the image has no tissue pixel.

    Raises:
        InputError: another shape, or a value that is no class, not white and not 255.

    Example:
        >>> proportions_of(np.array([[0, 0], [1, 2]]), num_tissue=2).round(3)
        array([0.667, 0.333])
    """
    classes = as_host(prediction)
    if classes.ndim != 2 or classes.dtype.kind not in "iub":
        subject = f"prediction of shape {classes.shape} and type {classes.dtype}"
        raise InputError(subject, "is one class map (H,W) of integers", "give one image at a time")
    labelled = classes[classes != IGNORE].astype(np.int64)
    unknown = labelled[(labelled < 0) | (labelled > num_tissue)]
    if unknown.size:
        rule = f"is no tissue class (0..{num_tissue - 1}), not white ({num_tissue}) and not {IGNORE}"
        raise InputError(f"prediction value {unknown[0]}", rule, "check the number of classes")
    counts = np.bincount(labelled, minlength=num_tissue + 1)[:num_tissue]
    return ratio(counts, counts.sum())


def proportion_errors(predicted: ArrayLike | torch.Tensor, target: ArrayLike | torch.Tensor) -> dict[str, Any]:
    r"""Errors of predicted tissue proportions, means over images.

    .. math::
        MAE_c = \frac{1}{N}\sum_i |\hat\pi_{ic} - \pi_{ic}|, \quad
        KL = \frac{1}{N}\sum_{ic} \pi_{ic} \log\frac{\pi_{ic}}{\hat\pi_{ic}}, \quad
        W_1 = \frac{1}{N}\sum_i \tfrac{1}{2}\sum_c |\hat\pi_{ic} - \pi_{ic}|

    Tissue classes have no order, so the cost of moving a share from one class to any other is 1; the Wasserstein
    distance is then the total variation: the share of the tissue that has the wrong class. For KL the predicted
    shares are raised to at least 1e-6 and made to sum to 1 again.

    Args:
        predicted: (N,C) proportions of the predictions, rows summing to 1.
        target: (N,C) true proportions.

    Returns:
        ``mae`` (C,) and ``mae_mean`` in [0,1], ``kl`` in nats, ``w1`` in [0,1], and ``images``, the number of images
        in the means: those with a NaN row (no tissue) in either argument are left out.

    Raises:
        InputError: different shapes, a share outside [0,1], a row that does not sum to 1 within 0.001.

    Example:
        >>> result = proportion_errors([[0.5, 0.5]], [[0.75, 0.25]])
        >>> result["mae"], result["w1"]
        (array([0.25, 0.25]), 0.25)
    """
    given, true = np.asarray(as_host(predicted), np.float64), np.asarray(as_host(target), np.float64)
    if given.ndim != 2 or given.shape != true.shape:
        subject = f"proportions of shape {given.shape} and {true.shape}"
        raise InputError(subject, "are both (images, classes)", "give one row per image")
    known = ~(np.isnan(given).any(axis=1) | np.isnan(true).any(axis=1))
    given, true = given[known], true[known]
    _check_rows(given, "predicted")
    _check_rows(true, "true")
    distance = np.abs(given - true)
    smoothed = np.maximum(given, SMALLEST_SHARE)
    smoothed /= smoothed.sum(axis=1, keepdims=True)
    surprise = true * (np.log(np.where(true > 0, true, 1.0)) - np.log(smoothed))
    mae = ratio(distance.sum(axis=0), len(distance))
    return {
        "mae": mae,
        "mae_mean": nan_mean(mae),
        "kl": nan_mean(surprise.sum(axis=1)),
        "w1": nan_mean(distance.sum(axis=1) / 2),
        "images": len(distance),
    }


def _check_rows(rows: NDArray[np.float64], name: str) -> None:
    if (rows < 0).any() or (rows > 1).any():
        raise InputError(f"{name} proportions", "have a share outside [0,1]", "write fractions, not per cent")
    wrong = np.abs(rows.sum(axis=1) - 1) > PROPORTION_TOLERANCE
    if wrong.any():
        row = int(np.argmax(wrong))
        rule = f"sum to {rows[row].sum():.4g}, not 1"
        raise InputError(f"{name} proportions of row {row}", rule, "make the fractions of an image sum to 1")
