r"""The gradient flow of an energy in the simplex, truncated after some steps, whose energy never rises.

u_{s+1} = softmax(log u_s - tau g(u_s)) at every pixel, the mirror (entropic) step of the gradient g: u stays a tissue
map, and no projection is needed. Descent is not automatic for terms with kinks, so tau is halved, for each image by
itself, until the energy does not rise, and grows again after steps that are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tissuehint.errors import InputError

#: A probability of 0 could never grow again.
SMALLEST = 1e-6

#: After a step that was taken, and after one that was not (VSLP spec, Section 5).
GROWTH, SHRINKAGE = 1.2, 0.5

#: Least fall of the energy for which a step is taken, in units of the rounding of its pixels; below it that decides.
LEAST_FALL = 4

OfMap = Callable[[Tensor], Tensor]
ValueOfMap = Callable[[Tensor], tuple[Tensor, Tensor]]
Projection = OfMap


@runtime_checkable
class Energy(Protocol):
    """What can be minimised: energy at every pixel, and the derivative of its sum."""

    def energy(self, u: Tensor) -> Tensor:
        """(B,H,W) of maps (B,K,H,W)."""

    def gradient(self, u: Tensor) -> Tensor:
        """Of the sum over pixels, like ``u``."""


class Flow(NamedTuple):
    """Where a flow went.

    Args:
        u: (B,K,H,W), in the simplex at every pixel.
        energies: (steps + 1, B), of the start and after every step; they do not rise.
    """

    u: Tensor
    energies: Tensor


def minimise(
    energy: Energy | OfMap,
    start: Tensor,
    steps: int,
    *,
    step_size: float | Tensor = 1.0,
    halvings: int = 20,
    first_halvings: int | None = None,
    project: Projection | None = None,
) -> Flow:
    """Follow the flow from ``start``.

    Args:
        energy: an object with ``energy(u)`` (B,H,W) and ``gradient(u)``, such as ``TotalDeepVariation``; or a
            differentiable function of u that gives (B,H,W) or (B,). The gradient of an image is that of its own sum.
        start: (B,K,H,W) at least 0, summing to 1 over K.
        steps: at least 0.
        step_size: first tau, one for all or (B,).
        halvings: how often a step is tried again, at least 0. An image where none of them lowers the energy by more
            than rounding has arrived, and stays where it is.
        first_halvings: likewise, of the first step, whose size may be far too long; None takes ``halvings``.
        project: from logarithms of a map, up to a constant at each pixel, to those of the nearest map that is allowed;
            start and steps go through it. None allows all.

    Returns:
        The last map and all energies; no gradient. Where the projection moves ``start``, the first energy is that of
        the moved one.

    Raises:
        InputError: a start that is no tissue map, a step size that is not above 0, negative steps or halvings, an
            energy of another shape.

    Example:
        >>> start = torch.full((1, 2, 1, 3), 0.5)
        >>> flow = minimise(lambda u: (u[:, 0] - 0.8).square().sum((1, 2)), start, steps=20)
        >>> round(float(flow.u[0, 0, 0, 0]), 2), bool((flow.energies.diff(dim=0) <= 0).all())
        (0.8, True)
    """
    first_halvings = halvings if first_halvings is None else first_halvings
    _check(start, steps, min(halvings, first_halvings))
    tau = torch.as_tensor(step_size, dtype=start.dtype, device=start.device).expand(len(start)).clone()
    if not bool((tau > 0).all()):
        raise InputError(f"step_size {step_size}", "is not above 0", "use 1")
    value, gradient = _parts(energy)
    with torch.no_grad():
        u = start.detach()
        if project is not None:
            u = project(u.clamp_min(SMALLEST).log()).softmax(1)
        first, fall = value(u)
        energies = [first]
        going_on = torch.ones(len(start), dtype=torch.bool, device=start.device)
        for step in range(steps):
            if bool(going_on.any()):
                now = (energies[-1], fall, tau, going_on)
                trials = 1 + (halvings if step > 0 else first_halvings)
                u, reached, fall, tau, going_on = _step(value, gradient(u), u, *now, trials, project)
                energies.append(reached)
            else:
                energies.append(energies[-1])
    return Flow(u, torch.stack(energies).to(start.dtype))


def mirror_step(u: Tensor, gradient: Tensor, tau: Tensor, project: Projection | None = None) -> Tensor:
    """One step, differentiable: softmax(log u - tau g) with tau (B,) or a scalar."""
    logarithms = u.clamp_min(SMALLEST).log() - tau.view(-1, 1, 1, 1) * gradient
    return (logarithms if project is None else project(logarithms)).softmax(1)


def _step(
    value: ValueOfMap,
    gradient: Tensor,
    u: Tensor,
    before: Tensor,
    fall: Tensor,
    tau: Tensor,
    going_on: Tensor,
    trials: int,
    project: Projection | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The step with backtracking: map (B,K,H,W), energies, falls that count, step sizes, and who goes on (B,)."""
    waiting = going_on
    best, reached = u, before
    enough = before - fall
    for _ in range(trials):
        proposed = mirror_step(u, gradient, tau, project)
        found, next_fall = value(proposed)
        # neither for NaN in the energy, nor for one in a pixel that the energy does not look at
        taken = waiting & (found <= enough) & (found < before) & proposed.flatten(1).isfinite().all(1)
        best = torch.where(taken[:, None, None, None], proposed, best)
        reached = torch.where(taken, found, reached)
        fall = torch.where(taken, next_fall, fall)
        tau = torch.where(taken, tau * GROWTH, torch.where(waiting, tau * SHRINKAGE, tau))
        waiting = waiting & ~taken
        if not bool(waiting.any()):
            break
    return best, reached, fall, tau, going_on & ~waiting


def _parts(energy: Energy | OfMap) -> tuple[ValueOfMap, OfMap]:
    """Energy (B,) with the fall (B,) that counts, and gradient, of either form."""
    at_pixels: OfMap = energy.energy if isinstance(energy, Energy) else energy

    def value(u: Tensor) -> tuple[Tensor, Tensor]:
        found = at_pixels(u)
        if found.ndim not in (1, 3) or len(found) != len(u):
            rule = f"is ({len(u)},) or ({len(u)},H,W) for {len(u)} maps"
            raise InputError(f"energy of shape {tuple(found.shape)}", rule, "sum over classes, not over images")
        precise = found.dtype if found.device.type == "mps" else torch.float64
        pixels = found.flatten(1) if found.ndim == 3 else found[:, None]
        fall = LEAST_FALL * torch.finfo(found.dtype).eps * pixels.abs().sum(1, dtype=precise)
        return pixels.sum(1, dtype=precise), fall

    if isinstance(energy, Energy):
        return value, energy.gradient

    def gradient(u: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            at = u.detach().clone().requires_grad_()
            total = value(at)[0].sum()
            # an energy that is the same for every map
            return torch.autograd.grad(total, at)[0] if total.requires_grad else torch.zeros_like(u)

    return value, gradient


def _check(start: Tensor, steps: int, halvings: int) -> None:
    if start.ndim != 4:
        raise InputError(f"start of shape {tuple(start.shape)}", "is (B,K,H,W)", "add or drop an axis")
    if not bool((start >= 0).all()) or not bool(((start.sum(1) - 1).abs() < 1e-3).all()):
        raise InputError("start", "is no tissue map: at least 0, summing to 1 at every pixel", "take a softmax")
    if steps < 0:
        raise InputError(f"steps {steps}", "is negative", "use 0 or more")
    if halvings < 0:
        raise InputError(f"halvings {halvings}", "is negative", "use 0 or more")
