"""The losses that the contrast-based variational model is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.methods.cvm.comparators import (
    consistency_loss,
    crf_loss,
    entropy_threshold,
    guess_labels,
    mixed_pseudo_label_loss,
    mixup,
    ramp_up,
    sharpen,
    similarity_targets,
    soft_dice_loss,
    teacher_decay,
    uncertain_consistency_loss,
    update_teacher,
)

Array = NDArray[np.float64]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def crf_by_loops(probabilities: Array, image: Array, places: Array, sigma_rgb: float, sigma_xy: float) -> float:
    """Energy of one image from (C,n), (3,n) and (2,n), pair by pair."""
    total = energy = 0.0
    for i in range(image.shape[1]):
        for j in range(image.shape[1]):
            if i == j:
                continue
            near = ((places[:, i] - places[:, j]) ** 2).sum() / (2 * sigma_xy**2)
            alike = ((image[:, i] - image[:, j]) ** 2).sum() / (2 * sigma_rgb**2)
            weight = math.exp(-near - alike)
            total += weight
            energy += weight * sum(p[i] * (1 - p[j]) for p in probabilities)
    return energy / total


def places_of(height: int, width: int) -> Array:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows.ravel(), columns.ravel()]).astype(np.float64)


class TestCRFLoss:
    def test_equals_the_sum_over_pairs(self) -> None:
        probabilities, images = random_tensor(2, 3, 4, 5).softmax(1), random_images(2, 3, 4, 5)
        expected = [
            crf_by_loops(p.flatten(1).numpy(), image.flatten(1).numpy(), places_of(4, 5), 0.3, 2.5)
            for p, image in zip(probabilities, images, strict=True)
        ]
        loss = crf_loss(probabilities, images, sigma_rgb=0.3, sigma_xy=2.5)
        assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)

    def test_large_maps_are_averaged_in_cells_with_distances_in_pixels(self) -> None:
        probabilities, images = random_tensor(1, 2, 12, 6).softmax(1), random_images(1, 3, 12, 6)

        def average(maps: Tensor) -> Array:
            return maps[0].numpy().reshape(-1, 4, 3, 2, 3).mean((2, 4)).reshape(len(maps[0]), -1)

        expected = crf_by_loops(average(probabilities), average(images), 3 * places_of(4, 2), 0.2, 4.0)
        loss = crf_loss(probabilities, images, sigma_rgb=0.2, sigma_xy=4.0, cells=4)
        assert loss.item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("move", [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT, lambda x: x.flip(0)])
    def test_does_not_depend_on_the_orientation(self, move: Callable[[Tensor], Tensor]) -> None:
        probabilities, images = random_tensor(2, 3, 11, 7).softmax(1), random_images(2, 3, 11, 7)
        first = crf_loss(probabilities, images, sigma_rgb=0.3, sigma_xy=3.0, cells=5)
        second = crf_loss(move(probabilities), move(images), sigma_rgb=0.3, sigma_xy=3.0, cells=5)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)

    def test_does_not_depend_on_the_order_of_pixels_where_places_do_not_matter(self) -> None:
        probabilities, images = random_tensor(1, 3, 4, 6).softmax(1), random_images(1, 3, 4, 6)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
        first, second = (
            crf_loss(p.view(1, 3, 4, 6), i.view(1, 3, 4, 6), sigma_rgb=0.3, sigma_xy=1e6)
            for p, i in (
                (probabilities, images),
                (probabilities.flatten(2)[..., order], images.flatten(2)[..., order]),
            )
        )
        torch.testing.assert_close(first, second, rtol=1e-9, atol=0)

    def test_gradient(self) -> None:
        images = random_images(2, 3, 5, 4)
        logits = random_tensor(2, 3, 5, 4).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z: crf_loss(z.softmax(1), images, sigma_rgb=0.3, sigma_xy=2.0, cells=3), logits
        )

    @pytest.mark.parametrize("num_classes", [2, 5])
    def test_constant_probabilities_cost_their_gini_impurity(self, num_classes: int) -> None:
        sure = torch.zeros(1, num_classes, 6, 6, dtype=torch.float64)
        sure[:, 0] = 1
        unsure = torch.full_like(sure, 1 / num_classes)
        images = random_images(1, 3, 6, 6)
        assert crf_loss(sure, images).item() == pytest.approx(0, abs=1e-12)
        assert crf_loss(unsure, images).item() == pytest.approx(1 - 1 / num_classes)

    def test_prefers_a_border_on_the_edge_of_the_image(self) -> None:
        images = torch.zeros(1, 3, 8, 8)
        images[..., 4:] = 1

        def cut_at(column: int) -> float:
            right = torch.zeros(1, 8, 8)
            right[..., column:] = 1
            return crf_loss(torch.stack([1 - right, right], 1), images).item()

        assert cut_at(4) == pytest.approx(0, abs=1e-6)
        assert cut_at(2) > 0.1
        assert cut_at(2) == pytest.approx(cut_at(6))

    def test_half_precision_stays_near(self) -> None:
        probabilities, images = random_tensor(1, 2, 16, 16).softmax(1), random_images(1, 3, 16, 16)
        exact = crf_loss(probabilities, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = crf_loss(probabilities.bfloat16(), images.float())
        assert near.item() == pytest.approx(exact.item(), rel=5e-3)

    def test_one_pixel_and_pixels_without_neighbours_cost_nothing(self) -> None:
        assert crf_loss(torch.full((1, 2, 1, 1), 0.5), torch.zeros(1, 3, 1, 1)).item() == 0
        far = crf_loss(torch.full((1, 2, 2, 2), 0.5), torch.zeros(1, 3, 2, 2), sigma_xy=1e-3)
        assert far.item() == 0

    @pytest.mark.parametrize(
        ("changes", "size", "text"),
        [
            ({"sigma_rgb": 0.0}, 4, "sigma_rgb"),
            ({"sigma_xy": -1.0}, 4, "sigma_xy"),
            ({"cells": 0}, 4, "cells"),
            ({}, 5, "images"),
        ],
    )
    def test_bad_input(self, changes: dict[str, float], size: int, text: str) -> None:
        with pytest.raises(InputError, match=text):
            crf_loss(torch.full((1, 2, 4, 4), 0.5), torch.zeros(1, 3, 4, size), **changes)  # type: ignore[arg-type]


class TestMeanTeacher:
    def test_equals_the_formula(self) -> None:
        student, threshold = random_tensor(2, 3, 4, 5), 0.8
        teacher = 2 * random_tensor(2, 3, 4, 5, seed=3) + 0.5 * random_tensor(8, 2, 3, 4, 5, seed=8)
        s, mean = student.softmax(1).numpy(), teacher.softmax(2).numpy().mean(0)
        distances = []
        for b, i, j in np.ndindex(2, 4, 5):
            m = mean[b, :, i, j]
            if -sum(m * np.log(m)) < threshold:
                distances.append(((s[b, :, i, j] - m) ** 2).mean())
        assert 0 < len(distances) < 40  # both kinds of pixels occur
        loss = uncertain_consistency_loss(student, teacher, threshold)
        assert loss.item() == pytest.approx(np.mean(distances), rel=1e-12)

    def test_gradient_reaches_the_student_alone(self) -> None:
        student, teacher = random_tensor(1, 2, 3, 3).requires_grad_(), random_tensor(4, 1, 2, 3, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: uncertain_consistency_loss(z, teacher, 0.65), student)
        uncertain_consistency_loss(student, teacher, 0.65).backward()
        assert student.grad is not None
        assert teacher.grad is None

    def test_no_sure_pixel_costs_nothing(self) -> None:
        student = random_tensor(1, 2, 3, 3).requires_grad_()
        loss = uncertain_consistency_loss(student, torch.zeros(8, 1, 2, 3, 3, dtype=torch.float64), 0.6)
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert not student.grad.any()

    def test_passes_that_contradict_each_other_are_not_sure(self) -> None:
        passes = torch.tensor([[20.0, -20.0], [-20.0, 20.0]]).view(2, 1, 2, 1, 1)  # each alone would be sure
        assert uncertain_consistency_loss(torch.ones(1, 2, 1, 1), passes, 0.69).item() == 0
        sure = uncertain_consistency_loss(torch.zeros(1, 2, 1, 1), passes[:1].repeat(2, 1, 1, 1, 1), 0.69)
        assert sure.item() == pytest.approx(0.25)

    def test_a_student_like_its_teacher_costs_nothing_also_with_saturated_logits(self) -> None:
        logits = torch.tensor([2000.0, -2000.0, 0.0]).view(1, 3, 1, 1)
        assert uncertain_consistency_loss(logits, logits[None], 0.5).item() == 0

    def test_ramps(self) -> None:
        assert ramp_up(0) == pytest.approx(math.exp(-5))
        assert ramp_up(0.5) == pytest.approx(math.exp(-1.25))
        assert ramp_up(1) == ramp_up(1.5) == 1
        assert ramp_up(-1) == ramp_up(0)
        assert entropy_threshold(1) == pytest.approx(math.log(2))
        assert entropy_threshold(1, 4) == pytest.approx(2 * math.log(2))
        assert entropy_threshold(0) == pytest.approx((0.75 + 0.25 * math.exp(-5)) * math.log(2))

    def test_decay_is_a_plain_mean_at_first(self) -> None:
        assert [teacher_decay(step) for step in range(4)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
        assert teacher_decay(10_000) == 0.99


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


class TestUpdateTeacher:
    def test_moves_parameters_and_running_means_and_copies_counters(self) -> None:
        teacher, student = small_network(), small_network()
        student(torch.rand(2, 3, 4, 4))  # sets running means and the counter
        before, target = deepcopy(teacher.state_dict()), deepcopy(student.state_dict())
        update_teacher(teacher, student, 0.75)
        for name, value in teacher.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert value == target[name] == 1
            else:
                torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * target[name])
            assert torch.equal(student.state_dict()[name], target[name])
        assert not torch.equal(teacher.state_dict()["1.running_mean"], before["1.running_mean"])

    def test_the_first_update_copies_and_no_gradient_is_recorded(self) -> None:
        teacher, student = small_network(), small_network()
        update_teacher(teacher, student, teacher_decay(0))
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(old, new)
            assert old.is_leaf
            assert old.data_ptr() != new.data_ptr()

    def test_bad_input(self) -> None:
        with pytest.raises(InputError, match=r"decay 1\.1"):
            update_teacher(small_network(), small_network(), 1.1)
        with pytest.raises(InputError, match="teacher"):
            update_teacher(nn.Linear(3, 2), nn.Linear(3, 1), 0.9)


class TestDualBranch:
    def test_dice_by_hand(self) -> None:
        probabilities = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).view(1, 2, 1, 2)
        loss = soft_dice_loss(probabilities, torch.tensor([[[0, 0]]]))
        # class 0: 2 (0.5 + 1) / (0.25 + 1 + 2); class 1: nothing / 0.25
        assert loss.item() == pytest.approx(1 - (3 / 3.25 + 0) / 2, abs=1e-4)

    def test_dice_of_a_perfect_answer_is_zero_also_without_a_class(self) -> None:
        labels = torch.tensor([[[0, 1], [1, 1]]])
        perfect = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
        assert soft_dice_loss(perfect, labels).item() == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_equals_the_formula(self, alpha: float) -> None:
        main, auxiliary = random_tensor(2, 3, 4, 5), random_tensor(2, 3, 4, 5, seed=4)
        y1, y2 = main.softmax(1).numpy(), auxiliary.softmax(1).numpy()
        labels = (alpha * y1 + (1 - alpha) * y2).argmax(1)

        def dice(y: Array) -> float:
            ratios = []
            for k in range(3):
                truth = (labels == k).astype(float)
                ratios.append((2 * (y[:, k] * truth).sum() + 1e-5) / ((y[:, k] ** 2).sum() + truth.sum() + 1e-5))
            return 1 - float(np.mean(ratios))

        loss = mixed_pseudo_label_loss(main, auxiliary, alpha)
        assert loss.item() == pytest.approx(0.5 * (dice(y1) + dice(y2)), rel=1e-12)

    def test_gradient(self) -> None:
        main, auxiliary = random_tensor(1, 3, 3, 4).requires_grad_(), random_tensor(1, 3, 3, 4, seed=5).requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: mixed_pseudo_label_loss(a, b, 0.4), (main, auxiliary))

    def test_does_not_depend_on_the_order_of_pixels_or_branches(self) -> None:
        main, auxiliary = random_tensor(2, 3, 4, 5), random_tensor(2, 3, 4, 5, seed=6)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        first = mixed_pseudo_label_loss(main, auxiliary, 0.3)
        shuffled = [logits.flatten(2)[..., order].view_as(logits) for logits in (main, auxiliary)]
        torch.testing.assert_close(first, mixed_pseudo_label_loss(shuffled[0], shuffled[1], 0.3), rtol=1e-12, atol=0)
        torch.testing.assert_close(first, mixed_pseudo_label_loss(auxiliary, main, 0.7), rtol=1e-12, atol=0)

    def test_bad_input(self) -> None:
        with pytest.raises(InputError, match=r"alpha -0\.1"):
            mixed_pseudo_label_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), -0.1)


class TestMixMatch:
    def test_sharpen_by_hand(self) -> None:
        given_ = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
        expected = torch.tensor([[0.04, 0.09, 0.25]], dtype=torch.float64) / 0.38
        torch.testing.assert_close(sharpen(given_), expected)
        torch.testing.assert_close(sharpen(given_, 1.0), given_)

    def test_sharpen_survives_zeros_and_small_temperatures(self) -> None:
        assert sharpen(torch.tensor([[0.0, 1.0], [0.49, 0.51]]), 1e-4).tolist() == [[0, 1], [0, 1]]
        torch.testing.assert_close(sharpen(torch.full((1, 4), 0.25), 1e-3), torch.full((1, 4), 0.25))

    @given(st.integers(0, 10_000), st.floats(0.05, 1.0))
    @settings(max_examples=25, deadline=None)
    def test_sharpen_lowers_the_entropy_and_keeps_the_order(self, seed: int, temperature: float) -> None:
        before = random_tensor(2, 4, 3, seed=seed).softmax(1)
        after = sharpen(before, temperature)
        torch.testing.assert_close(after.sum(1), torch.ones(2, 3, dtype=torch.float64))
        assert torch.equal(after.argmax(1), before.argmax(1))
        assert (torch.special.entr(after).sum(1) <= torch.special.entr(before).sum(1) + 1e-12).all()

    def test_guess_is_the_sharpened_mean_of_the_views_without_gradient(self) -> None:
        logits = random_tensor(2, 3, 4, 2, 2).requires_grad_()
        mean = logits.detach().softmax(2).mean(0)
        guess = guess_labels(logits)
        torch.testing.assert_close(guess, mean**2 / (mean**2).sum(1, keepdim=True))
        assert not guess.requires_grad
        torch.testing.assert_close(guess, guess_labels(logits.flip(0)))

    def test_mixup_stays_nearer_to_the_image_itself(self) -> None:
        images, targets = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)
        swap = torch.tensor([1, 0])
        for lam in (0.2, 0.8):
            mixed, mixed_targets = mixup(images.expand(2, 3, 4, 4), targets.expand(2, 2, 2, 2), lam, swap)
            torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([0.2, 0.8]))
            torch.testing.assert_close(mixed_targets[:, 1, 1, 1], torch.tensor([12.0, 18.0]))
            assert mixed.shape == (2, 3, 4, 4)
            assert mixed_targets.shape == (2, 2, 2, 2)

    def test_mixup_takes_one_share_per_image(self) -> None:
        images, targets = random_images(3, 3, 2, 2), random_tensor(3, 2, 2, 2).softmax(1)
        order = torch.tensor([1, 2, 0])
        mixed, mixed_targets = mixup(images, targets, torch.tensor([1.0, 0.0, 0.5]), order)
        torch.testing.assert_close(mixed, torch.stack([images[0], images[1], (images[2] + images[0]) / 2]))
        torch.testing.assert_close(mixed_targets[2], (targets[2] + targets[0]) / 2)
        torch.testing.assert_close(mixed_targets.sum(1), torch.ones(3, 2, 2, dtype=torch.float64))

    def test_consistency_by_hand_and_its_gradient(self) -> None:
        targets = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        assert consistency_loss(torch.zeros(1, 2, 1, 1), targets).item() == pytest.approx(0.25)
        assert consistency_loss(torch.tensor([-99.0, 99.0]).view(1, 2, 1, 1), targets).item() == pytest.approx(1.0)
        logits, guess = random_tensor(1, 3, 2, 3).requires_grad_(), random_tensor(1, 3, 2, 3, seed=7).softmax(1)
        assert torch.autograd.gradcheck(lambda z: consistency_loss(z, guess), logits)
        assert consistency_loss(guess.log(), guess).item() == pytest.approx(0, abs=1e-20)

    def test_targets_carry_no_gradient(self) -> None:
        targets = torch.full((1, 2, 1, 1), 0.5, requires_grad=True)
        assert not consistency_loss(torch.zeros(1, 2, 1, 1), targets).requires_grad

    def test_bad_input(self) -> None:
        with pytest.raises(InputError, match="temperature 0"):
            sharpen(torch.ones(1, 1), 0)
        with pytest.raises(InputError, match="lam"):
            mixup(torch.zeros(2, 3, 1, 1), torch.zeros(2, 2, 1, 1), 1.2, torch.tensor([1, 0]))


class TestSimilarityTargets:
    POINTS = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1]])
    CLASSES = torch.tensor([0, 2, 2, 0])

    def test_equals_the_formula(self) -> None:
        features = random_tensor(5, 4, 6)
        f = features.numpy()
        expected = np.zeros((4, 4, 6))
        for i, j in np.ndindex(4, 6):
            for k in (0, 2):
                cosines = [
                    f[:, r, c] @ f[:, i, j] / np.linalg.norm(f[:, r, c]) / np.linalg.norm(f[:, i, j])
                    for (r, c), label in zip(self.POINTS.tolist(), self.CLASSES.tolist(), strict=True)
                    if label == k
                ]
                expected[k, i, j] = math.exp(max(cosines) / 0.1)
        expected /= expected.sum(0)
        actual = similarity_targets(features, self.POINTS, self.CLASSES, 4)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)
        assert (actual[[1, 3]] == 0).all()

    def test_does_not_depend_on_the_order_of_points_and_follows_flips(self) -> None:
        features = random_tensor(5, 4, 6)
        first = similarity_targets(features, self.POINTS, self.CLASSES, 3)
        torch.testing.assert_close(first, similarity_targets(features, self.POINTS.flip(0), self.CLASSES.flip(0), 3))
        mirrored = self.POINTS * torch.tensor([1, -1]) + torch.tensor([0, 5])
        torch.testing.assert_close(first.flip(2), similarity_targets(features.flip(2), mirrored, self.CLASSES, 3))
        torch.testing.assert_close(first, similarity_targets(7 * features, self.POINTS, self.CLASSES, 3))

    def test_points_keep_their_class_and_no_gradient_is_recorded(self) -> None:
        features = random_tensor(8, 4, 6).requires_grad_()
        targets = similarity_targets(features, self.POINTS, self.CLASSES, 3)
        assert targets[:, self.POINTS[:, 0], self.POINTS[:, 1]].argmax(0).tolist() == self.CLASSES.tolist()
        assert not targets.requires_grad

    def test_zero_features_say_nothing(self) -> None:
        targets = similarity_targets(torch.zeros(2, 2, 2), torch.tensor([[0, 0], [1, 1]]), torch.tensor([0, 1]), 3)
        torch.testing.assert_close(targets[:, 0, 0], torch.tensor([0.5, 0.5, 0.0]))

    def test_one_class_alone_takes_all(self) -> None:
        targets = similarity_targets(torch.rand(2, 2, 2), torch.tensor([[0, 0]]), torch.tensor([1]), 2)
        assert (targets[1] == 1).all()
        assert (targets[0] == 0).all()

    @pytest.mark.parametrize(
        ("points", "classes", "text"),
        [
            (torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), "points: are missing"),
            (torch.tensor([[0, 9]]), torch.tensor([0]), r"point \(0, 9\)"),
            (torch.tensor([[0, 1]]), torch.tensor([2]), r"class 2: is not in 0\.\.1"),
            (torch.tensor([[0, 1]]), torch.tensor([-1]), "class -1"),
            (torch.tensor([[0, 1]]), torch.tensor([0, 1]), "classes"),
        ],
    )
    def test_bad_input(self, points: Tensor, classes: Tensor, text: str) -> None:
        with pytest.raises(InputError, match=text):
            similarity_targets(torch.rand(2, 3, 3), points, classes, 2)
