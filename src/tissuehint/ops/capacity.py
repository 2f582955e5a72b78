r"""Class biases that give every class its share of the pixels: argmax with capacities, as optimal transport.

Pixels x of weight w(x) are sent to classes c at the cost -s_c(x), so that class c gets the share pi_c of the weight:
semi-discrete transport with the proportions as marginals. With entropy of temperature t its dual is the smooth convex

    min over q   t sum_x w(x) log sum_c exp((s_c(x) + q_c) / t)  -  <pi, q>,      sum_x w(x) = 1

whose minimiser makes mean_w softmax((s + q) / t) equal pi (Peyre and Cuturi, Computational Optimal Transport, 2019,
Section 5.3). As t goes to 0 the softmax becomes the argmax, and q the weights of a power diagram.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.ops.sinkhorn import SUM_TOLERANCE

#: Temperatures shrink by this factor on the way to the wanted one; each starts from the biases of the one before.
COOLING = 0.5

#: Newton's steps at each temperature, and at the last one.
STEPS, LAST_STEPS = 4, 30

#: Shares count as reached when none is off by more than this.
TOLERANCE = 1e-7

#: Without annealing, images whose shares are off by more than this in the end begin anew with it.
LOST = 1e-3

#: Where the argmax must have the shares, a temperature that does not do it shrinks by this factor, so often at most.
FREEZING, FREEZINGS = 0.25, 12

#: A class that must not occur is held this far below all others, in units of the score's spread.
EXCLUDED = 1e4


def capacity_bias(
    scores: Tensor,
    proportions: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 0.02,
    annealing: bool = True,
    tolerance: float | None = None,
) -> Tensor:
    r"""Biases q with mean over pixels of softmax((scores + q) / temperature) = proportions.

    At a small temperature ``argmax(scores + q)`` then has these shares too, up to pixels whose best two scores are as
    near to each other as the temperature; pixels with equal scores cannot be divided.

    Args:
        scores: (B,K,H,W), such as log probabilities; finite.
        proportions: (B,K), each at least 0 and summing to 1. A class of share 0 gets a bias so low that it never wins.
        weights: (B,H,W) at least 0, such as 1 on tissue and 0 elsewhere; None weighs all pixels alike. An image without
            weight gets zeros.
        temperature: above 0, in units of the scores.
        annealing: come down from a high temperature. Without it fewer steps are needed where the scores have nearly
            these shares already; images where these lead nowhere are annealed all the same.
        tolerance: at least 0; an image whose argmax is off by more is solved at ever smaller temperatures until it is
            not, such as one whose scores differ by less than ``temperature`` everywhere; no less than the share of its
            heaviest pixel counts. None leaves it at that.

    Returns:
        q (B,K), mean 0 over the classes with a share above 0; no gradient.

    Raises:
        InputError: shapes that do not agree, NaN or infinity, proportions that are no shares, negative weights, a
            temperature that is not above 0, a negative tolerance.

    Example:
        >>> scores = torch.linspace(0, 1, 100).view(1, 1, 10, 10)
        >>> scores = torch.cat([scores, 1 - scores], 1)
        >>> q = capacity_bias(scores, torch.tensor([[0.3, 0.7]]))
        >>> round(float(((scores + q[:, :, None, None]).argmax(1) == 0).float().mean()), 2)
        0.3
    """
    _check(scores, proportions, weights, temperature, tolerance)
    with torch.no_grad():
        exact = scores.detach().cpu() if scores.device.type == "mps" else scores.detach()  # which has no float64
        flat = exact.flatten(2).double()
        shares = proportions.detach().to(flat)
        shares = shares / shares.sum(1, keepdim=True)
        mass = torch.ones_like(flat[:, 0]) if weights is None else weights.detach().flatten(1).to(flat)
        heavy = mass.sum(1, keepdim=True) > 0
        mass = torch.where(heavy, mass, 1.0)
        mass = mass / mass.sum(1, keepdim=True)
        absent = shares <= 0
        spread = (flat.amax((1, 2)) - flat.amin((1, 2)))[:, None] + temperature
        flat = flat - (EXCLUDED * spread * absent)[:, :, None]
        warmest = spread if annealing else torch.zeros_like(spread)
        q, off = _solve(flat, shares, mass, absent, temperature, warmest)
        if not annealing:
            lost = (off > LOST).nonzero()[:, 0]
            if len(lost):
                part = (flat[lost], shares[lost], mass[lost], absent[lost])
                q[lost], _ = _solve(*part, temperature, spread[lost])
        if tolerance is not None:
            q = _freeze(flat, shares, mass, absent, q, temperature, tolerance)
        present = (~absent).to(q)
        q = q - (q * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        q = torch.where(absent, -EXCLUDED * spread, q)
        return (q * heavy).to(scores)


def _solve(
    scores: Tensor, shares: Tensor, mass: Tensor, absent: Tensor, temperature: float, warmest: Tensor
) -> tuple[Tensor, Tensor]:
    """Biases (B,K), by Newton's method along falling temperatures; and how far the soft shares are off, (B,)."""
    current = warmest.clamp_min(temperature)  # (B,1), each image by itself
    q = torch.zeros_like(shares)
    while bool((current > temperature).any()):
        q = _balance(scores, shares, mass, absent, q, current, STEPS)
        current = (current * COOLING).clamp_min(temperature)
    q = _balance(scores, shares, mass, absent, q, current, LAST_STEPS)
    return q, _lacking(scores, shares, mass, q, current)[1].abs().amax(1)


def _freeze(
    scores: Tensor,
    shares: Tensor,
    mass: Tensor,
    absent: Tensor,
    q: Tensor,
    temperature: float,
    tolerance: float,
) -> Tensor:
    """Biases (B,K) at temperatures so small that the argmax has the shares too."""
    current = torch.full_like(q[:, :1], temperature)
    enough = mass.amax(1).clamp_min(tolerance)  # no pixel is divided
    for _ in range(FREEZINGS):
        off = (shares - _hard_shares(scores + q[:, :, None], mass)).abs().amax(1)
        rest = (off > enough).nonzero()[:, 0]
        if not len(rest):
            break
        current[rest] *= FREEZING
        q[rest] = _balance(scores[rest], shares[rest], mass[rest], absent[rest], q[rest], current[rest], LAST_STEPS)
    return q


def _balance(
    scores: Tensor, shares: Tensor, mass: Tensor, absent: Tensor, q: Tensor, temperature: Tensor, steps: int
) -> Tensor:
    """Biases (B,K) after Newton's steps at temperatures (B,1)."""
    for _ in range(steps):
        soft, lacking = _lacking(scores, shares, mass, q, temperature)
        reached = lacking.abs().amax(1, keepdim=True) < TOLERANCE
        if bool(reached.all()):
            break
        step = _newton(soft, mass, lacking, absent, temperature) * ~reached
        q = _descend(scores, shares, mass, q, step, lacking, temperature)
    return q


def _lacking(scores: Tensor, shares: Tensor, mass: Tensor, q: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The soft assignment (B,K,N), and what it lacks of the shares, (B,K)."""
    soft = ((scores + q[:, :, None]) / temperature[:, :, None]).softmax(1)
    return soft, shares - (soft * mass[:, None]).sum(2)


def _hard_shares(scores: Tensor, mass: Tensor) -> Tensor:
    """Mass of the pixels whose highest score each class has, (B,K)."""
    return torch.zeros_like(scores[:, :, 0]).scatter_add_(1, scores.argmax(1), mass)


def _newton(soft: Tensor, mass: Tensor, lacking: Tensor, absent: Tensor, temperature: Tensor) -> Tensor:
    """The Hessian of the dual is the covariance of the soft assignment over the temperature; constants are free."""
    weighted = soft * mass[:, None]
    hessian = (torch.diag_embed(weighted.sum(2)) - weighted @ soft.transpose(1, 2)) / temperature[:, :, None]
    scale = hessian.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-12)[:, None, None]
    eye = torch.eye(soft.shape[1], dtype=soft.dtype, device=soft.device)
    # a little more than the Hessian, so that it can be solved where a class has lost all its pixels
    filled = hessian + scale * (1e-9 * eye + torch.diag_embed(absent.to(soft)) + 1 / soft.shape[1])
    step: Tensor = torch.linalg.solve(filled, lacking[:, :, None])[:, :, 0]
    return step * ~absent


def _descend(
    scores: Tensor, shares: Tensor, mass: Tensor, q: Tensor, step: Tensor, lacking: Tensor, temperature: Tensor
) -> Tensor:
    """The step, halved for each image until the dual falls enough (Armijo)."""

    def dual(biases: Tensor) -> Tensor:
        smooth = temperature * ((scores + biases[:, :, None]) / temperature[:, :, None]).logsumexp(1)
        return (smooth * mass).sum(1) - (biases * shares).sum(1)

    before = dual(q)
    promised = (lacking * step).sum(1)
    factor = torch.ones_like(before)
    for _ in range(30):
        fails = dual(q + factor[:, None] * step) > before - 1e-4 * factor * promised + 1e-14
        if not bool(fails.any()):
            break
        factor = torch.where(fails, factor / 2, factor)
    return q + factor[:, None] * step


def _check(
    scores: Tensor, proportions: Tensor, weights: Tensor | None, temperature: float, tolerance: float | None
) -> None:
    if scores.ndim != 4 or 0 in scores.shape[1:]:
        raise InputError(f"scores of shape {tuple(scores.shape)}", "are (B,K,H,W), not empty", "add or drop an axis")
    if not bool(scores.isfinite().all()):
        raise InputError("scores", "hold NaN or infinity", "raise probabilities above 0 before their logarithm")
    if proportions.shape != scores.shape[:2]:
        rule = f"are {tuple(scores.shape[:2])} for scores of shape {tuple(scores.shape)}"
        raise InputError(f"proportions of shape {tuple(proportions.shape)}", rule, "give one row an image")
    total = proportions.sum(1)
    if bool((proportions < 0).any()) or not bool(((total - 1).abs() <= SUM_TOLERANCE).all()):  # refuses NaN too
        raise InputError("proportions", "are not shares that sum to 1", "give fractions of at least 0")
    if weights is not None:
        fits = weights.shape == (len(scores), *scores.shape[2:])
        if not fits or not bool(((weights >= 0) & weights.isfinite()).all()):
            rule = f"are (B,H,W) of {tuple(scores.shape)}, at least 0 and finite"
            raise InputError(f"weights of shape {tuple(weights.shape)}", rule, "give one weight a pixel")
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature {temperature}", "is not above 0 and finite", "use a small one, such as .02")
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance {tolerance}", "is not at least 0", "use a small one, such as .001")
