"""Diversity losses and coverage against their equations in loops, in double precision; what they must not depend on."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tissuehint.errors import InputError
from tissuehint.nn.diversity import correlation_diversity_loss, jeffreys_diversity_loss, prototype_coverage

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10**6)
jeffreys = partial(jeffreys_diversity_loss, temperature=0.5)  # at .1 random prototypes are far apart, at a loss of 0
correlation = correlation_diversity_loss
SIZES = [  # B, N, K, H, W
    (1, 1, 2, 5, 5),
    (2, 2, 3, 5, 7),
    (3, 4, 2, 7, 5),
    (2, 3, 5, 9, 7),
    (1, 2, 4, 1, 19),
    (3, 1, 5, 5, 3),
]
KINDS = ["scattered", "blocks", "mixed"]
DIM = 6

both = pytest.mark.parametrize("loss_of", [jeffreys, correlation], ids=["jeffreys", "correlation"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regions_of(kind, images, number, height, width, *, seed=0):
    """Labels pixel by pixel; stripes with holes; or an image of one class, one without any, one of a single pixel."""
    scattered = integers(number + 1, images, height, width, seed=seed) - 1
    if kind == "scattered":
        return scattered
    if kind == "blocks":
        stripes = torch.arange(width) * number // width
        blocks = stripes.expand(images, height, width).clone()
        blocks[uniform(images, height, width, seed=seed) < 0.15] = -1
        return blocks
    mixed = torch.full((images, height, width), -1)
    mixed[0] = number - 1
    if images > 2:
        mixed[2, height // 2, width // 2] = 0
    return mixed


def case(images, number, most, height, width, *, kind="scattered", seed=0):
    """Features and prototypes of any length, and regions."""
    features = 5 * normal(images, DIM, height, width, seed=seed)
    prototypes = normal(number, most, DIM, seed=seed + 1) * (1 + 9 * uniform(number, most, 1, seed=seed + 2))
    return features, prototypes, regions_of(kind, images, number, height, width, seed=seed + 3)


def cosine(first, second):
    return first @ second / (first.square().sum().sqrt() * second.square().sum().sqrt())


def mean(values):
    """0 where there are none."""
    return sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def present_classes(prototypes, region, least):
    return [number for number in range(len(prototypes)) if int((region == number).sum()) >= least]


def jeffreys_slowly(features, prototypes, regions, *, temperature=0.1, min_pixels=None):
    most = prototypes.shape[1]
    least = 2 * most if min_pixels is None else min_pixels
    of_images = []
    for feature, region in zip(features, regions, strict=True):
        of_classes = []
        for number in present_classes(prototypes, region, least):
            places = [(y, x) for y in range(region.shape[0]) for x in range(region.shape[1]) if region[y, x] == number]
            shares = []
            for prototype in prototypes[number]:
                scores = torch.stack([cosine(feature[:, y, x], prototype) / temperature for y, x in places])
                powers = (scores - scores.max().detach()).exp()
                shares.append(powers / powers.sum())
            of_pairs = []
            for first, second in combinations(shares, 2):
                forth = sum(u * (u.log() - v.log()) for u, v in zip(first, second, strict=True))
                back = sum(v * (v.log() - u.log()) for u, v in zip(first, second, strict=True))
                of_pairs.append((-(forth + back)).exp())
            of_classes.append(mean(of_pairs))
        if of_classes:
            of_images.append(mean(of_classes))
    return mean(of_images)


def windows_slowly(values, window):
    """Mean over the window around each pixel; what lies outside of the image counts as 0."""
    height, width, half = *values.shape, window // 2
    rows = []
    for y in range(height):
        for x in range(width):
            part = values[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
            rows.append(part.sum() / window**2)
    return torch.stack(rows)


def correlation_slowly(features, prototypes, regions, *, window=7, min_mass=0.05):
    most = prototypes.shape[1]
    of_images = []
    for feature, region in zip(features, regions, strict=True):
        of_classes = []
        for number in range(len(prototypes)):
            inside = (region == number).double()
            mass = windows_slowly(inside, window)
            kept = [place for place, value in enumerate(mass.tolist()) if value > min_mass]
            if len(kept) < 2 or most == 1:
                continue
            columns = []
            for prototype in prototypes[number]:
                cosines = torch.stack([cosine(pixel, prototype) for pixel in feature.flatten(1).T]).view(region.shape)
                smooth = (windows_slowly(cosines * inside, window) / (mass + 1e-8))[kept]
                centred = smooth - sum(smooth) / len(kept)
                columns.append(centred / (torch.linalg.vector_norm(centred) + 1e-8))
            of_pairs = [(first @ second).square() for first, second in combinations(columns, 2)]
            of_classes.append(2 * sum(of_pairs) / (most * (most - 1)))
        if of_classes:
            of_images.append(mean(of_classes))
    return mean(of_images)


SLOWLY = {jeffreys_diversity_loss: jeffreys_slowly, correlation_diversity_loss: correlation_slowly}


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)


def leaves_of(*values):
    return [each.detach().clone().requires_grad_() for each in values]


def assert_as_slowly(loss_of, given, **options):
    """Value and both gradients; returns the value."""
    features, prototypes = leaves_of(*given[:2])
    found = loss_of(features, prototypes, given[2], **options)
    expected = SLOWLY[loss_of](features, prototypes, given[2], **options)
    assert found.shape == ()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    if expected.requires_grad:
        wanted = gradients(expected, [features, prototypes])
        torch.testing.assert_close(gradients(found, [features, prototypes]), wanted, rtol=1e-5, atol=1e-9)
    return float(found.detach())


def assert_one_line(raised, *words):
    error, text = raised.value, str(raised.value)
    assert "\n" not in text
    assert error.subject
    assert error.rule
    assert error.fix
    assert all(word in text for word in words), text


class TestJeffreysAgainstLoops:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("temperature", [1.0, 0.1])
    def test_values(self, size, kind, temperature):
        given = case(*size, kind=kind)
        for least in (1, 3):
            assert assert_as_slowly(jeffreys_diversity_loss, given, temperature=temperature, min_pixels=least) > 0

    @pytest.mark.parametrize("size", SIZES)
    def test_defaults(self, size):
        given = case(*size, kind="blocks")
        expected = jeffreys_slowly(*given, temperature=0.1, min_pixels=2 * size[2])
        assert float(jeffreys_diversity_loss(*given)) == pytest.approx(float(expected), rel=1e-7)
        assert expected > 0

    @few
    @given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from(KINDS), seeds)
    def test_any_case(self, images, number, most, kind, seed):
        height, width = (2 * integers(4, 2, seed=seed) + 1).tolist()
        given = case(images, number, most, height, width, kind=kind, seed=seed)
        for least in (None, 2):
            assert_as_slowly(jeffreys_diversity_loss, given, temperature=0.3, min_pixels=least)

    def test_two_pixels(self):
        r"""Pixels and prototypes along two axes: J = 2 tanh(1 / 2T) / T."""
        features = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2)
        prototypes = torch.eye(2, dtype=torch.float64)[None]
        regions = torch.zeros(1, 1, 2, dtype=torch.long)
        for temperature in (2.0, 1.0, 0.5, 0.1):
            found = jeffreys_diversity_loss(features, prototypes, regions, temperature=temperature, min_pixels=2)
            distance = 2 * math.tanh(1 / (2 * temperature)) / temperature
            assert float(found) == pytest.approx(math.exp(-distance), rel=1e-9)


class TestCorrelationAgainstLoops:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("window", [1, 3, 7])
    def test_values(self, size, kind, window):
        assert assert_as_slowly(correlation_diversity_loss, case(*size, kind=kind), window=window) > 0

    @pytest.mark.parametrize("min_mass", [0.0, 0.3, 0.5])
    def test_min_mass(self, min_mass):
        """At .3 and .5 it drops positions at the border of a region, at 0 it keeps those outside of it."""
        given = case(2, 2, 3, 7, 7, kind="blocks")
        found = assert_as_slowly(correlation_diversity_loss, given, window=3, min_mass=min_mass)
        assert abs(found - float(correlation_diversity_loss(*given, window=3))) > 1e-4 or min_mass == 0

    def test_defaults(self):
        given = case(2, 2, 3, 9, 9, kind="blocks")
        expected = float(correlation_slowly(*given, window=7, min_mass=0.05))
        assert float(correlation_diversity_loss(*given)) == pytest.approx(expected, rel=1e-7)
        assert abs(float(correlation_diversity_loss(*given, window=5)) - expected) > 1e-4
        assert abs(float(correlation_diversity_loss(*given, min_mass=0.3)) - expected) > 1e-4

    @few
    @given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from(KINDS), seeds)
    def test_any_case(self, images, number, most, kind, seed):
        height, width = (2 * integers(4, 2, seed=seed) + 1).tolist()
        given = case(images, number, most, height, width, kind=kind, seed=seed)
        assert_as_slowly(correlation_diversity_loss, given, window=int(2 * integers(4, 1, seed=seed)) + 1)

    @pytest.mark.parametrize(
        ("first", "second", "correlation"),
        [
            ([1, 1, -1, -1], [1, -1, 1, -1], 0.0),
            ([1, 1, -1, -1], [1, 1, -1, -1], 1.0),
            ([1, 1, -1, -1], [-1, -1, 1, 1], -1.0),
            ([1, 1, 1, -1], [1, 1, -1, -1], 1 / math.sqrt(3)),
        ],
    )
    def test_four_pixels(self, first, second, correlation):
        """Without smoothing the loss is the square of Pearson's correlation, whichever its sign."""
        features = torch.tensor([first, second], dtype=torch.float64).view(1, 2, 2, 2)
        prototypes = torch.eye(2, dtype=torch.float64)[None]
        regions = torch.zeros(1, 2, 2, dtype=torch.long)
        found = correlation_diversity_loss(features, prototypes, regions, window=1)
        assert float(found) == pytest.approx(correlation**2, abs=1e-7)

    def test_smoothing_forgets_what_alternates(self):
        """Two maps, equal but for a checkerboard: close to uncorrelated pixel by pixel, correlated when smooth."""
        rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
        checkerboard, ramp = ((rows + columns) % 2 * 2 - 1).double(), (columns - 4).double() / 4
        features = torch.stack([ramp + 2 * checkerboard, ramp - 2 * checkerboard, torch.full((9, 9), 20.0)])[None]
        prototypes = torch.eye(3, dtype=torch.float64)[None, :2]
        regions = torch.zeros(1, 9, 9, dtype=torch.long)
        assert correlation_diversity_loss(features, prototypes, regions, window=1) > 0.3
        assert correlation_diversity_loss(features, prototypes, regions, window=7) > 0.9
        opposite = features * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
        assert correlation_diversity_loss(opposite, prototypes, regions, window=7) > 0.9


class TestGradients:
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "min_pixels": 1}])
    def test_jeffreys(self, options):
        self.check(jeffreys_diversity_loss, options)

    @pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 1, "min_mass": 0.5}])
    def test_correlation(self, options):
        self.check(correlation_diversity_loss, options)

    @staticmethod
    def check(loss_of, options):
        features, prototypes = leaves_of(normal(2, 3, 3, 10), normal(2, 2, 3, seed=1))
        regions = torch.tensor(
            [
                [[0, 0, 0, 1, 1], [0, -1, -1, 1, 1], [0, 0, -1, -1, 1]],
                [[0, -1, -1, -1, -1], [-1, 1, -1, 1, 1], [-1, 1, 1, -1, -1]],
            ]
        ).repeat_interleave(2, 2)  # wider than the largest window
        assert torch.autograd.gradcheck(lambda *given: loss_of(*given, regions, **options), [features, prototypes])
        for gradient in gradients(loss_of(features, prototypes, regions, **options), [features, prototypes]):
            assert gradient.abs().max() > 1e-4

    @both
    @pytest.mark.parametrize("seed", range(5))
    def test_a_step_against_the_gradient_lowers_the_loss(self, loss_of, seed):
        features, prototypes, regions = case(2, 2, 3, 7, 7, seed=seed)
        features, prototypes = leaves_of(features, prototypes)
        before = loss_of(features, prototypes, regions)
        for number, gradient in enumerate(gradients(before, [features, prototypes])):
            assert gradient.norm() > 1e-6
            moved = [features.detach(), prototypes.detach()]
            moved[number] = moved[number] - 1e-3 * gradient / gradient.norm()
            assert loss_of(*moved, regions) < before

    @pytest.mark.parametrize("loss_of", [jeffreys_diversity_loss, correlation_diversity_loss])
    def test_descent_spreads_prototypes_that_almost_agree(self, loss_of):
        features, _, regions = case(2, 2, 3, 7, 7)
        prototypes = (normal(2, 1, DIM, seed=5) + 0.05 * normal(2, 3, DIM, seed=6)).requires_grad_()
        before = float(loss_of(features, prototypes, regions).detach())
        optimizer = torch.optim.Adam([prototypes], lr=0.1)
        for _ in range(30):
            optimizer.zero_grad()
            loss_of(features, prototypes, regions).backward()
            optimizer.step()
        assert before > 0.7
        assert loss_of(features, prototypes, regions) < 0.3

    @both
    def test_pixels_outside_of_every_region(self, loss_of):
        features, prototypes, regions = case(2, 3, 2, 7, 7)
        features.requires_grad_()
        (gradient,) = gradients(loss_of(features, prototypes, regions), [features])
        outside = (regions == -1)[:, None].expand_as(features)
        assert outside.any()
        assert not gradient[outside].any()
        inside = gradient.movedim(1, 0)[:, regions >= 0]
        assert (inside.abs().amax(0) > 0).float().mean() > 0.95

    def test_regions_of_too_few_pixels(self):
        """They are as those outside: of no loss and of no gradient, for pixels and prototypes."""
        features, prototypes = leaves_of(normal(1, DIM, 3, 5), normal(2, 3, DIM))
        regions = torch.zeros(1, 3, 5, dtype=torch.long)
        regions[0, 1] = 1  # five pixels of the six that three prototypes need
        found = jeffreys_diversity_loss(features, prototypes, regions)
        of_features, of_prototypes = gradients(found, [features, prototypes])
        assert not of_features[0, :, 1].any()
        assert not of_prototypes[1].any()
        assert of_features[0, :, [0, 2]].any()
        assert of_prototypes[0].any()
        without = torch.where(regions == 1, -1, regions)
        assert found == jeffreys_diversity_loss(features, prototypes, without)
        assert found != jeffreys_diversity_loss(features, prototypes, regions, min_pixels=5)


class TestInvariants:
    @few
    @given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), seeds)
    def test_ranges(self, images, number, most, seed):
        given = case(images, number, most, 7, 7, kind="blocks", seed=seed)
        for temperature in (0.1, 1.0, 100.0):
            found = jeffreys_diversity_loss(*given, temperature=temperature, min_pixels=2)
            assert 0 < found <= 1 + 1e-12
        assert 0 < correlation_diversity_loss(*given) <= 1 + 1e-12

    @both
    @few
    @given(
        sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5)),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        seed=seeds,
    )
    def test_identical_prototypes(self, loss_of, sizes, dtype, seed):
        features, prototypes, regions = case(*sizes, 9, 9, kind="blocks", seed=seed)
        same = prototypes[:, :1].expand_as(prototypes).to(dtype)
        found = float(loss_of(features.to(dtype), same, regions))
        assert found == pytest.approx(1, abs=1e-12 if loss_of is jeffreys and dtype == torch.float64 else 1e-5)

    def test_far_prototypes(self):
        """Each on its own half of the region."""
        features = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
        features[:, 0, :2], features[:, 1, 2:] = 1, 1
        prototypes, regions = torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 4, 4, dtype=torch.long)
        assert 0 < jeffreys_diversity_loss(features, prototypes, regions) < 1e-8
        assert jeffreys_diversity_loss(features, prototypes, regions, temperature=10.0) > 0.9

    def test_jeffreys_knows_opposites_and_correlation_does_not(self):
        features, prototypes, regions = case(1, 1, 1, 7, 7)
        pair = torch.cat([prototypes, -prototypes], 1)
        assert 0 < jeffreys_diversity_loss(features, pair, regions) < 0.01
        assert float(correlation_diversity_loss(features, pair, regions)) == pytest.approx(1, abs=1e-5)

    @both
    @few
    @given(seed=seeds)
    def test_order_of_prototypes_classes_and_images(self, loss_of, seed):
        features, prototypes, regions = case(3, 3, 4, 7, 7, kind="blocks", seed=seed)
        expected = loss_of(features, prototypes, regions)
        assert expected > 0
        mixed = torch.stack([each[torch.randperm(4)] for each in prototypes])
        torch.testing.assert_close(loss_of(features, mixed, regions), expected)
        order = [2, 0, 1]
        torch.testing.assert_close(loss_of(features[order], prototypes, regions[order]), expected)
        renamed = torch.tensor([1, 2, 0, -1])[regions]  # class c is now class c + 1; -1 reads the last
        torch.testing.assert_close(loss_of(features, prototypes[order], renamed), expected)

    @both
    @few
    @given(seed=seeds, exponent=st.integers(-3, 3))
    def test_lengths(self, loss_of, seed, exponent):
        features, prototypes, regions = case(2, 3, 3, 7, 7, seed=seed)
        longer = features * (0.1 + uniform(2, 1, 7, 7, seed=seed)) * 10.0**exponent
        expected = loss_of(features, prototypes, regions)
        torch.testing.assert_close(loss_of(longer, prototypes, regions), expected)
        torch.testing.assert_close(loss_of(features, prototypes * (0.1 + uniform(3, 3, 1)), regions), expected)

    @both
    @few
    @given(seed=seeds)
    def test_flips(self, loss_of, seed):
        features, prototypes, regions = case(2, 2, 3, 7, 5, seed=seed)
        expected = loss_of(features, prototypes, regions)
        turned = features.transpose(2, 3).flip(2), prototypes, regions.transpose(1, 2).flip(1)
        torch.testing.assert_close(loss_of(*turned), expected)

    @both
    @few
    @given(seed=seeds)
    def test_features_outside_of_every_region(self, loss_of, seed):
        features, prototypes, regions = case(2, 3, 2, 7, 7, seed=seed)
        other = torch.where((regions == -1)[:, None], 100 * normal(*features.shape, seed=seed + 9), features)
        assert not torch.equal(other, features)
        torch.testing.assert_close(loss_of(other, prototypes, regions), loss_of(features, prototypes, regions))

    @both
    @few
    @given(seed=seeds)
    def test_images_without_regions(self, loss_of, seed):
        features, prototypes, regions = case(2, 3, 2, 7, 7, seed=seed)
        more = torch.cat([normal(1, DIM, 7, 7, seed=seed + 9), features, normal(1, DIM, 7, 7, seed=seed + 8)])
        empty = torch.full((1, 7, 7), -1)
        expected = loss_of(features, prototypes, regions)
        assert expected > 0
        torch.testing.assert_close(loss_of(more, prototypes, torch.cat([empty, regions, empty])), expected)

    @both
    @few
    @given(seed=seeds)
    def test_classes_without_regions(self, loss_of, seed):
        """They do not enlarge what is divided by."""
        features, prototypes, regions = case(2, 2, 3, 7, 7, seed=seed)
        more = torch.cat([prototypes, normal(2, 3, DIM, seed=seed + 9)])
        torch.testing.assert_close(loss_of(features, more, regions), loss_of(features, prototypes, regions))

    @both
    def test_mean_over_classes_first_and_images_then(self, loss_of):
        """An image of one class weighs as much as one of two, whatever their sizes."""
        features, prototypes, _ = case(2, 2, 2, 5, 6)
        regions = torch.full((2, 5, 6), -1)
        regions[0, :, :4], regions[0, :, 4:], regions[1, 1:4, 1:] = 0, 1, 1

        def alone(image, number):
            region = torch.where(regions[image] == number, number, -1)
            return float(loss_of(features[image : image + 1], prototypes, region[None]))

        first, second, third = alone(0, 0), alone(0, 1), alone(1, 1)
        assert len({round(each, 4) for each in (first, second, third)}) == 3
        found = float(loss_of(features, prototypes, regions))
        assert found == pytest.approx(((first + second) / 2 + third) / 2, rel=1e-9)
        assert found != pytest.approx((first + second + third) / 3, rel=1e-4)

    def test_pixels_that_a_region_needs(self):
        """2K without min_pixels, so one of 2K - 1 is none."""
        features, prototypes = normal(1, DIM, 1, 9), normal(1, 3, DIM)
        for pixels in range(1, 10):
            regions = torch.full((1, 1, 9), -1)
            regions[0, 0, :pixels] = 0
            assert (jeffreys_diversity_loss(features, prototypes, regions) > 0) == (pixels >= 6)
            assert (jeffreys_diversity_loss(features, prototypes, regions, min_pixels=4) > 0) == (pixels >= 4)

    def test_a_region_of_one_pixel_agrees_with_itself(self):
        features, prototypes = leaves_of(normal(1, DIM, 3, 3), normal(1, 3, DIM))
        regions = torch.full((1, 3, 3), -1)
        regions[0, 1, 1] = 0
        found = jeffreys_diversity_loss(features, prototypes, regions, min_pixels=1)
        assert float(found.detach()) == 1
        assert not any(gradient.any() for gradient in gradients(found, [features, prototypes]))


class TestPrecision:
    @both
    @few
    @given(seed=seeds, kind=st.sampled_from(KINDS))
    def test_single(self, loss_of, seed, kind):
        features, prototypes, regions = case(2, 2, 3, 9, 9, kind=kind, seed=seed)
        expected = float(loss_of(features, prototypes, regions))
        found = loss_of(features.float(), prototypes.float(), regions)
        assert found.dtype == torch.float32
        assert expected > 0
        assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-6)

    @pytest.mark.parametrize(("window", "pixels"), [(3, 1), (7, 3)])
    @pytest.mark.parametrize("seed", range(5))
    def test_single_where_the_smooth_maps_are_constant(self, window, pixels, seed):
        """Each window kept sees the whole region: what varies in the maps is rounding, which must not correlate."""
        features, prototypes, _ = case(1, 1, 4, 9, 9, seed=seed)
        regions = torch.full((1, 9, 9), -1)
        regions[0, 3, 3 : 3 + pixels] = 0
        assert float(correlation_diversity_loss(features, prototypes, regions, window=window)) < 1e-6
        leaves = leaves_of(features.float(), prototypes.float())
        found = correlation_diversity_loss(*leaves, regions, window=window)
        assert float(found.detach()) < 1e-3
        assert all(gradient.abs().max() < 1 for gradient in gradients(found, leaves))

    @both
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("of_prototypes", [torch.float32, None])
    def test_half(self, loss_of, dtype, of_prototypes):
        """Squares of these features are above the largest number of float16."""
        features, prototypes, regions = case(2, 2, 3, 9, 9, kind="blocks")
        leaves = leaves_of((100 * features).to(dtype), prototypes.to(of_prototypes or dtype))
        expected = loss_of(*(each.detach().double() for each in leaves), regions)
        found = loss_of(*leaves, regions)
        assert found.dtype == torch.float32
        assert float(found.detach()) == pytest.approx(float(expected), rel=1e-3)
        for leaf, gradient in zip(leaves, gradients(found, leaves), strict=True):
            assert gradient.dtype == leaf.dtype
            assert gradient.isfinite().all()
            assert gradient.any()

    @pytest.mark.parametrize(
        ("loss_of", "options"), [(jeffreys_diversity_loss, {"temperature": 0.05}), (correlation_diversity_loss, {})]
    )
    def test_mixed_precision_does_not_reach_the_losses(self, loss_of, options):
        features, prototypes, regions = case(2, 2, 3, 9, 9, kind="blocks")
        given = features.float(), prototypes.float(), regions
        expected = float(loss_of(*given, **options))
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_of(*given, **options)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("temperature", [1e-3, 1e3])
    def test_extreme_temperatures(self, dtype, temperature):
        features, prototypes, regions = case(2, 2, 3, 7, 7, kind="blocks")
        prototypes[0, 1] = prototypes[0, 0]  # one pair of three agrees at any temperature
        leaves = leaves_of(features.to(dtype), prototypes.to(dtype))
        found = jeffreys_diversity_loss(*leaves, regions, temperature=temperature)
        low, high = (0.16, 0.34) if temperature < 1 else (0.999, 1)
        assert low < float(found.detach()) <= high
        assert all(gradient.isfinite().all() for gradient in gradients(found, leaves))

    @both
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_zero_vectors(self, loss_of, dtype):
        features, prototypes, regions = case(2, 2, 2, 7, 7, kind="blocks")
        features[:, :, 2:4], prototypes[1, 0] = 0, 0
        leaves = leaves_of(features.to(dtype), prototypes.to(dtype))
        found = loss_of(*leaves, regions)
        assert 0 < float(found.detach()) <= 1
        assert all(gradient.isfinite().all() for gradient in gradients(found, leaves))

    @both
    def test_features_that_are_all_zero(self, loss_of):
        """The maps are flat: every distribution is the same, and nothing correlates."""
        _, prototypes, regions = case(1, 2, 2, 7, 7, kind="blocks")
        leaves = leaves_of(torch.zeros(1, DIM, 7, 7), prototypes.float())
        found = loss_of(*leaves, regions)
        assert float(found.detach()) == pytest.approx(1 if loss_of is jeffreys else 0, abs=1e-6)
        assert all(gradient.isfinite().all() for gradient in gradients(found, leaves))

    @both
    def test_types_of_regions(self, loss_of):
        features, prototypes, regions = case(2, 2, 2, 7, 7)
        expected = loss_of(features, prototypes, regions)
        for dtype in (torch.int32, torch.int16, torch.int8):
            assert loss_of(features, prototypes, regions.to(dtype)) == expected


class TestNothingThere:
    @both
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", ["no region", "one prototype", "no image"])
    def test_zero_with_gradient(self, loss_of, dtype, name):
        sizes = {"no region": (2, 2, 3, 5, 5), "one prototype": (2, 2, 1, 5, 5), "no image": (0, 2, 3, 5, 5)}
        images, number, most, height, width = sizes[name]
        features = normal(images, DIM, height, width).to(dtype)
        leaves = leaves_of(features, normal(number, most, DIM).to(dtype))
        regions = torch.full((images, height, width), 0 if name == "one prototype" else -1)
        found = loss_of(*leaves, regions)
        assert found.shape == ()
        assert found.dtype == dtype
        assert float(found.detach()) == 0
        assert found.requires_grad
        (found + leaves[0].sum() + leaves[1].sum()).backward()  # as one part of a loss
        assert all(torch.equal(leaf.grad, torch.ones_like(leaf)) for leaf in leaves)

    def test_regions_too_small(self):
        """Jeffreys: fewer pixels than 2K. Correlation: a single position is left."""
        leaves = leaves_of(normal(1, DIM, 5, 5), normal(1, 3, DIM))
        regions = torch.full((1, 5, 5), -1)
        regions[0, 2, 2] = 0
        for found in (
            jeffreys_diversity_loss(*leaves, regions),
            jeffreys_diversity_loss(*leaves, regions, min_pixels=2),
            correlation_diversity_loss(*leaves, regions, window=1),
            correlation_diversity_loss(*leaves, regions, min_mass=0.99),
        ):
            assert float(found.detach()) == 0
            found.backward(retain_graph=True)
            for gradient in gradients(found, leaves):
                assert not gradient.any()

    def test_a_module_learns_on(self):
        """A step over a batch without any region leaves the weights where they are, none of them NaN."""
        layer = nn.Conv2d(3, DIM, 1)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        for loss_of in (jeffreys, correlation):
            loss_of(layer(torch.ones(2, 3, 4, 4)), torch.ones(2, 2, DIM), torch.full((2, 4, 4), -1)).backward()
        optimizer.step()
        assert torch.equal(layer.weight.detach(), before)


class TestErrorsOfLosses:
    @both
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"features": normal(DIM, 5, 5)}, ["features", "(6, 5, 5)"]),
            ({"features": normal(2, 1, DIM, 5, 5)}, ["features", "(2, 1, 6, 5, 5)"]),
            ({"features": normal(2, DIM + 1, 5, 5)}, ["7", "6"]),
            ({"prototypes": normal(4, DIM)}, ["prototypes", "(4, 6)"]),
            ({"prototypes": normal(1, 2, 2, DIM)}, ["prototypes", "(1, 2, 2, 6)"]),
            ({"prototypes": normal(2, 2, DIM - 1)}, ["5", "6"]),
            ({"regions": integers(2, 5, 5)}, ["regions", "(5, 5)"]),
            ({"regions": integers(2, 2, 1, 5, 5)}, ["regions", "(2, 1, 5, 5)"]),
            ({"regions": integers(2, 3, 5, 5)}, ["regions", "(3, 5, 5)"]),
            ({"regions": integers(2, 1, 5, 5)}, ["regions", "(1, 5, 5)"]),
            ({"regions": integers(2, 2, 5, 10)}, ["regions", "(2, 5, 10)"]),
            ({"regions": integers(2, 2, 1, 1)}, ["regions", "(2, 1, 1)"]),
            ({"regions": torch.full((2, 5, 5), 2)}, ["regions", "2"]),
            ({"regions": torch.full((2, 5, 5), 255)}, ["regions", "255"]),
        ],
    )
    def test_inputs(self, loss_of, changes, words):
        names = ["features", "prototypes", "regions"]
        arguments = dict(zip(names, case(2, 2, 2, 5, 5), strict=True))
        loss_of(**arguments)
        with pytest.raises(InputError) as raised:
            loss_of(**(arguments | changes))
        assert_one_line(raised, *words)

    @pytest.mark.parametrize(
        ("loss_of", "options", "words"),
        [
            (jeffreys_diversity_loss, {"temperature": 0.0}, ["temperature 0.0"]),
            (jeffreys_diversity_loss, {"temperature": -0.1}, ["temperature -0.1"]),
            (jeffreys_diversity_loss, {"temperature": float("nan")}, ["temperature nan"]),
            (jeffreys_diversity_loss, {"min_pixels": 0}, ["0", "1"]),
            (jeffreys_diversity_loss, {"min_pixels": -3}, ["-3"]),
            (correlation_diversity_loss, {"window": 0}, ["window 0", "odd"]),
            (correlation_diversity_loss, {"window": 6}, ["window 6", "odd"]),
            (correlation_diversity_loss, {"window": -1}, ["window -1", "odd"]),
        ],
    )
    @pytest.mark.parametrize("most", [1, 2])
    @pytest.mark.parametrize("empty", [False, True])
    def test_options(self, loss_of, options, words, most, empty):
        """Also where there is nothing to compute."""
        features, prototypes, regions = case(2, 2, most, 5, 5)
        with pytest.raises(InputError) as raised:
            loss_of(features, prototypes, torch.full_like(regions, -1) if empty else regions, **options)
        assert_one_line(raised, *words)

    @both
    def test_a_class_of_one_prototype_too_many(self, loss_of):
        """Regions of classes without prototypes are found also where K = 1."""
        features, prototypes, regions = case(2, 2, 1, 5, 5)
        regions[1, 4, 4] = 2
        with pytest.raises(InputError):
            loss_of(features, prototypes, regions)


def coverage_slowly(maps, regions, counts, share=0.2):
    """Both measures as lists, NaN where a class has no region or no pair."""
    starts = [sum(counts[:number]) for number in range(len(counts))]
    coverages, overlaps = [], []
    for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
        of_images = []
        for image, region in zip(maps.tolist(), regions.tolist(), strict=True):
            places = [(y, x) for y, row in enumerate(region) for x, value in enumerate(row) if value == number]
            if len(places) < 2 * count:
                continue
            active = []
            for channel in image[start : start + count]:
                by_value = sorted(places, key=lambda place: (-channel[place[0]][place[1]], place))
                active.append(set(by_value[: math.ceil(share * len(places))]))
            pairs = [len(first & second) / len(first | second) for first, second in combinations(active, 2)]
            of_images.append((len(set().union(*active)) / len(places), sum(pairs) / len(pairs) if pairs else math.nan))
        for values, parts in ((coverages, 0), (overlaps, 1)):
            values.append(sum(each[parts] for each in of_images) / len(of_images) if of_images else math.nan)
    return coverages, overlaps


def assert_coverage(found, coverages, overlaps):
    for values, expected in ((found.coverage, coverages), (found.overlap, overlaps)):
        assert values.dtype == torch.float64
        assert values.shape == (len(expected),)
        assert values.tolist() == pytest.approx(expected, nan_ok=True, rel=1e-9)


class TestPrototypeCoverage:
    @pytest.mark.parametrize("share", [0.2, 0.25, 0.5, 1.0, 1e-6])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("counts", [[1], [4], [2, 2], [3, 1, 2], [1, 5, 2, 3]])
    def test_against_loops(self, counts, kind, share):
        maps = normal(3, sum(counts), 9, 7)
        regions = regions_of(kind, 3, len(counts), 9, 7)
        expected = coverage_slowly(maps, regions, counts, share)
        assert not all(map(math.isnan, expected[0]))
        assert_coverage(prototype_coverage(maps, regions, counts, share=share), *expected)

    @few
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(KINDS), st.integers(1, 3), seeds)
    def test_any_case_with_ties(self, counts, kind, images, seed):
        height, width = (2 * integers(5, 2, seed=seed) + 1).tolist()
        maps = integers(3, images, sum(counts), height, width, seed=seed).double() - 1
        regions = regions_of(kind, images, len(counts), height, width, seed=seed)
        expected = coverage_slowly(maps, regions, counts)
        assert_coverage(prototype_coverage(maps, regions, counts), *expected)
        assert_coverage(prototype_coverage(maps.half(), regions.int(), tuple(counts)), *expected)

    def test_by_hand(self):
        """Ten pixels of class 1, two active ones a prototype: the first two agree in one, the third has its own."""
        maps = torch.zeros(1, 4, 3, 4)
        regions = torch.full((1, 3, 4), -1)
        regions[0].view(-1)[:10] = 1
        maps[0, 1].view(-1)[[0, 1]] = 1.0
        maps[0, 2].view(-1)[[1, 2]] = 1.0
        maps[0, 3].view(-1)[[8, 9]] = 1.0
        maps[0, :, 2, 2:] = 9.0  # outside of the region
        coverage, overlap = prototype_coverage(maps, regions, [1, 3])
        assert math.isnan(coverage[0])
        assert float(coverage[1]) == pytest.approx(0.5)
        assert math.isnan(overlap[0])
        assert float(overlap[1]) == pytest.approx((1 / 3 + 0 + 0) / 3)

    def test_is_a_named_tuple(self):
        found = prototype_coverage(normal(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long), [2])
        assert found._fields == ("coverage", "overlap")
        assert isinstance(found, tuple)
        assert found[0] is found.coverage
        assert found[1] is found.overlap

    @pytest.mark.parametrize("pixels", range(4, 41))
    def test_number_of_active_pixels(self, pixels):
        """ceil(n / 5), also where n / 5 is whole; equal values count from the first pixel on."""
        maps = torch.zeros(1, 2, 1, pixels + 3)
        regions = torch.full((1, 1, pixels + 3), -1)
        regions[0, 0, 2:-1] = 0
        active = -(-pixels // 5)
        assert_coverage(prototype_coverage(maps, regions, [2]), [active / pixels], [1.0])
        maps[0, 1, 0, 2 + active : 2 + 2 * active] = 1.0
        assert_coverage(prototype_coverage(maps, regions, [2]), [2 * active / pixels], [0.0])
        maps[0, 1] = 0
        maps[0, 1, 0, 1 + 2 * active] = 1.0  # and then the first ones, but for the last of them
        assert_coverage(prototype_coverage(maps, regions, [2]), [(active + 1) / pixels], [(active - 1) / (active + 1)])

    def test_a_tie_at_the_last_place(self):
        """Three of fifteen: the highest, and of the equal ones the first two by row, not by column."""
        maps, regions = torch.zeros(1, 2, 3, 5), torch.zeros(1, 3, 5, dtype=torch.long)
        maps[0, :, 2, 4] = 2.0
        maps[0, 0, 0, 3], maps[0, 0, 1, 1], maps[0, 0, 1, 0] = 1.0, 1.0, 1.0  # row-major: (0,3), (1,0), (1,1)
        maps[0, 1, 0, 3], maps[0, 1, 1, 1] = 1.5, 1.5
        found = prototype_coverage(maps, regions, [2])
        assert_coverage(found, [4 / 15], [2 / 4])
        maps[0, 1, 1, 1], maps[0, 1, 1, 0] = 0, 1.5
        assert_coverage(prototype_coverage(maps, regions, [2]), [3 / 15], [1.0])

    def test_pixels_that_a_region_needs(self):
        """2K of the own class, not of the largest."""
        for pixels in range(1, 9):
            regions = torch.full((1, 1, 16), -1)
            regions[0, 0, :pixels], regions[0, 0, 8 : 8 + pixels] = 0, 1
            coverage, overlap = prototype_coverage(normal(1, 4, 1, 16), regions, [1, 3])
            assert coverage.isfinite().tolist() == [pixels >= 2, pixels >= 6]
            assert overlap.isfinite().tolist() == [False, pixels >= 6]

    @few
    @given(st.integers(1, 5), st.sampled_from([0.1, 0.2, 0.5, 1.0]), seeds)
    def test_ranges(self, most, share, seed):
        maps, regions = normal(2, 2 * most, 7, 7, seed=seed), regions_of("blocks", 2, 2, 7, 7, seed=seed)
        coverage, overlap = prototype_coverage(maps, regions, [most, most], share=share)
        assert (coverage >= share).all()
        assert (coverage <= 1).all()
        if most == 1:
            assert overlap.isnan().all()
        else:
            assert (overlap >= 0).all()
            assert (overlap <= 1).all()
        if share == 1:
            assert (coverage == 1).all()
            assert most == 1 or (overlap == 1).all()

    @few
    @given(st.integers(2, 5), seeds)
    def test_what_does_not_count(self, most, seed):
        counts = [most, 1, 2]
        maps, regions = normal(3, most + 3, 9, 9, seed=seed), regions_of("blocks", 3, 3, 9, 9, seed=seed)
        expected = [each.tolist() for each in prototype_coverage(maps, regions, counts)]
        assert not math.isnan(expected[0][0])
        order = [*torch.randperm(most).tolist(), most, most + 2, most + 1]
        assert_coverage(prototype_coverage(maps[:, order], regions, counts), *expected)
        assert_coverage(prototype_coverage(maps.flip(0), regions.flip(0), counts), *expected)
        assert_coverage(prototype_coverage(maps.exp() * 3 - 1, regions, counts), *expected)
        assert_coverage(
            prototype_coverage(maps - 1e12, regions, counts), *coverage_slowly(maps - 1e12, regions, counts)
        )
        outside = torch.where((regions == -1)[:, None], 1e30, maps)
        assert_coverage(prototype_coverage(outside, regions, counts), *expected)
        more = torch.cat([maps, normal(1, most + 3, 9, 9)]), torch.cat([regions, torch.full((1, 9, 9), -1)])
        assert_coverage(prototype_coverage(*more, counts), *expected)

    def test_the_lowest_number_is_still_inside(self):
        """Pixels outside do not take the place of those inside, however low these are."""
        maps = torch.full((1, 2, 3, 3), torch.finfo(torch.float32).min)
        regions = torch.full((1, 3, 3), -1)
        regions[0, 1:] = 0
        maps[0, 1, 2, 1:] = 0
        assert_coverage(prototype_coverage(maps, regions, [2], share=1 / 3), [4 / 6], [0.0])

    def test_mean_over_the_images_that_have_the_class(self):
        """Images weigh the same, whatever the size of their region."""
        maps = torch.zeros(3, 2, 4, 5)
        regions = torch.full((3, 4, 5), -1)
        regions[0], regions[2, 0] = 0, 0
        maps[0, 1, 3] = 1.0
        assert_coverage(prototype_coverage(maps, regions, [2]), [(8 / 20 + 1 / 5) / 2], [(0 + 1) / 2])

    def test_no_image(self):
        found = prototype_coverage(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.long), [2, 1])
        assert_coverage(found, [math.nan] * 2, [math.nan] * 2)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"maps": normal(3, 5, 5)}, ["maps", "(3, 5, 5)"]),
            ({"maps": normal(2, 3, 5, 5, 1)}, ["maps", "(2, 3, 5, 5, 1)"]),
            ({"regions": integers(2, 5, 5)}, ["regions", "(5, 5)"]),
            ({"regions": integers(2, 3, 5, 5)}, ["regions", "(3, 5, 5)"]),
            ({"regions": integers(2, 2, 5, 6)}, ["regions", "(2, 5, 6)"]),
            ({"regions": torch.full((2, 5, 5), 2)}, ["regions", "2"]),
            ({"counts": [2, 2]}, ["[2, 2]", "3"]),
            ({"counts": [2]}, ["[2]", "3"]),
            ({"counts": []}, ["[]", "3"]),
            ({"share": 0.0}, ["share 0.0"]),
            ({"share": -0.2}, ["share -0.2"]),
            ({"share": 1.01}, ["share 1.01"]),
            ({"share": float("nan")}, ["share nan"]),
        ],
    )
    def test_errors(self, changes, words):
        arguments = {"maps": normal(2, 3, 5, 5), "regions": integers(2, 2, 5, 5), "counts": [2, 1]}
        prototype_coverage(**arguments)
        with pytest.raises(InputError) as raised:
            prototype_coverage(**(arguments | changes))
        assert_one_line(raised, *words)
