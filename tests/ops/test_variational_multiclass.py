"""The multi-class model: the energy in numpy, lines by a linear program, the gap, symmetry, and the projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import linprog
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.ops.variational_multiclass import MultiClass, _Problem, project_simplex, segment_multiclass

precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

#: Solved until the gap is below rounding for all that is compared.
FINE = {"max_iterations": 20000, "tolerance": 1e-6}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def shares(seed: int, batch: int, classes: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([2.0] * classes, batch))


def blobs(seed: int, batch: int, classes: int, height: int, width: int, noise: float = 0.5) -> Tensor:
    """Costs of smooth regions with noise (B,K,H,W)."""
    draw = np.random.default_rng(seed)
    maps = draw.normal(size=(batch, classes, height, width))
    smooth = gaussian_filter(maps, (0, 0, height / 8, width / 8))
    return torch.from_numpy(-3 * smooth / smooth.std() + noise * maps).softmax(1)


def optional(present: bool, values: Tensor) -> Tensor | None:
    return values if present else None


def numpy_energy(
    u: Tensor,
    cost: Tensor,
    smoothness: float,
    edge_weight: Tensor | None = None,
    weights: Tensor | None = None,
    proportions: Tensor | None = None,
    strength: float = 0.0,
) -> NDArray[np.float64]:
    """The equation (B,), by numpy in double precision."""
    u, cost = (each.double().numpy() for each in (u, cost))
    g, w = (np.ones_like(cost[:, 0]) if each is None else each.double().numpy() for each in (edge_weight, weights))
    down, right = np.diff(u, axis=2, append=u[:, :, -1:]), np.diff(u, axis=3, append=u[..., -1:])
    energy = (w[:, None] * cost * u).sum((1, 2, 3))
    energy += smoothness * (g[:, None] * np.sqrt(down**2 + right**2)).sum((1, 2, 3))
    if proportions is not None:
        total = w.sum((1, 2))[:, None]
        mean = (w[:, None] * u).sum((2, 3)) / total
        energy += strength * total[:, 0] / 2 * np.abs(mean - proportions.double().numpy()).sum(1)
    return energy


def line_minimum(
    cost: NDArray[np.float64],
    smoothness: float,
    g: NDArray[np.float64],
    w: NDArray[np.float64],
    proportions: NDArray[np.float64],
    strength: float,
) -> float:
    """Least energy of one line (K,N), where all terms are linear: unknowns u, |steps of u| and |areas of u - pi|."""
    classes, length = cost.shape
    steps = np.kron(np.eye(classes), np.diff(np.eye(length), axis=0))
    means = np.kron(np.eye(classes), w / w.sum())
    measured = np.concatenate([steps, means])
    target = np.concatenate([np.zeros(len(steps)), proportions])
    slack = np.eye(len(measured))
    price = np.concatenate(
        [(w * cost).flatten(), np.tile(smoothness * g[:-1], classes), np.full(classes, strength * w.sum() / 2)]
    )
    found = linprog(
        price,
        A_ub=np.block([[measured, -slack], [-measured, -slack]]),
        b_ub=np.concatenate([target, -target]),
        A_eq=np.concatenate([np.tile(np.eye(length), (1, classes)), np.zeros((length, len(measured)))], 1),
        b_eq=np.ones(length),
    )
    return float(found.fun)


def valid(found: MultiClass, within: float = 1e-6) -> bool:
    u = found.u
    return bool(u.isfinite().all() and (u >= 0).all() and ((u.sum(1) - 1).abs() <= within).all())


@precisions
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 10)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limited", [False, True])
def test_energy_is_the_equation(limited: bool, weighted: bool, size: tuple[int, int], dtype: torch.dtype) -> None:
    cost, wanted = noise(0, 3, 4, *size).to(dtype) - 0.5, shares(1, 3, 4)
    terms: dict[str, Any] = {
        "smoothness": 0.2,
        "edge_weight": optional(weighted, noise(2, 3, *size)),
        "weights": optional(weighted, noise(3, 3, *size)),
        "proportions": optional(limited, wanted),
        "strength": 0.7,
    }
    found = segment_multiclass(cost, **terms, max_iterations=40)
    assert {each.dtype for each in found[:3]} == {dtype}
    assert found.u.shape == cost.shape
    assert found.energy.shape == found.gap.shape == (3,)
    assert valid(found)
    np.testing.assert_allclose(found.energy, numpy_energy(found.u, cost, **terms), rtol=0, atol=1e-5)
    if dtype == torch.float64:
        np.testing.assert_allclose(found.energy, numpy_energy(found.u, cost, **terms), rtol=1e-10)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 5),
    length=st.integers(1, 16),
    smoothness=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    strength=st.sampled_from([0.0, 0.3, 2.0]),
    limited=st.booleans(),
    edges=st.booleans(),
    weighted=st.booleans(),
    upright=st.booleans(),
)
def test_a_line_is_solved_as_the_linear_program(
    seed: int,
    classes: int,
    length: int,
    smoothness: float,
    strength: float,
    limited: bool,
    edges: bool,
    weighted: bool,
    upright: bool,
) -> None:
    cost, wanted = noise(seed, 1, classes, 1, length) - 0.3, shares(seed, 1, classes)
    g, w = noise(seed + 1, 1, 1, length), noise(seed + 2, 1, 1, length)
    w = w / w.max()  # see test_any_unit_of_the_weights_is_solved
    if not edges:
        g = torch.ones_like(g)
    if not weighted:
        w = torch.ones_like(w)
    lines = [each[0, 0].numpy() for each in (g, w)]
    least = line_minimum(cost[0, :, 0].numpy(), smoothness, *lines, wanted[0].numpy(), strength if limited else 0.0)
    if upright:
        cost, g, w = (each.transpose(-1, -2) for each in (cost, g, w))
    found = segment_multiclass(
        cost,
        smoothness=smoothness,
        edge_weight=optional(edges, g),
        weights=optional(weighted, w),
        proportions=optional(limited, wanted),
        strength=strength,
        max_iterations=4000,
        tolerance=1e-4,
    )
    assert valid(found)
    assert float(found.gap) >= -1e-6
    assert float(found.gap) <= 1e-3
    assert -1e-6 <= float(found.energy) - least <= float(found.gap) + 1e-6


@pytest.mark.parametrize("limited", [False, True])
def test_a_long_line_is_solved_to_the_digit(limited: bool) -> None:
    cost, wanted, g, w = noise(0, 1, 3, 1, 40), shares(1, 1, 3), noise(2, 1, 1, 40), noise(3, 1, 1, 40)
    found = segment_multiclass(
        cost,
        smoothness=0.3,
        edge_weight=g,
        weights=w / w.max(),
        proportions=optional(limited, wanted),
        strength=0.8,
        **FINE,
    )
    lines = g[0, 0].numpy(), (w / w.max())[0, 0].numpy()
    least = line_minimum(cost[0, :, 0].numpy(), 0.3, *lines, wanted[0].numpy(), 0.8 * limited)
    assert float(found.energy) == pytest.approx(least, abs=2e-5)


@pytest.mark.parametrize("unit", [3.0, 10.0, 255.0])
def test_any_unit_of_the_weights_is_solved(unit: float) -> None:
    """Weights and smoothness times a unit are the energy times the unit; from a unit of 2.3 on it diverges."""
    cost, wanted = noise(0, 2, 3, 8, 9), shares(1, 2, 3)
    options = {"proportions": wanted, "strength": 1.0, "max_iterations": 2000}
    plain = segment_multiclass(cost, smoothness=0.2, **options)
    scaled = segment_multiclass(cost, smoothness=0.2 * unit, weights=torch.full((2, 8, 9), unit), **options)
    assert (scaled.gap <= 0.01 * scaled.energy).all()
    torch.testing.assert_close(scaled.energy / unit, plain.energy, rtol=0.01, atol=0)


def test_two_pixels_of_weight_ten_keep_their_proportions() -> None:
    """A strength above all costs: the class areas must be the proportions, at the cost 0 of the pixels' own classes."""
    cost = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
    found = segment_multiclass(
        cost,
        smoothness=0.1,
        weights=torch.full((1, 1, 2), 10.0),
        proportions=torch.tensor([[0.9, 0.1]]),
        strength=5.0,
    )
    torch.testing.assert_close(found.u.mean((2, 3)), torch.tensor([[0.9, 0.1]]), rtol=0, atol=0.01)


@pytest.mark.parametrize("unit", [0.3, 2.0])
def test_other_units_of_the_weights_scale_the_energy(unit: float) -> None:
    cost, wanted = noise(0, 2, 3, 8, 9), shares(1, 2, 3)
    options = {"proportions": wanted, "strength": 1.0, "max_iterations": 5000}
    plain = segment_multiclass(cost, smoothness=0.2, **options)
    scaled = segment_multiclass(cost, smoothness=0.2 * unit, weights=torch.full((2, 8, 9), unit), **options)
    torch.testing.assert_close(scaled.energy / unit, plain.energy, rtol=5e-3, atol=0)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    classes=st.integers(1, 5),
    smoothness=st.sampled_from([0.0, 0.1, 1.0]),
    strength=st.sampled_from([0.0, 0.5, 20.0]),
    iterations=st.integers(1, 120),
    weighted=st.booleans(),
)
def test_the_gap_bounds_every_other_map(
    seed: int,
    height: int,
    width: int,
    classes: int,
    smoothness: float,
    strength: float,
    iterations: int,
    weighted: bool,
) -> None:
    """However early it stops: energy less gap lies below the energy of any map, such as random and trivial ones."""
    cost, size = noise(seed, 2, classes, height, width) - 0.5, (2, height, width)
    terms: dict[str, Any] = {
        "smoothness": smoothness,
        "edge_weight": optional(weighted, noise(seed + 1, *size)),
        "weights": optional(weighted, noise(seed + 2, *size)),
        "proportions": shares(seed, 2, classes),
        "strength": strength,
    }
    found = segment_multiclass(cost, **terms, max_iterations=iterations, tolerance=0.0)
    assert valid(found)
    assert found.iterations <= iterations
    assert (found.gap >= -1e-6).all()
    others = [
        (8 * noise(seed + 3, *cost.shape)).softmax(1),
        torch.nn.functional.one_hot(cost.argmin(1), classes).movedim(3, 1).double(),
        torch.zeros_like(cost).index_fill(1, torch.tensor([classes - 1]), 1.0),
        shares(seed, 2, classes)[:, :, None, None].expand_as(cost),
    ]
    for other in others:
        assert (numpy_energy(other, cost, **terms) >= (found.energy - found.gap).numpy() - 1e-6).all()


@pytest.mark.parametrize("limited", [False, True])
def test_a_rough_solution_is_as_near_as_its_gap_says(limited: bool) -> None:
    cost, wanted = blobs(0, 2, 4, 14, 16), shares(1, 2, 4)
    options = {"smoothness": 0.2, "proportions": optional(limited, wanted), "strength": 0.5}
    rough, fine = segment_multiclass(cost, **options), segment_multiclass(cost, **options, **FINE | {"tolerance": 1e-5})
    for found, tolerance in ((rough, 1e-3), (fine, 1e-5)):
        assert (found.gap >= -1e-6).all()
        assert (found.gap <= tolerance * found.energy.abs().clamp_min(1)).all()
    assert (rough.energy - rough.gap <= fine.energy + 1e-9).all()
    assert (fine.energy - fine.gap <= rough.energy + 1e-9).all()
    assert fine.iterations > rough.iterations


def test_single_precision_finds_the_same() -> None:
    cost, wanted = blobs(0, 2, 3, 24, 20), shares(1, 2, 3)
    options = {"smoothness": 0.2, "proportions": wanted, "strength": 0.5, "tolerance": 1e-4, "max_iterations": 3000}
    single, double = (segment_multiclass(cost.to(each), **options) for each in (torch.float32, torch.float64))
    assert (single.gap >= -1e-3).all()
    assert (single.gap <= 2e-4 * single.energy).all()
    torch.testing.assert_close(single.energy.double(), double.energy, rtol=2e-4, atol=0)
    assert (single.u.argmax(1) == double.u.argmax(1)).double().mean() > 0.99


@precisions
@pytest.mark.parametrize("weighted", [False, True])
def test_without_smoothness_every_pixel_takes_its_cheapest_class(weighted: bool, dtype: torch.dtype) -> None:
    cost = noise(0, 2, 4, 6, 7).to(dtype)
    found = segment_multiclass(cost, smoothness=0.0, weights=optional(weighted, noise(1, 2, 6, 7) + 0.1))
    assert torch.equal(found.u.argmax(1), cost.argmin(1))
    assert (found.u.amax(1) == 1).all()
    assert found.gap.abs().max() <= 1e-5


@pytest.mark.parametrize("weighted", [False, True])
def test_a_huge_smoothness_gives_one_class(weighted: bool) -> None:
    cost, weights = noise(0, 3, 4, 6, 7), noise(1, 3, 6, 7) if weighted else torch.ones(3, 6, 7)
    found = segment_multiclass(cost, smoothness=1e3, weights=weights, **FINE)
    cheapest = (weights[:, None] * cost).sum((2, 3)).argmin(1)
    expected = torch.nn.functional.one_hot(cheapest, 4).double()[:, :, None, None].expand_as(cost)
    torch.testing.assert_close(found.u, expected, rtol=0, atol=1e-3)


def test_a_huge_smoothness_with_proportions_gives_them_to_every_pixel() -> None:
    cost, wanted = noise(0, 3, 4, 6, 7), shares(1, 3, 4)
    found = segment_multiclass(cost, smoothness=100.0, proportions=wanted, strength=50.0, **FINE)
    torch.testing.assert_close(found.u, wanted[:, :, None, None].expand_as(cost), rtol=0, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothness", [0.0, 0.1])
def test_a_large_strength_makes_the_areas_the_proportions(smoothness: float, weighted: bool) -> None:
    cost, wanted = blobs(0, 3, 4, 12, 14), shares(1, 3, 4)
    weights = noise(2, 3, 12, 14) if weighted else torch.ones(3, 12, 14)
    weights = weights / weights.amax((1, 2), keepdim=True)
    found = segment_multiclass(
        cost, smoothness=smoothness, weights=weights, proportions=wanted, strength=10.0, max_iterations=2000
    )
    areas = (weights[:, None] * found.u).sum((2, 3)) / weights.sum((1, 2))[:, None]
    torch.testing.assert_close(areas, wanted, rtol=0, atol=1e-3)


def test_areas_near_the_proportions_as_the_strength_grows() -> None:
    cost, wanted = blobs(0, 2, 3, 12, 14), shares(5, 2, 3)
    missed = []
    for strength in (0.0, 0.1, 0.3, 1.0, 3.0):
        found = segment_multiclass(
            cost, smoothness=0.1, proportions=wanted, strength=strength, max_iterations=5000, tolerance=1e-4
        )
        missed.append((found.u.mean((2, 3)) - wanted).abs().sum(1))
    assert (torch.stack(missed).diff(dim=0) <= 2e-3).all()
    assert (missed[0] > 0.1).all()
    assert (missed[-1] < 1e-3).all()


def test_strength_without_proportions_and_proportions_without_strength_are_nothing() -> None:
    cost = noise(0, 2, 3, 6, 7)
    plain = segment_multiclass(cost, smoothness=0.1)
    for options in ({"strength": 5.0}, {"proportions": shares(1, 2, 3)}):
        found = segment_multiclass(cost, smoothness=0.1, **options)
        assert torch.equal(found.u, plain.u)
        assert torch.equal(found.energy, plain.energy)


def test_pixels_without_weight_follow_their_neighbours() -> None:
    cost = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 6)
    cost = torch.cat([cost, 1 - cost], 1)
    weights = torch.tensor([1.0, 1, 0, 0, 1, 1]).view(1, 1, 6)
    found = segment_multiclass(cost, smoothness=0.1, weights=weights, **FINE)
    torch.testing.assert_close(found.u[0, 0, 0], torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-3)


def test_no_weight_at_all_is_no_energy() -> None:
    found = segment_multiclass(
        noise(0, 1, 3, 4, 5),
        smoothness=0.1,
        weights=torch.zeros(1, 4, 5),
        proportions=torch.tensor([[0.2, 0.3, 0.5]]),
        strength=2.0,
    )
    assert valid(found)
    assert found.energy.abs().max() <= 1e-9
    assert found.gap.abs().max() <= 1e-9


def test_edges_stand_where_the_edge_weight_is_low() -> None:
    """The costs say nothing in the middle; the step goes where it is cheap: between pixels 6 and 7."""
    cost = torch.tensor([0.0] * 2 + [0.5] * 8 + [1.0] * 2, dtype=torch.float64).view(1, 1, 1, 12)
    weight = torch.ones(1, 1, 12)
    weight[..., 6] = 0.1
    found = segment_multiclass(torch.cat([cost, 1 - cost], 1), smoothness=0.2, edge_weight=weight, **FINE)
    expected = torch.tensor([1.0] * 7 + [0.0] * 5, dtype=torch.float64)
    torch.testing.assert_close(found.u[0, 0, 0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("limited", [False, True])
def test_transposed_costs_give_transposed_segmentations(limited: bool) -> None:
    cost, g, w = blobs(0, 2, 3, 11, 16), noise(1, 2, 11, 16), noise(2, 2, 11, 16)
    options = {"smoothness": 0.2, "proportions": optional(limited, shares(1, 2, 3)), "strength": 0.5}
    one = segment_multiclass(cost, edge_weight=g, weights=w, **options)
    turned = (each.transpose(-1, -2) for each in (cost, g, w))
    other = segment_multiclass(next(turned), edge_weight=next(turned), weights=next(turned), **options)
    torch.testing.assert_close(one.u, other.u.transpose(2, 3), rtol=0, atol=1e-8)
    torch.testing.assert_close(one.energy, other.energy)
    assert one.iterations == other.iterations


def test_flipped_lines_give_flipped_segmentations() -> None:
    """In one dimension the length of a step does not depend on where it is looked at from."""
    cost, wanted, w = noise(0, 2, 3, 1, 12), shares(1, 2, 3), 0.2 + 0.8 * noise(2, 2, 1, 12)
    options = {"smoothness": 0.2, "proportions": wanted, "strength": 0.5, **FINE}
    one = segment_multiclass(cost, weights=w, **options)
    other = segment_multiclass(cost.flip(3), weights=w.flip(2), **options)
    torch.testing.assert_close(one.energy, other.energy, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.u, other.u.flip(3), rtol=0, atol=0.01)


@pytest.mark.parametrize("axis", [2, 3])
def test_flipped_maps_give_nearly_flipped_segmentations(axis: int) -> None:
    """Forward differences see one diagonal shorter than the other: boundaries move by a pixel here and there."""
    cost = blobs(0, 2, 3, 30, 36, noise=0.1)
    one, other = (segment_multiclass(each, smoothness=0.2) for each in (cost, cost.flip(axis)))
    torch.testing.assert_close(one.energy, other.energy, rtol=0.02, atol=0)
    assert (one.u.argmax(1) == other.u.flip(axis).argmax(1)).double().mean() > 0.98


def test_permuted_classes_permute_the_segmentation() -> None:
    cost, wanted, order = blobs(0, 2, 4, 10, 12), shares(1, 2, 4), [2, 0, 3, 1]
    options = {"smoothness": 0.2, "strength": 0.5}
    plain = segment_multiclass(cost, proportions=wanted, **options)
    moved = segment_multiclass(cost[:, order], proportions=wanted[:, order], **options)
    torch.testing.assert_close(moved.u, plain.u[:, order], rtol=0, atol=1e-8)


def test_a_cost_of_all_classes_is_no_choice() -> None:
    cost, extra = blobs(0, 2, 3, 10, 12), 3 * noise(1, 2, 1, 10, 12)
    plain = segment_multiclass(cost, smoothness=0.2, max_iterations=100, tolerance=0.0)
    found = segment_multiclass(cost + extra, smoothness=0.2, max_iterations=100, tolerance=0.0)
    torch.testing.assert_close(found.u, plain.u, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.energy, plain.energy + extra.sum((1, 2, 3)))


@pytest.mark.parametrize("limited", [False, True])
def test_an_image_does_not_know_its_batch(limited: bool) -> None:
    cost = torch.cat([blobs(0, 2, 3, 10, 12), noise(1, 1, 3, 10, 12), torch.zeros(1, 3, 10, 12, dtype=torch.float64)])
    wanted, weights = shares(1, 4, 3), noise(2, 4, 10, 12)
    options = {"smoothness": 0.2, "strength": 0.5}
    together = segment_multiclass(cost, weights=weights, proportions=optional(limited, wanted), **options)
    counts = []
    for n in range(4):
        one = slice(n, n + 1)
        alone = segment_multiclass(
            cost[one], weights=weights[one], proportions=optional(limited, wanted[one]), **options
        )
        torch.testing.assert_close(together.u[n], alone.u[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.energy[n], alone.energy[0])
        torch.testing.assert_close(together.gap[n], alone.gap[0], rtol=0, atol=1e-9)
        counts.append(alone.iterations)
    assert together.iterations == max(counts)


def test_two_dimensions_are_shorter_than_the_sum_of_their_lines() -> None:
    """A corner is cut: isotropic, not the sum over axes. One pixel of class 1 has the length 2 + sqrt 2 a class."""
    cost = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    cost[:, 1] = 10
    cost[:, :, 1, 1] = torch.tensor([100.0, 0.0])
    found = segment_multiclass(cost, smoothness=1.0, **FINE)
    assert float(found.energy) == pytest.approx(2 * (2 + np.sqrt(2)), abs=1e-4)


@precisions
@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 5), (3, 2, 1, 9), (3, 3, 9, 1), (2, 4, 17, 13), (1, 9, 6, 7), (2, 2, 1, 1)]
)
@pytest.mark.parametrize("limited", [False, True])
def test_the_kernel_takes_the_steps_that_torch_takes(
    shape: tuple[int, ...], limited: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, classes, *size = shape
    cost = 3 * noise(0, *shape).to(dtype)
    options = {
        "smoothness": 0.3,
        "edge_weight": noise(1, batch, *size),
        "weights": noise(2, batch, *size),
        "proportions": optional(limited, shares(3, batch, classes)),
        "strength": 5.0,
        "max_iterations": 60,
        "tolerance": 0.0,
    }
    found = segment_multiclass(cost, **options)
    monkeypatch.setattr(_Problem, "_solver", _Problem._one_by_one)  # by torch, as on other devices than the CPU
    expected = segment_multiclass(cost, **options)
    within = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.u, expected.u, rtol=0, atol=within)
    torch.testing.assert_close(found.energy, expected.energy, rtol=within, atol=within)
    torch.testing.assert_close(found.gap, expected.gap, rtol=0, atol=30 * within)


def test_the_order_of_the_memory_changes_nothing() -> None:
    cost = blobs(0, 2, 3, 10, 12).float()
    plain = segment_multiclass(cost, smoothness=0.2)
    other = segment_multiclass(cost.to(memory_format=torch.channels_last), smoothness=0.2)
    assert torch.equal(plain.u, other.u)


def test_threads_change_nothing() -> None:
    cost, before = blobs(0, 5, 3, 20, 24), torch.get_num_threads()
    options = {"smoothness": 0.2, "proportions": shares(1, 5, 3), "strength": 3.0}
    alone = segment_multiclass(cost, **options)
    try:
        torch.set_num_threads(3)
        threaded = segment_multiclass(cost, **options)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.u, threaded.u)
    assert torch.equal(alone.gap, threaded.gap)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limited", [False, True])
def test_the_graph_on_the_gpu_finds_what_the_cpu_finds(limited: bool) -> None:
    cost, wanted = blobs(0, 3, 3, 30, 36), optional(limited, shares(1, 3, 3))
    options = {"smoothness": 0.2, "strength": 5.0, "max_iterations": 110, "tolerance": 0.0}
    one = segment_multiclass(cost, proportions=wanted, **options)
    other = segment_multiclass(cost.cuda(), proportions=None if wanted is None else wanted.cuda(), **options)
    torch.testing.assert_close(other.u.cpu(), one.u, rtol=0, atol=1e-9)
    torch.testing.assert_close(other.energy.cpu(), one.energy)
    assert other.iterations == one.iterations == 110


@pytest.mark.parametrize("iterations", [1, 7, 25, 30])
def test_iterations_are_counted(iterations: int) -> None:
    found = segment_multiclass(noise(0, 2, 3, 6, 7), smoothness=0.3, max_iterations=iterations, tolerance=0.0)
    assert found.iterations == iterations


def test_more_iterations_are_never_worse() -> None:
    """Neither the energy nor the bound below it, though both of the iterates go up and down."""
    options = {"smoothness": 0.1, "proportions": shares(1, 2, 4), "strength": 20.0, "tolerance": 0.0}
    runs = [segment_multiclass(noise(0, 2, 4, 6, 6), **options, max_iterations=25 * each) for each in range(1, 16)]
    energy, gap = (torch.stack([each[field] for each in runs]) for field in (1, 2))
    assert (energy.diff(dim=0) <= 1e-12).all()
    assert ((energy - gap).diff(dim=0) >= -1e-12).all()


def test_no_images_no_segmentations() -> None:
    found = segment_multiclass(torch.zeros(0, 3, 4, 5), smoothness=0.1)
    assert found.u.shape == (0, 3, 4, 5)
    assert found.energy.shape == found.gap.shape == (0,)


def test_input_is_left_alone_and_types_are_kept() -> None:
    for given_type, computed in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        cost = noise(0, 1, 3, 5, 6).to(given_type).requires_grad_()
        w, wanted = noise(1, 1, 5, 6), shares(1, 1, 3)
        kept = [each.detach().clone() for each in (cost, w, wanted)]
        found = segment_multiclass(cost, smoothness=0.1, edge_weight=w, weights=w, proportions=wanted, strength=1.0)
        for each, before in zip((cost, w, wanted), kept, strict=True):
            assert torch.equal(each, before)
        assert {each.dtype for each in found[:3]} == {computed}
        assert not any(each.requires_grad for each in found[:3])


def projected(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows (M,K) on the simplex: the threshold by bisection."""
    low, high = values.min(1, keepdims=True) - 1, values.max(1, keepdims=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = np.maximum(values - middle, 0).sum(1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(values - (low + high) / 2, 0)


@precisions
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 30.0])
def test_projection_by_bisection(scale: float, dtype: torch.dtype) -> None:
    for classes in range(1, 9):
        values = (scale * torch.from_numpy(np.random.default_rng(classes).normal(size=(50, classes)))).to(dtype)
        found = project_simplex(values)
        assert found.dtype == dtype
        within = 1e-12 if dtype == torch.float64 else 1e-6 * max(1.0, scale)
        np.testing.assert_allclose(found, projected(values.double().numpy()), rtol=0, atol=within)


def test_projection_is_along_the_classes() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 3, 5)))
    flat = values.movedim(1, 3).reshape(-1, 4)
    found = project_simplex(values).movedim(1, 3).reshape(-1, 4)
    torch.testing.assert_close(found, project_simplex(flat), rtol=0, atol=0)


@settings(max_examples=100)
@given(
    values=st.lists(st.lists(st.floats(-100, 100), min_size=4, max_size=4), min_size=1, max_size=6),
    shift=st.floats(-100, 100),
)
def test_projection_is_the_nearest_point_of_the_simplex(values: list[list[float]], shift: float) -> None:
    rows = torch.tensor(values, dtype=torch.float64)
    found = project_simplex(rows)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(project_simplex(found), found, rtol=0, atol=1e-13)
    torch.testing.assert_close(project_simplex(rows + shift), found, rtol=0, atol=1e-12)
    order = rows.argsort(1)
    assert (found.gather(1, order).diff(dim=1) >= 0).all()
    # the angle to every corner is obtuse, so that none is nearer
    corners = torch.eye(4, dtype=torch.float64)[None] - found[:, None]
    assert (corners @ (rows - found)[:, :, None] <= 1e-9).all()


def test_large_values_are_projected() -> None:
    torch.testing.assert_close(project_simplex(torch.tensor([[1e8, 0.0]])), torch.tensor([[1.0, 0.0]]))


def test_large_equal_values_are_projected() -> None:
    torch.testing.assert_close(project_simplex(torch.full((1, 5), 1e6)), torch.full((1, 5), 0.2))


COST, HALVES = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.full((2, 2), 0.5)
NAN, INFINITY = float("nan"), float("inf")


def segment(cost: Tensor = COST, smoothness: float = 0.1, **options: Any) -> MultiClass:
    return segment_multiclass(cost, smoothness=smoothness, **options)


BAD = {
    "three axes": (lambda: segment(COST[0]), r"cost of shape \(2, 4, 5\)"),
    "cost nan": (lambda: segment(COST * NAN), "cost.*finite"),
    "infinite cost": (lambda: segment(COST / 0), "cost.*finite"),
    "smoothness": (lambda: segment(smoothness=-0.1), "smoothness -0.1"),
    "smoothness nan": (lambda: segment(smoothness=NAN), "smoothness nan"),
    "infinite smoothness": (lambda: segment(smoothness=INFINITY), "smoothness inf"),
    "strength": (lambda: segment(proportions=HALVES, strength=-1.0), "strength -1"),
    "strength nan": (lambda: segment(proportions=HALVES, strength=NAN), "strength nan"),
    "strength without proportions": (lambda: segment(strength=-1.0), "strength -1"),
    "proportions": (lambda: segment(proportions=torch.ones(2, 3) / 3), r"proportions of shape \(2, 3\)"),
    "one row of proportions": (lambda: segment(proportions=HALVES[:1]), r"proportions of shape \(1, 2\)"),
    "weights": (lambda: segment(weights=torch.ones(2, 5, 4)), r"weights of shape \(2, 5, 4\)"),
    "weights of a class": (lambda: segment(weights=torch.ones(2, 1, 4, 5)), "weights of shape"),
    "negative weights": (lambda: segment(weights=-torch.ones(2, 4, 5)), "weights.*at least 0"),
    "weights nan": (lambda: segment(weights=torch.full((2, 4, 5), NAN)), "weights.*finite"),
    "edge weight": (lambda: segment(edge_weight=torch.ones(1, 4, 5)), r"edge_weight of shape \(1, 4, 5\)"),
    "negative edge weight": (lambda: segment(edge_weight=-torch.ones(2, 4, 5)), "edge_weight.*at least 0"),
    "infinite edge weight": (lambda: segment(edge_weight=torch.ones(2, 4, 5) / 0), "edge_weight.*finite"),
    "iterations": (lambda: segment(max_iterations=0), "max_iterations 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_one_line(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(InputError, match=words) as error:
        call()
    assert error.value.subject
    assert error.value.rule
    assert error.value.fix
    assert "\n" not in str(error.value)


def test_proportions_that_are_nan_are_said() -> None:
    with pytest.raises(InputError, match="proportions"):
        segment(proportions=torch.full((2, 2), NAN), strength=1.0)
