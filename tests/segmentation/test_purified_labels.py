"""Purified labels (Feng et al. 2025, Eq. 10 and 11) and OEEM's reweighting against loops in double precision."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.segmentation import (
    SegmentationConfig,
    SegmentationModule,
    cross_entropy,
    purified_label_loss,
    reweighted_loss,
)

few = settings(max_examples=25)
BOTH = [purified_label_loss, reweighted_loss]


def probabilities(scores):
    exponents = np.exp(scores - scores.max())
    return exponents / exponents.sum()


def slowly(loss, logits, target, ignore_index=255):
    """(value, gradient of the logits), pixel by pixel; the weights are constants."""
    logits, target = logits.detach().double().numpy(), target.numpy()
    gradient = np.zeros_like(logits)
    count = max(int((target != ignore_index).sum()), 1)
    total = 0.0
    for image, (scores, labels) in enumerate(zip(logits, target, strict=True)):
        pixels = [(row, column) for row, column in np.ndindex(labels.shape) if labels[row, column] != ignore_index]
        if not pixels:
            continue
        shares = {pixel: probabilities(scores[:, *pixel]) for pixel in pixels}
        losses = {}
        for pixel in pixels:
            peak = scores[:, *pixel].max()
            logarithm = peak + math.log(np.exp(scores[:, *pixel] - peak).sum())
            losses[pixel] = logarithm - scores[labels[pixel], *pixel]
        least = min(losses.values())
        exponents = {pixel: math.exp(least - value) for pixel, value in losses.items()}
        ease = {pixel: value / sum(exponents.values()) for pixel, value in exponents.items()}
        mean = sum(ease.values()) / len(ease)
        one_class = len({int(labels[pixel]) for pixel in pixels}) == 1
        for pixel in pixels:
            weight = ease[pixel] / mean
            if loss is purified_label_loss:
                weight = 1.0 if one_class else weight * (shares[pixel].max() - shares[pixel].min())
            total += losses[pixel] * weight
            slope = shares[pixel].copy()
            slope[labels[pixel]] -= 1
            gradient[image, :, *pixel] = weight * slope / count
    return total / count, torch.from_numpy(gradient)


def case(seed, classes=3, ignored=0.2, batch=3, size=(4, 5), spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(batch, classes, *size, generator=generator)
    target = torch.randint(classes, (batch, *size), generator=generator)
    target[torch.rand(batch, *size, generator=generator) < ignored] = 255
    return logits, target


def with_gradient(loss, logits, target, **words):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target, **words)
    value.backward()
    return value.detach(), logits.grad


def check(loss, logits, target, room, **words):
    value, gradient = with_gradient(loss, logits, target, **words)
    expected, slope = slowly(loss, logits, target, **words)
    assert value.ndim == 0
    assert value.item() == pytest.approx(expected, rel=room, abs=room)
    torch.testing.assert_close(gradient.double(), slope, atol=room, rtol=room)


@pytest.mark.parametrize("loss", BOTH)
class TestAgainstLoops:
    @few
    @given(seed=st.integers(0, 9999), classes=st.integers(1, 6), ignored=st.floats(0, 1), spread=st.floats(0, 8))
    def test_value_and_gradient(self, loss, seed, classes, ignored, spread):
        logits, target = case(seed, classes, ignored, spread=spread)
        check(loss, logits, target, 1e-5)

    @pytest.mark.parametrize(
        ("kind", "room"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
    )
    def test_types_of_logits(self, loss, kind, room):
        logits, target = case(1)
        logits = logits.to(kind)
        value, gradient = with_gradient(loss, logits, target)
        expected, slope = slowly(loss, logits, target)
        assert gradient.dtype == kind
        assert value.item() == pytest.approx(expected, rel=1e-5)  # bfloat16 logits are not rounded once more
        torch.testing.assert_close(gradient.double(), slope, atol=room, rtol=room)

    @pytest.mark.parametrize("ignore_index", [0, 2, 7, 254, -1, -100])
    def test_another_ignore_index(self, loss, ignore_index):
        logits, target = case(2, classes=4)
        target[target == ignore_index] = 1
        other = torch.where(target == 255, ignore_index, target)
        check(loss, logits, other, 1e-5, ignore_index=ignore_index)
        torch.testing.assert_close(loss(logits, other, ignore_index=ignore_index), loss(logits, target))

    def test_logits_in_another_memory_layout(self, loss):
        logits, target = case(3)
        turned = logits.to(memory_format=torch.channels_last)
        torch.testing.assert_close(loss(turned, target), loss(logits, target))

    def test_batches_of_single_class_mixed_and_empty_images(self, loss):
        logits, target = case(4, batch=4)
        target[0] = 1
        target[1] = torch.where(target[1] == 255, 255, 2)  # one class and ignored pixels
        target[2] = 255
        check(loss, logits, target, 1e-5)


@pytest.mark.parametrize("loss", BOTH)
class TestPixels:
    def test_ignored_pixels_say_nothing(self, loss):
        logits, target = case(5, ignored=0.4)
        value, gradient = with_gradient(loss, logits, target)
        changed = torch.where((target == 255)[:, None], 50 * torch.randn_like(logits), logits)
        torch.testing.assert_close(loss(changed, target), value)
        assert float(gradient.abs().sum(1)[target == 255].max()) == 0

    def test_an_ignored_region_is_a_smaller_image(self, loss):
        logits, target = case(6, ignored=0, size=(6, 8))
        target[:, 4:], target[:, :, 5:] = 255, 255
        torch.testing.assert_close(loss(logits, target), loss(logits[..., :4, :5], target[:, :4, :5]))

    @few
    @given(seed=st.integers(0, 9999))
    def test_the_order_of_pixels_and_images_does_not_matter(self, loss, seed):
        logits, target = case(seed)
        generator = torch.Generator().manual_seed(seed)
        pixels, images = torch.randperm(20, generator=generator), torch.randperm(3, generator=generator)

        def moved(maps):
            return maps.flatten(-2)[..., pixels].unflatten(-1, (4, 5))[images]

        value, gradient = with_gradient(loss, logits, target)
        other, other_gradient = with_gradient(loss, moved(logits), moved(target))
        torch.testing.assert_close(other, value)
        torch.testing.assert_close(other_gradient, moved(gradient))

    def test_renaming_the_classes_does_not_matter(self, loss):
        logits, target = case(7, classes=4)
        order = torch.tensor([2, 0, 3, 1])
        renamed = torch.where(target == 255, 255, order.argsort()[target.clamp_max(3)])
        torch.testing.assert_close(loss(logits[:, order], renamed), loss(logits, target))

    def test_a_shift_of_all_logits_does_not_matter(self, loss):
        logits, target = case(8)
        torch.testing.assert_close(
            loss(logits + 30 * torch.randn(3, 1, 4, 5), target), loss(logits, target), rtol=1e-4, atol=1e-5
        )

    def test_a_batch_is_the_mean_over_its_labelled_pixels(self, loss):
        logits, target = case(9, ignored=0.5)
        counts = [int((each != 255).sum()) for each in target]
        alone = [float(loss(logits[i : i + 1], target[i : i + 1])) for i in range(3)]
        together = sum(count * value for count, value in zip(counts, alone, strict=True)) / sum(counts)
        assert float(loss(logits, target)) == pytest.approx(together, rel=1e-5)

    def test_inputs_are_left_as_they_are(self, loss):
        logits, target = case(10)
        before = logits.clone(), target.clone()
        loss(logits, target)
        assert torch.equal(logits, before[0])
        assert torch.equal(target, before[1])

    def test_nothing_labelled_gives_zero_and_no_gradient(self, loss):
        logits, target = case(11, ignored=1.1)
        value, gradient = with_gradient(loss, logits, target)
        assert value.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))

    @pytest.mark.parametrize("size", [0.0, 1e-6, 1e2, 1e4, 1e30])
    def test_finite_for_flat_and_for_huge_logits(self, loss, size):
        logits, target = case(12, spread=size, batch=4)
        target[2], target[3] = 255, 1
        value, gradient = with_gradient(loss, logits, target)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())

    def test_finite_where_every_pixel_is_far_off(self, loss):
        """exp(-loss) is 0 in float32 everywhere; the weights must still have the mean 1."""
        logits = torch.zeros(1, 2, 4, 4)
        logits[:, 0] = 1e4
        target = torch.ones(1, 4, 4, dtype=torch.int64)
        target[0, 0, 0] = 255
        assert float(reweighted_loss(logits, target)) == pytest.approx(1e4, rel=1e-5)
        assert float(purified_label_loss(logits, target)) == pytest.approx(1e4, rel=1e-5)
        check(loss, logits, target, 1e-4)

    def test_one_pixel(self, loss):
        logits, target = case(13, size=(1, 1), ignored=0, batch=2)
        torch.testing.assert_close(loss(logits, target), cross_entropy(logits, target))


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("classes", [2, 4])
class TestTwoAndMoreClasses:
    """Two classes are computed by their margin, more by the softmax."""

    @few
    @given(seed=st.integers(0, 9999), ignored=st.floats(0, 1), spread=st.sampled_from([0.1, 3, 40, 120, 1e3]))
    def test_against_loops_in_double_precision(self, loss, classes, seed, ignored, spread):
        logits, target = case(seed, classes, ignored, spread=spread)
        target[0] = torch.where(target[0] == 255, 255, 1)
        target[1] = torch.where(target[1] == 255, 255, logits[1].argmin(0))  # wrong everywhere
        check(loss, logits, target, 1e-5)
        check(loss, logits.double(), target, 1e-12)

    def test_the_gradient_keeps_the_memory_layout_of_the_logits(self, loss, classes):
        logits, target = case(14, classes)
        for turned in (logits.to(memory_format=torch.channels_last), logits.mT.contiguous().mT):
            value, gradient = with_gradient(loss, turned, target)
            assert gradient.stride() == turned.stride()
            torch.testing.assert_close(value, loss(logits, target))

    def test_a_factor_and_a_second_pass_scale_the_gradient(self, loss, classes):
        logits, target = case(15, classes)
        _, single = with_gradient(loss, logits, target)
        logits.requires_grad_()
        value = 3 * loss(logits, target)
        value.backward(retain_graph=True)
        value.backward()
        torch.testing.assert_close(logits.grad, 6 * single)

    @pytest.mark.parametrize("ignore_index", [255, 0, 1, -1, -100])
    @pytest.mark.parametrize("wrong", [-2, -1, 4, 7, 254, 256, 2**32])
    def test_a_class_that_does_not_exist_is_an_error(self, loss, classes, wrong, ignore_index):
        logits, target = case(16, classes, ignored=0)
        target[0, 0], target[1, 2, 3] = ignore_index, wrong
        if wrong == ignore_index:
            loss(logits, target, ignore_index=ignore_index)
        else:
            with pytest.raises(IndexError, match="out of bounds"):
                loss(logits, target, ignore_index=ignore_index)

    def test_a_target_of_another_shape_or_type_is_an_error(self, loss, classes):
        logits, target = case(17, classes)
        with pytest.raises(ValueError, match=r"\(1, 4, 5\); these logits need \(3, 4, 5\)"):
            loss(logits, target[:1])
        with pytest.raises(TypeError, match="give it as"):
            loss(logits, target.float())


class TestPurified:
    def test_an_image_with_one_class_is_plain_cross_entropy(self):
        logits, target = case(20, ignored=0)
        for index, image in enumerate(target):
            image.fill_(index)
            image[index, :3] = 255
        value, gradient = with_gradient(purified_label_loss, logits, target)
        expected, slope = with_gradient(cross_entropy, logits, target)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, slope)

    def test_images_are_judged_one_by_one(self):
        """A batch with both classes, but one in each image, is plain cross-entropy."""
        logits, target = case(21, classes=2, batch=2)
        target[0], target[1] = 0, 1
        torch.testing.assert_close(purified_label_loss(logits, target), cross_entropy(logits, target))
        target[0, 0, 0] = 1
        assert abs(float(purified_label_loss(logits, target) - cross_entropy(logits, target))) > 1e-3

    def test_two_classes_out_of_many_are_mixed(self):
        logits, target = case(22, classes=5, batch=1, ignored=0)
        target[:] = 3
        target[0, 0, 0] = 4
        check(purified_label_loss, logits, target, 1e-5)
        assert abs(float(purified_label_loss(logits, target) - cross_entropy(logits, target))) > 1e-3

    def test_undecided_pixels_weigh_nothing(self):
        logits, target = case(23, classes=4, ignored=0)
        logits[:, :, 0] = 1.7
        _, gradient = with_gradient(purified_label_loss, logits, target)
        assert float(gradient[:, :, 0].abs().max()) == 0
        assert float(gradient[:, :, 1:].abs().max()) > 0

    def test_confidence_is_largest_minus_smallest_of_three(self):
        """Two pixels with the same loss; by hand."""
        shares = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
        logits = shares.log().T[None, :, None]
        target = torch.tensor([[[0, 1]]])
        expected = -math.log(0.5) * 0.3
        assert float(purified_label_loss(logits, target)) == pytest.approx(expected, rel=1e-5)

    def test_a_wrong_label_among_right_ones_weighs_less(self):
        """Ten pixels that the network is sure about, one of them labelled otherwise."""
        logits = torch.tensor([3.0, -3.0])[None, :, None, None].expand(1, 2, 2, 5).clone()
        target = torch.zeros(1, 2, 5, dtype=torch.int64)
        target[0, 1, 4] = 1
        _, purified = with_gradient(purified_label_loss, logits, target)
        _, plain = with_gradient(cross_entropy, logits, target)
        share = [float(each[0, 0, 1, 4].abs() / each[0, 0].abs().sum()) for each in (purified, plain)]
        assert share[1] > 0.9
        assert share[0] < 0.6

    @few
    @given(seed=st.integers(0, 9999), classes=st.integers(2, 5))
    def test_weights_are_constants_for_the_gradient(self, seed, classes):
        """Were they not, moving along the gradient of the weights would change it."""
        logits, target = case(seed, classes, ignored=0, batch=1)
        target[0, 0, 0], target[0, 0, 1] = 0, 1
        _, gradient = with_gradient(purified_label_loss, logits, target)
        pixelwise = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        shares = logits.softmax(1)
        ease = (-pixelwise).flatten(1).softmax(1).view_as(pixelwise)
        weight = ease / ease.mean() * (shares.amax(1) - shares.amin(1))
        constant = logits.clone().requires_grad_()
        (torch.nn.functional.cross_entropy(constant, target, reduction="none") * weight).mean().backward()
        torch.testing.assert_close(gradient, constant.grad, atol=1e-5, rtol=1e-4)


class TestReweighted:
    def test_a_flat_loss_map_is_plain_cross_entropy(self):
        logits, target = torch.zeros(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
        torch.testing.assert_close(reweighted_loss(logits, target), cross_entropy(logits, target))

    def test_single_class_images_are_weighted_too(self):
        logits, target = case(30, ignored=0)
        target[:] = 1
        check(reweighted_loss, logits, target, 1e-5)
        assert abs(float(reweighted_loss(logits, target) - cross_entropy(logits, target))) > 1e-3

    def test_never_above_plain_cross_entropy(self):
        """The weight falls with the loss, so that the weighted mean is below the mean (Chebyshev's sum inequality)."""
        for seed in range(20):
            logits, target = case(seed, batch=1)
            assert float(reweighted_loss(logits, target)) <= float(cross_entropy(logits, target)) + 1e-6


SPACE = LabelSpace(("gland", "stroma", "white"), white=2)


class TestInTheModule:
    def module(self, loss, **settings):
        torch.manual_seed(0)
        config = SegmentationConfig(
            network={"architecture": "unet", "encoder": {"name": "mobilenetv3_small_050"}},
            optimization={"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 3, "power": 0},
            loss=loss,
            crop=64,
            **settings,
        )
        return SegmentationModule(config, SPACE).train()

    def batch(self):
        generator = torch.Generator().manual_seed(0)
        masks = torch.randint(3, (4, 4, 4), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
        colours = torch.tensor([[0.8, 0.3, 0.5], [0.4, 0.2, 0.6], [0.95, 0.95, 0.95]])
        images = colours[masks].permute(0, 3, 1, 2) + 0.02 * torch.randn(4, 3, 64, 64, generator=generator)
        masks[:, :5] = 255
        return Batch([f"crop_{index}" for index in range(4)], images.clamp(0, 1), masks=masks)

    @pytest.mark.parametrize(("name", "loss"), [("purified", purified_label_loss), ("reweighted", reweighted_loss)])
    def test_it_trains_with_the_loss_of_that_name_and_learns(self, name, loss, monkeypatch):
        module, batch, logged = self.module(name), self.batch(), []
        monkeypatch.setattr(module, "log", lambda key, value, **_: logged.append((key, value.item())))
        monkeypatch.setattr(module, "_trainer", SimpleNamespace(estimated_stepping_batches=12))
        optimizer = module.configure_optimizers()["optimizer"]
        forward, seen = module.forward, []
        monkeypatch.setattr(module, "forward", lambda images: seen.append(forward(images)) or seen[-1])
        plain = []
        for _ in range(12):
            optimizer.zero_grad()
            value = module.training_step(batch, 0)
            logits = seen.pop().detach()
            torch.testing.assert_close(value.detach(), loss(logits, batch.masks))
            plain.append(float(cross_entropy(logits, batch.masks)))
            value.backward()
            optimizer.step()
        assert [key for key, _ in logged] == ["train_loss"] * 12
        assert plain[-1] < 0.7 * plain[0], plain

    def test_plain_cross_entropy_until_the_warm_up_is_over(self, monkeypatch):
        module, batch = self.module("purified", loss_warmup=2), self.batch()
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        logits = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(module, "forward", lambda images: logits)
        expected = [cross_entropy(logits, batch.masks)] * 2 + [purified_label_loss(logits, batch.masks)] * 2
        assert float(expected[0]) > 1.1 * float(expected[2])
        for step, loss in enumerate(expected):
            monkeypatch.setattr(module, "_trainer", SimpleNamespace(global_step=step))
            torch.testing.assert_close(module.training_step(batch, 0), loss)

    def test_one_step_moves_every_part_of_the_network(self, monkeypatch):
        module = self.module("purified")
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        module.training_step(self.batch(), 0).backward()
        without = [key for key, value in module.named_parameters() if value.grad is None or not value.grad.any()]
        assert len(without) < 0.02 * len(list(module.parameters())), without

    def test_only_ignored_pixels_leave_the_weights_alone(self, monkeypatch):
        module, batch = self.module("purified"), self.batch()
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        empty = Batch(batch.ids, batch.images, masks=torch.full_like(batch.masks, 255))
        value = module.training_step(empty, 0)
        value.backward()
        assert value.item() == 0
        assert all(each.grad is None or not each.grad.any() for each in module.parameters())
