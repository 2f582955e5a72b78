"""Scores of predicted image tags: which tissue classes does the image hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from tissuehint.errors import InputError
from tissuehint.metrics.binary import as_host, check_probability, roc_auc
from tissuehint.metrics.confusion import nan_mean, ratio

if TYPE_CHECKING:
    import torch


def tag_scores(
    probability: ArrayLike | torch.Tensor, tags: ArrayLike | torch.Tensor, threshold: float = 0.5
) -> dict[str, Any]:
    r"""Scores of tag probabilities against true tags, over N images.

    A class is predicted present where its probability is above the threshold.

    .. math:: F1_c = \frac{2 TP_c}{2 TP_c + FP_c + FN_c}

    Args:
        probability: (N,C) in [0,1].
        tags: (N,C) of 0 and 1.
        threshold: in [0,1].

    Returns:
        ``f1`` (C,), NaN for a class that is present in no image and predicted in none, and its mean ``f1_mean``;
        ``auc`` (C,) area under the ROC curve, NaN for a class with one kind of tag only, and its mean ``auc_mean``;
        ``accuracy``, the share of images whose tags are all right.

    Raises:
        InputError: different shapes, a probability outside [0,1], a tag that is not 0 or 1.

    Example:
        >>> result = tag_scores([[0.9, 0.2], [0.6, 0.7]], [[1, 0], [0, 1]])
        >>> result["f1"].round(3), result["accuracy"]
        (array([0.667, 1.   ]), 0.5)
    """
    values, truth = as_host(probability), as_host(tags)
    if values.ndim != 2 or values.shape != truth.shape:
        subject = f"probabilities of shape {values.shape} and tags of shape {truth.shape}"
        raise InputError(subject, "are both (images, classes)", "give one row per image")
    check_probability(values)
    unknown = truth[(truth != 0) & (truth != 1)]
    if unknown.size:
        raise InputError(f"tag {unknown[0]}", "is not 0 or 1", "write 0 or 1")
    present, predicted = truth == 1, values > threshold
    hits = (present & predicted).sum(axis=0)
    f1 = ratio(2 * hits, present.sum(axis=0) + predicted.sum(axis=0))
    auc = np.array([roc_auc(column, truths) for column, truths in zip(values.T, present.T, strict=True)], np.float64)
    return {
        "f1": f1,
        "f1_mean": nan_mean(f1),
        "accuracy": float(ratio((present == predicted).all(axis=1).sum(), len(values))),
        "auc": auc,
        "auc_mean": nan_mean(auc),
    }
