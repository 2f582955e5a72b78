"""The two-phase model itself: edge weight, data force, means and energy, shared by all its solvers.

Source: Zhang, Burrows et al., CVPR 2023, Eq. 6; the edge factor 10 and the normalisation of the data term by its
largest magnitude follow the parent model (Roberts, Chen and Irion, convex geodesic selective segmentation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

#: Below this the data term of a map (or the contrast of a map) counts as zero; z is meant to lie in [0, 1].
NO_CONTRAST = 1e-12

#: A phase that holds less than this share of the map keeps its former mean.
SMALLEST_PHASE = 1e-6

#: The means count as settled when they move by at most this share of the range of z.
MEANS_TOLERANCE = 3e-4

#: The Gaussian is cut off at this many standard deviations.
GAUSSIAN_REACH = 4.0


@dataclass
class Solution:
    """What a solver returns: u (N,H,W), means (N,2), iterations (N,) and duality gap (N,) in float64."""

    u: torch.Tensor
    means: torch.Tensor
    iterations: torch.Tensor
    gap: torch.Tensor


def smooth(z: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convolve maps (N,H,W) with a Gaussian of ``sigma`` px, borders replicated; 0 returns them as they are.

    Weighted sums of shifted maps: on a CPU several times faster than a convolution with one channel.
    """
    reach = int(GAUSSIAN_REACH * sigma + 0.5)
    if reach == 0:
        return z
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(reach + 1)]
    total = 2 * sum(kernel) - kernel[0]
    for axis, border in ((1, (0, 0, reach, reach)), (2, (reach, reach, 0, 0))):
        length = z.shape[axis]
        wide = F.pad(z, border, mode="replicate")
        z = wide.narrow(axis, reach, length) * (kernel[0] / total)
        for offset in range(1, reach + 1):  # in pairs, so that a flipped map gives the flipped result to the last bit
            pair = wide.narrow(axis, reach - offset, length) + wide.narrow(axis, reach + offset, length)
            z.add_(pair, alpha=kernel[offset] / total)
    return z


def slope(z: torch.Tensor, axis: int) -> torch.Tensor:
    """Central difference per px along one axis, one-sided at both ends; 0 where the axis has a single px."""
    if z.shape[axis] == 1:
        return torch.zeros_like(z)
    (result,) = torch.gradient(z, dim=axis)
    return result


def forward_difference(u: torch.Tensor, axis: int) -> torch.Tensor:
    """``u[i + 1] - u[i]`` along one axis of (N,H,W), 0 in the last place (Neumann)."""
    result = torch.zeros_like(u)
    length = u.shape[axis] - 1
    if length > 0:
        torch.sub(u.narrow(axis, 1, length), u.narrow(axis, 0, length), out=result.narrow(axis, 0, length))
    return result


def total_variation(u: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
    """Weighted isotropic total variation of maps (N,H,W), summed in float64: (N,)."""
    norm = torch.hypot(forward_difference(u, 1), forward_difference(u, 2))
    return (edge_weight * norm).sum((1, 2), dtype=torch.float64)


def force_coefficients(means: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Write the normalised data term as ``r = slope * z + offset``.

    ``(z - c1)^2 - (z - c2)^2 = (c2 - c1) (2 z - c1 - c2)`` is linear in z, so its largest magnitude is taken at the
    lowest or the highest z and no second pass over the map is needed. Nothing cancels, as squares would.

    Args:
        means: (N,2), c1 and c2.
        low: (N,) smallest z of each map.
        high: (N,) largest z of each map.

    Returns:
        slope (N,) and offset (N,); both 0 where ``max|r|`` is at most ``NO_CONTRAST``.
    """
    total, difference = means.sum(1), means[:, 1] - means[:, 0]
    largest = torch.maximum((2 * low - total).abs(), (2 * high - total).abs())
    sign = torch.where(largest * difference.abs() > NO_CONTRAST, difference.sign(), torch.zeros_like(difference))
    scale = sign / largest.clamp(min=NO_CONTRAST)
    return 2 * scale, -total * scale


def data_force(z: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The data term r of every pixel, in [-1, 1], positive near c2: (N,H,W) from z (N,H,W) and means (N,2)."""
    gain, offset = force_coefficients(means, z.amin((1, 2)), z.amax((1, 2)))
    return gain[:, None, None] * z + offset[:, None, None]


def closed_form_means(u: torch.Tensor, z: torch.Tensor, former: torch.Tensor) -> torch.Tensor:
    """The means of z weighted by u and by 1 - u: (N,2).

    A phase that holds less than a millionth of the map keeps its former mean (N,2).
    """
    pixels = z.shape[1] * z.shape[2]
    inside, mass = u.sum((1, 2), dtype=torch.float64), z.sum((1, 2), dtype=torch.float64)
    product = (u * z).sum((1, 2), dtype=torch.float64)
    area = torch.stack((inside, pixels - inside), 1)
    means = (torch.stack((product, mass - product), 1) / area.clamp(min=SMALLEST_PHASE * pixels)).to(z.dtype)
    return torch.where(area > SMALLEST_PHASE * pixels, means, former)


def settled(fresh: torch.Tensor, former: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Where new means (N,2) equal the former ones (N,2) up to ``MEANS_TOLERANCE`` of the range of z (N,H,W): (N,)."""
    return (fresh - former).abs().amax(1) <= MEANS_TOLERANCE * (z.amax((1, 2)) - z.amin((1, 2)))


def start(z: torch.Tensor) -> torch.Tensor:
    """The u to begin with: every map scaled to [0, 1] by its smallest and largest value, 0 where it has no contrast."""
    low, high = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
    # a map that varies only in its last digits is constant
    contrast = (high - low) > 16 * torch.finfo(z.dtype).eps * torch.maximum(high.abs(), low.abs())
    return torch.where(contrast, (z - low) / (high - low).clamp(min=torch.finfo(z.dtype).tiny), torch.zeros_like(z))


def start_means(u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """c1 and c2 to begin with, (N,2): weighted by the scaled map; both the mean of z where it has no contrast."""
    middle = z.mean((1, 2))
    means = closed_form_means(u, z, torch.stack((middle, middle), 1))
    flat = u.amax((1, 2)) == 0
    return torch.where(flat[:, None], middle[:, None], means)
