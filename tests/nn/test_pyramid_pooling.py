"""Pyramid fusion pooling against Eq. 5-9 of Feng et al. 2025, written out in loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.errors import InputError
from tissuehint.methods.gland import PyramidFusionPooling

few = settings(max_examples=15)


def relu(value):
    return np.maximum(value, 0)


def pooled(plane, scale):
    """Mean over the cells of a scale x scale grid; where the map does not divide, cells share a row or column."""
    height, width = plane.shape
    result = np.zeros((scale, scale))
    for row in range(scale):
        for column in range(scale):
            top, below = row * height // scale, math.ceil((row + 1) * height / scale)
            left, right = column * width // scale, math.ceil((column + 1) * width / scale)
            result[row, column] = plane[top:below, left:right].mean()
    return result


def enlarged(plane, height, width):
    """Bilinear between the centres of cells, the border repeated."""
    rows, columns = plane.shape
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            row, column = max((y + 0.5) * rows / height - 0.5, 0), max((x + 0.5) * columns / width - 0.5, 0)
            top, left = int(row), int(column)
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            down, over = row - top, column - left
            upper = plane[top, left] * (1 - over) + plane[top, right] * over
            lower = plane[below, left] * (1 - over) + plane[below, right] * over
            result[y, x] = upper * (1 - down) + lower * down
    return result


def sign_preserving(weights, first, second):
    """Eq. 5: (2,H,W) from the 3x3 convolution of both maps, zeros outside."""
    stacked = np.concatenate([relu(first), relu(second)])
    channels, height, width = stacked.shape
    result = np.zeros((2, height, width))
    for out in range(2):
        for y in range(height):
            for x in range(width):
                total = 0.0
                for channel in range(channels):
                    for down in (-1, 0, 1):
                        for over in (-1, 0, 1):
                            if 0 <= y + down < height and 0 <= x + over < width:
                                weight = weights[out, channel, down + 1, over + 1]
                                total += weight * stacked[channel, y + down, x + over]
                result[out, y, x] = 1 / (1 + math.exp(-total))
    return result


def slowly(pooling, class_maps, scales):
    """(logits (B,C), fused (B,C,H,W)), image by image."""
    steps = [
        [convolution.weight.detach().double().numpy() for convolution in part]
        for part in (pooling.positive, pooling.negative)
    ]
    all_logits, all_fused = [], []
    for maps in class_maps.double().numpy():
        height, width = maps.shape[1:]
        levels = [np.stack([enlarged(pooled(plane, scale), height, width) for plane in maps]) for scale in scales]
        fused = levels[0]
        for level, positive, negative in zip(levels[1:], *steps, strict=True):
            pos, neg = sign_preserving(positive, fused, level), sign_preserving(negative, -fused, -level)
            fused = (relu(fused) * pos[0] + relu(level) * pos[1]) / 2 - (
                relu(-fused) * neg[0] + relu(-level) * neg[1]
            ) / 2
        summand = relu(fused) * relu(maps) - relu(-fused) * relu(-maps)
        all_logits.append(summand.sum((1, 2)) / (height * width))
        all_fused.append(fused)
    return torch.from_numpy(np.stack(all_logits)), torch.from_numpy(np.stack(all_fused))


def pooling_of(classes=2, scales=(2, 4, 8, 16), *, seed=0, **words):
    torch.manual_seed(seed)
    pooling = PyramidFusionPooling(classes, scales, **words)
    for convolution in [*pooling.positive, *pooling.negative]:
        torch.nn.init.normal_(convolution.weight, std=0.5)  # far from the flat middle of the sigmoid
    return pooling


def maps_of(classes=2, height=14, width=14, batch=1, seed=3):
    return 2 * torch.randn(batch, classes, height, width, generator=torch.Generator().manual_seed(seed))


class TestAgainstLoops:
    @pytest.mark.parametrize(
        ("classes", "height", "width", "scales"),
        [
            (2, 14, 14, (2, 4, 8, 16)),  # the paper; the finest grid is finer than the map
            (2, 17, 13, (2, 4, 8, 16)),  # odd, none of the grids divides
            (1, 9, 16, (2, 4, 8)),
            (4, 7, 10, (2, 4, 8, 16)),
            (3, 1, 5, (2, 4)),
            (2, 1, 1, (2, 4, 8, 16)),
            (2, 6, 7, (1, 3, 5)),
            (3, 6, 4, (3,)),
        ],
    )
    def test_values(self, classes, height, width, scales):
        pooling = pooling_of(classes, scales).double()
        maps = maps_of(classes, height, width, batch=2).double()
        logits, fused = pooling(maps)
        expected_logits, expected_fused = slowly(pooling, maps, scales)
        torch.testing.assert_close(fused, expected_fused, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(logits, expected_logits, atol=1e-9, rtol=1e-9)

    @few
    @given(
        seed=st.integers(0, 999),
        classes=st.integers(1, 4),
        height=st.integers(1, 7),
        width=st.integers(1, 7),
        scales=st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(sorted),
    )
    def test_any_size_and_pyramid_in_float32(self, seed, classes, height, width, scales):
        pooling, maps = pooling_of(classes, scales, seed=seed), maps_of(classes, height, width, seed=seed)
        logits, fused = pooling(maps)
        expected_logits, expected_fused = slowly(pooling, maps, scales)
        torch.testing.assert_close(fused.double(), expected_fused, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits.double(), expected_logits, atol=1e-5, rtol=1e-5)

    def test_scales_are_those_of_the_paper_unless_said(self):
        pooling = pooling_of()
        torch.manual_seed(0)
        plain = PyramidFusionPooling(2)
        plain.load_state_dict(pooling.state_dict())
        assert torch.equal(plain(maps_of())[0], pooling(maps_of())[0])

    def test_one_scale_is_its_pooled_map_and_has_no_weights(self):
        pooling, maps = pooling_of(scales=(4,)), maps_of()
        assert not list(pooling.parameters())
        fused = pooling(maps)[1]
        expected = F.interpolate(F.adaptive_avg_pool2d(maps, 4), maps.shape[-2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(fused, expected)

    @pytest.mark.parametrize(("height", "width"), [(14, 14), (9, 5)])
    def test_average_fusion_is_the_mean_of_the_levels(self, height, width):
        pooling, maps = PyramidFusionPooling(3, fusion="average"), maps_of(3, height, width)
        assert not list(pooling.parameters())
        logits, fused = pooling(maps)
        planes = maps[0].double().numpy()
        for index, plane in enumerate(planes):
            mean = sum(enlarged(pooled(plane, scale), height, width) for scale in (2, 4, 8, 16)) / 4
            torch.testing.assert_close(fused[0, index].double(), torch.from_numpy(mean), atol=1e-5, rtol=1e-5)
            summand = relu(mean) * relu(plane) - relu(-mean) * relu(-plane)
            assert logits[0, index].item() == pytest.approx(summand.mean(), abs=1e-5)


class TestSigns:
    @few
    @given(seed=st.integers(0, 999), height=st.integers(1, 15), width=st.integers(1, 15))
    def test_odd_where_both_signs_have_the_same_weights(self, seed, height, width):
        pooling, maps = pooling_of(3, seed=seed), maps_of(3, height, width, seed=seed)
        pooling.negative.load_state_dict(pooling.positive.state_dict())
        logits, fused = pooling(maps)
        other_logits, other_fused = pooling(-maps)
        torch.testing.assert_close(other_fused, -fused)
        torch.testing.assert_close(other_logits, -logits)

    def test_turning_the_maps_around_is_exchanging_the_two_sets_of_weights(self):
        pooling, other, maps = pooling_of(), pooling_of(seed=1), maps_of()
        other.positive.load_state_dict(pooling.negative.state_dict())
        other.negative.load_state_dict(pooling.positive.state_dict())
        torch.testing.assert_close(other(-maps)[0], -pooling(maps)[0])

    @few
    @given(seed=st.integers(0, 999))
    def test_the_fused_map_stays_within_the_levels(self, seed):
        """S lies in (0,1): no cell of P' is above the largest, or below the smallest, value that is averaged."""
        pooling, maps = pooling_of(3, seed=seed), maps_of(3, seed=seed)
        fused = pooling(maps)[1]
        assert bool((fused <= F.relu(maps.amax((2, 3), keepdim=True))).all())
        assert bool((fused >= -F.relu(-maps.amin((2, 3), keepdim=True))).all())

    @pytest.mark.parametrize("value", [1.5, -1.5, 0.0])
    def test_constant_maps(self, value):
        """All levels are the constant; away from the border the convolution sees it in all nine cells."""
        pooling, maps = pooling_of(1), torch.full((1, 1, 20, 20), value)
        logits, fused = pooling(maps)
        side = pooling.positive if value > 0 else pooling.negative
        size = abs(value)
        expected = size
        for convolution in side:
            weights = convolution.weight.detach().double()
            first, second = (weights * torch.tensor([expected, size])[None, :, None, None]).sum((1, 2, 3)).sigmoid()
            expected = float(expected * first + size * second) / 2
        sign = math.copysign(1, value) if value else 0
        assert fused[0, 0, 10, 10].item() == pytest.approx(sign * expected, abs=1e-5)
        if value:
            assert math.copysign(1, logits.item()) == sign
        else:
            assert logits.item() == 0

    def test_negative_maps_say_absent_with_confidence(self):
        logits, _ = PyramidFusionPooling(2)(torch.tensor([-8.0, 8.0])[None, :, None, None].expand(1, 2, 14, 14))
        absent, present = logits.sigmoid()[0].tolist()
        assert absent < 0.01
        assert present > 0.99

    def test_a_classifier_learns_what_is_absent(self):
        """The released code, with F cut off at 0, ends at a sigmoid of 1/2 for absent classes.

        Eq. 9 is quadratic in F and flat at F = 0: from some starts an absent class stays at 1/2 for hundreds of steps.
        """
        torch.manual_seed(2)
        tags = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
        features = torch.rand(4, 3, 12, 12) * 0.2
        features[:, 0, :, :6] += tags[:, :1, None]
        features[:, 1, :, 6:] += tags[:, 1:, None]
        features[:, 2] = 1.0
        network, pooling = torch.nn.Conv2d(3, 2, 1, bias=False), PyramidFusionPooling(2)
        torch.nn.init.xavier_uniform_(network.weight)
        optimizer = torch.optim.Adam([*network.parameters(), *pooling.parameters()], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(pooling(network(features))[0], tags).backward()
            optimizer.step()
        presence = pooling(network(features))[0].sigmoid().detach()
        assert float(presence[tags == 0].max()) < 0.01
        assert float(presence[tags == 1].min()) > 0.99


class TestWeights:
    @pytest.mark.parametrize(("classes", "scales"), [(2, (2, 4, 8, 16)), (1, (1, 2)), (4, (3, 5, 7))])
    def test_one_bias_free_convolution_a_step_and_sign(self, classes, scales):
        pooling = PyramidFusionPooling(classes, scales)
        for part in (pooling.positive, pooling.negative):
            assert isinstance(part, torch.nn.ModuleList)
            assert len(part) == len(scales) - 1
            for convolution in part:
                assert convolution.weight.shape == (2, 2 * classes, 3, 3)
                assert convolution.bias is None
        parameters = list(pooling.parameters())
        assert len({id(each) for each in parameters}) == 2 * (len(scales) - 1)

    @few
    @given(seed=st.integers(0, 999), classes=st.integers(1, 4))
    def test_gradient_reaches_every_convolution_and_the_maps(self, seed, classes):
        pooling, maps = pooling_of(classes, seed=seed), maps_of(classes, seed=seed).requires_grad_()
        pooling(maps)[0].sum().backward()
        for parameter in pooling.parameters():
            assert float(parameter.grad.abs().sum()) > 0
        assert bool(maps.grad.isfinite().all())
        assert float(maps.grad.abs().sum()) > 0

    def test_gradients_against_finite_differences(self):
        pooling, maps = pooling_of(2, (2, 3)).double(), maps_of(2, 3, 4).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda each: pooling(each), (maps,))

    def test_classes_meet_only_in_the_weights(self):
        """Where the convolutions are zero every weight is a half, and each class is pooled by itself."""
        pooling, maps = PyramidFusionPooling(3), maps_of(3)
        for parameter in pooling.parameters():
            torch.nn.init.zeros_(parameter)
        alone = PyramidFusionPooling(1)
        for parameter in alone.parameters():
            torch.nn.init.zeros_(parameter)
        for index in range(3):
            torch.testing.assert_close(pooling(maps)[0][:, index], alone(maps[:, index : index + 1])[0][:, 0])

    @pytest.mark.parametrize("size", [0.0, 1e-20, 1e4])
    def test_finite(self, size):
        pooling, maps = pooling_of(), (size * maps_of()).requires_grad_()
        logits, fused = pooling(maps)
        logits.sum().backward()
        for value in (logits, fused, maps.grad, *(each.grad for each in pooling.parameters())):
            assert bool(value.isfinite().all())

    def test_images_of_a_batch_do_not_meet(self):
        pooling, maps = pooling_of(), maps_of(batch=3)
        logits = pooling(maps)[0]
        for index in range(3):
            torch.testing.assert_close(pooling(maps[index : index + 1])[0][0], logits[index])

    def test_maps_are_left_as_they_are(self):
        maps = maps_of()
        before = maps.clone()
        pooling_of()(maps)
        assert torch.equal(maps, before)


@pytest.mark.parametrize("scales", [(), (4, 2), (2, 2), (0, 2), (-2, 4), (2, 8, 4)])
@pytest.mark.parametrize("fusion", ["sign_preserving", "average"])
def test_scales_that_are_no_pyramid_are_refused_in_one_line(scales, fusion):
    with pytest.raises(InputError, match="scales") as caught:
        PyramidFusionPooling(2, scales, fusion=fusion)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [0, -1])
def test_no_classes_are_refused_in_one_line(classes):
    with pytest.raises(InputError, match=f"num_classes {classes}"):
        PyramidFusionPooling(classes)
