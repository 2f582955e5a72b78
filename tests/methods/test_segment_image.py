from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import entropy
from skimage.color import rgb2hed

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points
from tissuehint.methods.cvm.features import encoder_features, principal_components, stain_features, standardised
from tissuehint.methods.cvm.segment import segment_features, segment_image
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.encoders import build_encoder

TWO = LabelSpace(("stroma", "gland"))
THREE = LabelSpace(("stroma", "gland", "slide"))
COLOURS = np.array([(190, 140, 200), (120, 80, 40), (245, 243, 246)])


def picture(truth, seed=0):
    noise = np.random.default_rng(seed).normal(0, 12, (*truth.shape, 3))
    return (COLOURS[truth] + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def disc():
    y, x = np.mgrid[:75, :98]
    return ((y - 36) ** 2 + (x - 45) ** 2 < 24**2).astype(np.int64)


DISC_POINTS = Points([(8, 8, 0), (60, 90, 0), (36, 45, 1), (30, 58, 1)])


def agreement(first, second):
    return float((first == second).mean())


class TestTwoClasses:
    # the paper's rule wants features that a network has learnt from the points
    @pytest.mark.parametrize(("rule", "least"), [("difference", 0.93), ("per-point", 0.85)])
    def test_a_disc_is_found_from_four_points(self, disc, rule, least):
        found = segment_image(picture(disc), DISC_POINTS, TWO, rule=rule)
        assert found.mask.dtype == np.uint8
        assert agreement(found.mask, disc) > least

    def test_the_tissue_map_is_made_of_probabilities(self, disc):
        found = segment_image(picture(disc), DISC_POINTS, TWO)
        assert found.tissue_map.shape == (2, 75, 98)
        assert float(found.tissue_map.min()) >= 0
        torch.testing.assert_close(found.tissue_map.sum(0), torch.ones(75, 98))
        clear = (found.tissue_map[1] - 0.5).abs().numpy() > 0.01
        assert ((found.tissue_map[1].numpy() > 0.5) == found.mask)[clear].all()
        assert not found.tissue_map.requires_grad

    def test_certainty_falls_with_the_entropy(self, disc):
        found = segment_image(picture(disc), DISC_POINTS, TWO, rule="per-point")
        expected = np.exp(-2 * entropy(found.tissue_map.double().numpy(), axis=0))
        np.testing.assert_allclose(found.certainty.numpy(), expected, atol=1e-5)
        assert 0.25 - 1e-6 <= float(found.certainty.min()) <= float(found.certainty.max()) <= 1

    def test_exchanging_the_classes_exchanges_the_mask(self, disc):
        image = picture(disc)
        swapped = Points(np.column_stack([DISC_POINTS.rows[:, :2], 1 - DISC_POINTS.rows[:, 2]]))
        first, second = segment_image(image, DISC_POINTS, TWO), segment_image(image, swapped, TWO)
        assert agreement(first.mask, 1 - second.mask) > 0.99

    @pytest.mark.parametrize("turn", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.swapaxes(0, 1)])
    def test_turned_images_have_turned_masks(self, disc, turn):
        image = picture(disc)
        where = np.full(disc.shape, -1)
        where[tuple(DISC_POINTS.rows[:, :2].T)] = DISC_POINTS.rows[:, 2]
        rows = np.argwhere(turn(where) >= 0)
        turned = Points(np.column_stack([rows, turn(where)[tuple(rows.T)]]))
        found = segment_image(np.ascontiguousarray(turn(image)), turned, TWO)
        assert agreement(found.mask, turn(segment_image(image, DISC_POINTS, TWO).mask)) > 0.99

    def test_a_large_image_is_looked_at_smaller_and_answered_at_its_size(self, disc):
        truth = disc.repeat(4, 0).repeat(4, 1)
        points = Points(DISC_POINTS.rows * (4, 4, 1))
        found = segment_image(picture(truth), points, TWO, side=196)
        assert found.solutions.shape == (2, 150, 196)
        assert found.tissue_map.shape == (2, 300, 392)
        assert agreement(found.mask, truth) > 0.95

    def test_contrast_has_a_map_for_each_point(self, disc):
        found = segment_image(picture(disc), Points([*DISC_POINTS.rows, (40, 40, 1)]), TWO)
        assert [len(maps) for maps in found.contrast] == [2, 3]
        assert all(0 <= float(maps.min()) <= float(maps.max()) <= 1 for maps in found.contrast)


def test_three_classes_are_told_apart():
    truth = np.repeat(np.arange(3), 30)[None].repeat(60, 0)
    points = Points([(10, 12, 0), (45, 18, 0), (12, 45, 1), (50, 40, 1), (30, 72, 2), (8, 80, 2)])
    found = segment_image(picture(truth), points, THREE)
    assert agreement(found.mask, truth) > 0.9
    torch.testing.assert_close(found.tissue_map.sum(0), torch.ones(60, 90))


class TestDifferenceRule:
    def test_solutions_of_two_classes_are_complements(self):
        features = torch.randn(4, 20, 24, generator=torch.Generator().manual_seed(0))
        cells, classes = torch.tensor([[2, 3], [15, 20], [9, 9]]), torch.tensor([0, 1, 1])
        evidence, _, solutions = segment_features(features, cells, classes, 2)
        torch.testing.assert_close(solutions.sum(0), torch.ones(20, 24))
        torch.testing.assert_close(evidence.sum(0), torch.ones(20, 24))

    def test_evidence_is_the_lead_over_the_strongest_rival(self):
        features = torch.randn(5, 9, 11, generator=torch.Generator().manual_seed(1))
        cells, classes = torch.tensor([[0, 0], [4, 4], [8, 10], [2, 7]]), torch.tensor([0, 1, 2, 2])
        evidence, contrast, _ = segment_features(features, cells, classes, 3)
        means = [each.mean(0).numpy() for each in contrast]
        means = [(each - each.min()) / (each.max() - each.min()) for each in means]
        for own in range(3):
            rival = np.max([means[other] for other in range(3) if other != own], axis=0)
            np.testing.assert_allclose(evidence[own].numpy(), (1 + means[own] - rival) / 2, atol=1e-6)

    def test_a_large_data_weight_follows_the_evidence_alone(self):
        features = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))
        cells, classes = torch.tensor([[2, 3], [12, 12]]), torch.tensor([0, 1])
        evidence, _, solutions = segment_features(features, cells, classes, 2, data_weight=1e4)
        clear = (evidence[1] - 0.5).abs() > 0.01
        assert torch.equal(solutions[1][clear] > 0.5, evidence[1][clear] > 0.5)


class TestStainFeatures:
    def test_components_are_uncorrelated_and_the_strongest_has_unit_variance(self, disc):
        places = stain_features(picture(disc)).flatten(1).double()
        assert places.shape[0] == 8
        covariance = places @ places.T / places.shape[1]
        variances = covariance.diagonal()
        torch.testing.assert_close(covariance, variances.diag(), atol=1e-3, rtol=0)
        assert float(variances[-1]) == pytest.approx(1, abs=1e-3)
        assert bool((variances.diff() >= 0).all())

    def test_weak_components_are_raised_to_the_root_of_their_share(self, disc):
        image = picture(disc)
        given = stain_features(image).flatten(1).std(1, correction=0)
        densities = np.moveaxis(rgb2hed(image), 2, 0).astype(np.float32)
        channels = []
        for scale in (3, 6, 12):
            mean = gaussian_filter(densities, (0, scale, scale), truncate=3)
            square = gaussian_filter(densities**2, (0, scale, scale), truncate=3)
            channels += [mean, np.sqrt(np.maximum(square - mean**2, 0))]
        values = np.concatenate(channels).reshape(18, -1)
        values = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
        spread = np.linalg.svd(values, compute_uv=False)[:8][::-1]
        np.testing.assert_allclose(given.numpy(), np.sqrt(spread / spread[-1]), rtol=1e-3)

    def test_a_tiny_window_gives_the_densities_of_scikit_image(self, disc):
        image = picture(disc)
        densities = torch.from_numpy(rgb2hed(image)).permute(2, 0, 1)
        expected = standardised(densities.double()).flatten(1)
        found = stain_features(image, scales=(0.05,), components=3).flatten(1).double()
        # three components span what the three densities span
        weights = torch.linalg.lstsq(found.T, expected.T).solution
        torch.testing.assert_close(found.T @ weights, expected.T, atol=2e-3, rtol=0)

    @pytest.mark.parametrize("scales", [(), (2.0, 0.0), (-1.0,)])
    def test_scales_are_positive(self, disc, scales):
        with pytest.raises(InputError, match="positive"):
            stain_features(picture(disc), scales=scales)


def test_principal_components_are_those_of_the_singular_values():
    features = torch.randn(6, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features -= features.mean((1, 2), keepdim=True)
    found, deviations = principal_components(features, 3)
    values = np.linalg.svd(features.flatten(1).numpy(), compute_uv=False)[:3][::-1]
    np.testing.assert_allclose(deviations.numpy(), values / np.sqrt(72), rtol=1e-6)
    np.testing.assert_allclose(found.flatten(1).norm(dim=1).numpy(), values, rtol=1e-6)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name="test_resnet"))


class TestEncoderFeatures:
    def test_they_join_the_stains(self, disc, encoder):
        found = segment_image(picture(disc), DISC_POINTS, TWO, encoder=encoder)
        assert found.mask.shape == disc.shape
        assert agreement(found.mask, disc) > 0.9

    def test_shape_and_scale(self, disc, encoder):
        features = encoder_features(encoder, picture(disc), (30, 40), levels=(0, -1), components=5)
        assert features.shape == (5, 30, 40)
        assert 0.5 < float(features[-1].std()) < 1.5
        assert not features.requires_grad

    @pytest.mark.parametrize("levels", [(), (9,), (-6, 1)])
    def test_levels_are_those_of_the_encoder(self, disc, encoder, levels):
        with pytest.raises(InputError, match="levels"):
            encoder_features(encoder, picture(disc), (30, 40), levels=levels)

    def test_maps_that_are_not_finite_are_refused(self, disc):
        broken = build_encoder(EncoderConfig(name="test_resnet"))
        with torch.no_grad():
            next(broken.backbone.parameters()).fill_(float("nan"))
        with pytest.raises(InputError, match="NaN"):
            segment_image(picture(disc), DISC_POINTS, TWO, encoder=broken)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (Points([]), "class 'stroma': has no points"),
        (Points([(1, 1, 0)]), "class 'gland': has no points"),
        (Points([(1, 1, 0), (75, 1, 1)]), "outside"),
        (Points([(1, 1, 0), (2, 1, 2)]), "classes are 0..1"),
        (Points([(5, 5, 0), (5, 5, 1)]), "at once"),
    ],
)
def test_points_that_say_nothing_are_refused(disc, points, said):
    with pytest.raises(InputError, match=said):
        segment_image(picture(disc), points, TWO)


def test_points_that_meet_when_the_image_is_made_smaller_are_refused(disc):
    with pytest.raises(InputError, match="places of 10 px"):
        segment_image(picture(disc), Points([(50, 50, 0), (51, 51, 1)]), TWO, side=10)


@pytest.mark.parametrize("shape", [(75, 98, 3), (1, 40, 3)])
def test_an_image_of_one_colour_is_refused(shape):
    image = np.full(shape, 200, np.uint8)
    with pytest.raises(InputError, match="alike"):
        segment_image(image, Points([(0, 3, 0), (0, 30, 1)]), TWO)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_images_are_colour_and_eight_bits(image):
    with pytest.raises(InputError, match="uint8"):
        segment_image(image, Points([(0, 0, 0), (5, 5, 1)]), TWO)


@pytest.mark.parametrize("options", [{"rule": "other"}, {"eta": 1.5}, {"side": 0}, {"data_weight": -1.0}])
def test_options_out_of_range_are_refused(disc, options):
    with pytest.raises(InputError):
        segment_image(picture(disc), DISC_POINTS, TWO, **options)


def test_features_that_are_not_finite_are_refused():
    features = torch.zeros(2, 5, 5)
    features[0, 2, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        segment_features(features, torch.tensor([[0, 0], [4, 4]]), torch.tensor([0, 1]), 2)
