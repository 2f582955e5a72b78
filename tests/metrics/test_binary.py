import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from tissuehint.errors import InputError
from tissuehint.metrics import BinaryHistogram, binary_scores, binary_scores_per_image, confusion_matrix, scores

KEYS = {"dice", "accuracy", "kappa", "auc", "precision"}


@st.composite
def pixels(draw):
    # few distinct values, so that ties and the threshold itself occur
    value = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1, width=32))
    rows = draw(st.lists(st.tuples(value, st.sampled_from([0, 1, 255])), min_size=1, max_size=40))
    probability, target = zip(*rows, strict=True)
    return np.array(probability, np.float32), np.array(target, np.uint8)


def by_sklearn(probability, target):
    truth, values = target[target != 255], probability[target != 255]
    predicted = values > 0.5
    return {
        "dice": sklearn_metrics.f1_score(truth, predicted, zero_division=np.nan),
        "accuracy": sklearn_metrics.accuracy_score(truth, predicted),
        "kappa": sklearn_metrics.cohen_kappa_score(truth, predicted),
        "auc": sklearn_metrics.roc_auc_score(truth, values),
        "precision": sklearn_metrics.precision_score(truth, predicted, zero_division=np.nan),
    }


@given(pixels())
def test_agrees_with_sklearn(pair):
    probability, target = pair
    result = binary_scores(probability, target)
    assert set(result) == KEYS
    if {0, 1} <= set(target.tolist()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = by_sklearn(probability, target)
        assert result == pytest.approx(expected, nan_ok=True, abs=1e-12)
    else:
        assert np.isnan(result["auc"])


@given(pixels())
def test_dice_and_accuracy_agree_with_the_confusion_matrix(pair):
    probability, target = pair
    result = binary_scores(probability, target)
    expected = scores(confusion_matrix((probability > 0.5).astype(np.uint8), target, 2))
    np.testing.assert_allclose([result["dice"], result["accuracy"]], [expected["dice"][1], expected["accuracy"]])


@given(pixels())
def test_auc_looks_at_the_order_only_and_turns_with_the_classes(pair):
    probability, target = pair
    auc = binary_scores(probability, target)["auc"]
    np.testing.assert_allclose(binary_scores(probability.astype(np.float64) / 2, target)["auc"], auc)
    exchanged = np.where(target == 255, 255, 1 - target.astype(int))
    np.testing.assert_allclose(binary_scores(probability, exchanged)["auc"], 1 - auc, atol=1e-12)


def test_perfect_and_useless_maps():
    target = np.array([[0, 1], [1, 0]])
    assert binary_scores(target.astype(float), target) == dict.fromkeys(KEYS, 1.0)
    constant = binary_scores(np.full((2, 2), 0.9), target)
    assert (constant["auc"], constant["kappa"], constant["precision"]) == (0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("probability", "target", "missing"),
    [
        ([0.1, 0.2], [0, 0], {"auc", "dice", "kappa", "precision"}),
        ([0.1, 0.2], [0, 1], {"precision"}),
        ([0.9, 0.8], [1, 1], {"auc", "kappa"}),
        ([0.9, 0.8], [255, 255], KEYS),
    ],
)
def test_undefined_scores_are_nan_without_a_warning(probability, target, missing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = binary_scores(probability, target)
        histogram = BinaryHistogram()
        histogram.update(probability, target)
        pooled = histogram.scores()
    assert {key for key, value in result.items() if np.isnan(value)} == missing
    assert pooled == pytest.approx(result, nan_ok=True)


def test_ignored_pixels_may_hold_anything():
    result = binary_scores([0.9, 0.1, np.nan, 7.0], [1, 0, 255, 255])
    assert result == dict.fromkeys(KEYS, 1.0)


@pytest.mark.parametrize(
    ("probability", "target", "message"),
    [
        ([0.5, 1.5], [0, 1], "probability 1.5"),
        ([0.5, -0.1], [0, 1], "probability -0.1"),
        ([0.5, np.nan], [0, 1], "probability nan"),
        ([0.5, 0.5], [0, 2], "target value 2"),
        ([0.5, 0.5], [0.0, 0.5], "target value 0.5"),
        ([0.5, 0.5], [0], "probability of shape"),
    ],
)
def test_bad_values_are_named(probability, target, message):
    for score in (binary_scores, BinaryHistogram().update):
        with pytest.raises(InputError, match=message):
            score(probability, target)


@given(st.lists(pixels(), min_size=1, max_size=3), st.sampled_from([2, 16, 4096]))
def test_histogram_is_exact_but_for_auc_within_its_bound(images, bins):
    histogram = BinaryHistogram(bins)
    for image in images:
        histogram.update(*image)
    exact = binary_scores(*(np.concatenate([image[side] for image in images]) for side in (0, 1)))
    pooled, bound = histogram.scores(), histogram.auc_error_bound()
    assert set(pooled) == KEYS
    assert np.isnan(bound) == np.isnan(exact["auc"])
    if not np.isnan(bound):
        assert abs(pooled["auc"] - exact["auc"]) <= bound + 1e-12
    del pooled["auc"], exact["auc"]
    assert pooled == pytest.approx(exact, nan_ok=True, abs=1e-12)


def test_histogram_auc_of_a_large_split():
    rng = np.random.default_rng(3)
    histogram, parts = BinaryHistogram(), []
    for _ in range(5):
        target = rng.integers(0, 2, (100, 100))
        parts.append((rng.beta(2 + target, 3 - target), target))
        histogram.update(*parts[-1])
    probability, target = (np.stack([part[side] for part in parts]).ravel() for side in (0, 1))
    exact = sklearn_metrics.roc_auc_score(target, probability)
    assert abs(histogram.scores()["auc"] - exact) <= histogram.auc_error_bound() < 2e-4


@given(pixels(), pixels())
def test_histograms_merge_by_adding_counts(first, second):
    both, parts = BinaryHistogram(16), (BinaryHistogram(16), BinaryHistogram(16))
    for part, image in zip(parts, (first, second), strict=True):
        part.update(*image)
        both.update(*image)
    np.testing.assert_array_equal(both.counts, parts[0].counts + parts[1].counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_histogram_and_scores_take_every_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(200, generator=generator).to(dtype)
    target = torch.randint(0, 2, (200,), generator=generator)
    histogram = BinaryHistogram()
    histogram.update(probability, target)
    expected = by_sklearn(probability.double().numpy(), target.numpy())
    assert binary_scores(probability, target) == pytest.approx(expected)
    assert histogram.scores()["dice"] == pytest.approx(expected["dice"])
    assert abs(histogram.scores()["auc"] - expected["auc"]) <= histogram.auc_error_bound() + 1e-12


@pytest.mark.parametrize("bins", [0, 1, 3, 100, 2**17])
def test_bins_are_a_power_of_two(bins):
    with pytest.raises(InputError, match=f"bins {bins}"):
        BinaryHistogram(bins)


def test_mean_over_images_leaves_undefined_scores_out():
    perfect = (np.array([0.9, 0.1]), np.array([1, 0]))
    empty = (np.array([0.1, 0.1]), np.array([0, 0]))
    half = (np.array([0.9, 0.9]), np.array([1, 0]))
    result = binary_scores_per_image([perfect, empty, half])
    assert result["auc"] == 0.75
    assert result["accuracy"] == pytest.approx(2.5 / 3)
    assert result["dice"] == pytest.approx((1 + 2 / 3) / 2)
