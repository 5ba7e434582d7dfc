"""How long should the average of the parameters be? Bits/dim of runs that were trained with ema.post_hoc.

    python -m experiments.ema_length --workdir=runs/ema_length --runs=runs/ema0,runs/ema1,runs/ema2

The runs differ only in their seed. The average of every length is composed of the averages that a run saved
(docs/ema.md). It is scored on the validation images, for the choice of a length, and on the test images, all with the
same noise. 0 is the average of ema.decay. Writes ema_length.md, .csv and .png into the working directory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from diffusion.data.source import SPLITS
from diffusion.evaluation.bound import full_bound
from diffusion.evaluation.limit import for_protocol
from diffusion.experiment import build, rules, workdir
from diffusion.experiment import config as config_lib
from diffusion.reporting import summary
from diffusion.runtime import devices, files
from experiments import intervals, tables
from experiments.commands import argument_parser, exit_with, numbers

FILE = "ema_length"
LENGTHS = "0,0.02,0.03,0.05,0.07,0.1,0.14,0.2,0.25"


def main() -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where the results go")
    parser.add_argument("--runs", required=True, help="comma-separated directories of runs")
    parser.add_argument("--lengths", default=LENGTHS, help="comma-separated values of ema.length")
    parser.add_argument("--splits", default="validation,test", help="comma-separated splits to score")
    arguments = parser.parse_args()
    splits = arguments.splits.split(",")
    if unknown := set(splits) - set(SPLITS):
        raise ValueError(f"--splits={arguments.splits}: {', '.join(unknown)} is not one of {', '.join(SPLITS)}")
    runs, lengths = arguments.runs.split(","), numbers(arguments.lengths, "--lengths", float)
    run(arguments.workdir, [Path(directory) for directory in runs], lengths, splits)


def run(directory: Path, runs: Sequence[Path], lengths: Sequence[float], splits: Sequence[str]) -> None:
    """Scores every length of every run; prints and saves the results. Raises the errors of `check` before that."""
    for of_run in runs:
        check(of_run, lengths, splits)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [row for of_run in runs for row in scores(of_run, lengths, splits)]
    text = markdown(rows, splits)
    files.write_text(directory / f"{FILE}.md", text)
    tables.save_csv(directory / f"{FILE}.csv", rows)
    plot(directory / f"{FILE}.png", rows, splits)
    print(text)


def check(directory: Path, lengths: Sequence[float], splits: Sequence[str]) -> None:
    """Raises a ValueError if a run cannot be scored with one of the lengths, or has no images of a split."""
    config = workdir.read_config(directory)
    sources = build.load_splits(config)
    if empty := [split for split in splits if not len(getattr(sources, split))]:
        raise ValueError(f"--splits: {directory} has no {empty[0]} images (data.validation={config.data.validation})")
    for length in lengths:
        try:
            config_lib.check(with_length(config, length))
            rules.check(with_length(config, length))
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error


def scores(directory: Path, lengths: Sequence[float], splits: Sequence[str]) -> list[dict[str, Any]]:
    """The bits/dim of each length of one run."""
    config = workdir.read_config(directory)
    sources = build.load_splits(config)
    score, rows = full_bound(build.bound_settings(config)), []
    for length in lengths:
        loaded = workdir.load(directory, config=with_length(config, length), claims=False)
        model = devices.replicate(for_protocol(loaded.model_with(config.eval.variance), config.eval.protocol))
        # The whole path: runs of a sweep in several folders may have one name.
        row = {"run": str(directory), "length": length, "step": int(loaded.state.step)}
        for split in splits:
            source = getattr(sources, split)
            row[f"{split}_bpd"] = float(score(model, source, np.arange(len(source))).image_bpd.mean())
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)
    return rows


def with_length(config: ConfigDict, length: float) -> ConfigDict:
    """The config of a run, scored with the average of that length."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.ema.length = length
    return config


def of_length(rows: Sequence[dict[str, Any]], length: float, column: str) -> dict[str, float]:
    """Each run's number in this column, for this length."""
    return {row["run"]: row[column] for row in rows if row["length"] == length}


def markdown(rows: Sequence[dict[str, Any]], splits: Sequence[str]) -> str:
    """The table: for each length, the means over runs and the paired differences to the first length."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    first, cells = lengths[0], []
    for length in lengths:
        cell = [f"{length:g}" if length else "ema.decay"]
        for split in splits:
            column = f"{split}_bpd"
            values, base = of_length(rows, length, column), of_length(rows, first, column)
            less = intervals.of_mean(intervals.paired(values, base).values())
            cell += [intervals.text(intervals.of_mean(values.values()), 4)]
            cell += ["–" if length == first else intervals.text(less, 4, signed=True)]
        cells.append(cell)
    head = ["length", *(name for split in splits for name in (f"{split} bits/dim", f"less {cells[0][0]}, by run"))]
    count = len(of_length(rows, first, f"{splits[0]}_bpd"))
    steps = ", ".join(f"{step:,}" for step in sorted({row["step"] for row in rows}))
    about = f"{intervals.caption([count], 'run')}; step {steps}; {summary.device_name()}"
    return f"{tables.markdown(head, cells)}\n{about}\n"


def plot(path: Path, rows: Sequence[dict[str, Any]], splits: Sequence[str]) -> None:
    """Plots bits/dim of each run against the length; dashed lines are the average of ema.decay."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        for number, name in enumerate(dict.fromkeys(row["run"] for row in rows)):
            own = [row for row in rows if row["run"] == name]
            points = sorted((row["length"], row[f"{split}_bpd"]) for row in own if row["length"])
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, color=f"C{number}", label=name)
            for row in own:
                if not row["length"]:
                    label = None if points else name
                    axes.axhline(row[f"{split}_bpd"], color=f"C{number}", ls="--", lw=0.8, label=label)
        axes.set(xlabel="length of the average (σ_rel)", ylabel=f"{split} bits/dim", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    exit_with(main)
