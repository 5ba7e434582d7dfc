"""--mode=sample: draws images from a trained model, as a grid, a denoising trajectory, and arrays."""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8
from ml_collections import ConfigDict

from diffusion.evaluation.sampling import Sampler
from diffusion.experiment import guide, memory, results, sampling, workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import EmaState
from diffusion.model import Model
from diffusion.reporting import page, pictures, summary
from diffusion.runtime import files, processes
from diffusion.runtime.digests import short_sha256, tree_sha256
from diffusion.runtime.preemption import Preemption

SAMPLES = "samples"  # in the workdir: a folder for each way of sampling, with its images in shards
SHARD_IMAGES = 1000
SAVE_SECONDS = 60.0  # what a kill costs at most, besides a batch
TRAJECTORY_IMAGES = 8
MAX_ARCHIVE_BYTES = 2**30  # more images than that stay in their shards
ABOUT = "about.json"  # in such a folder: whose samples these are, and how they were drawn
GUIDE_SHA256 = "guide_sha256"  # in it: the digest of the guide's weights, which may be those of a run that goes on
MAX_NAME = 80  # letters of a folder's name, without its digest
ARCHIVE, GRID, TRAJECTORY = "samples.npz", "samples.png", "progressive.png"


def run(config: ConfigDict, directory: Path, checkpoint: str = "latest", output: str = "") -> None:
    """Draws from a checkpoint of `directory`, or continues an earlier call that was stopped.

    Args:
        output: a directory for the samples; "" for the run's own. With it, nothing is written into the run.

    Raises:
        ValueError: no image is to be drawn, or an error of `results.place` or `workdir.load`.
    """
    if not config.sample.num_images:
        raise ValueError("sample.num_images=0 draws no image; --config.sample.num_images=64 draws 64")
    out = results.place(directory, output, SAMPLES)
    loaded = workdir.load(directory, checkpoint, config, claims=not output)
    model = loaded.model_with(config.sample.variance)
    with Preemption() as preemption, memory.shortage_explained(loaded.experiment, "sample.batch_size"):
        folder = save(loaded.experiment, out, model, loaded.state, preemption.check)
    if processes.is_first():
        if not output:
            page.refresh(directory)
        print(f"{config.sample.num_images} samples: {folder}; the last ones also as {out / GRID}")


def make_sampler(experiment: Experiment) -> Sampler:
    """The config's sampler. A model with labels gets those of `classes`. Raises the errors of `guide.load`."""
    config, guiding = experiment.config.sample, guide.load(experiment)
    return Sampler(
        sampling.step(experiment.config),
        experiment.image_shape,
        experiment.config.seed,
        config.batch_size,
        config.num_steps or None,
        classes(experiment),
        config.guidance,
        config.guidance_interval,
        sampling.grid(experiment.config),
        guide.network(experiment, guiding) if guiding else None,
        guiding.model.schedule if guiding else None,
        guiding.state.sha256 if guiding else "",
    )


def save(
    experiment: Experiment,
    directory: Path,
    model: Model,
    state: EmaState,
    stop: Callable[[], None] | None = None,
    sampler: Sampler | None = None,
) -> Path:
    """Draws sample.num_images images into a folder of samples/, named after the weights and the way of drawing.

    They are written in shards. So a stopped call continues where it was, and a call for more images draws only the new
    ones. The folder also gets a grid of the first sample.num_previews images, their denoising trajectories, and all
    images in one file (uint8 [N, H, W, C]) if that is not too large. `directory` itself gets the files of the latest
    call.

    Args:
        model: the model of the parameters of `state`.
        stop: called after each batch; raises to stop.
        sampler: a sampler that is already compiled.
    """
    config, sampler = experiment.config.sample, sampler or make_sampler(experiment)
    with _folder(experiment, directory, model, state, sampler) as folder:
        _fill(sampler, model, folder, config.num_images, stop)
        trajectories = sampler.trajectories(model, min(TRAJECTORY_IMAGES, config.num_images))
        if processes.is_first():
            previews = read(folder, min(config.num_previews, config.num_images))
            pictures.save_png(folder / GRID, grid(experiment, previews))
            pictures.save_png(folder / TRAJECTORY, pictures.trajectory_grid(trajectories, model.num_levels))
            _save_archive(experiment, folder)
            _publish(folder, directory)
    return folder


def fill(
    experiment: Experiment,
    directory: Path,
    model: Model,
    state: EmaState,
    num_images: int,
    stop: Callable[[], None] | None = None,
) -> Path:
    """Fills the folder of `save` up to `num_images` images and returns the folder."""
    sampler = make_sampler(experiment)
    with _folder(experiment, directory, model, state, sampler) as folder:
        _fill(sampler, model, folder, num_images, stop)
    return folder


@contextlib.contextmanager
def _folder(
    experiment: Experiment, directory: Path, model: Model, state: EmaState, sampler: Sampler
) -> Iterator[Path]:
    """The folder of the samples that these weights give, locked; what tells it from others is in its about.json."""
    about = described(experiment.config, model.p.variance)
    about |= {"step": int(state.step), "ema_sha256": state.sha256}
    if model.p.variance == "optimal":
        about["x0_variance_sha256"] = tree_sha256(model.schedule.x0_variance)
    if sampler.guide_sha256:  # the guide may be a run that has trained further since the sampler was made
        about[GUIDE_SHA256] = sampler.guide_sha256
    folder = directory / SAMPLES / name(about)
    with workdir.locked(folder):
        if processes.is_first():
            summary.write_json(folder / ABOUT, about)
        yield folder


def name(about: dict[str, Any]) -> str:
    """The name of a folder: readable settings, and a digest of everything that distinguishes sets of samples."""
    words = f"step{about['step']}-{about['method']}-{about['num_steps']}steps-{about['variance']}"
    if about.get("guidance"):
        words += f"-guidance{about['guidance']:g}"
    readable = re.sub(r"[^\w.=+-]+", "_", words, flags=re.ASCII)[:MAX_NAME]
    return f"{readable}-{short_sha256(about)}"


def described(config: ConfigDict, variance: str) -> dict[str, Any]:
    """The way of drawing images, for quality.json."""
    about = {
        "method": config.sample.method,
        "num_steps": config.sample.num_steps or config.schedule.num_steps,
        "variance": variance,
        "seed": config.seed,
    }
    if config.sample.grid != "even":
        about["grid"] = config.sample.grid
    if config.model.conditional:
        about["labels"] = list(config.sample.labels) or "all in turn"
    if config.model.conditional or config.sample.guide:
        ends = list(config.sample.guidance_interval)
        if not sampling.is_continuous(config):
            # t is an integer: (2.5, 4.5) guides as (2, 4) does. An integral end stays as it is written, 2 or 2.0.
            ends = [math.floor(end) if end % 1 else end for end in ends]
        about |= {"guidance": config.sample.guidance, "guidance_interval": ends or "every t"}
    if config.sample.guide:
        about["guide"] = config.sample.guide
    return about


def classes(experiment: Experiment) -> tuple[int, ...]:
    """The labels of drawn images, repeated in turn; () for a network without labels."""
    config, network = experiment.config, experiment.training.network
    return config.sample.labels or (tuple(range(network.num_classes)) if config.model.conditional else ())


def labels(experiment: Experiment, num_images: int) -> Int32[np.ndarray, " n"]:
    """The labels of the first images, for a network with labels."""
    return np.resize(np.array(classes(experiment), np.int32), num_images)


def grid(experiment: Experiment, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "grid_h grid_w c"]:
    """The first images side by side, with a row for each class if the network takes labels."""
    num_levels = experiment.training.num_levels
    if experiment.config.model.conditional:
        return pictures.class_grid(images, labels(experiment, len(images)), num_levels)
    return pictures.image_grid(images, num_levels)


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.npy"


def _fill(sampler: Sampler, model: Model, folder: Path, num_images: int, stop: Callable[[], None] | None) -> None:
    """Draws the images that are in no shard yet. A shard is written when it is full, and from time to time before."""
    paths = [shard(folder, number) for number in range(math.ceil(num_images / SHARD_IMAGES))]
    found = [_held(path, sampler.image_shape) if processes.is_first() else 0 for path in paths]
    held = processes.from_first(np.array(found, np.int64))
    number, within = np.divmod(np.arange(num_images), SHARD_IMAGES)
    is_done = within < held[number]
    if is_done.all():
        return
    drawn = _Drawn(folder)
    try:
        for numbers, images in sampler.batches(model, num_images, is_done):
            drawn.add(numbers[~is_done[numbers]], images[~is_done[numbers]])
            if stop is not None:
                stop()
    finally:
        drawn.write()


class _Drawn:
    """Images on their way into shards, in the order of their numbers; process 0 alone writes."""

    def __init__(self, folder: Path):
        self._folder, self._written = folder, time.monotonic()
        self._begin, self._images = 0, []  # the number of the first one that may not be on the disk, and all since

    def add(self, numbers: Int[np.ndarray, " b"], images: UInt8[np.ndarray, "b h w c"]) -> None:
        for number in np.unique(numbers // SHARD_IMAGES).tolist():
            of_shard = numbers // SHARD_IMAGES == number
            if number != self._begin // SHARD_IMAGES:
                self.write()
            if not self._images:
                self._begin = int(numbers[of_shard][0])
            self._images.append(images[of_shard])
        if time.monotonic() > self._written + SAVE_SECONDS:
            self.write()

    def write(self) -> None:
        """Puts what has come behind what the shard has; a signal may interrupt it at any point."""
        if self._images and processes.is_first():
            number, held = divmod(self._begin, SHARD_IMAGES)
            path = shard(self._folder, number)
            before = [np.load(path)[:held]] if held else []
            with files.replacing(path) as file:
                np.save(file, np.concatenate([*before, *self._images]))
        self._images, self._written = [], time.monotonic()


def _held(path: Path, image_shape: tuple[int, ...]) -> int:
    """How many images [H, W, C] a shard has; one that is damaged has none."""
    if not path.exists():
        return 0
    try:
        images = np.load(path, mmap_mode="r")
    except files.DAMAGE as error:
        logging.warning("%s is damaged (%s); its images are drawn again", path, error)
        return 0
    return len(images) if images.dtype == np.uint8 and images.shape[1:] == image_shape else 0


def shards(folder: Path, num_images: int) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
    """The first images of a folder of samples/, shard by shard."""
    for begin in range(0, num_images, SHARD_IMAGES):
        yield np.load(shard(folder, begin // SHARD_IMAGES))[: num_images - begin]


def read(folder: Path, num_images: int) -> UInt8[np.ndarray, "n h w c"]:
    """The first images of a folder of samples/."""
    return np.concatenate(list(shards(folder, num_images)))


def _save_archive(experiment: Experiment, folder: Path) -> None:
    """samples.npz, or none if it were too large."""
    num_images = experiment.config.sample.num_images
    drawn = {"labels": labels(experiment, num_images)} if experiment.config.model.conditional else {}
    size = num_images * np.load(shard(folder, 0), mmap_mode="r")[0].size
    if size > MAX_ARCHIVE_BYTES:
        (folder / ARCHIVE).unlink(missing_ok=True)
        return
    with files.replacing(folder / ARCHIVE) as file:
        num_levels = experiment.training.num_levels
        np.savez_compressed(file, images=read(folder, num_images), num_levels=num_levels, **drawn)


def _publish(folder: Path, directory: Path) -> None:
    """Puts the last samples' files into the workdir itself, under the same names."""
    for file_name in (ARCHIVE, GRID, TRAJECTORY):
        if not (folder / file_name).exists():
            (directory / file_name).unlink(missing_ok=True)
            continue
        with files.replacing(directory / file_name) as file:
            file.write((folder / file_name).read_bytes())
