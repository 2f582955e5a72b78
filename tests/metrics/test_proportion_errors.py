import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import optimize, stats

from tissuehint.errors import InputError
from tissuehint.metrics import proportion_errors, proportions_of

C = 3


@st.composite
def shares(draw, rows=4):
    weights = draw(arrays.arrays(np.int64, (rows, C), elements=st.integers(0, 20)))
    weights[weights.sum(axis=1) == 0] = 1
    return weights / weights.sum(axis=1, keepdims=True)


def transport_cost(first, second):
    """Cheapest way to turn one share into the other where every move between classes costs 1, by linear programming."""
    cost = (1 - np.eye(C)).ravel()
    rows = np.kron(np.eye(C), np.ones(C))
    columns = np.kron(np.ones(C), np.eye(C))
    plan = optimize.linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([first, second]))
    return plan.fun


@given(arrays.arrays(np.uint8, (5, 6), elements=st.sampled_from([0, 1, 2, 3, 255])))
def test_proportions_are_shares_of_the_tissue(prediction):
    result = proportions_of(prediction, C)
    tissue = [(prediction == label).sum() for label in range(C)]
    if sum(tissue):
        np.testing.assert_allclose(result, np.array(tissue) / sum(tissue))
        assert result.sum() == pytest.approx(1)
    else:
        assert np.isnan(result).all()
    np.testing.assert_array_equal(proportions_of(torch.from_numpy(prediction), C), result)


@given(shares(), shares())
def test_errors_agree_with_their_definitions(predicted, target):
    result = proportion_errors(predicted, target)
    expected = [sum(abs(predicted[i, c] - target[i, c]) for i in range(4)) / 4 for c in range(C)]
    np.testing.assert_allclose(result["mae"], expected, atol=1e-12)
    assert result["mae_mean"] == pytest.approx(np.mean(expected))
    # each unit of distance is counted at the class that loses and at the class that gains
    assert result["w1"] == pytest.approx(C * result["mae_mean"] / 2)
    assert 0 <= result["w1"] <= 1
    raised = np.maximum(predicted, 1e-6)
    expected = np.mean([stats.entropy(t, p / p.sum()) for t, p in zip(target, raised, strict=True)])
    assert result["kl"] == pytest.approx(expected, abs=1e-12)
    assert np.isfinite(result["kl"])


def test_w1_is_the_cheapest_transport():
    rng = np.random.default_rng(0)
    predicted, target = rng.dirichlet(np.ones(C), 3), rng.dirichlet(np.ones(C), 3)
    costs = [transport_cost(p, t) for p, t in zip(predicted, target, strict=True)]
    assert proportion_errors(predicted, target)["w1"] == pytest.approx(np.mean(costs))


@given(shares())
def test_equal_proportions_have_no_error(target):
    result = proportion_errors(target, target)
    np.testing.assert_array_equal(result["mae"], np.zeros(C))
    assert result["w1"] == 0
    assert result["kl"] == pytest.approx(0, abs=1e-4)


def test_images_without_tissue_are_left_out_and_said():
    nothing = [np.nan] * C
    result = proportion_errors([[1, 0, 0], nothing, [0, 1, 0]], [[0, 1, 0], [1, 0, 0], nothing])
    assert result["images"] == 1
    assert result["w1"] == 1
    empty = proportion_errors([nothing], [nothing])
    assert empty["images"] == 0
    assert np.isnan([*empty["mae"], empty["mae_mean"], empty["kl"], empty["w1"]]).all()


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        ([[0.5, 0.5]], [[0.5, 0.6]], "true proportions of row 0"),
        ([[0.5, 0.5], [0.2, 0.2]], [[0.5, 0.5], [1, 0]], "predicted proportions of row 1"),
        ([[1.5, -0.5]], [[0.5, 0.5]], "predicted proportions"),
        ([0.5, 0.5], [0.5, 0.5], "shape"),
        ([[0.5, 0.5]], [[0.5, 0.25, 0.25]], "shape"),
    ],
)
def test_bad_proportions_are_named(predicted, target, message):
    with pytest.raises(InputError, match=message):
        proportion_errors(predicted, target)


@pytest.mark.parametrize("prediction", [np.array([[4]]), np.array([[-1]]), np.array([0]), np.array([[0.5]])])
def test_bad_class_maps_are_refused(prediction):
    with pytest.raises(InputError, match="prediction"):
        proportions_of(prediction, C)
