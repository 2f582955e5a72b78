"""Confusion matrix of class maps, and the scores that follow from it.

M has one row per true class and one column per predicted class. It is summed over all pixels of a split; scores are
computed once from the sum, never averaged over images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", NDArray[Any], "torch.Tensor")


def confusion_matrix(prediction: Array, target: Array, num_classes: int, ignore_index: int = IGNORE) -> Array:
    r"""Count pixels by true and predicted class.

    .. math:: M_{ij} = |\{x : target(x) = i,\; prediction(x) = j,\; target(x) \ne ignore\_index\}|

    Matrices of parts of a split may be added in any order.

    Args:
        prediction: class indices, any shape, integer NumPy array or torch tensor. Values at ignored pixels are not
            looked at.
        target: true class indices, same kind, shape and device as ``prediction``.
        num_classes: C.
        ignore_index: target value of pixels that are left out.

    Returns:
        (C,C) int64, rows truth, columns prediction; an array for arrays, a tensor on the same device for tensors.

    Raises:
        InputError: different kinds, shapes or devices, values that are not integers, or a value outside 0..C-1 at a
            pixel that counts.

    Example:
        >>> confusion_matrix(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 255]), num_classes=2)
        array([[1, 1],
               [0, 1]])
    """
    if num_classes < 1:
        raise InputError(f"num_classes {num_classes}", "is at least 1", "give the number of classes")
    if isinstance(prediction, np.ndarray) and isinstance(target, np.ndarray):
        _check_arrays(prediction, target)
        return _count_arrays(prediction, target, num_classes, ignore_index)
    _check_tensors(prediction, target)
    if prediction.device.type != "cpu":
        return _count_tensors(prediction, target, num_classes, ignore_index)
    import torch

    # counting on the host is several times faster in NumPy, and the memory is shared
    counts = _count_arrays(prediction.detach().numpy(), target.detach().numpy(), num_classes, ignore_index)
    return torch.from_numpy(counts)


def scores(confusion: NDArray[Any] | torch.Tensor) -> dict[str, Any]:
    r"""Scores of a confusion matrix, each a mean over all its classes.

    With TP_c = M_cc, R_c the sum of row c (truth) and P_c the sum of column c (prediction):

    .. math::
        IoU_c = \frac{TP_c}{R_c + P_c - TP_c}, \quad Dice_c = \frac{2 TP_c}{R_c + P_c}, \quad
        fwIoU = \sum_c \frac{R_c}{\sum_k R_k} IoU_c

    For a label space with white use ``protocol_scores``, which keeps white out of the means.

    Args:
        confusion: (C,C) counts, rows truth, as from ``confusion_matrix``.

    Returns:
        Floats in [0,1], NaN where nothing was counted:

        * ``miou``: mean IoU of the classes that occur in truth or prediction;
        * ``fwiou``: IoU weighted by the true frequency of the class;
        * ``dice_mean``: mean Dice of the classes that occur;
        * ``dice_from_miou``: 2 miou / (1 + miou), the flavour that several papers print as Dice or F1;
        * ``accuracy``: share of correct pixels;
        * ``class_accuracy_mean``: mean of TP/R over the classes that occur in the truth.

        And (C,) float64 arrays: ``iou``, ``dice`` (NaN for a class absent from truth and prediction) and
        ``class_accuracy`` = TP/R (NaN for a class absent from the truth).

    Raises:
        InputError: not a square matrix of counts.

    Example:
        >>> result = scores(np.array([[3, 1], [0, 4]]))
        >>> result["iou"].round(3), round(result["miou"], 3)
        (array([0.75, 0.8 ]), 0.775)
    """
    matrix = counts_of(confusion)
    return scores_of_first(matrix, len(matrix))


def counts_of(confusion: NDArray[Any] | torch.Tensor) -> NDArray[np.float64]:
    """A confusion matrix as (C,C) float64 on the host.

    Raises:
        InputError: not a square matrix of finite counts >= 0.
    """
    host = confusion if isinstance(confusion, np.ndarray) else _to_host(confusion)
    matrix = np.asarray(host, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        rule = "is square, one row and one column per class"
        raise InputError(f"confusion matrix of shape {matrix.shape}", rule, "make it with confusion_matrix")
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        raise InputError("confusion matrix", "has a count that is negative or not finite", "give pixel counts")
    return matrix


def scores_of_first(matrix: NDArray[np.float64], count: int) -> dict[str, Any]:
    """As ``scores``, but with per-class values, means and frequencies over the first ``count`` classes only.

    The other rows and columns still create false positives and false negatives, and ``accuracy`` is the share of all
    counted pixels.
    """
    hits = np.diagonal(matrix)
    truth = matrix.sum(axis=1)[:count]
    total = truth + matrix.sum(axis=0)[:count]
    iou = ratio(hits[:count], total - hits[:count])
    dice = ratio(2 * hits[:count], total)
    class_accuracy = ratio(hits[:count], truth)
    miou = nan_mean(iou)
    weighted = np.where(truth > 0, truth * np.nan_to_num(iou), 0.0).sum()
    return {
        "miou": miou,
        "fwiou": float(ratio(weighted, truth.sum())),
        "dice_mean": nan_mean(dice),
        "dice_from_miou": 2 * miou / (1 + miou),
        "accuracy": float(ratio(hits.sum(), matrix.sum())),
        "class_accuracy_mean": nan_mean(class_accuracy),
        "iou": iou,
        "dice": dice,
        "class_accuracy": class_accuracy,
    }


def ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    """Quotient in float64, NaN where the denominator is 0, without a warning."""
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    quotient = np.full(below.shape, np.nan)
    np.divide(above, below, out=quotient, where=below != 0)
    return quotient


def nan_mean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN where there is none, without a warning."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def host_pair(prediction: Array, target: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """Prediction and target as integer arrays on the host.

    Raises:
        InputError: different kinds, shapes or devices, or values that are not integers.
    """
    if isinstance(prediction, np.ndarray) and isinstance(target, np.ndarray):
        _check_arrays(prediction, target)
        return prediction, target
    _check_tensors(prediction, target)
    return _to_host(prediction), _to_host(target)


def check_classes(prediction: NDArray[Any], target: NDArray[Any], num_classes: int, ignore_index: int) -> None:
    """Raise ``InputError`` where a pixel that counts has a value outside 0..C-1."""
    if target.size:
        extremes = [int(value) for value in (target.min(), target.max(), prediction.min(), prediction.max())]
        _check_extremes(extremes, num_classes, ignore_index)


def _count_arrays(
    prediction: NDArray[Any], target: NDArray[Any], num_classes: int, ignore_index: int
) -> NDArray[np.int64]:
    valid = target != ignore_index
    if not np.all(valid):
        prediction, target = prediction[valid], target[valid]
    check_classes(prediction, target, num_classes, ignore_index)
    pair = target.astype(np.int64)
    pair *= num_classes
    pair += prediction.astype(np.int64, copy=False)
    counts = np.bincount(pair.ravel(), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64, copy=False)


def _count_tensors(prediction: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    """As ``_count_arrays``, on the device of the tensors; two small transfers to the host."""
    import torch

    target = target.long()
    valid = target != ignore_index
    target, prediction = target[valid], prediction[valid].long()
    if target.numel():
        extremes = torch.stack([*torch.aminmax(target), *torch.aminmax(prediction)]).tolist()
        _check_extremes(extremes, num_classes, ignore_index)
    counts = torch.bincount(target * num_classes + prediction, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _check_extremes(extremes: list[int], num_classes: int, ignore_index: int) -> None:
    """Check (smallest target, largest target, smallest prediction, largest prediction)."""
    last = num_classes - 1
    checks = (
        ("target", extremes[:2], f"is no class (0..{last}) and not the ignore value {ignore_index}"),
        ("prediction", extremes[2:], f"is no class (0..{last}) at a pixel that counts"),
    )
    for name, (smallest, largest), rule in checks:
        value = smallest if smallest < 0 else largest
        if not 0 <= value <= last:
            raise InputError(f"{name} value {value}", rule, f"check the number of classes and the {name}")


def _check_arrays(prediction: NDArray[Any], target: NDArray[Any]) -> None:
    _check_shapes(prediction.shape, target.shape)
    for name, array in (("prediction", prediction), ("target", target)):
        if array.dtype.kind not in "iub":
            raise InputError(f"{name} of type {array.dtype}", "holds class indices", "give integers")


def _check_tensors(prediction: Any, target: Any) -> None:
    import torch

    for name, tensor in (("prediction", prediction), ("target", target)):
        if not isinstance(tensor, torch.Tensor):
            rule = "prediction and target are both NumPy arrays or both torch tensors"
            raise InputError(f"{name} of type {type(tensor).__name__}", rule, "convert one of them")
        if tensor.is_floating_point() or tensor.is_complex():
            raise InputError(f"{name} of type {tensor.dtype}", "holds class indices", "give integers")
    _check_shapes(tuple(prediction.shape), tuple(target.shape))
    if prediction.device != target.device:
        subject = f"prediction on {prediction.device} and target on {target.device}"
        raise InputError(subject, "are on one device", "move one of them")


def _check_shapes(prediction: tuple[int, ...], target: tuple[int, ...]) -> None:
    if prediction != target:
        rule = f"differs from the shape {target} of the target"
        raise InputError(f"prediction of shape {prediction}", rule, "give class maps of equal shape")


def _to_host(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
