"""The curves of a run: the bound per t, rate against distortion, and what was logged during training."""

from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion.reporting.page import layout
from diffusion.reporting.page.charts import Series, chart, running_mean
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.markup import Markup, details, element, is_number

BOUND = "bpd.npz"
MAX_OTHER_CURVES = 12


def section(contents: Contents, rows: list[dict[str, Any]]) -> list[Markup]:
    """Every curve; where its numbers cannot be read, the plot that the program left."""
    bound, loss = _bound(contents), _loss(rows)
    plots = []
    if not bound:
        plots += [layout.plot(contents, "bpd.png", "The bound per t", "The bound per t")]
        words = "Rate against distortion"
        plots += [layout.plot(contents, "rate_distortion.png", words, words)]
    if not loss:
        plots += [layout.plot(contents, "loss.png", "The loss over training steps", "Loss")]
    words = "log SNR per t: the learned schedule, and where it started"
    plots += [layout.plot(contents, "schedule.png", words, words)]
    made = [loss, *bound] if loss else bound
    charts = [element("div", *made, class_="charts")] if made else []
    return charts + [made for made in plots if made] + _others(rows)


def points(rows: list[dict[str, Any]], name: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The steps at which a metric was logged, and its values."""
    pairs = [(row["step"], row[name]) for row in rows if is_number(row.get(name)) and is_number(row["step"])]
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    return x, y


def _loss(rows: list[dict[str, Any]]) -> Markup:
    """The training loss per row and its running mean, and the test loss where it was measured."""
    steps, loss = points(rows, "loss")
    curves = []
    if len(loss):
        window = len(loss) // 20 | 1
        mean = Series(f"train, mean of {window} rows", steps, running_mean(loss, window), colour=1)
        curves = [Series("train", steps, loss, colour=1, style="faint"), mean]
    test_steps, test = points(rows, "test_loss")
    curves.append(Series("test", test_steps, test, colour=2, style="dots"))
    is_log = bool(np.all(loss > 0) and np.all(test > 0))
    return chart("Loss", "training step", "loss", curves, log_y=is_log)


def _others(rows: list[dict[str, Any]]) -> list[Markup]:
    """What else was logged, folded away."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "loss", "test_loss"))
    charts = [
        chart(name, "training step", name, [Series("", *points(rows, name))]) for name in list(names)[:MAX_OTHER_CURVES]
    ]
    charts = [made for made in charts if made]
    return [details("What else was logged", element("div", *charts, class_="charts"))] if charts else []


def _bound(contents: Contents) -> list[Markup]:
    """Ho et al. (2020), eq. 5: the terms per t and their sum; figure 5: rate and distortion."""
    arrays = contents.arrays(BOUND)
    per_t, total = [], []
    for split, colour in (("train", 2), ("test", 1)):
        terms = _curve(arrays, f"{split}_terms_bpd")
        t = np.arange(1.0, len(terms) + 1)
        per_t.append(Series(f"{split}: KL terms", t[1:], terms[1:], colour))
        per_t.append(Series(f"{split}: decoder", t[:1], terms[:1], colour, "dots"))
        total.append(Series(split, t, np.cumsum(terms), colour))
    rate, distortion = _curve(arrays, "test_rate_bpd"), _curve(arrays, "test_distortion_rmse")
    coding = [Series("", rate, distortion)] if len(rate) == len(distortion) else []
    charts = [
        chart("Term of the bound per t", "t", "bits/dim", per_t, log_x=True, log_y=True),
        chart("Sum of the terms up to t", "t", "bits/dim", total, from_zero=True),
        chart("Rate against distortion", "rate (bits/dim)", "RMSE in pixel values", coding, from_zero=True),
    ]
    return [made for made in charts if made]


def _curve(arrays: dict[str, np.ndarray], name: str) -> Float[np.ndarray, " n"]:
    """A curve of bpd.npz; empty if it is none."""
    values = arrays.get(name, np.zeros(0))
    return values.astype(np.float64) if values.ndim == 1 and values.dtype.kind == "f" else np.zeros(0)
