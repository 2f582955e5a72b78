"""How well the image bank alone tells tissues apart: zero-shot classification by image prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.data.training_sets import HintSet
from tissuehint.errors import InputError
from tissuehint.methods.pbip.bank import Bank, BankConfig, need_tags, single_tags
from tissuehint.methods.pbip.features import bank_features
from tissuehint.nn.image_encoders import ImageEncoder
from tissuehint.nn.prototypes import merge_prototypes


class BankScore(NamedTuple):
    """Scores of the classification of patches that carry one tag.

    Args:
        f1: (N,) of the classes; NaN for a class that no patch has and none is given to.
        f1_mean: mean over the other classes.
        accuracy: share of patches that are right.
        confusion: (N,N) patches, rows the true class, columns the given one.
    """

    f1: tuple[float, ...]
    f1_mean: float
    accuracy: float
    confusion: NDArray[np.int64]


def score_bank(
    items: HintSet,
    bank: Bank,
    encoder: ImageEncoder,
    *,
    device: torch.device | str = "cpu",
    nearest: bool = False,
) -> BankScore:
    """Give every patch with a single tag to the class whose prototypes it looks like, and compare with the tag.

    The similarity to a class is the mean of the cosines to its prototypes (Eq. 2), or the largest of them.

    Source: Tang et al., PBIP, CVPR 2025, Table 6 (image prompts), whose F1 is a fraction.

    Args:
        items: patches with tags, of any split.
        bank: prototypes.
        encoder: the one that made the bank.
        device: where to compute.
        nearest: the largest cosine instead of the mean.

    Raises:
        InputError: no patch with a single tag.
    """
    single = single_tags(need_tags(items))
    places = np.flatnonzero(single >= 0)
    if not len(places):
        raise InputError("split", "has no patch with a single tag", "choose another split, or smaller patches")
    features = bank_features(items, places, encoder, BankConfig(), device).centred(bank.center).features.cpu()
    given = classify(features, bank.prototypes, bank.counts, nearest=nearest).numpy()
    confusion = np.zeros((len(bank.counts),) * 2, np.int64)
    np.add.at(confusion, (single[places], given), 1)
    return scores_of(confusion)


def classify(features: Tensor, prototypes: Tensor, counts: Sequence[int], *, nearest: bool = False) -> Tensor:
    """The class (M,) int64 whose prototypes (L,D) each feature (M,D) has the largest cosine with."""
    cosines = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    if not nearest:
        return merge_prototypes(cosines, counts).argmax(1)
    classes = torch.tensor([number for number, count in enumerate(counts) for _ in range(count)])
    return classes[cosines.argmax(1)]


def scores_of(confusion: NDArray[np.int64]) -> BankScore:
    """F1 and accuracy of a confusion matrix.

    Example:
        >>> scores_of(np.array([[3, 1], [0, 4]])).f1_mean.__round__(3)
        0.873
    """
    hits, total = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    with np.errstate(invalid="ignore"):
        f1 = np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)
    mean = float(np.nanmean(f1)) if np.isfinite(f1).any() else float("nan")
    return BankScore(tuple(float(v) for v in f1), mean, float(hits.sum() / max(confusion.sum(), 1)), confusion)
