"""--mode=quality: compares samples of a trained model with a reference set, by every metric of `evaluation.quality`."""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion.data import Source
from diffusion.data.source import SPLITS
from diffusion.evaluation import quality, reference
from diffusion.evaluation.features import Batch
from diffusion.evaluation.reference import Numbers, Reference
from diffusion.experiment import build, memory, results, workdir
from diffusion.programs import sample
from diffusion.reporting import page, summary
from diffusion.reporting.progress import Progress
from diffusion.runtime import files, processes
from diffusion.runtime.preemption import Preemption

NAME = "quality.json"
GUIDE = sample.GUIDE_SHA256  # an entry of it
FEWEST_TRAINED = 4  # images of the training split: its two halves are compared, for scale
UNFINISHED = "unfinished_quality"  # in the workdir: features of a call that was stopped
USUAL_IMAGES = 50_000  # of published Fréchet distances
# With Inception's features these numbers have a name of their own, under which papers state them.
FID_NAMES = {"frechet_distance": "fid", "frechet_infinity": "fid_infinity"}


def run(config: ConfigDict, directory: Path, checkpoint: str = "latest", output: str = "") -> None:
    """Draws the samples of a checkpoint of `directory` that samples/ lacks, writes quality.json and prints it.

    Args:
        output: a directory for samples and quality.json; "" for the run's own. With it, nothing is written into the
            run.

    Raises the errors of `results.place` and `workdir.load`.
    """
    out = results.place(directory, output, sample.SAMPLES)
    loaded = workdir.load(directory, checkpoint, config, claims=not output)
    model = loaded.model_with(config.sample.variance)
    unfinished, num_images = out / UNFINISHED, config.quality.num_images
    with Preemption() as preemption:
        with preemption.at_points():
            splits = build.load_splits(config)
        scorer = processes.on_first(lambda: Scorer(config, splits, unfinished))
        with memory.shortage_explained(loaded.experiment, "sample.batch_size"):
            folder = sample.fill(loaded.experiment, out, model, loaded.state, num_images, preemption.check)

        def write() -> None:
            scores = scorer.scores(sample.shards(folder, num_images), num_images) | {
                "sampler": sample.described(config, model.p.variance),
                "step": int(loaded.state.step),
                "ema_sha256": loaded.state.sha256,
                **_guide_of(folder),
                "data_sha256": splits.sha256(),
                "device": summary.device_name(),
                "versions": summary.versions(),
            }
            summary.write_json(out / NAME, scores)
            shutil.rmtree(unfinished, ignore_errors=True)
            print(json.dumps(scores, indent=2, ensure_ascii=False))
            if not output:
                page.refresh(directory)

        processes.on_first(write)


def read(directory: Path) -> dict[str, Any]:
    """The contents of quality.json, if its weights and data are those of summary.json; otherwise {}."""
    scores, bound = (summary.read_json(directory / name) for name in (NAME, workdir.SUMMARY))
    if scores is None or bound is None:
        return {}
    weights, data = ([of.get(name) for of in (scores, bound)] for name in ("ema_sha256", "data_sha256"))
    # Files of earlier versions do not say which data they are of.
    is_same_data = None in data or data[0] == data[1]
    return scores if weights[0] == weights[1] and is_same_data else {}


def is_measured(config: ConfigDict, directory: Path) -> bool:
    """Whether quality.json belongs to a finished run's last weights and to samples as the config asks for them."""
    scores, wanted = read(directory), config.quality
    variance = config.model.variance if config.sample.variance == "model" else config.sample.variance
    asked = {
        "num_samples": wanted.num_images,
        "features": wanted.features,
        "sampler": sample.described(config, variance),
    }
    is_split = wanted.reference in SPLITS
    if _has_another_guide(config, scores):
        return False
    reference_name = f", {wanted.reference} split, " if is_split else _file_name(files.expanded(wanted.reference))
    return all(scores.get(key) == value for key, value in asked.items()) and reference_name in scores["reference"]


def _guide_of(folder: Path) -> dict[str, str]:
    """The digest of the guide's weights that the samples in a folder were drawn with, if they had a guide."""
    about = summary.read_json(folder / sample.ABOUT) or {}
    return {GUIDE: about[GUIDE]} if GUIDE in about else {}


def _has_another_guide(config: ConfigDict, scores: dict[str, Any]) -> bool:
    """Whether sample.guide has other weights than when these scores were made.

    One that is gone or damaged counts as unchanged, so what was measured with it stays. Files of earlier versions do
    not say which weights it had.

    Raises:
        OSError: the disk cannot be read.
    """
    if GUIDE not in scores or not config.sample.guide:
        return False
    try:
        return workdir.load(config.sample.guide, claims=False).state.sha256 != scores[GUIDE]
    except (ValueError, FileNotFoundError):
        return False


def _file_name(path: Path) -> str:
    """The name of a reference in a file: where it lies and, as long as it does, which one it is."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return f"{path}, SHA-256 {sha256}"


class Scorer:
    """Measures samples by the config's features, against its reference.

    Args:
        config: the config with the features and the reference.
        sources: the splits that may be used, the training split among them. A split of fewer than two images, which
            have no covariance, counts as missing.
        unfinished: a folder that keeps the features of a network, for a call that may be stopped.

    Raises:
        FileNotFoundError, ConnectionError: the features' weights or the reference's file are missing.
        ValueError: they are damaged or do not fit, or the reference or the training split has too few images.
    """

    def __init__(self, config: ConfigDict, sources: Iterable[Source], unfinished: Path | None = None):
        self._unfinished = unfinished
        self._config, self._sets = config, {source.split: source for source in sources if len(source) > 1}
        if "train" not in self._sets or len(self._sets["train"]) < FEWEST_TRAINED:
            raise ValueError(f"quality takes a training split of {FEWEST_TRAINED} images or more, two for each half")
        self._features = build.quality_features(config, self._sets["train"])
        self._dimension = self._features.extract(self._sets["train"].images(slice(1))).features.shape[1]
        self._published = None
        if self._config.quality.reference not in SPLITS:
            self._published = reference.published(self._path, self._dimension)
        elif self._config.quality.reference not in self._sets:
            raise ValueError(f"quality.reference={self._config.quality.reference!r} has fewer than two images here")

    @property
    def _path(self) -> Path:
        return files.expanded(self._config.quality.reference)

    def numbers(
        self,
        images: Iterable[UInt8[np.ndarray, "n h w c"]],
        num_images: int,
        metrics: Iterable[str] | None = None,
    ) -> Numbers:
        """The metrics, by default all, of samples that come in parts."""
        return self._named(quality.results(self._drawn(images, num_images), self._reference.states, metrics))

    def scores(self, images: Iterable[UInt8[np.ndarray, "n h w c"]], num_images: int) -> dict[str, Any]:
        """The metrics, the metrics of real images for scale, and a description of the comparison."""
        drawn = self._drawn(images, num_images)
        found = quality.results(drawn, self._reference.states) | self._reference.scale | self._at_equal_n(drawn)
        about = {
            "num_samples": num_images,
            "features": self._config.quality.features,
            "weights_sha256": self._features.sha256 or None,
            **self._features.facts,
            "reference": self._reference_name,
        }
        if num_images < USUAL_IMAGES:
            about["note"] = (
                f"the Fréchet distance of few images is biased upwards: that of {num_images} samples compares only "
                f"with others of {num_images}; frechet_equal_n is of {found['frechet_equal_n_images']} samples and of "
                "as many real images, and frechet_infinity, where it is not null, is without this bias"
            )
        return self._named(found) | about

    def _drawn(self, images: Iterable[UInt8[np.ndarray, "n h w c"]], num_images: int) -> quality.States:
        with Progress(num_images, desc="features of the samples", unit="image") as progress:
            return quality.states(self._batches(images, progress))

    def _at_equal_n(self, drawn: quality.States) -> Numbers:
        """The Fréchet distance of the samples, and of real images, at the number that there is of both."""
        features, (against, _, others) = drawn[quality.see].kept.rows, self._reference
        size = min(len(features), len(others))
        real = _ending(quality.at_equal_n(others, against, size), f"{self._other}_split")
        return quality.at_equal_n(features, against, size) | real | {"frechet_equal_n_images": size}

    def _named(self, numbers: Numbers) -> Numbers:
        """The same, with Inception's features also under the names of FID."""
        names = FID_NAMES if self._features.is_fid else {}
        as_fid = {
            name.replace(own, fid): value
            for own, fid in names.items()
            for name, value in numbers.items()
            if name.startswith(own)
        }
        return as_fid | numbers

    @property
    def _other(self) -> str:
        """A split that samples are not compared with, for scale; where there is none, the training split."""
        others = [split for split in ("test", "train", "validation") if split in self._sets]
        return next((split for split in others if split != self._config.quality.reference), "train")

    @functools.cached_property
    def _reference_name(self) -> str:
        if self._published is not None:
            return _file_name(self._path)
        split = self._sets[self._config.quality.reference]
        return f"{split.name}, {split.split} split, {len(split)} images"

    @functools.cached_property
    def _reference(self) -> Reference:
        facts = {
            "features": self._config.quality.features,
            "weights": self._features.sha256,
            "reference": self._reference_name,
        }
        digests = {split: source.sha256() for split, source in self._sets.items()}
        return reference.cached(facts | digests, self._dimension, self._made)

    def _made(self) -> Reference:
        """The reference's states; for scale the other split against it, and two halves of the training set."""
        name = self._config.quality.reference
        needed = {name, self._other} & self._sets.keys() - {"train"}
        of_splits = {split: self._states(self._sets[split]) for split in sorted(needed)}
        of_splits["train"], *halves = self._states_with_halves(self._sets["train"])
        states, other = of_splits.get(name, self._published), of_splits[self._other]
        scale = _ending(quality.results(other, states), f"{self._other}_split")
        scale |= _ending(quality.results(*halves), "train_halves")
        return Reference(quality.as_reference(states), scale, quality.kept_features(other))

    def _states(self, source: Source) -> quality.States:
        with Progress(len(source), desc=f"features of the {source.split} split", unit="image") as progress:
            return quality.states(self._batches(source.parts(), progress))

    def _states_with_halves(self, source: Source) -> tuple[quality.States, quality.States, quality.States]:
        half = np.random.default_rng(0).permutation(len(source)) % 2
        whole, parts, begin = {}, [{}, {}], 0
        with Progress(len(source), desc=f"features of the {source.split} split", unit="image") as progress:
            for batch in self._batches(source.parts(), progress):
                whole = quality.updated(whole, batch)
                of_batch = half[begin : begin + len(batch.features)]
                parts = [quality.updated(part, batch.only(of_batch == number)) for number, part in enumerate(parts)]
                begin += len(batch.features)
        return whole, *parts

    def _batches(self, images: Iterable[UInt8[np.ndarray, "n h w c"]], progress: Progress) -> Iterator[Batch]:
        for part in images:
            for batch in self._features.batches(part, self._unfinished):
                yield batch
                progress.update(len(batch.features))


def _ending(numbers: Numbers, suffix: str) -> Numbers:
    return {f"{name}_{suffix}": value for name, value in numbers.items()}
