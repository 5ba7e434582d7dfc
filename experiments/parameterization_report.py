"""The tables and figures of `experiments.parameterizations`."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments import intervals, tables

SYMBOLS = {"eps": "ε", "x0": r"$x_0$", "v": "v", "mean": r"$\tilde\mu$"}
OBJECTIVES = {"vlb": "L, the bound", "simple": r"$L_{simple}$"}
COLOURS = {"L": "black", **{prediction: f"C{i}" for i, prediction in enumerate(SYMBOLS)}}


def markdown(
    checks: dict[str, dict[str, dict[str, float]]],
    title: str,
    deviation: float,
    parts: dict[str, Float[np.ndarray, " t"]],
    of_zero: dict[str, float],
    trained: list[dict[str, Any]],
) -> str:
    """The three tables, and how they were measured."""
    steps, images = (", ".join(sorted({str(row[key]) for row in trained})) for key in ("steps", "images"))
    return "\n".join(
        [
            "# Parameterizations",
            "\nLargest relative deviations over t > 1, σ_t² = β̃_t:\n",
            _deviations(checks),
            f"The share of each range of t, for the errors of one network ({title}; unclipped, σ_t² = β̃_t; "
            f"its terms equal the weight times the error to {deviation:.1e}):\n",
            _contributions(parts),
            f"Trained for {steps} steps and scored on {images} test images, x̂_0 clipped except where the mean is "
            f"predicted. {intervals.caption(row['seeds'] for row in trained)}; less v is paired by seed. Output 0: "
            "the bound, unclipped, of a network that outputs 0, cosine schedule.\n",
            _trained(trained, of_zero),
        ]
    )


def _deviations(checks: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row per schedule and prediction."""
    names = list(next(iter(next(iter(checks.values())).values())))
    rows = [
        [schedule, prediction, *(f"{of_one[name]:.1e}" for name in names)]
        for schedule, by_prediction in checks.items()
        for prediction, of_one in by_prediction.items()
    ]
    return tables.markdown(["schedule", "prediction", *names], rows)


def _contributions(parts: dict[str, Float[np.ndarray, " t"]]) -> str:
    """A row for L and for each L_simple: the share of each range of t."""
    num_steps = len(parts["L"])
    ends = sorted({0, 1, num_steps // 10, num_steps // 3, num_steps})
    ranges = list(itertools.pairwise(ends))
    head = [f"t = {low + 1}…{high}" if high > low + 1 else f"t = {high}" for low, high in ranges]
    rows = []
    for name, share in parts.items():
        label = "L" if name == "L" else f"L_simple of {name}"
        rows.append([label, *(f"{100 * share[low:high].sum():.2f}%" for low, high in ranges)])
    return tables.markdown(["", *head], rows)


def _trained(trained: list[dict[str, Any]], of_zero: dict[str, float]) -> str:
    """A row per prediction and loss: the results of training."""
    rows = []
    for row in trained:
        by_seed = row["test_bpd_by_seed"]
        bpd = intervals.text(intervals.of_mean(by_seed), 3)
        less = row["less_v_by_seed"] if row["prediction"] != "v" else []
        difference = intervals.text(intervals.of_mean(less), 3, signed=True) if less else "–"
        objective = "L" if row["objective"] == "vlb" else "L_simple"
        zero = f"{of_zero[row['prediction']]:,.1f}" if row["schedule"] == "cosine" else "–"
        parts_bpd = [f"{row[key]:.3f}" for key in ("decoder_bpd", "kl_bpd")]
        names = [row["schedule"], row["prediction"], objective, zero]
        rows.append([*names, bpd, ", ".join(f"{value:.3f}" for value in by_seed), *parts_bpd, difference])
    head = ["schedule", "prediction", "loss", "output 0", "bits/dim", "by seed", "L_0", "KL", "less v"]
    return tables.markdown(head, rows)


def plot_weights(path: Path, weights: dict[str, dict[str, Float[np.ndarray, " t"]]]) -> None:
    """A column per schedule: the weight w_t of each prediction's squared error, and the factor of L_simple on L's term.

    Args:
        path: the figure's file.
        weights: schedule -> prediction -> w_1…w_T.
    """
    figure = Figure(figsize=(4.2 * len(weights), 7), layout="constrained")
    grid = figure.subplots(2, len(weights), sharex="col", sharey="row", squeeze=False)
    for (weight_axes, factor_axes), (name, by_prediction) in zip(grid.T, weights.items(), strict=True):
        for prediction, weight in by_prediction.items():
            t = np.arange(2, len(weight) + 1)  # the bound's term of t = 1 is the decoder's, not a squared error
            style = {"color": COLOURS[prediction], "label": SYMBOLS[prediction]}
            weight_axes.loglog(t, weight[1:], **style)
            factor_axes.loglog(t, (1 / weight[1:]) / (1 / weight[1:]).mean(), **style)
        weight_axes.set_title(name)
        factor_axes.set_xlabel("t")
        ticks = [tick for tick in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= len(weight)]
        factor_axes.set_xticks(ticks, [str(tick) for tick in ticks])
        factor_axes.minorticks_off()
        factor_axes.axhline(1, color="black", linewidth=0.8)
        for axes in (weight_axes, factor_axes):
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel(r"weight $w_t$ of the squared error in L (nats)")
    grid[1, 0].set_ylabel(r"factor of the bound's term of t in $L_{simple}$" + "\n(1/$w_t$; its mean over t is 1)")
    grid[0, 0].legend(title="squared error of")
    figure.savefig(path, dpi=120)


def plot_shares(path: Path, title: str, shares: dict[str, Float[np.ndarray, " t"]]) -> None:
    """The share of each t in L and in every L_simple for the same x̂_0, and the cumulative shares.

    Args:
        path: the figure's file.
        title: the network that has these errors.
        shares: "L" or a prediction -> fractions for t = 1…T, which add up to 1.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    per_t, cumulative = figure.subplots(1, 2)
    for name, share in shares.items():
        t = np.arange(1, len(share) + 1)
        label = "L, the bound" if name == "L" else rf"$L_{{simple}}$ of {SYMBOLS[name]}"
        style = {"color": COLOURS[name], "linewidth": 2.5 if name == "L" else 1.5}
        per_t.semilogy(t, share, label=label, **style)
        cumulative.plot(t, np.cumsum(share), label=label, **style)
    per_t.set(xlabel="t", ylabel="share of t")
    cumulative.set(xlabel="t", ylabel="share of all terms up to t", ylim=(0, 1.02))
    per_t.legend(fontsize="small")
    for axes in (per_t, cumulative):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_training(path: Path, trained: list[dict[str, Any]]) -> None:
    """Bits/dim of every prediction under both losses, and the bound per t of each.

    Args:
        path: the figure's file.
        trained: the rows from `parameterizations.training`.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    totals, *per_t = figure.subplots(1, 1 + len(OBJECTIVES))
    for marker, offset, (objective, label) in zip("os", (-0.1, 0.1), OBJECTIVES.items(), strict=True):
        for row in (row for row in trained if row["objective"] == objective):
            x = list(SYMBOLS).index(row["prediction"]) + offset
            style = {"marker": marker, "color": COLOURS[row["prediction"]], "capsize": 3}
            filled = "full" if objective == "vlb" else "none"
            totals.errorbar(x, row["test_bpd"], 1.96 * row["test_bpd_stderr"], fillstyle=filled, **style)
            side = {"xytext": (-7, -4), "ha": "right"} if objective == "vlb" else {"xytext": (7, -4), "ha": "left"}
            totals.annotate(f"{row['test_bpd']:.2f}", (x, row["test_bpd"]), textcoords="offset points", **side)
        fill = "black" if objective == "vlb" else "none"
        totals.scatter([], [], marker=marker, edgecolors="black", facecolors=fill, label=f"trained with {label}")
    totals.set_xticks(range(len(SYMBOLS)), SYMBOLS.values())
    totals.set(xlabel="prediction", ylabel="bits/dim (test)", yscale="log", xlim=(-0.7, len(SYMBOLS) - 0.3))
    totals.set_yticks(ticks := [2, 3, 4, 6, 10, 20, 50], [str(tick) for tick in ticks])
    totals.minorticks_off()
    totals.legend(fontsize="small", loc="upper left")
    bounds = [row["test_bpd"] for row in trained]
    totals.set_ylim(0.8 * min(bounds), 2.0 * max(bounds))
    for axes, (objective, label) in zip(per_t, OBJECTIVES.items(), strict=True):
        for row in (row for row in trained if row["objective"] == objective):
            t, colour = np.arange(1, len(row["terms_bpd"]) + 1), COLOURS[row["prediction"]]
            axes.semilogy(t[1:], row["terms_bpd"][1:], color=colour, label=SYMBOLS[row["prediction"]])
            axes.semilogy(1, row["terms_bpd"][0], "o", color=colour, markersize=4)
        axes.set(title=f"trained with {label}", xlabel="t (the dot: the decoder, t = 1)", ylabel="term of t (bits/dim)")
        axes.grid(alpha=0.3)
        axes.sharey(per_t[0])
        axes.legend(fontsize="small")
    totals.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
