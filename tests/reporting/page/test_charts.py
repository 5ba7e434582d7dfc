"""Curves: where points lie, what is left out, and what the axes say."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.reporting.page import charts
from diffusion.reporting.page.charts import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Axis, Series

ENDS = st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6)


@given(low=ENDS, width=st.floats(1e-3, 1e6))
def test_linear_ticks_are_round_and_within_the_axis(low, width):
    axis = Axis("", False, low, low + width)
    found = np.array(charts.ticks(axis))
    assert 3 <= len(found) <= 8
    slack = 1e-8 * width
    assert axis.low - slack <= found[0] and found[-1] <= axis.high + slack
    step = np.diff(found)
    np.testing.assert_allclose(step, step[0], rtol=1e-4)
    assert f"{step[0]:.3e}"[:3] in ("1.0", "2.0", "5.0")


@given(low=st.floats(1e-30, 1e30), decades=st.floats(0.05, 12))
def test_logarithmic_ticks_lie_on_the_axis(low, decades):
    axis = Axis("", True, low, low * 10**decades)
    found = np.array(charts.ticks(axis))
    assert 3 <= len(found) <= 8 and np.all(np.diff(found) > 0)
    assert np.all(found >= axis.low * (1 - 1e-6)) and np.all(found <= axis.high * (1 + 1e-6))


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.0, "0"), (0.05, "0.05"), (2000.0, "2,000"), (3 * 0.1, "0.3"), (1e-5, "10⁻⁵"), (2e6, "2·10⁶"), (-0.5, "-0.5")],
)
def test_tick_labels(value, label):
    assert charts.tick_label(value) == label


def drawn(markup):
    """The points of each polyline."""
    found = re.findall('points="(.*?)"', markup)
    return [np.array([pair.split(",") for pair in points.split()], float) for points in found]


def test_points_lie_where_the_axes_say():
    x, y = np.array([1.0, 10.0, 100.0]), np.array([0.0, 1.0, 4.0])
    (points,) = drawn(charts.chart("", "", "", [Series("", x, y)], log_x=True))
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    wanted = [(left, bottom), ((left + right) / 2, bottom - (bottom - top) / 4), (right, top)]
    np.testing.assert_allclose(points, wanted, atol=0.06)  # rounded to tenths of a pixel


def test_what_cannot_be_drawn_is_left_out():
    x, y = np.array([0.0, 1, 2, 3, 4, 5]), np.array([1.0, np.nan, np.inf, -1, 2, 1e300])
    (points,) = drawn(charts.chart("", "", "", [Series("", x, y)]))
    assert len(points) == 3
    (points,) = drawn(charts.chart("", "", "", [Series("", x + 1, y)], log_x=True, log_y=True))
    assert len(points) == 2
    assert charts.chart("", "", "", [Series("", x[1:3], y[1:3])]) == ""


def test_a_long_curve_has_few_points_and_keeps_its_peaks():
    y = np.sin(np.arange(50_000.0))
    y[33_333], y[44_444] = 50, -50
    short = charts.thinned(Series("", np.arange(50_000.0), y))
    assert len(short.x) <= MAX_POINTS and np.all(np.diff(short.x) > 0)
    assert (short.y.max(), short.y.min()) == (50, -50) and 33_333 in short.x
    np.testing.assert_array_equal(short.y, y[short.x.astype(int)])
    whole = Series("", np.arange(1000.0), np.arange(1000.0))
    assert charts.thinned(whole) is whole


@pytest.mark.parametrize("y", [[2.0, 2.0], [0.0, 0.0], [1.0, 1 + 1e-15], [1e30, 1e30], [-3.0]])
@pytest.mark.parametrize("log_y", [False, True])
def test_a_curve_without_height_is_drawn(y, log_y):
    y = np.array(y)
    markup = charts.chart("", "", "", [Series("", np.arange(1.0, len(y) + 1), y)], log_y=log_y)
    assert "nan" not in markup and bool(markup) == bool(not log_y or np.all(y > 0))
