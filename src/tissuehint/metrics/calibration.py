"""Whether probabilities mean what they say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tissuehint.errors import InputError

if TYPE_CHECKING:
    import torch

BINS = 15


@dataclass
class CalibrationBins:
    r"""Expected calibration error over all pixels of a split, one image at a time.

    Pixels are binned by their confidence, the probability of the likeliest class, into bins ((i - 1) / n, i / n] of
    equal width (Naeini et al., AAAI 2015; Guo et al., ICML 2017, Eq. 3):

    .. math::
        ECE = \sum_b \frac{n_b}{N} |accuracy_b - confidence_b|

    Args:
        counts: (bins,) pixels.
        confidence: (bins,) sums of confidence.
        correct: (bins,) pixels whose likeliest class is the true one.

    Example:
        >>> import torch
        >>> bins = CalibrationBins()
        >>> bins.update(torch.tensor([[0.9, 0.6], [0.1, 0.4]]), torch.tensor([0, 1]))
        >>> round(bins.error(), 2)
        0.35
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS, np.float64))
    correct: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def update(self, probabilities: torch.Tensor, target: torch.Tensor) -> None:
        """Count pixels.

        Args:
            probabilities: (C,N) that sum to 1 over classes.
            target: (N,) true classes.

        Raises:
            InputError: shapes that do not agree.
        """
        if probabilities.ndim != 2 or target.shape != probabilities.shape[1:]:
            subject = f"probabilities of shape {tuple(probabilities.shape)} and target of shape {tuple(target.shape)}"
            raise InputError(subject, "are (classes, pixels) and (pixels,)", "give one column a pixel")
        import torch

        bins = len(self.counts)
        highest, likeliest = probabilities.double().max(0)
        place = (highest * bins).ceil().long().sub(1).clamp(0, bins - 1)
        right = (likeliest == target).double()
        sums: list[Any] = [
            torch.bincount(place, weights, minlength=bins).cpu().numpy()
            for weights in (torch.ones_like(highest), highest, right)
        ]
        self.counts += np.rint(sums[0]).astype(np.int64)
        self.confidence += sums[1]
        self.correct += np.rint(sums[2]).astype(np.int64)

    def merge(self, other: CalibrationBins) -> None:
        """Add the counts of another part of the split."""
        self.counts += other.counts
        self.confidence += other.confidence
        self.correct += other.correct

    def error(self) -> float:
        """In [0,1]; NaN where no pixel was counted."""
        total = int(self.counts.sum())
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else float("nan")
