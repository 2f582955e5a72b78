import statistics
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from tissuehint.errors import InputError
from tissuehint.metrics import P_LEVELS, mean_std, welch_t_test

values = st.lists(st.integers(0, 1000).map(lambda number: number / 1000), min_size=2, max_size=8)


@given(values)
def test_mean_and_sample_deviation(sample):
    mean, deviation = mean_std(sample)
    assert mean == pytest.approx(statistics.mean(sample))
    assert deviation == pytest.approx(statistics.stdev(sample), abs=1e-12)


def test_one_seed_has_no_deviation():
    mean, deviation = mean_std([0.7])
    assert mean == 0.7
    assert np.isnan(deviation)


@given(values, values)
def test_welch_follows_its_formula(a, b):
    spread = [statistics.variance(sample) / len(sample) for sample in (a, b)]
    result = welch_t_test(a, b)
    if sum(spread) > 1e-9:
        t = (statistics.mean(a) - statistics.mean(b)) / sum(spread) ** 0.5
        freedom = sum(spread) ** 2 / (spread[0] ** 2 / (len(a) - 1) + spread[1] ** 2 / (len(b) - 1))
        assert result["t"] == pytest.approx(t, abs=1e-9)
        assert result["degrees_of_freedom"] == pytest.approx(freedom)
        # Student's t through the incomplete beta function
        p = special.betainc(freedom / 2, 0.5, freedom / (freedom + t**2))
        assert result["p"] == pytest.approx(p, abs=1e-9)


@given(values, values)
def test_exchanging_the_samples_turns_the_sign_only(a, b):
    one, other = welch_t_test(a, b), welch_t_test(b, a)
    np.testing.assert_allclose(one["p"], other["p"])
    np.testing.assert_allclose(one["t"], -other["t"])


def test_samples_without_spread_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(welch_t_test([0.5, 0.5], [0.5, 0.5])["p"])
        assert welch_t_test([0.5, 0.5], [0.7, 0.7])["p"] == 0


def test_clear_differences_pass_every_level():
    p = welch_t_test([0.70, 0.71, 0.705, 0.70, 0.71], [0.60, 0.61, 0.605, 0.60, 0.61])["p"]
    assert all(p < level for level in P_LEVELS)


@pytest.mark.parametrize(("a", "b"), [([0.5], [0.5, 0.6]), ([0.5, 0.6], []), ([[0.5, 0.6]], [0.5, 0.6])])
def test_too_few_values_are_refused(a, b):
    with pytest.raises(InputError, match="more seeds"):
        welch_t_test(a, b)


def test_mean_of_nothing_is_refused():
    with pytest.raises(InputError, match="values"):
        mean_std([])
