r"""The paper's additive operator splitting for the two-phase model, corrected, batched over maps and lines.

The constraint u in [0, 1] becomes a penalty ``alpha * nu(u)`` and the gradient flow takes one semi-implicit step per
axis, each a tridiagonal system per line (Zhang, Burrows et al., CVPR 2023, section 4.3.2; parameters and penalty from
the parent model by Roberts, Chen and Irion):

    u_l = (I - 2 tau B A_l)^-1 (u - tau B (f + alpha nu'(u))),   u <- (u_rows + u_columns) / 2
    (A_l u)_i = D_(i+1/2) (u_(i+1) - u_i) - D_(i-1/2) (u_i - u_(i-1)),  D = g / sqrt(|grad u|^2 + beta) at half points
    B = 1 / (1 + tau alpha b) where u is within varsigma of 0 or 1, else 1

Other than in the released code, D is taken at half points on both axes, B belongs to the pixel it multiplies, the data
term is divided by max|r|, and u is clipped to [0, 1] at the end.
"""

from __future__ import annotations

import math

import torch

from tissuehint.ops.variational_model import Solution, closed_form_means, data_force, forward_difference, settled

#: First time step; every 50 iterations it shrinks by a tenth, down to the last one.
FIRST_STEP, LAST_STEP, STEP_DECAY, DECAY_EVERY = 1e-2, 1e-3, 0.9, 50

#: Penalty: its width varsigma, its curvature nu''(0) = nu''(1) for that width, and its weight over max|f| / 2.
WIDTH, CURVATURE, PENALTY = 1e-2, 161.72, 2.0

#: beta under the root of the diffusivity.
SMOOTHING = 1e-6

#: Iterations between two updates of the means.
MEANS_EVERY = 10


def penalty_slope(u: torch.Tensor) -> torch.Tensor:
    """nu'(u) of the smoothed exact penalty: about -2 below 0, 0 inside, +2 above 1."""
    outside = torch.sqrt((2 * u - 1) ** 2 + WIDTH) - 1
    step = 0.5 + torch.atan(outside / WIDTH) / math.pi
    return (4 * u - 2) / (outside + 1) * (WIDTH * outside / (math.pi * (WIDTH**2 + outside**2)) + step)


def diffusivity(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """D between neighbours along axis 1: (N,H-1,W) from u and g (N,H,W)."""
    along = u[:, 1:] - u[:, :-1]
    across = forward_difference(u, 2)
    across[:, :, 1:] += across[:, :, :-1].clone()
    across *= 0.5  # central, borders replicated
    turn = 0.5 * (across[:, 1:] + across[:, :-1])
    return 0.5 * (weight[:, 1:] + weight[:, :-1]) / torch.sqrt(along**2 + turn**2 + SMOOTHING)


def solve_lines(between: torch.Tensor, scale: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve ``(I - scale A) x = right`` along axis 1 by the Thomas algorithm, all other places at once.

    Args:
        between: (N,H-1,W) diffusivity between neighbours.
        scale: (N,H,W) positive factor of each equation.
        right: (N,H,W).

    Returns:
        (N,H,W). The matrix is diagonally dominant, so no pivots are needed.
    """
    length = right.shape[1]
    none = torch.zeros_like(scale[:, :1])
    lower = (scale * torch.cat((none, between), 1)).transpose(0, 1).contiguous()
    upper = (scale * torch.cat((between, none), 1)).transpose(0, 1).contiguous()
    pivots = (1 + lower + upper).unbind()
    solution = right.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    lowers, uppers, lines = lower.unbind(), upper.unbind(), solution.unbind()
    for i in range(length):
        if i:
            pivots[i].addcmul_(lowers[i], uppers[i - 1], value=-1)
            lines[i].addcmul_(lowers[i], lines[i - 1])
        uppers[i].div_(pivots[i])
        lines[i].div_(pivots[i])
    for i in range(length - 2, -1, -1):
        lines[i].addcmul_(uppers[i], lines[i + 1])
    return solution.transpose(0, 1)


def _step(u: torch.Tensor, force: torch.Tensor, weight: torch.Tensor, step: float, strength: float) -> torch.Tensor:
    near = ((u.abs() <= WIDTH) | ((u - 1).abs() <= WIDTH)).to(u.dtype)
    implicit = 1 / (1 + step * strength * CURVATURE * near)
    right = u - step * implicit * (force + strength * penalty_slope(u))
    scale = 2 * step * implicit
    rows = solve_lines(diffusivity(u, weight), scale, right)
    flip = [each.transpose(1, 2).contiguous() for each in (u, weight, scale, right)]
    columns = solve_lines(diffusivity(flip[0], flip[1]), flip[2], flip[3])
    return 0.5 * (rows + columns.transpose(1, 2))


def solve_aos(
    z: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    means: torch.Tensor,
    *,
    data_weight: float,
    free_means: bool,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Iterate until u changes by at most ``tolerance`` of its norm; finished maps leave the batch.

    Args:
        z: (N,H,W) maps.
        weight: (N,H,W) edge weight g.
        u: (N,H,W) start in [0, 1].
        means: (N,2) start or fixed c1, c2.
        data_weight: lambda.
        free_means: replace the means by their closed form every ten iterations.
        max_iterations: limit per map.
        tolerance: relative change of u that ends the iteration.

    Returns:
        The solution; its gap is NaN, since this scheme knows no dual.
    """
    count = len(z)
    iterations = torch.zeros(count, dtype=torch.int64, device=z.device)
    out = Solution(u.clone(), means.clone(), iterations, u.new_full((count,), math.nan))
    index = torch.arange(count, device=z.device)
    force = data_weight * data_force(z, means)
    step, strength = FIRST_STEP, PENALTY * data_weight / 2
    for done in range(1, max_iterations + 1):
        after = _step(u, force, weight, step, strength)
        change = (after - u).norm(dim=(1, 2)) / after.norm(dim=(1, 2)).clamp(min=1e-6)
        u, finished = after, change <= tolerance
        if free_means and done % MEANS_EVERY == 0 and done < max_iterations:
            fresh = closed_form_means(u.clamp(0, 1), z, means)
            finished &= settled(fresh, means, z)
            means = torch.where(finished[:, None], means, fresh)
            force = data_weight * data_force(z, means)
        elif free_means:
            finished = torch.zeros_like(finished)
        finished |= done == max_iterations
        if done % DECAY_EVERY == 0:
            step = max(LAST_STEP, STEP_DECAY * step)
        if bool(finished.any()):
            at, keep = index[finished], ~finished
            out.u[at], out.means[at], out.iterations[at] = u[finished].clamp(0, 1), means[finished], done
            u, z, weight, force, means, index = (each[keep] for each in (u, z, weight, force, means, index))
        if not len(index):
            break
    return out
