"""The 95% interval of the mean of a few values, such as one per seed, and its format in all tables."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """The mean of n values and the half-width of its interval: NaN for one value, which has none."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def of_mean(values: Iterable[float]) -> Interval:
    """Student's t interval of the mean of independent, normally distributed values.

    Raises:
        ValueError: there are no values.
    """
    values = np.array(list(values), np.float64)
    n = len(values)
    if not n:
        raise ValueError("no values have a mean")
    if n == 1:
        return Interval(float(values[0]), np.nan, 1)
    if np.ptp(values) == 0:  # rounding of their mean is not spread
        return Interval(float(values[0]), 0.0, n)
    quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    return Interval(float(values.mean()), float(quantile * stats.sem(values)), n)


def paired(values: Mapping[Any, float], base: Mapping[Any, float]) -> dict[Any, float]:
    """Each value minus the base's value of the same key, such as a seed. Keys that only one has are left out."""
    return {key: value - base[key] for key, value in values.items() if key in base}


def text(interval: Interval, digits: int, signed: bool = False) -> str:
    """The mean ± the half-width, with `digits` decimals. Tables explain it with `caption`.

    A half-width is never rounded to 0, and equal values are marked as equal. Neither means that nothing varies.
    """
    mean = f"{interval.mean:{'+' if signed else ''}.{digits}f}"
    half = interval.half_width
    if interval.n == 1:
        return mean
    if half == 0:
        return f"{mean} (all {interval.n} equal)"
    shown = f"{half:.{digits}f}"
    return f"{mean} ± {shown if float(shown) else f'{half:.1g}'}"


def caption(counts: Iterable[int], unit: str = "seed") -> str:
    """The caption of a table with numbers from `text`; `counts` has each row's number of values."""
    counts = set(counts)
    low, high = min(counts), max(counts)
    if high == 1:
        return f"one {unit}, no interval"
    n = str(high) if low == high else f"{low} to {high}"
    without = f"; one {unit} has no interval" if low == 1 else ""
    return f"mean ± {LEVEL:.0%} interval (Student's t, n = {n} {unit}s{without})"
