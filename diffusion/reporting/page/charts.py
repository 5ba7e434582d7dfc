"""Curves as SVG, which needs no library to be seen; their colours follow the page's light or dark scheme."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from diffusion.reporting.page.markup import Markup, element

MAX_POINTS = 1000  # of a curve
WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44  # what the axes leave free for their labels
MIN_TICKS, MAX_TICKS = 3, 8
SMALL = np.finfo(np.float32)


class Series(NamedTuple):
    """A curve.

    Attributes:
        name: in the legend; "" for none.
        x, y: its points.
        colour: 1 to 4.
        style: line, faint or dots.
    """

    name: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    colour: int = 1
    style: str = "line"


class Axis(NamedTuple):
    """One direction of a chart: its words, its scale and its ends."""

    label: str
    is_log: bool
    low: float
    high: float

    def fraction(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Where values lie: 0 at the low end, 1 at the high one."""
        low, high = self._scaled(np.array([self.low, self.high]))
        return (self._scaled(values) - low) / (high - low)

    def _scaled(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.log10(values) if self.is_log else values


def axis(label: str, values: Float[np.ndarray, " n"], is_log: bool = False, from_zero: bool = False) -> Axis:
    """An axis on which all values lie."""
    low, high = float(values.min()), float(values.max())
    if from_zero:
        low = min(low, 0.0)
    if is_log and high / low < 1.1:
        low, high = low / 2, high * 2
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # else the ticks would need many digits
        margin = max(abs(low), abs(high)) / 2 or 0.5
        low, high = low - margin, high + margin
    return Axis(label, is_log, low, high)


def ticks(axis: Axis) -> list[float]:
    """Round values along an axis, increasing."""
    if not axis.is_log:
        return _round_values(axis.low, axis.high)
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        values = [factor * 10.0**k for k in decades for factor in factors]
        values = [value for value in values if axis.low <= value <= axis.high]
        if len(values) >= MIN_TICKS:
            return values[:: -(-len(values) // MAX_TICKS)]
    return _round_values(axis.low, axis.high)


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two ends: 3 to MAX_TICKS of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / MAX_TICKS))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        values = [k * step for k in range(first, last + 1)]
        # The next larger step is 2.5 times as large at most: of 9 ticks at least 3 are left.
        if len(values) <= MAX_TICKS:
            break
    return values


def tick_label(value: float) -> str:
    """A round value in few letters: 0.05, 2,000, 10⁻⁵, 2·10⁶."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10.0**power:.3g}"
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if factor == "1" else f"{factor}·10{digits}"


def thinned(series: Series) -> Series:
    """The same curve in at most MAX_POINTS points: of each stretch its lowest and its highest, so peaks stay."""
    if len(series.x) <= MAX_POINTS:
        return series
    stretches = np.array_split(np.arange(len(series.x)), MAX_POINTS // 2)
    extremes = [(part[series.y[part].argmin()], part[series.y[part].argmax()]) for part in stretches]
    kept = np.unique(extremes)
    return series._replace(x=series.x[kept], y=series.y[kept])


def running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """The mean of the values around each one: `window` of them, fewer at both ends."""
    weights = np.ones(window)
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")


def chart(
    title: str,
    x_label: str,
    y_label: str,
    curves: list[Series],
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
) -> Markup:
    """A figure with curves in it, a title above and a legend below; "" if no curve has a point.

    Points that are NaN, Inf or beyond float32, or not positive on a logarithmic axis, are left out.

    Args:
        title: of the figure.
        x_label, y_label: of the axes.
        curves: the first is drawn first.
        log_x, log_y: which axes are logarithmic.
        from_zero: whether the y axis begins at 0.
    """
    curves = [_drawable(series, log_x, log_y) for series in curves]
    curves = [thinned(series) for series in curves if len(series.x)]
    if not curves:
        return Markup()
    x_axis = axis(x_label, np.concatenate([series.x for series in curves]), log_x)
    y_axis = axis(y_label, np.concatenate([series.y for series in curves]), log_y, from_zero)
    names = [series for series in curves if series.name]
    spoken = f"{title}: {y_label} against {x_label}; " + ", ".join(series.name for series in names)
    picture = element(
        "svg",
        *_grid(x_axis, y_axis),
        *(_curve(series, x_axis, y_axis) for series in curves),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=spoken.removesuffix("; "),
    )
    legend = [
        element("li", element("span", class_=f"key c{series.colour} {series.style}"), series.name) for series in names
    ]
    caption = element("figcaption", element("strong", title))
    return element("figure", caption, picture, element("ul", *legend, class_="legend"), class_="chart")


def _drawable(series: Series, log_x: bool, log_y: bool) -> Series:
    x, y = (np.asarray(values, np.float64) for values in (series.x, series.y))
    kept: Bool[np.ndarray, " n"] = (np.abs(x) <= SMALL.max) & (np.abs(y) <= SMALL.max)
    kept &= (x >= SMALL.tiny) | (not log_x)
    kept &= (y >= SMALL.tiny) | (not log_y)
    return series._replace(x=x[kept], y=y[kept])


def _across(axis: Axis, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.fraction(values)


def _up(axis: Axis, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.fraction(values)


def _grid(x_axis: Axis, y_axis: Axis) -> list[Markup]:
    """Lines and numbers at the ticks, and the labels of the axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    x_ticks, y_ticks = ticks(x_axis), ticks(y_axis)
    for value, x in zip(x_ticks, _across(x_axis, np.array(x_ticks)).round(1), strict=True):
        parts.append(element("line", x1=x, x2=x, y1=TOP, y2=bottom))
        parts.append(element("text", tick_label(value), x=x, y=bottom + 16, text_anchor="middle"))
    for value, y in zip(y_ticks, _up(y_axis, np.array(y_ticks)).round(1), strict=True):
        parts.append(element("line", x1=LEFT, x2=right, y1=y, y2=y))
        parts.append(element("text", tick_label(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    x_middle, y_middle = (LEFT + right) / 2, (TOP + bottom) / 2
    turned = f"translate(12 {y_middle}) rotate(-90)"
    parts.append(element("text", x_axis.label, x=x_middle, y=HEIGHT - 8, text_anchor="middle", class_="label"))
    parts.append(element("text", y_axis.label, transform=turned, text_anchor="middle", class_="label"))
    return [element("g", *parts, class_="grid", aria_hidden="true")]


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    x, y = _across(x_axis, series.x).round(1), _up(y_axis, series.y).round(1)
    class_ = f"c{series.colour} {series.style}"
    if series.style == "dots" or len(x) == 1:
        dots = [element("circle", cx=a, cy=b, r=3.5) for a, b in zip(x, y, strict=True)]
        return element("g", *dots, class_=f"c{series.colour} dots")
    points = " ".join(f"{a:g},{b:g}" for a, b in zip(x, y, strict=True))
    return element("polyline", points=points, class_=class_)
