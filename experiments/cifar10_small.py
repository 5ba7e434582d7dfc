"""Ho et al.'s and Nichol & Dhariwal's objectives on real photographs, on two CPU cores in some hours.

    python -m experiments.cifar10_small --workdir=runs/cifar10_small [--data-dir=DIR] [--set KEY=VALUE ...]

Trains five small networks on CIFAR-10 for equally many images, as configs/cifar10_small.py says: the papers' four pairs
of an objective and a variance, and this project's own recipe. Each is scored on every test image by an estimate of 9
terms. Each is also scored by every term of 300 test images under every variance (`experiments.variance_accounting`).
The same command resumes an interrupted study. Writes a sweep's report and accounting.md into the working directory.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from diffusion.reporting.summary import read_json
from diffusion.runtime import files
from experiments import intervals, sweep, tables, variance_accounting
from experiments.commands import exit_with
from experiments.results import AXES
from experiments.variance import target_by_config

BASE = "configs/cifar10_small.py"
PAPERS = [("simple", "fixed_small"), ("simple", "fixed_large"), ("hybrid", "learned_range"), ("vlb", "learned_range")]
# The recipe of configs/digits_adam.py, plus features that distinguish neighbouring values among 256.
OWN = {
    "model.prediction": "v",
    "schedule.name": "learned(start='cosine', inner='second_moment')",
    "objective.timesteps": "low_discrepancy",
    "unet.fourier_features": "(5, 6, 7, 8)",
}
SEED = "-seed"  # in a folder's name, before the seed
NUM_FULL, NUM_FOR_OPTIMAL = 300, 64  # test images scored with all terms, and training images for σ*


def cells(extra: dict[str, str], seeds: Sequence[str] = ("0",)) -> list[sweep.Cell]:
    """The five runs with each seed; the overrides in `extra` apply to all."""
    named = {f"{objective}-{variance}": _keys(objective, variance) for objective, variance in PAPERS}
    named["own-recipe"] = _keys("vlb", "learned_range") | OWN
    return [
        sweep.Cell(_folder(name, seed), BASE, keys | {"seed": seed} | extra)
        for name, keys in named.items()
        for seed in seeds
    ]


def _folder(name: str, seed: str) -> str:
    """The folder of a run. Seed 0 has no suffix, because earlier versions had no other seeds."""
    return name if seed == "0" else f"{name}{SEED}{seed}"


def _keys(objective: str, variance: str) -> dict[str, str]:
    return {AXES["objective"]: objective, AXES["variance"]: variance}


def account(directory: Path) -> None:
    """Computes every term of some test images under every variance, unless the run's folder has the table."""
    if not _is_accounted(directory):
        variance_accounting.run(directory, NUM_FULL, num_train=NUM_FOR_OPTIMAL)


def _is_accounted(directory: Path) -> bool:
    """Whether the table is of the run's last weights and of as many images as the study's.

    Tables of earlier versions do not say; they count, too.
    """
    path = directory / f"{variance_accounting.FILE}.csv"
    if not path.exists():
        return False
    weights = (read_json(directory / "summary.json") or {}).get("ema_sha256")
    wanted = {"ema_sha256": weights, "images": str(NUM_FULL), "train_images": str(NUM_FOR_OPTIMAL)}
    with path.open() as file:
        return all(row.get(name, value) == value for row in csv.DictReader(file) for name, value in wanted.items())


def accounting(directories: list[Path]) -> str:
    """The runs' accounting in one table: a row per variance and a column per run, the mean over its seeds."""
    columns: dict[str, dict[str, list[dict[str, str]]]] = {}
    for directory in directories:
        column = columns.setdefault(directory.name.partition(SEED)[0], {})
        with (directory / f"{variance_accounting.FILE}.csv").open() as file:
            for row in csv.DictReader(file):
                column.setdefault(row["variance"], []).append(row)
    counts = {len(rows) for column in columns.values() for rows in column.values()}
    error = intervals.caption(counts) if max(counts, default=1) > 1 else "The mean over images ± its standard error"
    return "\n".join(
        [
            f"# All terms of {NUM_FULL} test images under every variance, in bits/dim",
            "",
            f"{error}, of the same images and noise in every column. "
            f"optimal: the σ* of Bao et al. (2022), estimated from {NUM_FOR_OPTIMAL} training images.",
            "",
            _table(columns, "bpd"),
            "Differences to the network's own variance, paired by image and seed:",
            "",
            _table(columns, "difference"),
        ]
    )


def _table(columns: dict[str, dict[str, list[dict[str, str]]]], number: str) -> str:
    """A row per variance and a column per run of "bpd", or of their "difference" to the network's own variance."""
    over_seeds = any(len(rows) > 1 for column in columns.values() for rows in column.values())
    variances = dict.fromkeys(name for column in columns.values() for name in column)
    cells = [
        [variance, *(_cell(column.get(variance, []), number, over_seeds) for column in columns.values())]
        for variance in variances
    ]
    return tables.markdown(["variance", *columns], cells)


def _cell(rows: list[dict[str, str]], number: str, over_seeds: bool) -> str:
    """The mean over seeds with its interval, or one seed's number ± its standard error over images."""
    stderr, form = {"bpd": ("stderr", ".3f"), "difference": ("difference_stderr", "+.4f")}[number]
    values = [float(row[number]) for row in rows]
    if not any(values):  # none, or the difference of the network's own variance to itself
        return "–"
    if over_seeds:
        return intervals.text(intervals.of_mean(values), int(form[-2]), signed="+" in form)
    return f"{values[0]:{form}} ± {float(rows[0][stderr]):{form.lstrip('+')}}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = sweep.argument_parser(__doc__)
    parser.add_argument("--data-dir", help="directory of data sets prepared by TFDS; default: ~/tensorflow_datasets")
    arguments = parser.parse_args(argv)
    extra = sweep.overrides(arguments.set)
    if arguments.data_dir:
        extra["data.data_dir"] = arguments.data_dir
    runs = cells(extra, sweep.seeds(arguments, ["0"]))
    code = sweep.execute(arguments, runs, target_by_config)
    if code or arguments.list or arguments.index is not None:
        return code
    directories = [arguments.workdir / cell.name for cell in runs]
    if not arguments.report:
        for directory in directories:
            account(directory)
    text = accounting([directory for directory in directories if _is_accounted(directory)])
    files.write_text(arguments.workdir / "accounting.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    exit_with(main)
