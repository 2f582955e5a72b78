import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as sklearn_metrics

from tissuehint.errors import InputError
from tissuehint.metrics import tag_scores

shape = (6, 3)


@given(
    arrays.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])),
    arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)),
    st.sampled_from([0.1, 0.25, 0.5]),
)
def test_agrees_with_sklearn(probability, tags, threshold):
    result = tag_scores(probability, tags, threshold)
    predicted = probability > threshold
    f1 = sklearn_metrics.f1_score(tags, predicted, average=None, zero_division=np.nan)
    np.testing.assert_allclose(result["f1"], f1)
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(tags, predicted))
    mixed = np.ptp(tags, axis=0) == 1
    np.testing.assert_array_equal(np.isnan(result["auc"]), ~mixed)
    for label in np.flatnonzero(mixed):
        expected = sklearn_metrics.roc_auc_score(tags[:, label], probability[:, label])
        assert result["auc"][label] == pytest.approx(expected)
    for key in ("f1", "auc"):
        known = result[key][~np.isnan(result[key])]
        assert result[f"{key}_mean"] == pytest.approx(known.mean() if known.size else np.nan, nan_ok=True)


def test_takes_tensors():
    tags = torch.tensor([[1, 0], [0, 1]])
    result = tag_scores(tags.float(), tags)
    assert (result["f1_mean"], result["accuracy"], result["auc_mean"]) == (1, 1, 1)


def test_one_wrong_tag_makes_the_image_wrong():
    assert tag_scores([[0.9, 0.9], [0.9, 0.1]], [[1, 0], [1, 0]])["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("probability", "tags", "message"),
    [
        ([[0.5, 2.0]], [[0, 1]], "probability 2"),
        ([[0.5, 0.5]], [[0, 2]], "tag 2"),
        ([[0.5, 0.5]], [[0]], "shape"),
        ([0.5], [0], "shape"),
    ],
)
def test_bad_values_are_named(probability, tags, message):
    with pytest.raises(InputError, match=message):
        tag_scores(probability, tags)
