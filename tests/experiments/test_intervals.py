"""Intervals of means over few values: Student's quantiles as in printed tables, pairs of one seed, and formatting."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments import intervals
from experiments.intervals import Interval

# The 97.5% points of Student's t by n − 1, from the table in NIST's Engineering Statistics Handbook, 1.3.6.7.2.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 100: 1.984}


@pytest.mark.parametrize(("degrees", "quantile"), QUANTILES.items())
def test_the_half_width_is_a_published_quantile_of_standard_errors(degrees, quantile):
    values = np.arange(degrees + 1.0) ** 2
    found = intervals.of_mean(values)
    assert found.n == degrees + 1 and found.mean == pytest.approx(sum(values) / len(values))
    variance = sum((value - found.mean) ** 2 for value in values) / degrees
    assert found.half_width / math.sqrt(variance / found.n) == pytest.approx(quantile, abs=6e-4)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


def test_the_interval_is_that_of_a_t_test():
    values = [2.31, 2.29, 2.35, 2.30]
    expected = stats.ttest_1samp(values, 2.0).confidence_interval(0.95)
    found = intervals.of_mean(values)
    np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high))


def test_of_a_hundred_repetitions_some_95_intervals_hold_the_mean():
    """With 1.96 standard errors, of three values only 81% would."""
    groups = np.random.default_rng(0).normal(size=(4000, 3))
    found = [intervals.of_mean(group) for group in groups]
    held = np.mean([interval.low < 0 < interval.high for interval in found])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_value_has_no_interval_and_none_no_mean():
    found = intervals.of_mean([2.5])
    assert (found.mean, found.n) == (2.5, 1) and math.isnan(found.half_width)
    assert intervals.text(found, 3) == "2.500"
    with pytest.raises(ValueError, match="no values"):
        intervals.of_mean([])


def test_values_are_paired_by_their_key_in_whatever_order_they_stand():
    assert intervals.paired({0: 5.0, 1: 7.0, 2: 9.0}, {2: 1.0, 0: 3.0, 1: 2.0}) == {0: 2.0, 1: 5.0, 2: 8.0}


def test_a_seed_that_is_missing_is_not_paired_with_another():
    """As many values on both sides, but of one seed only both."""
    assert intervals.paired({0: 5.0, 2: 9.0}, {0: 3.0, 1: 2.0}) == {0: 2.0}
    assert intervals.paired({0: 5.0}, {1: 3.0}) == {}


@pytest.mark.parametrize(
    ("interval", "printed"),
    [
        (Interval(2.31534, 0.01166, 3), "2.3153 ± 0.0117"),
        (Interval(-0.5, 0.25, 2), "-0.5000 ± 0.2500"),
        (Interval(2.0, 0.000004, 3), "2.0000 ± 4e-06"),
        (Interval(1.0, 0.0, 3), "1.0000 (all 3 equal)"),
        (Interval(2.0, math.nan, 1), "2.0000"),
    ],
)
def test_a_half_width_is_never_printed_as_zero(interval, printed):
    assert intervals.text(interval, 4) == printed
    assert intervals.text(interval, 4, signed=True).lstrip("+-") == printed.lstrip("-")


def test_a_signed_mean_shows_its_sign():
    assert intervals.text(Interval(0.5, 0.25, 2), 2, signed=True) == "+0.50 ± 0.25"


def test_equal_values_are_called_equal_whatever_the_rounding_of_their_mean():
    assert np.std([0.1] * 3, ddof=1) > 0
    assert intervals.text(intervals.of_mean([0.1] * 3), 1) == "0.1 (all 3 equal)"


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([3, 3], "mean ± 95% interval (Student's t, n = 3 seeds)"),
        ([3, 2], "mean ± 95% interval (Student's t, n = 2 to 3 seeds)"),
        ([1, 3], "mean ± 95% interval (Student's t, n = 1 to 3 seeds; one seed has no interval)"),
        ([1], "one seed, no interval"),
    ],
)
def test_the_caption_says_what_the_numbers_are(counts, words):
    assert intervals.caption(counts) == words


def test_the_caption_names_what_is_counted():
    assert intervals.caption([5], "set") == "mean ± 95% interval (Student's t, n = 5 sets)"
