r"""Convex segmentation into several classes with proportions, solved exactly.

For costs c, an edge weight g, pixel weights w >= 0 and proportions pi

    min over u(x) in the simplex   sum_x w(x) <c(x), u(x)> + smoothness sum_x g(x) sum_k |grad u_k(x)|
                                   + strength W / 2 ||mean_w u - pi||_1,      W = sum_x w(x)

the multi-class relaxation of Zach et al. (VMV 2008) with the total variation of each class, and an L1 term on the class
areas; half the L1 distance is the Wasserstein distance of two histograms at the ground cost 1 between any two classes.
Solved by the primal-dual method of Chambolle and Pock (2011, Algorithm 1) with diagonal steps (Pock and Chambolle, ICCV
2011); the duality gap is known, so that the energy returned is at most that far above the minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.ops.variational_model import forward_difference

#: The gap is looked at every so many iterations.
CHECK_EVERY = 25


Steps = Callable[[int, Tensor], None]


class MultiClass(NamedTuple):
    """A segmentation.

    Args:
        u: (B,K,H,W), in the simplex at every pixel.
        energy: (B,) of u.
        gap: (B,), the energy lies at most this far above the minimum.
        iterations: done.
    """

    u: Tensor
    energy: Tensor
    gap: Tensor
    iterations: int


def project_simplex(values: Tensor) -> Tensor:
    """The nearest point of the probability simplex along dimension 1 (Held, Wolfe and Crowder, 1974; by sorting).

    Args:
        values: (B,K,...), finite.

    Returns:
        Like ``values``, at least 0 and summing to 1 over dimension 1.

    Example:
        >>> project_simplex(torch.tensor([[0.5, 0.9], [2.0, -1.0]]))
        tensor([[0.3000, 0.7000],
                [1.0000, 0.0000]])
    """
    # the projection does not change when a constant is added, and large values would lose the sum
    values = values - values.amax(1, keepdim=True)
    ordered = values.sort(1, descending=True).values
    count = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype)
    count = count.view(1, -1, *[1] * (values.ndim - 2))
    excess = (ordered.cumsum(1) - 1) / count
    kept = (ordered > excess).sum(1, keepdim=True)
    return (values - excess.gather(1, kept - 1)).clamp_min(0)


def segment_multiclass(
    cost: Tensor,
    *,
    smoothness: float,
    edge_weight: Tensor | None = None,
    weights: Tensor | None = None,
    proportions: Tensor | None = None,
    strength: float = 0.0,
    max_iterations: int = 1000,
    tolerance: float = 1e-3,
) -> MultiClass:
    """The minimiser of the energy above.

    Args:
        cost: c (B,K,H,W), finite.
        smoothness: at least 0.
        edge_weight: g (B,H,W) at least 0; None is 1 everywhere.
        weights: w (B,H,W) at least 0, such as 1 on tissue and 0 elsewhere; None is 1 everywhere.
        proportions: pi (B,K) summing to 1; None leaves the last term out.
        strength: of the proportions, at least 0.
        max_iterations: at least 1.
        tolerance: of the gap, as a share of the energy's magnitude (at least 1 px).

    Returns:
        Segmentation, energy and gap; no gradient.

    Raises:
        InputError: shapes that do not agree, a negative weight, NaN, proportions that are no shares.

    Example:
        >>> cost = torch.tensor([[0.0, 0.1, 1.0, 0.9]]).view(1, 1, 1, 4)
        >>> found = segment_multiclass(torch.cat([cost, 1 - cost], 1), smoothness=0.05)
        >>> found.u[0, 0, 0].round(decimals=2).tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    problem = _Problem(cost, smoothness, edge_weight, weights, proportions, strength)
    if max_iterations < 1:
        raise InputError(f"max_iterations {max_iterations}", "is below 1", "allow at least one iteration")
    with torch.no_grad():
        return problem.solve(max_iterations, tolerance)


class _State(NamedTuple):
    """What the iteration carries on, changed in place.

    Args:
        u: (B,K,H,W).
        ahead: its extrapolation, 2 u - u_before.
        field: dual of the total variation (2,B,K,H,W).
        bias: dual of the areas (B,K).
    """

    u: Tensor
    ahead: Tensor
    field: Tensor
    bias: Tensor


class _Replayed:
    """Steps on the GPU as a CUDA graph; called one by one, the fifty small kernels of a step take 8 times as long.

    The first steps are called as they are, which loads the kernels; what follows is a graph of as many steps.
    """

    def __init__(self, advance: Steps) -> None:
        self.advance = advance
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0

    def __call__(self, steps: int, going_on: Tensor) -> None:
        if self.steps != steps:
            self.graph, self.steps = None, steps
            self.advance(steps, going_on)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(going_on.device)
            with torch.cuda.device(going_on.device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.advance(steps, going_on)
                finally:
                    self.graph.capture_end()
        self.graph.replay()


class _Problem:
    """Energy, dual and iteration of a batch."""

    def __init__(
        self,
        cost: Tensor,
        smoothness: float,
        edge_weight: Tensor | None,
        weights: Tensor | None,
        proportions: Tensor | None,
        strength: float,
    ) -> None:
        if cost.ndim != 4 or 0 in cost.shape[1:] or not bool(cost.isfinite().all()):
            raise InputError(
                f"cost of shape {tuple(cost.shape)}", "is (B,K,H,W), not empty, and finite", "mend the maps"
            )
        for name, value in (("smoothness", smoothness), ("strength", strength)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} {value}", "is negative or not finite", "use 0 or more")
        cost = cost.detach().to(torch.float64 if cost.dtype == torch.float64 else torch.float32)
        self.weights = _field("weights", weights, cost)[:, None]
        self.edge = _field("edge_weight", edge_weight, cost)[:, None] * smoothness
        self.cost = (cost * self.weights).contiguous()
        self.total = self.weights.sum((1, 2, 3)).clamp_min(1e-12)[:, None]
        # diagonal steps: tau is one over the column sums of the operator (4 differences, one area), sigma over the rows
        self.scale = self.weights.amax((1, 2, 3))[:, None].clamp_min(1e-12)
        self.tau = 1 / (4 + self.weights / self.scale[:, :, None, None])
        self.strength = 0.0 if proportions is None else strength
        self.proportions = cost.new_zeros(cost.shape[:2])
        if proportions is not None:
            if proportions.shape != cost.shape[:2]:
                rule = f"are {tuple(cost.shape[:2])} for a cost of shape {tuple(cost.shape)}"
                raise InputError(f"proportions of shape {tuple(proportions.shape)}", rule, "give one row an image")
            self.proportions = proportions.detach().to(cost)
            if bool((self.proportions < 0).any()) or not bool(((self.proportions.sum(1) - 1).abs() < 1e-3).all()):
                raise InputError("proportions", "are not shares that sum to 1", "give fractions of at least 0")

    def solve(self, max_iterations: int, tolerance: float) -> MultiClass:
        u = torch.zeros_like(self.cost).scatter_(1, self.cost.argmin(1, keepdim=True), 1.0)
        found = MultiClass(u.clone(), self.energy(u), torch.full_like(self.total[:, 0], float("inf")), 0)
        state = _State(u, u.clone(), self.cost.new_zeros(2, *self.cost.shape), torch.zeros_like(self.proportions))
        advance = self._solver(state)  # by which the state is changed in place
        done = 0
        while True:
            steps = min(CHECK_EVERY, max_iterations - done)
            advance(steps, ~_reached(found, tolerance))
            done += steps
            found = self._better(found, state.u, self._dual(state.field, state.bias), tolerance, done)
            if done >= max_iterations or bool(_reached(found, tolerance).all()):
                return found

    def _solver(self, state: _State) -> Steps:
        """What carries the state so many steps on, in place, at least for the images that go on."""
        if self.cost.device.type == "cpu":
            from tissuehint.ops.variational_multiclass_fused import FusedSteps  # numba loads only when it is needed

            given = [self.cost, self.edge[:, 0], self.weights[:, 0], self.tau[:, 0], self.proportions]
            return FusedSteps(*state, given, self.total[:, 0], self.scale[:, 0], limit=self.strength / 2)

        one_by_one = self._one_by_one(state)
        return _Replayed(one_by_one) if self.cost.device.type == "cuda" else one_by_one

    def _one_by_one(self, state: _State) -> Steps:
        def advance(steps: int, going_on: Tensor) -> None:
            for _ in range(steps):
                self._step(state)

        return advance

    def _step(self, state: _State) -> None:
        """One iteration with torch, in place."""
        state.field.copy_(self._within(state.field + 0.5 * _gradient(state.ahead)))
        if self.strength:
            # the row of the area term sums to total, and its dual counts in units of the weights
            moved = state.bias + (self._mean(state.ahead) - self.proportions) / self.scale
            state.bias.copy_(moved.clamp(-self.strength / 2, self.strength / 2))
        u = project_simplex(state.u - self.tau * self._slope(state.field, state.bias))
        state.ahead.copy_(2 * u - state.u)
        state.u.copy_(u)

    def _better(self, found: MultiClass, u: Tensor, bound: Tensor, tolerance: float, done: int) -> MultiClass:
        """The better of two maps for each image, and of two bounds; images that are done stay as they are."""
        energy = self.energy(u)
        going_on = ~_reached(found, tolerance)
        better = going_on & (energy <= found.energy)
        kept = torch.where(better[:, None, None, None], u, found.u)
        value = torch.where(better, energy, found.energy)
        gap = torch.where(going_on, value - torch.maximum(bound, found.energy - found.gap), found.gap)
        return MultiClass(kept, value, gap, done)

    def energy(self, u: Tensor) -> Tensor:
        """(B,)."""
        smooth = (self.edge * _gradient(u).square().sum(0).sqrt()).sum((1, 2, 3))
        area = (self._mean(u) - self.proportions).abs().sum(1) * self.strength / 2 * self.total[:, 0]
        return (self.cost * u).sum((1, 2, 3)) + smooth + area

    def _dual(self, field: Tensor, bias: Tensor) -> Tensor:
        """Every pixel takes its cheapest class: a lower bound of the energy (B,)."""
        cheapest = self._slope(field, bias).amin(1).sum((1, 2))
        return cheapest - self.total[:, 0] * (bias * self.proportions).sum(1)

    def _slope(self, field: Tensor, bias: Tensor) -> Tensor:
        return self.cost + _adjoint(field) + self.weights * bias[:, :, None, None]

    def _mean(self, u: Tensor) -> Tensor:
        return (self.weights * u).sum((2, 3)) / self.total

    def _within(self, field: Tensor) -> Tensor:
        length = field.square().sum(0, keepdim=True).sqrt()
        return field * (self.edge / length.clamp_min(1e-12)).clamp_max(1)


def _reached(found: MultiClass, tolerance: float) -> Tensor:
    return found.gap <= tolerance * found.energy.abs().clamp_min(1)


def _gradient(u: Tensor) -> Tensor:
    """Forward differences (2,B,K,H,W), 0 beyond the far border."""
    flat = u.flatten(0, 1)
    return torch.stack([forward_difference(flat, axis) for axis in (1, 2)]).view(2, *u.shape)


def _adjoint(field: Tensor) -> Tensor:
    """Transpose of ``_gradient``."""
    down, right = field
    result = torch.zeros_like(down)
    if down.shape[2] > 1:
        result[:, :, :-1] -= down[:, :, :-1]
        result[:, :, 1:] += down[:, :, :-1]
    if right.shape[3] > 1:
        result[:, :, :, :-1] -= right[:, :, :, :-1]
        result[:, :, :, 1:] += right[:, :, :, :-1]
    return result


def _field(name: str, values: Tensor | None, cost: Tensor) -> Tensor:
    if values is None:
        return torch.ones_like(cost[:, 0])
    if values.shape != (len(cost), *cost.shape[2:]) or not bool(((values >= 0) & values.isfinite()).all()):
        subject = f"{name} of shape {tuple(values.shape)}"
        raise InputError(subject, f"are (B,H,W) of {tuple(cost.shape)}, at least 0 and finite", "give one a pixel")
    return values.detach().to(cost)
