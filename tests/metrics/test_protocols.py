from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import jaccard_score

from tissuehint.errors import InputError
from tissuehint.metrics import (
    PROTOCOL_IDS,
    Protocol,
    confusion_matrix,
    decide,
    protocol_confusion,
    protocol_scores,
    scores,
)

T = 4  # tissue classes; white is class 4
PROTOCOLS = get_args(Protocol)


def labels(allowed):
    return arrays.arrays(np.uint8, (6, 7), elements=st.sampled_from(allowed))


truths = labels([*range(T + 1), 255])
tissue_predictions = labels([*range(T)])
any_predictions = labels([*range(T + 1)])


def under(prediction, target, protocol, white=T):
    return protocol_confusion(prediction, target, T, protocol, white=white)


def test_every_protocol_has_its_id():
    assert {PROTOCOL_IDS[protocol] for protocol in PROTOCOLS} == {"A", "B", "C"}
    assert (PROTOCOL_IDS["ignore_white"], PROTOCOL_IDS["fp_on_white"], PROTOCOL_IDS["five_class"]) == ("A", "B", "C")


@given(tissue_predictions, truths)
def test_protocol_a_equals_removing_white_pixels(prediction, target):
    kept = (target != T) & (target != 255)
    matrix = under(prediction, target, "ignore_white")
    np.testing.assert_array_equal(matrix[:T, :T], confusion_matrix(prediction[kept], target[kept], T))
    assert matrix.sum() == kept.sum()
    np.testing.assert_equal(protocol_scores(matrix, T), scores(matrix[:T, :T]))


@given(any_predictions, truths)
def test_protocol_a_ignores_what_is_predicted_on_white(prediction, target):
    prediction = np.where(target == T, T, prediction % T)  # one research code writes white where the truth is white
    expected = under(prediction % T, target, "ignore_white")
    np.testing.assert_array_equal(under(prediction, target, "ignore_white"), expected)


@given(any_predictions, truths)
def test_b_and_c_count_every_labelled_pixel(prediction, target):
    expected = confusion_matrix(prediction, target, T + 1)
    np.testing.assert_array_equal(under(prediction, target, "five_class"), expected)
    expected = confusion_matrix(prediction % T, target, T + 1)
    np.testing.assert_array_equal(under(prediction % T, target, "fp_on_white"), expected)


@given(any_predictions, truths)
def test_means_are_over_tissue_classes(prediction, target):
    valid = target != 255
    assume(set(range(T)) <= set(target[valid].tolist()))
    result = protocol_scores(under(prediction, target, "five_class"), T)
    iou = jaccard_score(target[valid], prediction[valid], labels=[*range(T)], average=None)
    np.testing.assert_allclose(result["iou"], iou)
    assert result["miou"] == pytest.approx(iou.mean())
    weights = np.bincount(target[valid], minlength=T + 1)[:T]
    assert result["fwiou"] == pytest.approx(np.average(iou, weights=weights))
    assert result["accuracy"] == pytest.approx((prediction == target)[valid].mean())


@given(tissue_predictions, truths)
def test_ignoring_white_never_scores_below_counting_it(prediction, target):
    a, b = (protocol_scores(under(prediction, target, name), T) for name in ("ignore_white", "fp_on_white"))
    known = ~np.isnan(a["iou"])
    assert (a["iou"][known] >= b["iou"][known]).all()
    if not np.isnan(a["accuracy"]):
        assert a["accuracy"] >= b["accuracy"]


def test_finding_white_lifts_c_above_b():
    target = np.array([0, 1, T, T])
    b = protocol_scores(under(np.array([0, 1, 0, 1]), target, "fp_on_white"), T)
    c = protocol_scores(under(target, target, "five_class"), T)
    a = protocol_scores(under(np.array([0, 1, 0, 1]), target, "ignore_white"), T)
    assert (a["miou"], b["miou"], c["miou"]) == (1, 0.5, 1)
    assert (a["accuracy"], b["accuracy"], c["accuracy"]) == (1, 0.5, 1)


@given(tissue_predictions, labels([*range(T), 255]))
def test_without_white_the_protocols_coincide(prediction, target):
    matrices = [under(prediction, target, protocol, white=None) for protocol in PROTOCOLS]
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, matrices[0])
        assert matrix.shape == (T + 1, T + 1)
        assert not matrix[T].any()
        assert not matrix[:, T].any()
    np.testing.assert_equal(protocol_scores(matrices[0], T), scores(confusion_matrix(prediction, target, T)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("white", [None, T])
def test_tensors_give_the_same_as_arrays(protocol, white):
    target = np.array([0, 1, 2, 3, 255] + ([T] if white else []))
    prediction = np.array([0, 1, 1, 3, 2] + ([2] if white else []))
    expected = protocol_confusion(prediction, target, T, protocol, white)
    result = protocol_confusion(torch.from_numpy(prediction), torch.from_numpy(target), T, protocol, white)
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_equal(protocol_scores(result, T), protocol_scores(expected, T))


def test_decide_stays_in_the_prediction_space_of_the_protocol():
    tissue_map = torch.rand(2, T + 1, 5, 3, generator=torch.Generator().manual_seed(0))
    values = tissue_map.numpy()
    for protocol in PROTOCOLS:
        result = decide(tissue_map, T, protocol)
        assert result.dtype == torch.uint8
        channels = values if protocol == "five_class" else values[:, :T]
        np.testing.assert_array_equal(result, channels.argmax(axis=1))
    without_white = [decide(tissue_map[:, :T], T, protocol) for protocol in PROTOCOLS]
    assert all(torch.equal(result, without_white[0]) for result in without_white)


def test_white_predictions_are_refused_where_the_protocol_has_none():
    prediction, target = np.array([0, T]), np.array([0, 1])
    for protocol in ("ignore_white", "fp_on_white"):
        with pytest.raises(InputError, match=f"protocol {PROTOCOL_IDS[protocol]}"):
            under(prediction, target, protocol)
    with pytest.raises(InputError, match="protocol B"):
        under(np.array([0, T]), np.array([0, T]), "fp_on_white")
    with pytest.raises(InputError, match="prediction value 4"):
        under(prediction, target, "five_class", white=None)
    with pytest.raises(InputError, match="target value 4"):
        under(np.array([0, 1]), np.array([0, T]), "five_class", white=None)


def test_bad_arguments_are_named():
    image = np.zeros((2, 2), np.uint8)
    with pytest.raises(InputError, match="white = 0"):
        under(image, image, "five_class", white=0)
    with pytest.raises(InputError, match="protocol 'best'"):
        under(image, image, "best")
    with pytest.raises(InputError, match="protocol 'best'"):
        decide(torch.zeros(1, T, 2, 2), T, "best")
    with pytest.raises(InputError, match="tissue map of shape"):
        decide(torch.zeros(1, T + 2, 2, 2), T, "five_class")
    with pytest.raises(InputError, match="confusion matrix of shape"):
        protocol_scores(np.zeros((T, T)), T)
