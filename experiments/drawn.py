"""Samples of one trained run, drawn in several ways and scored. The studies of sampling share this module."""

import argparse
import datetime
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion.data import Source
from diffusion.experiment import build
from diffusion.experiment.workdir import LoadedRun, load
from diffusion.programs import sample
from diffusion.programs.quality import Scorer
from diffusion.reporting import summary
from diffusion.variances import X0Variance
from experiments import commands, intervals, tables
from experiments.intervals import Interval

COMPUTED = ("frechet_distance", "precision_recall")  # of quality.METRICS
METRICS = ("frechet_distance", "precision", "recall")  # their numbers
REAL = "test images"
MOST_IMAGES = 1000  # the default limit of images per set


class Study(NamedTuple):
    """A trained run, and how its samples are compared.

    Attributes:
        directory: the run's directory, which the results are written to.
        name: the study's name. Samples are kept in the folder of this name, so a stopped study resumes.
        trained: the run.
        features: the value of quality.features for the comparison.
        scorer: computes the metrics.
        num_images: samples per set; the test images are scored in sets of the same size.
        num_sets: disjoint sets for each way of sampling; set k of every way starts from the same noise.
    """

    directory: Path
    name: str
    trained: LoadedRun
    features: str
    scorer: Scorer
    num_images: int
    num_sets: int

    def images(
        self, changes: dict[str, Any], x0_variance: X0Variance | None = None
    ) -> UInt8[np.ndarray, "sets n h w c"]:
        """Draws the sets of samples with the run's config, in which these keys are changed."""
        config, state = changed(self.trained.config, changes), self.trained.state
        described = build.describe_data(config)
        experiment = build.experiment(config, described.image_shape, described.num_levels, described.num_classes)
        model = experiment.model(state.ema_params, config.sample.variance, x0_variance)
        total = self.num_images * self.num_sets
        folder = sample.fill(experiment, self.directory / self.name, model, state, total)
        jax.clear_caches()  # each way of sampling has its own compiled programs
        images = sample.read(folder, total)
        return images.reshape(self.num_sets, self.num_images, *images.shape[1:])

    def scores(self, images: UInt8[np.ndarray, "sets n h w c"]) -> dict[str, list[float]]:
        """Each of METRICS, one number for each set."""
        by_set = [self.scorer.numbers([of_set], len(of_set), COMPUTED) for of_set in images]
        return {name: [numbers[name] for numbers in by_set] for name in METRICS}


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every study of sampling has."""
    parser = commands.argument_parser(description)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a trained run; results go there")
    parser.add_argument("--features", default="classifier", help="a value of quality.features")
    help_images = f"samples, and test images, per set; default: the number of test images, at most {MOST_IMAGES}"
    parser.add_argument("--num_images", type=int, help=help_images)
    parser.add_argument("--num_sets", type=int, default=3, help="number of sets of samples, for the interval")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    return parser


def study(
    name: str, workdir: Path, features: str, num_images: int | None, num_sets: int, checkpoint: str = "latest"
) -> Study:
    """The study of this name for the run in `workdir`. The other arguments are flags of `argument_parser`.

    Raises:
        ValueError: there are no samples to compare, or fewer test images than samples in a set.
        FileNotFoundError: there is no run, or no classifier. Others: see `load` and `Scorer`.
    """
    if num_sets < 1:
        raise ValueError(f"--num_sets={num_sets} must be at least 1")
    trained = load(workdir, checkpoint)
    config = changed(trained.config, {"quality.features": features, "quality.reference": "train"})
    splits = build.load_splits(config)
    num_test = len(splits.test)
    if num_images is None:
        num_images = min(MOST_IMAGES, num_test)
    if not 2 <= num_images <= num_test:
        raise ValueError(
            f"--num_images={num_images} must be in 2…{num_test}, the number of test images: distances are comparable "
            "only for equal numbers of images"
        )
    scorer = Scorer(config, splits)
    return Study(workdir, name, trained, features, scorer, num_images, num_sets)


def changed(config: ConfigDict, keys: dict[str, Any]) -> ConfigDict:
    """A copy of a config with some keys changed."""
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(keys)
    return copy.lock()


def real_images(study: Study, test_set: Source) -> dict[str, list[float]]:
    """The scores of disjoint sets of test images, as large as the samples' sets: the target for perfect samples."""
    num_sets = len(test_set) // study.num_images
    chosen = np.random.default_rng(0).permutation(len(test_set))[: num_sets * study.num_images]
    images = test_set.images(np.sort(chosen.reshape(num_sets, study.num_images), axis=1).ravel())
    return study.scores(images.reshape(num_sets, study.num_images, *images.shape[1:]))


def protocol(study: Study, changes: dict[str, Any], columns: Collection[str]) -> str:
    """How samples were drawn and compared, so that readers can compare the numbers with others.

    Args:
        study: the study.
        changes: the config keys that every row changes.
        columns: the entries of `sample.described` that differ between rows, so that the table shows them.
    """
    config = changed(study.trained.config, changes)
    variance = config.model.variance if config.sample.variance == "model" else config.sample.variance
    about = sample.described(config, variance) | {"grid": config.sample.grid, "guidance": config.sample.guidance}
    sampler = ", ".join(f"{name} {value}" for name, value in about.items() if name not in columns)
    seen = " The classifier was trained on these training images." if study.features.startswith("classifier") else ""
    return (
        f"{study.num_sets} sets of {study.num_images} samples of one trained network: "
        f"{intervals.caption([study.num_sets], 'set')}. Differences are paired by set. Sampler: {sampler}. "
        "Fréchet distance, precision and recall are against all training images, by the features "
        f"`{study.features}`.{seen} The Fréchet distance of few images is biased upwards, so the test images are "
        f"compared in sets of {study.num_images}, too."
    )


def provenance() -> str:
    """The date, the device and the versions that the numbers were made with."""
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions().items())
    return f"{datetime.date.today()}, {summary.device_name()}, {versions}."


def cell(row: dict[str, Any], name: str, digits: int) -> str:
    """A number of a row as a table shows it; – where there is none."""
    return intervals.text(_mean(row, name), digits) if name in row else "–"


def less(row: dict[str, Any], base: dict[str, Any], name: str, digits: int) -> str:
    """A number of a row minus the base's, paired by set, as a table shows it."""
    differences = intervals.paired(dict(enumerate(row[name])), dict(enumerate(base[name])))
    return intervals.text(intervals.of_mean(differences.values()), digits, signed=True)


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """For a plot: the means of one number in some rows, and the half-widths of their intervals."""
    found = [_mean(row, name) for row in rows]
    return [interval.mean for interval in found], [interval.half_width for interval in found]


def save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows. A number with a value per set gets columns for the mean, the half-width and all values."""
    tables.save_csv(path, [_columns(row) for row in rows])


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    columns = {}
    for name, value in row.items():
        if isinstance(value, list):
            interval = _mean(row, name)
            columns |= {name: interval.mean, f"{name}_half_width": interval.half_width}
            columns[f"{name}_by_set"] = " ".join(map(str, value))
        else:
            columns[name] = value
    return columns


def _mean(row: dict[str, Any], name: str) -> Interval:
    """The mean over sets of a row's number, which is a list with a value per set, or one value."""
    return intervals.of_mean(np.atleast_1d(row[name]))
