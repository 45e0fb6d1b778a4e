import math

import numpy as np
import pytest
from scipy import stats

from diffbir.evaluation.statistics import difference, quantile, summary


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 49, 2999])
def test_quantiles_are_those_of_scipy(freedom):
    assert quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


def test_means_and_their_errors():
    found = summary([1.0, 2.0, math.nan, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.error == pytest.approx(stats.sem([1, 2, 6]))
    assert math.isnan(summary([4.0]).error) and math.isnan(summary([]).mean)
    assert summary([1.0, math.inf]).mean == math.inf


def test_a_paired_difference_sees_what_unpaired_means_hide():
    """Both scatter by 10 between pictures, and differ by 1 +- 0.1 on each."""
    rng = np.random.default_rng(0)
    b = rng.normal(0, 10, 30)
    a = b + 1 + rng.normal(0, 0.1, 30)
    found = difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert found.certain and found.wins == 1 and found.count == 30
    assert not difference(b, np.roll(b, 1)).certain
    assert difference([1.0, math.nan, 2.0], [1.0, 5.0, 1.0]).wins == 0.75
    assert math.isnan(difference([1.0], [2.0]).low)
