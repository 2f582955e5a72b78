"""Mean and spread over seeds or folds, and whether two methods differ by more than their spread."""

from __future__ import annotations

import warnings
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tissuehint.errors import InputError

# levels at which the compared papers mark a difference
P_LEVELS = (0.05, 0.005, 0.001)


class WelchResult(TypedDict):
    """Result of ``welch_t_test``."""

    t: float
    degrees_of_freedom: float
    p: float


def mean_std(values: ArrayLike) -> tuple[float, float]:
    r"""Mean and sample standard deviation (divisor n - 1).

    .. math:: s = \sqrt{\tfrac{1}{n-1}\sum_i (x_i - \bar x)^2}

    Args:
        values: (n,) one score per seed or fold.

    Returns:
        Mean and standard deviation; the latter is NaN for a single value.

    Raises:
        InputError: no value, or not a list of numbers.

    Example:
        >>> mean_std([0.5, 0.75, 1.0])
        (0.75, 0.25)
    """
    sample = _sample(values, "values", 1)
    return float(sample.mean()), float(sample.std(ddof=1)) if sample.size > 1 else float("nan")


def welch_t_test(a: ArrayLike, b: ArrayLike) -> WelchResult:
    r"""Two-sided independent two-sample t-test that does not assume equal variances.

    .. math::
        t = \frac{\bar a - \bar b}{\sqrt{s_a^2/n_a + s_b^2/n_b}}, \quad
        \nu = \frac{(s_a^2/n_a + s_b^2/n_b)^2}{(s_a^2/n_a)^2/(n_a-1) + (s_b^2/n_b)^2/(n_b-1)}

    Source: B. L. Welch, Biometrika 34, 1947.

    Args:
        a: (n_a,) scores of one method, one per seed.
        b: (n_b,) scores of the other.

    Returns:
        ``t``, ``degrees_of_freedom`` and ``p``. Where neither sample varies, ``p`` is 0 for different means and NaN
        for equal ones: the seeds changed nothing, and the test says nothing.

    Raises:
        InputError: fewer than two values in a sample.

    Example:
        >>> result = welch_t_test([0.70, 0.72, 0.71], [0.66, 0.67, 0.65])
        >>> round(result["p"], 4)
        0.0036
    """
    from scipy import stats

    first, second = _sample(a, "a", 2), _sample(b, "b", 2)
    with warnings.catch_warnings():
        # samples without spread: said in the docstring and by the returned NaN or infinity
        warnings.simplefilter("ignore", RuntimeWarning)
        result = stats.ttest_ind(first, second, equal_var=False)
    return {"t": float(result.statistic), "degrees_of_freedom": float(result.df), "p": float(result.pvalue)}


def _sample(values: ArrayLike, name: str, smallest: int) -> NDArray[np.float64]:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or sample.size < smallest:
        rule = f"is a list of at least {smallest} numbers, its shape is {sample.shape}"
        raise InputError(f"sample '{name}'", rule, "run more seeds")
    return sample
