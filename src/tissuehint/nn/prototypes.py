"""Prototypes as classifiers: cosine maps, projections per level, sub-classes merged to classes.

Shared by pbip and lpd.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError

Merge = Literal["mean", "softmax"]

SCALE = 1 / 0.07  # released code of PBIP: start of the learned factor on the cosines, one a level
INITIAL_STD = 0.02  # of the weights of a projection, as in vision transformers


def similarity_maps(
    features: Tensor, prototypes: Tensor, *, scale: float | Tensor = 1.0, normalize_prototypes: bool = True
) -> Tensor:
    r"""How much each cell of a feature map looks like each prototype.

    .. math::
        S(q, l) = s \, \frac{F(q) \cdot P(l)}{\|F(q)\| \, \|P(l)\|}

    without :math:`\|P(l)\|` where ``normalize_prototypes`` is false, as in the released code of PBIP. A cell or
    prototype of length 0 has similarity 0.

    Source: Tang et al., PBIP, CVPR 2025, the summand of Eq. 2.

    Args:
        features: (B,D,H,W).
        prototypes: (L,D), or (B,L,D) for prototypes of each image.
        scale: s.
        normalize_prototypes: cosine instead of the projection on the unit feature.

    Returns:
        (B,L,H,W); in [-s,s] with normalised prototypes.

    Raises:
        InputError: channels that differ.

    Example:
        >>> maps = similarity_maps(torch.ones(1, 2, 1, 1), torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, -1.0]]))
        >>> [round(float(value), 3) for value in maps.flatten()]
        [0.707, 1.0, -0.707]
    """
    if features.shape[1] != prototypes.shape[-1]:
        rule = f"have {prototypes.shape[-1]} channels, the features {features.shape[1]}"
        raise InputError("prototypes", rule, "project them to the channels of the level")
    if normalize_prototypes:
        prototypes = F.normalize(prototypes, dim=-1)
    # the maps are divided by the length of a cell, not the cells, which have many more numbers; 1e-8 is 0 in half
    # precision, so lengths are of single precision at least
    precise = precise_type(features)
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=precise).clamp_min(1e-8)
    products = torch.einsum("bdhw,...ld->blhw" if prototypes.ndim == 2 else "bdhw,bld->blhw", features, prototypes)
    maps: Tensor = products.to(precise) / length * scale
    return maps.to(features.dtype)


def merge_prototypes(values: Tensor, counts: Sequence[int], how: Merge = "mean") -> Tensor:
    r"""Scores or maps of prototypes to those of their classes.

    .. math::
        \text{mean:}\ v_n = \frac{1}{K_n} \sum_{k} v_{nk}, \qquad
        \text{softmax:}\ v_n = \sum_{k} \frac{e^{v_{nk}}}{\sum_{j} e^{v_{nj}}} v_{nk}

    The mean is Eq. 2 of Tang et al., PBIP, CVPR 2025; the softmax is what its released code does at inference.

    Args:
        values: (B,L,...), prototypes of a class side by side, classes in order.
        counts: K_n, prototypes of each class, at least 1; their sum is L.
        how: ``mean`` or ``softmax``.

    Returns:
        (B,N,...), N = len(counts).

    Raises:
        InputError: counts that do not make up L.

    Example:
        >>> merge_prototypes(torch.tensor([[1.0, 3.0, 5.0]]), [2, 1])
        tensor([[2., 5.]])
    """
    check_counts(counts, values.shape[1])
    grouped, present = _grouped(values, tuple(counts))
    if how == "mean":
        if present is None:
            return grouped.mean(2)
        return (grouped * present).sum(2) / present.sum(2)
    if how != "softmax":
        raise InputError(f"how '{how}'", "is neither mean nor softmax", "use one of these")
    weights = (grouped if present is None else grouped.masked_fill(present == 0, float("-inf"))).softmax(2)
    return (weights * grouped).sum(2)


def precise_type(values: Tensor) -> torch.dtype:
    """Single precision, or double where the values have it."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_counts(counts: Sequence[int], prototypes: int) -> None:
    """Raise ``InputError`` unless each class has a prototype and all together are ``prototypes``."""
    if not counts or min(counts) < 1 or sum(counts) != prototypes:
        rule = f"do not make up {prototypes} prototypes with at least one a class"
        raise InputError(f"counts {list(counts)}", rule, "give the number of prototypes of each class")


def by_class(prototypes: Tensor, counts: Sequence[int]) -> Tensor:
    """(L,D) prototypes as (N,K,D); classes with fewer than K = max(counts) are filled up with zeros.

    Raises:
        InputError: counts that do not make up L.
    """
    check_counts(counts, len(prototypes))
    grouped, present = _grouped(prototypes[None], tuple(counts))
    return grouped[0] if present is None else (grouped * present)[0]


def class_of_prototype(counts: Sequence[int]) -> list[int]:
    """The class of each prototype.

    Example:
        >>> class_of_prototype([2, 1, 3])
        [0, 0, 1, 2, 2, 2]
    """
    return [number for number, count in enumerate(counts) for _ in range(count)]


def _grouped(values: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """(B,L,...) as (B,N,K,...), and which of these exist (1,N,K,1...) where classes differ in number."""
    if len(set(counts)) == 1:
        return values.reshape(len(values), len(counts), counts[0], *values.shape[2:]), None
    places, exists = _places(counts)
    # tensors are made anew: one that was made in inference mode could not be kept for a backward pass
    index = torch.tensor(places, device=values.device)
    present = torch.tensor(exists, device=values.device)
    grouped = values[:, index]
    return grouped, present.to(values).view(1, *present.shape, *([1] * (values.ndim - 2)))


@cache
def _places(counts: tuple[int, ...]) -> tuple[list[list[int]], list[list[bool]]]:
    """(N,K) index into the prototypes, and whether it stands for one of its own."""
    most = max(counts)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    exists = [[number < count for number in range(most)] for count in counts]
    places = [
        [start + number if own else start for number, own in enumerate(row)]
        for start, row in zip(starts, exists, strict=True)
    ]
    return places, exists


class PrototypeProjection(nn.Sequential):
    """Two linear layers with a ReLU between, from prototypes (L,D) to the channels of a level (L,C).

    Source: Tang et al., PBIP, CVPR 2025, Section 3.4; hidden width D/2, weights from a truncated normal of spread .02
    and biases 0 as in its released code.

    Args:
        dim: D.
        channels: C.
    """

    def __init__(self, dim: int, channels: int) -> None:
        hidden = max(1, dim // 2)
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=INITIAL_STD)
                nn.init.zeros_(layer.bias)
