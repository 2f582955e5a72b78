"""Entropic transport against POT and its own optimality conditions, gradients against finite differences."""

from __future__ import annotations

import numpy as np
import ot
import ot.batch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.ops import sinkhorn
from tissuehint.ops.sinkhorn import SMALLEST_PRODUCT, Transport, sinkhorn_divergence, transport

#: How far rows and columns may be off.
WITHIN = {torch.float32: 2e-5, torch.float64: 1e-9}

#: Turns that are enough for any pair; 50 are not, see the tests that are expected to fail.
ENOUGH = 400

precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def histograms(seed: int, count: int, classes: int, concentration: float = 1.0) -> Tensor:
    """Dirichlet draws (M,K); a small concentration makes them peaked, the smallest ones are one-hot with zeros."""
    draws = np.random.default_rng(seed).dirichlet([concentration] * classes, count)
    return torch.from_numpy(draws)


def zero_one(classes: int) -> Tensor:
    return 1 - torch.eye(classes, dtype=torch.float64)


def random_cost(seed: int, classes: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((classes, classes)))


def metric(seed: int, classes: int) -> Tensor:
    """Distances between random points of the plane: symmetric, 0 on the diagonal."""
    points = torch.from_numpy(np.random.default_rng(seed).random((classes, 2)))
    return (points[:, None] - points[None]).norm(dim=2)


def near(a: Tensor, seed: int, share: float = 0.01) -> Tensor:
    """Histograms that differ from ``a`` by a small share of others."""
    return (1 - share) * a + share * histograms(seed, *a.shape)


def one_hot(seed: int, count: int, classes: int) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[np.random.default_rng(seed).integers(0, classes, count)]


COSTS = {
    "zero one": lambda classes: zero_one(classes),
    "random": lambda classes: random_cost(classes, classes),
    "metric": lambda classes: metric(classes, classes),
    "in thousandths": lambda classes: 1e-3 * random_cost(classes, classes),
    "in thousands": lambda classes: 1e3 * zero_one(classes),
}


PARTNERS = {
    "another": lambda a: histograms(7, *a.shape),
    "peaked": lambda a: histograms(7, *a.shape, concentration=0.02),
    "near": lambda a: near(a, 7),
    "itself": lambda a: a.clone(),
    "one-hot": lambda a: one_hot(7, *a.shape),
}


def rows_and_columns(found: Transport, a: Tensor, b: Tensor) -> tuple[float, float]:
    return float((found.plan.sum(2) - a).abs().max()), float((found.plan.sum(1) - b).abs().max())


def check(found: Transport, a: Tensor, b: Tensor, cost: Tensor, epsilon: float) -> None:
    """The conditions that only the optimum fulfils, and the fields against each other."""
    dtype = found.plan.dtype
    rows, columns = rows_and_columns(found, a, b)
    assert rows <= WITHIN[dtype]
    assert columns <= WITHIN[dtype]
    largest = float(cost.max())
    f, g = (each.double() / max(largest, 1e-300) for each in found.potentials)
    assert f.isfinite().all()
    assert g.isfinite().all()
    assert f.mean(1).abs().max() <= 10 * torch.finfo(dtype).eps
    relative = cost / max(largest, 1e-300)
    formula = a[:, :, None] * b[:, None] * ((f[:, :, None] + g[:, None] - relative) / epsilon).exp()
    torch.testing.assert_close(found.plan.double(), formula, rtol=0, atol=WITHIN[dtype])
    value = (found.plan.double() * cost).sum((1, 2))
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5 * largest if dtype != a.dtype else 1e-12)


@precisions
@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("kind", COSTS)
def test_plan_fulfils_what_only_the_optimum_does(kind: str, partner: str, dtype: torch.dtype) -> None:
    for classes in range(1, 9):
        cost = COSTS[kind](classes)
        parts = [histograms(classes, 10, classes, each) for each in (5.0, 1.0, 0.1, 0.01)]
        a = torch.cat([*parts, one_hot(1, 10, classes)])
        b = PARTNERS[partner](a)
        found = transport(a.to(dtype), b.to(dtype), cost.to(dtype), iterations=ENOUGH)
        assert {each.dtype for each in (*found[:2], *found.potentials)} == {dtype}
        check(found, a, b, cost, 0.05)


@pytest.mark.parametrize("kind", COSTS)
def test_plan_of_histograms_that_hardly_differ(kind: str) -> None:
    for classes in range(1, 9):
        a = torch.cat([histograms(classes, 40, classes, each) for each in (5.0, 1.0, 0.1, 0.01)])
        b, cost = near(a, 5, 1e-4), COSTS[kind](classes)
        check(transport(a, b, cost, iterations=ENOUGH), a, b, cost, 0.05)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 8),
    concentration=st.sampled_from([5.0, 1.0, 0.1, 0.01]),
    partner=st.sampled_from(sorted(PARTNERS)),
    epsilon=st.sampled_from([0.03, 0.05, 0.3, 2.0]),
    unit=st.sampled_from([1e-3, 1.0, 1e3]),
    single=st.booleans(),
)
def test_any_histograms_are_transported(
    seed: int, classes: int, concentration: float, partner: str, epsilon: float, unit: float, single: bool
) -> None:
    a, cost = histograms(seed, 8, classes, concentration), unit * random_cost(seed, classes)
    b = PARTNERS[partner](a)
    dtype = torch.float32 if single else torch.float64
    found = transport(a.to(dtype), b.to(dtype), cost.to(dtype), epsilon=epsilon, iterations=ENOUGH)
    check(found, a, b, cost, epsilon)


@precisions
@pytest.mark.parametrize("kind", COSTS)
def test_fifty_turns_are_enough_for_histograms_apart(kind: str, dtype: torch.dtype) -> None:
    for classes in range(1, 9):
        a, b = histograms(1, 200, classes), histograms(2, 200, classes)
        check(transport(a.to(dtype), b.to(dtype), COSTS[kind](classes).to(dtype)), a, b, COSTS[kind](classes), 0.05)


@precisions
def test_fifty_turns_are_enough_for_views_of_one_pixel(dtype: torch.dtype) -> None:
    """One pair in 200 of these is hardly moved: its rows are off by as much as a and b differ."""
    first = torch.arange(0.05, 0.95, 0.001, dtype=torch.float64)[:, None]
    second = first - torch.arange(1e-4, 3e-3, 1e-4, dtype=torch.float64)
    a, b = (torch.stack([each, 1 - each], -1).flatten(0, 1) for each in (first.expand_as(second), second))
    rows, _ = rows_and_columns(transport(a.to(dtype), b.to(dtype), zero_one(2)), a, b)
    assert rows <= WITHIN[dtype]


def test_a_pair_that_four_hundred_turns_do_not_move() -> None:
    """The plan has to move 1e-5 from the first class to the second."""
    a = torch.tensor([[0.51, 0.49]], dtype=torch.float64)
    b = torch.tensor([[0.50999, 0.49001]], dtype=torch.float64)
    found = transport(a, b, zero_one(2), iterations=ENOUGH)
    assert float(found.value) == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
@pytest.mark.parametrize("kind", COSTS)
def test_pot_agrees(kind: str, epsilon: float) -> None:
    for classes in (2, 3, 5, 8):
        cost = COSTS[kind](classes)
        a, b = histograms(3, 4, classes, 3.0), histograms(4, 4, classes, 1.0)
        found = transport(a, b, cost, epsilon=epsilon)
        unit = float(cost.max())
        for m in range(4):
            pair = (a[m].numpy(), b[m].numpy(), (cost / unit).numpy())
            plan = ot.bregman.sinkhorn_log(*pair, epsilon, numItermax=20000, stopThr=1e-13, warn=False)
            np.testing.assert_allclose(found.plan[m], plan, atol=1e-9)
            np.testing.assert_allclose(found.value[m], (plan * cost.numpy()).sum(), rtol=1e-7)


def test_pot_agrees_on_a_batch() -> None:
    a, b, cost = histograms(5, 6, 4, 3.0), histograms(6, 6, 4, 3.0), metric(0, 4)
    cost = cost / cost.max()
    costs, sources, targets = (each.numpy() for each in (cost.expand(6, 4, 4), a, b))
    theirs = ot.batch.solve_batch(costs, reg=0.1, a=sources, b=targets, max_iter=20000, tol=1e-13)
    found = transport(a, b, cost, epsilon=0.1)
    np.testing.assert_allclose(found.plan, theirs.plan, atol=1e-8)
    np.testing.assert_allclose(found.value, theirs.value_linear, atol=1e-8)


@pytest.mark.parametrize("kind", ["zero one", "random", "metric"])
@pytest.mark.parametrize("epsilon", [0.02, 0.005])
def test_small_epsilon_nears_the_exact_cost(kind: str, epsilon: float) -> None:
    """<P, C> lies above the exact cost, by at most eps times the largest entropy."""
    for classes in (2, 4, 6):
        a, b, cost = histograms(8, 10, classes, 2.0), histograms(9, 10, classes, 2.0), COSTS[kind](classes)
        found = transport(a, b, cost, epsilon=epsilon, iterations=5000)
        check(found, a, b, cost, epsilon)
        exact = np.array([ot.emd2(a[m].numpy(), b[m].numpy(), cost.numpy()) for m in range(10)])
        above = found.value.numpy() - exact
        assert above.min() >= -1e-9
        assert above.max() <= epsilon * float(cost.max()) * np.log(classes)


@precisions
@pytest.mark.parametrize("epsilon", [0.01, 0.005])
def test_small_epsilon_needs_no_more_turns(epsilon: float, dtype: torch.dtype) -> None:
    a, b = histograms(8, 50, 3, 2.0), histograms(9, 50, 3, 2.0)
    rows, _ = rows_and_columns(transport(a.to(dtype), b.to(dtype), zero_one(3).to(dtype), epsilon=epsilon), a, b)
    assert rows <= WITHIN[dtype]


def test_the_example_of_the_docstring_at_a_small_epsilon() -> None:
    found = transport(torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]]), 1 - torch.eye(2), epsilon=0.005)
    assert float(found.value) == pytest.approx(0.3, abs=1e-4)


@precisions
def test_products_and_sums_of_exponentials_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, cost = (each.to(dtype) for each in (histograms(1, 30, 5), histograms(2, 30, 5, 0.1), random_cost(0, 5)))
    product = transport(a, b, cost)
    monkeypatch.setattr(sinkhorn, "SMALLEST_PRODUCT", 1.0)
    direct = transport(a, b, cost)
    pairs = zip((*product[:2], *product.potentials), (*direct[:2], *direct.potentials), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-10)


def test_nothing_jumps_where_the_products_end() -> None:
    a, b = histograms(1, 50, 4), histograms(2, 50, 4)
    above, below = (
        transport(a, b, zero_one(4), epsilon=SMALLEST_PRODUCT * factor, iterations=ENOUGH)
        for factor in (1 + 1e-7, 1 - 1e-7)
    )
    torch.testing.assert_close(above.plan, below.plan, rtol=0, atol=1e-7)
    torch.testing.assert_close(above.potentials.source, below.potentials.source, rtol=0, atol=1e-5)


@precisions
@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_epsilon_is_a_share_of_the_largest_cost(unit: float, dtype: torch.dtype) -> None:
    a, b, cost = histograms(1, 30, 4).to(dtype), histograms(2, 30, 4).to(dtype), random_cost(0, 4).to(dtype)
    one, other = transport(a, b, cost), transport(a, b, unit * cost)
    within = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-11}
    torch.testing.assert_close(other.plan, one.plan, **within)
    torch.testing.assert_close(other.value / unit, one.value, **within)
    for each, scaled in zip(one.potentials, other.potentials, strict=True):
        torch.testing.assert_close(scaled / unit, each, **within)


def test_classes_without_mass_change_nothing() -> None:
    """The plan of the others is that of the smaller problem, at the same eps."""
    small_a, small_b, cost = histograms(1, 20, 3), histograms(2, 20, 3), metric(0, 5)
    a, b = (torch.cat([each, torch.zeros(20, 2, dtype=each.dtype)], 1) for each in (small_a, small_b))
    found = transport(a, b, cost)
    part = cost[:3, :3]
    small = transport(small_a, small_b, part, epsilon=0.05 * float(cost.max() / part.max()))
    torch.testing.assert_close(found.plan[:, :3, :3], small.plan, rtol=0, atol=1e-9)
    assert found.plan[:, 3:].max() <= 1e-300
    assert found.plan[:, :, 3:].max() <= 1e-300
    torch.testing.assert_close(found.value, small.value, rtol=0, atol=1e-9)


def test_potentials_of_classes_without_mass_continue_those_with_little() -> None:
    """At a mass of 1e-9 they are nearly those of mass 0: the derivative from the right."""
    a, b = histograms(1, 10, 4), histograms(2, 10, 4)
    a[:, 0], b[:, 3] = 0, 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    little = [(each + 1e-9) / (1 + 4e-9) for each in (a, b)]
    none, some = transport(a, b, metric(3, 4), iterations=ENOUGH), transport(*little, metric(3, 4), iterations=ENOUGH)
    for one, other in zip(none.potentials, some.potentials, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_without_cost_the_plan_is_the_product() -> None:
    a, b = histograms(1, 5, 3), histograms(2, 5, 3)
    found = transport(a, b, torch.zeros(3, 3))
    torch.testing.assert_close(found.plan, a[:, :, None] * b[:, None], rtol=0, atol=1e-12)
    assert (found.value == 0).all()
    assert (sinkhorn_divergence(a, b, torch.zeros(3, 3)) == 0).all()


def test_one_class_costs_its_entry() -> None:
    found = transport(torch.ones(2, 1), torch.ones(2, 1), torch.full((1, 1), 3.0))
    torch.testing.assert_close(found.value, torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(found.plan, torch.ones(2, 1, 1))


def test_no_problems_no_plans() -> None:
    nothing = torch.zeros(0, 3, requires_grad=True)
    found = transport(nothing, torch.zeros(0, 3), 1 - torch.eye(3))
    assert found.value.shape == (0,)
    assert found.plan.shape == (0, 3, 3)
    assert found.potentials.source.shape == found.potentials.target.shape == (0, 3)
    assert sinkhorn_divergence(nothing, torch.zeros(0, 3), 1 - torch.eye(3)).shape == (0,)
    found.value.sum().backward()
    assert nothing.grad is not None


def test_a_pair_does_not_know_its_batch() -> None:
    a = torch.cat([histograms(1, 4, 5), one_hot(0, 3, 5), histograms(2, 3, 5, 0.05)])
    b = torch.cat([near(a[:4], 3), a[4:5], histograms(4, 5, 5)])
    together = transport(a, b, random_cost(1, 5))
    for m in range(10):
        alone = transport(a[m : m + 1], b[m : m + 1], random_cost(1, 5))
        torch.testing.assert_close(together.plan[m], alone.plan[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together.value[m], alone.value[0], rtol=0, atol=1e-12)
        for one, other in zip(together.potentials, alone.potentials, strict=True):
            torch.testing.assert_close(one[m], other[0], rtol=0, atol=1e-10)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
@settings(max_examples=20)
def test_permuted_classes_permute_everything(seed: int, classes: int) -> None:
    a, b, cost = histograms(seed, 5, classes), histograms(seed + 1, 5, classes), random_cost(seed, classes)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(classes))
    plain = transport(a, b, cost, iterations=ENOUGH)
    moved = transport(a[:, order], b[:, order], cost[order][:, order], iterations=ENOUGH)
    torch.testing.assert_close(moved.plan, plain.plan[:, order][:, :, order], rtol=0, atol=1e-10)
    torch.testing.assert_close(moved.value, plain.value, rtol=0, atol=1e-10)
    for one, other in zip(moved.potentials, plain.potentials, strict=True):
        torch.testing.assert_close(one, other[:, order], rtol=0, atol=1e-8)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
@settings(max_examples=20)
def test_swapped_histograms_transpose_the_plan(seed: int, classes: int) -> None:
    a, b, cost = histograms(seed, 5, classes), histograms(seed + 1, 5, classes), metric(seed, classes)
    there, back = transport(a, b, cost, iterations=ENOUGH), transport(b, a, cost, iterations=ENOUGH)
    torch.testing.assert_close(there.plan, back.plan.transpose(1, 2), rtol=0, atol=1e-9)
    torch.testing.assert_close(there.value, back.value, rtol=0, atol=1e-9)
    both = [sinkhorn_divergence(*pair, cost, iterations=ENOUGH) for pair in ((a, b), (b, a))]
    torch.testing.assert_close(*both, rtol=0, atol=1e-9)


def centred(values: Tensor) -> Tensor:
    return values - values.mean(1, keepdim=True)


def test_gradients_are_the_potentials_and_the_plans() -> None:
    a, b, cost = (each.requires_grad_() for each in (histograms(1, 6, 4), histograms(2, 6, 4), metric(0, 4)))
    found = transport(a, b, cost)
    weight = torch.arange(1.0, 7, dtype=torch.float64)
    (weight * found.value).sum().backward()
    torch.testing.assert_close(a.grad, weight[:, None] * centred(found.potentials.source))
    torch.testing.assert_close(b.grad, weight[:, None] * centred(found.potentials.target))
    torch.testing.assert_close(cost.grad, (weight[:, None, None] * found.plan).sum(0))
    assert not any(each.requires_grad for each in (found.plan, *found.potentials))


def test_potentials_are_the_derivatives_of_the_dual() -> None:
    """Along directions that sum to 0, and along single entries of the cost below the largest, which keep eps."""
    a, b, cost, step = histograms(1, 5, 4, 3.0), histograms(2, 5, 4, 3.0), metric(0, 4), 1e-5
    found = transport(a, b, cost)

    def dual(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
        f, g = transport(a, b, cost).potentials
        return (a * f).sum(1) + (b * g).sum(1)

    for direction in centred(torch.eye(4, dtype=torch.float64)):
        for number, potentials in enumerate(found.potentials):
            ahead, behind = [a, b], [a, b]
            ahead[number], behind[number] = ahead[number] + step * direction, behind[number] - step * direction
            slope = (dual(*ahead, cost) - dual(*behind, cost)) / (2 * step)
            torch.testing.assert_close(slope, (potentials * direction).sum(1), rtol=1e-5, atol=1e-7)
    entry = torch.zeros(4, 4, dtype=torch.float64)
    entry[0, 0] = step
    slope = (dual(a, b, cost + 2 * entry) - dual(a, b, cost)) / (2 * step)
    torch.testing.assert_close(slope, found.plan[:, 0, 0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_divergence_is_that_of_finite_differences(seed: int) -> None:
    one, other = (torch.from_numpy(np.random.default_rng(each).normal(size=(3, 4))) for each in (seed, seed + 9))
    cost = metric(seed, 4)

    def divergence(one: Tensor, other: Tensor) -> Tensor:
        return sinkhorn_divergence(one.softmax(1), other.softmax(1), cost, iterations=ENOUGH)

    assert torch.autograd.gradcheck(divergence, (one.requires_grad_(), other.requires_grad_()), eps=1e-5, atol=1e-6)


@precisions
@pytest.mark.parametrize("epsilon", [0.1, 0.05, 0.01])
@pytest.mark.parametrize("warm", [False, True])
def test_gradients_where_histograms_are_the_same(dtype: torch.dtype, epsilon: float, warm: bool) -> None:
    """The rows of the plan hardly tell which potentials they have: f = g, which is - eps log(a) / 2 for small eps."""
    a = torch.tensor([[0.7, 0.2, 0.1], [0.98, 0.01, 0.01]], dtype=dtype)
    start = torch.tensor([[0.3, -0.2, -0.1]] * 2, dtype=dtype) if warm else None
    found = transport(a, a.clone(), zero_one(3).to(dtype), epsilon=epsilon, start=start)
    expected = centred(-epsilon * a.double().log() / 2)
    for potentials in found.potentials:
        torch.testing.assert_close(centred(potentials.double()), expected, rtol=0, atol=2e-3)
    one = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_divergence(one, a, zero_one(3).to(dtype), epsilon=epsilon).sum(), one)
    assert float(gradient.abs().max()) < 5e-5  # was .03 in single precision


def test_gradients_are_finite_where_a_histogram_is_zero() -> None:
    a, b = (one_hot(seed, 10, 4).float().requires_grad_() for seed in (0, 1))
    (transport(a, b, 1 - torch.eye(4)).value.sum() + sinkhorn_divergence(a, b, 1 - torch.eye(4)).sum()).backward()
    for each in (a, b):
        assert each.grad.isfinite().all()
        assert each.grad.abs().max() > 0.1


@precisions
def test_divergence_of_equals_is_zero(dtype: torch.dtype) -> None:
    for classes in range(1, 9):
        a = torch.cat([histograms(classes, 20, classes, each) for each in (3.0, 0.1, 0.01)]).to(dtype)
        for cost in (zero_one(classes), metric(classes, classes)):
            found = sinkhorn_divergence(a, a.clone(), cost)
            assert found.dtype == dtype
            assert found.abs().max() <= (1e-6 if dtype == torch.float32 else 1e-12)


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 8), epsilon=st.sampled_from([0.03, 0.05, 0.5]))
@settings(max_examples=20)
def test_divergence_is_not_negative_and_grows_with_the_difference(seed: int, classes: int, epsilon: float) -> None:
    a, b = histograms(seed, 10, classes), histograms(seed + 1, 10, classes)
    options = {"epsilon": epsilon, "iterations": ENOUGH}
    shares = torch.linspace(0, 1, 6, dtype=torch.float64)
    found = torch.stack(
        [sinkhorn_divergence(a, torch.lerp(a, b, each), zero_one(classes), **options) for each in shares]
    )
    assert found.min() >= -1e-9
    # convex in b and 0 at a
    assert (found.diff(dim=0) >= -1e-9).all()
    assert (found[-1] > 0).all()


def test_divergence_is_made_of_dual_values() -> None:
    a, b, cost = histograms(1, 8, 4), histograms(2, 8, 4), metric(1, 4)

    def dual(a: Tensor, b: Tensor) -> Tensor:
        f, g = transport(a, b, cost).potentials
        return (a * f).sum(1) + (b * g).sum(1)

    expected = dual(a, b) - dual(a, a) / 2 - dual(b, b) / 2
    torch.testing.assert_close(sinkhorn_divergence(a, b, cost), expected, rtol=0, atol=1e-12)


def test_sums_slightly_off_are_scaled() -> None:
    a, b = histograms(1, 5, 3), histograms(2, 5, 3)
    plain, found = transport(a, b, zero_one(3)), transport(1.0009 * a, 0.9991 * b, zero_one(3))
    torch.testing.assert_close(found.plan, plain.plan, rtol=0, atol=1e-10)


def test_input_is_left_alone_and_types_are_kept() -> None:
    for given_type, computed in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        a, b = (histograms(seed, 5, 3).to(given_type) for seed in (1, 2))
        kept = a.clone(), b.clone()
        found = transport(a, b, zero_one(3))
        assert torch.equal(a, kept[0])
        assert torch.equal(b, kept[1])
        assert {each.dtype for each in (*found[:2], *found.potentials)} == {computed}


def test_mixed_precision_does_not_reach_it() -> None:
    a, b = histograms(1, 20, 4).float(), histograms(2, 20, 4).float()
    expected = transport(a, b, 1 - torch.eye(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = transport(a, b, 1 - torch.eye(4))
    torch.testing.assert_close(found.plan, expected.plan, rtol=0, atol=2e-5)


HALVES = torch.full((2, 2), 0.5)
UNIT = 1 - torch.eye(2)

BAD = {
    "one axis": (lambda: transport(HALVES[0], HALVES[0], UNIT), r"\(2,\)"),
    "three axes": (lambda: transport(HALVES[None], HALVES[None], UNIT), r"\(1, 2, 2\)"),
    "unlike shapes": (lambda: transport(HALVES, HALVES[:1], UNIT), r"\(2, 2\) and \(1, 2\)"),
    "no class": (lambda: transport(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(0, 0)), r"\(2, 0\)"),
    "cost of other classes": (lambda: transport(HALVES, HALVES, 1 - torch.eye(3)), r"cost of shape \(3, 3\)"),
    "a cost a pair": (lambda: transport(HALVES, HALVES, UNIT[None]), r"cost of shape \(1, 2, 2\)"),
    "negative cost": (lambda: transport(HALVES, HALVES, UNIT - 0.1), "cost.*negative"),
    "infinite cost": (lambda: transport(HALVES, HALVES, UNIT / 0), "cost.*infinite"),
    "cost nan": (lambda: transport(HALVES, HALVES, UNIT * float("nan")), "cost"),
    "negative a": (lambda: transport(torch.tensor([[1.5, -0.5]]), HALVES[:1], UNIT), "histograms a.*negative"),
    "negative b": (lambda: transport(HALVES[:1], torch.tensor([[1.5, -0.5]]), UNIT), "histograms b.*negative"),
    "infinite a": (lambda: transport(HALVES / 0, HALVES, UNIT), "histograms a.*infinite"),
    "b nan": (lambda: transport(HALVES, HALVES * float("nan"), UNIT), "histograms b"),
    "sum of a": (lambda: transport(1.1 * HALVES, HALVES, UNIT), "histograms a.*1.1, not 1"),
    "sum of b": (lambda: transport(HALVES, 0.5 * HALVES, UNIT), "histograms b.*0.5, not 1"),
    "sum just off": (lambda: transport(HALVES, 1.0011 * HALVES, UNIT), "histograms b.*1.001"),
    "epsilon 0": (lambda: transport(HALVES, HALVES, UNIT, epsilon=0.0), "epsilon 0"),
    "negative epsilon": (lambda: transport(HALVES, HALVES, UNIT, epsilon=-0.1), "epsilon -0.1"),
    "infinite epsilon": (lambda: transport(HALVES, HALVES, UNIT, epsilon=float("inf")), "epsilon inf"),
    "epsilon below rounding": (lambda: transport(HALVES, HALVES, UNIT, epsilon=1e-9), "epsilon 1e-09.*1e-06"),
    "epsilon nan": (lambda: transport(HALVES, HALVES, UNIT, epsilon=float("nan")), "epsilon nan"),
    "no iteration": (lambda: transport(HALVES, HALVES, UNIT, iterations=0), "iterations 0"),
    "unsymmetric": (lambda: sinkhorn_divergence(HALVES, HALVES, torch.tensor([[0.0, 1], [2, 0]])), "not symmetric"),
    "sum in a divergence": (lambda: sinkhorn_divergence(HALVES, 2 * HALVES, UNIT), "histograms b.*2, not 1"),
    "epsilon in a divergence": (lambda: sinkhorn_divergence(HALVES, HALVES, UNIT, epsilon=0.0), "epsilon 0"),
    "no iteration in a divergence": (lambda: sinkhorn_divergence(HALVES, HALVES, UNIT, iterations=0), "iterations 0"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_histograms_of_few_bits(dtype: torch.dtype) -> None:
    rows = torch.rand(50, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows = rows / rows.sum(1, keepdim=True)
    plan = transport(rows, rows.flip(0), zero_one(4)).plan
    expected = (rows.float() / rows.float().sum(1, keepdim=True)).flip(0)
    torch.testing.assert_close(plan.sum(1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_one_line(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(InputError, match=words) as error:
        call()
    assert error.value.subject
    assert error.value.rule
    assert error.value.fix
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_a_start_nearby_changes_turns_and_nothing_else(epsilon, cost, monkeypatch):
    a, b, ground = histograms(1, 200, 4), histograms(2, 200, 4), cost(4)
    before = transport(a, b, ground, epsilon=epsilon, iterations=ENOUGH)
    moved = near(a, 3)
    expected = transport(moved, b, ground, epsilon=epsilon, iterations=ENOUGH)
    turns, turn = [], sinkhorn._turn

    def counted(*parts):
        turns.append(parts[0].shape[1])
        return turn(*parts)

    monkeypatch.setattr(sinkhorn, "_turn", counted)
    transport(moved, b, ground, epsilon=epsilon, iterations=ENOUGH)
    cold, turns[:] = sum(turns), []
    found = transport(moved, b, ground, epsilon=epsilon, iterations=ENOUGH, start=before.potentials.source)
    assert sum(turns) <= cold * (0.7 if epsilon < 0.1 else 1)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-9 * float(ground.max()))
    torch.testing.assert_close(found.plan, expected.plan, rtol=0, atol=1e-9)
    turns.clear()
    transport(moved, b, ground, epsilon=epsilon, iterations=ENOUGH, start=expected.potentials.source)
    assert sum(turns) <= 0.1 * len(a)  # rounding alone


@pytest.mark.parametrize("start", [torch.zeros(3, 2), torch.full((2, 2), torch.nan)])
def test_a_start_that_fits_nothing_is_refused(start):
    a = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    with pytest.raises(InputError, match=r"start of shape .* is \(2, 2\) and finite.*source potentials"):
        transport(a, a, zero_one(2), start=start)
