"""The dense CRF against a mean field written out in numpy, the grid against the exact way, and what holds of both."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tissuehint.errors import InputError
from tissuehint.ops import crf
from tissuehint.ops.crf import dense_crf

few = settings(max_examples=10, deadline=None)
ways = pytest.mark.parametrize("bilateral", ["exact", "grid"])
SMALL = {"gaussian_std": 3, "gaussian_weight": 2, "bilateral_std": 4, "colour_std": 0.15, "bilateral_weight": 3}


def mean_field(probabilities, image, gaussian_std, gaussian_weight, bilateral_std, colour_std, bilateral_weight, steps):
    """One image, (C,H,W) and (3,H,W): the definition, pair by pair."""
    classes, height, width = probabilities.shape
    places = list(itertools.product(range(height), range(width)))
    first, second = np.zeros((2, len(places), len(places)))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            place = (y - v) ** 2 + (x - u) ** 2
            colour = ((image[:, y, x] - image[:, v, u]) ** 2).sum()
            first[i, j] = math.exp(-place / (2 * gaussian_std**2))
            second[i, j] = math.exp(-place / (2 * bilateral_std**2) - colour / (2 * colour_std**2))
    kernels = [each / np.sqrt(np.outer(each.sum(0), each.sum(1))) for each in (first, second)]
    unary = -np.log(np.maximum(probabilities / probabilities.sum(0), 1e-5)).reshape(classes, -1)
    found = np.exp(-unary) / np.exp(-unary).sum(0)
    for _ in range(steps):
        score = -unary + gaussian_weight * found @ kernels[0].T + bilateral_weight * found @ kernels[1].T
        score = np.exp(score - score.max(0))
        found = score / score.sum(0)
    return found.reshape(probabilities.shape)


def reference(probabilities, images, iterations=5, **options):
    options = {
        "gaussian_std": 15,
        "gaussian_weight": 30,
        "bilateral_std": 10,
        "colour_std": 20 / 255,
        "bilateral_weight": 50,
    } | options
    pairs = zip(probabilities.double().numpy(), images.double().numpy(), strict=True)
    return np.stack([mean_field(*pair, steps=iterations, **options) for pair in pairs])


def pictures(batch, height, width, seed=0, noise=0.05):
    """(B,3,H,W) of two or three regions of a colour each, with a little noise."""
    random_state = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    images = np.empty((batch, 3, height, width))
    for image in images:
        slope, level = random_state.normal(size=2), random_state.normal(size=3) / 2
        region = np.digitize(slope[0] * y + slope[1] * x, np.sort(level))
        image[:] = random_state.uniform(0.2, 0.8, (4, 3))[region].transpose(2, 0, 1)
    return torch.from_numpy(np.clip(images + noise * random_state.normal(size=images.shape), 0, 1))


def shares(batch, classes, height, width, seed=0):
    scores = np.random.default_rng(seed).normal(size=(batch, classes, height, width))
    return torch.from_numpy(scores).softmax(1)


def tissue(side, classes=4, seed=0):
    """An image of smooth texture and probabilities of blobs that know nothing of it, the hardest case."""
    random_state = torch.Generator().manual_seed(seed)

    def smooth(channels, cells):
        coarse = torch.randn(1, channels, cells, cells, generator=random_state)
        return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")

    image = torch.tensor([0.75, 0.5, 0.7])[:, None, None] + 0.12 * smooth(1, 12) + 0.06 * smooth(3, 20)
    image = image + 0.02 * torch.randn(1, 3, side, side, generator=random_state)
    return (2 * smooth(classes, 6)).softmax(1), image.clamp(0, 1)


class Largest(TorchDispatchMode):
    """The most numbers of any dense tensor that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor) and not each.is_sparse]
        self.numbers = max([self.numbers, *(each.numel() for each in made)])
        return found


sizes = pytest.mark.parametrize(
    ("batch", "classes", "height", "width"), [(1, 2, 9, 9), (2, 3, 7, 12), (3, 5, 8, 4), (1, 4, 1, 20), (2, 2, 20, 1)]
)


class TestAgainstTheDefinition:
    @sizes
    @pytest.mark.parametrize("iterations", [1, 5])
    @pytest.mark.parametrize("options", [{}, SMALL])
    def test_exact(self, batch, classes, height, width, iterations, options):
        probabilities, images = shares(batch, classes, height, width), pictures(batch, height, width)
        expected = reference(probabilities, images, iterations, **options)
        found = dense_crf(probabilities, images, iterations=iterations, bilateral="exact", **options)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        found = dense_crf(probabilities.float(), images.float(), iterations=iterations, bilateral="exact", **options)
        np.testing.assert_allclose(found, expected, atol=1e-3)

    @pytest.mark.parametrize("name", SMALL)
    def test_every_number_counts(self, name):
        probabilities, images = shares(1, 3, 8, 9), pictures(1, 8, 9)
        options = SMALL | {name: 1.7 * SMALL[name]}
        plain, found = (dense_crf(probabilities, images, **each) for each in (SMALL, options))
        np.testing.assert_allclose(found, reference(probabilities, images, **options), atol=1e-6)
        assert (plain - found).abs().max() > 1e-3, "or this test shows nothing"

    @sizes
    def test_grid(self, batch, classes, height, width):
        """With small weights the errors of the filter show in Q as they are, instead of in a few pixels that flip."""
        probabilities, images = shares(batch, classes, height, width), pictures(batch, height, width)
        found = dense_crf(probabilities, images, bilateral="grid", **SMALL)
        expected = reference(probabilities, images, **SMALL)
        errors = np.abs(found.numpy() - expected)
        assert errors.mean() < 0.01
        assert errors.max() < 0.1

    def test_chunks_change_nothing(self, monkeypatch):
        probabilities, images = shares(3, 4, 9, 7), pictures(3, 9, 7)
        whole = {each: dense_crf(probabilities, images, bilateral=each) for each in ("exact", "grid")}
        for name in ("KERNEL_NUMBERS", "GRID_PIXELS", "TABLE_NUMBERS"):
            monkeypatch.setattr(crf, name, 200)
        for way, expected in whole.items():
            np.testing.assert_allclose(dense_crf(probabilities, images, bilateral=way), expected, atol=1e-9)

    def test_auto(self, monkeypatch):
        monkeypatch.setattr(crf, "EXACT_PIXELS", 80)
        for height, way in ((8, "exact"), (9, "grid")):
            probabilities, images = shares(1, 3, height, 10), pictures(1, height, 10)
            assert torch.equal(dense_crf(probabilities, images), dense_crf(probabilities, images, bilateral=way))
            other = "grid" if way == "exact" else "exact"
            assert not torch.equal(dense_crf(probabilities, images), dense_crf(probabilities, images, bilateral=other))


class TestGrid:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_agrees_with_the_exact_way(self, seed):
        probabilities, images = tissue(72, seed=seed)
        exact, grid = (dense_crf(probabilities, images, bilateral=way) for way in ("exact", "grid"))
        assert (exact.argmax(1) != probabilities.argmax(1)).double().mean() > 0.2, "or this test shows nothing"
        assert (exact.argmax(1) == grid.argmax(1)).double().mean() > 0.9955
        assert (exact - grid).abs().mean() < 0.0024

    @pytest.mark.parametrize("bilateral_std", [0.5, 1.5, 3, 40])
    @pytest.mark.parametrize("colour_std", [0.03, 0.3, 3])
    def test_other_widths(self, bilateral_std, colour_std):
        probabilities, images = tissue(24)
        options = SMALL | {"bilateral_std": bilateral_std, "colour_std": colour_std}
        exact, grid = (dense_crf(probabilities, images, bilateral=way, **options) for way in ("exact", "grid"))
        assert (exact - grid).abs().mean() < 0.01

    def test_memory_is_linear_in_the_pixels(self):
        probabilities, images = tissue(64)
        numbers = []
        for times in (1, 2):
            with Largest() as largest:
                tiles = (1, 1, times, times)
                dense_crf(probabilities.repeat(tiles), images.repeat(tiles), bilateral="grid", iterations=1)
            numbers.append(largest.numbers)
        assert numbers[0] >= 32 * 64**2, "or this test shows nothing"
        assert numbers[1] < 4.5 * numbers[0]


class TestWhatAlwaysHolds:
    @ways
    @few
    @given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
    def test_probabilities(self, bilateral, batch, classes, height, width, seed):
        probabilities = shares(batch, classes, height, width, seed)
        found = dense_crf(probabilities, pictures(batch, height, width, seed), bilateral=bilateral)
        assert found.shape == probabilities.shape
        assert found.min() >= 0
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)

    @ways
    @few
    @given(st.integers(2, 5), st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6))
    def test_constant_unaries(self, bilateral, classes, height, width, seed):
        """Equal classes stay equal; where one is ahead everywhere, it wins everywhere."""
        images = pictures(1, height, width, seed)
        equal = torch.full((1, classes, height, width), 1 / classes, dtype=torch.float64)
        np.testing.assert_allclose(dense_crf(equal, images, bilateral=bilateral), equal, atol=1e-12)
        ahead = equal.clone()
        ahead[:, 1] *= 1.5
        found = dense_crf(ahead, images, bilateral=bilateral)
        assert bool((found.argmax(1) == 1).all())
        assert bool((found[:, 1] > ahead[:, 1] / ahead.sum(1)).all())

    @ways
    @few
    @given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6))
    def test_flips_and_transpositions_commute(self, bilateral, height, width, seed):
        given_pair = shares(1, 3, height, width, seed), pictures(1, height, width, seed)
        found = dense_crf(*given_pair, bilateral=bilateral, **SMALL)
        for change in (lambda each: each.flip(2), lambda each: each.flip(3), lambda each: each.mT):
            changed = dense_crf(*map(change, given_pair), bilateral=bilateral, **SMALL)
            np.testing.assert_allclose(changed, change(found), atol=1e-9)

    @pytest.mark.parametrize(("height", "width"), [(30, 30), (31, 40)])
    def test_flips_commute_with_many_cells(self, height, width):
        given_pair = shares(1, 3, height, width), pictures(1, height, width)
        found = dense_crf(*given_pair, bilateral="grid", **SMALL)
        for change in (lambda each: each.flip(2), lambda each: each.flip(3), lambda each: each.mT):
            changed = dense_crf(*map(change, given_pair), bilateral="grid", **SMALL)
            np.testing.assert_allclose(changed, change(found), atol=1e-9)

    @ways
    def test_batch_equals_one_by_one(self, bilateral):
        probabilities, images = shares(4, 3, 10, 13), pictures(4, 10, 13)
        images[1] = images[0]  # the same cells of colour
        images[2] *= 0.3
        images[3] = 1 - 0.1 * images[3]
        found = dense_crf(probabilities, images, bilateral=bilateral)
        single = [
            dense_crf(*pair, bilateral=bilateral) for pair in zip(probabilities.split(1), images.split(1), strict=True)
        ]
        np.testing.assert_allclose(found, torch.cat(single), atol=1e-12)

    @ways
    def test_order_of_classes(self, bilateral):
        probabilities, images = shares(2, 5, 10, 13), pictures(2, 10, 13)
        order = [3, 0, 4, 1, 2]
        found = dense_crf(probabilities, images, bilateral=bilateral)
        changed = dense_crf(probabilities[:, order], images, bilateral=bilateral)
        np.testing.assert_allclose(changed, found[:, order], atol=1e-12)

    @ways
    def test_weights_and_iterations_of_0(self, bilateral):
        probabilities, images = shares(2, 3, 8, 9), pictures(2, 8, 9)
        for options in ({"gaussian_weight": 0, "bilateral_weight": 0}, {"iterations": 0}):
            found = dense_crf(probabilities * 7, images, bilateral=bilateral, **options)
            np.testing.assert_allclose(found, probabilities, atol=1e-12)
        for name in ("gaussian_weight", "bilateral_weight"):
            options = SMALL | {name: 0}
            found = dense_crf(probabilities, images, bilateral="exact", **options)
            np.testing.assert_allclose(found, reference(probabilities, images, **options), atol=1e-6)

    @ways
    def test_a_noisy_image_of_two_colours_is_cleaned_up(self, bilateral):
        random_state = np.random.default_rng(0)
        truth = torch.zeros(40, 40, dtype=torch.long)
        truth[8:30, 15:] = 1
        images = torch.where(truth.bool(), 0.7, 0.4) + 0.03 * torch.from_numpy(random_state.normal(size=(1, 3, 40, 40)))
        scores = torch.nn.functional.one_hot(truth, 2).permute(2, 0, 1)
        scores = scores[None] + 1.2 * torch.from_numpy(random_state.normal(size=(1, 2, 40, 40)))
        probabilities = scores.softmax(1)
        before, after = (
            float((each.argmax(1)[0] == truth).double().mean())
            for each in (probabilities, dense_crf(probabilities, images, bilateral=bilateral))
        )
        assert before < 0.8
        assert after > 0.97

    @ways
    def test_extreme_probabilities(self, bilateral):
        images = pictures(1, 6, 6).float()
        for values in (torch.zeros(1, 3, 6, 6), torch.full((1, 3, 6, 6), 1e-44), torch.full((1, 3, 6, 6), 3e38)):
            found = dense_crf(values, images, bilateral=bilateral)
            np.testing.assert_allclose(found, 1 / 3, atol=1e-6)
        hot = torch.nn.functional.one_hot(torch.zeros(1, 6, 6, dtype=torch.long), 3).permute(0, 3, 1, 2).float()
        found = dense_crf(hot, images, bilateral=bilateral, iterations=0)
        np.testing.assert_allclose(found[0, :, 0, 0], np.array([1, 1e-5, 1e-5]) / (1 + 2e-5), rtol=1e-4)


class TestTypes:
    @ways
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_type_and_no_gradient(self, bilateral, dtype):
        probabilities, images = shares(1, 3, 8, 9), pictures(1, 8, 9).float()
        expected = dense_crf(probabilities, images, bilateral=bilateral, **SMALL)
        given_ones = probabilities.to(dtype).requires_grad_()
        before = given_ones.detach().clone(), images.clone()
        found = dense_crf(given_ones, images, bilateral=bilateral, **SMALL)
        assert found.dtype == dtype
        assert not found.requires_grad
        assert torch.equal(before[0], given_ones.detach())
        assert torch.equal(before[1], images)
        np.testing.assert_allclose(found.double(), expected, atol=0.2 * torch.finfo(dtype).eps ** 0.5)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @ways
    def test_device(self, bilateral):
        probabilities, images = shares(2, 3, 20, 30), pictures(2, 20, 30)
        found = dense_crf(probabilities.cuda(), images.cuda(), bilateral=bilateral)
        assert found.device == probabilities.cuda().device
        np.testing.assert_allclose(found.cpu(), dense_crf(probabilities, images, bilateral=bilateral), atol=1e-6)


class TestErrors:
    def says(self, *words, probabilities=None, images=None, **options):
        probabilities = shares(2, 3, 4, 5) if probabilities is None else probabilities
        images = pictures(2, 4, 5) if images is None else images
        with pytest.raises(InputError) as raised:
            dense_crf(probabilities, images, **options)
        error, text = raised.value, str(raised.value)
        assert "\n" not in text
        assert error.subject
        assert error.rule
        assert error.fix
        assert all(word in text for word in words), text

    @pytest.mark.parametrize("shape", [(3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0), (0, 3, 4, 5), ()])
    def test_shape_of_probabilities(self, shape):
        self.says(str(shape), "(B, C, H, W)", probabilities=torch.ones(shape))

    @pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 4, 5), (2, 1, 4, 5), (3, 4, 5)])
    def test_shape_of_images(self, shape):
        self.says(str(shape), "(2, 3, 4, 5)", images=torch.ones(shape))

    def test_device(self):
        self.says("meta", "cpu", images=torch.ones(2, 3, 4, 5, device="meta"))

    @pytest.mark.parametrize("name", ["probabilities", "images"])
    def test_not_floating_point(self, name):
        self.says(name, "uint8", **{name: torch.ones(2, 3, 4, 5, dtype=torch.uint8)})

    @pytest.mark.parametrize("name", ["probabilities", "images"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, name, value):
        values = torch.full((2, 3, 4, 5), 0.5)
        values[1, 2, 0, 3] = value
        self.says(name, "(1, 2, 0, 3)", "finite", **{name: values})

    def test_negative_probabilities(self):
        values = shares(2, 3, 4, 5)
        values[1, 1, 1, 1] = -0.25
        self.says("-0.25", "probabilities", probabilities=values)

    @pytest.mark.parametrize(("factor", "shift"), [(255, 0), (2, -1), (1, 0.8)])
    def test_range_of_images(self, factor, shift):
        self.says("[0, 1]", images=torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * factor + shift)

    def test_images_slightly_outside_pass(self):
        images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 1.1 - 0.05
        for way in ("exact", "grid"):
            assert bool(dense_crf(shares(2, 3, 4, 5), images, bilateral=way).isfinite().all())

    @pytest.mark.parametrize("name", ["gaussian_std", "bilateral_std", "colour_std"])
    @pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf")])
    def test_stds(self, name, value):
        self.says(f"{name} {value}", "above 0", **{name: value})

    @pytest.mark.parametrize("name", ["gaussian_weight", "bilateral_weight", "iterations"])
    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
    def test_weights_and_iterations(self, name, value):
        self.says(f"{name} {value}", "0 or more", **{name: value})

    def test_way(self):
        self.says("'fast'", "'grid'", bilateral="fast")

    def test_colours_too_fine_for_the_grid(self):
        self.says("colour_std 0.0005", "exact", colour_std=5e-4, bilateral="grid")
        dense_crf(shares(2, 3, 4, 5), pictures(2, 4, 5), colour_std=5e-4)


@pytest.mark.parametrize("bilateral", ["exact", "grid"])
def test_mixed_precision_does_not_reach_it(bilateral):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(1, 3, 20, 22, generator=generator)
    images = torch.rand(1, 3, 20, 22, generator=generator)
    expected = dense_crf(probabilities, images, bilateral=bilateral)
    with torch.autocast("cpu", torch.bfloat16):
        found = dense_crf(probabilities, images, bilateral=bilateral)
    assert torch.equal(found, expected)
