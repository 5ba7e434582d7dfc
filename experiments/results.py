"""The results of a sweep, read from its folders: finished runs, grouped over seeds, and paired differences."""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.experiment import config as config_lib
from diffusion.experiment import schema, workdir
from diffusion.likelihood import PROTOCOLS
from diffusion.programs import quality
from diffusion.reporting.distance_kind import DistanceKind, distance_kind
from diffusion.reporting.page import numbers
from diffusion.reporting.summary import read_json
from diffusion.runtime import files
from diffusion.runtime.digests import short_sha256
from experiments import intervals, tables

# The axes of a grid, and the config keys behind them.
AXES = {
    "prediction": "model.prediction",
    "objective": "objective.name",
    "variance": "model.variance",
    "schedule": "schedule.name",
    "T": "schedule.num_steps",
    "seed": "seed",
}
MAX_KEY_COLUMNS = 3  # besides the axes
ALL = "all"  # test images were scored
LOG = "log.txt"  # in a run's folder: its output
# Keys that may differ between the runs of one row: the seed, and keys that affect neither training nor scores.
WITHIN_A_ROW = {"seed", "eval.batch_size"} | {
    name
    for name, key in schema.all_keys().items()
    if key.free is True and not name.startswith("eval.") and name != "train.patience"
}


class Target(NamedTuple):
    """A published result for CIFAR-10; without numbers, a training that the paper calls unstable."""

    source: str
    test_bpd: float | None = None
    train_bpd: float | None = None
    fid: float | None = None

    def __str__(self) -> str:
        if self == Target(self.source):
            return f"unstable; {self.source}"
        test = f"{self.test_bpd:.2f}" if self.test_bpd else "–"
        train = f" (train {self.train_bpd:.2f})" if self.train_bpd else ""
        return f"{test}{train}, FID {self.fid:.2f}; {self.source}"


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        name: the name of its folder.
        config: config key -> value, as config.json holds it, with the protocol of summary.json.
        summary: the contents of summary.json.
        quality: the contents of quality.json; {} if there is none for these weights.
        image_bpd: the bound of each test image; None if it was estimated from a few terms (eval.terms_per_image).
        terms_bpd: entry t − 1 is the mean term of t; None in the same case.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    quality: dict[str, Any]
    image_bpd: Float[np.ndarray, " n"] | None
    terms_bpd: Float[np.ndarray, " t"] | None


TargetOf = Callable[[FinishedRun], Target | None]  # the published result that a run is compared with


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs that differ only in their seed, in the order of the seeds."""

    setting: dict[str, str]  # the printed values of the config, by column
    runs: list[FinishedRun]

    @property
    def of_seeds(self) -> dict[int, FinishedRun]:
        """A run for each seed, which the numbers are of: of several folders with equal seeds the last one alone."""
        return {run.config["seed"]: run for run in self.runs}

    def mean(self, entry: str) -> float:
        """The mean over seeds of an entry of summary.json."""
        return float(np.mean([run.summary[entry] for run in self.of_seeds.values()]))

    @property
    def stderr_bpd(self) -> float:
        """The standard error of the mean over images. Every seed scored the same images.

        Estimates do not keep each image's bound. For them it is the largest standard error of a seed.
        """
        if not self.has_every_term:
            return max(run.summary["test_bpd_stderr"] for run in self.of_seeds.values())
        return tables.stderr(np.mean([run.image_bpd for run in self.of_seeds.values()], axis=0))

    @property
    def has_every_term(self) -> bool:
        """Whether no run was scored by an estimate."""
        return all(run.image_bpd is not None for run in self.of_seeds.values())

    @property
    def bpd(self) -> dict[int, float]:
        """Bits/dim of the test images by seed."""
        return {seed: run.summary["test_bpd"] for seed, run in self.of_seeds.items()}

    @property
    def validation_bpd(self) -> dict[int, float]:
        """Bits/dim of the validation images by seed; {} unless every run set some aside."""
        found = {seed: run.summary.get("validation_bpd") for seed, run in self.of_seeds.items()}
        return {} if None in found.values() else found

    @property
    def distance_kind(self) -> DistanceKind | None:
        """The kind of Fréchet distance that every seed has; None if one has none or another kind."""
        found = {distance_kind(run.config, run.quality) for run in self.of_seeds.values()}
        return found.pop() if len(found) == 1 else None

    @property
    def distances(self) -> dict[int, float]:
        """The Fréchet distance by seed; {} unless all seeds have the same kind."""
        if not self.distance_kind:
            return {}
        return {seed: numbers.distance(run.quality).value for seed, run in self.of_seeds.items()}


class Difference(NamedTuple):
    """One row minus another, by the seeds that both have.

    Attributes:
        setting: the cells before the numbers.
        bpd: the differences of the test images' bits/dim.
        stderr_bpd: the standard error over images of the mean over seeds, paired by image; NaN for estimates.
        distances: the differences of the Fréchet distances; {} unless both rows have the same kind.
    """

    setting: dict[str, str]
    bpd: dict[int, float]
    stderr_bpd: float
    distances: dict[int, float]


def last_line(folder: Path) -> str:
    """The last line that a run printed: its error, if it failed."""
    log = folder / LOG
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].strip() if lines else "not started"


def read(directory: Path) -> tuple[list[FinishedRun], dict[str, str]]:
    """The finished runs in the folders of `directory`, and for each other folder the reason, by its name."""
    runs, unfinished = [], {}
    for folder in sorted(path.parent for path in directory.glob("*/config.json")):
        if not (folder / "summary.json").exists():
            unfinished[folder.name] = last_line(folder)
            continue
        summary = read_json(folder / "summary.json")
        if summary is None:
            unfinished[folder.name] = "summary.json is damaged; the same command scores the run again"
            continue
        if "test_bpd" not in summary:
            unfinished[folder.name] = "trained, and not scored (eval.num_images=-1)"
            continue
        try:
            config = _as_scored(_with_every_key(config_lib.flatten(workdir.read_config(folder))), summary)
        except (ValueError, OSError) as error:  # damaged, or with a key of another version
            unfinished[folder.name] = str(error)
            continue
        bounds = None, None
        if not config["eval.terms_per_image"]:
            bounds = _bounds(folder / "bpd.npz")
        runs.append(FinishedRun(folder.name, config, summary, quality.read(folder), *bounds))
    return runs, unfinished


def _bounds(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bound of each test image, and the mean of each term, of a run that was scored in full."""
    try:
        with np.load(path) as saved:
            return saved["test_image_bpd"], saved["test_terms_bpd"]
    except files.DAMAGE as error:
        again = f"delete {path.parent / 'summary.json'}, and the same command scores the run again"
        raise ValueError(f"{path} is damaged ({error}); {again}") from error


def _with_every_key(config: dict[str, Any]) -> dict[str, Any]:
    """A config with today's keys of its network, so that runs of older versions equal today's."""
    own = f"{config['model.network']}."
    absent = {name: key.when_absent for name, key in schema.all_keys().items() if name.startswith(own)}
    return absent | config


def _as_scored(config: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """A config with the protocol that was scored. A sweep of an earlier version may have written another one later."""
    said = summary.get("protocol")
    if not isinstance(said, dict) or not {"name", "estimator"} <= said.keys():
        return config
    few = said["estimator"].partition(" ")[0]  # "9 terms per image: …", or "every term"
    return config | {"eval.protocol": said["name"], "eval.terms_per_image": int(few) if few.isdecimal() else 0}


def rows(runs: list[FinishedRun]) -> tuple[list[Row], dict[str, str]]:
    """The runs grouped over seeds, and the recipes by letter.

    A row's columns are the axes except the seed, and every other key, or the data's digest, that differs between runs.
    If more than MAX_KEY_COLUMNS differ, one column has the letter of a recipe instead, which names all their values.
    """
    settings = _settings(runs)
    columns = {axis: key for axis, key in AXES.items() if axis != "seed"}
    others = sorted({key for values in settings for key in values} - set(AXES.values()))
    others = [key for key in others if key not in WITHIN_A_ROW]
    others = [key for key in others if len({str(values.get(key)) for values in settings}) > 1]
    if len(others) <= MAX_KEY_COLUMNS:
        columns, others = columns | {key: key for key in others}, []
    letters: dict[str, str] = {}
    columns |= {key: key for key in _told_apart_by(runs, settings, [*columns.values(), *others])}
    groups = collections.defaultdict(list)
    for run, values in zip(runs, settings, strict=True):
        setting = {column: str(values.get(key)) for column, key in columns.items()}
        if others:
            recipe = ", ".join(f"{key}={values.get(key)}" for key in others)
            setting["recipe"] = letters.setdefault(recipe, chr(ord("a") + len(letters)))
        groups[tuple(setting.items())].append(run)
    table = [Row(dict(key), sorted(group, key=lambda run: run.config["seed"])) for key, group in groups.items()]
    return table, {letter: recipe for recipe, letter in letters.items()}


def _told_apart_by(runs: list[FinishedRun], settings: list[dict[str, Any]], known: list[str]) -> list[str]:
    """Keys of WITHIN_A_ROW that differ between runs of one seed. A sweep varies them, so they need a column."""
    alike = collections.defaultdict(list)
    for run, values in zip(runs, settings, strict=True):
        alike[(run.config["seed"], *(str(values.get(key)) for key in known))].append(run.config)
    free = sorted(WITHIN_A_ROW - {"seed", "data.data_dir"})
    return [key for key in free if any(len({str(one.get(key)) for one in configs}) > 1 for configs in alike.values())]


def _settings(runs: list[FinishedRun]) -> list[dict[str, Any]]:
    """Each run's config keys, and digests of its data and of the weights it started from, where the runs' differ."""
    settings = [run.config for run in runs]
    starts = [(run.summary.get("started_from") or {}).get("sha256") for run in runs]
    for name, known in (("data", [run.summary.get("data_sha256") for run in runs]), ("start", starts)):
        if len({str(digests) for digests in known if digests}) > 1:  # older runs have none
            settings = [of | {name: short_sha256(digests)} for of, digests in zip(settings, known, strict=True)]
    return settings


def less_base(table: list[Row], base: Row) -> list[Difference | None]:
    """Each row minus the base; None for the base itself, and for rows scored on other images."""
    found: list[Difference | None] = []
    for row in table:
        is_comparable = row is not base and _of_the_same_images(row.runs[0], base.runs[0])
        found.append(_difference(row.setting, row, base) if is_comparable else None)
    return found


def between_variances(table: list[Row], base: Row) -> list[Difference]:
    """The differences of all pairs of variances with otherwise equal settings and a common seed, without the base."""
    found = []
    for one, other in itertools.combinations([row for row in table if row is not base], 2):
        rest = {column: value for column, value in one.setting.items() if column != "variance"}
        if rest | {"variance": other.setting["variance"]} == other.setting and one.bpd.keys() & other.bpd.keys():
            pair = {"variances": f"{one.setting['variance']} − {other.setting['variance']}"}
            found.append(_difference(rest | pair, one, other))
    return found


def _of_the_same_images(one: FinishedRun, other: FinishedRun) -> bool:
    """Whether both were scored on the same test images. Runs of earlier versions lack digests of data or numbers."""
    digests = {(run.summary.get("data_sha256") or {}).get("test") for run in (one, other)} - {None}
    same_name = one.config["data.name"] == other.config["data.name"]
    is_equal = same_name and one.summary["test_images"] == other.summary["test_images"] and len(digests) < 2
    numbers = {run.summary.get("test_numbers_sha256") for run in (one, other)}
    if None not in numbers:
        return is_equal and len(numbers) == 1
    choices = {_choice(run.config) for run in (one, other)}
    return is_equal and (len(choices) == 1 or ALL in choices)


def _choice(config: dict[str, Any]) -> str:
    """Which images a run scored that does not say their numbers. As many as all are all, whatever the other chose."""
    if config["eval.num_images"]:
        return "at random"
    return ALL if PROTOCOLS[config["eval.protocol"]].images_multiple == 1 else "the first"


def _difference(setting: dict[str, str], one: Row, other: Row) -> Difference:
    bpd = intervals.paired(one.bpd, other.bpd)
    stderr = np.nan
    if bpd and one.has_every_term and other.has_every_term:
        by_image = [one.of_seeds[seed].image_bpd - other.of_seeds[seed].image_bpd for seed in bpd]
        stderr = tables.stderr(np.mean(by_image, axis=0))
    same_kind = one.distance_kind == other.distance_kind
    distances = intervals.paired(one.distances, other.distances) if same_kind else {}
    return Difference(setting, bpd, stderr, distances)
