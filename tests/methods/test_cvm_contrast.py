"""Correlation and contrast maps against the equations, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.methods.cvm import contrast, contrast_maps
from tissuehint.methods.cvm.contrast import correlation_maps, unit_range

Array = NDArray[np.float64]


def random_features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(one: Array, other: Array) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def contrast_by_loops(features: Array, targets: Array, others: Array, eta: float) -> Array:
    """Eq. 4 and 5 as they are printed."""
    _, height, width = features.shape

    def similarity(point: Array) -> Array:
        vector = features[:, point[0], point[1]]
        return np.array([[cosine(vector, features[:, i, j]) for j in range(width)] for i in range(height)])

    result = np.zeros((len(targets), height, width))
    for number, target in enumerate(targets):
        for other in others:
            plain = np.maximum(similarity(target) - eta * similarity(other), 0) ** 2
            result[number] += (plain - plain.min()) / (plain.max() - plain.min())
    return result / len(others)


TARGETS, OTHERS = torch.tensor([[0, 0], [3, 6], [2, 2]]), torch.tensor([[4, 1], [0, 6]])


@pytest.mark.parametrize("eta", [0, 0.3, 0.6, 0.9, 1])
def test_equals_the_printed_equations(eta: float) -> None:
    features = random_features(4, 5, 7)
    expected = contrast_by_loops(features.numpy(), TARGETS.numpy(), OTHERS.numpy(), eta)
    found = contrast_maps(features, TARGETS, OTHERS, eta)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_eta_is_six_tenths_unless_said_otherwise() -> None:
    features = random_features(3, 6, 4)
    points = torch.tensor([[1, 1]]), torch.tensor([[4, 2]])
    assert torch.equal(contrast_maps(features, *points), contrast_maps(features, *points, 0.6))


def test_correlation_is_the_cosine() -> None:
    features = random_features(6, 4, 3)
    found = correlation_maps(features, torch.tensor([[2, 1]]))[0]
    expected = [[cosine(features[:, 2, 1].numpy(), features[:, i, j].numpy()) for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert found[2, 1] == pytest.approx(1)


def test_nothing_is_changed_in_place_and_a_second_call_says_the_same() -> None:
    features, targets, others = random_features(4, 5, 7), TARGETS.clone(), OTHERS.clone()
    kept = features.clone()
    first = contrast_maps(features, targets, others)
    assert torch.equal(contrast_maps(features, targets, others), first)
    assert torch.equal(features, kept)
    assert torch.equal(targets, TARGETS)
    assert torch.equal(others, OTHERS)


def test_each_target_is_alone_what_it_is_among_others() -> None:
    """In the released code eta becomes eta^n for the n-th point."""
    features = random_features(4, 5, 7)
    alone = torch.cat([contrast_maps(features, target[None], OTHERS) for target in TARGETS])
    torch.testing.assert_close(contrast_maps(features, TARGETS, OTHERS), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_features_have_no_contrast(value: float) -> None:
    found = contrast_maps(torch.full((4, 5, 7), value), TARGETS, OTHERS)
    assert torch.equal(found, torch.zeros(3, 5, 7))


def test_pairs_of_equal_features_add_nothing_to_the_mean_of_the_others() -> None:
    features = torch.zeros(2, 4, 6)
    features[0, :, :3], features[1, :, 3:] = 1, 1
    found = contrast_maps(features, torch.tensor([[0, 0]]), torch.tensor([[3, 5], [3, 0]]), eta=1)[0]
    # the second pair has S_p = S_q everywhere: its map is 0, and it counts in the mean
    np.testing.assert_allclose(found.numpy(), np.repeat([[0.5, 0.5, 0.5, 0, 0, 0]], 4, 0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_vectors_are_no_nan_in_any_precision(dtype: torch.dtype) -> None:
    features = random_features(4, 5, 7).to(dtype)
    features[:, :2] = 0
    found = contrast_maps(features, torch.tensor([[3, 6]]), torch.tensor([[4, 1]]))
    assert bool(found.isfinite().all())
    assert float(found.max()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found[0, 0].numpy(), found[0, 1].numpy())
    assert bool((correlation_maps(features, torch.tensor([[0, 0]])) == 0).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_points_of_any_integer_type(dtype: torch.dtype) -> None:
    features, target, other = random_features(3, 40, 41), torch.tensor([[20, 30]]), torch.tensor([[39, 40]])
    expected = contrast_maps(features, target, other)
    assert torch.equal(contrast_maps(features, target.to(dtype), other.to(dtype)), expected)


def test_blocks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_features(4, 9, 8)
    targets, others = torch.tensor([[i, j] for i in range(9) for j in range(4)]), torch.tensor([[8, 7], [0, 6], [4, 5]])
    whole = contrast_maps(features, targets, others)
    for block in (1, 9 * 8 * 3, 5 * 9 * 8 * 3 + 1):
        monkeypatch.setattr(contrast, "BLOCK", block)
        torch.testing.assert_close(contrast_maps(features, targets, others), whole, rtol=0, atol=1e-14)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    height, width = draw(st.integers(1, 7)), draw(st.integers(2, 7))
    places = draw(st.permutations([(i, j) for i in range(height) for j in range(width)]))
    count = draw(st.integers(1, min(4, len(places) - 1)))
    others = draw(st.integers(1, min(4, len(places) - count)))
    features = random_features(draw(st.integers(1, 5)), height, width, seed=draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        features = features.round().relu()  # zero vectors and equal vectors
    points = torch.tensor(places)
    return features, points[:count], points[count : count + others], draw(st.floats(0, 1))


@settings(max_examples=60)
@given(problems())
def test_values_lie_in_unit_range(problem: tuple[Tensor, Tensor, Tensor, float]) -> None:
    found = contrast_maps(*problem)
    assert found.shape == (len(problem[1]), *problem[0].shape[1:])
    assert bool(((found >= 0) & (found <= 1)).all())


@settings(max_examples=60)
@given(problems(), st.sampled_from([(1,), (2,), (1, 2)]))
def test_flips_and_transposition_move_the_maps_along(
    problem: tuple[Tensor, Tensor, Tensor, float], axes: tuple[int, ...]
) -> None:
    features, targets, others, eta = problem
    plain = contrast_maps(features, targets, others, eta)

    def mirrored(points: Tensor) -> Tensor:
        moved = points.clone()
        for axis in axes:
            moved[:, axis - 1] = features.shape[axis] - 1 - moved[:, axis - 1]
        return moved

    flipped = contrast_maps(features.flip(axes), mirrored(targets), mirrored(others), eta)
    torch.testing.assert_close(flipped.flip(axes), plain, rtol=0, atol=1e-6)
    turned = contrast_maps(features.mT, targets.flip(1), others.flip(1), eta)
    torch.testing.assert_close(turned.mT, plain, rtol=0, atol=1e-6)


@settings(max_examples=30)
@given(problems(), st.floats(0.01, 100))
def test_length_of_features_and_order_of_others_do_not_matter(
    problem: tuple[Tensor, Tensor, Tensor, float], factor: float
) -> None:
    features, targets, others, eta = problem
    found = contrast_maps(features * factor, targets, others.flip(0), eta)
    torch.testing.assert_close(found, contrast_maps(features, targets, others, eta), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": torch.full((4, 5, 7), torch.nan)}, "NaN"),
        ({"features": torch.full((4, 5, 7), torch.inf)}, "infinite"),
        ({"features": torch.rand(1, 4, 5, 7)}, "C,H,W"),
        ({"features": torch.ones(4, 5, 7, dtype=torch.int64)}, "float"),
        ({"targets": torch.zeros((0, 2), dtype=torch.int64)}, "in-target points: are missing"),
        ({"others": torch.zeros((0, 2), dtype=torch.int64)}, "out-of-target points: are missing"),
        ({"targets": torch.tensor([[5, 0]])}, "point (5, 0): is outside the map of 5 x 7"),
        ({"targets": torch.tensor([[0, 0], [0, 7]])}, "point (0, 7): is outside"),
        ({"others": torch.tensor([[-1, 3]])}, "point (-1, 3): is outside"),
        ({"others": torch.tensor([[0.5, 3.0]])}, "integer"),
        ({"others": torch.tensor([[0, 3, 1]])}, "(P,2)"),
        ({"others": torch.tensor([[4, 1], [3, 6]])}, "point (3, 6): is both in and out of the target"),
        ({"eta": -0.1}, "eta -0.1: is not in 0..1"),
        ({"eta": 1.5}, "eta 1.5: is not in 0..1"),
        ({"eta": float("nan")}, "eta nan: is not in 0..1"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, object], words: str) -> None:
    arguments = {"features": random_features(4, 5, 7), "targets": TARGETS, "others": OTHERS, "eta": 0.6, **change}
    with pytest.raises(InputError) as caught:
        contrast_maps(**arguments)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unit_range_scales_each_map_for_itself() -> None:
    maps = torch.stack([torch.arange(6.0).view(2, 3), 5 - 10 * torch.arange(6.0).view(2, 3), torch.full((2, 3), 7.0)])
    found = unit_range(maps[None])
    expected = torch.arange(6.0).view(2, 3) / 5
    torch.testing.assert_close(found, torch.stack([expected, 1 - expected, torch.zeros(2, 3)])[None])
