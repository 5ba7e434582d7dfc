"""Plots of a run: metrics over steps, the bound over t, schedules, and distortion against rate."""

from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion.runtime import files

COLUMNS = 3  # of small panels
FEW = 10  # points; curves with fewer points get markers
# Metric -> its label. Versions up to 0.3 logged the loss of test images.
UNSEEN = {"val_loss": "validation", "test_loss": "test"}
NOT_BELOW = ("step", "loss", "validation_images", *UNSEEN)


def plot_loss(metrics: list[dict[str, Any]], path: str | Path) -> None:
    """Plots the training loss with its running mean and the validation loss, and below it every other logged metric."""
    others = list(dict.fromkeys(name for row in metrics for name in row if name not in NOT_BELOW))
    num_rows = -(-len(others) // COLUMNS)
    figure = Figure(figsize=(7, 4 + 1.7 * num_rows), layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, COLUMNS, height_ratios=[4] + [1.7] * num_rows)
    _draw_loss(figure.add_subplot(grid[0, :], xlabel="training step", ylabel="loss"), metrics)
    for i, name in enumerate(others):
        axes = figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS])
        axes.set_title(name, fontsize="small", parse_math=False)
        steps, values = _points(metrics, name)
        axes.plot(steps, values, linewidth=0.8, marker="." if len(steps) < FEW else "")
        axes.tick_params(labelsize="x-small")
        axes.grid(alpha=0.3)
    _save(figure, path)


def _points(metrics: list[dict[str, Any]], name: str) -> Float[np.ndarray, "2 n"]:
    """The steps at which a metric was logged, and its values."""
    return np.array([(row["step"], row[name]) for row in metrics if name in row]).reshape(-1, 2).T


def _draw_loss(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    steps, loss = _points(metrics, "loss")
    marker = "." if len(steps) < FEW else ""
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8, marker=marker, label="train")
    window = np.ones(len(loss) // 20 | 1)
    if len(window) > 1:
        # The divisor is the number of rows under the window, which is smaller at both ends.
        mean = np.convolve(loss, window, "same") / np.convolve(np.ones_like(loss), window, "same")
        axes.plot(steps, mean, color="tab:blue", label=f"train, mean of {len(window)} rows")
    unseen = {label: _points(metrics, name) for name, label in UNSEEN.items()}
    for (label, points), color in zip(unseen.items(), ("tab:orange", "tab:green"), strict=True):
        if points.size:
            axes.plot(*points, "o-", color=color, markersize=4, label=label)
    if all(np.all(values > 0) for values in (loss, *(points[1] for points in unseen.values()))):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def plot_bpd(
    path: str | Path,
    terms_bpd: Float[np.ndarray, " t"],
    train_terms_bpd: Float[np.ndarray, " t"],
    prior_bpd: SupportsFloat,
    title: str = "",
) -> None:
    """Plots the variational bound per t, and the sum of its terms up to t. Ho et al. (2020), eq. 5.

    Args:
        path: the file of the picture.
        terms_bpd: entry t - 1 is the mean term of t in bits/dim: the decoder's L_0 first, then the KL terms.
        train_terms_bpd: the same for training images.
        prior_bpd: L_T, in bits/dim.
        title: the name of the run.
    """
    t = np.arange(1, len(terms_bpd) + 1)
    decoder, kl, prior = float(terms_bpd[0]), float(terms_bpd[1:].sum()), float(prior_bpd)
    figure = Figure(figsize=(7, 6), layout="constrained")
    per_t, cumulative = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(f"{title}: {decoder + kl + prior:.4f} bits/dim".removeprefix(": "))
    per_t.loglog(t[1:], train_terms_bpd[1:], color="tab:orange", linewidth=1, label="training images")
    cumulative.plot(t, np.cumsum(train_terms_bpd), color="tab:orange", linewidth=1)
    kl_label = rf"KL terms $\Sigma_{{t>1}} L_{{t-1}}$: {kl:.4f}"
    per_t.loglog(t[1:], terms_bpd[1:], color="tab:blue", label=kl_label)
    per_t.loglog(1, decoder, "o", color="tab:red", label=f"decoder $L_0$ (t = 1): {decoder:.4f}")
    per_t.plot([], [], " ", label=f"prior $L_T$: {prior:.2g}")
    per_t.set_ylabel("term of t (bits/dim)")
    per_t.legend(title="bits/dim")
    cumulative.plot(t, np.cumsum(terms_bpd), color="tab:blue")
    cumulative.plot(1, decoder, "o", color="tab:red")
    cumulative.set_ylim(bottom=0)
    cumulative.set(xlabel="t", ylabel="sum of terms up to t\n(bits/dim)")
    for axes in (per_t, cumulative):
        axes.grid(alpha=0.3, which="both")
    _save(figure, path)


def plot_schedules(path: str | Path, log_snr: dict[str, Float[np.ndarray, " t"]], title: str = "") -> None:
    """Plots log SNR_t of several schedules against t/T, the first on top of the others.

    Args:
        path: the file of the picture.
        log_snr: schedule's name -> log SNR_1…log SNR_T; T may differ.
        title: the name of the run.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="t / T", ylabel="log SNR", title=title)
    for i, (name, values) in enumerate(log_snr.items()):
        t = np.arange(1, len(values) + 1) / len(values)
        style = {"color": "tab:red", "linewidth": 2, "zorder": 3} if i == 0 else {"linestyle": "--", "linewidth": 1.2}
        axes.plot(t, values, label=name, **style)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_rate_distortion(
    path: str | Path,
    rate_bpd: Float[np.ndarray, " t"],
    rmse: Float[np.ndarray, " t"],
    num_levels: int = 256,
    title: str = "",
) -> None:
    """Plots progressive coding: the error of x̂_0 after each reverse step, and its cost. Ho et al. (2020), figure 5.

    Args:
        path: the file of the picture.
        rate_bpd: entry t - 1 is the cost of x_T, …, x_t together, in bits/dim.
        rmse: entry t - 1 is the root mean squared error of x̂_0 given x_t, in pixel values.
        num_levels: the number of pixel values.
        title: the name of the run.
    """
    reverse_steps = len(rmse) - np.arange(1, len(rmse) + 1)
    steps_label, rate_label = "reverse steps T − t", "rate (bits/dim)"
    distortion_label = f"distortion (RMSE in pixel values 0–{num_levels - 1})"
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(f"{title}: rate {rate_bpd[0]:.4f} bits/dim, RMSE {rmse[0]:.3f}".removeprefix(": "))
    panels = (
        (reverse_steps, rmse, steps_label, distortion_label),
        (reverse_steps, rate_bpd, steps_label, rate_label),
        (rate_bpd, rmse, rate_label, distortion_label),
    )
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y, color="tab:blue")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    with files.replacing(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)
