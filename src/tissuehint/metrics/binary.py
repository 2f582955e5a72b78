"""Scores of a two-class probability map (tumour or not, gland or not).

``binary_scores`` pools the pixels that it is given; for a split that does not fit in memory ``BinaryHistogram`` takes
one image at a time. ``binary_scores_per_image`` is the other convention in use, a mean over images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE
from tissuehint.metrics.confusion import nan_mean, ratio

if TYPE_CHECKING:
    import torch

THRESHOLD = 0.5
KEYS = ("dice", "accuracy", "kappa", "auc", "precision")


def binary_scores(probability: ArrayLike | torch.Tensor, target: ArrayLike | torch.Tensor) -> dict[str, float]:
    r"""Scores of a probability map against a binary mask, over all pixels given.

    A pixel is predicted positive where its probability is above 0.5. With the counts TP, FP, FN, TN, n their sum and
    p_o the accuracy:

    .. math::
        Dice = \frac{2TP}{2TP + FP + FN}, \quad precision = \frac{TP}{TP + FP}, \quad
        \kappa = \frac{p_o - p_e}{1 - p_e}, \quad
        p_e = \frac{(TP+FP)(TP+FN) + (FN+TN)(FP+TN)}{n^2}

    AUC is the area under the ROC curve over pixels: the chance that a positive pixel has a higher probability than a
    negative one, ties counting one half.

    Args:
        probability: any shape, in [0,1].
        target: same shape, 0 or 1, 255 = ignore.

    Returns:
        ``dice``, ``accuracy``, ``auc``, ``precision`` in [0,1] and ``kappa`` in [-1,1]; NaN where undefined: AUC with
        one class only, precision without a positive prediction, Dice without any positive, kappa with p_e = 1.

    Raises:
        InputError: different shapes, a probability outside [0,1], a target that is not 0, 1 or 255.

    Example:
        >>> result = binary_scores([0.9, 0.6, 0.4, 0.1], [1, 0, 1, 0])
        >>> result["auc"], result["kappa"]
        (0.75, 0.0)
    """
    values, positive = _valid_pixels(probability, target)
    above = values > THRESHOLD
    hits, false_alarms = int((above & positive).sum()), int((above & ~positive).sum())
    positives = int(positive.sum())
    counts = (hits, false_alarms, positives - hits, positive.size - positives - false_alarms)
    return _threshold_scores(*counts) | {"auc": roc_auc(values, positive)}


def binary_scores_per_image(images: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """Mean over images of ``binary_scores``; images where a score is NaN are left out of its mean.

    Args:
        images: pairs (probability, target) as for ``binary_scores``.
    """
    rows = [binary_scores(probability, target) for probability, target in images]
    return {key: nan_mean(np.array([row[key] for row in rows], np.float64)) for key in KEYS}


def roc_auc(values: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks, exact with ties; NaN where only one class is present.

    Args:
        values: (N,) any numbers, higher = more likely positive.
        positive: (N,) truth.
    """
    high, low = values[positive], np.sort(values[~positive])
    if not high.size or not low.size:
        return float("nan")
    below = np.searchsorted(low, high, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(low, high, side="right").sum(dtype=np.int64)
    return float((int(below) + int(not_above)) / (2 * high.size * low.size))


class BinaryHistogram:
    """``binary_scores`` of a whole split, pooled over pixels, in memory that does not grow with the split.

    Probabilities are counted in equal bins ``(k/bins, (k+1)/bins]`` (0 is in the first). Since 0.5 is the edge of a
    bin, Dice, accuracy, kappa and precision are exact. AUC treats probabilities in one bin as ties; it differs from
    the exact AUC by at most ``auc_error_bound()``, half the chance that a positive and a negative pixel share a bin.

    Histograms of parts of a split (of processes, say) are merged by adding their ``counts``.

    Args:
        bins: number of bins, a power of two from 2 to 65536, so that bin edges are exact in float32.

    Raises:
        InputError: another number of bins.

    Example:
        >>> histogram = BinaryHistogram()
        >>> histogram.update([0.9, 0.6], [1, 0])
        >>> histogram.update([0.4, 0.1], [1, 0])
        >>> histogram.scores()["auc"], histogram.auc_error_bound()
        (0.75, 0.0)
    """

    def __init__(self, bins: int = 4096) -> None:
        if not 2 <= bins <= 65536 or bins & (bins - 1):
            raise InputError(f"bins {bins}", "is a power of two from 2 to 65536", "give 4096, say")
        self.bins = bins
        self.counts: NDArray[np.int64] = np.zeros((2, bins), np.int64)

    def update(self, probability: ArrayLike | torch.Tensor, target: ArrayLike | torch.Tensor) -> None:
        """Add pixels; arguments and errors as ``binary_scores``."""
        values, positive = _valid_pixels(probability, target)
        # float32 at least: half precision cannot hold the product with the number of bins
        scaled = np.ceil(values.astype(np.result_type(values, np.float32)) * self.bins)
        index = np.maximum(scaled.astype(np.int64) - 1, 0)
        index += self.bins * positive
        self.counts += np.bincount(index, minlength=2 * self.bins).reshape(2, self.bins)

    def scores(self) -> dict[str, float]:
        """The keys of ``binary_scores`` over all pixels added."""
        half = self.bins // 2
        (low_negative, low_positive) = self.counts[:, :half].sum(axis=1).tolist()
        (high_negative, high_positive) = self.counts[:, half:].sum(axis=1).tolist()
        return _threshold_scores(high_positive, high_negative, low_positive, low_negative) | {"auc": self._auc()}

    def auc_error_bound(self) -> float:
        """Largest possible difference of ``scores()["auc"]`` from the exact AUC; NaN where AUC is undefined."""
        negative, positive = self._shares()
        return float((negative * positive).sum() / 2)

    def _auc(self) -> float:
        negative, positive = self._shares()
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum())

    def _shares(self) -> NDArray[np.float64]:
        return ratio(self.counts, self.counts.sum(axis=1, keepdims=True))


def as_host(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """A NumPy array of anything array-like, tensors on a device included."""
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        # NumPy has no bfloat16; float32 holds it exactly
        values = tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
    return np.asarray(values)


def check_probability(values: NDArray[Any]) -> None:
    """Raise ``InputError`` unless all values lie in [0,1]."""
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        worst = values[~((values >= 0) & (values <= 1))].flat[0]
        raise InputError(f"probability {worst:.4g}", "is outside [0,1]", "apply a sigmoid or softmax first")


def _valid_pixels(probability: Any, target: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values, truth = as_host(probability), as_host(target)
    if values.shape != truth.shape:
        rule = f"differs from the shape {truth.shape} of the target"
        raise InputError(f"probability of shape {values.shape}", rule, "give maps of equal shape")
    valid = truth != IGNORE
    values, truth = values[valid], truth[valid]
    check_probability(values)
    positive = truth == 1
    unknown = truth[~positive & (truth != 0)]
    if unknown.size:
        rule = f"is not 0 or 1 and not the ignore value {IGNORE}"
        raise InputError(f"target value {unknown[0]}", rule, "choose one class as the positive one")
    return values, positive


def _threshold_scores(hits: int, false_alarms: int, misses: int, rejections: int) -> dict[str, float]:
    total = hits + false_alarms + misses + rejections
    agreement = float(ratio(hits + rejections, total))
    by_row = (hits + false_alarms) * (hits + misses)
    by_chance = float(ratio(by_row + (misses + rejections) * (false_alarms + rejections), total**2))
    return {
        "dice": float(ratio(2 * hits, 2 * hits + false_alarms + misses)),
        "accuracy": agreement,
        "kappa": float(ratio(agreement - by_chance, 1 - by_chance)),
        "precision": float(ratio(hits, hits + false_alarms)),
    }
