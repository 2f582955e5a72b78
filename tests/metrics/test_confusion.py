import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as sklearn_metrics

from tissuehint.errors import InputError
from tissuehint.metrics import confusion_matrix, scores
from tissuehint.metrics.confusion import _count_tensors

C = 4


@st.composite
def class_maps(draw, num_classes=C):
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=3, max_side=9))
    prediction = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, num_classes - 1)))
    target = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([*range(num_classes), 255])))
    return prediction, target


def count_by_hand(prediction, target, num_classes, ignore):
    counts = np.zeros((num_classes, num_classes), np.int64)
    for predicted, true in zip(prediction.flat, target.flat, strict=True):
        if true != ignore:
            counts[true, predicted] += 1
    return counts


@given(class_maps())
def test_every_backend_counts_as_brute_force(pair):
    prediction, target = pair
    expected = count_by_hand(prediction, target, C, 255)
    counted = confusion_matrix(prediction, target, C)
    assert counted.dtype == np.int64
    np.testing.assert_array_equal(counted, expected)
    tensors = torch.from_numpy(prediction), torch.from_numpy(target)
    on_host = confusion_matrix(*tensors, C)
    assert isinstance(on_host, torch.Tensor)
    assert on_host.dtype == torch.int64
    np.testing.assert_array_equal(on_host, expected)
    # the path of accelerators, run where every machine can run it
    np.testing.assert_array_equal(_count_tensors(*tensors, C, 255), expected)


def test_agrees_with_torchmetrics():
    # takes seconds to import, so only the process that runs this test pays
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, C, (2, 32, 32), generator=generator)
    target = torch.randint(0, C, (2, 32, 32), generator=generator)
    target[:, :3] = 255
    counts = confusion_matrix(prediction, target, C)
    torch.testing.assert_close(counts, multiclass_confusion_matrix(prediction, target, C, ignore_index=255))
    expected = multiclass_jaccard_index(prediction, target, C, average=None, ignore_index=255)
    np.testing.assert_allclose(scores(counts)["iou"], expected, rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_counts_stay_on_the_device():
    prediction = torch.tensor([0, 1, 1], device="cuda")
    assert confusion_matrix(prediction, prediction, 2).device == prediction.device


def test_scores_agree_with_sklearn():
    rng = np.random.default_rng(1)
    prediction, target = rng.integers(0, C, 500), rng.integers(0, C, 500)
    result = scores(confusion_matrix(prediction, target, C))
    iou = sklearn_metrics.jaccard_score(target, prediction, average=None)
    np.testing.assert_allclose(result["iou"], iou)
    np.testing.assert_allclose(result["dice"], sklearn_metrics.f1_score(target, prediction, average=None))
    np.testing.assert_allclose(result["class_accuracy"], sklearn_metrics.recall_score(target, prediction, average=None))
    weighted = sklearn_metrics.jaccard_score(target, prediction, average="weighted")
    assert result["fwiou"] == pytest.approx(weighted)
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(target, prediction))
    assert result["class_accuracy_mean"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(target, prediction))
    assert result["dice_mean"] == pytest.approx(sklearn_metrics.f1_score(target, prediction, average="macro"))
    assert result["miou"] == pytest.approx(iou.mean())


def test_identity_scores_one_and_swapped_classes_score_zero():
    target = np.array([[0, 0, 1], [1, 1, 0]])
    perfect, swapped = scores(confusion_matrix(target, target, 2)), scores(confusion_matrix(1 - target, target, 2))
    for key in ("miou", "fwiou", "dice_mean", "dice_from_miou", "accuracy", "class_accuracy_mean"):
        assert (perfect[key], swapped[key]) == (1.0, 0.0), key


def test_class_absent_from_both_is_nan_and_in_no_mean():
    result = scores(confusion_matrix(np.array([0, 1]), np.array([0, 1]), 3))
    np.testing.assert_array_equal(result["iou"], [1, 1, np.nan])
    assert result["iou"].dtype == np.float64
    assert result["miou"] == result["fwiou"] == result["dice_mean"] == 1


def test_predicted_class_absent_from_truth_scores_zero():
    result = scores(confusion_matrix(np.array([0, 2]), np.array([0, 0]), 3))
    np.testing.assert_array_equal(result["iou"], [0.5, np.nan, 0])
    np.testing.assert_array_equal(result["class_accuracy"], [0.5, np.nan, np.nan])
    assert result["miou"] == 0.25
    assert result["fwiou"] == 0.5


def test_nothing_counted_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = scores(confusion_matrix(np.full((2, 2), 1), np.full((2, 2), 255), 2))
    assert all(np.isnan(value).all() for value in result.values())


# mean IoU and "Dice" as printed in published tables, where Dice was made from the mean IoU
@pytest.mark.parametrize(("miou", "dice"), [(0.6954, 0.8203), (0.8044, 0.8916), (0.8769, 0.9344), (0.7196, 0.8369)])
def test_dice_from_miou_gives_the_published_pairs(miou, dice):
    missed = (1 - miou) / (2 * miou)
    result = scores(np.array([[1, missed], [missed, 1]]))
    assert result["miou"] == pytest.approx(miou)
    assert result["dice_from_miou"] == pytest.approx(dice, abs=5e-5)


@given(st.lists(class_maps(), min_size=2, max_size=4), st.randoms())
def test_pooled_matrix_does_not_depend_on_order(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    matrices = [sum(confusion_matrix(*pair, C) for pair in order) for order in (pairs, shuffled)]
    np.testing.assert_array_equal(*matrices)
    joined = [np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1)]
    np.testing.assert_array_equal(matrices[0], confusion_matrix(*joined, C))


@given(class_maps(), st.permutations(range(C)))
def test_renaming_classes_renames_rows_and_columns(pair, order):
    prediction, target = pair
    table = np.array([*order, *[255] * (256 - C)], np.uint8)
    renamed = confusion_matrix(table[prediction], table[target], C)
    np.testing.assert_array_equal(renamed[np.ix_(order, order)], confusion_matrix(prediction, target, C))


@given(class_maps())
def test_both_flavours_of_dice_are_at_least_the_mean_iou(pair):
    result = scores(confusion_matrix(*pair, C))
    if not np.isnan(result["miou"]):
        assert result["miou"] <= result["dice_mean"] + 1e-12
        # 2x/(1+x) is concave, so the mean of Dice is at most Dice of the mean
        assert result["dice_mean"] <= result["dice_from_miou"] + 1e-12
        np.testing.assert_allclose(result["dice"], 2 * result["iou"] / (1 + result["iou"]))


def test_values_at_ignored_pixels_are_not_looked_at():
    counts = confusion_matrix(np.array([7, 255, 1]), np.array([255, 255, 1]), 2)
    np.testing.assert_array_equal(counts, [[0, 0], [0, 1]])


@pytest.mark.parametrize("ignore", [-100, 2, 0])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_any_ignore_value(ignore, kind):
    target = np.array([0, 1, 2, ignore])
    counts = confusion_matrix(kind(np.array([0, 1, 2, 0])), kind(target), 3, ignore_index=ignore)
    np.testing.assert_array_equal(counts, np.diag([index != ignore for index in range(3)]))


def test_negative_ignore_value_matches_no_byte():
    target = torch.tensor([156, 1], dtype=torch.uint8)  # -100 as a byte
    with pytest.raises(InputError, match="target value 156"):
        confusion_matrix(torch.tensor([0, 1], dtype=torch.uint8), target, 2, ignore_index=-100)


DTYPES = [np.uint8, np.int16, np.int32, np.int64, np.uint64]


@pytest.mark.parametrize(("first", "second"), [*itertools.product(DTYPES, repeat=2)])
def test_small_integers_do_not_overflow(first, second):
    prediction, target = np.array([199], first), np.array([198], second)
    counts = confusion_matrix(prediction, target, 200)
    assert counts[198, 199] == counts.sum() == 1


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([0, 7], [0, 1], "prediction value 7"),
        ([0, -1], [0, 1], "prediction value -1"),
        ([0, 255], [0, 1], "prediction value 255"),
        ([0, 1], [0, 4], "target value 4"),
        ([0, 1], [-2, 4], "target value -2"),
        ([0, 1], [[0, 1]], "prediction of shape"),
        ([0.0, 1.0], [0, 1], "prediction of type"),
        ([0, 1], [0.0, 1.0], "target of type"),
    ],
)
def test_bad_values_are_named(kind, prediction, target, message):
    with pytest.raises(InputError, match=message):
        confusion_matrix(kind(prediction), kind(target), C)
    if message.endswith(tuple("0123456789")):
        with pytest.raises(InputError, match=message):
            _count_tensors(torch.as_tensor(prediction), torch.as_tensor(target), C, 255)


def test_mixed_kinds_and_other_types_are_refused():
    array = np.array([0, 1])
    for pair in ((array, torch.as_tensor(array)), (torch.as_tensor(array), array), ([0, 1], [0, 1])):
        with pytest.raises(InputError, match="both"):
            confusion_matrix(*pair, 2)
    with pytest.raises(InputError, match="num_classes 0"):
        confusion_matrix(array, array, 0)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 3)), np.zeros((0, 0)), np.array([[1, -1], [0, 0]]), np.full((2, 2), np.nan)]
)
def test_scores_refuse_what_is_no_confusion_matrix(bad):
    with pytest.raises(InputError, match="confusion matrix"):
        scores(bad)


def test_scores_of_a_tensor_equal_scores_of_an_array():
    counts = np.array([[3, 1], [2, 4]])
    np.testing.assert_equal(scores(torch.from_numpy(counts)), scores(counts))


def test_package_offers_its_names_and_imports_neither_torch_nor_scipy():
    code = (
        "import sys, tissuehint.metrics as m; from tissuehint.metrics import *; "
        "assert all(hasattr(m, name) for name in m.__all__) and set(m.__all__) <= set(dir(m)); "
        "assert not {'torch', 'scipy', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
