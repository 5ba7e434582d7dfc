"""Samples of one trained run, drawn in several ways and scored: what the studies of sampling share."""

import csv
import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion.data import Source
from diffusion.experiment import build, workdir
from diffusion.experiment.workdir import Run
from diffusion.programs import sample
from diffusion.programs.quality import Scorer
from diffusion.reporting import summary
from diffusion.variances import X0Variance

METRICS = ("frechet_distance", "precision", "recall")
REAL = "test images"


class Study(NamedTuple):
    """A trained run, and what its samples are compared with.

    Attributes:
        directory: gets the samples, in shards that an interrupted study keeps.
        trained: the run.
        scorer: compares samples with the data by the study's features.
        num_images: samples of each way of drawing and each seed.
        seeds: of the samples.
    """

    directory: Path
    trained: Run
    scorer: Scorer
    num_images: int
    seeds: list[int]

    def images(
        self, changes: dict[str, Any], x0_variance: X0Variance | None = None
    ) -> list[UInt8[np.ndarray, "n h w c"]]:
        """For each seed the samples that the run's config draws with these keys changed."""
        return [self._images(changes | {"seed": seed}, x0_variance) for seed in self.seeds]

    def _images(self, changes: dict[str, Any], x0_variance: X0Variance | None) -> UInt8[np.ndarray, "n h w c"]:
        config, state = changed(self.trained.config, changes), self.trained.state
        labels = self.trained.experiment.training.network.num_classes if config.model.conditional else 0
        num_levels = self.trained.experiment.training.num_levels
        experiment = build.experiment(config, self.trained.image_shape, num_levels, labels)
        model = experiment.model(state.ema_params, config.sample.variance, x0_variance)
        into = self.directory / f"seed{config.seed}"
        folder = sample.fill(experiment, into, model, int(state.step), self.num_images)
        jax.clear_caches()  # each way of drawing is a program of its own
        return sample.read(folder, self.num_images)

    def scores(self, images: Iterable[UInt8[np.ndarray, "n h w c"]]) -> dict[str, float]:
        """The mean over seeds of each of METRICS, and its standard deviation under NAME_spread (NaN for one seed)."""
        by_seed = [self.scorer.numbers([of_seed], len(of_seed)) for of_seed in images]
        return spread({name: [numbers[name] for numbers in by_seed] for name in METRICS})


def study(directory: Path, name: str, checkpoint: str, features: str, num_images: int, num_seeds: int) -> Study:
    """The study `name` of the run in `directory`. Raises what `workdir.load` and `Scorer` do."""
    trained = workdir.load(directory, checkpoint)
    config = changed(trained.config, {"quality.features": features, "quality.reference": "train"})
    scorer = Scorer(config, *(build.load_data(config, split) for split in ("train", "test")))
    return Study(directory / name, trained, scorer, num_images, list(range(num_seeds)))


def changed(config: ConfigDict, keys: dict[str, Any]) -> ConfigDict:
    """A copy of a config with some keys changed."""
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(keys)
    return copy.lock()


def spread(values: dict[str, list[float]]) -> dict[str, float]:
    """Of each name's values the mean, and the standard deviation under NAME_spread."""
    found = {}
    for name, of_name in values.items():
        found[name] = float(np.mean(of_name))
        found[f"{name}_spread"] = float(np.std(of_name, ddof=1)) if len(of_name) > 1 else np.nan
    return found


def real_images(study: Study, test_set: Source) -> dict[str, float]:
    """The test images' METRICS against the training images: what perfect samples would come to, if as many."""
    numbers = study.scorer.numbers([test_set.images()], len(test_set))
    return {name: numbers[name] for name in METRICS}


def protocol(study: Study, features: str) -> str:
    """How samples were drawn and compared: what a reader must know to compare the numbers with others."""
    return (
        f"{study.num_images} samples and {len(study.seeds)} seeds of sampling, of one trained network; ± is their "
        "standard deviation. Fréchet distance, precision and recall are against all training images, by the features "
        f"`{features}`. The Fréchet distance of few images is biased upwards, and more so for the test images, which "
        "are fewer."
    )


def provenance() -> str:
    """Where and when the numbers were made."""
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions().items())
    return f"{datetime.date.today()}, {summary.device_name()}, {versions}."


def plus_minus(row: dict[str, Any], name: str, digits: int) -> str:
    """A number of a row with its spread, as a table shows it; – where there is none."""
    value, spread_of = row.get(name), row.get(f"{name}_spread", np.nan)
    if value is None or np.isnan(value):
        return "–"
    return f"{value:.{digits}f}" + ("" if np.isnan(spread_of) else f" ± {spread_of:.{digits}f}")


def save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows with every column that any has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
