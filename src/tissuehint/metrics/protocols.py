"""What happens at white pixels: three evaluation protocols in use, named, never mixed.

A number is comparable only with numbers of the same protocol; print ``PROTOCOL_IDS[protocol]`` beside it.

=============== == ============================================== ==========================================
protocol        id white pixels of the truth                      prediction
=============== == ============================================== ==========================================
``ignore_white`` A left out                                       argmax over the tissue classes
``fp_on_white``  B counted: each is a false positive of a tissue  argmax over the tissue classes
``five_class``   C counted                                        argmax over all classes, may say white
=============== == ============================================== ==========================================

White is never in a mean. For one and the same tissue map without white channel, A is never below B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE
from tissuehint.metrics.confusion import Array, confusion_matrix, counts_of, scores_of_first

if TYPE_CHECKING:
    import torch

Protocol = Literal["ignore_white", "fp_on_white", "five_class"]

PROTOCOL_IDS: dict[Protocol, str] = {"ignore_white": "A", "fp_on_white": "B", "five_class": "C"}


def decide(tissue_map: torch.Tensor, num_tissue: int, protocol: Protocol) -> torch.Tensor:
    """Class of each pixel, in the prediction space of the protocol.

    Args:
        tissue_map: (B,K,H,W) class probabilities or scores, tissue classes first, then (K = num_tissue + 1) white.
        num_tissue: C, number of tissue classes.
        protocol: A and B take the argmax over the first C channels, C over all K; ties go to the lower index.

    Returns:
        (B,H,W) uint8 on the device of ``tissue_map``.

    Raises:
        InputError: K is neither C nor C+1, or an unknown protocol.

    Example:
        >>> import torch
        >>> tissue_map = torch.tensor([0.2, 0.3, 0.5]).reshape(1, 3, 1, 1)
        >>> decide(tissue_map, 2, "fp_on_white").item(), decide(tissue_map, 2, "five_class").item()
        (1, 2)
    """
    import torch

    _check_protocol(protocol)
    if tissue_map.ndim != 4 or tissue_map.shape[1] not in (num_tissue, num_tissue + 1):
        rule = f"is (B,K,H,W) with K = {num_tissue} tissue classes, or one more for white"
        raise InputError(f"tissue map of shape {tuple(tissue_map.shape)}", rule, "check the label space")
    channels = tissue_map if protocol == "five_class" else tissue_map[:, :num_tissue]
    return channels.argmax(dim=1).to(torch.uint8)


def protocol_confusion(
    prediction: Array,
    target: Array,
    num_tissue: int,
    protocol: Protocol,
    white: int | None = None,
    ignore_index: int = IGNORE,
) -> Array:
    """Confusion matrix under a protocol, to be added over a split.

    Args:
        prediction: class indices, any shape, as from ``decide`` with the same protocol.
        target: true class indices, same kind and shape.
        num_tissue: C, number of tissue classes.
        protocol: what happens at white pixels.
        white: class index of white (= C), or None where the label space has none; the protocols coincide then.
        ignore_index: target value of pixels that are left out.

    Returns:
        (C+1,C+1) int64, rows truth, kind and device as given. Row and column C are white; they are there (all zero)
        for a label space without white too, so that all matrices have one shape. Under A row C is zero.

    Raises:
        InputError: white is not the class after the tissue classes, a value that is no class, or a prediction of
            white under A (at a pixel that counts) or B.

    Example:
        >>> truth, prediction = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 0])
        >>> protocol_confusion(prediction, truth, 2, "fp_on_white", white=2)
        array([[1, 0, 0],
               [0, 1, 0],
               [1, 1, 0]])
    """
    _check_protocol(protocol)
    if white is not None and white != num_tissue:
        raise InputError(f"white = {white}", f"is the class after the {num_tissue} tissue classes", "put white last")
    if white is None:
        # num_tissue classes, so that the index of white is refused as no class
        return _padded(confusion_matrix(prediction, target, num_tissue, ignore_index))
    counts = confusion_matrix(prediction, target, num_tissue + 1, ignore_index)
    if protocol == "ignore_white":
        counts[white] = 0
    if protocol != "five_class" and bool((counts[:, white] > 0).any()):
        rule = f"says white, but protocol {PROTOCOL_IDS[protocol]} {protocol} predicts tissue only"
        raise InputError("prediction", rule, "make it with decide and the same protocol")
    return counts


def protocol_scores(confusion: NDArray[Any] | torch.Tensor, num_tissue: int) -> dict[str, Any]:
    r"""Scores of a matrix of ``protocol_confusion``, means over the tissue classes only.

    The white row gives false positives of tissue (B, C), the white column misses of tissue (C); white itself is in no
    mean and no frequency:

    * ``miou``, ``dice_mean``, ``class_accuracy_mean`` are means over tissue classes, ``dice_from_miou`` follows;
    * ``fwiou`` weights by the tissue rows only, R_c / sum of R over tissue: the default of this library, since
      published numbers differ in whether they include white;
    * ``accuracy`` = sum of TP / sum of M over all pixels that the protocol counts, white included: under B each white
      pixel is wrong, under C a white pixel called white is right, under A there is none.

    Args:
        confusion: (C+1,C+1) counts.
        num_tissue: C.

    Returns:
        The keys of ``scores``; ``iou``, ``dice`` and ``class_accuracy`` are (C,), tissue classes only.

    Raises:
        InputError: another shape.

    Example:
        >>> confusion = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
        >>> protocol_scores(confusion, 2)["iou"]
        array([0.5, 0.5])
    """
    matrix = counts_of(confusion)
    if len(matrix) != num_tissue + 1:
        rule = f"has one row for each of {num_tissue} tissue classes and one for white"
        raise InputError(f"confusion matrix of shape {matrix.shape}", rule, "make it with protocol_confusion")
    return scores_of_first(matrix, num_tissue)


def _padded(counts: Array) -> Array:
    if isinstance(counts, np.ndarray):
        return np.pad(counts, (0, 1))
    from torch.nn import functional as F

    return F.pad(counts, (0, 1, 0, 1))


def _check_protocol(protocol: str) -> None:
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol '{protocol}'", f"is one of {', '.join(get_args(Protocol))}", "use one of these")
