"""The two-phase model: energy against numpy, the solvers against each other, brute force and symmetry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from tissuehint.errors import InputError
from tissuehint.ops.variational import edge_weight, segment_two_phase, two_phase_energy
from tissuehint.ops.variational_aos import diffusivity, solve_lines
from tissuehint.ops.variational_fused import primal_dual_fused
from tissuehint.ops.variational_model import closed_form_means, start, start_means
from tissuehint.ops.variational_primal_dual import primal_dual_torch

SOLVERS = ("primal_dual", "aos")
ODD_SIZES = [(1, 9), (9, 1), (1, 1), (2, 2), (7, 5), (5, 16)]


def blobs(count: int, height: int, width: int, noise: float = 0.05, seed: int = 0) -> torch.Tensor:
    """Bright smooth blobs on a dark ground with noise, in [0, 1]: (N,H,W) float64."""
    draw = np.random.default_rng(seed)
    maps = []
    for _ in range(count):
        field = gaussian_filter(draw.normal(size=(height, width)), min(height, width) / 8)
        field = (field - field.min()) / np.ptp(field)
        z = 1 / (1 + np.exp(-20 * (field - 0.6))) + noise * draw.normal(size=field.shape)
        maps.append((z - z.min()) / np.ptp(z))
    return torch.from_numpy(np.stack(maps))


def noise_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy_energy(u: NDArray[np.float64], z: NDArray[np.float64], c: NDArray[np.float64], lam: float, g) -> float:
    """The equation, pixel by pixel."""
    r = (z - c[0]) ** 2 - (z - c[1]) ** 2
    r = r / np.abs(r).max() if np.abs(r).max() > 1e-12 else 0 * r
    total = 0.0
    for i, j in np.ndindex(z.shape):
        down = u[i + 1, j] - u[i, j] if i + 1 < z.shape[0] else 0.0
        right = u[i, j + 1] - u[i, j] if j + 1 < z.shape[1] else 0.0
        total += g[i, j] * np.sqrt(down**2 + right**2) + lam * r[i, j] * u[i, j]
    return total


@pytest.mark.parametrize("size", [*ODD_SIZES, (11, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_is_the_equation(size: tuple[int, int], dtype: torch.dtype) -> None:
    u, z, g = (noise_maps(seed, 3, *size).to(dtype) for seed in range(3))
    means = noise_maps(3, 3, 2).to(dtype)
    found = two_phase_energy(u, z, means, data_weight=2.5, edge_weight=g)
    expected = [
        numpy_energy(*(each[n].double().numpy() for each in (u, z, means)), 2.5, g[n].numpy()) for n in range(3)
    ]
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_energy_of_equal_means_is_the_boundary_alone() -> None:
    u, z, g = (noise_maps(seed, 1, 4, 5) for seed in range(3))
    found = two_phase_energy(u, z, torch.full((1, 2), 0.4), data_weight=9.0, edge_weight=g)
    np.testing.assert_allclose(found, two_phase_energy(u, z, torch.rand(1, 2), data_weight=0.0, edge_weight=g))


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.3])
@pytest.mark.parametrize("size", [(1, 9), (3, 4), (17, 12)])
def test_edge_weight_is_the_equation(size: tuple[int, int], sigma: float) -> None:
    z = noise_maps(0, 2, *size)
    for n in range(2):
        even = gaussian_filter(z[n].numpy(), sigma, mode="nearest") if sigma else z[n].numpy()
        squares = sum(np.gradient(even, axis=axis) ** 2 for axis in (0, 1) if size[axis] > 1)
        np.testing.assert_allclose(edge_weight(z, 7.0, sigma)[n], 1 / (1 + 7 * squares), rtol=1e-10)


def test_edge_weight_turns_with_the_map() -> None:
    z = noise_maps(1, 2, 9, 14)
    for turn in (lambda x: x.flip(1), lambda x: x.flip(2), lambda x: x.transpose(1, 2)):
        torch.testing.assert_close(edge_weight(turn(z)), turn(edge_weight(z)), rtol=1e-12, atol=0)
    assert (edge_weight(torch.full((1, 5, 6), 0.3)) == 1).all()


@pytest.mark.parametrize("free", [True, False])
def test_gap_is_reached_and_bounds_the_energy(free: bool) -> None:
    z = blobs(4, 32, 45)
    means = None if free else torch.tensor([[0.9, 0.1]]).repeat(4, 1)
    rough = segment_two_phase(z, means=means)
    assert (rough.gap >= 0).all()
    assert (rough.gap <= 1e-3 * rough.energy.abs().clamp(min=1)).all()
    fine = segment_two_phase(z, means=rough.means, tolerance=1e-6, max_iterations=20000)
    assert (fine.gap <= 1e-6 * fine.energy.abs().clamp(min=1)).all()
    assert (rough.energy - rough.gap <= fine.energy + 1e-9).all()
    assert (rough.energy >= fine.energy - fine.gap - 1e-9).all()
    weight = edge_weight(z)
    torch.testing.assert_close(
        rough.energy, two_phase_energy(rough.u, z, rough.means, data_weight=3.0, edge_weight=weight)
    )


def test_means_are_those_of_u() -> None:
    z = blobs(3, 40, 33)
    for solver, within in (("primal_dual", 4e-4), ("aos", 4e-3)):
        found = segment_two_phase(z, solver=solver)
        torch.testing.assert_close(found.means, closed_form_means(found.u, z, found.means), rtol=0, atol=within)


def test_closed_form_means_minimise_the_unscaled_data_term() -> None:
    u, z = noise_maps(0, 1, 6, 7), noise_maps(1, 1, 6, 7)
    best = closed_form_means(u, z, torch.zeros(1, 2))

    def cost(c: torch.Tensor) -> float:
        return float((u * (z - c[0, 0]) ** 2 + (1 - u) * (z - c[0, 1]) ** 2).sum())

    for move in itertools.product((-0.01, 0, 0.01), repeat=2):
        assert cost(best) <= cost(best + torch.tensor([move])) + 1e-12


def test_primal_dual_lies_below_aos_and_their_masks_agree() -> None:
    z = blobs(3, 48, 64, noise=0.02)
    means = segment_two_phase(z).means
    exact = segment_two_phase(z, means=means, tolerance=1e-4)
    split = segment_two_phase(z, means=means, solver="aos", max_iterations=800)
    assert (exact.energy <= split.energy + 1e-3 * split.energy.abs()).all()
    assert split.gap.isnan().all()
    weight = edge_weight(z)
    masks = [
        two_phase_energy((each.u > 0.5).double(), z, means, data_weight=3.0, edge_weight=weight)
        for each in (exact, split)
    ]
    # aos measures the boundary at half points, so its mask is the best one of a slightly different length
    torch.testing.assert_close(masks[0], masks[1], rtol=1e-2, atol=0)
    assert ((exact.u > 0.5) == (split.u > 0.5)).double().mean() > 0.99


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_over_all_masks(seed: int) -> None:
    z = noise_maps(seed, 1, 3, 4)
    means = torch.tensor([[0.8, 0.2]], dtype=torch.float64)
    found = segment_two_phase(z, means=means, data_weight=1.5, tolerance=1e-7, max_iterations=50000)
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)), dtype=torch.float64).reshape(-1, 3, 4)
    weight, many = edge_weight(z).expand(4096, 3, 4), z.expand(4096, 3, 4)
    energies = two_phase_energy(masks, many, means.expand(4096, 2), data_weight=1.5, edge_weight=weight)
    mask = (found.u > 0.5).double()
    reached = two_phase_energy(mask, z, means, data_weight=1.5, edge_weight=weight[:1])
    assert found.energy <= energies.min() + 1e-6  # the relaxation never costs more
    # no exact coarea formula for the isotropic discrete length: the mask may miss the best one by a corner's length
    assert reached <= energies.min() + 2 - np.sqrt(2)


def test_brute_force_on_a_line_is_exact() -> None:
    """In one dimension the coarea formula holds, so the mask is a global minimiser."""
    z = noise_maps(5, 3, 1, 11)
    means = torch.tensor([[0.7, 0.3]], dtype=torch.float64).repeat(3, 1)
    found = segment_two_phase(z, means=means, data_weight=1.3, tolerance=1e-9, max_iterations=100000)
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=11)), dtype=torch.float64)[:, None]
    weight = edge_weight(z)
    for n in range(3):
        many = (z[n].expand(2048, 1, 11), means[:1].expand(2048, 2))
        energies = two_phase_energy(masks, *many, data_weight=1.3, edge_weight=weight[n].expand(2048, 1, 11))
        mask = (found.u > 0.5).double()
        reached = two_phase_energy(mask, z, means, data_weight=1.3, edge_weight=weight)[n]
        assert abs(float(reached - energies.min())) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_transposed_maps_give_transposed_segmentations(solver: str) -> None:
    z = blobs(2, 21, 30)
    one, other = segment_two_phase(z, solver=solver), segment_two_phase(z.transpose(1, 2), solver=solver)
    torch.testing.assert_close(one.u, other.u.transpose(1, 2), rtol=0, atol=1e-8)
    torch.testing.assert_close(one.energy, other.energy)


@pytest.mark.parametrize("axis", [1, 2])
def test_flipped_maps_give_nearly_flipped_segmentations(axis: int) -> None:
    """Forward differences change with a flip, so the boundary may move by a pixel here and there."""
    z = blobs(2, 40, 50)
    means = segment_two_phase(z).means
    one, other = segment_two_phase(z, means=means), segment_two_phase(z.flip(axis), means=means)
    torch.testing.assert_close(one.energy, other.energy, rtol=0.01, atol=0)
    assert ((one.u > 0.5) == (other.u.flip(axis) > 0.5)).double().mean() > 0.99
    split = [segment_two_phase(each, means=means, solver="aos").u for each in (z, z.flip(axis))]
    torch.testing.assert_close(split[0], split[1].flip(axis), rtol=0, atol=1e-8)  # half points are symmetric


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_does_not_know_its_batch(solver: str) -> None:
    z = torch.cat((blobs(2, 18, 23), noise_maps(0, 1, 18, 23), torch.zeros(1, 18, 23, dtype=torch.float64)))
    together = segment_two_phase(z, solver=solver)
    for n in range(4):
        alone = segment_two_phase(z[n : n + 1], solver=solver)
        torch.testing.assert_close(together.u[n], alone.u[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.means[n], alone.means[0])


@pytest.mark.parametrize("size", [*ODD_SIZES, (32, 41)])
@pytest.mark.parametrize("free", [True, False])
def test_fused_kernels_are_plain_torch(size: tuple[int, int], free: bool) -> None:
    z = noise_maps(0, 2, *size) if min(size) < 8 else blobs(2, *size)
    weight, u = edge_weight(z), start(z)
    means = start_means(u, z) if free else torch.tensor([[0.7, 0.2]], dtype=z.dtype).repeat(2, 1)
    options = {"data_weight": 3.0, "free_means": free, "max_iterations": 203, "tolerance": 1e-5}
    plain = primal_dual_torch(z, weight, u.clone(), means, **options)
    fused = primal_dual_fused(z, weight, u.clone(), means, **options)
    torch.testing.assert_close(fused.u, plain.u, rtol=0, atol=1e-9)
    torch.testing.assert_close(fused.means, plain.means, rtol=0, atol=1e-9)
    torch.testing.assert_close(fused.gap, plain.gap, rtol=1e-6, atol=1e-8)
    assert fused.iterations.tolist() == plain.iterations.tolist()


def test_threads_change_nothing() -> None:
    z, before = blobs(5, 20, 24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = segment_two_phase(z)
        torch.set_num_threads(3)
        three = segment_two_phase(z)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.u, three.u)
    assert one.iterations == three.iterations


@pytest.mark.parametrize("length", [1, 2, 9])
def test_lines_are_solved_as_dense_systems(length: int) -> None:
    weight, u = noise_maps(0, 1, length, 3) + 0.1, noise_maps(1, 1, length, 3)
    scale, right = noise_maps(2, 1, length, 3), noise_maps(3, 1, length, 3)
    between, kept = diffusivity(u, weight), right.clone()
    found = solve_lines(between, scale, right)
    assert torch.equal(right, kept)
    for column in range(3):
        operator = np.zeros((length, length))
        for i, d in enumerate(between[0, :, column].tolist()):
            operator[i : i + 2, i : i + 2] += d * np.array([[-1, 1], [1, -1]])
        system = np.eye(length) - scale[0, :, column].numpy()[:, None] * operator
        np.testing.assert_allclose(found[0, :, column], np.linalg.solve(system, right[0, :, column].numpy()), rtol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(solver: str, size: tuple[int, int]) -> None:
    found = segment_two_phase(noise_maps(0, 2, *size), solver=solver, max_iterations=60)
    assert found.u.shape == (2, *size)
    assert (found.u >= 0).all()
    assert (found.u <= 1).all()
    assert found.energy.isfinite().all()
    assert found.iterations <= 60


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5)])
def test_nothing_in_nothing_out(solver: str, shape: tuple[int, int, int]) -> None:
    found = segment_two_phase(torch.zeros(shape), solver=solver)
    assert found.u.shape == shape
    assert found.means.shape == (shape[0], 2)
    assert found.energy.shape == found.gap.shape == (shape[0],)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_map_stays_background(solver: str, value: float) -> None:
    found = segment_two_phase(torch.full((2, 9, 7), value), solver=solver)
    assert (found.u == 0).all()
    assert (found.energy == 0).all()
    torch.testing.assert_close(found.means, torch.full((2, 2), value))


def test_a_constant_map_with_means_goes_to_the_nearer_one() -> None:
    z = torch.tensor([0.9, 0.1])[:, None, None].expand(2, 6, 5)
    found = segment_two_phase(z, means=torch.tensor([[1.0, 0.0]]).repeat(2, 1))
    torch.testing.assert_close(found.u.mean((1, 2)), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_means_and_no_data_weight_are_background(solver: str) -> None:
    z = noise_maps(0, 1, 6, 6)
    equal = segment_two_phase(z, means=torch.full((1, 2), 0.5), solver=solver)
    for found in (equal, segment_two_phase(z, data_weight=0.0, solver=solver)):
        assert (found.u == 0).all()
        assert not (found.gap > 0).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_u_carries_no_gradient(solver: str) -> None:
    z = blobs(1, 12, 12).requires_grad_()
    found = segment_two_phase(z, solver=solver, max_iterations=20)
    assert not any(each.requires_grad for each in (found.u, found.means, found.energy, found.gap, edge_weight(z)))


def test_input_is_left_alone_and_types_are_kept() -> None:
    for given_type, computed in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        z = blobs(1, 16, 20).to(given_type)
        before = z.clone()
        found = segment_two_phase(z)
        assert torch.equal(z, before)
        assert {each.dtype for each in (found.u, found.means, found.energy, found.gap)} == {computed}


BAD = {
    "nan": (lambda z: segment_two_phase(z * float("nan")), "NaN"),
    "infinity": (lambda z: edge_weight(z / 0), "infinity"),
    "two axes": (lambda z: segment_two_phase(z[0]), "N,H,W"),
    "means": (lambda z: segment_two_phase(z, means=torch.rand(3, 2)), "means"),
    "means nan": (lambda z: segment_two_phase(z, means=torch.full((2, 2), float("nan"))), "means"),
    "data weight": (lambda z: segment_two_phase(z, data_weight=-1.0), "data_weight"),
    "edge factor": (lambda z: segment_two_phase(z, edge_factor=-1.0), "factor"),
    "sigma": (lambda z: edge_weight(z, sigma=-1.0), "sigma"),
    "tolerance": (lambda z: segment_two_phase(z, tolerance=float("nan")), "tolerance"),
    "iterations": (lambda z: segment_two_phase(z, max_iterations=0), "max_iterations"),
    "solver": (lambda z: segment_two_phase(z, solver="newton"), "newton"),
    "u": (lambda z: two_phase_energy(z[:1], z, torch.rand(2, 2), data_weight=1.0, edge_weight=z), "u of shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_one_line(name: str) -> None:
    call, word = BAD[name]
    with pytest.raises(InputError, match=word) as error:
        call(torch.ones(2, 5, 6))
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    weight=st.floats(0, 20),
    scale=st.sampled_from([1e-5, 1.0, 50.0]),
    single=st.booleans(),
)
def test_any_map_gives_a_segmentation_no_worse_than_trivial_ones(
    seed: int, height: int, width: int, weight: float, scale: float, single: bool
) -> None:
    z = (scale * noise_maps(seed, 1, height, width)).to(torch.float32 if single else torch.float64)
    found = segment_two_phase(z, data_weight=weight)
    assert found.u.isfinite().all()
    assert 0 <= float(found.u.min()) <= float(found.u.max()) <= 1
    assert float(found.gap) >= 0
    options = {"data_weight": weight, "edge_weight": edge_weight(z)}
    for trivial in (torch.zeros_like(z), torch.ones_like(z), start(z)):
        bound = two_phase_energy(trivial, z, found.means, **options) + found.gap
        assert float(found.energy - bound) <= 1e-4 * max(1, abs(float(bound)))
