"""The report of a sweep, made only from its folders: table.md, table.csv, bpd.png, terms.png, quality.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.experiment import workdir
from diffusion.reporting.distance_kind import distance_kind
from diffusion.runtime import files
from experiments import intervals, results, sweep_plots, tables
from experiments.results import Difference, FinishedRun, Row, TargetOf, last_line

NOTES = """\
Bits/dim of the test images and Fréchet distances of samples: {over_seeds}. The standard error of the mean bits/dim is
over images, for these trained networks. The parts are L_0 (decoder), the sum of L_{{t−1}} (KL) and L_T (prior). The
column train has the bits/dim of as many training images. {order}
Fréchet distances of different features, numbers of samples, samplers or references are not comparable: each kind has a
column. Published numbers are for fully trained networks on CIFAR-10. Those of Ho et al. (2020) are from its tables 1
and 2, with train bits/dim of 49,920 images; those of Nichol & Dhariwal (2021) are from transcriptions of its table 2,
not checked with the paper itself.
"""
BY_VALIDATION = "Rows are in order of the bits/dim of validation images: choose by these, and report the test images'."
BY_TEST = "Rows are in order of the test images' bits/dim; a row that is chosen by them has no unbiased number here."
PAIRED = """\
Each difference is of runs of the same seed: {over_seeds}, and the difference of each seed. The standard
error of the bits/dim is over images, paired by image with the same noise, for these trained networks.
"""


def write(directory: Path, target_of: TargetOf, order: Sequence[str] = ()) -> str:
    """Rebuilds the report of the runs in the folders of `directory`.

    Args:
        directory: the sweep's directory.
        target_of: the published result that a run is compared with.
        order: names of folders. The others are compared with the base, the row of the first finished one of these.
            If there is none, the base is the row of the first finished folder by name.

    Returns:
        The text of table.md.

    Raises:
        FileNotFoundError: no run is finished.
    """
    runs, unfinished = results.read(directory)
    if not runs:
        raise FileNotFoundError(f"no run in {directory} is finished ({len(unfinished)} are not)")
    table, recipes = results.rows(runs)
    row_of = {run.name: row for row in table for run in row.runs}
    base = next((row_of[name] for name in order if name in row_of), table[0])
    has_validation = all(row.validation_bpd for row in table)
    table.sort(key=lambda row: row.mean("validation_bpd" if has_validation else "test_bpd"))
    to_base = results.less_base(table, base)
    sections = [
        _head(runs, table),
        _bounds(table, target_of),
        "".join(f"- recipe {letter}: {recipe}\n" for letter, recipe in recipes.items()),
        _paired(f"to the base: {_words(base)}", [difference for difference in to_base if difference]),
        _paired("between variances", results.between_variances(table, base)),
        "".join(f"- {name} is not finished: {words}\n" for name, words in unfinished.items()),
        "".join(f"- {name} is not started\n" for name in order if not (directory / name).exists()),
        _unmeasured(directory, runs),
        _of_several_kinds(table),
    ]
    text = "\n".join(section for section in sections if section)
    files.write_text(directory / "table.md", text)
    lines = [_numbers(row, target_of) | _less_base(less) for row, less in zip(table, to_base, strict=True)]
    tables.save_csv(directory / "table.csv", lines)
    sweep_plots.bpd(directory / "bpd.png", table, to_base, target_of)
    sweep_plots.terms(directory / "terms.png", table)
    sweep_plots.quality(directory / "quality.png", table, target_of)
    return text


def _words(row: Row) -> str:
    names = {"T": "T = ", "recipe": "recipe "}
    return ", ".join(names.get(column, "") + value for column, value in row.setting.items())


def _numbers(row: Row, target_of: TargetOf) -> dict[str, Any]:
    """A row of table.csv, unrounded. Half-widths are of the interval over seeds."""
    bpd = intervals.of_mean(row.bpd.values())
    validation = intervals.of_mean(row.validation_bpd.values()) if row.validation_bpd else None
    distance = intervals.of_mean(row.distances.values()) if row.distances else None
    return {
        **row.setting,
        "seeds": len(row.bpd),
        "validation_bpd": validation.mean if validation else np.nan,
        "validation_bpd_half_width": validation.half_width if validation else np.nan,
        "test_bpd": bpd.mean,
        "test_bpd_half_width": bpd.half_width,
        "test_bpd_stderr": row.stderr_bpd,
        "test_decoder_bpd": row.mean("test_decoder_bpd"),
        "test_kl_bpd": row.mean("test_kl_bpd"),
        "prior_bpd": row.mean("prior_bpd"),
        "train_bpd": row.mean("train_bpd"),
        "frechet_distance": distance.mean if distance else np.nan,
        "frechet_distance_half_width": distance.half_width if distance else np.nan,
        "features": row.distance_kind.features if row.distance_kind else "",
        "features_sha256": row.distance_kind.weights if row.distance_kind else "",
        "num_samples": row.distance_kind.num_samples if row.distance_kind else "",
        "sampler": row.distance_kind.sampler if row.distance_kind else "",
        "reference": row.distance_kind.reference if row.distance_kind else "",
        "published": target_of(row.runs[0]) or "",
    }


def _less_base(difference: Difference | None) -> dict[str, Any]:
    """The columns of table.csv that compare a row with the base, seed by seed."""
    if difference is None or not difference.bpd:
        return {}
    bpd = intervals.of_mean(difference.bpd.values())
    columns = {
        "paired_seeds": bpd.n,
        "less_base_bpd": bpd.mean,
        "less_base_bpd_half_width": bpd.half_width,
        "less_base_bpd_stderr": difference.stderr_bpd,
    }
    if difference.distances:
        distance = intervals.of_mean(difference.distances.values())
        columns |= {
            "less_base_frechet_distance": distance.mean,
            "less_base_frechet_distance_half_width": distance.half_width,
        }
    return columns


def _head(runs: list[FinishedRun], table: list[Row]) -> str:
    steps = sorted({f"{run.config['train.num_steps']:,} × {run.config['train.batch_size']}" for run in runs})
    machines = sorted({f"{run.summary['device']}, jax {run.summary['versions']['jax']}" for run in runs})
    early = [run.summary["step"] for run in runs if workdir.STOPPED_EARLY in run.summary]
    ends = f"at step {min(early):,} to {max(early):,}" if early else ""
    stopped = f"; {len(early)} of {len(runs)} runs stopped early, {ends}" if early else ""
    has_validation = all(row.validation_bpd for row in table)
    over_seeds = intervals.caption(len(row.bpd) for row in table)
    notes = NOTES.format(over_seeds=over_seeds, order=BY_VALIDATION if has_validation else BY_TEST)
    return (
        f"# {runs[0].config['data.name']}\n\n{notes}\n{runs[0].summary['test_images']:,} test images; trained for "
        f"{', '.join(steps)} images{stopped}; {'; '.join(machines)}.\n"
    )


def _unmeasured(directory: Path, runs: list[FinishedRun]) -> str:
    """The finished runs without a Fréchet distance, if others have one."""
    without = [run.name for run in runs if not run.quality]
    if len(without) == len(runs):
        return ""
    last_words = {name: last_line(directory / name) for name in without}
    why = {name: words if words.startswith("error") else "not measured yet" for name, words in last_words.items()}
    return "".join(f"- {name} has no Fréchet distance: {words}\n" for name, words in why.items())


def _of_several_kinds(table: list[Row]) -> str:
    """The rows whose seeds have Fréchet distances of different kinds."""
    lines = []
    for row in table:
        kinds = {str(kind) for run in row.runs if (kind := distance_kind(run.config, run.quality))}
        if len(kinds) > 1:
            said = "; ".join(sorted(kinds))
            lines.append(f"- {_words(row)} has no mean Fréchet distance, as its seeds have several kinds: {said}\n")
    return "".join(lines)


def _bounds(table: list[Row], target_of: TargetOf) -> str:
    kinds = sweep_plots.distance_kinds(table)
    seeds = {seed for row in table for seed in row.bpd}
    has_validation = any(row.validation_bpd for row in table)
    cells = []
    for row in table:
        numbers = _numbers(row, target_of)
        cells.append(
            [
                *row.setting.values(),
                _finished(row, seeds),
                *([_bpd(row.validation_bpd)] if has_validation else []),
                _bpd(row.bpd),
                f"{numbers['test_bpd_stderr']:.4f}",
                *(f"{numbers[key]:.4f}" for key in ("test_decoder_bpd", "test_kl_bpd")),
                f"{numbers['prior_bpd']:.2g}",
                f"{numbers['train_bpd']:.4f}",
                *(_distance(row.distances if row.distance_kind == kind else {}) for kind in kinds),
                str(numbers["published"]) or "–",
            ]
        )
    bounds = ["validation bits/dim"] if has_validation else []
    bounds += ["test bits/dim", "standard error over images", "L_0", "KL", "L_T", "train"]
    return tables.markdown([*table[0].setting, "seeds", *bounds, *map(str, kinds), "published"], cells)


def _finished(row: Row, seeds: set[int]) -> str:
    """The number of a row's seeds, and the sweep's seeds that it lacks."""
    missing = sorted(seeds - row.bpd.keys())
    return f"{len(row.bpd)} of {len(seeds)}: not {', '.join(map(str, missing))}" if missing else f"{len(row.bpd)}"


def _bpd(by_seed: dict[int, float]) -> str:
    return intervals.text(intervals.of_mean(by_seed.values()), 4) if by_seed else "–"


def _distance(by_seed: dict[int, float], signed: bool = False) -> str:
    return intervals.text(intervals.of_mean(by_seed.values()), 2, signed) if by_seed else "–"


def _paired(title: str, differences: list[Difference]) -> str:
    """The differences as a table, with the seeds of each."""
    if not differences:
        return ""
    measured = any(difference.distances for difference in differences)
    cells = []
    for difference in differences:
        cells.append([*difference.setting.values(), *_difference(difference)])
        if measured:
            cells[-1].append(_distance(difference.distances, signed=True))
    head = [*differences[0].setting, "bits/dim", "by seed", "standard error over images"]
    head += ["Fréchet distance"] if measured else []
    counts = [len(difference.bpd) for difference in differences if difference.bpd]
    notes = PAIRED.format(over_seeds=intervals.caption(counts)) if counts else "No seeds in common.\n"
    return f"## Paired differences {title}\n\n{notes}\n{tables.markdown(head, cells)}"


def _difference(difference: Difference) -> list[str]:
    if not difference.bpd:
        return ["no seed in common", "–", "–"]
    return [
        intervals.text(intervals.of_mean(difference.bpd.values()), 4, signed=True),
        ", ".join(f"{seed}: {value:+.4f}" for seed, value in difference.bpd.items()),
        "–" if np.isnan(difference.stderr_bpd) else f"{difference.stderr_bpd:.4f}",
    ]
