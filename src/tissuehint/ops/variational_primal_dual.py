"""Chambolle-Pock for the two-phase model, in plain torch: for any device, and the twin of the fused kernels."""

from __future__ import annotations

import torch

from tissuehint.ops.variational_model import (
    Solution,
    closed_form_means,
    data_force,
    forward_difference,
    settled,
    total_variation,
)

#: Primal and dual step; their product times 8, the squared norm of the gradient, must stay at most 1.
PRIMAL_STEP = 0.3
DUAL_STEP = 1 / (8 * PRIMAL_STEP)

#: Over-relaxation, in [1, 2): each step goes this far towards its goal. The last one before a look goes just there.
RELAXATION = 1.9

#: Iterations between two looks at the means and the duality gap.
CHECK_EVERY = 5

#: After this many changes the means stay fixed, so that no cycle can keep the solver from its end.
MEANS_UPDATES = 100


def divergence(across: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Negative adjoint of the forward differences over rows (``across``) and columns (``along``), both (N,H,W)."""
    result = across + along
    result[:, 1:] -= across[:, :-1]
    result[:, :, 1:] -= along[:, :, :-1]
    return result


def energies(
    u: torch.Tensor, across: torch.Tensor, along: torch.Tensor, force: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Primal energy P and duality gap P - D (N,), with D = sum of min(0, force - div p)."""
    primal = total_variation(u, weight) + (force * u).sum((1, 2), dtype=torch.float64)
    dual = (force - divergence(across, along)).clamp(max=0).sum((1, 2), dtype=torch.float64)
    return primal, (primal - dual).clamp(min=0)


def _iterate(
    u: torch.Tensor,
    across: torch.Tensor,
    along: torch.Tensor,
    force: torch.Tensor,
    weight: torch.Tensor,
    iterations: int,
) -> None:
    """Run over-relaxed steps in place: the dual one first, then the primal one at the extrapolated dual."""
    for left in range(iterations, 0, -1):
        relax = RELAXATION if left > 1 else 1.0
        step_across = across + DUAL_STEP * forward_difference(u, 1)
        step_along = along + DUAL_STEP * forward_difference(u, 2)
        shrink = (weight / torch.hypot(step_across, step_along).clamp(min=1e-30)).clamp(max=1)
        step_across.mul_(shrink).sub_(across)
        step_along.mul_(shrink).sub_(along)
        ahead = divergence(across + 2 * step_across, along + 2 * step_along)
        after = (u + PRIMAL_STEP * (ahead - force)).clamp(0, 1)
        across.add_(step_across, alpha=relax)
        along.add_(step_along, alpha=relax)
        u.lerp_(after, relax)


def primal_dual_torch(
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
    """Solve every map to its own duality gap; finished maps leave the batch.

    Args:
        z: (N,H,W) maps.
        weight: (N,H,W) edge weight g.
        u: (N,H,W) start in [0, 1].
        means: (N,2) start or fixed c1, c2.
        data_weight: lambda.
        free_means: replace the means by their closed form while they still move.
        max_iterations: limit per map.
        tolerance: stop when gap <= tolerance * max(|P|, 1).
    """
    index = torch.arange(len(z), device=z.device)
    updates = torch.zeros_like(index)
    out = Solution(u.clone(), means.clone(), updates.clone(), u.new_zeros(len(z), dtype=torch.float64))
    state = [u.clone(), torch.zeros_like(u), torch.zeros_like(u), data_weight * data_force(z, means), weight, z]
    done = 0
    while len(index):
        steps = min(CHECK_EVERY, max_iterations - done)
        u, across, along, force, weight, z = state
        _iterate(u, across, along, force, weight, steps)
        done += steps
        last = done >= max_iterations
        moving = torch.zeros(len(index), dtype=torch.bool, device=z.device)
        if free_means and not last:
            fresh = closed_form_means(u, z, means)
            moving = ~settled(fresh, means, z) & (updates < MEANS_UPDATES)
            means = torch.where(moving[:, None], fresh, means)
            updates = updates + moving
            state[3] = torch.where(moving[:, None, None], data_weight * data_force(z, means), force)
        primal, gap = energies(u, across, along, state[3], weight)
        finished = (gap <= tolerance * primal.abs().clamp(min=1)) & ~moving | last
        if bool(finished.any()):
            at = index[finished]
            out.u[at], out.means[at], out.gap[at] = u[finished], means[finished], gap[finished]
            out.iterations[at] = done
            keep = ~finished
            state = [each[keep] for each in state]
            index, means, updates = index[keep], means[keep], updates[keep]
    return out
