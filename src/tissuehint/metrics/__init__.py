"""Scores of tissue maps: what each number is, over which pixels, and with which protocol.

Everything here is a pure function of numbers; nothing reads a file. Counts (a confusion matrix, boundary counts, a
histogram of probabilities) are summed over all pixels of a split, and scores are computed once from the sum.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tissuehint.metrics.binary import BinaryHistogram, binary_scores, binary_scores_per_image
    from tissuehint.metrics.boundary import (
        boundary_counts,
        boundary_distance,
        boundary_iou,
        boundary_iou_from_counts,
        boundary_iou_per_image,
    )
    from tissuehint.metrics.calibration import CalibrationBins
    from tissuehint.metrics.confusion import confusion_matrix, scores
    from tissuehint.metrics.presence import tag_scores
    from tissuehint.metrics.proportions import proportion_errors, proportions_of
    from tissuehint.metrics.protocols import (
        PROTOCOL_IDS,
        Protocol,
        decide,
        protocol_confusion,
        protocol_scores,
    )
    from tissuehint.metrics.significance import P_LEVELS, mean_std, welch_t_test

# name -> module of this package; resolved on first use, so that a name costs only what its own module imports
_LAZY = {
    "P_LEVELS": "significance",
    "PROTOCOL_IDS": "protocols",
    "BinaryHistogram": "binary",
    "CalibrationBins": "calibration",
    "Protocol": "protocols",
    "binary_scores": "binary",
    "binary_scores_per_image": "binary",
    "boundary_counts": "boundary",
    "boundary_distance": "boundary",
    "boundary_iou": "boundary",
    "boundary_iou_from_counts": "boundary",
    "boundary_iou_per_image": "boundary",
    "confusion_matrix": "confusion",
    "decide": "protocols",
    "mean_std": "significance",
    "proportion_errors": "proportions",
    "proportions_of": "proportions",
    "protocol_confusion": "protocols",
    "protocol_scores": "protocols",
    "scores": "confusion",
    "tag_scores": "presence",
    "welch_t_test": "significance",
}

__all__ = [
    "PROTOCOL_IDS",
    "P_LEVELS",
    "BinaryHistogram",
    "CalibrationBins",
    "Protocol",
    "binary_scores",
    "binary_scores_per_image",
    "boundary_counts",
    "boundary_distance",
    "boundary_iou",
    "boundary_iou_from_counts",
    "boundary_iou_per_image",
    "confusion_matrix",
    "decide",
    "mean_std",
    "proportion_errors",
    "proportions_of",
    "protocol_confusion",
    "protocol_scores",
    "scores",
    "tag_scores",
    "welch_t_test",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tissuehint.metrics' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"tissuehint.metrics.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
