"""The complementary segmentation u of images with points: contrast maps, one solution a point, their mean (Eq. 5 to 7).

One class is segmented against the rest. With two tissue classes that is the paper's binary problem: u for the target,
1 - u for the other class. With more, each class that has points is the target once, and the results are scaled to sum
to 1 (the paper calls the extension straightforward and does not give it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.cvm.comparators import similarity_targets
from tissuehint.methods.cvm.config import CVMConfig
from tissuehint.methods.cvm.contrast import contrast_maps, unit_range
from tissuehint.ops.variational import segment_two_phase

# Eq. 7 would stretch a consensus flatter than this (all background, say) to the full range
FLAT_CONSENSUS = 1e-3
UNCLAIMED = 1e-6


@dataclass(frozen=True)
class Solutions:
    """What each in-target point of a batch says.

    Args:
        contrast: (N,h,w) the z_p, or the network's own output for ``direct_variational``.
        u: (N,h,w) the u_p.
        image: (N,) index of the image of each.
        target: (N,) class of each.
    """

    contrast: Tensor
    u: Tensor
    image: Tensor
    target: Tensor


def target_classes(config: CVMConfig, labels: LabelSpace) -> list[int]:
    """Classes that are segmented against the rest.

    Raises:
        InputError: a target that is no tissue class, or one where all classes are targets.
    """
    tissue = labels.tissue
    if config.target is not None and config.target not in tissue:
        raise InputError(f"target '{config.target}'", "is no tissue class", f"use one of {', '.join(tissue)}")
    if len(tissue) > 2 or config.sides == "both":
        if config.target is not None:
            rule = f"is one of {len(tissue)} tissue classes, which are each segmented against the rest"
            raise InputError(f"target '{config.target}'", rule, "leave target out")
        return list(range(len(tissue)))
    return [len(tissue) - 1 if config.target is None else tissue.index(config.target)]


def solve(
    config: CVMConfig, targets: Sequence[int], features: Tensor, probabilities: Tensor, points: Sequence[Tensor]
) -> Solutions:
    """Segment each in-target point of a batch; all maps go through the solver together.

    Args:
        config: eta, weights, solver, and which map is segmented.
        targets: classes that are segmented against the rest.
        features: (B,D,h,w).
        probabilities: (B,C,h,w) output of the network on the same grid; only ``direct_variational`` looks at it.
        points: B tensors (P_b,3) of (row, column, class) on this grid.
    """
    maps: list[Tensor] = []
    owners: list[tuple[int, int, int]] = []  # image, class, number of maps
    for index, rows in enumerate(points):
        for target in targets:
            inside = rows[:, 2] == target
            if config.complement == "direct_variational":
                z = probabilities[index, target][None]
            elif bool(inside.any()) and not bool(inside.all()):
                z = contrast_maps(features[index], rows[inside, :2], rows[~inside, :2], config.eta)
            else:
                continue  # one side has no point: nothing to contrast
            maps.append(z)
            owners.append((index, target, len(z)))
    contrast = torch.cat(maps) if maps else features.new_zeros((0, *features.shape[-2:]))
    counts = torch.tensor([count for *_, count in owners], dtype=torch.int64)
    image, target_of = (
        torch.tensor([owner[part] for owner in owners], dtype=torch.int64).repeat_interleave(counts).to(features.device)
        for part in (0, 1)
    )
    return Solutions(contrast, _segmented(config, contrast), image, target_of)


def combine(solutions: Solutions, targets: Sequence[int], shape: tuple[int, int, int, int]) -> Tensor:
    r"""The segmentation u of each image of a batch.

    .. math:: u = \mathcal N\left(\tfrac{1}{|P|} \sum_p u_p\right)

    Args:
        solutions: of all points.
        targets: classes that were segmented against the rest.
        shape: (B,C,h,w) of the result.

    Returns:
        (B,C,h,w) summing to 1 over C; 0 everywhere for an image without solutions. With more than two classes, a pixel
        that none of them claims is shared evenly, which gives it the smallest certainty.

    Source: Zhang et al., CVPR 2023 (CVM), Eq. 7; a mean flatter than 1e-3 is left as it is.
    """
    batch, classes = shape[:2]
    device = solutions.u.device
    total = torch.zeros(shape, dtype=solutions.u.dtype, device=device)
    count = torch.zeros((batch, classes), dtype=solutions.u.dtype, device=device)
    place = (solutions.image, solutions.target)
    total.index_put_(place, solutions.u, accumulate=True)
    count.index_put_(place, torch.ones_like(solutions.image, dtype=count.dtype), accumulate=True)
    mean = total / count.clamp_min(1)[:, :, None, None]
    flat = mean.amax((2, 3), keepdim=True) - mean.amin((2, 3), keepdim=True) < FLAT_CONSENSUS
    u = torch.where(flat, mean, unit_range(mean, FLAT_CONSENSUS))
    said = (count > 0).any(1)[:, None, None, None]
    if len(targets) == 1 and classes == 2:
        (target,) = targets
        both = torch.stack([1 - u[:, target], u[:, target]], 1)
        return (both if target == 1 else both.flip(1)) * said
    claimed = u.sum(1, keepdim=True)
    even = torch.full_like(u, 1 / classes)
    return torch.where(claimed > UNCLAIMED, u / claimed.clamp_min(UNCLAIMED), even) * said


def complement(
    config: CVMConfig, targets: Sequence[int], features: Tensor, logits: Tensor, points: Sequence[Tensor]
) -> Tensor:
    """What ``config.complement`` says about a batch, (B,C,h,w) without gradient; see ``combine``."""
    features, probabilities = features.detach().float(), logits.detach().float().softmax(1)
    if config.complement == "similarity":
        return torch.stack([_similar(image, rows, probabilities) for image, rows in zip(features, points, strict=True)])
    solutions = solve(config, targets, features, probabilities, points)
    batch, classes, height, width = probabilities.shape
    return combine(solutions, targets, (batch, classes, height, width))


def _similar(features: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    if len(torch.unique(rows[:, 2])) < 2:  # points of one class are similar to nothing else
        return torch.zeros_like(like[0])
    return similarity_targets(features, rows[:, :2], rows[:, 2], like.shape[1])


def _segmented(config: CVMConfig, contrast: Tensor) -> Tensor:
    if config.complement == "contrast_map" or not len(contrast):
        return contrast
    return segment_two_phase(
        contrast,
        data_weight=config.data_weight,
        edge_factor=config.edge_factor,
        edge_sigma=config.edge_sigma,
        solver=config.solver,
    ).u
