r"""Edge-aware two-phase segmentation of a batch of maps, the variational model of CVM.

For every map z (Zhang, Burrows et al., CVPR 2023, Eq. 6; all sums over pixels)

    min over u in [0, 1]   sum g |grad u| + lambda sum r u
    r = ((z - c1)^2 - (z - c2)^2) / max|(z - c1)^2 - (z - c2)^2|,    g = 1 / (1 + factor |grad(G_sigma * z)|^2)

in turn with the closed-form means ``c1 = sum z u / sum u`` and ``c2 = sum z (1 - u) / sum (1 - u)``. For fixed means
the problem is convex. In u and the means together it is not, and since r is scaled anew for new means, the energies
before and after a change of the means are energies of two different problems: what is sought is a fixed point, where u
solves the problem of its means and the means are those of u; noise has many of them.

Two solvers share this energy. ``primal_dual`` (Chambolle and Pock, 2011, over-relaxed as in Condat, 2013) knows its
duality gap: its energy is at most that far above the minimum. On the CPU it runs in fused kernels, elsewhere in plain
torch. ``aos`` is the paper's additive operator splitting, corrected; it smooths the total variation and replaces
u in [0, 1] by a penalty, so its energy stays some per mille to per cent above the minimum. It is there for comparison.

|grad u| takes forward differences, so flipping z changes the discrete problem a little along slanted boundaries;
transposing it changes nothing. The isotropic discrete total variation has no exact coarea formula, so u has a few
values between 0 and 1 along boundaries, and the mask u > 1/2 is a minimiser over masks up to discretisation only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tissuehint.errors import InputError
from tissuehint.ops.variational_aos import solve_aos
from tissuehint.ops.variational_model import (
    Solution,
    data_force,
    force_coefficients,
    slope,
    smooth,
    start,
    start_means,
    total_variation,
)
from tissuehint.ops.variational_primal_dual import primal_dual_torch

#: Limit and tolerance of each solver where the caller names none.
DEFAULTS = {"primal_dual": (5000, 1e-3), "aos": (500, 1e-4)}


class TwoPhase(NamedTuple):
    """Segmentation of a batch of maps.

    Attributes:
        u: (N,H,W) in [0, 1], 1 inside; carries no gradient.
        means: (N,2), c1 and c2 that u was solved with.
        energy: (N,), energy of u with these means, in px.
        iterations: most iterations that a map took.
        gap: (N,), duality gap: the energy lies at most this far above the minimum; NaN for ``aos``.
    """

    u: torch.Tensor
    means: torch.Tensor
    energy: torch.Tensor
    iterations: int
    gap: torch.Tensor


def edge_weight(z: torch.Tensor, factor: float = 10.0, sigma: float = 1.0) -> torch.Tensor:
    r"""Weight that makes boundaries cheap where the map has edges.

    ``g = 1 / (1 + factor |grad(G_sigma * z)|^2)`` with central differences, one-sided at the border, and a Gaussian
    with replicated borders, so that flips and transposition of z flip and transpose g.

    Args:
        z: (N,H,W) maps, meant to lie in [0, 1].
        factor: at least 0; the paper has 1, the code that it builds on 10.
        sigma: of the Gaussian in px; 0 leaves z as it is.

    Returns:
        (N,H,W) in (0, 1], no gradient.

    Raises:
        InputError: another shape, NaN or infinity in z, a negative factor or sigma.
    """
    z = _maps("z", z)
    _at_least_zero("factor", factor)
    _at_least_zero("sigma", sigma)
    if z.numel() == 0:
        return torch.ones_like(z)
    even = smooth(z, sigma)
    return 1 / (1 + factor * (slope(even, 1) ** 2 + slope(even, 2) ** 2))


def two_phase_energy(
    u: torch.Tensor, z: torch.Tensor, means: torch.Tensor, *, data_weight: float, edge_weight: torch.Tensor
) -> torch.Tensor:
    """Energy of given segmentations, in px.

    Args:
        u: (N,H,W) in [0, 1].
        z: (N,H,W) maps.
        means: (N,2), c1 and c2.
        data_weight: lambda, at least 0.
        edge_weight: (N,H,W), g.

    Returns:
        (N,): weighted isotropic forward-difference total variation (zero beyond the far border) plus
        ``data_weight * sum(r u)``; r is 0 where ``max|(z - c1)^2 - (z - c2)^2|`` is at most 1e-12.

    Raises:
        InputError: shapes that do not agree, NaN or infinity, a negative data weight.
    """
    z = _maps("z", z)
    u, weight = _like("u", u, z), _like("edge_weight", edge_weight, z)
    means = _means(means, z)
    _at_least_zero("data_weight", data_weight)
    if z.numel() == 0:
        return z.new_zeros(len(z))
    data = (data_force(z, means) * u).sum((1, 2), dtype=torch.float64)
    return (total_variation(u, weight) + data_weight * data).to(z.dtype)


def segment_two_phase(
    z: torch.Tensor,
    *,
    data_weight: float = 3.0,
    edge_factor: float = 10.0,
    edge_sigma: float = 1.0,
    means: torch.Tensor | None = None,
    solver: str = "primal_dual",
    max_iterations: int | None = None,
    tolerance: float | None = None,
) -> TwoPhase:
    """Segment maps into inside (u = 1, near c1) and outside (u = 0, near c2).

    Without ``means`` u starts as z scaled to [0, 1] and the means as those of that u; they are renewed every 5
    (``primal_dual``) or 10 (``aos``) iterations until they move by less than 3e-4 of the range of z. A phase
    that holds less than a millionth of the map keeps its mean.

    Where the data term vanishes there is nothing to segment and u = 0: a constant map without ``means`` (which returns
    its value as both means), ``c1 = c2``, or ``data_weight = 0``.

    Memory is linear in N x H x W. Measured peaks beyond z, in floats per px: at most 13 for ``primal_dual`` on the CPU
    (2 of them only for the maps in work, one per torch thread), 24 in plain torch, 32 for ``aos``.

    Args:
        z: (N,H,W) maps, meant to lie in [0, 1]; any rectangle, N may be 0; on any device. Computed in float64
            if z is, otherwise in float32.
        data_weight: lambda, at least 0. The paper gives none; its parent model takes 2 to 3.
        edge_factor: of ``edge_weight``.
        edge_sigma: of ``edge_weight``, in px.
        means: (N,2) fixes c1 and c2; without it they alternate with u.
        solver: ``primal_dual`` or ``aos``.
        max_iterations: limit per map; by default 5000 for ``primal_dual`` and 500 for ``aos``.
        tolerance: ``primal_dual`` ends at ``gap <= tolerance * max(|energy|, 1 px)``, default 1e-3; ``aos`` where u
            changes by ``tolerance`` of its norm in a step, default 1e-4.

    Returns:
        The segmentation. Energy, gap and u belong to the returned means.

    Raises:
        InputError: shapes that do not agree, NaN or infinity, negative weights, an unknown solver.

    Example:
        >>> z = torch.full((1, 8, 12), 0.1)
        >>> z[:, 2:6, 3:9] = 0.9
        >>> found = segment_two_phase(z)
        >>> bool(((found.u > 0.5) == (z > 0.5)).all()), [round(mean, 2) for mean in found.means[0].tolist()]
        (True, [0.9, 0.1])
    """
    if solver not in DEFAULTS:
        raise InputError(f"solver {solver!r}", "is not a solver of the two-phase model", "use primal_dual or aos")
    _at_least_zero("data_weight", data_weight)
    limit, accuracy = DEFAULTS[solver]
    limit = limit if max_iterations is None else max_iterations
    accuracy = accuracy if tolerance is None else tolerance
    if limit < 1:
        raise InputError(f"max_iterations {limit}", "is below 1", "allow at least one iteration")
    _at_least_zero("tolerance", accuracy)
    z = _maps("z", z)
    weight = edge_weight(z, edge_factor, edge_sigma)
    if z.numel() == 0:
        empty = z.new_zeros(len(z))
        return TwoPhase(torch.zeros_like(z), z.new_zeros(len(z), 2), empty, 0, empty.clone())
    u = start(z)
    first = start_means(u, z) if means is None else _means(means, z)
    with torch.no_grad():
        done = _solver(solver, z)(
            z,
            weight,
            u,
            first,
            data_weight=data_weight,
            free_means=means is None,
            max_iterations=limit,
            tolerance=accuracy,
        )
    gain, _ = force_coefficients(done.means, z.amin((1, 2)), z.amax((1, 2)))
    nothing = data_weight * gain == 0
    done.u[nothing] = 0
    gap = torch.where(nothing & ~done.gap.isnan(), 0.0, done.gap).to(z.dtype)
    energy = two_phase_energy(done.u, z, done.means, data_weight=data_weight, edge_weight=weight)
    return TwoPhase(done.u, done.means, energy, int(done.iterations.max()), gap)


def _solver(name: str, z: torch.Tensor) -> Callable[..., Solution]:
    if name == "aos":
        return solve_aos
    if z.device.type != "cpu":
        return primal_dual_torch
    from tissuehint.ops.variational_fused import primal_dual_fused  # numba loads only when it is needed

    return primal_dual_fused


def _maps(name: str, values: torch.Tensor) -> torch.Tensor:
    if values.ndim != 3:
        raise InputError(f"{name} of shape {tuple(values.shape)}", "maps are (N,H,W)", "add or drop an axis")
    values = values.detach()
    values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise InputError(name, "holds NaN or infinity", "mend the features that the maps come from")
    return values


def _like(name: str, values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if values.shape != z.shape:
        raise InputError(f"{name} of shape {tuple(values.shape)}", f"z is {tuple(z.shape)}", "give both one shape")
    return _maps(name, values).to(z)


def _means(means: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if means.shape != (len(z), 2):
        raise InputError(
            f"means of shape {tuple(means.shape)}", f"{len(z)} maps need ({len(z)}, 2)", "give c1, c2 each"
        )
    means = means.detach().to(z)
    if not bool(torch.isfinite(means).all()):
        raise InputError("means", "hold NaN or infinity", "give finite c1 and c2")
    return means


def _at_least_zero(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise InputError(f"{name} {value}", "is negative or not finite", "use 0 or more")
