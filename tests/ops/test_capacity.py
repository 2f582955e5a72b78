"""Biases for given areas: the mean assignment, the areas of the argmax, and optimal transport by scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.ops import capacity
from tissuehint.ops.capacity import capacity_bias

precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def smooth_maps(seed: int, batch: int, classes: int, height: int, width: int) -> Tensor:
    """Smooth random maps (B,K,H,W) of mean 0 and deviation 1."""
    draw = np.random.default_rng(seed)
    sigma = max(1.0, min(height, width) / 10)
    maps = [gaussian_filter(draw.normal(size=(height, width)), sigma) for _ in range(batch * classes)]
    return torch.from_numpy(np.stack([(each - each.mean()) / each.std() for each in maps])).view(
        batch, classes, height, width
    )


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def shares(seed: int, batch: int, classes: int, concentration: float = 2.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([concentration] * classes, batch))


def soft_areas(scores: Tensor, q: Tensor, weights: Tensor | None, temperature: float) -> Tensor:
    """Mean of the softmax (B,K), in float64."""
    soft = ((scores.double() + q.double()[:, :, None, None]) / temperature).softmax(1)
    mass = torch.ones_like(soft[:, 0]) if weights is None else weights.double()
    return (soft * mass[:, None]).sum((2, 3)) / mass.sum((1, 2))[:, None]


def winners(scores: Tensor, q: Tensor) -> Tensor:
    """(B,H,W)."""
    return (scores + q[:, :, None, None]).argmax(1)


def areas(scores: Tensor, q: Tensor, weights: Tensor | None = None) -> Tensor:
    """Shares of the winners (B,K)."""
    hard = torch.nn.functional.one_hot(winners(scores, q), scores.shape[1]).movedim(3, 1).double()
    mass = torch.ones_like(hard[:, 0]) if weights is None else weights.double()
    return (hard * mass[:, None]).sum((2, 3)) / mass.sum((1, 2))[:, None]


def centred(q: Tensor) -> Tensor:
    return q - q.mean(1, keepdim=True)


@precisions
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_soft_areas_are_the_proportions(classes: int, temperature: float, weighted: bool, dtype: torch.dtype) -> None:
    scores, wanted = smooth_maps(0, 4, classes, 20, 24).to(dtype), shares(1, 4, classes).to(dtype)
    weights = noise(2, 4, 20, 24).to(dtype) if weighted else None
    q = capacity_bias(scores, wanted, weights, temperature=temperature)
    assert q.dtype == dtype
    assert q.mean(1).abs().max() <= 1e-5
    # in float32 the bias itself is rounded, by a share of the temperature
    within = 1e-6 if dtype == torch.float64 else 1e-6 + 1e-6 / temperature
    torch.testing.assert_close(soft_areas(scores, q, weights, temperature), wanted.double(), rtol=0, atol=within)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 6),
    kind=st.sampled_from(["noise", "logarithms", "levels", "heavy tails", "constant", "labels"]),
    temperature=st.sampled_from([1e-3, 0.02, 0.3, 5.0]),
    concentration=st.sampled_from([0.2, 1.0, 5.0]),
    weighted=st.booleans(),
)
def test_any_scores_reach_any_soft_areas(
    seed: int, classes: int, kind: str, temperature: float, concentration: float, weighted: bool
) -> None:
    draw = np.random.default_rng(seed)
    normal = torch.from_numpy(draw.normal(size=(2, classes, 6, 7)))
    scores = {
        "noise": normal,
        "logarithms": (20 * normal).softmax(1).clamp_min(1e-8).log(),
        "levels": normal.round(),
        "heavy tails": normal.pow(5),
        "constant": torch.zeros_like(normal),
        "labels": 30 * (normal == normal.amax(1, keepdim=True)).double(),
    }[kind]
    wanted = shares(seed, 2, classes, concentration).clamp_min(1e-3)
    wanted = wanted / wanted.sum(1, keepdim=True)
    weights = torch.from_numpy(draw.integers(0, 3, (2, 6, 7))) if weighted else None
    q = capacity_bias(scores, wanted, weights, temperature=temperature)
    torch.testing.assert_close(soft_areas(scores, q, weights, temperature), wanted, rtol=0, atol=1e-5)


@precisions
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.01])
def test_winners_have_the_areas(temperature: float, weighted: bool, dtype: torch.dtype) -> None:
    for classes in (2, 5):
        scores = smooth_maps(classes, 6, classes, 64, 48).to(dtype)
        weights = noise(2, 6, 64, 48).to(dtype) if weighted else None
        for concentration in (5.0, 1.0, 0.2):
            wanted = shares(classes, 6, classes, concentration).to(dtype)
            q = capacity_bias(scores, wanted, weights, temperature=temperature)
            torch.testing.assert_close(areas(scores, q, weights), wanted.double(), rtol=0, atol=0.01)


@precisions
@pytest.mark.parametrize("spread", [1e-5, 1e-3, 0.1, 10.0])
def test_winners_of_any_contrast_have_the_areas_within_the_tolerance(spread: float, dtype: torch.dtype) -> None:
    for classes in (2, 5):
        scores, wanted = (
            spread * smooth_maps(classes, 6, classes, 64, 48).to(dtype),
            shares(classes, 6, classes).to(dtype),
        )
        weights = noise(2, 6, 64, 48).to(dtype)
        q = capacity_bias(scores, wanted, weights, tolerance=1e-3)
        torch.testing.assert_close(areas(scores, q, weights), wanted.double(), rtol=0, atol=1.1e-3)
        if spread <= 1e-3:  # which a temperature of .02 alone does not see
            assert (areas(scores, capacity_bias(scores, wanted, weights), weights) - wanted).abs().max() > 0.1


def test_scores_far_from_the_shares_are_annealed_all_the_same() -> None:
    scores = torch.from_numpy(np.random.default_rng(31).normal(0, 3, (60, 3, 20, 20)))
    wanted = shares(31, 60, 3, 0.3)
    q = capacity_bias(scores, wanted, annealing=False)
    torch.testing.assert_close(soft_areas(scores, q, None, 0.02), wanted, rtol=0, atol=1e-3)
    q = capacity_bias(scores, wanted, annealing=False, tolerance=1e-3)
    torch.testing.assert_close(areas(scores, q), wanted, rtol=0, atol=1.01 / 400)  # a pixel


def test_an_image_within_the_tolerance_is_left_as_it_is() -> None:
    scores, wanted = smooth_maps(0, 3, 3, 64, 48), shares(1, 3, 3)
    scores[1] *= 1e-4
    plain, held = capacity_bias(scores, wanted), capacity_bias(scores, wanted, tolerance=0.02)
    assert torch.equal(held[::2], plain[::2])
    assert not torch.equal(held[1], plain[1])
    torch.testing.assert_close(areas(scores, held), wanted, rtol=0, atol=0.02)


def test_equal_scores_end_with_a_tolerance_too() -> None:
    wanted = shares(1, 2, 3)
    q = capacity_bias(torch.zeros(2, 3, 5, 6, dtype=torch.float64), wanted, tolerance=1e-3)
    assert q.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_winners_are_the_best_assignment(seed: int) -> None:
    """24 pixels, each class a fixed number of places: scipy's assignment has the same winners."""
    scores, places = noise(seed, 1, 4, 4, 6), [3, 5, 12, 4]
    q = capacity_bias(scores, torch.tensor([places]) / 24, temperature=1e-5)
    flat = scores[0].flatten(1).T.numpy()
    _, place = linear_sum_assignment(np.repeat(flat, places, axis=1), maximize=True)
    assert winners(scores, q).flatten().tolist() == np.repeat(np.arange(4), places)[place].tolist()


@pytest.mark.parametrize("temperature", [0.03, 1e-4])
def test_soft_assignment_nears_the_best_fractional_one(temperature: float) -> None:
    """With weights pixels must be divided: the score lies below that of the linear program by at most t log K."""
    scores, wanted, weights = noise(0, 1, 3, 4, 5), shares(1, 1, 3), noise(2, 1, 4, 5)
    q = capacity_bias(scores, wanted, weights, temperature=temperature)
    soft = ((scores + q[:, :, None, None]) / temperature).softmax(1)
    mass = (weights / weights.sum()).flatten().numpy()
    reached = float((scores * soft).sum(1).flatten() @ torch.from_numpy(mass))
    each_pixel, each_class = np.tile(np.eye(20), (1, 3)), np.kron(np.eye(3), np.ones(20))
    best = -linprog(
        -(scores[0].flatten(1).numpy() * mass).flatten(),
        A_eq=np.concatenate([each_pixel, each_class * np.tile(mass, 3)]),
        b_eq=np.concatenate([np.ones(20), wanted[0].numpy()]),
    ).fun
    assert best - temperature * np.log(3) - 1e-6 <= reached <= best + 1e-6


@precisions
@pytest.mark.parametrize("lead", [0.0, 100.0])
def test_a_class_without_share_never_wins(lead: float, dtype: torch.dtype) -> None:
    scores = smooth_maps(0, 2, 4, 16, 16).to(dtype)
    scores[:, 2] += lead
    wanted = torch.tensor([[0.5, 0.2, 0, 0.3], [0.0, 0.6, 0.0, 0.4]], dtype=dtype)
    weights = torch.ones(2, 16, 16)
    weights[:, :8] = 0  # neither does it where nothing is weighed
    q = capacity_bias(scores, wanted, weights)
    assert not (winners(scores, q) == 2).any()
    assert not (winners(scores, q)[1] == 0).any()
    present = wanted > 0
    torch.testing.assert_close((q * present).sum(1), torch.zeros(2, dtype=dtype), rtol=0, atol=1e-4)
    # the others are as if it were not there
    few = capacity_bias(scores[:1, [0, 1, 3]], wanted[:1, [0, 1, 3]], weights[:1])
    torch.testing.assert_close(q[:1, [0, 1, 3]], few, rtol=0, atol=1e-4)


@precisions
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_a_single_class_takes_all(classes: int, dtype: torch.dtype) -> None:
    for only in range(classes):
        scores, wanted = noise(only, 1, classes, 5, 6).to(dtype), torch.eye(classes, dtype=dtype)[only : only + 1]
        q = capacity_bias(scores, wanted)
        assert (winners(scores, q) == only).all()
        assert q[0, only] == 0


def test_an_image_without_weight_gets_zeros() -> None:
    scores, wanted, weights = noise(0, 3, 4, 6, 6), shares(1, 3, 4), noise(2, 3, 6, 6)
    wanted[1] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    weights[1] = 0
    q = capacity_bias(scores, wanted, weights)
    assert (q[1] == 0).all()
    rest = capacity_bias(scores[[0, 2]], wanted[[0, 2]], weights[[0, 2]])
    torch.testing.assert_close(q[[0, 2]], rest, rtol=0, atol=1e-9)


@precisions
def test_one_pixel_is_solved_by_logarithms(dtype: torch.dtype) -> None:
    scores, wanted = 3 * noise(0, 3, 4, 1, 1).to(dtype), shares(1, 3, 4).to(dtype)
    for temperature in (0.01, 0.5):
        q = capacity_bias(scores, wanted, temperature=temperature)
        expected = centred(temperature * wanted.log() - scores[:, :, 0, 0])
        torch.testing.assert_close(q, expected, rtol=0, atol=1e-5)


def test_equal_scores_are_divided_by_logarithms() -> None:
    wanted = shares(1, 2, 3)
    q = capacity_bias(torch.full((2, 3, 4, 5), 0.7), wanted, temperature=0.1)
    torch.testing.assert_close(q.double(), centred(0.1 * wanted.log()), rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), moved=st.integers(0, 2))
def test_a_shift_of_a_class_is_taken_back(seed: int, shift: float, moved: int) -> None:
    scores, wanted = noise(seed, 2, 3, 8, 9), shares(seed, 2, 3)
    shifted = scores.clone()
    shifted[:, moved] += shift
    expected = capacity_bias(scores, wanted, temperature=0.1)
    expected[:, moved] -= shift
    torch.testing.assert_close(capacity_bias(shifted, wanted, temperature=0.1), centred(expected), rtol=0, atol=1e-4)


def test_scores_temperature_and_bias_share_a_unit() -> None:
    scores, wanted = noise(0, 2, 3, 8, 8), shares(1, 2, 3)
    plain = capacity_bias(scores, wanted, temperature=0.05)
    for unit in (1e-3, 1e3):
        scaled = capacity_bias(unit * scores, wanted, temperature=unit * 0.05)
        torch.testing.assert_close(scaled / unit, plain, rtol=0, atol=1e-5)


def test_an_image_does_not_know_its_batch() -> None:
    scores, wanted, weights = noise(0, 4, 3, 8, 8), shares(1, 4, 3), noise(2, 4, 8, 8)
    scores[1] *= 1e4
    scores[2] *= 1e-3
    wanted[3] = torch.tensor([0.0, 1.0, 0.0])
    together = capacity_bias(scores, wanted, weights)
    for n in range(4):
        alone = capacity_bias(scores[n : n + 1], wanted[n : n + 1], weights[n : n + 1])
        torch.testing.assert_close(together[n], alone[0], rtol=1e-9, atol=1e-9)


def test_pixels_and_classes_have_no_order() -> None:
    scores, wanted, weights = noise(0, 2, 4, 7, 9), shares(1, 2, 4), noise(2, 2, 7, 9)
    plain = capacity_bias(scores, wanted, weights)
    order = [2, 0, 3, 1]
    moved = capacity_bias(scores[:, order].flip(2).transpose(2, 3), wanted[:, order], weights.flip(1).transpose(1, 2))
    torch.testing.assert_close(moved, plain[:, order], rtol=0, atol=1e-6)


def test_weights_count_as_shares_of_their_sum() -> None:
    scores, wanted, weights = noise(0, 2, 3, 8, 8), shares(1, 2, 3), noise(2, 2, 8, 8)
    plain = capacity_bias(scores, wanted, weights)
    torch.testing.assert_close(capacity_bias(scores, wanted, 1000 * weights), plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        capacity_bias(scores, wanted, torch.full((2, 8, 8), 3.0)), capacity_bias(scores, wanted), rtol=0, atol=1e-6
    )


def test_pixels_without_weight_are_left_out() -> None:
    scores, wanted = noise(0, 2, 3, 8, 8), shares(1, 2, 3)
    weights = torch.ones(2, 8, 8, dtype=torch.bool)
    weights[:, :, 5:] = False
    expected = capacity_bias(scores[..., :5], wanted)
    torch.testing.assert_close(capacity_bias(scores, wanted, weights), expected, rtol=0, atol=1e-5)


def test_proportions_slightly_off_are_scaled() -> None:
    scores, wanted = noise(0, 2, 3, 8, 8), shares(1, 2, 3)
    torch.testing.assert_close(capacity_bias(scores, 1.0009 * wanted), capacity_bias(scores, wanted), rtol=0, atol=1e-7)


def test_no_images_no_biases() -> None:
    assert capacity_bias(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3)).shape == (0, 3)


def test_input_is_left_alone_and_the_bias_carries_no_gradient() -> None:
    scores, wanted, weights = noise(0, 2, 3, 5, 5).requires_grad_(), shares(1, 2, 3), noise(2, 2, 5, 5)
    wanted[0] = torch.tensor([0.0, 0.4, 0.6])
    kept = [each.detach().clone() for each in (scores, wanted, weights)]
    assert not capacity_bias(scores, wanted, weights).requires_grad
    for each, before in zip((scores, wanted, weights), kept, strict=True):
        assert torch.equal(each, before)


def test_mixed_precision_does_not_reach_it() -> None:
    scores, wanted = noise(0, 2, 3, 8, 8).float(), shares(1, 2, 3).float()
    expected = capacity_bias(scores, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(capacity_bias(scores, wanted), expected)


SCORES, HALVES = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.full((2, 2), 0.5)
NAN, INFINITY = float("nan"), float("inf")

BAD = {
    "three axes": (lambda: capacity_bias(SCORES[0], HALVES), r"scores of shape \(2, 4, 5\)"),
    "other classes": (lambda: capacity_bias(SCORES, torch.ones(2, 3) / 3), r"proportions of shape \(2, 3\)"),
    "other images": (lambda: capacity_bias(SCORES, HALVES[:1]), r"proportions of shape \(1, 2\)"),
    "negative": (lambda: capacity_bias(SCORES, torch.tensor([[1.5, -0.5]] * 2)), "proportions"),
    "sum": (lambda: capacity_bias(SCORES, 0.9 * HALVES), "proportions.*sum to 1"),
    "sum of one": (lambda: capacity_bias(SCORES, torch.tensor([[0.5, 0.5], [0.5, 0.4]])), "proportions.*sum to 1"),
    "percent": (lambda: capacity_bias(SCORES, 100 * HALVES), "proportions.*sum to 1"),
    "infinite share": (lambda: capacity_bias(SCORES, torch.tensor([[INFINITY, 0.5]] * 2)), "proportions"),
    "weights": (lambda: capacity_bias(SCORES, HALVES, torch.ones(2, 5, 4)), r"weights of shape \(2, 5, 4\)"),
    "weights of a class": (lambda: capacity_bias(SCORES, HALVES, torch.ones(2, 1, 4, 5)), "weights of shape"),
    "negative weight": (lambda: capacity_bias(SCORES, HALVES, -torch.ones(2, 4, 5)), "weights.*at least 0"),
    "temperature 0": (lambda: capacity_bias(SCORES, HALVES, temperature=0.0), "temperature 0"),
    "negative temperature": (lambda: capacity_bias(SCORES, HALVES, temperature=-1.0), "temperature -1"),
    "temperature nan": (lambda: capacity_bias(SCORES, HALVES, temperature=NAN), "temperature nan"),
    "negative tolerance": (lambda: capacity_bias(SCORES, HALVES, tolerance=-0.1), "tolerance -0.1"),
    "tolerance nan": (lambda: capacity_bias(SCORES, HALVES, tolerance=NAN), "tolerance nan"),
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


NOT_SEEN = {
    "proportions nan": (lambda: capacity_bias(SCORES, HALVES * NAN), "proportions"),
    "weights nan": (lambda: capacity_bias(SCORES, HALVES, torch.full((2, 4, 5), NAN)), "weights"),
    "infinite weights": (lambda: capacity_bias(SCORES, HALVES, torch.full((2, 4, 5), INFINITY)), "weights"),
    "infinite temperature": (lambda: capacity_bias(SCORES, HALVES, temperature=INFINITY), "temperature"),
}


@pytest.mark.parametrize("name", NOT_SEEN)
def test_numbers_that_are_none_are_said(name: str) -> None:
    call, words = NOT_SEEN[name]
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("value", [NAN, -INFINITY])
def test_scores_that_are_not_finite_are_said(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    newton, calls = capacity._newton, iter(range(1000))

    def counted(*args: Tensor) -> Tensor:
        assert next(calls, None) is not None, "it would go on for ever"
        return newton(*args)

    monkeypatch.setattr(capacity, "_newton", counted)
    scores = SCORES.clone()
    scores[1, 0, 2, 3] = value
    with pytest.raises(InputError, match="scores"):
        capacity_bias(scores, HALVES)
