"""The figures of a sweep's report: bits/dim of each row, the bound per t, and the Fréchet distance against bits/dim."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion.reporting.distance_kind import DistanceKind
from experiments import intervals
from experiments.results import Difference, Row, TargetOf

MARKERS = "osv^X*"
OVER_SEEDS = {"fmt": "o", "color": "tab:blue", "capsize": 3}
OVER_IMAGES = {"fmt": "none", "ecolor": "tab:blue", "elinewidth": 7, "alpha": 0.3}


def distance_kinds(table: list[Row]) -> list[DistanceKind]:
    return list(dict.fromkeys(row.distance_kind for row in table if row.distance_kind))


def bpd(path: Path, table: list[Row], less_base: list[Difference | None], target_of: TargetOf) -> None:
    """A line per row, best first: bits/dim with both errors, the published number, and the difference to the base."""
    differ = any(less and less.bpd for less in less_base)
    figure = Figure(figsize=(12 if differ else 8, 1.6 + 0.32 * len(table)), layout="constrained")
    totals, *differences = figure.subplots(1, 1 + differ, sharey=True, squeeze=False)[0]
    for y, row in enumerate(table):
        _plot_over_seeds(totals, y, row.bpd, row.stderr_bpd)
        target = target_of(row.runs[0])
        if target and target.test_bpd:
            totals.plot(target.test_bpd, y, "D", color="tab:orange", label="published, CIFAR-10")
    totals.errorbar([], [], xerr=[], **OVER_SEEDS, label=intervals.caption(len(row.bpd) for row in table))
    totals.errorbar([], [], xerr=[], **OVER_IMAGES, label="± standard error over images")
    totals.plot([], [], "|", color="black", linestyle="", label="each seed")
    totals.set(xlabel="bits/dim (test)")
    for axes in differences:
        for y, less in enumerate(less_base):
            if less and less.bpd:
                _plot_over_seeds(axes, y, less.bpd, less.stderr_bpd)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="bits/dim less the base's, seed by seed")
    for axes in (totals, *differences):
        axes.grid(alpha=0.3)
    totals.set_yticks(range(len(table)), [", ".join(row.setting.values()) for row in table], fontsize=8)
    totals.invert_yaxis()
    figure.legend(*_once_each(totals), fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)


def _plot_over_seeds(axes: Axes, y: int, by_seed: dict[int, float], stderr: float) -> None:
    over_seeds = intervals.of_mean(by_seed.values())
    axes.errorbar(over_seeds.mean, y, xerr=stderr, **OVER_IMAGES)
    axes.plot(list(by_seed.values()), [y] * len(by_seed), "|", color="black")
    axes.errorbar(over_seeds.mean, y, xerr=over_seeds.half_width, **OVER_SEEDS)


def _once_each(axes: Axes) -> tuple[list[Artist], list[str]]:
    """The handles and labels of a legend, with one entry per label."""
    labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(labelled.values()), list(labelled)


def terms(path: Path, table: list[Row]) -> None:
    """A panel per setting: the bound's term of each t (the decoder's: a dot), a curve per variance, means over seeds.

    Bounds that were estimated from a few terms are not plotted.
    """
    panels: dict[str, list[Row]] = {}
    table = [row for row in table if row.has_every_term]
    if not table:
        return
    for row in table:
        rest = [value for column, value in row.setting.items() if column != "variance"]
        panels.setdefault(", ".join(rest), []).append(row)
    names = sorted({row.setting["variance"] for row in table})
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-len(panels) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(title, fontsize=9)
        for row in sorted(panel, key=lambda row: row.setting["variance"]):
            _plot_row(axes, row, colours[row.setting["variance"]])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("t")
    figure.supylabel("term of t (bits/dim)")
    figure.savefig(path, dpi=120)


def _plot_row(axes: Axes, row: Row, colour: str) -> None:
    mean = np.mean([run.terms_bpd for run in row.of_seeds.values()], axis=0)
    label = f"{row.setting['variance']}: {row.mean('test_bpd'):.4f}"
    axes.loglog(np.arange(2, len(mean) + 1), mean[1:], color=colour, label=label, linewidth=1)
    axes.loglog(1, mean[0], "o", color=colour, markersize=4)


def quality(path: Path, table: list[Row], target_of: TargetOf) -> None:
    """Fréchet distance against bits/dim: a point per row, with intervals over seeds, and published FIDs as diamonds.

    A panel per kind of distance; nothing is plotted without distances.
    """
    kinds = distance_kinds(table)
    if not kinds:
        return
    columns = [column for column in table[0].setting if len({row.setting[column] for row in table}) > 1]
    figure = Figure(figsize=(9, max(4.5, 0.22 * len(table)) * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set(xlabel="bits/dim (test)", ylabel=textwrap.fill(str(kind), 50))
        of_this_kind = [row for row in table if row.distance_kind == kind]
        for number, row in enumerate(of_this_kind):
            style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}
            x, y = (intervals.of_mean(by_seed.values()) for by_seed in (row.bpd, row.distances))
            label = ", ".join(row.setting[column] for column in columns) or "all runs"
            errors = {"xerr": x.half_width, "yerr": y.half_width}
            axes.errorbar(x.mean, y.mean, **errors, **style, linestyle="", label=label, capsize=2)
            target = target_of(row.runs[0])
            if target and target.test_bpd and target.fid and kind.title.startswith("FID"):
                published_at = target.test_bpd, target.fid
                axes.plot(*published_at, "D", color=style["color"], fillstyle="none", label="published, CIFAR-10")
        axes.grid(alpha=0.3)
        title = intervals.caption(len(row.bpd) for row in of_this_kind)
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(*_once_each(axes), title=title, title_fontsize=7, fontsize=8, **place)
    figure.savefig(path, dpi=120)
