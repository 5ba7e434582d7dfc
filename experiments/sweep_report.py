"""A sweep's report, made from its folders alone: table.md, table.csv, bpd.png, terms.png, quality.png."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import tables
from experiments.results import Difference, DistanceKind, FinishedRun, Row, TargetOf, differences, last_line, read, rows

MARKERS = "osv^X*"
NOTES = """\
Bits/dim of the test images: the mean over seeds ± its standard error over images, and the standard deviation over
seeds; then the parts, L_0 (decoder), the sum of L_{t−1} (KL) and L_T (prior), and the bits/dim of as many training
images. Fréchet distances are of samples: the mean over seeds ± the standard deviation over seeds; those of different
features or numbers of samples do not compare. Published numbers are of fully trained networks on CIFAR-10: those of Ho
et al. (2020) as its tables 1 and 2 print them, with train bits/dim of 49,920 images; those of Nichol & Dhariwal (2021)
from transcriptions of its table 2, not checked with the paper itself.
"""
PAIRED = """\
Bits/dim of the first variance less those of the second, image by image for the same images, noise and seeds, with
the 95% confidence interval over images (of these trained networks; how much training itself scatters shows in the
last column, one number per seed).
"""


def write(directory: Path, target_of: TargetOf) -> str:
    """Rebuilds the report of the runs in the folders of `directory`.

    Returns:
        What table.md holds.

    Raises:
        FileNotFoundError: no run is finished.
    """
    runs, unfinished = read(directory)
    if not runs:
        raise FileNotFoundError(f"no run in {directory} is finished ({len(unfinished)} are not)")
    table, recipes = rows(runs)
    table.sort(key=lambda row: row.mean("test_bpd"))
    sections = [
        _head(runs),
        _bounds(table, target_of),
        "".join(f"- recipe {letter}: {recipe}\n" for letter, recipe in recipes.items()),
        _paired(differences(table)),
        "".join(f"- {name} is not finished: {words}\n" for name, words in unfinished.items()),
        _unmeasured(directory, runs),
    ]
    text = "\n".join(section for section in sections if section)
    (directory / "table.md").write_text(text)
    tables.save_csv(directory / "table.csv", [_numbers(row, target_of) for row in table])
    plot_bpd(directory / "bpd.png", table, target_of)
    plot_terms(directory / "terms.png", table)
    plot_quality(directory / "quality.png", table, target_of)
    return text


def _numbers(row: Row, target_of: TargetOf) -> dict[str, Any]:
    """A row of table.csv, unrounded."""
    return {
        **row.setting,
        "seeds": len(row.runs),
        "test_bpd": row.mean("test_bpd"),
        "test_bpd_stderr": row.stderr_bpd,
        "test_bpd_spread": row.spread_bpd,
        "test_decoder_bpd": row.mean("test_decoder_bpd"),
        "test_kl_bpd": row.mean("test_kl_bpd"),
        "prior_bpd": row.mean("prior_bpd"),
        "train_bpd": row.mean("train_bpd"),
        "frechet_distance": row.distance,
        "frechet_distance_spread": row.spread_of_distance,
        "features": row.distance_kind.features if row.distance_kind else "",
        "num_samples": row.distance_kind.num_samples if row.distance_kind else "",
        "published": target_of(row.runs[0]) or "",
    }


def _head(runs: list[FinishedRun]) -> str:
    steps = sorted({f"{run.config['train.num_steps']:,} × {run.config['train.batch_size']}" for run in runs})
    machines = sorted({f"{run.summary['device']}, jax {run.summary['versions']['jax']}" for run in runs})
    return (
        f"# {runs[0].config['data.name']}\n\n{NOTES}\n{runs[0].summary['test_images']:,} test images; trained for "
        f"{', '.join(steps)} images; {'; '.join(machines)}.\n"
    )


def _distance_kinds(table: list[Row]) -> list[DistanceKind]:
    return list(dict.fromkeys(row.distance_kind for row in table if row.distance_kind))


def _distance(row: Row, kind: DistanceKind) -> str:
    if row.distance_kind != kind:
        return "–"
    spread = f" ± {row.spread_of_distance:.2g}" if len(row.runs) > 1 else ""
    return f"{row.distance:.4g}{spread}"


def _unmeasured(directory: Path, runs: list[FinishedRun]) -> str:
    """The finished runs without a Fréchet distance, if others have one."""
    without = [run.name for run in runs if not run.quality]
    if len(without) == len(runs):
        return ""
    return "".join(f"- {name} has no Fréchet distance: {last_line(directory / name)}\n" for name in without)


def _bounds(table: list[Row], target_of: TargetOf) -> str:
    kinds = _distance_kinds(table)
    cells = []
    for row in table:
        numbers = _numbers(row, target_of)
        cells.append(
            [
                *row.setting.values(),
                f"{numbers['seeds']}",
                f"{numbers['test_bpd']:.4f} ± {numbers['test_bpd_stderr']:.4f}",
                f"{numbers['test_bpd_spread']:.4f}" if len(row.runs) > 1 else "–",
                *(f"{numbers[key]:.4f}" for key in ("test_decoder_bpd", "test_kl_bpd")),
                f"{numbers['prior_bpd']:.2g}",
                f"{numbers['train_bpd']:.4f}",
                *(_distance(row, kind) for kind in kinds),
                str(numbers["published"]) or "–",
            ]
        )
    bounds = ["bits/dim", "spread", "L_0", "KL", "L_T", "train"]
    return tables.markdown([*table[0].setting, "seeds", *bounds, *map(str, kinds), "published"], cells)


def _paired(pairs: list[Difference]) -> str:
    if not pairs:
        return ""
    cells = [
        [
            *pair.setting.values(),
            f"{pair.a} − {pair.b}",
            f"{pair.mean_bpd:+.4f}",
            f"{pair.low_bpd:+.4f} … {pair.high_bpd:+.4f}",
            ", ".join(f"{seed:+.4f}" for seed in pair.by_seed_bpd),
        ]
        for pair in pairs
    ]
    head = [*pairs[0].setting, "variances", "difference", "95% interval", "by seed"]
    return f"## Paired differences between variances\n\n{PAIRED}\n{tables.markdown(head, cells)}"


def plot_bpd(path: Path, table: list[Row], target_of: TargetOf) -> None:
    """A line per row, best first: bits/dim of each seed, their mean, and the published number."""
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(table)), layout="constrained")
    axes = figure.add_subplot(xlabel="bits/dim (test)")
    for y, row in enumerate(table):
        axes.plot([run.summary["test_bpd"] for run in row.runs], [y] * len(row.runs), ".", color="tab:blue", alpha=0.5)
        axes.errorbar(row.mean("test_bpd"), y, xerr=1.96 * row.stderr_bpd, fmt="o", color="tab:blue", capsize=3)
        target = target_of(row.runs[0])
        if target and target.test_bpd:
            axes.plot(target.test_bpd, y, "D", color="tab:orange", label="published, CIFAR-10")
    axes.errorbar([], [], xerr=[], fmt="o", color="tab:blue", capsize=3, label="mean over seeds, 95% over images")
    axes.plot([], [], ".", color="tab:blue", alpha=0.5, label="one seed")
    axes.set_yticks(range(len(table)), [", ".join(row.setting.values()) for row in table], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(*_once_each(axes), fontsize=8)
    figure.savefig(path, dpi=120)


def _once_each(axes: Axes) -> tuple[list[Artist], list[str]]:
    """The handles and labels of a legend, with one entry per label."""
    labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(labelled.values()), list(labelled)


def plot_terms(path: Path, table: list[Row]) -> None:
    """A panel per setting: the bound's term of each t (the decoder's a dot), a curve per variance, means over seeds.

    Nothing is plotted of bounds that were estimated from a few terms.
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
    terms = np.mean([run.terms_bpd for run in row.runs], axis=0)
    label = f"{row.setting['variance']}: {row.mean('test_bpd'):.4f}"
    axes.loglog(np.arange(2, len(terms) + 1), terms[1:], color=colour, label=label, linewidth=1)
    axes.loglog(1, terms[0], "o", color=colour, markersize=4)


def plot_quality(path: Path, table: list[Row], target_of: TargetOf) -> None:
    """Fréchet distance against bits/dim: a point per row, with the spread over seeds, and published FIDs as diamonds.

    A panel per kind of distance; nothing is plotted where there is none.
    """
    kinds = _distance_kinds(table)
    if not kinds:
        return
    columns = [column for column in table[0].setting if len({row.setting[column] for row in table}) > 1]
    figure = Figure(figsize=(9, max(4.5, 0.22 * len(table)) * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set(xlabel="bits/dim (test)", ylabel=str(kind))
        of_this_kind = [row for row in table if row.distance_kind == kind]
        for number, row in enumerate(of_this_kind):
            style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}
            errors = {"xerr": row.spread_bpd, "yerr": row.spread_of_distance} if len(row.runs) > 1 else {}
            label = ", ".join(row.setting[column] for column in columns) or "all runs"
            axes.errorbar(row.mean("test_bpd"), row.distance, **errors, **style, linestyle="", label=label, capsize=2)
            target = target_of(row.runs[0])
            if target and target.test_bpd and target.fid and kind.title.startswith("FID"):
                published_at = target.test_bpd, target.fid
                axes.plot(*published_at, "D", color=style["color"], fillstyle="none", label="published, CIFAR-10")
        axes.grid(alpha=0.3)
        axes.legend(*_once_each(axes), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
