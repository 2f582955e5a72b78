"""Spherical k-means: clusters of directions, by cosine similarity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.errors import InputError

RESTARTS = 10
ITERATIONS = 300


class Clusters(NamedTuple):
    """What ``spherical_kmeans`` finds; clusters are in order of size, the largest first.

    Args:
        centres: (k,D) unit vectors.
        labels: (M,) int64 in 0..k-1, the cluster of each feature.
        similarity: (M,) cosine of each feature with the centre of its cluster, in [-1,1].
    """

    centres: Tensor
    labels: Tensor
    similarity: Tensor


@torch.no_grad()
def spherical_kmeans(features: Tensor, k: int, *, restarts: int = RESTARTS, seed: int = 0) -> Clusters:
    r"""Partition features by the cosine distance :math:`1 - a \cdot b / (\|a\| \|b\|)`.

    .. math::
        \max_{\ell, c} \sum_m \frac{x_m \cdot c_{\ell(m)}}{\|x_m\|}, \qquad \|c_j\| = 1

    Lloyd's iteration: each feature goes to the centre with the largest cosine, each centre becomes the normalised sum
    of its normalised features; neither step can lower the sum. Where no step changes anything, the one feature moves
    whose move raises the sum most (first variation). Starts are drawn as in k-means++ (Arthur and Vassilvitskii 2007)
    with the cosine distance as weight, which on the sphere is half the squared Euclidean one, each the best of
    2 + log k draws. All restarts run side by side as one batch on the device of the features; the one with the largest
    sum is returned. A cluster that runs empty takes the feature that fits worst where it is, so that every cluster
    keeps at least one.

    Distance: Tang et al., PBIP, CVPR 2025, Eq. 1. Algorithm: Dhillon and Modha, Concept decompositions for large sparse
    text data using clustering, Machine Learning 42, 2001; first variation: Dhillon, Guan and Kogan, ICDM 2002.

    Args:
        features: (M,D) of any length but 0.
        k: number of clusters, 1..M.
        restarts: independent starts.
        seed: of the starts; the same features and seed give the same clusters, and no global generator is touched.

    Returns:
        Centres in the type of the features (at least float32).

    Raises:
        InputError: another shape, k outside 1..M, restarts below 1, a feature that is not finite or has length 0.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1])
        >>> found = spherical_kmeans(torch.stack([angles.cos(), angles.sin()], 1), 2)
        >>> found.labels.tolist(), [round(float(each), 2) for each in found.centres[0]]
        ([0, 0, 0, 1, 1], [1.0, 0.1])
    """
    points = _unit(features, k, restarts)
    centres = _starts(points, k, restarts, seed)
    labels = torch.full((restarts, len(points)), -1, device=points.device)
    settled, tie = False, 4 * torch.finfo(points.dtype).eps
    for _ in range(ITERATIONS):
        scores = centres @ points.T
        highest, found = scores.max(1)
        if settled:
            # of equally near centres the old one: copies of a feature would wander by rounding for ever
            own = scores.gather(1, labels[:, None])[:, 0]
            found = torch.where(own >= highest - tie, labels, found)
        settled = True
        found = _without_empty(points, centres, found, k)
        if torch.equal(found, labels):
            moved = _moved(points, labels, k)
            if moved is None:
                break
            found = moved
        labels = found
        centres = _sums(points, labels, k, centres)
    similarity = (centres @ points.T).gather(1, labels[:, None])[:, 0]
    best = int(similarity.double().sum(1).argmax())
    return _by_size(centres[best], labels[best], similarity[best])


def _moved(points: Tensor, labels: Tensor, k: int) -> Tensor | None:
    """Labels with the one move of each restart that raises its sum most; None where no move of any raises it.

    Where no step of Lloyd's changes anything, a single feature may still be better off elsewhere, since both centres
    turn with it: the sum of a cluster's cosines is the length of the sum of its features.
    """
    member = F.one_hot(labels, k).to(points.dtype)
    sums = member.transpose(1, 2) @ points
    length = sums.norm(dim=2)
    products = sums @ points.T  # (R,k,M)
    joined = (length[..., None] ** 2 + 2 * products + 1).clamp_min(0).sqrt() - length[..., None]
    own, before = products.gather(1, labels[:, None])[:, 0], length.gather(1, labels)
    left = before - (before**2 - 2 * own + 1).clamp_min(0).sqrt()
    alone = member.sum(1).gather(1, labels) < 2
    gain = (joined - left[:, None]).scatter(1, labels[:, None], float("-inf"))
    gain = gain.masked_fill(alone[:, None], float("-inf")).flatten(1)
    most, place = gain.max(1)
    better = most > 1e3 * torch.finfo(points.dtype).eps * before.amax(1)
    if not bool(better.any()):
        return None
    rows = better.nonzero()[:, 0]
    moved = labels.clone()
    moved[rows, place[rows] % len(points)] = place[rows] // len(points)
    return moved


def _unit(features: Tensor, k: int, restarts: int) -> Tensor:
    if features.ndim != 2:
        raise InputError(f"features of shape {tuple(features.shape)}", "are not (M, D)", "give one row a feature")
    if not features.shape[1]:
        raise InputError(
            f"features of shape {tuple(features.shape)}", "have no channels", "give features of some length"
        )
    if not 1 <= k <= len(features):
        fix = "ask for at least one cluster" if k < 1 else "ask for fewer clusters"
        raise InputError(f"k {k}", f"is not in 1..{len(features)}, the number of features", fix)
    if restarts < 1:
        raise InputError(f"restarts {restarts}", "is below 1", "use at least 1")
    points = features.detach()
    points = points if points.dtype == torch.float64 else points.float()
    # scaled first, so that very small and very large features neither vanish nor overflow
    points = points / points.abs().amax(1, keepdim=True)
    wrong = (~points.isfinite().all(1)).nonzero()
    if len(wrong):
        rule = "has length 0 or is not finite, so it has no direction"
        raise InputError(f"feature {int(wrong[0])}", rule, "leave it out")
    return F.normalize(points, dim=1)


def _starts(points: Tensor, k: int, restarts: int, seed: int) -> Tensor:
    """(R,k,D): features as first centres, far ones with a larger chance; of a few drawn ones the best for all."""
    generator = torch.Generator().manual_seed(seed)
    tries = 2 + int(math.log(k))
    drawn = torch.rand(restarts, k, tries, generator=generator, dtype=torch.float64).to(points.device)
    chosen = (drawn[:, 0, :1] * len(points)).long().clamp_max(len(points) - 1)
    nearest = points[chosen[:, 0]] @ points.T
    for turn in range(1, k):
        distance = (1 - nearest).clamp_min(0).double().scatter(1, chosen, 0)
        total = distance.cumsum(1)
        flat = total[:, -1:] <= 0  # all features lie on the chosen ones: any other will do
        others = torch.ones_like(distance).scatter(1, chosen, 0).cumsum(1)
        total = torch.where(flat, others, total)
        place = torch.searchsorted(total, drawn[:, turn] * total[:, -1:], right=True).clamp_max(len(points) - 1)
        covered = torch.maximum(nearest[:, None], points[place] @ points.T)  # (R,tries,M)
        best = covered.double().sum(2).argmax(1)
        rows = torch.arange(restarts, device=points.device)
        nearest = covered[rows, best]
        chosen = torch.cat([chosen, place[rows, best][:, None]], 1)
    return points[chosen]


def _sums(points: Tensor, labels: Tensor, k: int, before: Tensor) -> Tensor:
    """(R,k,D) normalised sums; a cluster whose features cancel out keeps its centre."""
    member = F.one_hot(labels, k).to(points.dtype)  # (R,M,k)
    sums = member.transpose(1, 2) @ points
    length = sums.norm(dim=2, keepdim=True)
    return torch.where(length > 1e-6, sums / length.clamp_min(1e-6), before)


def _without_empty(points: Tensor, centres: Tensor, labels: Tensor, k: int) -> Tensor:
    """Give every empty cluster the worst-fitting feature of the clusters that can spare one."""
    sizes = F.one_hot(labels, k).sum(1)
    if bool((sizes > 0).all()):
        return labels
    labels = labels.clone()
    for run, cluster in (sizes == 0).nonzero().tolist():  # rare: identical features, or an unlucky start
        own = (points * centres[run, labels[run]]).sum(1)
        sizes = torch.bincount(labels[run], minlength=k)
        own[sizes[labels[run]] < 2] = 2
        labels[run, own.argmin()] = cluster
    return labels


def _by_size(centres: Tensor, labels: Tensor, similarity: Tensor) -> Clusters:
    sizes = torch.bincount(labels, minlength=len(centres))
    order = sizes.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Clusters(centres[order], place[labels], similarity.clamp(-1, 1))
