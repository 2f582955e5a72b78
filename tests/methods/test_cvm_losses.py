"""Losses of CVM against scipy, scikit-learn and the equations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from sklearn.metrics import log_loss
from torch import Tensor

from tissuehint.methods.cvm.losses import (
    certainty,
    grid_points,
    hard_cross_entropy,
    partial_cross_entropy,
    weighted_kl,
)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def cells_by_hand(rows: list[list[int]], covered: tuple[int, int], grid: tuple[int, int]) -> list[list[int]]:
    """Cell of the centre of each pixel in exact numbers, without cells of two classes."""
    found: dict[tuple[int, ...], set[int]] = {}
    for *place, label in rows:
        exact = ((Fraction(2 * p + 1, 2) * g / c) for p, c, g in zip(place, covered, grid, strict=True))
        cell = tuple(min(math.floor(each), g - 1) for each, g in zip(exact, grid, strict=True))
        found.setdefault(cell, set()).add(label)
    return sorted([*cell, *labels] for cell, labels in found.items() if len(labels) == 1)


@st.composite
def pointed_grids(draw: st.DrawFn) -> tuple[list[list[int]], tuple[int, int], tuple[int, int]]:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    covered = (height + draw(st.integers(0, 15)), width + draw(st.integers(0, 15)))
    grid = (draw(st.integers(1, 45)), draw(st.integers(1, 45)))
    point = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1), st.integers(0, 2)).map(list)
    return draw(st.lists(point, max_size=12)), covered, grid


class TestGridPoints:
    @settings(max_examples=150)
    @given(pointed_grids())
    def test_cell_of_the_centre_of_each_pixel(
        self, problem: tuple[list[list[int]], tuple[int, int], tuple[int, int]]
    ) -> None:
        rows, covered, grid = problem
        found = grid_points(torch.tensor(rows, dtype=torch.int64).view(-1, 3), covered, grid)
        assert found.dtype == torch.int64
        assert found.tolist() == cells_by_hand(rows, covered, grid)

    def test_a_cell_with_two_classes_is_left_out(self) -> None:
        points = torch.tensor([[0, 0, 1], [1, 1, 0], [3, 3, 1], [2, 2, 1], [0, 7, 0]])
        assert grid_points(points, (4, 8), (2, 4)).tolist() == [[0, 3, 0], [1, 1, 1]]

    def test_a_grid_that_covers_more_than_the_image_keeps_its_scale(self) -> None:
        # 65 pixels under 17 cells of stride 4, which cover 68
        points = torch.tensor([[64, 63, 0], [3, 4, 1]])
        assert grid_points(points, (68, 68), (17, 17)).tolist() == [[0, 1, 1], [16, 15, 0]]

    def test_same_grid_changes_nothing(self) -> None:
        points = torch.tensor([[4, 2, 1], [0, 6, 0]])
        assert grid_points(points, (5, 7), (5, 7)).tolist() == [[0, 6, 0], [4, 2, 1]]


class TestPartialCrossEntropy:
    def test_equals_log_loss_of_scikit_learn(self) -> None:
        logits = random_logits(2, 3, 5, 4)
        points = [torch.tensor([[0, 0, 2], [4, 3, 0], [2, 1, 1]]), torch.tensor([[1, 3, 0]])]
        expected = []
        for image, rows in zip(logits.softmax(1).numpy(), points, strict=True):
            row, column, label = rows.numpy().T
            expected.append(log_loss(label, image[:, row, column].T, labels=[0, 1, 2]))
        found = partial_cross_entropy(logits.log_softmax(1), points)
        assert found.item() == pytest.approx(np.mean(expected), rel=1e-12)

    def test_radius_labels_squares_cut_at_the_border(self) -> None:
        log_probabilities = random_logits(1, 2, 6, 7).log_softmax(1)
        found = partial_cross_entropy(log_probabilities, [torch.tensor([[0, 6, 1], [3, 2, 0]])], radius=1)
        corner, middle = log_probabilities[0, 1, :2, 5:], log_probabilities[0, 0, 2:5, 1:4]
        assert found.item() == pytest.approx(-(corner.sum() + middle.sum()).item() / 13, rel=1e-12)

    def test_images_without_point_do_not_count(self) -> None:
        log_probabilities = random_logits(2, 2, 4, 4).log_softmax(1)
        rows, none = torch.tensor([[1, 1, 0]]), torch.zeros((0, 3), dtype=torch.int64)
        alone = partial_cross_entropy(log_probabilities[:1], [rows])
        assert partial_cross_entropy(log_probabilities, [rows, none]).item() == pytest.approx(alone.item())

    @pytest.mark.parametrize("radius", [0, 2])
    def test_without_any_point_it_is_zero_with_zero_gradient(self, radius: int) -> None:
        logits = random_logits(2, 2, 4, 4).requires_grad_()
        loss = partial_cross_entropy(logits.log_softmax(1), [torch.zeros((0, 3), dtype=torch.int64)] * 2, radius)
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()

    def test_a_point_outside_labels_nothing(self) -> None:
        log_probabilities = random_logits(1, 2, 4, 4).log_softmax(1)
        assert partial_cross_entropy(log_probabilities, [torch.tensor([[9, 9, 0]])], radius=1).item() == 0

    @pytest.mark.parametrize("radius", [0, 1])
    def test_gradient(self, radius: int) -> None:
        points = [torch.tensor([[0, 0, 2], [3, 2, 0]]), torch.tensor([[1, 2, 1]])]
        logits = random_logits(2, 3, 4, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: partial_cross_entropy(z.log_softmax(1), points, radius), logits)


class TestCertainty:
    def test_known_values(self) -> None:
        u = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]).T[None, :, None]
        torch.testing.assert_close(certainty(u)[0, 0], torch.tensor([1, 0.25, 1]))

    def test_even_classes_have_the_smallest(self) -> None:
        assert certainty(torch.full((1, 5, 2, 2), 0.2)).flatten().tolist() == pytest.approx([1 / 25] * 4)

    def test_against_the_entropy_in_numpy(self) -> None:
        u = random_logits(2, 3, 4, 4).softmax(1)
        expected = np.exp(-2 * -(u.numpy() * np.log(u.numpy())).sum(1))
        np.testing.assert_allclose(certainty(u).numpy(), expected, rtol=1e-12)


def weighted_kl_by_numpy(log_probabilities: Tensor, u: Tensor) -> float:
    mine, theirs = u.numpy(), log_probabilities.exp().numpy()
    total, pixels = 0.0, 0
    for image, answer in zip(mine, theirs, strict=True):
        for place in np.ndindex(*image.shape[1:]):
            p, q = image[:, *place], answer[:, *place]
            if p.sum() == 0:
                continue
            entropy = -sum(each * math.log(each) for each in p if each > 0)
            total += math.exp(-2 * entropy) * rel_entr(p, q).sum()
            pixels += 1
    return total / pixels


def soft_targets() -> Tensor:
    u = random_logits(2, 3, 4, 5, seed=1).softmax(1)
    u[0, :, 0] = torch.tensor([1.0, 0, 0], dtype=torch.float64)[:, None]
    u[1, :, :, :2] = 0
    return u


class TestWeightedKL:
    def test_equals_scipy(self) -> None:
        log_probabilities, u = random_logits(2, 3, 4, 5).log_softmax(1), soft_targets()
        expected = weighted_kl_by_numpy(log_probabilities, u)
        assert expected > 0
        assert weighted_kl(log_probabilities, u).item() == pytest.approx(expected, rel=1e-12)

    @settings(max_examples=30)
    @given(st.integers(0, 10**6))
    def test_is_positive_and_zero_only_at_u(self, seed: int) -> None:
        log_probabilities = random_logits(1, 2, 3, 3, seed=seed).log_softmax(1)
        assert weighted_kl(log_probabilities, log_probabilities.exp()).item() == pytest.approx(0, abs=1e-12)
        assert weighted_kl(log_probabilities, log_probabilities.exp().flip(1)).item() > 0

    def test_unsure_pixels_weigh_a_quarter(self) -> None:
        log_probabilities = torch.tensor([0.8, 0.2], dtype=torch.float64).log()[None, :, None, None]
        u = torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64)
        expected = 0.25 * (0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2))
        assert weighted_kl(log_probabilities, u).item() == pytest.approx(expected)

    def test_surely_wrong_pixels_keep_their_gradient(self) -> None:
        logits = torch.tensor([40.0, -40.0])[None, :, None, None].requires_grad_()
        weighted_kl(logits.log_softmax(1), torch.tensor([0.0, 1.0])[None, :, None, None]).backward()
        assert logits.grad is not None
        assert logits.grad.flatten().tolist() == pytest.approx([1, -1])


@pytest.mark.parametrize("follow", [weighted_kl, hard_cross_entropy])
class TestBoth:
    def test_gradient(self, follow: object) -> None:
        u = soft_targets()
        logits = random_logits(2, 3, 4, 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: follow(z.log_softmax(1), u), logits)  # type: ignore[operator]

    def test_u_gets_no_gradient(self, follow: object) -> None:
        logits, u = random_logits(2, 3, 4, 5).requires_grad_(), soft_targets().requires_grad_()
        follow(logits.log_softmax(1), u).backward()  # type: ignore[operator]
        assert u.grad is None
        assert logits.grad is not None
        assert logits.grad[0].any()
        assert not logits.grad[1, :, :, :2].any()

    def test_zero_where_nothing_is_said(self, follow: object) -> None:
        logits = random_logits(2, 3, 4, 5).requires_grad_()
        loss = follow(logits.log_softmax(1), torch.zeros(2, 3, 4, 5, dtype=torch.float64))  # type: ignore[operator]
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()

    def test_a_sum_that_rounding_moved_is_made_one(self, follow: object) -> None:
        log_probabilities, u = random_logits(2, 3, 4, 5).log_softmax(1), soft_targets()
        once, scaled = follow(log_probabilities, u), follow(log_probabilities, u * 0.98)  # type: ignore[operator]
        assert scaled.item() == pytest.approx(once.item(), rel=1e-12)


def test_hard_cross_entropy_equals_log_loss_of_scikit_learn() -> None:
    log_probabilities, u = random_logits(2, 3, 4, 5).log_softmax(1), soft_targets()
    said = u.sum(1).numpy() > 0
    labels, answers = u.argmax(1).numpy()[said], log_probabilities.exp().movedim(1, 3).numpy()[said]
    expected = log_loss(labels, answers, labels=[0, 1, 2])
    assert hard_cross_entropy(log_probabilities, u).item() == pytest.approx(expected, rel=1e-12)
