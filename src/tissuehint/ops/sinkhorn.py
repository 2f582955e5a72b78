r"""Entropic optimal transport between many small histograms at once, such as the class probabilities of all pixels.

For histograms a, b over K classes and a ground cost C >= 0 (Cuturi, NeurIPS 2013)

    min over P >= 0, P 1 = a, P' 1 = b   <P, C> + eps KL(P | a b'),      eps = epsilon max C

with the dual (Peyre and Cuturi, Computational Optimal Transport, 2019, Section 4.4)

    max over f, g   <a, f> + <b, g>,     P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).

Sinkhorn's iteration makes the rows and the columns of P right in turn. Where a and b are close to each other, which is
how the views of one pixel are, it needs thousands of turns: with eps = .05 max C, rows are still off by up to .07 after
50. So each turn here also tries Newton's step on the dual in f (g is solved exactly; Brauer, Clason, Lorenz and Wirth,
A Sinkhorn-Newton method for entropic optimal transport, 2017), cut to several lengths, and keeps of these and
Sinkhorn's own what raises the dual most. It rises in every turn, and 10 to 20 turns reach rounding.

All of it is in the logarithms of the scalings. K is meant to be small: memory is M x K x K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tissuehint.errors import InputError

#: Newton's step is tried with its largest entry cut to each of these, in units of eps.
LONGEST_STEPS = (0.3, 1.0, 3.0, 9.0)

#: Rows of the plan count as right when none is off by more than this.
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}

#: Sums of exp(-C / eps) are products with a matrix down to this relative epsilon; its entries would be 0 below.
SMALLEST_PRODUCT = 1 / 60

#: Below this relative epsilon the potentials start from those of an epsilon larger by this factor.
EASY_EPSILON, COOLING = 0.05, 2.0

#: Histograms that differ by no more in any class are the same: single precision cannot tell from the rows of the plan
#: which potentials these have.
SAME = 1e-5

#: Below it rounding decides what the plan is.
SMALLEST_EPSILON = 1e-6

#: Histograms may be off from sum 1 by this much, those of few bits by two roundings; they are scaled.
SUM_TOLERANCE = 1e-3


class Potentials(NamedTuple):
    """Dual variables in units of the cost, the derivatives of the transport cost on the simplex.

    Finite also where a histogram is 0. Only ``source + target`` is defined; the mean of ``source`` over classes is 0.

    Args:
        source: f (M,K), belongs to a.
        target: g (M,K), belongs to b.
    """

    source: Tensor
    target: Tensor


class Transport(NamedTuple):
    """A batch of transport plans.

    Args:
        value: (M,), <P, C>, without the entropy term. Its gradient is the envelope's: f towards a and g towards b, each
            less its mean, and P towards the cost at a fixed eps. That is the gradient of the dual value, which differs
            from <P, C> by the entropy term, at most eps log K: finite differences are to be taken of the dual.
        plan: P (M,K,K), mass from class i of a to class j of b; columns sum to b, rows to a up to about 1e-5
            (1e-12 in float64) if the iterations were enough. No gradient.
        potentials: f and g. No gradient.
    """

    value: Tensor
    plan: Tensor
    potentials: Potentials


def transport(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 50,
    start: Tensor | None = None,
) -> Transport:
    r"""Entropic transport from a_m to b_m for every m.

    Args:
        a: (M,K) histograms, at least 0, each summing to 1; zeros are allowed.
        b: (M,K) likewise.
        cost: C (K,K), at least 0, in any unit.
        epsilon: at least 1e-6; strength of the entropy as a share of the largest cost.
        iterations: most turns, at least 1; histograms whose rows are right are left alone earlier. Below an epsilon of
            .05 as many again for every halving on the way.
        start: (M,K) potentials ``source`` of histograms near to these, from which few turns are left to go; what they
            do not lead to an end begins anew without them. None is 0.

    Returns:
        Values, plans and potentials, computed in float64 if a is, otherwise in float32. With ``cost`` 0 everywhere the
        value is 0 and the plan a b'.

    Raises:
        InputError: shapes that do not agree, a negative or infinite entry, a histogram that does not sum to 1 within
            .001, an epsilon below 1e-6, no iteration, a start that is not finite.

    Example:
        >>> found = transport(torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]]), 1 - torch.eye(2))
        >>> [round(value, 3) for value in (float(found.value), *found.plan.flatten().tolist())]
        [0.3, 0.5, 0.3, 0.0, 0.2]
    """
    a, b, cost = _checked(a, b, cost, epsilon, iterations)
    if start is not None and (start.shape != a.shape or not bool(start.isfinite().all())):
        rule = f"is {tuple(a.shape)} and finite, one row a problem"
        raise InputError(f"start of shape {tuple(start.shape)}", rule, "give the source potentials of a transport")
    value, plan, source, target, _ = _Transport.apply(a, b, cost, epsilon, iterations, start)
    return Transport(value, plan, Potentials(source, target))


def sinkhorn_divergence(a: Tensor, b: Tensor, cost: Tensor, *, epsilon: float = 0.05, iterations: int = 50) -> Tensor:
    r"""Debiased entropic transport cost: 0 where a = b, differentiable.

    S(a, b) = T(a, b) - T(a, a) / 2 - T(b, b) / 2 with the dual value T = <a, f> + <b, g> (Feydy et al., AISTATS 2019,
    Eq. 3). At least 0 where exp(-C / eps) is positive definite, as for the cost 1 - I.

    Args:
        a, b, cost, epsilon, iterations: as in ``transport``; ``cost`` symmetric.

    Returns:
        (M,) in units of the cost.

    Raises:
        InputError: as ``transport``, or a cost that is not symmetric.

    Example:
        >>> a = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
        >>> sinkhorn_divergence(a, a, 1 - torch.eye(2)).abs().max() < 1e-6
        tensor(True)
    """
    a, b, cost = _checked(a, b, cost, epsilon, iterations)
    if not torch.equal(cost, cost.T):
        raise InputError("cost", "is not symmetric, so that the divergence is not 0 for a = b", "give one cost a pair")
    settings = (cost, epsilon, iterations, None)
    both, first, second = (_Transport.apply(*pair, *settings)[4] for pair in ((a, b), (a, a), (b, b)))
    divergence: Tensor = both - (first + second) / 2
    return divergence


class _Transport(torch.autograd.Function):
    """Value, plan, potentials and dual value; gradients by the potentials."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, cost: Tensor, epsilon: float, iterations: int, start: Tensor | None
    ) -> tuple[Tensor, ...]:
        largest = float(cost.max()) if cost.numel() else 0.0
        scale = epsilon * largest
        kernel = -cost / scale if scale > 0 else torch.zeros_like(cost)
        # exp(-C / eps) of a small epsilon is 0 in single precision, and Newton's step with it
        precise = epsilon < SMALLEST_PRODUCT and a.device.type != "mps"
        with torch.autocast(a.device.type, enabled=False):
            rows = [each.T.contiguous().to(torch.float64 if precise else a.dtype) for each in (a, b)]
            kernel = kernel.to(rows[0])
            known = None if start is None or scale == 0 else start.detach().T.to(rows[0]) / scale
            f, g, unsolved = _solve(rows[0], rows[1], kernel, iterations, epsilon, known)
            if known is not None and len(unsolved):
                some = (rows[0][:, unsolved], rows[1][:, unsolved])
                f[:, unsolved], g[:, unsolved], _ = _solve(*some, kernel, iterations, epsilon)
            plan = _plan(_log(rows[0]), _log(rows[1]), f, g, kernel)
            middle = f.mean(0)
            source, target = (scale * (f - middle)).T.to(a), (scale * (g + middle)).T.to(a)
            plan = plan.permute(2, 0, 1).to(a)
        value = (plan * cost).sum((1, 2))
        dual = (a * source).sum(1) + (b * target).sum(1)
        ctx.save_for_backward(plan, source, target)
        ctx.mark_non_differentiable(plan, source, target)
        return value, plan, source, target, dual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, source, target = ctx.saved_tensors
        weight = gradients[0] + gradients[4]
        towards_a = weight[:, None] * source
        towards_b = weight[:, None] * (target - target.mean(1, keepdim=True))
        return towards_a, towards_b, torch.einsum("m,mij->ij", weight, plan), None, None, None


def _solve(
    a: Tensor, b: Tensor, kernel: Tensor, iterations: int, epsilon: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials (K,M) in units of eps for histograms (K,M) and log kernel (K,K) = -C / eps; and which are not right.

    A small epsilon is reached from a larger one: from far away Newton's step, cut as it is, would take too many turns.
    For a = b and a symmetric cost f = g, which is - log(a) / 2 up to what moves, exp(-C / eps).
    """
    f = torch.zeros_like(a) if start is None else start.clone()
    if start is None and epsilon < EASY_EPSILON:
        easier = min(epsilon * COOLING, EASY_EPSILON)
        ratio = easier / epsilon
        f = _solve(a, b, kernel / ratio, iterations, easier)[0] * ratio
    log_a, log_b = _log(a), _log(b)
    f = torch.where((a - b).abs().amax(0) <= SAME, -log_a / 2, f)
    g = _answer(log_a, f, kernel.T)
    rest = torch.arange(a.shape[1], device=a.device)  # histograms that are not solved yet
    for turn in range(iterations + 1):
        plan = _plan(log_a[:, rest], log_b[:, rest], f[:, rest], g[:, rest], kernel)
        lacking = a[:, rest] - plan.sum(1)
        wrong = lacking.abs().amax(0) > TOLERANCES[a.dtype]
        rest = rest[wrong]
        if len(rest) == 0 or turn == iterations:
            break
        part = (a[:, rest], b[:, rest], log_a[:, rest], log_b[:, rest], f[:, rest], g[:, rest])
        f[:, rest], g[:, rest] = _turn(*part, plan[:, :, wrong], lacking[:, wrong], kernel)
    # finite where a histogram is 0 too; columns last, so that they are exact
    f = _answer(log_b, g, kernel)
    return f, _answer(log_a, f, kernel.T), rest


def _turn(
    a: Tensor,
    b: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    f: Tensor,
    g: Tensor,
    plan: Tensor,
    lacking: Tensor,
    kernel: Tensor,
) -> tuple[Tensor, Tensor]:
    """One turn from potentials (K,M) with this plan (K,K,M): the best of Sinkhorn's sweep and Newton's steps."""
    step = _newton(plan, b, lacking)
    longest = step.abs().amax(0).clamp_min(torch.finfo(a.dtype).tiny)
    best_f = _answer(log_b, g, kernel)
    best_g = _answer(log_a, best_f, kernel.T)
    # differences to the present value: the values themselves are too large to compare in single precision
    gain = (a * (best_f - f)).sum(0) + (b * (best_g - g)).sum(0)
    for length in LONGEST_STEPS:
        next_f = f + step * (length / longest).clamp_max(1)
        next_g = _answer(log_a, next_f, kernel.T)
        next_gain = (a * (next_f - f)).sum(0) + (b * (next_g - g)).sum(0)
        better = next_gain > gain
        best_f, best_g = torch.where(better, next_f, best_f), torch.where(better, next_g, best_g)
        gain = torch.where(better, next_gain, gain)
    return best_f, best_g


def _newton(plan: Tensor, b: Tensor, lacking: Tensor) -> Tensor:
    """Newton's step (K,M) on f: L x = lacking, with the Laplacian L of the weights W_ik = sum_j P_ij P_kj / b_j.

    L is scaled to a unit diagonal, and its null space (a constant added to f) filled: some weights are as small as
    exp(-1/epsilon). Classes without mass keep their f.
    """
    tiny = torch.finfo(plan.dtype).tiny
    classes = len(plan)
    eye = torch.eye(classes, dtype=plan.dtype, device=plan.device)
    weights = torch.einsum("ijm,kjm->mik", plan / b.clamp_min(tiny), plan) * (1 - eye)
    degree = weights.sum(2)
    alone = degree <= 1e8 * tiny
    root = torch.where(alone, 1.0, degree).rsqrt()
    null = torch.where(alone, 0.0, 1 / root)
    null = null / null.norm(dim=1, keepdim=True).clamp_min(tiny)
    laplacian = eye - weights * root[:, :, None] * root[:, None, :] + null[:, :, None] * null[:, None, :]
    step = torch.linalg.solve_ex(laplacian, (lacking.T * root)[:, :, None])[0][:, :, 0] * root
    step = (step - step.mean(1, keepdim=True)).T
    return torch.where(step.isfinite(), step, 0.0)


def _answer(log_weights: Tensor, potentials: Tensor, kernel: Tensor) -> Tensor:
    """The potentials (K,M) of one side that make its marginals right, given those of the other."""
    total = log_weights + potentials
    if float(kernel.min()) >= -1 / SMALLEST_PRODUCT:
        highest = total.amax(0, keepdim=True)
        return -(highest + (kernel.exp() @ (total - highest).exp()).log())
    return -torch.logsumexp(kernel[:, :, None] + total[None], 1)


def _plan(log_a: Tensor, log_b: Tensor, f: Tensor, g: Tensor, kernel: Tensor) -> Tensor:
    """(K,K,M)."""
    return ((log_a + f)[:, None] + (log_b + g)[None] + kernel[:, :, None]).exp()


def _log(histogram: Tensor) -> Tensor:
    """Logarithm with a finite one for 0, whose exponential is still 0 for all that counts."""
    return histogram.clamp_min(torch.finfo(histogram.dtype).tiny).log()


def _checked(a: Tensor, b: Tensor, cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    if a.ndim != 2 or a.shape != b.shape or a.shape[1] == 0:
        subject = f"histograms of shape {tuple(a.shape)} and {tuple(b.shape)}"
        raise InputError(subject, "are both (problems, classes)", "give one row a problem")
    if cost.shape != (a.shape[1], a.shape[1]):
        subject = f"cost of shape {tuple(cost.shape)}"
        raise InputError(subject, f"is ({a.shape[1]}, {a.shape[1]}), one row a class", "give one cost a pair")
    if not SMALLEST_EPSILON <= epsilon < float("inf"):
        rule = f"is not at least {SMALLEST_EPSILON:g} and finite"
        raise InputError(f"epsilon {epsilon}", rule, "use .05 of the largest cost")
    if iterations < 1:
        raise InputError(f"iterations {iterations}", "is below 1", "allow at least one")
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    cost = cost.to(a.device, dtype)
    if not bool(((cost >= 0) & cost.isfinite()).all()):
        raise InputError("cost", "has a negative or infinite entry", "give costs of at least 0")
    return _histograms("a", a, dtype), _histograms("b", b, dtype), cost


def _histograms(name: str, given: Tensor, dtype: torch.dtype) -> Tensor:
    rounding = 2 * torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
    rows = given.to(dtype)
    total = rows.sum(1, keepdim=True)
    if not bool(((rows >= 0) & rows.isfinite()).all()):
        raise InputError(f"histograms {name}", "have a negative or infinite entry", "give shares of at least 0")
    if len(rows) and bool(((total - 1).abs() > max(SUM_TOLERANCE, rounding)).any()):
        worst = total[(total - 1).abs().argmax(), 0]
        raise InputError(f"histograms {name}", f"sum to {float(worst):.4g}, not 1", "divide each by its sum")
    # the gradient is that on the simplex, so that the scaling has no part in it
    return rows / total.detach()
